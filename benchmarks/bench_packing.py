"""Documents packed whole into rows of 2048 tokens, best-fit decreasing."""

import bisect

import numpy as np
import torch

from benchmarks.harness import Case, Provider, Run, Tensors, Work

ROW = 2048
MEAN_LENGTH = 600  # tokens, as web pages have; log-normal, so that some documents are longer than a row


def cases(device: torch.device) -> list[Case]:
    """Packing is a matter of the host; device only says where the other benchmarks run."""
    return [_case(10_000_000, peers=False), _case(100_000, peers=True)]


def _case(num_documents: int, peers: bool) -> Case:
    """Plain Python would need minutes for ten million documents, so it is compared at a hundredth of that."""

    def inputs() -> Tensors:
        lengths = torch.empty(num_documents).log_normal_(np.log(MEAN_LENGTH) - 0.5, 1.0).long().clamp_(min=1)
        return {"starts": lengths.cumsum(0) - lengths, "lengths": lengths}

    def truth(given: Tensors) -> Tensors:
        whole = {"overfull_rows": torch.tensor(0), "tokens": given["lengths"].sum()}
        return {**whole, "rows": _python(given)["rows"]} if peers else whole

    fastlm = Provider("fastlm", lambda: _fastlm(count_rows=peers), "ours")
    python = Provider("plain Python (bisect)", lambda: _python)
    return Case(
        name=f"{num_documents:,} documents, rows of {ROW}",
        device=torch.device("cpu"),
        inputs=inputs,
        truth=truth,
        reference=python.name if peers else fastlm.name,
        providers=[fastlm, python] if peers else [fastlm],
        work=(Work("document", float(num_documents), "those longer than a row are split first"),),
    )


def _fastlm(count_rows: bool) -> Run:
    from fastlm.data.packing import pack_documents

    def run(given: Tensors) -> Tensors:
        packing = pack_documents(given["starts"].numpy(), given["lengths"].numpy(), ROW)
        used = np.add.reduceat(packing.lengths, packing.row_starts[:-1])
        found = {"overfull_rows": torch.tensor(int((used > ROW).sum())), "tokens": torch.tensor(int(used.sum()))}
        return {**found, "rows": torch.tensor(packing.num_rows)} if count_rows else found

    return run


def _python(given: Tensors) -> Tensors:
    """Free spaces of the rows, sorted: each piece goes where it fits most tightly. The number of rows is unique."""
    pieces = []
    for length in given["lengths"].tolist():
        full, rest = divmod(length, ROW)
        pieces += [ROW] * full + [rest] * (rest > 0)
    free: list[int] = []
    for piece in sorted(pieces, reverse=True):
        tightest = bisect.bisect_left(free, piece)
        space = free.pop(tightest) if tightest < len(free) else ROW
        bisect.insort(free, space - piece)
    overfull = sum(space < 0 for space in free)
    return {
        "overfull_rows": torch.tensor(overfull),
        "tokens": torch.tensor(len(free) * ROW - sum(free)),
        "rows": torch.tensor(len(free)),
    }

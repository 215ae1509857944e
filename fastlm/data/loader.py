"""Packed batches of a token dataset: endless and resumable for training, one pass for evaluation.

Rows are packed once. Training reads one endless line of rows, the first epoch's permutation of them followed by the
second's and so on; every batch takes the next batch_size * world_size rows of that line, assigned to the ranks so that
attention costs each about as much. So no row is ever dropped, all ranks have equally many batches, and the whole state
is how many rows were taken: it takes O(1) to resume, and another batch size or number of ranks may go on from there.

Batches have fixed shapes, cu_seqlens included, or torch.compile would compile again for each.
"""

import contextlib
import dataclasses
import functools
import heapq
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fastlm.data.packing import OVERLONG, Packing, PackingReport, pack_documents
from fastlm.data.shards import TokenDataset
from fastlm.wording import quantity

IGNORED = -100  # the target of padding; torch's default ignore_index
EMPTY_ROW = -1
BYTES_PER_TOKEN = 43  # of memory while a batch is put together: five columns of int64, a mask, tokens as stored
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def check_batch(batch_size: int, sequence_length: int) -> None:
    """Raise ValueError for batches that this machine has no memory for: the system would end the process unheard."""
    needed, present = BYTES_PER_TOKEN * batch_size * sequence_length, memory()
    batch = f"a batch of {quantity(batch_size, 'row')} of {quantity(sequence_length, 'token')}"
    if needed > present:
        raise ValueError(
            f"{batch} takes {needed / 1e9:,.1f} GB to put together, and this machine has {present / 1e9:,.1f} GB: "
            "take a smaller batch_size or sequence_length"
        )
    if batch_size * sequence_length >= 1 << 31:
        raise ValueError(
            f"{batch} has more tokens than cu_seqlens, which is int32, can count: take a smaller batch_size or "
            "sequence_length"
        )


def memory() -> float:
    """Bytes that a process may take on this machine, or in this container; infinite where the system does not tell."""
    limits = [math.inf]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in MEMORY_LIMITS:
        with contextlib.suppress(ValueError, OSError):  # absent, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of T tokens, each row several documents and perhaps padding.

    tokens, targets    (B, T) int64  padding has the target -100
    positions          (B, T) int64  restart at 0 with every document, every piece of one, and padding
    cu_seqlens         (K,) int32    where these begin in the flattened B * T tokens; filled up with B * T
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on a device. A copy to a GPU that does not block needs pinned memory, so it is pinned first."""
        pin = non_blocking and torch.device(device).type == "cuda" and self.tokens.device.type == "cpu"
        columns = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Batch(*((x.pin_memory() if pin else x).to(device, non_blocking=non_blocking) for x in columns))


class PackedLoader:
    """An endless iterator of packed batches: next(loader) gives one Batch.

    `one_pass()` gives an iterable over the same rows for evaluation: every document once.
    """

    is_self_contained = True  # which batch comes next depends on state_dict() alone, so a thread may prepare it

    def __init__(
        self,
        dataset: TokenDataset | Iterable[Any],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = True,
        overlong: str = OVERLONG[0],
    ) -> None:
        """Pack the dataset.

        dataset           or any iterable that `TokenDataset.from_documents` takes: of lists of token ids, say
        batch_size        rows per rank
        rank, world_size  None: those of torch.distributed's group once there is one (Trainer joins it), else 0 of 1
        overlong          "split" keeps every token of documents longer than a row, "truncate" does not
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1 row")
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank is {rank} and world_size {world_size}, expected both or neither")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1} for a world size of {world_size}")
        check_batch(batch_size, sequence_length)
        if not isinstance(dataset, TokenDataset):
            dataset = TokenDataset.from_documents(dataset)
        self.dataset, self.batch_size, self.sequence_length = dataset, batch_size, sequence_length
        self.seed, self.shuffle = seed, shuffle
        self._rank, self._world_size = rank, world_size
        self._overlong = overlong
        self._packing = pack_documents(dataset.starts, dataset.lengths, sequence_length, overlong=overlong)
        self._row_tokens = np.add.reduceat(self._packing.lengths, self._packing.row_starts[:-1])
        self._row_costs = attention_costs(self._packing, self._row_tokens)
        self._rows_taken = 0
        self._order = functools.lru_cache(maxsize=2)(self._order_of)  # a batch may reach into the next epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows = self._rows_at(np.arange(self._rows_taken, self._rows_taken + self._rows_per_step))
        self._rows_taken += self._rows_per_step
        return self._assemble(rows[balanced(self._row_costs[rows], self.world_size)[self.rank]])

    @property
    def rank(self) -> int:
        return self._rank if self._rank is not None else dist.get_rank() if _in_group() else 0

    @property
    def world_size(self) -> int:
        return self._world_size if self._world_size is not None else num_ranks()

    @property
    def report(self) -> PackingReport:
        return self._packing.report

    @property
    def epoch(self) -> float:
        """Passes over the dataset that were given out."""
        return self._rows_taken / self._packing.num_rows

    @property
    def epoch_batches(self) -> int:
        """Batches of each rank in one pass over the dataset, the last perhaps reaching into the next."""
        return -(-self._packing.num_rows // self._rows_per_step)

    def one_pass(self) -> "OnePass":
        """The same rows as batches that end: each time it is iterated, every document comes once."""
        return OnePass(self)

    def state_dict(self) -> dict[str, Any]:
        return {"rows_taken": self._rows_taken, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place that state_dict() describes. Raises ValueError if that was a place in other rows."""
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise ValueError(
                    f"the loader's {name} is {ours!r}, but the saved position was reached with {state.get(name)!r}; "
                    "resume with the same data and settings, or start a new run"
                )
        taken = state["rows_taken"]
        if type(taken) is not int or not 0 <= taken < 1 << 62:
            raise ValueError(f"the loader's rows_taken is {taken!r}, expected the number of rows that were read")
        self._rows_taken = taken

    def _identity(self) -> dict[str, Any]:
        """All that decides which row comes when."""
        names = ("seed", "shuffle", "sequence_length")
        settings = {name: getattr(self, name) for name in names}
        return {**settings, "overlong": self._overlong, "dataset": self.dataset.fingerprint}

    @property
    def _rows_per_step(self) -> int:
        return self.batch_size * self.world_size

    @functools.cached_property
    def _num_boundaries(self) -> int:
        """Size of cu_seqlens: enough for the batch_size rows of most pieces, each with padding behind them."""
        pieces = np.diff(self._packing.row_starts) + (self._row_tokens < self.sequence_length)
        largest = np.sort(pieces)[-self.batch_size :]
        missing = self.batch_size - len(largest)  # a small dataset repeats rows to fill a batch
        needed = int(largest.sum() + missing * largest.max()) + 1
        return -(-needed // 8) * 8

    def _rows_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows at places in the endless line."""
        num_rows = self._packing.num_rows
        rows = places % num_rows
        if self.shuffle:
            for epoch in np.unique(places // num_rows):
                inside = places // num_rows == epoch
                rows[inside] = self._order(int(epoch))[rows[inside]]
        return rows

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self._packing.num_rows)

    def _assemble(self, rows: NDArray[np.int64]) -> Batch:
        """The batch of these rows; EMPTY_ROW is a row of padding."""
        starts, lengths, padded = self._segments(rows)
        boundaries = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(boundaries[-1]) - np.repeat(boundaries[:-1], lengths)
        places = np.repeat(starts, lengths) + positions
        padding = np.repeat(padded, lengths)
        places[padding] = 0
        tokens, targets = self.dataset.gather(places), self.dataset.gather(places + 1)
        tokens[padding], targets[padding] = self.dataset.end_of_text or 0, IGNORED
        cu_seqlens = np.full(self._num_boundaries, boundaries[-1], dtype=np.int32)
        cu_seqlens[: len(boundaries)] = boundaries
        return Batch(
            tokens=self._grid(tokens),
            targets=self._grid(targets),
            positions=self._grid(positions),
            cu_seqlens=torch.from_numpy(cu_seqlens),
        )

    def _grid(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).view(-1, self.sequence_length)

    def _segments(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """(start in the dataset, length, is padding) of what the rows hold, in order; padding ends a row."""
        packing, filled = self._packing, rows != EMPTY_ROW
        first = packing.row_starts[rows]
        num_pieces = np.where(filled, packing.row_starts[rows + 1] - first, 0)
        row_tokens = np.where(filled, self._row_tokens[rows], 0)
        row = np.repeat(np.arange(len(rows)), num_pieces + 1)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(num_pieces + 1) - (num_pieces + 1), num_pieces + 1)
        padded = nth == num_pieces[row]
        piece = np.where(padded, 0, first[row] + nth)
        lengths = np.where(padded, self.sequence_length - row_tokens[row], packing.lengths[piece])
        real = lengths > 0
        return packing.starts[piece[real]], lengths[real], padded[real]


def attention_costs(packing: Packing, row_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """What attention in each row costs: the sum of the squared lengths of its documents, padding being one."""
    squares = np.add.reduceat(packing.lengths**2, packing.row_starts[:-1])
    return squares + (packing.report.row_size - row_tokens) ** 2


def balanced(costs: NDArray[np.int64], world_size: int) -> NDArray[np.int64]:
    """(world_size, n / world_size) places of n rows, assigned so that the largest sum of costs of a rank is small.

    The costliest row left goes to the rank that has the least so far and is not full (Graham 1969's longest processing
    time, with equal counts). Every rank has its rows in their own order, and one rank has all as they came.
    """
    size = len(costs) // world_size
    assigned: list[list[int]] = [[] for _ in range(world_size)]
    least = [(0, rank) for rank in range(world_size)]
    for place in np.argsort(-costs, kind="stable").tolist() if world_size > 1 else range(size):
        total, rank = heapq.heappop(least)
        assigned[rank].append(place)
        if len(assigned[rank]) < size:
            heapq.heappush(least, (total + int(costs[place]), rank))
    return np.sort(np.array(assigned, dtype=np.int64), axis=1)


def num_ranks() -> int:
    """Those of torch.distributed's group, 1 as long as there is none."""
    return dist.get_world_size() if _in_group() else 1


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


class OnePass:
    """Every row of a loader once, over its ranks, in the order of its first epoch, so the first few are a fair sample.

    Iterating again starts again. The last batches are filled up with rows of padding, and ranks have equally many of
    them, so that they can add up their results in step.
    """

    def __init__(self, loader: PackedLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return self._loader.epoch_batches

    @property
    def num_bytes(self) -> int:
        """Bytes of the text over all ranks, to give bits per byte."""
        return self._loader.dataset.num_bytes

    @property
    def report(self) -> PackingReport:
        return self._loader.report

    def __iter__(self) -> Iterator[Batch]:
        loader = self._loader
        for step in range(len(self)):
            first = (step * loader.world_size + loader.rank) * loader.batch_size
            places = np.arange(first, first + loader.batch_size)
            rows = np.where(places < loader.report.num_rows, loader._rows_at(places), EMPTY_ROW)
            yield loader._assemble(rows)

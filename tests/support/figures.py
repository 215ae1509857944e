"""The tables and pictures of figures that pages show, made of benchmarks/results/, with machine, date and command."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.machine import ROOT
from benchmarks.report import megabytes, milliseconds, origin_of

RESULTS = "benchmarks/results"
BOTH = "forward + backward"
Cases = Mapping[str, str]  # "<benchmark>: <case>" of a record, by the name that a table gives it


@dataclass(frozen=True)
class ByProvider:
    """A row for each provider of the first case: its time in every case, then its memory there, peak or working."""

    record: str
    cases: Cases
    memory: str = "peak"

    def rows(self, results: Sequence[Mapping]) -> list[list[str]]:
        first, *others = self.cases
        heads = [f", {head}" for head in self.cases] if others else [""]
        columns = [f"{what}{head}" for what in ("median", f"{self.memory} memory") for head in heads]
        table = [["" if others else first, *columns]]
        found = [{provider["name"]: provider for provider in result["providers"]} for result in results]
        for name, provider in sorted(
            found[0].items(), key=lambda one: (one[1]["role"] == "floor", one[1]["median_ms"])
        ):
            measured = [case.get(name) for case in found]
            times = [milliseconds(one["median_ms"]) if one else "" for one in measured]
            has_memory = provider["role"] != "floor"
            memory = [megabytes(one[f"{self.memory}_bytes"]) if one and has_memory else "" for one in measured]
            table.append([name, *times, *memory])
        return table


@dataclass(frozen=True)
class ByCase:
    """A row for each case: the median times of some providers."""

    record: str
    head: str
    cases: Cases
    providers: Sequence[str]

    def rows(self, results: Sequence[Mapping]) -> list[list[str]]:
        table = [[self.head, *self.providers]]
        for name, result in zip(self.cases, results, strict=True):
            cells = {provider["name"]: milliseconds(provider["median_ms"]) for provider in result["providers"]}
            cells |= {name: "not exact" for name, reason in result["rejected"].items() if "error" in reason}
            table.append([name, *(cells.get(provider, "") for provider in self.providers)])
        return table


@dataclass(frozen=True)
class Picture:
    """A PNG beside a record."""

    record: str
    name: str
    description: str


Figure = ByProvider | ByCase | Picture

STEP = "training: GPT 6 layers C 384 V 50304, B 8 T 256"
IN_BOTH = {name: f"{STEP}, {name}, whole step" for name in ("float32", "bfloat16 autocast")}
LINEAR = "linear_cross_entropy: N 2048 C 384 V 50304"
FIGURES: Mapping[str, Mapping[str, Figure]] = {
    "README.md": {
        "figures of cross entropy": ByProvider(
            "cpu-amd-epyc-zen4-losses",
            {
                "cross entropy and its gradient, 2048 x 50304": (
                    "cross_entropy: 2048 x 50304 float32, forward + gradient"
                )
            },
        ),
        "figures of linear cross entropy": ByProvider(
            "cpu-amd-epyc-zen4-losses",
            {name: f"{LINEAR} {name}, {BOTH}" for name in ("float32", "bfloat16")},
            "working",
        ),
        "figures of layers": ByCase(
            "cpu-amd-epyc-zen4-layers-kept-memory",
            BOTH,
            {
                "`layer_norm` 32768 x 768": f"layer_norm: 32768 x 768 float32, {BOTH}",
                "`rms_norm` 16384 x 768": f"norms: rms_norm, 16384 x 768 float32, {BOTH}",
                "`add_layer_norm` 16384 x 768": f"norms: add_layer_norm, 16384 x 768 float32, {BOTH}",
                "`add_rms_norm` 16384 x 768": f"norms: add_rms_norm, 16384 x 768 float32, {BOTH}",
                "causal `softmax` 16 x 256 x 256": f"softmax: 16 x 256 x 256 float32, causal, {BOTH}",
                "`bias_gelu` 4096 x 768": f"activations: bias_gelu 4096 x 768 float32, {BOTH}",
                "`swiglu` 4096 x 768": f"activations: swiglu 4096 x 768 float32, {BOTH}",
                "`apply_rotary`, 2048 tokens, 12 + 12 heads of 64": f"rotary: B4 T512 heads 12+12 D64 float32, {BOTH}",
            },
            ("fastlm", "torch.compile", "torch eager"),
        ),
        "figures of attention": ByCase(
            "cpu-amd-epyc-zen4-attention",
            "`attention`, H 6, D 64",
            {
                f"{name}, {direction}": f"attention: {case} float32, {direction}"
                for name, case in {
                    "dense, causal, 4 x 512 tokens": "B4 T512 H6 D64 causal",
                    "window of 255 keys behind, 2048 tokens": "B1 T2048 H6 D64 causal window 255",
                    "packed, 62 documents of 66 tokens on average": "packed 62 documents of 4096 tokens H6 D64 causal",
                    "packed, 2021 documents of 2 tokens": "packed 2021 documents of 4096 tokens H6 D64 causal",
                }.items()
                for direction in ("forward", BOTH)
            },
            ("fastlm", "SDPA flash", "SDPA of each document"),
        ),
        "figures of a step": ByProvider("cpu-amd-epyc-zen4-training", IN_BOTH),
        "figures of a step with memory kept": ByProvider("cpu-amd-epyc-zen4-training-kept-memory", IN_BOTH),
    },
    "docs/benchmarks.md": {
        "picture of shares": Picture(
            "cpu-amd-epyc-zen4-layers-kept-memory",
            "roofline",
            "Each layer's share of the rate of a copy, ours and each peer's",
        ),
        "picture of a step": Picture(
            "cpu-amd-epyc-zen4-training",
            "training",
            "Median times of whole training steps, ours, peers and the least",
        ),
    },
}


def tables(page: str) -> dict[str, str]:
    """Each figure of a page, by the name that its marks there have."""
    return {mark: text_of(figure, "../" * page.count("/")) for mark, figure in FIGURES.get(page, {}).items()}


def text_of(figure: Figure, root: str) -> str:
    """A picture, or a table under the line that says where, when and how it was measured; root is that of its links."""
    record = json.loads((ROOT / RESULTS / f"{figure.record}.json").read_text())
    link = f"{root}{RESULTS}/{figure.record}"
    command = record["run"]["command"].partition(" --json")[0]
    origin = f"{origin_of(record)}, `{command}` ([record]({link}.txt))"
    if isinstance(figure, Picture):
        return f"![{figure.description}]({link}-{figure.name}.png)\n\n{origin}\n"
    results = {f"{result['benchmark']}: {result['case']}": result for result in record["results"]}
    head, *rows = figure.rows([results[case] for case in figure.cases.values()])
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in (head, *rows)]
    return "\n".join([f"{origin}:", "", lines[0], "|---" * len(head) + "|", *lines[1:], ""])

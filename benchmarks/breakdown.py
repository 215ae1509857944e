"""Where a training step's time and memory go: each part of ours and of plain PyTorch's beside what it costs at least.

    python -m benchmarks training --breakdown

Steps take turns and are timed as they run; then each runs under PyTorch's profiler, and the time of every op goes to
the part that its name, or that of an op round it, belongs to. What no op accounts for is Python and autograd. A step
under the profiler is slower, so that its parts are given as their shares of a step without it. Two parts of plain
PyTorch's are not ours: the product of its head is among its linear layers, and that of "at least" is ours.

Then, as in `python -m benchmarks`: useful tokens a second of packed documents beside padded ones, and time and memory
of a step by what activation checkpointing keeps.
"""

import copy
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks import bench_activation_checkpointing, bench_packed_documents, harness, machine, report
from benchmarks.bench_training import Shape, batch, fastlm_model, floors, plain_model, precision_name, step_of
from fastlm.ops._library import has_bf16_units

# Small to large: where bf16 begins to pay is read off the same table.
SHAPES = (
    Shape(4, 2, 64, 65, 12, 64),
    Shape(4, 4, 128, 65, 12, 64),
    Shape(4, 4, 128, 2048, 8, 256),
    Shape(4, 4, 256, 65, 12, 64),
    Shape(4, 4, 256, 8192, 8, 256),
    Shape(6, 6, 384, 50304, 8, 256),
)
PROFILED_STEPS = 3
REST = "Python and autograd"
# An op belongs to the outermost part of the first group that it is within, else to the innermost one of the second.
WHOLE = {
    "head and loss": ("linear_cross_entropy", "SummedLoss", "nll_loss", "log_softmax", "NllLoss", "LogSoftmax"),
    "attention": ("attention", "ScaledDotProduct"),
    "optimiser": ("Optimizer.step",),
    "norms": ("layer_norm", "LayerNorm", "norm_rows", "norm_backward_rows"),
    "activations": ("gelu", "Gelu"),
    "embeddings": ("embedding", "Embedding"),
    "gradient norm and clipping": ("linalg_vector_norm", "_foreach_norm", "_foreach_mul_"),
}
OPS = {
    "linear layers": ("aten::mm", "aten::addmm"),
    "casts and copies": ("aten::copy_",),
    "sums of gradients and of the residual stream": ("aten::add", "aten::add_", "aten::sum", "aten::cat"),
}
PARTS = ("linear layers", *WHOLE, "casts and copies", "sums of gradients and of the residual stream", REST)


def part_of(event: FunctionEvent) -> str:
    """The part that an op's own time belongs to."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for name in reversed(names):
        for part, marks in WHOLE.items():
            if any(mark in name for mark in marks):
                return part
    return next((part for name in names for part, ops in OPS.items() if name in ops), REST)


def shares_of(run: Callable[[], object]) -> dict[str, float]:
    """The share of each part in the time of a step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        budget = harness.Budget(0.0)
        for _ in range(PROFILED_STEPS):
            run()
        seconds = -budget.remaining()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        found[part_of(event)] += event.self_cpu_time_total * 1e-6 / seconds
    found[REST] = max(0.0, 1.0 - sum(share for part, share in found.items() if part != REST))
    return {part: found[part] for part in PARTS}


def median_seconds(runs: Mapping[str, Callable[[], object]], budget: harness.Budget) -> dict[str, float]:
    """Of runs that take turns."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    while budget.remaining() > 0 or len(samples[next(iter(runs))]) < harness.MIN_ROUNDS:
        for name, run in runs.items():
            start = budget.clock()
            run()
            samples[name].append(budget.clock() - start)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def measure(shape: Shape, dtype: torch.dtype, budget: harness.Budget) -> dict[str, Any]:
    """The record of one shape in one precision."""
    device = torch.device("cpu")
    initial, given = plain_model(shape, device), batch(shape, device)
    models = {"fastlm": fastlm_model(initial, shape, device), "plain PyTorch": copy.deepcopy(initial)}
    steps = {name: step_of(model, shape, device, dtype) for name, model in models.items()}
    runs = {name: (lambda step=step: step(given)) for name, step in steps.items()}
    least = floors(initial, shape, device, dtype)
    seconds = median_seconds(runs | least, budget)
    return {
        "step": f"{shape}, {precision_name(dtype)}",
        "tokens": shape.B * shape.T,
        "parameters": sum(parameter.numel() for parameter in initial.parameters()),
        "ms": {name: 1e3 * seconds[name] for name in runs},
        "parts_ms": {
            name: {part: 1e3 * seconds[name] * share for part, share in shares_of(run).items()}
            for name, run in runs.items()
        },
        "floor_ms": {part: 1e3 * seconds[part] for part in least},
    }


def cases() -> harness.Cases:
    """One size each: packed documents beside padded ones, and the levels of activation checkpointing."""
    modules = {"packed_documents": bench_packed_documents, "activation_checkpointing": bench_activation_checkpointing}
    return [(name, module.cases(torch.device("cpu"))[0]) for name, module in modules.items()]


def run(seconds: float, path: Path | None, shapes: Sequence[Shape] = SHAPES) -> dict[str, Any]:
    """The whole record, printed and, if there is a path, written as it grows."""
    dtypes = (torch.float32, torch.bfloat16) if has_bf16_units() else (torch.float32,)
    record = {
        "machine": machine.describe(torch.device("cpu")),
        "versions": machine.versions(),
        "run": machine.provenance(),
        "steps": [],
        "results": [],
    }
    print("\n".join(heading(record)), flush=True)
    steps, compared = list(itertools.product(shapes, dtypes)), cases()
    share = seconds / (len(steps) + len(compared))
    for shape, dtype in steps:
        record["steps"].append(measure(shape, dtype, harness.Budget(share)))
        shown(record, table(record["steps"][-1]), path)
    for name, case in compared:
        record["results"].append({"benchmark": name, **harness.measure(case, harness.Budget(share))})
        shown(record, report.table(record["results"][-1]), path)
    return record


def shown(record: Mapping, latest: str, path: Path | None) -> None:
    print("\n" + latest, flush=True)
    if path:
        write(record, path)


def heading(record: Mapping) -> list[str]:
    return [report.origin_of(record), record["run"]["command"]]


def table(result: Mapping) -> str:
    """A line for each part: what it takes in ours and in plain PyTorch, and what it takes at least."""
    rows = [[result["step"], *result["ms"], "at least"]]
    for part in PARTS:
        cells = [f"{parts[part]:.1f} ms" for parts in result["parts_ms"].values()]
        floor = result["floor_ms"].get(part)
        rows.append([part, *cells, f"{floor:.1f} ms" if floor else ""])
    floor = sum(result["floor_ms"].values())
    rows.append(["the step", *(f"{ms:.1f} ms" for ms in result["ms"].values()), f"{floor:.1f} ms"])
    rates = [f"{1e3 * result['tokens'] / ms:,.0f}" for ms in (*result["ms"].values(), floor)]
    rows.append([f"tokens/s, of {result['parameters']:,} parameters", *rates])
    return "\n".join(report.aligned(rows))


def write(record: Mapping, path: Path) -> list[Path]:
    """Write path (JSON) and beside it the text; returns what was written."""
    report.write_json(record, path)
    text = path.with_suffix(".txt")
    tables = [*map(table, record["steps"]), *map(report.table, record["results"])]
    text.write_text("\n".join([*heading(record), *("\n" + each for each in tables)]) + "\n")
    return [path, text]

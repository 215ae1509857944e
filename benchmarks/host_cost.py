"""python -m benchmarks.host_cost [name ...]: what an eager call costs the host, and how many kernels it launches.

A model in eager mode is slow on a GPU where the host takes longer to launch a layer's kernels than the GPU to run them.
This needs no GPU: launches go by Triton's own code to a stand-in for the driver (tests/support/cuda_stand_in.py), which
checks and does not run them. Measured is CPU time of this process, of calls that find their kernels compiled.

Beside it is PyTorch's own function on the same tensors. These are CPU tensors, and so small that computing them takes
a microsecond or less: what is left is Python, dispatch, autograd and allocation, as on a GPU, where a call takes
another way only below the dispatcher. Meta tensors would not do: much of their dispatch is Python, as it is on no GPU.
Left out of both is the driver's own time for a launch, a few microseconds each. PyTorch has fused kernels on a GPU that
it lacks on a CPU: rms_norm is therefore compared with layer_norm without a bias, which is one op on both.

The bars: a norm, an activation, a softmax or a rotary embedding costs the host at most 3 times what PyTorch's own call
does, attention at most 2 times what scaled_dot_product_attention does.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, report
from fastlm import ops
from tests.support import cuda_stand_in
from tests.support.compiled_kernels import CACHE

ARCHITECTURE = 90
ROUNDS = 15
SECONDS = 0.02  # of a round
WARM_UP = 20  # calls: the first compiles launchers, the second finds them
NORM_BAR, ATTENTION_BAR = 3.0, 2.0

Function = Callable[..., Any]


class Case(NamedTuple):
    """One public function, PyTorch's own for the same, and the arguments of both, which need gradients."""

    name: str
    ours: Function
    torchs: Function
    inputs: Sequence[Tensor]
    bar: float = NORM_BAR


def cases() -> list[Case]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(torch.bfloat16).requires_grad_()

    C = (64,)
    x, residual, w, b = random(2, 64), random(2, 64), random(64), random(64)
    q, k, v = (random(1, 4, 2, 64) for _ in range(3))
    tokens = [random(4, 2, 64) for _ in range(3)]
    boundaries = torch.tensor([0, 1, 4], dtype=torch.int32)
    cos, sin = torch.randn(2, 4, 32)
    return [
        Case(
            "layer_norm",
            lambda x, w, b: ops.layer_norm(x, C, w, b),
            lambda x, w, b: F.layer_norm(x, C, w, b),
            [x, w, b],
        ),
        Case("rms_norm", lambda x, w: ops.rms_norm(x, C, w), lambda x, w: F.layer_norm(x, C, w), [x, w]),
        Case(
            "add_layer_norm",
            lambda x, r, w, b: ops.add_layer_norm(x, r, C, w, b),
            lambda x, r, w, b: added_norm(x, r, C, w, b),
            [x, residual, w, b],
        ),
        Case(
            "add_rms_norm",
            lambda x, r, w: ops.add_rms_norm(x, r, C, w),
            lambda x, r, w: added_norm(x, r, C, w),
            [x, residual, w],
        ),
        Case("softmax", lambda x: ops.softmax(x, -1), lambda x: F.softmax(x, -1), [x]),
        Case("log_softmax", lambda x: ops.log_softmax(x, -1), lambda x: F.log_softmax(x, -1), [x]),
        Case("gelu", ops.gelu, F.gelu, [x]),
        Case("bias_gelu", ops.bias_gelu, lambda x, b: F.gelu(x + b), [x, b]),
        Case("geglu", ops.geglu, lambda gate, up: F.gelu(gate) * up, [x, residual]),
        Case("swiglu", ops.swiglu, lambda gate, up: F.silu(gate) * up, [x, residual]),
        Case(
            "apply_rotary",
            lambda q, k: ops.apply_rotary(q, k, cos, sin),
            lambda q, k: tuple(rotated(x, cos, sin) for x in (q, k)),
            [q, k],
        ),
        Case("attention", lambda *qkv: ops.attention(*qkv, causal=True), causal_sdpa, [q, k, v], ATTENTION_BAR),
        Case(
            "attention, varlen",  # PyTorch's is of a dense batch: it has no varlen op on a CPU
            lambda *qkv: ops.attention(*qkv, causal=True, cu_seqlens_q=boundaries),
            lambda *qkv: causal_sdpa(*(x[None] for x in qkv)),
            tokens,
            ATTENTION_BAR,
        ),
        Case(
            "scaled_dot_product_attention",
            lambda *qkv: ops.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), is_causal=True),
            causal_sdpa,
            [q, k, v],
            ATTENTION_BAR,
        ),
    ]


def added_norm(x: Tensor, residual: Tensor, shape: tuple[int], *parameters: Tensor) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return F.layer_norm(residual, shape, *parameters), residual


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As models have it that write it in PyTorch."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (table[:, None].to(x.dtype) for table in (cos, sin))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help="only these functions; default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of which the least counts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the record, and beside it the text")
    arguments = parser.parse_args(argv)
    known = [case.name for case in cases()]
    if unknown := set(arguments.names) - set(known):
        parser.error(f"there is no function {', '.join(sorted(unknown))}, only {', '.join(known)}")
    record = measure(arguments.names or known, arguments.rounds)
    print(text(record))
    if arguments.json:
        report.write_json(record, arguments.json)
        arguments.json.with_suffix(".txt").write_text(text(record) + "\n")
    return 0


def measure(names: Sequence[str], rounds: int) -> dict[str, Any]:
    """The record of these functions' costs."""
    torch.set_num_threads(1)
    cuda_stand_in.knobs.cache.dir = str(CACHE / "triton")
    cuda_stand_in.activate(ARCHITECTURE)
    cuda_stand_in.spare_compilation()
    cuda_stand_in.run_kernels_on_cpu_tensors()
    command = " ".join(["python", "-m", "benchmarks.host_cost", *sys.argv[1:]])
    chosen = [case for case in cases() if case.name in names]
    return {
        "machine": machine.describe(torch.device("cpu")),
        "versions": machine.versions(),
        "run": machine.provenance() | {"command": command},
        "architecture": ARCHITECTURE,
        "results": [costs(case, backward, rounds) for case in chosen for backward in (False, True)],
    }


def costs(case: Case, backward: bool, rounds: int) -> dict[str, Any]:
    """Microseconds of CPU per call of ours and of PyTorch's, which take turns, and the kernels that ours launches."""
    calls = [call_of(function, case.inputs, backward) for function in (case.ours, case.torchs)]
    for call in calls:
        for _ in range(WARM_UP):
            call()
    before = cuda_stand_in.counted().launches
    calls[0]()
    launches = cuda_stand_in.counted().launches - before
    number = [max(1, int(SECONDS / cpu_seconds(call, 10))) for call in calls]
    found = [[cpu_seconds(call, n) for call, n in zip(calls, number, strict=True)] for _ in range(rounds)]
    # The least, since whatever else the machine does can only add.
    ours, torchs = (1e6 * min(column) for column in zip(*found, strict=True))
    what = "forward and backward" if backward else "forward"
    return {
        "function": case.name,
        "what": what,
        "us": round(ours, 1),
        "torch_us": round(torchs, 1),
        "ratio": round(ours / torchs, 2),
        "bar": case.bar,
        "launches": launches,
    }


def call_of(function: Function, inputs: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:
        return lambda: without_gradients(function, inputs)
    results = function(*inputs)
    upstream = [torch.ones_like(y) for y in as_tuple(results)]
    return lambda: torch.autograd.grad(as_tuple(function(*inputs)), inputs, upstream)


def without_gradients(function: Function, inputs: Sequence[Tensor]) -> object:
    with torch.no_grad():
        return function(*inputs)


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def cpu_seconds(call: Callable[[], object], number: int) -> float:
    """Of this process, a call."""
    start = time.process_time()
    for _ in range(number):
        call()
    return (time.process_time() - start) / number


def text(record: dict[str, Any]) -> str:
    """The record for a reader: a line each."""
    columns = f"{'':<30}{'':<22}{'fastlm':>10}{'PyTorch':>10}{'ratio':>8}{'bar':>6}{'launches':>10}"
    lines = [
        f"{found['function']:<30}{found['what']:<22}{found['us']:>7.1f} us{found['torch_us']:>7.1f} us"
        f"{found['ratio']:>8.2f}{found['bar']:>6.1f}{found['launches']:>10}"
        + ("  over the bar" if found["ratio"] > found["bar"] else "")
        for found in record["results"]
    ]
    heading = [report.origin_of(record), record["run"]["command"], "CPU time of an eager call"]
    return "\n".join([*heading, columns, *lines])


if __name__ == "__main__":
    sys.exit(main())

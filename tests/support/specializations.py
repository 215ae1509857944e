"""How often Triton would compile each kernel over calls of changing sizes; needs no GPU, and compiles nothing.

    python -m tests.support.specializations    prints, for each case, kernels, compilations, and what these differ in

Launchers run on meta tensors, as in compiled_kernels.py, and stop at the key under which Triton looks a kernel up: one
key, one compilation. This must be a process without TRITON_INTERPRET.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support.compiled_kernels import (
    ROOT,
    ClaimedDriver,
    launch_bias_gelu,
    launch_gelu,
    launch_norm,
)

ARCHITECTURE = 90
BATCHES = (1, 2, 3, 16)
LENGTHS = (1, 2, 16, 17, 32, 1000, 1024, 2047)


class Case(NamedTuple):
    """Calls of one op whose sizes change, and how often each of its kernels is compiled for all of them together."""

    calls: Iterable[Callable[[], Any]]
    compilations: dict[str, int]
    classes: str  # what the compilations of one kernel differ in


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(
    q: Tensor, k: Tensor, bounds: Tensor | None = None, slopes: Tensor | None = None, dropout_p: float = 0.0
) -> None:
    """Forward and all gradients of causal attention."""
    from fastlm.ops import attention_launch
    from fastlm.ops.attention_reference import Inputs, Options

    seed = meta(dtype=torch.int64) if dropout_p else None
    inputs = Inputs(q, k, k, bounds, None, slopes, None, seed)
    options = Options(True, 0.125, -1, -1, 0.0, dropout_p)
    out, lse, remainder = attention_launch.forward(inputs, options)
    attention_launch.backward(torch.empty_like(q), None, out, lse, remainder, inputs, options)


def attend_batch(B: int, T: int, H: int, D: int) -> None:
    attend(meta(B, T, H, D), meta(B, T, H, D))


def attend_documents(num_seqs: int, total: int, dropout_p: float) -> None:
    slopes = meta(num_seqs, 12, dtype=torch.float32) if dropout_p else None
    attend(meta(total, 12, 64), meta(total, 4, 64), meta(num_seqs + 1, dtype=torch.int32), slopes, dropout_p)


def decode(B: int, T: int) -> None:
    """One query attends to the first T entries of a cache."""
    from fastlm.ops import attention_launch
    from fastlm.ops.attention_reference import Inputs, Options

    k = meta(B, 4096, 12, 64)[:, :T]
    attention_launch.forward(Inputs(meta(B, 1, 12, 64), k, k), Options(True, 0.125, -1, -1, 0.0, 0.0))


def glu(gate: Tensor, up: Tensor) -> None:
    from fastlm.ops.activations import glu_backward, glu_forward

    glu_backward(glu_forward(gate, up, "silu"), gate, up, "silu", (True, True))


def glu_of_halves(N: int) -> None:
    glu(*meta(N, 2 * 3072).chunk(2, dim=-1))


def rotate(B: int, T: int, has_positions: bool) -> None:
    from fastlm.ops.rotary import rotate_into

    q, k, _ = meta(B, T, 36, 64).split(12, dim=-2)
    cos, sin = meta(2, T, 32, dtype=torch.float32)
    positions = meta(B, T, dtype=torch.int64) if has_positions else None
    rotate_into([torch.empty_like(q), torch.empty_like(k)], [q, k], cos, sin, positions, False, False)


def softmax(B: int, T_q: int, T_k: int, *mask_shape: int, causal: bool = False) -> None:
    from fastlm.ops.softmax import backward, forward

    mask = meta(*mask_shape, dtype=torch.bool) if mask_shape else None
    y = forward(meta(B, 12, T_q, T_k), mask, 1.0, causal, False, torch.bfloat16)
    backward(y, y, mask, 1.0, causal, False, torch.bfloat16, (True, False))


def over(call: Callable[..., Any], *sizes: Iterable[int], then: tuple[Any, ...] = ()) -> list[Callable[[], Any]]:
    """Calls with every combination of these sizes, followed by arguments that are always the same."""
    return [functools.partial(call, *combination, *then) for combination in product(*sizes)]


def once(*kernels: str, **compilations: int) -> dict[str, int]:
    return dict.fromkeys((f"{kernel}_kernel" for kernel in kernels), 1) | {
        f"{kernel}_kernel": number for kernel, number in compilations.items()
    }


def both(number: int) -> dict[str, int]:
    return once(forward=number, backward=number)


SOFTMAX_LENGTHS = (776, 777, 780, 784, 800, 1000, 1001, 1004, 1023, 1024)  # one tile, four blocks
ONE = "all sizes share one"
ALIGNED = "rows begin at a multiple of 16 elements, or not: then their loads are narrower"
ROWS = "a multiple of 16 rows, or not: then backward loads their mean and rstd one by one"
CASES = {
    "attention": Case(
        over(attend_batch, BATCHES, LENGTHS, then=(12, 64)),
        once("forward", "delta", "dq", "dkdv"),
        ONE,
    ),
    "attention of odd heads": Case(
        over(attend_batch, BATCHES, LENGTHS, then=(3, 20)),
        once(forward=2, delta=2, dq=2, dkdv=2),
        f"batch {ALIGNED}",
    ),
    "attention of documents": Case(
        over(attend_documents, LENGTHS, (2048, 2049, 16384), then=(0.0,)),
        once("forward", "delta", "dq", "dkdv", schedule=2),
        "tiles of queries, tiles of keys",
    ),
    "attention of documents with slopes and dropout": Case(
        over(attend_documents, LENGTHS, (2048, 2049, 16384), then=(0.1,)),
        once("forward", "delta", "dq", "dkdv", "sequence_sums", schedule=2),
        "tiles of queries, tiles of keys",
    ),
    "decoding": Case(over(decode, BATCHES, LENGTHS), once("forward"), ONE),
    "layer_norm": Case(
        over(launch_norm, LENGTHS, then=(768, torch.bfloat16, "layer_norm")),
        once("forward", "sum_partials", backward=2),
        ROWS,
    ),
    "add_rms_norm with dropout": Case(
        over(launch_norm, LENGTHS, then=(768, torch.bfloat16, "add_rms_norm dropout")),
        once("forward", "sum_partials", backward=2),
        ROWS,
    ),
    "gelu": Case(over(launch_gelu, LENGTHS, then=(3072, torch.bfloat16, "tanh")), once("gelu", "gelu_backward"), ONE),
    "gelu of any size": Case(
        over(launch_gelu, (1,), LENGTHS, then=(torch.bfloat16, "tanh")),
        once(gelu=3, gelu_backward=3),
        "a multiple of 16 elements, another number, or a single one",
    ),
    "bias_gelu": Case(
        over(launch_bias_gelu, LENGTHS, then=(3072, torch.bfloat16, "tanh")),
        once(gelu=2, gelu_backward=2),
        "a single row has a tile of its own",
    ),
    "glu of halves": Case(
        over(glu_of_halves, LENGTHS), once(glu=2, glu_backward=2), "a single row has a tile of its own"
    ),
    "rotary": Case(over(rotate, BATCHES, LENGTHS, then=(False,)), once("rotary"), ONE),
    "rotary with positions": Case(over(rotate, BATCHES, LENGTHS, then=(True,)), once("rotary"), ONE),
    "softmax": Case(over(softmax, BATCHES, LENGTHS, then=(768,)), both(1), ONE),
    "causal softmax": Case(
        [functools.partial(softmax, B, T, T, causal=True) for B, T in product(BATCHES, SOFTMAX_LENGTHS)],
        both(2),
        ALIGNED,
    ),
    "softmax with a mask of rows": Case(
        [functools.partial(softmax, B, T, T, T, T) for B, T in product(BATCHES, SOFTMAX_LENGTHS)], both(2), ALIGNED
    ),
    "softmax with a mask of batch rows": Case(
        [functools.partial(softmax, B, T, T, B, 1, 1, T) for B, T in product(BATCHES, SOFTMAX_LENGTHS)],
        both(4),
        f"{ALIGNED}; one batch row, or several",
    ),
}


class Compilations(NamedTuple):
    """Of one case."""

    numbers: dict[str, int]  # by kernel
    differences: list[str]  # how an argument of a kernel was specialised, where not always the same way


def compilations_of(calls: Iterable[Callable[[], Any]]) -> Compilations:
    from triton.runtime.jit import JITFunction, compute_cache_key

    keys: dict[str, set[str]] = defaultdict(set)
    kinds: dict[str, set[str]] = defaultdict(set)

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        _, key_cache, _, _, binder = kernel.device_caches[ARCHITECTURE]
        arguments, specialization, rest = binder(*args, **options, debug=False, instrumentation_mode="")
        keys[kernel.__name__].add(compute_cache_key(key_cache, specialization, rest))
        for name, kind in zip(arguments, specialization, strict=True):
            kinds[f"{kernel.__name__} {name}"].add(str(kind))

    original, JITFunction.run = JITFunction.run, note
    try:
        for call in calls:
            call()
    finally:
        JITFunction.run = original
    differences = [f"{name}: {' or '.join(sorted(several))}" for name, several in kinds.items() if len(several) > 1]
    return Compilations({kernel: len(found) for kernel, found in keys.items()}, differences)


def compilations_in_a_fresh_process() -> dict[str, Compilations]:
    """What --json prints: a process whose kernels are interpreted has no keys."""
    command = [sys.executable, "-m", "tests.support.specializations", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return {name: Compilations(*found) for name, found in json.loads(done.stdout).items()}


def main() -> None:
    from triton.runtime.driver import driver

    parser = argparse.ArgumentParser(prog="python -m tests.support.specializations", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="everything, for a program to read")
    as_json = parser.parse_args().json
    driver.set_active(ClaimedDriver(ARCHITECTURE))
    found = {name: compilations_of(case.calls) for name, case in CASES.items()}
    if as_json:
        print(json.dumps(found))
        return
    for name, (numbers, differences) in found.items():
        print(f"{name}: {', '.join(f'{kernel} {number}' for kernel, number in numbers.items())}")
        print(*(f"    {difference}" for difference in differences), sep="\n", end="\n" * bool(differences))


if __name__ == "__main__":
    main()

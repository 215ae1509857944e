"""Every launch of fastlm's Triton kernels as a driver would see it, at ordinary and at extreme sizes; needs no GPU.

    python -m tests.support.launches            prints, as JSON, what a driver would refuse, and what was not launched
    python -m tests.support.launches --compile  the same of kernels that are really compiled, which takes an hour
    python -m tests.support.launches --kept     prints how launches by kept launchers differ from Triton's own
    python -m tests.support.launches --planted  prints the errors of launches that are wrong on purpose

Without --compile the shared memory of a launch is what compiled_kernels.json says of its kernel, or nothing. This must
be a process without TRITON_INTERPRET.
"""

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import fastlm.ops
from fastlm import ops
from fastlm.ops import _launch, _triton
from tests.support import cuda_stand_in
from tests.support.compiled_kernels import (
    CACHE,
    NORMS,
    OPS,
    ROOT,
    Launch,
    described,
    launch_attention,
    launch_bias_gelu,
    launch_gelu,
    launch_glu,
    launch_norm,
    launch_rotary,
    launch_softmax,
    make_hashes_reproducible,
    recorded_facts,
    triton_source,
)

ARCHITECTURES = (86, 90, 100, 120)  # sm_80 launches what sm_86 does, and has more shared memory
NUM_SMS = 132  # of the chip that the sizes of grids are made for
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BF16 = torch.bfloat16


class Case(NamedTuple):
    """A call of launchers on meta tensors."""

    launch: Callable[..., Any]
    sizes: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.launch.__name__}({', '.join(map(str, self.sizes))})"


def launch_masked_softmax(shape: tuple[int, ...], mask_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward and gradients of a causal softmax whose mask is broadcast."""
    from fastlm.ops.softmax import backward, forward

    x, mask = torch.empty(shape, device="meta"), torch.empty(mask_shape, dtype=dtype, device="meta")
    y = forward(x, mask, 0.5, True, False, x.dtype)
    backward(y, y, mask, 0.5, True, False, x.dtype, (True, dtype != torch.bool))


def launch_rotary_of_batch(B: int, T: int, H: int, D: int) -> None:
    from fastlm.ops.rotary import rotate_into

    q, cos = torch.empty(B, T, H, D, dtype=BF16, device="meta"), torch.empty(T, D // 2, device="meta")
    rotate_into([torch.empty_like(q)], [q], cos, cos, None, False, True)


# Rows: none, one, more than 65,535, long ones, and more than 2^31 elements.
ROWS = ((0, 768), (1, 1), (1, 768), (70_000, 64), (3, 100_003), (2**22, 1024), (3_000_000_000, 1))
# Batch, tokens, heads, key heads, keys
HEADS = (
    *((0, 8, 2, 2), (2, 0, 2, 2), (2, 8, 2, 2, 0), (1, 1, 1, 1), (1, 1, 1, 1, 4097), (2, 100, 6, 3)),
    *((8193, 2, 8, 8), (70_000, 1, 1, 1), (1, 3, 70_000, 70_000), (1, 70_001, 2, 1), (2, 2**20, 16, 16)),
)
ATTENTIONS = ("causal", "full", "causal, packed", "causal, all options", "causal, packed, all options")
ORDINARY = [Case(op.launch, sizes) for op in OPS for sizes in op.compiled]
EXTREME = [
    *(Case(launch_norm, (*rows, BF16, form)) for rows in ROWS for form in NORMS),
    *(Case(launch, (*rows, BF16, "tanh")) for rows in ROWS for launch in (launch_gelu, launch_bias_gelu)),
    *(Case(launch_glu, (*rows, BF16, "silu")) for rows in ROWS),
    *(Case(launch_softmax, (*rows, BF16, form)) for rows in ROWS for form in ("plain", "boolean")),
    *(
        Case(launch_masked_softmax, ((70_000, 3, 5, 64), mask, dtype))
        for mask in ((5, 64), (70_000, 1, 1, 64), (3, 1, 1), (70_000, 3, 5, 64))
        for dtype in (torch.bool, torch.float32)
    ),
    *(Case(launch_rotary, (tokens, 64, 64, "half", BF16)) for tokens in (1, 70_000, 2**26)),
    *(Case(launch_rotary_of_batch, shape) for shape in ((1, 1, 1, 4), (70_000, 1, 1, 64), (1, 3, 70_000, 64))),
    *(Case(launch_attention, (D, dtype, form)) for D in (64, 128, 256) for dtype in FLOATS for form in ATTENTIONS),
    *(Case(launch_attention, (64, BF16, form, *heads)) for heads in HEADS for form in ATTENTIONS),
    *(Case(launch_attention, (D, BF16, "causal")) for D in (1, 20, 72)),
    Case(launch_attention, (64, BF16, "full, packed, slopes of sequences, dlse")),
]


class Checked(NamedTuple):
    """What became of all cases on one architecture."""

    wrong: list[str]  # a line for each that a driver refuses, or that does not reach it
    kernels: list[str]
    launches: int


def checked(arch: int, compile: bool) -> Checked:
    """Launches every case on that architecture."""
    ways, wrong, names, at_start = BothWays(), [], set[str](), cuda_stand_in.counted().launches
    _triton.INTERPRETED_SMS = NUM_SMS  # which is asked of meta tensors as well
    cuda_stand_in.activate(arch, share_launchers=not compile)
    if not compile:
        cuda_stand_in.spare_compilation(lambda: recorded_shared_memory(ways.asked[-1], arch))
    make_hashes_reproducible()
    with replaced_launch(ways):
        for case in ORDINARY + EXTREME:
            ways.asked.clear()
            before = cuda_stand_in.counted().launches
            try:
                case.launch(*case.sizes)
            except Exception as error:
                last = name_of(ways.asked[-1].kernel) if ways.asked else "no kernel"
                wrong.append(f"{case} on sm_{arch}: {last}: {error}")
                continue
            launched, expected = cuda_stand_in.counted().launches - before, ways.TIMES * len(ways.asked)
            if launched != expected:  # Triton leaves out an empty grid without a word
                wrong.append(f"{case} on sm_{arch}: {expected} launches, {launched} reached the driver")
            names |= {name_of(launch.kernel) for launch in ways.asked}
    return Checked(wrong + ways.different, sorted(names), cuda_stand_in.counted().launches - at_start)


class BothWays:
    """Launches by Triton's own code and by _launch.py, which must be the same to the driver."""

    TIMES = 3  # of each: by Triton, by _launch.py for what may be the first time, and again, by what that has kept

    def __init__(self) -> None:
        self.asked: list[Launch] = []
        self.different: list[str] = []  # a line for each

    def __call__(self, kernel: Any, num_programs: int, *args: Any, **constants: Any) -> None:
        self.asked.append(Launch(kernel, args, constants))
        compiled = kernel[(num_programs,)](*args, **constants)
        maps = cuda_stand_in.tensor_maps_of(compiled.src)
        assert compiled.metadata.tensordesc_meta == maps, f"the compiler makes other tensor maps than {maps}"
        by_triton = cuda_stand_in.last_received()
        for _ in range(self.TIMES - 1):
            try:
                _launch.launch(kernel, num_programs, *args, **constants)
                by_us = cuda_stand_in.last_received()
                fields = [name for name in by_triton._fields if getattr(by_triton, name) != getattr(by_us, name)]
            except OverflowError as error:  # a number that the launcher's parameter cannot hold
                fields = [str(error)]
            if fields:
                call = f"{name_of(kernel)}{described(args)} {constants}"
                self.different.append(f"{call}: not as by Triton: {', '.join(fields)}")


@contextlib.contextmanager
def replaced_launch(launch: Callable[..., None]) -> Iterator[None]:
    """All ops launch their kernels by this."""
    modules = [module for module in op_modules() if hasattr(module, "launch") and module is not _launch]
    try:
        for module in modules:
            module.launch = launch
        yield
    finally:
        for module in modules:
            module.launch = _launch.launch


def recorded_shared_memory(launch: Launch, arch: int) -> int:
    """Bytes that the kernel of a launch takes, as compiled_kernels.json says; 0 where it does not know the kernel."""
    source = triton_source(launch, 80 if arch == 86 else arch)  # one kernel, which is recorded of sm_80
    (facts,) = recorded_facts().get(source.key, [{"shared": 0}])
    return facts["shared"]


def name_of(kernel: Any) -> str:
    return f"{kernel.module}.{kernel.__name__}"


def op_modules() -> list[Any]:
    return [importlib.import_module(found.name) for found in pkgutil.iter_modules(fastlm.ops.__path__, "fastlm.ops.")]


def all_kernels() -> set[str]:
    """The names of all kernels that fastlm launches."""
    functions = (value for module in op_modules() for value in vars(module).values() if isinstance(value, JITFunction))
    return {name_of(function) for function in functions if function.__name__.endswith("_kernel")}


# Launches by kept launchers: of tensors whose addresses, types, sizes and devices change from call to call


def at_offset(offset: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor that begins this many elements behind a multiple of 64 bytes."""
    return torch.zeros(offset + math.prod(shape), dtype=dtype)[offset:].view(shape).requires_grad_()


def call_everything(offset: int, dtype: torch.dtype, N: int, C: int) -> None:
    """Forward and backward of ops on N rows of C."""
    x, residual, wide = (at_offset(offset, dtype, N, C) for _ in range(3))
    w, b = (at_offset(offset, dtype, C) for _ in range(2))
    halves = at_offset(offset, dtype, N, 2 * C).chunk(2, dim=-1)
    mask = at_offset(offset, torch.float32, C)
    q, k, v = at_offset(offset, dtype, 1, N, 6, C).split(2, dim=-2)
    cos, sin = torch.zeros(2, N, C // 2)
    bounds = torch.tensor([0, 1, N], dtype=torch.int32)
    results = [
        ops.layer_norm(x, (C,), w, b),
        ops.rms_norm(x, (C,), w, dtype=torch.float32),
        *ops.add_layer_norm(x, residual, (C,), w, b, dropout_p=0.5),
        ops.softmax(x, -1),
        ops.log_softmax(x, -1, mask=mask, scale=0.5),
        ops.gelu(x),
        ops.bias_gelu(x, b),
        ops.swiglu(*halves),
        *ops.apply_rotary(q, k, cos, sin),
        ops.attention(q, k, v, causal=True),
        ops.attention(q, k, v, dropout_p=0.5, window=(1, 0)),
        ops.attention(q[0], k[0], v[0], cu_seqlens_q=bounds),
    ]
    torch.autograd.backward(results, [torch.zeros_like(y) for y in results])
    with torch.no_grad():
        ops.layer_norm(wide, (C,))


def kept_launches() -> BothWays:
    """What became of launches on two devices in turn."""
    cuda_stand_in.activate(90, share_launchers=True)
    cuda_stand_in.spare_compilation()
    cuda_stand_in.run_kernels_on_cpu_tensors()
    ways, sizes = BothWays(), product((64, 65), (1, 16), (0, 1), FLOATS)
    with replaced_launch(ways):
        for (C, N, offset, dtype), arch in product(sizes, (90, 100)):
            cuda_stand_in.activate(arch, share_launchers=True)
            call_everything(offset, dtype, N, C)
        for rows in (64, 3_000_000_000):
            launch_norm(rows, 1, BF16, "layer_norm")
    return ways


# What a kept launcher might be found by and should not: each leaves out a part of a launch's key.
WRONG_KEYS = {
    "no device": lambda key: key[1:],
    "no constants": lambda key: (key[0], *(part for part in key[1:] if isinstance(part, tuple))),
    "no sizes": lambda key: (*(part for part in key[:-2] if not isinstance(part, tuple)), *key[-2:]),
    "no types": lambda key: (*key[:-2], key[-1]),
    "no alignments": lambda key: key[:-1],
}


def differences_of_kept_launches(fault: str) -> int:
    """How many launches differ from Triton's own where launchers are kept by a wrong key."""
    key_of, _launch.LAUNCHES = _launch.Launches.key_of, {}
    _launch.Launches.key_of = lambda *args: WRONG_KEYS[fault](key_of(*args))
    try:
        return len(kept_launches().different)
    finally:
        _launch.Launches.key_of = key_of


# Launches that are wrong on purpose


@triton.jit
def empty_kernel(x: Any) -> None:
    pass


def launch_too_wide_a_grid() -> None:
    empty_kernel[(1, 65_544)](torch.empty(1, device="meta"))


def launch_with_a_host_pointer() -> None:
    empty_kernel[(1,)](torch.empty(1))


def launch_with_a_misaligned_stride() -> None:
    descriptor = TensorDescriptor(torch.empty(8, 64, device="meta"), [8, 64], [64, 1], [8, 32])
    descriptor.strides = [65, 1]
    empty_kernel[(1,)](descriptor)


def launch_with_too_much_shared_memory() -> None:
    """Past Triton's own check, which asks the driver too."""
    cuda_stand_in.spare_compilation(lambda: 99 * 1024)
    empty_kernel[(1,)](torch.empty(1, device="meta"), num_warps=8)
    (compiled,) = (kernel for kernel in empty_kernel.device_caches[86][0].values() if kernel.metadata.num_warps == 8)
    compiled.packed_metadata = (8, 1, 99 * 1024 + 1)
    empty_kernel[(1,)](torch.empty(1, device="meta"), num_warps=8)


def launch_too_large_a_block() -> None:
    empty_kernel[(1,)](torch.empty(1, device="meta"), num_warps=64)


PLANTED = (
    launch_too_wide_a_grid,
    launch_with_a_host_pointer,
    launch_with_a_misaligned_stride,
    launch_with_too_much_shared_memory,
    launch_too_large_a_block,
)


def planted_errors() -> dict[str, str]:
    """The error of each, or nothing where it was launched."""
    cuda_stand_in.activate(86, share_launchers=True)
    cuda_stand_in.spare_compilation()
    return {launch.__name__: error_of(launch) for launch in PLANTED}


def error_of(function: Callable[[], None]) -> str:
    try:
        function()
    except Exception as error:
        return str(error)
    return ""


# The command


def all_checked(compile: bool) -> dict[str, Any]:
    """All architectures, one after the other; where kernels are compiled, in as many processes as there are cores."""
    compiles = [compile] * len(ARCHITECTURES)
    if compile:
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as processes:
            found = list(processes.map(checked, ARCHITECTURES, compiles))
    else:
        found = list(map(checked, ARCHITECTURES, compiles))
    launched = {kernel for each in found for kernel in each.kernels}
    return {
        "wrong": [line for each in found for line in each.wrong],
        "never launched": sorted(all_kernels() - launched),
        "launches": sum(each.launches for each in found),
    }


def seen_by_hooks() -> dict[str, int]:
    """How many launches by a kept launcher are told to each of Triton's hooks while it listens, of two."""
    found = {}
    for name in ("launch_enter_hook", "launch_exit_hook"):
        calls: list[Any] = []
        chain = getattr(triton.knobs.runtime, name)
        for listens in (False, True, True, False):
            (chain.add if listens else chain.remove)(calls.append)
            launch_norm(64, 64, BF16, "rms_norm")
        found[name] = len([call for call in calls if call.get()["name"] == "forward_kernel"])
    return found


def compilations_of(kernel: Any) -> int:
    return sum(len(compiled) for compiled, *_ in kernel.device_caches.values())


def all_kept() -> dict[str, Any]:
    """Of right keys and of wrong ones."""
    ways = kept_launches()
    return {
        "different": ways.different,
        "launches": len(ways.asked),
        "launchers": sum(len(launches.found) for launches in _launch.LAUNCHES.values()),
        "compilations": sum(compilations_of(kernel) for kernel in {launch.kernel for launch in ways.asked}),
        "kernels": sorted({name_of(launch.kernel) for launch in ways.asked}),
        "seen by hooks": seen_by_hooks(),
        "differences by wrong keys": {fault: differences_of_kept_launches(fault) for fault in WRONG_KEYS},
    }


def results_of_a_fresh_process(*arguments: str) -> dict[str, Any]:
    """What the command prints: a process whose kernels are interpreted cannot launch them."""
    command = [sys.executable, "-m", "tests.support.launches", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.launches", description=(__doc__ or "").split("\n")[0]
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--compile", action="store_true", help="compile the kernels")
    chosen.add_argument(
        "--kept", action="store_true", help="only what kept launchers launch, by right and by wrong keys"
    )
    chosen.add_argument("--planted", action="store_true", help="only the launches that are wrong on purpose")
    given = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")
    found = planted_errors() if given.planted else all_kept() if given.kept else all_checked(given.compile)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

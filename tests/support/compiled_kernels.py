"""What every GPU kernel compiles to, read from the machine code; needs no GPU.

    python -m tests.support.compiled_kernels           prints kernel, tile, architecture, registers, spills, shared
                    memory, widths, and how cross entropy lays out rows of real vocabularies on each chip
    python -m tests.support.compiled_kernels NAME      compiles and prints the kernels of that op, or CUDA source, alone
    python -m tests.support.compiled_kernels --sm-89   compares the machine code of sm_86 and sm_89
    python -m tests.support.compiled_kernels --record  keeps what was read, so that nobody compiles these kernels again

Triton kernels are compiled through their own launchers: these run on meta tensors, with a driver that claims to be the
architecture in question, and stop short of the launch. So signature, pointer alignment, tile and warps are those of a
real call, and nothing has to be listed twice. An op joins with one row of OPS. CUDA C++ is compiled by nvcc.

Every size is compiled for sm_80, sm_90 and sm_100. On sm_75 (T4), sm_86 (RTX 30; RTX 40 and L4, sm_89, run the same
machine code), sm_103 (B300) and sm_120 (RTX 50) registers differ, but tiles are those of one of the three, so few sizes
are compiled there. To compile them all takes many minutes, so what was read from each is kept under a key made of
everything that it depends on: source, constants, arguments, tile, architecture, compiler. compiled_kernels.json beside
this file holds it for the kernels as committed (`--record` writes it anew), .cache/compiled_kernels for those of this
checkout; a changed kernel is in neither and is compiled. This must be a process without TRITON_INTERPRET.
"""

import argparse
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "compiled_kernels"
RECORD = Path(__file__).with_suffix(".json")


class Chip(NamedTuple):
    """What the blocks of a kernel may take of a multiprocessor."""

    shared: int  # bytes of a block at most
    shared_of_sm: int  # of all blocks, each of which costs the difference of the two beside its own
    warps: int


# "Technical Specifications per Compute Capability", table 30 of the CUDA C++ programming guide 13.0
CHIPS = {
    75: Chip(64 * 1024, 64 * 1024, 32),
    80: Chip(163 * 1024, 164 * 1024, 64),
    86: Chip(99 * 1024, 100 * 1024, 48),  # and sm_89, which has the machine code of sm_86: a soak test compares them
    90: Chip(227 * 1024, 228 * 1024, 64),
    100: Chip(227 * 1024, 228 * 1024, 64),
    103: Chip(227 * 1024, 228 * 1024, 64),
    120: Chip(99 * 1024, 100 * 1024, 48),
}
ARCHITECTURES = (80, 90, 100)  # that every size is compiled for
FURTHER_ARCHITECTURES = (75, 86, 103, 120)  # that few sizes are compiled for: those of Op.further
IMAGES = {75: 75, 80: 80, 86: 80, 90: 90, 100: 100, 103: 100, 120: 120}  # of CUDA C++ that each chip runs, by setup.py
ACCESS = re.compile(r"\b(LDGSTS|LDG|STG|LDL|STL|HMMA|HGMMA|UTCHMMA|UTCQMMA|UTMALDG|BAR)((?:\.\w+)*)\s")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?!NOP)(\w+)(.*);")


class Report(NamedTuple):
    """One kernel as compiled for one architecture."""

    op: str
    kernel: str
    tile: str
    arch: int
    registers: int
    spills: int  # instructions that move a register to or from local memory
    shared: int  # bytes
    wide_loads: int  # 16-byte loads from global memory
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    tensor_cores: int  # matrix instructions
    barriers: int  # of all threads of a block
    instructions: int  # in the whole kernel
    loop: int  # in the longest of the innermost loops
    failures: tuple[str, ...]
    key: str  # of what it was compiled from


READ = (
    *("registers", "spills", "shared", "wide_loads", "narrow_loads", "wide_stores", "narrow_stores", "tensor_cores"),
    *("barriers", "instructions", "loop"),
)


class Limits(NamedTuple):
    """What the design asks of a kernel's accesses to global memory, and whether its products run on tensor cores."""

    wide_loads: bool = False  # there must be 16-byte ones
    wide_stores: bool = False
    narrow_loads: int | None = None  # at most so many others
    narrow_stores: int | None = None
    tensor_cores: bool = False


class Op(NamedTuple):
    """An op whose kernels are reported: `launch(*sizes)` calls its launchers on meta tensors."""

    name: str
    launch: Callable[..., Any]
    compiled: list[tuple[Any, ...]]  # the sizes whose kernels are compiled and read
    reachable: list[tuple[Any, ...]]  # a grid of sizes, none of which may choose a tile that is not compiled
    limits: Callable[[str, dict[str, Any]], Limits]  # of (kernel, its constexprs)
    architectures: tuple[int, ...] = ARCHITECTURES  # those that do not run the same instructions as another here
    further: Sequence[tuple[Any, ...]] = ()  # the sizes that are compiled for further architectures
    further_architectures: tuple[int, ...] = FURTHER_ARCHITECTURES

    def tasks(self) -> list[tuple[tuple[Any, ...], int]]:
        """(sizes, architecture) of all that is compiled."""
        every = [(sizes, arch) for sizes in self.compiled for arch in self.architectures]
        return every + [(sizes, arch) for sizes in self.further for arch in self.further_architectures]


def launch_norm(N: int, C: int, dtype: torch.dtype, form: str, residual_dtype: torch.dtype | None = None) -> None:
    """Forward and all gradients of one of the norms; the residual stream may have a dtype of its own."""
    from fastlm.ops.norm import backward, forward

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, has_mean = meta(N, C), meta(C), "rms" not in form
    residual = meta(N, C, dtype=residual_dtype or dtype) if "add" in form else None
    seed = meta(1, dtype=torch.int64) if "dropout" in form else None
    bias = weight if has_mean else None
    y, h, mean, rstd = forward(x, residual, (C,), weight, bias, seed, 0.1, 1e-5, has_mean, dtype)
    is_shared = seed is None and residual_dtype is None  # one gradient for x and residual
    needs = (True, residual is not None and not is_shared, True, has_mean)
    h, mean = x if residual is None else h, mean if has_mean else None
    backward(y, residual, h, weight, bias, mean, rstd, seed, 0.1, dtype, needs)


def norm_limits(kernel: str, tile: dict[str, Any]) -> Limits:
    """Rows move in 16-byte pieces; the seed is narrow, and each row's mean and rstd, loaded per stage in flight."""
    if kernel == "sum_partials_kernel":
        return Limits(wide_loads=True, narrow_loads=0)
    if kernel == "forward_kernel" and (tile["NUM_BLOCKS"] > 1 or tile["BLOCK_C"] >= 1024):
        return Limits(True, True, narrow_loads=1, narrow_stores=2)
    if tile["BLOCK_C"] < 1024:  # fewer 16-byte pieces than threads: some must take less
        return Limits()
    return Limits(True, True, narrow_loads=2 * tile["BLOCK_N"] * tile["NUM_STAGES"] + 1, narrow_stores=0)


def launch_gelu(N: int, C: int, dtype: torch.dtype, approximate: str) -> None:
    from fastlm.ops.activations import gelu_backward, gelu_forward

    x = torch.empty(N, C, dtype=dtype, device="meta")
    gelu_backward(gelu_forward(x, None, approximate == "tanh"), x, None, approximate == "tanh", (True, False))


def launch_bias_gelu(N: int, C: int, dtype: torch.dtype, approximate: str) -> None:
    from fastlm.ops.activations import gelu_backward, gelu_forward

    x, bias = torch.empty(N, C, dtype=dtype, device="meta"), torch.empty(C, dtype=dtype, device="meta")
    gelu_backward(gelu_forward(x, bias, approximate == "tanh"), x, bias, approximate == "tanh", (True, True))


def launch_glu(N: int, C: int, dtype: torch.dtype, activation: str) -> None:
    from fastlm.ops.activations import glu_backward, glu_forward

    gate, up = torch.empty(N, 2 * C, dtype=dtype, device="meta").chunk(2, dim=-1)
    glu_backward(glu_forward(gate, up, activation), gate, up, activation, (True, True))


def launch_rotary(tokens: int, D: int, R: int, layout: str, dtype: torch.dtype) -> None:
    from fastlm.ops.rotary import rotate_into

    qkv = torch.empty(tokens, 12 + 4 + 4, D, dtype=dtype, device="meta")
    cos, sin = torch.empty(2, 1024, R // 2, device="meta")
    tensors = [qkv[:, :12], qkv[:, 12:16]]
    positions = torch.empty(tokens, dtype=torch.int64, device="meta") if "positions" in layout else None
    outputs = tensors if "in place" in layout else [torch.empty_like(x) for x in tensors]
    rotate_into(outputs, tensors, cos, sin, positions, "interleaved" in layout, False)


def pointwise_limits(kernel: str, tile: dict[str, Any]) -> Limits:
    """Everything moves in 16-byte pieces, but for a thread's partial sum of dbias, and the positions of its tokens."""
    positions, partial_sums = 2 * (kernel == "rotary_kernel"), int(kernel == "gelu_backward_kernel")
    return Limits(True, True, narrow_loads=positions, narrow_stores=partial_sums)


def launch_softmax(N: int, C: int, dtype: torch.dtype, form: str) -> None:
    from fastlm.ops.softmax import backward, forward

    x = torch.empty(N, C, dtype=dtype, device="meta")
    mask = {"plain": None, "boolean": x[:1].bool(), "additive causal log": x}[form]
    causal, log = "causal" in form, "log" in form
    y = forward(x, mask, 0.5, causal, log, dtype)
    backward(y, y, mask, 0.5, causal, log, dtype, (True, form == "additive causal log"))


def softmax_limits(kernel: str, tile: dict[str, Any]) -> Limits:
    """Every row moves in 16-byte pieces, also where causality ends it; a boolean mask has a byte an element.

    Forward loads as many elements of it as of the row, so in narrower pieces.
    """
    num_blocks = tile.get("NUM_BLOCKS", 0)
    return Limits(True, True, num_blocks, 0) if num_blocks > 1 or tile["BLOCK_C"] >= 1024 else Limits()


def launch_attention(
    D: int, dtype: torch.dtype, form: str, B: int = 4, T: int = 1024, H: int = 16, Hk: int = 4, Tk: int | None = None
) -> None:
    """Forward and all gradients, dense or packed. Batch rows that are one and the same go without descriptors."""
    from fastlm.ops import attention_launch
    from fastlm.ops.attention_reference import Inputs, Options

    def heads(T: int, number: int) -> torch.Tensor:
        if "packed" in form:
            return torch.empty(B * T, number, D, dtype=dtype, device="meta")
        if "pointers" in form:
            return torch.empty(1, T, number, D, dtype=dtype, device="meta").expand(B, -1, -1, -1)
        return torch.empty(B, T, number, D, dtype=dtype, device="meta")

    Tk = T if Tk is None else Tk
    q, k, v, dout = heads(T, H), heads(Tk, Hk), heads(Tk, Hk), heads(T, H)
    cu_seqlens = torch.empty(2 * B + 1, dtype=torch.int32, device="meta") if "packed" in form else None
    per_head, seed, left, softcap, dropout_p = None, None, -1, 0.0, 0.0
    if "all options" in form:
        per_head, seed = torch.empty(H, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
        left, softcap, dropout_p = 500, 30.0, 0.1
    slopes = torch.empty(2 * B, H, device="meta") if "slopes of sequences" in form else per_head
    masking = "causal" in form, D**-0.5, left, -1, softcap, dropout_p
    inputs, options = Inputs(q, k, v, cu_seqlens, None, slopes, per_head, seed), Options(*masking)
    out, lse, remainder = attention_launch.forward(inputs, options)
    dlse = torch.empty_like(lse) if "dlse" in form else None
    attention_launch.backward(dout, dlse, out, lse, remainder, inputs, options)


def attention_limits(kernel: str, tile: dict[str, Any]) -> Limits:
    """Tiles of heads meet on tensor cores, and move in 16-byte pieces unless these are fewer than the threads."""
    meets = kernel in ("forward_kernel", "dq_kernel", "dkdv_kernel")
    rows = tile["BLOCK_N" if kernel == "dkdv_kernel" else "BLOCK_M"] if meets else 0
    wide = meets and rows * tile["BLOCK_D"] // 8 >= 32 * tile["num_warps"]
    return Limits(wide_loads=wide or kernel == "delta_kernel", wide_stores=wide, tensor_cores=meets)


def attention_limits_of_float32(kernel: str, tile: dict[str, Any]) -> Limits:
    return attention_limits(kernel, tile)._replace(tensor_cores=False)


CUDA_LIMITS = Limits(wide_loads=True, wide_stores=True)  # the head and tail of an unaligned row are narrow
FLOATS = (torch.float32, torch.bfloat16)
LENGTHS = (768, 1024, 1600, 4096, 8192)  # of rows
MANY_LENGTHS = (*range(1, 16385, 61), 16384)
ROTARY_LAYOUTS = ("half", "half, in place", "half, positions", "interleaved")
GELUS = [(torch.float32, "none"), (torch.bfloat16, "tanh")]
WORST = "additive causal log"
NORM_LENGTHS = (*LENGTHS, 3072, 12288, 16384, 65536)  # with the most blocks of a row for each tile
NORMS = (
    *("layer_norm", "rms_norm", "add_layer_norm", "add_layer_norm dropout"),
    *("add_rms_norm", "add_rms_norm dropout"),
)
OPS = [
    Op(
        "norms",
        launch_norm,
        [
            *((4096, C, torch.bfloat16, form) for C in (64, 128, 256, 512) for form in (NORMS[0], NORMS[-1])),
            *((4096, C, torch.bfloat16, form) for C in NORM_LENGTHS for form in NORMS),
            *((4096, C, torch.float32, form) for C in NORM_LENGTHS for form in (NORMS[0], NORMS[-1])),
            *((4096, C, torch.bfloat16, "add_rms_norm dropout", torch.float32) for C in NORM_LENGTHS),
        ],
        [
            (N, C, torch.bfloat16, form)
            for N in (1, 7, 4096, 10**6)
            for C in (*range(1, 16385, 61), 16384, 65536, 10**6)
            for form in ("layer_norm", "add_layer_norm dropout")
        ],
        norm_limits,
        further=[(4096, C, torch.bfloat16, form) for C in LENGTHS for form in (NORMS[0], NORMS[-1])],
    ),
    Op(
        "gelu",
        launch_gelu,
        [(4096, C, dtype, approximate) for C in LENGTHS for dtype in FLOATS for approximate in ("none", "tanh")],
        [(N, C, *kind) for N in (1, 7, 4096) for C in MANY_LENGTHS for kind in GELUS],
        pointwise_limits,
        further=[(4096, 4096, *kind) for kind in GELUS],
    ),
    Op(
        "bias_gelu",
        launch_bias_gelu,
        [(N, C, *kind) for N, C in [(1, 4096), (4096, 64), *((4096, C) for C in LENGTHS)] for kind in GELUS],
        [(N, C, *kind) for N in (1, 7, 4096) for C in MANY_LENGTHS for kind in GELUS],
        pointwise_limits,
        further=[(4096, 4096, *kind) for kind in GELUS],
    ),
    Op(
        "glu",
        launch_glu,
        [
            *(
                (N, C, dtype, "silu")
                for N, C in [(1, 4096), (4096, 64), *((4096, C) for C in LENGTHS)]
                for dtype in FLOATS
            ),
            *((4096, C, dtype, form) for C in (768, 4096) for dtype in FLOATS for form in ("gelu", "gelu_tanh")),
        ],
        [(N, C, dtype, "silu") for N in (1, 7, 4096) for C in MANY_LENGTHS for dtype in FLOATS],
        pointwise_limits,
        further=[(4096, 4096, dtype, form) for dtype in FLOATS for form in ("silu", "gelu", "gelu_tanh")],
    ),
    Op(
        "rotary",
        launch_rotary,
        [
            *((4096, D, D, layout, dtype) for D in (64, 128) for layout in ROTARY_LAYOUTS for dtype in FLOATS),
            *((4096, D, R, "half", torch.bfloat16) for D in (32, 64, 128, 256) for R in (D, D // 2)),
            (4096, 80, 80, "half", torch.bfloat16),
        ],
        [(4096, D, R, "half", torch.bfloat16) for D in range(4, 257, 4) for R in (D, D // 2)],
        pointwise_limits,
        further=[(4096, D, D, "half", torch.bfloat16) for D in (64, 128)],
    ),
    Op(
        "attention",
        launch_attention,
        [
            *((D, torch.bfloat16, "causal") for D in (16, 32, 64, 128, 256)),
            *((D, torch.bfloat16, "causal, pointers") for D in (64, 128)),
            (80, torch.float16, "full"),
            *((D, torch.bfloat16, "causal, packed") for D in (64, 128)),
            *(
                (D, torch.bfloat16, f"{form}, all options")
                for D in (16, 32, 64, 128, 256)
                for form in ("causal", "causal, pointers", "causal, packed")
            ),
        ],
        [
            (D, torch.bfloat16, form + options)
            for D in range(1, 257)
            for form in ("causal", "full, packed", "causal, pointers")
            for options in ("", ", all options")
        ],
        attention_limits,
        further=[
            *((D, torch.bfloat16, "causal") for D in (32, 64, 128, 256)),
            *((D, torch.bfloat16, "causal, all options") for D in (64, 128, 256)),
            (64, torch.bfloat16, "causal, packed, all options"),
        ],
        further_architectures=(86, 103, 120),  # older ones run PyTorch's
    ),
    Op(
        "attention of float32",
        launch_attention,
        [(D, torch.float32, form) for D in (16, 32, 64, 128, 256) for form in ("causal", "causal, all options")],
        [(D, torch.float32, form) for D in range(1, 257) for form in ("causal", "full, all options")],
        attention_limits_of_float32,
        (80,),  # no tensor core is in it
        further=[(D, torch.float32, "causal") for D in (64, 128, 256)],
        further_architectures=(86,),  # of the least shared memory
    ),
    Op(
        "softmax",
        launch_softmax,
        [(4096, C, dtype, "plain") for C in (64, 128, 256, 512, *LENGTHS, 50304, 128256) for dtype in FLOATS]
        + [(4096, C, torch.bfloat16, "plain") for C in (3072, 16384, 53248)]
        + [(4096, C, torch.float32, "plain") for C in (3072, 16384, 36864)]
        + [(4096, C, dtype, form) for C in (*LENGTHS, 50304) for dtype in FLOATS for form in ("boolean", WORST)],
        [
            (N, C, dtype, form)
            for N in (1, 10**6)
            for C in (*MANY_LENGTHS, 16385, 32768, 36864, 50304, 53248, 128256)
            for dtype in FLOATS
            for form in ("plain", "boolean")
        ],
        softmax_limits,
        further=[
            *((4096, C, torch.bfloat16, "plain") for C in (1024, 4096, 50304)),
            (4096, 4096, torch.bfloat16, WORST),
        ],
    ),
]


CUDA_SOURCES = sorted((ROOT / "csrc").glob("*.cu"))


class Layout(NamedTuple):
    """How csrc/cross_entropy_launch.h lays out rows of V logits, and what of it fits on a multiprocessor."""

    V: int
    dtype: str
    arch: int
    row_threads: int
    rows_per_block: int
    cluster: int
    slice: int  # elements of each of its blocks
    staged: int  # of these, in shared memory
    registers: int  # the most of all options, as the next
    spills: int
    shared: int  # bytes of a block, static and dynamic
    blocks: int  # of a multiprocessor
    failures: tuple[str, ...]


ELEMENTS = {"float": 4, "__half": 2, "__nv_bfloat16": 2}
ROWS = [(V, dtype, arch) for V in (32000, 50257, 50304, 128256) for dtype in ELEMENTS for arch in CHIPS]
PRINT_LAUNCHES = r"""
#include "cross_entropy_launch.h"
#include <cstdio>
int main() {
  long long elements, size, block, multiprocessor;
  for (int major; std::scanf("%lld %lld %lld %lld %d", &elements, &size, &block, &multiprocessor, &major) == 5;) {
    const auto [row_threads, rows_per_block, cluster, slice, staged, row_bytes] =
        fastlm::choose_launch(elements, size, true, {block, multiprocessor, major});
    std::printf("%d %d %d %lld %lld %lld\n", row_threads, rows_per_block, cluster, (long long)slice, (long long)staged,
                (long long)row_bytes);
  }
}
"""


class Launch(NamedTuple):
    """One kernel as a launcher asked for it."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def tile(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name.upper().startswith(("BLOCK_", "NUM_"))}

    @property
    def tile_name(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.tile.items())


def launches(op: Op, sizes: tuple[Any, ...]) -> list[Launch]:
    """The kernels that the op launches for these sizes; none of them runs."""
    from triton.runtime.jit import JITFunction

    asked: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        asked.append(Launch(kernel, args, options))

    original, JITFunction.run = JITFunction.run, note
    try:
        op.launch(*sizes)
    finally:
        JITFunction.run = original
    return asked


def unlisted_tiles(op: Op) -> set[str]:
    """Tiles that a launcher can choose for some size of the grid and that none of the compiled sizes chooses."""
    from triton.runtime.driver import driver

    def tiles(several: list[tuple[Any, ...]]) -> dict[str, int]:
        """The most blocks of a row in registers, by kernel and the rest of its tile: fewer take fewer registers."""
        most: dict[str, int] = {}
        for launch in (launch for sizes in several for launch in launches(op, sizes)):
            tile = dict(launch.tile)
            num_blocks = tile.pop("NUM_BLOCKS", 1)
            name = " ".join([launch.kernel.__name__, *(f"{name}={value}" for name, value in tile.items())])
            most[name] = max(most.get(name, 0), num_blocks)
        return most

    found = set()
    for arch in op.architectures:
        driver.set_active(ClaimedDriver(arch))
        compiled = tiles(op.compiled)
        for name, num_blocks in tiles(op.reachable).items():
            if num_blocks > compiled.get(name, 0):
                found.add(f"{name} of {num_blocks} blocks on sm_{arch}")
    return found


class ClaimedDriver:
    """Stands in for triton's driver: the machine claims to have a GPU of the architecture that is its device number."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


Facts = dict[str, Any]  # of one kernel and architecture


class Source(NamedTuple):
    """What some kernels are compiled from, by a key of all that the outcome depends on."""

    key: str
    compile: Callable[[], list[Facts]]

    def facts(self) -> list[Facts]:
        """What the kernels compile to: as recorded, or as found in this checkout before, or compiled now."""
        if known := recorded_facts().get(self.key):
            return known
        path = CACHE / f"{self.key}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(self.compile()))
            unfinished.replace(path)
        return json.loads(path.read_text())


@functools.cache
def recorded_facts() -> dict[str, list[Facts]]:
    """The record, or nothing where there is none or it is to be written anew."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def write_record(reports: list[Report]) -> None:
    """Keep the facts of these kernels and of no others, a line a source."""
    kept = {key: (CACHE / f"{key}.json", recorded_facts().get(key)) for key in sorted({r.key for r in reports})}
    lines = (f"{json.dumps(key)}: {json.dumps(facts or json.loads(p.read_text()))}" for key, (p, facts) in kept.items())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def key_of(*parts: Any) -> str:
    return hashlib.sha256(repr((parts, reader())).encode()).hexdigest()[:24]


@functools.cache
def reader() -> list[str]:
    """A change of what is read from the machine code, or how, must not meet old readings, so that is part of a key."""
    functions = (parse_machine_code, counted_as, longest_innermost_loop)
    return [*READ, ACCESS.pattern, INSTRUCTION.pattern, *map(inspect.getsource, functions)]


def triton_source(launch: Launch, arch: int) -> Source:
    """The kernel of a launch for one architecture; triton's hash of its source covers all functions that it calls."""
    import triton

    def compile() -> list[Facts]:
        from triton.runtime.driver import driver

        driver.set_active(ClaimedDriver(arch))
        compiled = launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.options)
        (facts,) = read_machine_code(compiled.asm["cubin"])
        return [facts | {"shared": compiled.metadata.shared}]

    asked = described(launch.args), described(sorted(launch.options.items()))
    return Source(key_of(triton.__version__, arch, launch.kernel.cache_key, asked), compile)


def described(value: Any) -> Any:
    """What triton may compile for: of a tensor its dtype and alignment, of all else the value."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [described(item) for item in value]
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return described([value.base, value.shape, value.strides, value.block_shape])
    return repr(value)


@functools.cache
def make_hashes_reproducible() -> None:
    """Let triton's hash of a kernel's source depend on that alone.

    It changes with every line above the kernel in its file; and with what the process hashed before, since triton takes
    the constants of a function that the kernel calls before it looks for them: they count only if they were known.
    """
    from triton.runtime.jit import DependenciesFinder, JITCallable

    add_function = DependenciesFinder._update_hash

    def add_hashed_function(finder: Any, function: Any) -> None:
        _ = function.cache_key  # which finds the constants
        add_function(finder, function)

    JITCallable.starting_line_number = property(lambda self: 0, lambda self, line: None)
    DependenciesFinder._update_hash = add_hashed_function


def triton_sources(op: Op, sizes: tuple[Any, ...], arch: int) -> list[tuple[Launch, Source]]:
    """What one call of an op launches."""
    from triton.runtime.driver import driver

    make_hashes_reproducible()
    driver.set_active(ClaimedDriver(arch))
    return [(launch, triton_source(launch, arch)) for launch in launches(op, sizes)]


def triton_reports(op_index: int, sizes: tuple[Any, ...], arch: int) -> list[Report]:
    """Reads what one call of an op launches."""
    op = OPS[op_index]
    found = []
    for launch, source in triton_sources(op, sizes, arch):
        name = launch.kernel.__name__
        (facts,) = source.facts()
        tile = " ".join([*(str(size).removeprefix("torch.") for size in sizes[1:]), launch.tile_name])
        found.append(judged(op.name, name, tile, arch, facts, op.limits(name, launch.tile), source.key))
    return found


def misrecorded(op: Op) -> list[str]:
    """Kernels of the op's first sizes, compiled now on one architecture, of which the record says otherwise."""
    sources = triton_sources(op, op.compiled[0], op.architectures[-1])
    return [launch.kernel.__name__ for launch, source in sources if source.compile() != source.facts()]


def unlike_sm_86(op_index: int, sizes: tuple[Any, ...]) -> list[str]:
    """Kernels whose machine code on sm_89, which the reports have not, differs from that on sm_86."""
    from triton.runtime.driver import driver

    def compiled(arch: int) -> list[tuple[str, list[str]]]:
        driver.set_active(ClaimedDriver(arch))
        kernels = [
            (launch, launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.options))
            for launch in launches(OPS[op_index], sizes)
        ]
        return [(f"{launch.kernel.__name__} {launch.tile_name}", encodings(k.asm["cubin"])) for launch, k in kernels]

    return [name for (name, code), (_, other) in zip(compiled(86), compiled(89), strict=True) if code != other]


def encodings(cubin: bytes) -> list[str]:
    """The instructions as numbers: their names in a disassembly depend on the architecture that it is for."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        return re.findall(r"/\* (0x[0-9a-f]{16}) \*/", cuobjdump("-sass", file.name))


def cuda_source(path: Path) -> Source | None:
    """A CUDA file for every architecture; None where nvcc is missing."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    names = [f"{arch}a" if arch == 90 else str(arch) for arch in sorted(set(IMAGES.values()))]
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    options = ["-std=c++20", "-O3", "--threads=0", "--fatbin", *targets]
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout

    def compile() -> list[Facts]:
        with tempfile.NamedTemporaryFile(suffix=".fatbin") as fatbin:
            subprocess.run([nvcc, *options, str(path), "-o", fatbin.name], check=True, capture_output=True)
            return read_machine_code(Path(fatbin.name).read_bytes())

    texts = [file.read_text() for file in (*sorted(path.parent.glob("*.h")), path)]
    return Source(key_of(version, options, texts), compile)


def cuda_reports(path: Path) -> list[Report]:
    """Reads each kernel of a CUDA file."""
    source = cuda_source(path)
    reports = []
    for facts in source.facts() if source else ():
        kernel, tile = readable(facts["kernel"])
        reports.append(judged(path.stem, kernel, tile, facts["arch"], facts, CUDA_LIMITS, source.key))
    return reports


def cuda_layouts(reports: list[Report]) -> list[Layout]:
    """The layout of every one of ROWS, with the kernels that it launches as reported."""
    kernels = [report for report in reports if report.kernel == "cross_entropy_kernel"]
    if not kernels:
        return []
    program = CACHE / f"print_launches.{os.getpid()}"
    compiler = ["c++", "-std=c++20", f"-I{ROOT / 'csrc'}", "-xc++", "-", "-o", str(program)]
    subprocess.run(compiler, input=PRINT_LAUNCHES, text=True, check=True)
    chips = {arch: f"{chip.shared} {chip.shared_of_sm} {arch // 10}" for arch, chip in CHIPS.items()}
    asked = "\n".join(f"{V} {ELEMENTS[dtype]} {chips[arch]}" for V, dtype, arch in ROWS)
    answers = subprocess.run([program], input=asked, text=True, check=True, capture_output=True).stdout
    program.unlink()
    found = []
    for (V, dtype, arch), line in zip(ROWS, answers.splitlines(), strict=True):
        launch = tuple(map(int, line.split()))
        variants = [
            kernel
            for kernel in kernels
            if kernel.arch == IMAGES[arch] and re.fullmatch(rf"{dtype}, \w+, \w+, {launch[0]}", kernel.tile)
        ]
        found.append(judged_layout(V, dtype, arch, launch, variants))
    return found


def judged_layout(V: int, dtype: str, arch: int, launch: tuple[int, ...], variants: list[Report]) -> Layout:
    """The layout of one row length, with a sentence for each way in which it misses the design."""
    row_threads, rows_per_block, _, part, staged, row_bytes = launch
    registers, spills, static = (max(getattr(v, name) for v in variants) for name in ("registers", "spills", "shared"))
    shared, warps = static + rows_per_block * row_bytes, row_threads * rows_per_block // 32
    chip = CHIPS[arch]
    can_stage = chip.shared > CHIPS[80].shared  # and has clusters: rows of any vocabulary fit, two blocks side by side
    blocks = min(
        65536 // (warps * -(-registers // 8) * 256),  # a warp gets registers by the 256
        chip.warps // warps,
        chip.shared_of_sm // (shared + chip.shared_of_sm - chip.shared),
    )
    failures = []
    if len(variants) != 4:
        failures.append(f"{len(variants)} kernels, 4 expected: with and without softcap and label smoothing")
    if spills:
        failures.append(f"{spills} spills")
    if shared > chip.shared:
        failures.append(f"{shared} bytes of shared memory, the chip has {chip.shared}")
    if blocks < 1:
        failures.append("no block fits on a multiprocessor")
    if can_stage and staged < part:
        failures.append(f"{part - staged} elements of a block's {part} are read twice")
    if can_stage and blocks < 2:
        failures.append("one block on a multiprocessor, which idles between its passes")
    return Layout(V, dtype, arch, *launch[:5], registers, spills, shared, blocks, tuple(failures))


def readable(mangled: str) -> tuple[str, str]:
    """(name, template arguments) of a C++ kernel; the mangled name where binutils are missing."""
    if not shutil.which("c++filt"):
        return mangled, ""
    name = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout
    match = re.search(r"(\w+)(?:<(.*)>)?\(", name)
    return (match[1], match[2] or "") if match else (mangled, "")


def judged(op: str, kernel: str, tile: str, arch: int, facts: Facts, limits: Limits, key: str = "") -> Report:
    """The report, with a sentence for each way in which it misses the design."""
    failures = []
    if facts["spills"]:
        failures.append(f"{facts['spills']} spills")
    if facts["shared"] > CHIPS[arch].shared:
        failures.append(f"{facts['shared']} bytes of shared memory, the chip has {CHIPS[arch].shared}")
    for kind in ("loads", "stores"):
        narrow, allowed = facts[f"narrow_{kind}"], getattr(limits, f"narrow_{kind}")
        if getattr(limits, f"wide_{kind}") and not facts[f"wide_{kind}"]:
            failures.append(f"no 16-byte {kind}")
        if allowed is not None and narrow > allowed:
            failures.append(f"{narrow} {kind} of less than 16 bytes, at most {allowed} expected")
    if limits.tensor_cores and not facts["tensor_cores"]:
        failures.append("no tensor-core instruction")
    return Report(op, kernel, tile, arch, *(facts[name] for name in READ), tuple(failures), key)


def read_machine_code(binary: bytes) -> list[Facts]:
    """Facts of each kernel in a cubin or fatbin."""
    if binary[:4] == b"\x7fELF" and binary[49] == 103:  # in its flags
        binary = binary[:49] + bytes([100]) + binary[50:]  # CUDA 12.8 disassembles no sm_103, which runs sm_100's code
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        return parse_machine_code(cuobjdump("-res-usage", file.name), cuobjdump("-sass", file.name))


def cuobjdump(what: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), what, path], check=True, capture_output=True, text=True).stdout


def parse_machine_code(usage: str, sass: str) -> list[Facts]:
    """One dict per kernel and architecture out of what cuobjdump prints."""
    found: dict[tuple[str, int], Facts] = {}
    code: dict[tuple[str, int], list[tuple[int, str, str]]] = {}  # (address, name, the rest) of each instruction
    arch, name = 0, ""
    for line in sass.splitlines():
        if match := INSTRUCTION.search(line):
            code[name, arch].append((int(match[1], 16), match[2], match[3]))
        if match := re.search(r"^arch = sm_(\d+)|code for sm_(\d+)", line):
            arch = int(match[1] or match[2])
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
            found[name, arch], code[name, arch] = {"kernel": name, "arch": arch} | dict.fromkeys(READ, 0), []
        elif match := ACCESS.search(line):
            found[name, arch][counted_as(match[1], match[2])] += 1
    for kernel, instructions in code.items():
        found[kernel] |= {"instructions": len(instructions), "loop": longest_innermost_loop(instructions)}
    for line in usage.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) .*SHARED:(\d+)", line):
            found[name, arch] |= {"registers": int(match[1]), "shared": int(match[2])}
    return list(found.values())


def longest_innermost_loop(instructions: list[tuple[int, str, str]]) -> int:
    """How many instructions lie between a branch backward and its target, with no other such pair between them."""
    branches = [(address, re.search(r"\b0x([0-9a-f]+)", rest)) for address, name, rest in instructions if name == "BRA"]
    loops = [(int(to[1], 16), address) for address, to in branches if to and int(to[1], 16) < address]
    innermost = [loop for loop in loops if not any(loop[0] <= a and b < loop[1] for a, b in loops if (a, b) != loop)]
    return max((sum(first <= address <= last for address, *_ in instructions) for first, last in innermost), default=0)


def counted_as(instruction: str, modifiers: str) -> str:
    if instruction in ("LDL", "STL"):
        return "spills"
    if instruction == "BAR":
        return "barriers"
    if instruction == "UTMALDG":  # a whole tile by the copy engine
        return "wide_loads"
    if instruction in ("LDG", "LDGSTS", "STG"):
        width = "wide" if ".128" in modifiers else "narrow"
        return f"{width}_{'stores' if instruction == 'STG' else 'loads'}"
    return "tensor_cores"


def all_reports(names: list[str]) -> list[Report]:
    """Every kernel of these ops for every architecture, compiled by as many processes as there are cores."""
    tasks = [(index, sizes, arch) for index, op in enumerate(OPS) if op.name in names for sizes, arch in op.tasks()]
    sources = [source for source in CUDA_SOURCES if source.stem in names]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as triton, ThreadPoolExecutor() as nvcc:
        cuda = nvcc.map(cuda_reports, sources)
        found = triton.map(triton_reports, *zip(*tasks, strict=True), chunksize=4) if tasks else ()
        reports = [report for several in (*found, *cuda) for report in several]
    return sorted(dict.fromkeys(reports))


def report_table(reports: list[Report]) -> str:
    """The reports, a line each; 16-byte accesses stand before the narrower ones."""
    lines: list[tuple[str, ...]] = [
        (
            *("kernel", "tile", "arch", "registers", "spills", "shared", "loads 16B+less", "stores 16B+less"),
            *("tensor cores", "barriers", "instructions", "of the longest innermost loop"),
        )
    ]
    lines += [
        (
            f"{report.op} {report.kernel}",
            report.tile,
            f"sm_{report.arch}",
            *map(str, (report.registers, report.spills, report.shared)),
            f"{report.wide_loads}+{report.narrow_loads}",
            f"{report.wide_stores}+{report.narrow_stores}",
            *map(str, (report.tensor_cores, report.barriers, report.instructions, report.loop)),
            *(f"FAILS: {failure}" for failure in report.failures),
        )
        for report in reports
    ]
    return in_columns(lines)


def layout_table(layouts: list[Layout]) -> str:
    """The layouts, a line each."""
    lines: list[tuple[str, ...]] = [
        (
            *("V", "element", "arch", "rows/block", "threads/row", "blocks/row", "staged", "read twice"),
            *("registers", "spills", "shared", "blocks/SM"),
        )
    ]
    lines += [
        (
            *map(str, (layout.V, layout.dtype, f"sm_{layout.arch}", layout.rows_per_block, layout.row_threads)),
            *map(str, (layout.cluster, layout.staged, layout.slice - layout.staged)),
            *map(str, (layout.registers, layout.spills, layout.shared, layout.blocks)),
            *(f"FAILS: {failure}" for failure in layout.failures),
        )
        for layout in layouts
    ]
    return in_columns(lines)


def in_columns(lines: list[tuple[str, ...]]) -> str:
    """A table; what exceeds its first line is not aligned."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, [*widths, *[0] * 9][: len(line)])).rstrip() for line in lines)


def results_of_a_fresh_process(option: str = "--json") -> dict[str, Any]:
    """What --json or --sm-89 prints: a process whose kernels are interpreted cannot compile them."""
    command = [sys.executable, "-m", "tests.support.compiled_kernels", option]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    known = [*(op.name for op in OPS), *(source.stem for source in CUDA_SOURCES)]
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.compiled_kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(known)}")
    parser.add_argument("--json", action="store_true", help="everything, for a program to read")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)} from all kernels")
    parser.add_argument("--sm-89", action="store_true", help="print, as JSON, kernels unlike those of sm_86 there")
    given = parser.parse_args()
    if unknown := set(given.names) - set(known):
        parser.error(f"there is no op {', '.join(sorted(unknown))}, only {', '.join(known)}")
    if given.record and given.names:
        parser.error("--record is of all kernels, expected no NAME")
    names = given.names or known
    os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")
    CACHE.mkdir(parents=True, exist_ok=True)
    if given.sm_89:
        tasks = [(index, sizes) for index, op in enumerate(OPS) if op.name in names for sizes in op.further]
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as processes:
            print(json.dumps({"unlike": list(processes.map(unlike_sm_86, *zip(*tasks, strict=True)))}))
        return
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two workers of a test run the second waits, and finds all compiled
        reports = all_reports(names)
    layouts = cuda_layouts(reports)
    unlisted = {op.name: sorted(unlisted_tiles(op)) for op in OPS if op.name in names}
    if given.record:
        write_record(reports)
    if given.json:
        wrong = {op.name: misrecorded(op) for op in OPS}
        print(json.dumps({"unlisted": unlisted, "misrecorded": wrong, "reports": reports, "layouts": layouts}))
        return
    command = " ".join(["compiled_kernels", *given.names])
    print(f"triton {importlib.metadata.version('triton')}, {datetime.date.today()}, {command}")
    print(report_table(reports))
    if layouts:
        print("", layout_table(layouts), sep="\n")
    failures = sum(bool(found.failures) for found in (*reports, *layouts)) + sum(map(len, unlisted.values()))
    for name, tiles in unlisted.items():
        for tile in tiles:
            print(f"{name}: a launcher can choose {tile}, which no size in OPS compiles")
    print(f"{len(reports)} kernels, {failures} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

"""Triton without a GPU or a driver: its launches end in cuda_stand_in.c, which checks them by the driver's rules.

    cuda_stand_in.activate(90)                       # this process's GPU is of sm_90
    cuda_stand_in.spare_compilation()                # no kernel runs, so none need be compiled
    forward(torch.empty(8, 64, device="meta"), ...)  # RuntimeError where a driver would refuse the launch
    print(cuda_stand_in.counted().launches)

All of Triton's own code runs: its binder, its cache, its launchers in C, its tensor maps. Launchers are called with
meta tensors, which may have any size; public functions with CPU tensors, after `run_kernels_on_cpu_tensors`. This must
be a process without TRITON_INTERPRET.
"""

import ctypes
import functools
import hashlib
import importlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from tests.support.compiled_kernels import CACHE, ClaimedDriver

SOURCE = Path(__file__).with_suffix(".c")
NAME = "libcuda.so.1"


# The library


def build() -> Path:
    """The library as compiled from the C beside this file, kept until that changes."""
    folder = CACHE / "cuda_stand_in" / hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    if not (folder / NAME).exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{NAME}.{os.getpid()}"
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
        options = ["-std=c11", "-O2", "-shared", "-fPIC", f"-Wl,-soname,{NAME}", f"-I{nvidia.include_dirs[0]}"]
        subprocess.run(["cc", *warnings, *options, str(SOURCE), "-o", str(unfinished)], check=True)
        unfinished.replace(folder / NAME)
    return folder / NAME


@functools.cache
def library() -> ctypes.CDLL:
    """The library as this process's driver: whoever opens libcuda.so.1 from now on finds it, by its soname."""
    path = build()
    knobs.nvidia.libcuda_path = str(path.parent)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


class Counted(NamedTuple):
    """What the library has accepted so far."""

    launches: int
    tensor_maps: int


def counted() -> Counted:
    return Counted(*(ctypes.c_long.in_dll(library(), f"stand_in_{name}").value for name in Counted._fields))


class LastLaunch(ctypes.Structure):
    """What the library keeps of the last launch: stand_in_last."""

    _fields_ = (
        *[(name, ctypes.c_uint64) for name in ("function", "stream")],
        *[(name, ctypes.c_uint32 * 3) for name in ("grid", "block")],
        *[(name, ctypes.c_uint32) for name in ("shared", "attributes", "num_bytes")],
        ("parameters", ctypes.c_ubyte * 8192),
    )


class Received(NamedTuple):
    """A launch as the driver received it."""

    function: int
    stream: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int
    parameters: bytes  # all of them, in the order of SharedLauncher, where that launched


def last_received() -> Received:
    last = LastLaunch.in_dll(library(), "stand_in_last")
    parameters = bytes(last.parameters[: last.num_bytes])
    return Received(
        last.function, last.stream, tuple(last.grid), tuple(last.block), last.shared, last.attributes, parameters
    )


# Triton on it


class StandInDriver(ClaimedDriver):
    """Triton's driver of a machine whose only GPU is of that architecture."""

    def __init__(self, arch: int, launcher: type) -> None:
        super().__init__(arch)
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = launcher


def activate(arch: int, share_launchers: bool = False) -> None:
    """Makes the library the driver of this process, its GPU of that architecture; see SharedLauncher."""
    cuda = library()
    driver.set_active(StandInDriver(arch, SharedLauncher if share_launchers else nvidia.CudaLauncher))
    cuda.cuCtxSetCurrent(ctypes.c_void_p(arch))


def spare_compilation(shared_memory: Callable[[], int] = lambda: 0) -> None:
    """From now on kernels are binaries without code; shared_memory gives the bytes that the next one takes."""

    def compile(src: Any, target: Any, options: dict[str, Any]) -> Binary:
        return Binary(src, target, options, shared_memory())

    triton.compiler.compile = compile


SCRATCH = {f"{kind}_scratch_{what}": 0 for kind in ("global", "profile") for what in ("size", "align")}


class Binary(CompiledKernel):
    """What Triton's compiler would make of a kernel, as far as a launch depends on it."""

    def __init__(self, src: Any, target: Any, options: dict[str, Any], shared: int) -> None:
        self.src, self.name, self.hash = src, src.name, src.name
        self.metadata = SimpleNamespace(
            **options,
            target=target,
            name=src.name,
            shared=shared,
            tmem_size=0,
            tensordesc_meta=tensor_maps_of(src),
            **SCRATCH,
        )
        self.packed_metadata = self.metadata.num_warps, self.metadata.num_ctas, shared
        self.kernel = b""
        self.metadata_group: dict[str, str] = {}
        self.module = self.function = self._run = None


ELEMENT_TYPES = {"fp16": (2, 6), "fp32": (4, 7), "bf16": (2, 10)}  # (bytes, Triton's number of the type)


def is_descriptor(type: Any) -> bool:
    return isinstance(type, str) and type.startswith("tensordesc")


def tensor_maps_of(src: Any) -> list[dict[str, Any]]:
    return [tensor_map_of(type) for type in src.signature.values() if is_descriptor(type)]


def tensor_map_of(type: str) -> dict[str, Any]:
    """What Triton's compiler makes of an argument such as tensordesc<bf16[1, 1, 64, 128]>: 128 bytes a row at most."""
    element, _, shape = type.removeprefix("tensordesc<").removesuffix("]>").partition("[")
    *outer, inner = map(int, shape.split(","))
    elem_size, elem_type = ELEMENT_TYPES[element]
    row_bytes = min(inner * elem_size, 128)
    return {
        "swizzle": {32: 1, 64: 2, 128: 3}[row_bytes],
        "elem_size": elem_size,
        "elem_type": elem_type,
        "block_size": [*outer, row_bytes // elem_size],
        "fp4_padded": False,
    }


SLOTS = {"*i8": 32, "i32": 48, "i64": 32, "fp32": 16, "u1": 4}  # arguments of each type


class SharedLauncher:
    """Triton's launcher, of one C module for all kernels: each module of a kernel's own takes gcc half a second.

    Arguments are sorted by type and filled up. Where nothing runs their order means nothing, and they are still
    converted by Triton's own code, which asks the driver whether each pointer is the device's.
    """

    def __init__(self, src: Any, metadata: Any) -> None:
        self.types, self.maps = list(src.signature.values()), metadata.tensordesc_meta
        self.launch = launcher_of_any(len(self.maps))

    def __call__(self, *args: Any) -> None:
        own = len(args) - len(self.types)  # grid, stream, function and so on
        given: dict[str, list[Any]] = {name: [] for name in [*SLOTS, "nvTmaDesc"]}
        maps = iter(self.maps)
        for type, value in leaves(self.types, args[own:]):
            if is_descriptor(type):
                tensor_map, *sizes = nvidia.make_tensordesc_arg(value, next(maps))
                rank = len(sizes) // 2
                given["nvTmaDesc"].append(tensor_map)
                given["i32"] += sizes[:rank]
                given["i64"] += sizes[rank:]
            else:
                given["*i8" if type.startswith("*") else type].append(value)
        keep_parameters(len(self.maps))
        for name, slots in SLOTS.items():
            given[name] += [None if name == "*i8" else 0] * (slots - len(given[name]))
        self.launch(*args[:own], *(value for values in given.values() for value in values))


BYTES = {"*i8": 8, "i32": 4, "i64": 8, "fp32": 4, "u1": 1}
TENSOR_MAP_BYTES, SCRATCH_POINTERS = 128, 2


def keep_parameters(num_maps: int) -> None:
    """From now on the library keeps the parameters of launches by a launcher_of_any."""
    sizes = [BYTES[name] for name, slots in SLOTS.items() for _ in range(slots)]
    sizes += [TENSOR_MAP_BYTES] * num_maps + [BYTES["*i8"]] * SCRATCH_POINTERS + [0]
    kept = (ctypes.c_int * len(sizes)).in_dll(library(), "stand_in_parameter_bytes")
    kept[:] = sizes


@functools.cache
def launcher_of_any(num_maps: int) -> nvidia.CudaLauncher:
    types = [*(name for name, slots in SLOTS.items() for _ in range(slots)), *["nvTmaDesc"] * num_maps]
    src = SimpleNamespace(signature=dict(enumerate(types)))
    return nvidia.CudaLauncher(src, SimpleNamespace(**SCRATCH, launch_cooperative_grid=False, launch_pdl=False))


def leaves(types: Sequence[Any], values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """(type, value) of what a kernel is given, without its constants."""
    for type, value in zip(types, values, strict=True):
        if isinstance(type, tuple):
            yield from leaves(type, value)
        elif type != "constexpr":
            yield type, value


def run_kernels_on_cpu_tensors() -> None:
    """From now on public functions take CPU tensors for a GPU's: they launch kernels of the active architecture."""
    from fastlm.ops import _dispatch, attention_launch

    attention = importlib.import_module("fastlm.ops.attention")  # the package's attribute of that name is the function
    replaced = (
        (_dispatch, "CAN_INTERPRET", True),
        (_dispatch, "interprets", lambda: True),  # with CAN_INTERPRET, what makes a CPU tensor the kernels'
        (attention_launch, "architecture", lambda x: driver.active.get_current_target().arch),
        (attention, "check_boundaries", lambda inputs: None),  # reads them, on a CPU alone
    )
    for module, name, value in replaced:
        assert hasattr(module, name), f"{module.__name__} has no {name} any more"
        setattr(module, name, value)
    ctypes.c_int.in_dll(library(), "stand_in_takes_host_memory").value = 1

"""Launches Triton kernels: Triton's own way from a call to the driver, kept short for a call that it has seen before.

kernel[grid](...) takes the host several times as long as all of one of PyTorch's ops: Triton binds the arguments to
parameters, writes out the options, looks knobs up, and asks hooks. It does so to find a compiled kernel, which depends
on little: `Launches.key_of` asks Triton what it compiles the arguments for, and that finds the kernel here.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops._triton import HAS_TRITON

try:
    from triton import knobs
    from triton._C.libtriton import native_specialize_impl as specialize
    from triton.compiler import make_backend
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction
except ImportError:  # no triton, or one that launches in another way: its own is always right
    HAS_LAUNCHERS = False
else:
    HAS_LAUNCHERS = HAS_TRITON


class Launcher(NamedTuple):
    """A compiled kernel that is loaded, and what its launch is given beside the arguments."""

    run: Any  # Triton's launcher for the types of its parameters
    function: Any  # of the driver
    metadata: Any
    constants: tuple[Any, ...]  # the constexprs, which are its last parameters
    compiled: Any  # owns the function: unloaded if Triton forgot it

    @classmethod
    def of(cls, compiled: Any, parameters: list[Any], constants: dict[str, Any]) -> "Launcher":
        """The parameters are those after the arguments."""
        values = tuple(constants[parameter.name] for parameter in parameters)
        return cls(compiled.run, compiled.function, compiled.packed_metadata, values, compiled)


class Launches:
    """The launchers of one kernel, each found by all that it depends on."""

    def __init__(self, kernel: Any) -> None:
        self.dynamic = [param.do_not_specialize for param in kernel.params]
        self.found: dict[tuple[Any, ...], Launcher] = {}

    def key_of(self, device: int, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
        """What Triton compiles these arguments for: their types and alignments, and which are 1; and all constants."""
        backend = BACKENDS.get(device) or backend_of(device)
        key, values = [device, *constants, *constants.values()], []
        for arg, is_dynamic in zip(args, self.dynamic, strict=False):
            if is_dynamic:  # in a tuple it would be specialised
                key.append(specialize(backend, arg, False, False, True))
            else:
                values.append(
                    tuple(arg) if isinstance(arg, tuple) else arg
                )  # of a NamedTuple Triton would make another
        return *key, *specialize(backend, tuple(values), False, True, True)


LAUNCHES: dict[Any, Launches] = {}  # by the kernel's function: Triton would hash the kernel's source
BACKENDS: dict[int, Any] = {}  # of Triton's compiler, by device


def backend_of(device: int) -> Any:
    """The compiler's backend of the current device, which has that number."""
    return BACKENDS.setdefault(device, make_backend(driver.active.get_current_target()))


def launch(kernel: Any, num_programs: int, *args: Any, **constants: Any) -> None:
    """kernel[(num_programs,)](*args, **constants) on the current device, in less time from the second such call on.

    constants   the kernel's constexprs, which are its last parameters and each of one type in all calls, and options
                such as num_warps
    """
    if not HAS_LAUNCHERS or type(kernel) is not JITFunction or is_observed(kernel):
        kernel[(num_programs,)](*args, **constants)
        return
    launches = LAUNCHES.get(kernel.fn)
    if launches is None:
        launches = LAUNCHES[kernel.fn] = Launches(kernel)
    active = driver.active
    device = active.get_current_device()
    key = launches.key_of(device, args, constants)
    launcher = launches.found.get(key)
    if launcher is None:
        compiled = kernel[(num_programs,)](*args, **constants)
        is_constant = [param.is_constexpr for param in kernel.params]
        if compiled is not None and all(is_constant[len(args) :]) and not any(is_constant[: len(args)]):
            launches.found[key] = Launcher.of(compiled, kernel.params[len(args) :], constants)
        return
    run, function, metadata, values, _ = launcher
    run(num_programs, 1, 1, active.get_current_stream(device), function, metadata, None, None, None, *args, *values)


def is_observed(kernel: Any) -> bool:
    """Whether a profiler or a debugger asks Triton about launches: only Triton's own way tells it."""
    runtime = knobs.runtime
    try:
        return bool(
            runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or runtime.add_stages_inspection_hook
            or runtime.debug
            or knobs.compilation.instrumentation_mode
            or kernel.pre_run_hooks
        )
    except AttributeError:  # a hook that is no chain of hooks
        return True


IS_CURRENT = contextlib.nullcontext()


def launch_on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device current: Triton launches on the current one, and would fault on another's pointers."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return IS_CURRENT

"""verify: each swapped layer of a model on the inputs that it meets, against its original, both beside float64.

    error of fastlm = max|fastlm - truth|      allowed = 2 max|original - truth| + one rounding of the largest truth

of the layer's result and of the gradient of its input: the rule of fastlm's own tests, on the kernels of this machine.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlm.acceleration.swapped_module import is_swapped, swap_back
from fastlm.acceleration.swapping import accelerate, restore


class Check(NamedTuple):
    """The errors of one layer, of its result or the gradient of its input: the larger beside what is allowed."""

    name: str  # of the module in the model
    module: str  # its class
    error: float  # of fastlm's layer
    torch_error: float  # of the original
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed


class Verification(NamedTuple):
    """What verify found; str() is a table."""

    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    def __str__(self) -> str:
        if not self.checks:
            return "fastlm: no layer of this model was swapped and ran"
        width = max(len(check.name) for check in self.checks)
        kind = max(len(check.module) for check in self.checks)
        lines = [
            f"{'layer':{width}}  {'class':{kind}}  {'fastlm':>9}  {'original':>9}  {'allowed':>9}  against float64"
        ]
        for check in self.checks:
            errors = f"{check.error:9.2e}  {check.torch_error:9.2e}  {check.allowed:9.2e}"
            lines.append(f"{check.name:{width}}  {check.module:{kind}}  {errors}  {'' if check.holds else 'TOO LARGE'}")
        return "\n".join(line.rstrip() for line in lines)


def verify(model: nn.Module, batch: Mapping[str, Any] | Sequence[Any] | Tensor) -> Verification:
    """Run batch through an accelerated copy of model, and every layer that was swapped against its original.

    batch    what model is called with: a mapping of keywords, a sequence of arguments, or one tensor

    The model is left as it is; the copy takes its memory once more. Layers whose input is no floating tensor are left
    out, and so is what is no module: attention of a Hugging Face model and its loss.
    """
    ours = accelerate(restore(copy.deepcopy(model)))
    inputs: dict[str, tuple[Any, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(_keep(inputs, name))
        for name, module in ours.named_modules()
        if is_swapped(module)
    ]
    try:
        with torch.no_grad():
            if isinstance(batch, Mapping):
                ours(**batch)
            else:
                ours(*([batch] if isinstance(batch, Tensor) else batch))
    finally:
        for hook in hooks:
            hook.remove()
    modules = dict(ours.eval().named_modules())  # in training a layer with dropout differs from itself
    return Verification(tuple(_check(name, modules[name], given[0]) for name, given in inputs.items()))


def _keep(inputs: dict[str, tuple[Any, ...]], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
        if len(given) == 1 and isinstance(given[0], Tensor) and given[0].is_floating_point():
            inputs.setdefault(name, (given[0].detach(),))

    return keep


def _check(name: str, module: nn.Module, x: Tensor) -> Check:
    theirs = copy.deepcopy(module)
    for part in theirs.modules():
        if is_swapped(part):
            swap_back(part)
    truth = copy.deepcopy(theirs).double()
    with InFloat64():
        expected = list(_result_and_gradient(truth, x.double()))
    found, original = (list(_result_and_gradient(each, x)) for each in (module, theirs))
    worst = None
    for ours, torchs, true in zip(found, original, expected, strict=True):
        rounding = torch.finfo(torchs.dtype).eps / 2 * float(true.abs().max())
        error, torch_error = (float((result.double() - true).abs().max()) for result in (ours, torchs))
        check = Check(name, type(theirs).__name__, error, torch_error, allowed=2 * torch_error + rounding)
        if worst is None or check.error * worst.allowed > worst.error * check.allowed:
            worst = check
    assert worst is not None
    return worst


def _result_and_gradient(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        y = module(x)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
        (gradient,) = torch.autograd.grad(y, x, upstream.to(y.dtype))
    yield y.detach()
    yield gradient


class InFloat64(TorchFunctionMode):
    """Casts to float32 inside a layer go to float64: its own would spoil the truth."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float and args[0].is_floating_point():
            return args[0].double()
        low = (torch.float32, torch.bfloat16, torch.float16)
        if kwargs.get("dtype") in low:
            kwargs["dtype"] = torch.float64
        return func(*(torch.float64 if any(a is dtype for dtype in low) else a for a in args), **kwargs)

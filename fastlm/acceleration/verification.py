"""verify: each swapped layer of a model on the inputs that it meets, against its original, both beside float64.

    error of fastlm = max|fastlm - truth|      allowed = 2 max|original - truth| + one rounding of the largest truth

of the layer's result and of the gradients of its inputs: the rule of fastlm's own tests, on this machine's kernels.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlm.acceleration.rotary import Rotary
from fastlm.acceleration.swapped_module import is_swapped, swap_back
from fastlm.acceleration.swapping import accelerate, restore


class Check(NamedTuple):
    """The errors of one layer, of its result or the gradient of an input: the largest beside what is allowed."""

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
            return "fastlm: no layer was swapped and ran, but for attention and loss of Hugging Face, left out"
        width = max(len(check.name) for check in self.checks)
        kind = max(len(check.module) for check in self.checks)
        lines = [
            f"{'layer':{width}}  {'class':{kind}}  {'fastlm':>9}  {'original':>9}  {'allowed':>9}  absolute, to float64"
        ]
        for check in self.checks:
            errors = f"{check.error:9.2e}  {check.torch_error:9.2e}  {check.allowed:9.2e}"
            lines.append(f"{check.name:{width}}  {check.module:{kind}}  {errors}  {'' if check.holds else 'TOO LARGE'}")
        return "\n".join(line.rstrip() for line in lines)


def verify(model: nn.Module, batch: Mapping[str, Any] | Sequence[Any] | Tensor) -> Verification:
    """Run batch through an accelerated copy of model, and every layer that was swapped against its original.

    batch    what model is called with: a mapping of keywords, a sequence of arguments, or one tensor

    The model is left as it is; the copy takes its memory once more. Layers that take no floating tensor are left out,
    and so is what is no module: attention of a Hugging Face model and its loss.

    Raises TypeError if batch is nothing of that kind, ValueError if it is empty or a tensor in it is.
    """
    batch = [batch] if isinstance(batch, Tensor) else batch
    _check(batch)
    ours = accelerate(restore(copy.deepcopy(model)))
    calls: dict[str, Call] = {}
    hooks = [
        module.register_forward_pre_hook(_keep(calls, name), with_kwargs=True)
        for name, module in ours.named_modules()
        if is_swapped(module) and module.layer is not Rotary
    ]
    for module in ours.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # no other code than PyTorch's path for evaluation supports those
    try:
        with torch.no_grad():
            if isinstance(batch, Mapping):
                ours(**batch)
            else:
                ours(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    modules = dict(ours.eval().named_modules())  # in training a layer with dropout differs from itself
    return Verification(tuple(check for name, call in calls.items() for check in _checks(name, modules[name], call)))


def _check(batch: Mapping[str, Any] | Sequence[Any]) -> None:
    if not isinstance(batch, Mapping | Sequence) or isinstance(batch, str):
        raise TypeError(
            f"verify: batch is of type {type(batch).__name__}, expected a mapping of keywords, a sequence of arguments "
            "or one tensor"
        )
    given = batch.values() if isinstance(batch, Mapping) else batch
    empty = [tuple(x.shape) for x in given if isinstance(x, Tensor) and not x.numel()]
    if empty or not batch:
        what = f"holds a tensor of shape {empty[0]}" if empty else "is empty"
        raise ValueError(f"verify: batch {what}, expected elements: errors are judged by the largest")


class Call(NamedTuple):
    """What a layer was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The same with each floating tensor changed; one that comes twice, as query and key may, is one again."""
        done: dict[int, Tensor] = {}

        def changed(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            if id(x) not in done:
                done[id(x)] = change(x)
            return done[id(x)]

        return Call(tuple(map(changed, self.args)), {name: changed(x) for name, x in self.kwargs.items()})

    def inputs(self) -> list[Tensor]:
        """The floating tensors among the arguments by place, each once."""
        floating = [x for x in self.args if isinstance(x, Tensor) and x.is_floating_point()]
        return list({id(x): x for x in floating}.values())


def _keep(calls: dict[str, Call], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(args, kwargs)
        if call.inputs() and all(x.numel() for x in call.inputs()):
            calls.setdefault(name, call)

    return keep


def _checks(name: str, module: nn.Module, call: Call) -> Iterator[Check]:
    """The check of a layer whose result is a tensor, or begins with one."""
    theirs = copy.deepcopy(module)
    for part in theirs.modules():
        if is_swapped(part):
            swap_back(part)
    truth = copy.deepcopy(theirs).double()
    with InFloat64():
        expected = _result_and_gradients(truth, call.mapped(Tensor.double))
    if expected is None:
        return
    found, original = (_result_and_gradients(each, call) for each in (module, theirs))
    assert found is not None, "the original gave a tensor"
    assert original is not None, "in float64 it gave a tensor"
    worst = None
    for ours, torchs, true in zip(found, original, expected, strict=True):
        rounding = torch.finfo(torchs.dtype).eps / 2 * float(true.abs().max())
        error, torch_error = (float((result.double() - true).abs().max()) for result in (ours, torchs))
        check = Check(name, type(theirs).__name__, error, torch_error, allowed=2 * torch_error + rounding)
        if worst is None or check.error * worst.allowed > worst.error * check.allowed:
            worst = check
    assert worst is not None, "there is a result at least"
    yield worst


def _result_and_gradients(module: nn.Module, call: Call) -> list[Tensor] | None:
    """The result and the gradients of the inputs; None if there is no tensor with gradients."""
    leaves = call.mapped(lambda x: x.detach().clone().requires_grad_())
    fresh = Call(leaves.args, call.mapped(Tensor.detach).kwargs)
    with torch.enable_grad():
        result = module(*fresh.args, **fresh.kwargs)
        y = result[0] if isinstance(result, tuple) else result
        if not isinstance(y, Tensor) or not y.requires_grad:
            return None
        upstream = torch.linspace(-1, 1, y.numel() + 1, dtype=torch.float64, device=y.device)[1:].view(y.shape)
        inputs = fresh.inputs()
        gradients = torch.autograd.grad(y, inputs, upstream.to(y.dtype), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(x) if dx is None else dx for x, dx in zip(inputs, gradients, strict=True))]


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

"""Norms under any name: a module without children that normalises the last dimension with at most a weight and a bias.

Which norm, whether the weight is 1 + parameter, under which name it keeps eps and which dtype it returns is found by
trying. LlamaRMSNorm, T5LayerNorm, GemmaRMSNorm and OlmoLayerNorm are four answers.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlm.acceleration.matching import Match, Refusal, is_from_torch, own_attributes, takes_one_tensor
from fastlm.acceleration.proof import SideEffect, agree, random, rows, trial_copy
from fastlm.ops import layer_norm, rms_norm

WRITTEN_EPS = (1e-5, 1e-6, 1e-8, 1e-12)  # of modules that keep none
LARGEST_EPS = 0.1  # a number above it is something else, such as a rate of dropout
TRIED_WIDTH = 24  # of a module that has no parameter to tell


class NormForm(NamedTuple):
    """Which norm a module computes, and under which names it keeps what it needs."""

    kind: str  # "rms" or "layer"
    weight: str | None
    bias: str | None
    eps: str | float  # an attribute, or the number that its code has
    plus_one: bool  # the weight is 1 + parameter, as in Gemma
    result: str = "input"  # whose dtype it has, "input" or "weight", or "both" for what the two promote to


def norm_of(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, form: NormForm) -> Tensor:
    """The norm of x (..., C)."""
    dtype = result_dtype(x, weight, form)
    if form.plus_one and weight is not None:
        weight = 1.0 + weight.float()
    normalized = x.shape[-1:] if weight is None else weight.shape  # torch.jit.trace takes no traced size for one
    if form.kind == "rms":
        return rms_norm(x, normalized, weight, eps, dtype=dtype)
    return layer_norm(x, normalized, weight, bias, eps, dtype=dtype)


def result_dtype(x: Tensor, weight: Tensor | None, form: NormForm) -> torch.dtype:
    if weight is None or form.result == "input":
        return x.dtype
    return weight.dtype if form.result == "weight" else torch.promote_types(x.dtype, weight.dtype)


class Norm(nn.Module):
    """The forward of such a module. Any call but norm(x) runs the module's own code."""

    form: NormForm

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        form = self.form
        weight = None if form.weight is None else getattr(self, form.weight)
        bias = None if form.bias is None else getattr(self, form.bias)
        return norm_of(args[0], weight, bias, eps_of(self, form), form)


def eps_of(module: Any, form: NormForm) -> float:
    return form.eps if isinstance(form.eps, float) else getattr(module, form.eps)


def match_norm(module: nn.Module) -> Match | Refusal | None:
    """What computes module, if it looks like a norm: its parameters are one or two vectors, or its class says Norm."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    shapes = {tuple(p.shape) for p in parameters.values()}
    named_norm = "norm" in type(module).__name__.lower()
    if is_from_torch(module) or module._modules or not takes_one_tensor(module):
        return None
    if (
        len(parameters) > 2
        or len(shapes) > 1
        or any(len(shape) != 1 for shape in shapes)
        or not (parameters or named_norm)
    ):
        return None
    if shapes == {(1,)}:
        return Refusal("its parameters have one element") if named_norm else None
    if module._buffers:
        return Refusal("it has buffers") if named_norm else None
    C = next(iter(shapes))[0] if shapes else TRIED_WIDTH
    try:
        form = find_form(module, list(parameters), C)
    except SideEffect as effect:
        return Refusal(str(effect))
    if form is not None:
        plus_one = ", weight 1 + parameter" if form.plus_one else ""
        reads = (form.eps,) if isinstance(form.eps, str) else ()
        return Match(Norm, form, f"ops.{form.kind}_norm{plus_one}", reads=reads)
    return Refusal("it computes neither rms_norm nor layer_norm of the last dimension") if named_norm else None


def find_form(module: nn.Module, names: list[str], C: int) -> NormForm | None:
    """The form whose values and gradients are those of module, on a copy with random parameters (C,)."""
    generator = torch.Generator().manual_seed(3)
    parameters = {name: nn.Parameter(random(generator, C)) for name in names}
    trial = trial_copy(module, parameters)
    x = rows(C)
    for form in possible_forms(module, names):
        weight, bias = (None if name is None else parameters[name] for name in (form.weight, form.bias))
        eps = eps_of(module, form)
        try:
            ours = functools.partial(norm_of, weight=weight, bias=bias, eps=eps, form=form)
            shapes = x, x.flatten(0, 1), x[None]  # images have four dimensions, and often other code
            if all(agree(ours, trial, rows, list(parameters.values())) for rows in shapes):
                return with_result_dtype(module, names, C, form)
        except SideEffect:
            raise
        except Exception:  # the module is anybody's code; what fails on a tensor of rows is no norm of theirs
            return None
    return None


def possible_forms(module: nn.Module, names: list[str]) -> Iterator[NormForm]:
    kept = [name for name, value in own_attributes(module).items() if type(value) is float and 0 < value <= LARGEST_EPS]
    choices: list[str | float] = [*kept, *WRITTEN_EPS]
    for eps in choices:
        if len(names) == 2:
            first, second = names
            yield NormForm("layer", first, second, eps, plus_one=False)
            yield NormForm("layer", second, first, eps, plus_one=False)
            continue
        weight = names[0] if names else None
        yield NormForm("rms", weight, None, eps, plus_one=False)
        yield NormForm("layer", weight, None, eps, plus_one=False)
        if names:
            yield NormForm("rms", weight, None, eps, plus_one=True)
            yield NormForm("layer", None, weight, eps, plus_one=False)


DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
)  # of input and parameters


def with_result_dtype(module: nn.Module, names: list[str], C: int, form: NormForm) -> NormForm | None:
    """The form that gives a result of module's dtype for inputs and parameters of any; None if none does."""
    for result in ("input", "both", "weight"):
        form = form._replace(result=result)
        if all(_has_dtype_of(form, module, names, C, x_dtype, dtype) for x_dtype, dtype in DTYPES):
            return form
    return None


def _has_dtype_of(
    form: NormForm, module: nn.Module, names: list[str], C: int, x_dtype: torch.dtype, dtype: torch.dtype
) -> bool:
    parameters = {name: nn.Parameter(torch.ones(C, dtype=dtype)) for name in names}
    weight = None if form.weight is None else parameters[form.weight]
    x = torch.ones(1, C, dtype=x_dtype)
    with torch.no_grad():
        try:
            found = trial_copy(module, parameters).forward(x)
        except RuntimeError:  # torch.nn.functional.layer_norm refuses some pairs of dtypes
            return True
    return found.dtype == result_dtype(x, weight, form)

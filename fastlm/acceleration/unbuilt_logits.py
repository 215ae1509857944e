"""Logits that nobody has computed yet: they stand for a head's result until the loss, which needs none of them.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)      or without softcap, and then without tanh

A model may reshape, slice, cast, scale and softcap them and add a bias; torch.nn.functional.cross_entropy of them is
linear_cross_entropy. Whatever else is asked of them builds the logits and asks those.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops import linear_cross_entropy


class UnbuiltLogits:
    """(..., V), of hidden (..., C), weight (V, C) and bias (V,)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.scale = 1.0  # of what tanh takes, or of the result where there is no tanh
        self.softcap: float | None = None  # factor of tanh's result
        self.result_dtype: torch.dtype | None = None  # what they were cast to

    def built(self) -> Tensor:
        """The logits as a tensor."""
        logits = F.linear(self.hidden, self.weight, self.bias)
        logits = logits if self.result_dtype is None else logits.to(self.result_dtype)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits) * self.softcap

    def loss(self, target: Tensor, **options: Any) -> Tensor:
        """Their cross entropy, in float32 or in the dtype that they have."""
        scale = self.scale if self.softcap is None else self.scale * self.softcap
        scale = 1.0 if math.isclose(scale, 1.0) else scale  # 1 / 49 * 49, say, of which products would be scaled
        return linear_cross_entropy(
            self.hidden,
            self.weight,
            target,
            linear_bias=self.bias,
            logit_scale=scale,
            softcap=self.softcap,
            dtype=self.result_dtype,
            **options,
        )

    def _changed(self, **attributes: Any) -> "UnbuiltLogits":
        changed = copy.copy(self)
        vars(changed).update(attributes)
        return changed

    # What a tensor has

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.hidden.dim()

    def contiguous(self) -> "UnbuiltLogits":
        return self

    def float(self) -> "UnbuiltLogits":
        return self._changed(result_dtype=torch.float32)

    def view(self, *shape: Any) -> Any:
        *leading, columns = shape
        if columns != self.weight.shape[0]:
            return self.built().view(*shape)
        return self._changed(hidden=self.hidden.reshape(*leading, self.hidden.shape[-1]))

    reshape = view

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if args == (torch.float32,) and not kwargs:
            return self.float()
        return self if (args, kwargs) == ((self.device,), {}) else self.built().to(*args, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        """A slice of every dimension, as [..., :-1, :], that keeps all of the last."""
        if isinstance(index, tuple) and len(index) > 1 and index[0] is Ellipsis and index[-1] == slice(None):
            return self._changed(hidden=self.hidden[index])
        return self.built()[index]

    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, int | float) or factor <= 0:
            return self.built() * factor
        if self.softcap is None:
            return self._changed(scale=self.scale * factor)
        return self._changed(softcap=self.softcap * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if not isinstance(divisor, int | float) or divisor <= 0:
            return self.built() / divisor
        return self * (1 / divisor)

    def __add__(self, other: Any) -> Any:
        """A bias more, (..., V) of V elements."""
        is_bias = isinstance(other, Tensor) and other.dim() > 0 and other.numel() == other.shape[-1] == self.shape[-1]
        if not is_bias or self.softcap is not None or self.scale != 1 or self.result_dtype is not None:
            return self.built() + other
        other = other.reshape(-1)
        return self._changed(bias=other if self.bias is None else self.bias + other)

    def tanh(self) -> Any:
        return self._changed(softcap=1.0) if self.softcap is None else self.built().tanh()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for what an object need not have
            raise AttributeError(name)
        return getattr(self.built(), name)

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.cross_entropy:
            return cross_entropy(*args, **kwargs)
        if function is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        return function(*map(built, args), **{name: built(x) for name, x in kwargs.items()})


def built(x: Any) -> Any:
    return x.built() if isinstance(x, UnbuiltLogits) else x


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy of unbuilt logits; from hidden states where the classes are indices (N,)."""
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    options |= {"label_smoothing": label_smoothing}
    is_of_rows = input.dim() == 2 and target.dim() == 1 and size_average is None and reduce is None
    if isinstance(input, UnbuiltLogits) and isinstance(target, Tensor) and is_of_rows:
        return input.loss(target, **options)
    return F.cross_entropy(built(input), built(target), size_average=size_average, reduce=reduce, **options)

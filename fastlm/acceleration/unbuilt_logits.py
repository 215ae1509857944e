"""Logits that nobody has computed yet: they stand for a head's result until the loss, which needs none of them.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)      or without softcap, and then without tanh

A model may reshape, slice, cast, scale and softcap them and add a bias; torch.nn.functional.cross_entropy of them is
linear_cross_entropy. Whatever else is asked of them builds the logits, once, and asks those: what is done to a tensor
in place is seen by all views of it, built or not, and by their losses.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlm.ops import linear_cross_entropy
from fastlm.ops._dispatch import autocast_dtype


class UnbuiltLogits:
    """(..., V), of hidden (..., C), weight (V, C) and bias (V,)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.scale = 1.0  # of what tanh takes, or of the result where there is no tanh
        self.softcap: float | None = None  # factor of tanh's result
        self.result_dtype: torch.dtype | None = None  # what they were cast to
        self.mode = mode_of(hidden)  # in which the head was called
        self.viewed: UnbuiltLogits | None = None  # those that these are a view of
        self.as_view: Callable[[Tensor], Tensor] | None = None  # which view
        self.tensor: Tensor | None = None  # once built

    def built(self) -> Tensor:
        """The logits as a tensor, the same at each call."""
        if self.tensor is None:
            viewed, as_view = self.viewed, self.as_view
            self.tensor = self._computed() if viewed is None or as_view is None else as_view(viewed.built())
        return self.tensor

    @property
    def is_built(self) -> bool:
        return self.tensor is not None or (self.viewed is not None and self.viewed.is_built)

    def _computed(self) -> Tensor:
        """In the mode of the head's call, which may be another than the present one."""
        if self.mode != mode_of(self.hidden):
            with_gradients, cast_to = self.mode
            kind, is_cast = self.device.type, cast_to is not None
            with torch.set_grad_enabled(with_gradients), torch.autocast(kind, cast_to, enabled=is_cast):
                return self._product()
        return self._product()

    def _product(self) -> Tensor:
        if self.result_dtype is None:
            logits = F.linear(self.hidden, self.weight, self.bias)
        else:
            logits = F.linear(self.hidden, self.weight).to(self.result_dtype)
            logits = logits if self.bias is None else logits + self.bias
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits) * self.softcap

    def loss(self, target: Tensor, **options: Any) -> Tensor:
        """Their cross entropy, in float32 or in the dtype that they have."""
        if self.is_built or self.mode != mode_of(self.hidden):
            return F.cross_entropy(self.built(), target, **options)
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
        changed = object.__new__(type(self))
        vars(changed).update({**vars(self), "viewed": None, "as_view": None, **attributes})
        return changed

    def _view(self, hidden: Tensor, as_view: Callable[[Tensor], Tensor]) -> "UnbuiltLogits":
        return self._changed(hidden=hidden, viewed=self, as_view=as_view)

    # What a tensor has

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.result_dtype or self.mode[1] or self.hidden.dtype

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.hidden.dim()

    def contiguous(self, **kwargs: Any) -> Any:
        return self.built().contiguous(**kwargs) if kwargs or self.is_built else self

    def float(self, **kwargs: Any) -> Any:
        if kwargs or self.is_built:
            return self.built().float(**kwargs)
        return self if self.dtype == torch.float32 else self._changed(result_dtype=torch.float32)

    def view(self, *shape: Any, **kwargs: Any) -> Any:
        return self._reshaped("view", *shape, **kwargs)

    def reshape(self, *shape: Any, **kwargs: Any) -> Any:
        return self._reshaped("reshape", *shape, **kwargs)

    def _reshaped(self, name: str, *shape: Any, **kwargs: Any) -> Any:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        if kwargs or self.is_built or not sizes or sizes[-1] != self.shape[-1]:
            return getattr(self.built(), name)(*shape, **kwargs)
        *leading, columns = sizes
        return self._view(
            self.hidden.reshape(*leading, self.hidden.shape[-1]), lambda logits: logits.reshape(*leading, columns)
        )

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if args == (torch.float32,) and not kwargs:
            return self.float()
        return self if (args, kwargs) == ((self.device,), {}) else self.built().to(*args, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        """A slice of every dimension, as [..., :-1, :], that keeps all of the last."""
        is_of_rows = isinstance(index, tuple) and len(index) > 1 and index[0] is Ellipsis
        if not self.is_built and is_of_rows and isinstance(index[-1], slice) and index[-1] == slice(None):
            return self._view(self.hidden[index], lambda logits: logits[index])
        return self.built()[index]

    def __mul__(self, factor: Any) -> Any:
        if self.is_built or not isinstance(factor, int | float) or not 0 < factor < math.inf:
            return self.built() * built(factor)
        if self.softcap is None:
            return self._changed(scale=self.scale * factor)
        return self._changed(softcap=self.softcap * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if self.is_built or not isinstance(divisor, int | float) or not 0 < divisor < math.inf:
            return self.built() / built(divisor)
        return self * (1 / divisor)

    def __add__(self, other: Any) -> Any:
        """A bias more, (..., V) of V elements."""
        is_bias = isinstance(other, Tensor) and 0 < other.dim() <= self.dim()
        is_bias = is_bias and other.numel() == other.shape[-1] == self.shape[-1]
        is_plain = self.softcap is None and self.scale == 1 and self.result_dtype is None
        if self.is_built or not (is_bias and is_plain):
            return self.built() + built(other)
        bias = other.reshape(-1) if self.bias is None else self.bias + other.reshape(-1)
        dtype = torch.promote_types(self.dtype, other.dtype)
        return self._changed(bias=bias, result_dtype=None if dtype == self.dtype else dtype)

    def tanh(self) -> Any:
        return self.built().tanh() if self.is_built or self.softcap is not None else self._changed(softcap=1.0)

    __array_priority__ = Tensor.__array_priority__  # by which NumPy's scalars leave products to these

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
        return function(*tree_map(built, args), **tree_map(built, kwargs))


def _ask_built(name: str) -> Callable[..., Any]:
    def method(self: UnbuiltLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.built(), name)(*tree_map(built, args), **tree_map(built, kwargs))

    return method


# Operators and the like, which Python looks up on a class and not on its object.
OF_OBJECT = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__repr__", "__format__", "__reduce_ex__"}
for _name in OF_OBJECT.union(set(dir(Tensor)) - set(dir(object))) - {"__setstate__", "__torch_dispatch__"}:
    if _name.startswith("__") and _name not in vars(UnbuiltLogits) and callable(getattr(Tensor, _name, None)):
        setattr(UnbuiltLogits, _name, _ask_built(_name))


def mode_of(hidden: Tensor) -> tuple[bool, torch.dtype | None]:
    """Whether gradients are made, and what autocast casts products to."""
    return torch.is_grad_enabled(), autocast_dtype(hidden)


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

"""Softmax and LogSoftmax: torch.nn's modules, computed by fastlm.ops, with a scale, a mask and causality."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fastlm.nn._torchscript import torch_forward
from fastlm.ops.softmax import log_softmax, softmax


class _Scaled(torch.nn.Module):
    """What Softmax and LogSoftmax add to torch.nn's: a scale and causality, and a mask for each call."""

    __constants__: ClassVar = ["dim", "scale", "causal"]
    _function: Callable[..., Tensor]
    _torch_forward: Callable[..., Tensor]
    dim: int | None
    scale: float = 1.0  # on the class, so that a module of torch's that was pickled or converted has them too
    causal: bool = False

    def __init__(self, dim: int | None = None, *, scale: float = 1.0, causal: bool = False) -> None:
        super().__init__(dim)
        self.scale = scale
        self.causal = causal

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """The function of fastlm.ops along dim; mask broadcasts to input, boolean (True keeps) or added."""
        if torch.jit.is_scripting():
            is_plain = self.scale == 1.0 and not self.causal and mask is None
            assert is_plain, "Softmax: TorchScript compiles torch.nn's module, which has no scale, mask or causal"
            return self._torch_forward(input)
        function = type(self)._function
        return function(input, self.dim, _stacklevel=5, scale=self.scale, mask=mask, causal=self.causal)

    def extra_repr(self) -> str:
        """torch's, and the extras that are set."""
        scale = f", scale={self.scale}" if self.scale != 1.0 else ""
        return f"dim={self.dim}{scale}{', causal=True' if self.causal else ''}"


class Softmax(_Scaled, torch.nn.Softmax):
    """Drop-in for torch.nn.Softmax; scale and causal are those of fastlm.ops.softmax, as is mask of a call."""

    _function = staticmethod(softmax)
    _torch_forward = torch_forward(torch.nn.Softmax)


class LogSoftmax(_Scaled, torch.nn.LogSoftmax):
    """Drop-in for torch.nn.LogSoftmax; scale and causal are those of fastlm.ops.log_softmax, as is mask of a call."""

    _function = staticmethod(log_softmax)
    _torch_forward = torch_forward(torch.nn.LogSoftmax)

"""Activations of the feed-forward layer.

    gelu(x) = x Phi(x), or with approximate="tanh"  x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    swiglu(gate, up) = gate sigmoid(gate) up
    bias_gelu(x, bias) = gelu(x + bias)

Source: Hendrycks, Gimpel 2016, arXiv 1606.08415; Shazeer 2020, arXiv 2002.05202.
"""

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit, elementwise, as torch.nn.functional.gelu. Raises ValueError for another formula."""
    _check_approximate("gelu", approximate)
    return F.gelu(x, approximate=approximate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. gate, up (..., F) of one shape; raises ValueError if the shapes differ."""
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}, expected one shape")
    return F.silu(gate) * up


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias). x (..., F), bias (F,); raises ValueError if bias does not match the last dimension of x."""
    _check_approximate("bias_gelu", approximate)
    if bias.shape != x.shape[-1:]:
        expected = f"expected {tuple(x.shape[-1:])} to match the last dimension of x"
        raise ValueError(f"bias_gelu: bias has shape {tuple(bias.shape)}, {expected}")
    return F.gelu(x + bias, approximate=approximate)


def _check_approximate(op: str, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate is {approximate!r}, expected 'none' or 'tanh'")

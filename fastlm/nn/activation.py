"""GELU: torch.nn's module, computed by fastlm.ops."""

import torch
from torch import Tensor

from fastlm.ops.activations import gelu


class GELU(torch.nn.GELU):
    """Drop-in for torch.nn.GELU: the same constructor and values; see ops.gelu."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, self.approximate)

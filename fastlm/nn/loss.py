"""Losses named as in torch.nn."""

from typing import Any

import torch
from torch import Tensor

from fastlm.ops.cross_entropy import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for torch.nn.CrossEntropyLoss: the same arguments, and the keyword-only extras of the op.

    z_loss, softcap, num_classes and inplace are those of fastlm.ops.cross_entropy.
    """

    def __init__(
        self,
        *args: Any,
        z_loss: float = 0.0,
        softcap: float | None = None,
        num_classes: int | None = None,
        inplace: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.z_loss = z_loss
        self.softcap = softcap
        self.num_classes = num_classes
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, V), or of any form that torch.nn.CrossEntropyLoss takes."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            num_classes=self.num_classes,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        """The extras that are set."""
        names = ("z_loss", "softcap", "num_classes", "inplace")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names if getattr(self, name))

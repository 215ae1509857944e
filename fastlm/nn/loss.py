"""Losses named as in torch.nn."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:  # some builds of PyTorch have no process groups
    from torch.distributed import ProcessGroup


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for torch.nn.CrossEntropyLoss: the same arguments, and the keyword-only extras of the op.

    z_loss, softcap, num_classes, inplace and process_group are those of fastlm.ops.cross_entropy.
    """

    def __init__(
        self,
        *args: Any,
        z_loss: float = 0.0,
        softcap: float | None = None,
        num_classes: int | None = None,
        inplace: bool = False,
        process_group: "ProcessGroup | None" = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.z_loss = z_loss
        self.softcap = softcap
        self.num_classes = num_classes
        self.inplace = inplace
        self.process_group = process_group

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
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """The extras that are set."""
        names = ("z_loss", "softcap", "num_classes", "inplace")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names if getattr(self, name))


class LinearCrossEntropyLoss(torch.nn.Module):
    """Drop-in for torch.nn.LinearCrossEntropyLoss of torch 2.13, on any torch: a linear head and its cross entropy.

    The head is self.linear, a torch.nn.Linear. Arguments and state_dict keys are torch's; z_loss, softcap, shift and
    memory_budget are those of fastlm.ops.linear_cross_entropy. A head whose weight is tied to an embedding's:
    loss.linear.weight = embedding.weight.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        shift: bool = False,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(
                f"LinearCrossEntropyLoss: weight has shape {tuple(weight.shape)}, expected ({num_classes},)"
            )
        self.linear = torch.nn.Linear(in_features, math.prod((num_classes, *out_features)), bias, device, dtype)
        self.register_buffer("weight", weight)
        self.weight: Tensor | None
        self.num_classes = num_classes
        self.out_features = out_features
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.z_loss = z_loss
        self.softcap = softcap
        self.shift = shift
        self.memory_budget = memory_budget

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of features (..., in_features) against class indices (...) or any other target torch's takes."""
        classes = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.view(*classes, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.view(classes),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
            shift=self.shift,
            memory_budget=self.memory_budget,
        )

    def extra_repr(self) -> str:
        """What differs from the defaults, beside the head that is printed below."""
        defaults: dict[str, object] = {
            "reduction": "mean",
            "ignore_index": None,
            "label_smoothing": 0.0,
            "options": None,
            "z_loss": 0.0,
        }
        defaults |= {"out_features": (), "softcap": None, "shift": False, "memory_budget": None}
        names = ["num_classes", *(name for name, default in defaults.items() if getattr(self, name) != default)]
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

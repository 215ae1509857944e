"""Losses named as in torch.nn."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from fastlm.nn._torchscript import torch_forward
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:  # some builds of PyTorch have no process groups
    from torch.distributed import ProcessGroup

EXTRAS = ["z_loss", "softcap", "num_classes", "inplace", "process_group"]  # of CrossEntropyLoss, beside torch's
# PyTorch has one from 2.13 on.
TorchLinearCrossEntropyLoss: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _WeightedLoss)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for torch.nn.CrossEntropyLoss: the same arguments, and the keyword-only extras of the op.

    z_loss, softcap, num_classes, inplace and process_group are those of fastlm.ops.cross_entropy.
    """

    # On the class, so that a module of torch's that was pickled or converted has them too.
    z_loss: float = 0.0
    softcap: float | None = None
    num_classes: int | None = None
    inplace: bool = False
    process_group: "ProcessGroup | None" = None
    __constants__ = torch.nn.CrossEntropyLoss.__constants__ + EXTRAS
    _torch_forward = torch_forward(torch.nn.CrossEntropyLoss)

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        num_classes: int | None = None,
        inplace: bool = False,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.num_classes = num_classes
        self.inplace = inplace
        self.process_group = process_group

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, V), or of any form that torch.nn.CrossEntropyLoss takes."""
        if torch.jit.is_scripting():
            is_plain = self.z_loss == 0.0 and self.softcap is None and self.num_classes is None
            is_plain = is_plain and not self.inplace and self.process_group is None
            assert is_plain, "CrossEntropyLoss: TorchScript compiles torch.nn's module, which has none of the extras"
            return self._torch_forward(input, target)
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
        return ", ".join(_set_extras(self, *EXTRAS[:-1]))


class LinearCrossEntropyLoss(TorchLinearCrossEntropyLoss):
    """Drop-in for torch.nn.LinearCrossEntropyLoss of torch 2.13, on any torch: a linear head and its cross entropy.

    The head is self.linear, a torch.nn.Linear. Arguments and state_dict keys are torch's; z_loss, logit_scale, softcap,
    shift and memory_budget are those of fastlm.ops.linear_cross_entropy. A head whose weight is tied to an
    embedding's: loss.linear.weight = embedding.weight.
    """

    weight: Tensor | None
    z_loss: float = 0.0  # on the class, as in CrossEntropyLoss
    logit_scale: float = 1.0
    softcap: float | None = None
    shift: bool | int = False
    memory_budget: int | None = None

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
        logit_scale: float = 1.0,
        softcap: float | None = None,
        shift: bool | int = False,
        memory_budget: int | None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(
                f"LinearCrossEntropyLoss: weight has shape {tuple(weight.shape)}, expected ({num_classes},)"
            )
        _WeightedLoss.__init__(self, weight, reduction=reduction)
        self.linear = torch.nn.Linear(in_features, math.prod((num_classes, *out_features)), bias, device, dtype)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.shift = shift
        self.memory_budget = memory_budget

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of features (..., in_features) against class indices (...) or any other target torch's takes."""
        classes = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*classes, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(classes),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            shift=self.shift,
            memory_budget=self.memory_budget,
        )

    def extra_repr(self) -> str:
        """torch's, and the extras that are set."""
        text = f"in_features={self.linear.in_features}, num_classes={self.num_classes}"
        text += f", out_features={self.out_features}, bias={self.linear.bias is not None}"
        text += f", reduction={self.reduction}, ignore_index={self.ignore_index}"
        text += f", label_smoothing={self.label_smoothing}, options={self.options}"
        return ", ".join([text, *_set_extras(self, "z_loss", "logit_scale", "softcap", "shift", "memory_budget")])


def _set_extras(module: torch.nn.Module, *names: str) -> list[str]:
    """name=value of those of a module's extras that are set."""
    default = type(module)
    return [f"{name}={getattr(module, name)}" for name in names if getattr(module, name) != getattr(default, name)]

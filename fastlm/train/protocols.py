"""What the trainer asks of a model, of a loader and of its batches, and nothing more."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Batch(Protocol):
    """Rows of packed tokens: targets (B, T) of -100 do not count, cu_seqlens (K,) int32 are the document boundaries."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    @property
    def cu_seqlens(self) -> Tensor: ...

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch": ...


class Loader(Protocol):
    """An endless iterator over batches that can be put back to where it was; its state holds JSON values alone."""

    def __next__(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainableModel(Protocol):
    """A torch.nn.Module whose call maps a batch to its summed token loss (float32) and number of valid tokens."""

    def __call__(
        self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Every trainable parameter once: [{"params": [...], "weight_decay_scale": 1.0 or 0.0}, ...]."""

    def flops_per_token(self, T: int) -> float:
        """FLOPs of training on one token of a row of T, forward and backward."""


def as_trainable(model: nn.Module) -> TrainableModel:
    """The model itself. Raises TypeError if it lacks a method of TrainableModel."""
    for method in ("parameter_groups", "flops_per_token"):
        if not callable(getattr(model, method, None)):
            raise TypeError(f"{type(model).__name__} has no method {method}(), which the trainer needs of a model")
    trainable: Any = model
    return trainable

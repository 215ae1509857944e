"""What the trainer asks of a model, of a loader and of its batches, and nothing more."""

import inspect
from collections.abc import Iterable, Iterator, Sized
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
    """An endless iterator over batches that can be put back to where it was; its state holds JSON values alone.

    It may say is_self_contained = True: its batches depend on that state alone, on no generator of random numbers that
    others use too. Then they are prepared in a thread.

    A run that is resumed on another number of ranks gives rank 0's state to each, so the state should count what all
    ranks have read, as that of fastlm.data.PackedLoader does.
    """

    def __next__(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainableModel(Protocol):
    """A torch.nn.Module whose call maps a batch to its summed token loss (float32) and number of valid tokens.

    fastlm.CausalLM makes one of any module that gives logits. It may have parameter_groups() and flops_per_token(T)
    too, in place of the defaults below, and blocks (its layers) and saved_ops() (whose results are worth keeping), in
    place of those of `activation_checkpointing.py`.
    """

    def __call__(
        self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]: ...


def check_model(model: nn.Module) -> None:
    """Raise TypeError unless the model's forward takes what a batch holds, as TrainableModel says."""
    try:
        inspect.signature(model.forward).bind("tokens", "targets", cu_seqlens=None, positions=None)
    except TypeError as error:
        raise TypeError(
            f"{type(model).__name__} cannot be called as model(tokens, targets, cu_seqlens=..., positions=...): "
            f"{error}; if it gives logits, train fastlm.CausalLM(model)"
        ) from None


def check_loaders(train_loader: object, eval_loader: object) -> None:
    """Raise TypeError or ValueError for what is no Loader, and for held-out batches that cannot be evaluated twice."""
    if missing := [name for name in ("__next__", "state_dict", "load_state_dict") if not hasattr(train_loader, name)]:
        raise TypeError(
            f"train_loader is {_named(train_loader)} without {missing[0]}, expected an endless iterator over batches "
            "with state_dict and load_state_dict: fastlm.data.PackedLoader makes one of token ids, "
            "fastlm.data.BatchLoader one of another loader of batches"
        )
    if isinstance(eval_loader, Iterator):
        raise ValueError(
            f"eval_loader is of type {type(eval_loader).__name__}, an iterator, which the first evaluation would use "
            "up: expected what can be iterated again and again, such as a list or one_pass()"
        )
    if eval_loader is not None and not isinstance(eval_loader, Iterable) and not hasattr(eval_loader, "__getitem__"):
        raise TypeError(
            f"eval_loader is {_named(eval_loader)}, expected batches that can be iterated again and again, such as a "
            "list, or None"
        )
    if isinstance(eval_loader, Sized) and len(eval_loader) == 0:
        raise ValueError("eval_loader holds no batch: give some, or None")


def _named(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The model's own groups, else matrices with weight decay and vectors without.

    Every trainable parameter once: [{"params": [...], "weight_decay_scale": 1.0 or 0.0}, ...]. A group may also say
    which optimiser takes it where there are two: "optimizer": "muon" or "adamw"; else `muon.hidden_matrices` says it.
    """
    if callable(own := getattr(model, "parameter_groups", None)):
        return own()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = (
        [parameter for parameter in trainable if (parameter.dim() >= 2) is is_matrix] for is_matrix in (True, False)
    )
    return [{"params": matrices, "weight_decay_scale": 1.0}, {"params": vectors, "weight_decay_scale": 0.0}]


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: nn.Module, T: int) -> float:
    """FLOPs of training on one token of a row of T, forward and backward: the model's own count, or a default.

    The default is 6 for each parameter of a matrix that is multiplied, which an embedding alone is not. Attention's
    products of activations are not in it: a module does not tell how many heads and layers it has.
    """
    if callable(own := getattr(model, "flops_per_token", None)):
        return own(T)
    looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplied = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return 6.0 * sum(p.numel() for p in model.parameters() if p.dim() >= 2 and (p not in looked_up or p in multiplied))

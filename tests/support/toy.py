"""The smallest model and loader that keep the trainer's protocols, and runs with them in other processes."""

import dataclasses
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.train import TrainConfig, Trainer

V, C, T = 29, 16, 12


class ToyModel(nn.Module):
    """Predicts the next token from the present one; input and output embeddings are tied."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(V, C)
        self.hidden = nn.Linear(C, C)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(C, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = self.dropout(torch.tanh(self.hidden(self.embedding(tokens))))
        losses = F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
        return losses, (targets != -100).sum()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.embedding.weight, self.hidden.weight], "weight_decay_scale": 1.0},
            {"params": [self.hidden.bias], "weight_decay_scale": 0.0},
        ]

    def flops_per_token(self, T: int) -> float:
        return 6.0 * (V * C + C * C)


@dataclasses.dataclass
class ToyBatch:
    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        return dataclasses.replace(
            self, **{name: value.to(device, non_blocking=non_blocking) for name, value in vars(self).items()}
        )


def toy_batch(index: int, rows: int, share_ignored: float = 0.3) -> ToyBatch:
    """Batch number index of a learnable stream; a share of the targets is ignored, as padding is."""
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(V, (rows, T), generator=generator)
    targets = (tokens * 3 + 1) % V
    targets[torch.rand(rows, T, generator=generator) < share_ignored] = -100
    return ToyBatch(tokens, targets, torch.arange(T).expand(rows, T), torch.tensor([0, rows * T], dtype=torch.int32))


class DeepModel(ToyModel):
    """A toy model with blocks, which FSDP shards one by one; a bias has one row, so one of two ranks has none of it."""

    parameter_groups = None  # the default ones

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.blocks = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.shift = nn.Parameter(torch.zeros(1))
        self.register_buffer("scale", torch.ones(C))

    def forward(
        self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = self.dropout(self.embedding(tokens)) + self.shift
        for block in self.blocks:
            x = x + torch.tanh(block(x * self.scale))
        losses = F.cross_entropy(self.head(self.hidden(x)).flatten(0, 1), targets.flatten(), reduction="sum")
        return losses, (targets != -100).sum()


class ToyLoader:
    """Batch number position * world_size + rank, for ever; another number of ranks may go on from there."""

    def __init__(self, rows: int = 4, rank: int = 0, world_size: int = 1, broken: tuple[int, ...] = ()) -> None:
        self.rows, self.rank, self.world_size, self.broken, self.position = rows, rank, world_size, broken, 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ToyBatch:
        index = self.position * self.world_size + self.rank
        self.position += 1
        return toy_batch(index, self.rows, share_ignored=1.0 if index in self.broken else 0.3)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position * self.world_size}  # in batches of all ranks

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"] // self.world_size


def toy_config(out: Path, **changes: Any) -> TrainConfig:
    defaults = {"out": out, "steps": 10, "batch_size": 4, "learning_rate": 1e-2, "log_interval": 1, "device": "cpu"}
    return TrainConfig(**(defaults | {"checkpoint_interval": 0, "precision": "fp32"} | changes))


def toy_trainer(out: Path, *, model: nn.Module | None = None, loader: Any = None, **changes: Any) -> Trainer:
    """A trainer of a fresh toy model; keyword arguments that Trainer takes go there, all others to the config."""
    names = ("eval_loader", "metadata", "eval_bytes", "baseline", "on_log", "on_step", "on_evaluate")
    arguments = {name: changes.pop(name) for name in names if name in changes}
    return Trainer(model or ToyModel(), toy_config(out, **changes), loader or ToyLoader(), **arguments)

"""Rows of several documents, as the data loader makes them, and the same documents one by one."""

import dataclasses
import itertools

import torch
from torch import Tensor

from fastlm.models import GPTConfig

STYLES = {
    "GPT-2": GPTConfig(vocab_size=83, sequence_length=16, num_layers=2, num_heads=2, hidden_size=16),
    "Llama": GPTConfig.llama(
        vocab_size=83, sequence_length=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32
    ),
    "Qwen3": GPTConfig.llama(
        vocab_size=83,
        sequence_length=16,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        hidden_size=24,
        qk_norm=True,
    ),
    "sliding window, bias of qkv": GPTConfig.llama(
        vocab_size=83, sequence_length=16, num_layers=2, num_heads=2, hidden_size=16, sliding_window=4, qkv_bias=True
    ),
    "sinusoidal, no bias": GPTConfig(
        vocab_size=64, sequence_length=16, num_layers=1, num_heads=2, hidden_size=16, position="sinusoidal", bias=False
    ),
}
BOUNDS = [0, 5, 6, 16, 23, 32, 32, 32]  # two rows of 16: documents of 5, 1 and 10, then 7 and 9; the end is padding


@dataclasses.dataclass
class PackedBatch:
    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    positions: Tensor

    def documents(self) -> list["PackedBatch"]:
        """Every document as a batch of one row."""
        return [
            PackedBatch(
                self.tokens.flatten()[a:b][None],
                self.targets.flatten()[a:b][None],
                torch.tensor([0, b - a], dtype=torch.int32),
                torch.arange(b - a)[None],
            )
            for a, b in itertools.pairwise(BOUNDS)
            if b > a
        ]


def packed_batch(config: GPTConfig, seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(config.vocab_size, (2, 16), generator=generator) for _ in range(2))
    targets[1, -3:] = -100
    lengths = [b - a for a, b in itertools.pairwise(BOUNDS)]
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 16)
    return PackedBatch(tokens, targets, torch.tensor(BOUNDS, dtype=torch.int32), positions)

"""Stands for what you have: a model that maps token ids to logits, and documents as token ids. It knows no fastlm."""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Python's own library, every file a document and every byte a token
documents = [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(Path(os.__file__).parent.glob("*.py"))]
documents = [document for document in documents if len(document) > 1]


class YourModel(nn.Module):
    """A small transformer: token ids (B, T) to logits (B, T, V)."""

    def __init__(self, vocab_size: int = 256, sequence_length: int = 128, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, width), nn.Embedding(sequence_length, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(F.layer_norm(x, x.shape[-1:]))


class Layer(nn.Module):
    """Causal attention and a feed-forward layer."""

    def __init__(self, width: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)

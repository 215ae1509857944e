"""The same transformer in PyTorch's own layers: every logit at once, a block-diagonal mask, autograd alone.

Parameters are named as in fastlm.GPT, so that one state_dict fits both. It is the measure of the model's tests, and
what its benchmark is compared with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models import GPTConfig


class PlainGPT(nn.Module):
    """masked: attention stays within a document. padded: the embedding has as many rows as that of fastlm.GPT."""

    def __init__(self, config: GPTConfig, masked: bool = True, padded: bool = True) -> None:
        super().__init__()
        self.config, self.masked = config, masked
        num_rows = config.padded_vocab_size if padded else config.vocab_size
        self.token_embedding = nn.Embedding(num_rows, config.hidden_size)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.sequence_length, config.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.final_norm = norm(config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, num_rows, bias=False)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ):
        """Logits, or the summed loss and the number of valid targets; without cu_seqlens a row is one document."""
        x = self.token_embedding(tokens)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if self.config.position == "learned":
            x = x + self.position_embedding(positions)
        if self.config.position == "sinusoidal":
            angles = wave_angles(positions, self.config.hidden_size)
            x = x * self.config.hidden_size**0.5 + torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)
        mask = None if cu_seqlens is None else document_mask(tokens, cu_seqlens, self.masked)
        if self.config.sliding_window is not None:
            mask = within(self.config.sliding_window, tokens.shape[1]) & (True if mask is None else mask)
        for block in self.blocks:
            x = block(x, mask, positions)
        weight = self.token_embedding.weight if self.config.tie_embeddings else self.head.weight
        logits = F.linear(self.final_norm(x), weight)
        if len(weight) > self.config.vocab_size:
            logits = logits[..., : self.config.vocab_size]
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), (targets != -100).sum()


def document_mask(tokens: Tensor, cu_seqlens: Tensor, masked: bool) -> Tensor:
    """(B, 1, T, T), True where a query sees a key: earlier in the row and, if masked, of the same document."""
    B, T = tokens.shape
    causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
    document = (torch.arange(B * T, device=tokens.device)[:, None] >= cu_seqlens[None]).sum(-1).view(B, T)
    same = document[:, :, None] == document[:, None, :]
    return (causal & same if masked else causal.expand(B, T, T))[:, None]


def within(window: int, T: int) -> Tensor:
    """(T, T), True where a key is the query's own or one of the window - 1 before it."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return (distance >= 0) & (distance < window)


class PlainBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(config), PlainAttention(config)
        self.mlp_norm, self.mlp = norm(config), PlainMLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask, positions)
        return x + self.mlp(self.mlp_norm(x))


class PlainAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        width = (config.num_heads + 2 * config.kv_heads) * config.head_size
        self.qkv = nn.Linear(config.hidden_size, width, bias=config.bias or config.qkv_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(config.head_size, eps=config.norm_eps) for _ in range(2))
        self.projection = nn.Linear(config.num_heads * config.head_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        H, Hk, D = self.config.num_heads, self.config.kv_heads, self.config.head_size
        q, k, v = self.qkv(x).unflatten(-1, (-1, D)).transpose(1, 2).split([H, Hk, Hk], dim=1)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.position == "rotary":
            angles = wave_angles(positions, D)[:, None]
            q, k = rotate(q, angles), rotate(k, angles)
        if Hk < H:
            k, v = (part.repeat_interleave(H // Hk, dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.projection(out.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.mlp_size if config.activation == "gelu" else 2 * config.mlp_size
        self.up = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.activation == "gelu":
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


def wave_angles(positions: Tensor, size: int) -> Tensor:
    """float32 in every model, as the angles are constants: (..., size / 2)."""
    return positions[..., None].float() * (1.0 / 10000.0 ** (torch.arange(0, size, 2).float() / size))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

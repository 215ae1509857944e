"""A decoder-only transformer, in the style of GPT-2 or of Llama as its configuration says.

    x = embedding(tokens) + position
    x = x + attention(norm(x));  x = x + mlp(norm(x))        in every block
    logits = norm(x) @ head.T

Rows hold several documents end to end: attention stays within a document and positions restart in each, so the loss and
every gradient equal those of the documents run alone. Training never builds the logits (linear_cross_entropy).
Source: Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv 2302.13971 (Llama); grouped key and value heads:
Ainslie et al. 2023, arXiv 2305.13245.
"""

import dataclasses
import math
import numbers
import os
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlm.nn import LayerNorm, RMSNorm
from fastlm.ops import (
    AttentionSchedules,
    add_layer_norm,
    add_rms_norm,
    apply_rotary,
    attention,
    gelu,
    linear_cross_entropy,
    swiglu,
)
from fastlm.ops._dispatch import autocast_dtype

if TYPE_CHECKING:
    from fastlm.models.hub import PretrainedTokenizer

IGNORED = -100  # the target of a token that does not count
VOCAB_MULTIPLE = 64  # rows of the embedding are padded to this, so that the products over the vocabulary are aligned
INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Shape and style of the model."""

    # The defaults of the class are GPT-2's style; GPTConfig.llama() is Llama's.

    vocab_size: int = 50257
    """Token ids run from 0 to below this."""
    sequence_length: int = 1024
    """Longest row of tokens the model takes."""
    num_layers: int = 12
    """Blocks of attention and feed-forward layer."""
    num_heads: int = 12
    """Query heads; they divide hidden_size, unless head_dim is given."""
    num_kv_heads: int | None = None
    """Key and value heads, each shared by num_heads / num_kv_heads query heads; None: as many as num_heads."""
    head_dim: int | None = None
    """Features of a head; None: hidden_size / num_heads."""
    hidden_size: int = 768
    """Features of a token between blocks."""
    intermediate_size: int | None = None
    """Features inside the feed-forward layer; None: 4 hidden_size for gelu, 8/3 of it for swiglu (equal parameters)."""
    position: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """How a token knows its position."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Normalisation before every layer and before the logits."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the feed-forward layer; gelu is the tanh formula, as in GPT-2."""
    bias: bool = True
    """Whether linear layers and layer norms have a bias."""
    qkv_bias: bool = False
    """Whether the layer of queries, keys and values has a bias where the others have none, as in Qwen2."""
    qk_norm: bool = False
    """Whether each head of queries and keys goes through an RMSNorm before its positions, as in Qwen3."""
    sliding_window: int | None = None
    """Keys that a token attends to, its own and those just before it, as in Mistral; None: all before it."""
    tie_embeddings: bool = True
    """Whether the logits use the token embedding as their weight."""
    dropout: float = 0.0
    """Chance of zeroing an embedding, an attention probability or a feature of a layer's result."""
    rope_base: float = 10000.0
    """Base of the rotary and sinusoidal wavelengths."""
    norm_eps: float = 1e-5
    """Added to the variance before its root is taken."""

    @classmethod
    def llama(cls, **fields: Any) -> "GPTConfig":
        """A configuration in Llama's style: rotary positions, RMSNorm, SwiGLU, no biases, an untied head."""
        style: dict[str, Any] = {"position": "rotary", "norm": "rms_norm", "activation": "swiglu", "bias": False}
        return cls(**(style | {"tie_embeddings": False} | fields))

    def __post_init__(self) -> None:
        for name in ("vocab_size", "sequence_length", "num_layers", "num_heads", "kv_heads", "hidden_size", "mlp_size"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"GPTConfig: {name} is {value!r}, expected an integer of at least 1")
            if value < 1:
                raise ValueError(f"GPTConfig: {name} is {value}, expected at least 1")
        for name in ("position", "norm", "activation"):
            known = get_args(get_type_hints(type(self))[name])
            if getattr(self, name) not in known:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("head_dim", "sliding_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"GPTConfig: {name} is {value}, expected at least 1, or None")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"GPTConfig: num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"GPTConfig: num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}")
        if self.position != "learned" and self.head_size % 2:
            raise ValueError(f"GPTConfig: {self.position} positions need an even head size, it is {self.head_size}")
        for name in ("rope_base", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)}, expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig: dropout is {self.dropout}, expected a number from 0 to below 1")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_size(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 4 * self.hidden_size if self.activation == "gelu" else _round_up(8 * self.hidden_size // 3, 64)

    @property
    def padded_vocab_size(self) -> int:
        return _round_up(self.vocab_size, VOCAB_MULTIPLE)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class KVCache:
    """Keys and values of the tokens seen so far, for generation: (B, sequence_length, Hk, D) per block."""

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor) -> None:
        shape = (config.num_layers, 2, batch_size, config.sequence_length, config.kv_heads, config.head_size)
        self.storage = like.new_empty(shape)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a block, those of the newest tokens (B, T, Hk, D) included."""
        end = self.length + k.shape[1]
        keys, values = self.storage[layer]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]


class Context(NamedTuple):
    """What every block needs beside its input."""

    cu_seqlens: Tensor | None  # boundaries of the documents over the B * T tokens
    schedules: AttentionSchedules  # of these documents, which all blocks share
    angles: tuple[Tensor, Tensor] | None  # cos, sin of the rotary positions, (B * T, D / 2)
    cache: KVCache | None


class Attention(nn.Module):
    """Causal self-attention; q, k and v come out of one product and stay strided views of it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout, self.head_size = layer, config.dropout, config.head_size
        self.heads = [config.num_heads, config.kv_heads, config.kv_heads]
        self.window = None if config.sliding_window is None else (config.sliding_window - 1, 0)
        bias = config.bias or config.qkv_bias
        self.qkv = nn.Linear(config.hidden_size, sum(self.heads) * config.head_size, bias=bias)
        self.q_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.projection = nn.Linear(config.num_heads * config.head_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        qkv = self.qkv(x).flatten(0, 1).unflatten(-1, (-1, self.head_size))  # (B * T, heads of q, k and v, D)
        q, k, v = qkv.split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, dtype=v.dtype), self.k_norm(k, dtype=v.dtype)
        if context.angles is not None:
            q, k = apply_rotary(q, k, *context.angles)
        if context.cu_seqlens is None:
            q, k, v = (part.unflatten(0, x.shape[:2]) for part in (q, k, v))
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        out = attention(
            q,
            k,
            v,
            causal=True,
            window=self.window,
            dropout_p=self.dropout if self.training else 0.0,
            cu_seqlens_q=context.cu_seqlens,
            max_seqlen_q=x.shape[1],
            max_seqlen_k=x.shape[1],
            schedules=context.schedules,
        )
        assert isinstance(out, Tensor), "lse was not asked for"
        return self.projection(out.reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    """Feed-forward layer; for swiglu, gate and up come out of one product."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        width = config.mlp_size if config.activation == "gelu" else 2 * config.mlp_size
        self.up = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        up = self.up(x)
        return self.down(gelu(up, approximate="tanh") if self.activation == "gelu" else swiglu(*up.chunk(2, dim=-1)))


class Block(nn.Module):
    """Attention and feed-forward layer, each normalised before and added to the residual stream after.

    Only matrix products read what a norm gives, so under autocast it writes what they would be given.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = _norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        attended = self.attention(self.attention_norm(x, dtype=autocast_dtype(x)), context)
        normalised, x = _add_and_norm(self.mlp_norm, attended, x, self.dropout if self.training else 0.0)
        return x + F.dropout(self.mlp(normalised), self.dropout, self.training)


def _norm(config: GPTConfig) -> LayerNorm | RMSNorm:
    if config.norm == "rms_norm":
        return RMSNorm(config.hidden_size, eps=config.norm_eps)
    return LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


def _add_and_norm(norm: LayerNorm | RMSNorm, branch: Tensor, x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum) of the residual stream x and a branch after dropout, in one pass."""
    shape, dtype = norm.normalized_shape, autocast_dtype(x)
    if isinstance(norm, RMSNorm):
        return add_rms_norm(branch, x, shape, norm.weight, norm.eps, dropout_p=dropout_p, dtype=dtype)
    return add_layer_norm(branch, x, shape, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p, dtype=dtype)


class GPT(nn.Module):
    """Decoder-only transformer that gives logits, or with targets the summed loss."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.sequence_length, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = _norm(config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.reset_parameters()

    @classmethod
    def on_meta(cls, config: GPTConfig) -> "GPT":
        """The model without memory and values, on the meta device."""
        with torch.device("meta"), _NothingDrawn():
            return cls(config)

    def reset_parameters(self) -> None:
        """Draw all weights anew: normal with deviation 0.02, biases 0, norms 1.

        Weights that write to the residual stream have 0.02 / sqrt(2 num_layers), so that its variance does not grow
        with depth (Radford et al. 2019, section 2.3).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("attention.projection", "mlp.down"))
                scale = (2 * self.config.num_layers) ** -0.5 if residual else 1.0
                nn.init.normal_(module.weight, std=INIT_STD * scale)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()

    @property
    def head_weight(self) -> Tensor:
        """(padded_vocab_size, C) weight of the logits."""
        return self.token_embedding.weight if self.config.tie_embeddings else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of every token, or the summed loss against targets and how many targets count.

        tokens      (B, T) int64, T at most config.sequence_length
        targets     (B, T) int64; -100 does not count
        cu_seqlens  int32 (documents + 1,) boundaries of the documents over the B * T tokens; may repeat at the end.
                    None: every row is one document
        positions   (B, T) int64 within the document; None: counted from cu_seqlens
        returns     logits (B, T, vocab_size), or (float32 sum of token losses, int64 number of valid targets)

        Raises IndexError for an id from vocab_size on; on a GPU a device-side assertion, as PyTorch's embedding.
        """
        x = self.hidden(tokens, cu_seqlens=cu_seqlens, positions=positions)
        if targets is None:
            return self.logits(x)
        if targets.shape != tokens.shape:
            raise ValueError(f"GPT: targets have shape {tuple(targets.shape)}, tokens {tuple(tokens.shape)}")
        loss = linear_cross_entropy(
            x, self.head_weight, targets, reduction="sum", ignore_index=IGNORED, num_classes=self.config.vocab_size
        )
        return loss.float(), (targets != IGNORED).sum()

    def hidden(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Features (B, T, C) before the logits."""
        if tokens.dim() != 2:
            raise ValueError(f"GPT: tokens have shape {tuple(tokens.shape)}, expected (B, T)")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"GPT: tokens are {tokens.dtype}, expected torch.int64: token ids")
        B, T = tokens.shape
        past = 0 if cache is None else cache.length
        if past + T > self.config.sequence_length:
            length = self.config.sequence_length
            raise ValueError(f"GPT: {past + T} tokens in a row, the model takes at most {length} (sequence_length)")
        positions = self._positions(B, T, past, tokens.device, cu_seqlens) if positions is None else positions
        x = self._embed(tokens, positions)
        angles = self._angles(positions.expand(B, T)) if self.config.position == "rotary" else None
        context = Context(cu_seqlens, AttentionSchedules(), angles, cache)
        for block in self.blocks:
            x = block(x, context)
        if cache is not None:
            cache.length += T
        return self.final_norm(x, dtype=autocast_dtype(x))

    def logits(self, x: Tensor) -> Tensor:
        """Features (..., C) -> logits (..., vocab_size); the padding of the vocabulary is cut off."""
        return F.linear(x, self.head_weight)[..., : self.config.vocab_size]

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `next_token_logits`."""
        return KVCache(self.config, batch_size, like=self.token_embedding.weight)

    def next_token_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, vocab_size) of the token after tokens (B, T), which follow those already in the cache."""
        return self.logits(self.hidden(tokens, cache=cache)[:, -1])

    @staticmethod
    def _positions(B: int, T: int, past: int, device: torch.device, cu_seqlens: Tensor | None) -> Tensor:
        """Position of every token within its document: (1, T), or (B, T) if cu_seqlens says where documents begin."""
        if cu_seqlens is None:
            return torch.arange(past, past + T, device=device)[None]
        token = torch.arange(B * T, device=device, dtype=cu_seqlens.dtype)
        document = torch.searchsorted(cu_seqlens, token, right=True) - 1
        return (token - cu_seqlens[document]).view(B, T).long()

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        # Rows of padding are no tokens: sent beyond the last row, where the embedding refuses them on every device.
        x = self.token_embedding(tokens.masked_fill(tokens >= self.config.vocab_size, self.config.padded_vocab_size))
        if self.config.position == "learned":
            x = x + self.position_embedding(positions)
        elif self.config.position == "sinusoidal":
            waves = _wave_angles(positions, self.config.hidden_size, self.config.rope_base)
            scale = math.sqrt(self.config.hidden_size)  # Vaswani et al. 2017: without it the waves drown the embedding
            x = x * scale + torch.cat([waves.sin(), waves.cos()], dim=-1).to(x.dtype)
        return F.dropout(x, self.config.dropout, self.training)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (B * T, D / 2) of every token; made anew, as a buffer would lose bits under .bfloat16()."""
        angles = _wave_angles(positions.flatten(), self.config.head_size, self.config.rope_base)
        return angles.cos(), angles.sin()

    # As a directory of Hugging Face

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        dropout: float | None = None,
        strict: bool = True,
    ) -> "GPT":
        """The model in a directory of Hugging Face: GPT-2, Llama, Mistral, Qwen2 or Qwen3, in safetensors.

        dtype    of the parameters; None is that of the files
        dropout  of training; None is that of config.json
        strict   False: weights that the files lack are drawn anew and those that the model lacks left out, and a
                 warning names them

        In evaluation mode, as transformers has it: call train() to train. Raises ValueError that names the file, and
        the key of config.json where it says something that GPTConfig cannot.
        """
        from fastlm.models import hub

        return hub.load_whole(directory, dtype=dtype, dropout=dropout, strict=strict)

    def save_pretrained(
        self,
        directory: str | os.PathLike,
        *,
        tokenizer: "PretrainedTokenizer | None" = None,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        """Write a directory that transformers and from_pretrained load.

        tokenizer  a fastlm.data.Tokenizer, written beside the model
        dtype      of the weights in the files; None is theirs

        Raises FileExistsError if there is anything in the directory, ValueError that names the field of GPTConfig that
        no architecture of transformers has.
        """
        from fastlm.models import hub

        hub.save(self, directory, tokenizer=tokenizer, dtype=dtype, max_shard_bytes=max_shard_bytes)

    # What a trainer asks of a model

    def flops_per_token(self, T: int) -> int:
        """Training FLOPs per token of rows of T: 6 N + 12 L H D T (Chowdhery et al. 2022, appendix B).

        N counts the weights of matrix products, the logits' included. Attention is counted in full, without the halving
        that causality allows or what a sliding window saves, so that the number compares with those of other trainers.
        """
        matrices = sum(module.weight.numel() for module in self.blocks.modules() if isinstance(module, nn.Linear))
        attention_flops = 12 * self.config.num_layers * self.config.num_heads * self.config.head_size * T
        return 6 * (matrices + self.head_weight.numel()) + attention_flops

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters by role; only matrices and embeddings decay."""
        embeddings = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}
        groups: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "vectors": []}
        for parameter in self.parameters():
            role = "vectors" if parameter.dim() < 2 else "embeddings" if id(parameter) in embeddings else "matrices"
            if parameter.requires_grad:
                groups[role].append(parameter)
        return [
            {"name": name, "params": params, "weight_decay_scale": 0.0 if name == "vectors" else 1.0}
            for name, params in groups.items()
            if params
        ]

    def saved_ops(self) -> list[torch._ops.OpOverload]:
        """What selective activation checkpointing keeps, because making it again costs a matrix product."""
        import torch.nn.attention.varlen  # registers torch_attn, and imports torch.compile: not before it is needed

        aten = torch.ops.aten
        return [
            aten.mm.default,
            aten.addmm.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            torch.ops.torch_attn._varlen_attn.default,  # PyTorch's attention of packed rows on a GPU
            torch.ops.fastlm.attention.default,
            torch.ops.fastlm.linear_cross_entropy.default,
        ]


class _NothingDrawn(TorchFunctionMode):
    """Leaves out what draws weights: to draw nothing on the meta device imports torch.compile's parts, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is nn.init.normal_:
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


def _wave_angles(positions: Tensor, size: int, base: float) -> Tensor:
    """float32 angles (..., size / 2): position / base^(2i / size), to the bit those of transformers."""
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    return positions[..., None].float() * frequencies

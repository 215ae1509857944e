"""Layers in the form of Hugging Face's `kernels`: each is a forward that takes the place of a model's own.

`kernelize` binds the forward to the model's modules, so `self` is the model's and the annotations name what it must
have. The form allows nothing else: no constructor, no other method, no class variable but the two flags.
Source: https://huggingface.co/docs/kernels/kernel-requirements.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.ops import apply_rotary, cross_entropy, geglu, gelu, layer_norm, rms_norm, swiglu

# Norms


class RMSNorm(nn.Module):
    """Of LlamaRMSNorm and its like. hidden_states (..., C); returns the dtype that they and weight promote to."""

    has_backward = True
    can_torch_compile = True
    weight: nn.Parameter  # (C,)
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon, dtype=dtype)


class RMSNormZeroCentered(nn.Module):
    """Of Qwen3_5RMSNorm and those like it, whose weight is 1 + parameter. x (..., C); the result has its dtype."""

    has_backward = True
    can_torch_compile = True
    weight: nn.Parameter  # (C,)
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, 1.0 + self.weight.float(), self.eps, dtype=x.dtype)


class LayerNorm(nn.Module):
    """Of torch.nn.LayerNorm. input (..., *normalized_shape)."""

    has_backward = True
    can_torch_compile = True
    normalized_shape: tuple[int, ...]
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


# Activations


class GeLU(nn.Module):
    """The exact form. input of any shape."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input)


class GeluTanh(nn.Module):
    """The tanh form, which transformers also calls NewGELU and FastGELU. input of any shape."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, "tanh")


class SiluAndMul(nn.Module):
    """silu of the first half of the last dimension, times the second. input (..., 2 C); returns (..., C)."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return swiglu(*input.chunk(2, dim=-1))


# Gated feed-forward blocks


class SwiGLUMLP(nn.Module):
    """Of LlamaMLP and those like it, if their activation is SiLU. x (..., C)."""

    has_backward = True
    can_torch_compile = True
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GeGLUMLP(nn.Module):
    """Of Gemma3MLP and those like it, if their activation is the tanh form of GELU. x (..., C)."""

    has_backward = True
    can_torch_compile = True
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x), "tanh"))


# Positions and loss


class RotaryPosEmb(nn.Module):
    """Of apply_rotary_pos_emb in modeling_llama.py and its like: a pair is (x_i, x_{i + D/2}), never two neighbours.

    q, k      (B, H, T, D) and (B, Hk, T, D) with unsqueeze_dim=1, (B, T, H, D) and (B, T, Hk, D) with 2
    cos, sin  (B, T, D) or (1, T, D), the second half of the columns equal to the first, or that half alone
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim not in (1, 2):
            raise ValueError(f"RotaryPosEmb: unsqueeze_dim is {unsqueeze_dim}, expected 1 or 2, the dimension of heads")
        if cos.shape[-1] not in (q.shape[-1], q.shape[-1] // 2):
            raise ValueError(
                f"RotaryPosEmb: cos has {cos.shape[-1]} columns, expected {q.shape[-1]}, the features of a head, or "
                f"{q.shape[-1] // 2}, their pairs; to turn a part of the features, hand over that part"
            )
        if unsqueeze_dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        B, T, pairs = *q.shape[:2], q.shape[-1] // 2
        cos, sin = (x[..., :pairs].reshape(-1, pairs) for x in (cos, sin))
        positions = None if cos.shape[0] == T else torch.arange(B * T, device=q.device).view(B, T)
        rotated_q, rotated_k = apply_rotary(q, k, cos, sin, positions=positions)
        assert rotated_k is not None, "apply_rotary rotates the k that it gets"
        if unsqueeze_dim == 1:
            return rotated_q.transpose(1, 2), rotated_k.transpose(1, 2)
        return rotated_q, rotated_k


class ForCausalLMLoss(nn.Module):
    """Of ForCausalLMLoss in transformers' loss_utils.py. logits (..., T, V), labels (..., T); returns float32 ().

    num_items_in_batch divides the sum of the token losses; None takes their mean. shift_labels are labels that were
    shifted before.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = cross_entropy(
            logits.float().view(-1, vocab_size),
            shift_labels.reshape(-1).to(logits.device),
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            inplace=logits.dtype != torch.float32,  # then the float32 logits are nobody else's
        )
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch

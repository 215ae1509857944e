"""attn_implementation "fastlm" of Hugging Face models: transformers' AttentionInterface over fastlm.ops.attention.

Both interfaces are registered, attention and mask: without its own mask function a model would ignore padding silently.
Packed rows come in two forms, both of transformers: cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k handed
to the model, or position_ids that start again. Most models tell their mask of those where a call has no attention_mask
and no cache; the others hand them to attention, as flash_attention_2 needs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastlm.acceleration.attention_mask import attention_mask, decode, is_encoded, packed
from fastlm.acceleration.matching import Row
from fastlm.acceleration.swapped_module import ATTENTION_BEFORE
from fastlm.nn._masks import can_be_read, kept
from fastlm.ops import attention
from fastlm.ops._dispatch import is_exporting

NAME = "fastlm"


def register() -> None:
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(out (B, Tq, H, D of value), None) of query (B, H, Tq, D), key and value (B, Hk, Tk, D).

    attention_mask  what attention_mask.attention_mask made; a (B, 1 or H, Tq, Tk) table, boolean or additive; or None
    s_aux           (H,): attention sinks
    position_ids    (B or 1, T) of causal attention: no query sees past a place where they start again

    Raises ValueError where packed boundaries are half given or do not fit, and where attention weights are asked for.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "fastlm: attention weights are never built, so output_attentions=True has nothing to give; "
            'call model.set_attn_implementation("eager") for them'
        )
    bounds = boundaries_given(query, cu_seq_lens_q, cu_seq_lens_k)
    if bounds is None and (
        position_bias is not None or (attention_mask is not None and not is_encoded(attention_mask))
    ):
        return by_table(
            module, query, key, value, attention_mask, dropout, scaling, softcap, is_causal, s_aux, position_bias
        )
    if bounds is not None or attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        reach = None if sliding_window is None else sliding_window - 1
        window = (reach, 0 if is_causal else reach)
    else:
        *encoded, window = decode(attention_mask)
        bounds = None if encoded[0] is None else tuple(encoded)
        max_length_q, max_length_k = query.shape[2], key.shape[2]
    if bounds is None and window[1] == 0:
        bounds = document_boundaries(position_ids, query, key)
        max_length_q, max_length_k = query.shape[2], key.shape[2]
    out = flash(query, key, value, bounds, (max_length_q, max_length_k), window, dropout, scaling, softcap, s_aux)
    return out, None


def boundaries_given(query: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> Any:
    """The boundaries that a collator made, over the tokens of one row."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return None
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seq_lens_q" if cu_seqlens_q is None else "cu_seq_lens_k"
        raise ValueError(f"fastlm: {missing} is missing; a packed batch needs cu_seq_lens_q and cu_seq_lens_k")
    if query.shape[0] != 1:
        raise ValueError(
            f"fastlm: cu_seq_lens_q came with a batch of {query.shape[0]} rows, expected one row that holds all "
            "tokens; flatten the batch, as DataCollatorWithFlattening does"
        )
    return cu_seqlens_q, cu_seqlens_k


def document_boundaries(position_ids: Tensor | None, query: Tensor, key: Tensor) -> Any:
    """The boundaries of documents of which a model did not tell its mask; None where no position starts again.

    OPT never tells it, and no model does beside a cache or an attention_mask: queries would see other documents.
    """
    B, _, T, _ = query.shape
    if position_ids is None or position_ids.shape not in ((1, T), (B, T)) or key.shape[2] != T:
        return None
    if torch.compiler.is_compiling() and not is_exporting():
        torch._assert_async(
            (position_ids.diff(dim=-1) > 0).all(),
            "fastlm: position_ids start again, of which the model did not tell its mask, nor can a program look; "
            "pass use_cache=False and no attention_mask, or compile without packed documents",
        )
    return kept(position_ids, documents, B) if can_be_read(position_ids) else None


def documents(position_ids: Tensor, B: int) -> tuple[Tensor, Tensor] | None:
    starts = position_ids.diff(dim=-1) <= 0
    return packed(F.pad(starts.cumsum(-1), (1, 0)).expand(B, -1)) if bool(starts.any()) else None


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    longest: tuple[int | None, int | None],
    window: tuple[int | None, int | None],
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """fastlm.ops.attention on Hugging Face's layout, (B, H, T, D), which it gives back as (B, T, H, D)."""
    B, _, Tq, D = query.shape
    missing = D - value.shape[-1]  # latent attention has fewer features in values than in keys
    if missing > 0:
        value = F.pad(value, (0, missing))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {
        "window": window,
        "scale": scaling,
        "softcap": softcap,
        "sinks": sinks,
        "dropout_p": dropout,
    }
    if bounds is None:
        out = attention(q, k, v, **options)
        assert isinstance(out, Tensor), "lse was not asked for"
    else:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k) = bounds, longest
        options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        options |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        out = attention(q, k, v, **options)
        assert isinstance(out, Tensor)
        out = out.unflatten(0, (B, Tq))
    return out[..., : D - missing] if missing > 0 else out


def by_table(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    is_causal: bool | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
) -> tuple[Tensor, None]:
    """PyTorch's attention, for masks that only a table of scores can say."""
    if mask is not None and is_encoded(mask):
        mask = table_of(mask, query, key)
    if softcap is None and sinks is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal=is_causal, position_bias=position_bias
        )
    assert position_bias is None, "no model adds a bias beside a softcap or sinks"
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].nan_to_num(0.0).to(query.dtype)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2).contiguous(), None


def table_of(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """(B, 1, Tq, Tk) bool of an encoded mask."""
    (B, _, Tq, _), Tk = query.shape, key.shape[2]
    cu_seqlens_q, cu_seqlens_k, (left, right) = decode(mask)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        cu_seqlens_q, cu_seqlens_k = (torch.arange(B + 1, device=mask.device) * T for T in (Tq, Tk))
    q_place, k_place = (torch.arange(B * T, device=mask.device) for T in (Tq, Tk))
    q_sequence, k_sequence = (
        torch.searchsorted(bounds.long()[1:], places, right=True)
        for bounds, places in ((cu_seqlens_q, q_place), (cu_seqlens_k, k_place))
    )
    from_end_q = cu_seqlens_q.long()[1:][q_sequence] - q_place
    from_end_k = cu_seqlens_k.long()[1:][k_sequence] - k_place
    from_end_q, q_sequence = from_end_q.view(B, 1, Tq, 1), q_sequence.view(B, 1, Tq, 1)
    from_end_k, k_sequence = from_end_k.view(B, 1, 1, Tk), k_sequence.view(B, 1, 1, Tk)
    ahead = from_end_q - from_end_k  # how far a key lies to the right of the query's own
    visible = q_sequence == k_sequence
    if left is not None:
        visible = visible & (ahead >= -left)
    if right is not None:
        visible = visible & (ahead <= right)
    return visible


# The switch

REPLACED = ("eager", "sdpa")  # whoever chose another implementation keeps it


def switch_on(model: nn.Module) -> list[Row]:
    """What became of each Hugging Face model inside, once for each config; it keeps what gave way, for restore."""
    register()
    first_of = {
        id(m.config): (name, m) for name, m in reversed([*model.named_modules()]) if isinstance(m, PreTrainedModel)
    }
    models = [(name, m, m.config._attn_implementation) for name, m in reversed(first_of.values())]
    rows: list[Row] = []
    for name, inner, current in models:  # setting it for a model sets it for the models inside, which follow
        reason = unsupported(inner)
        if reason is None and current not in (*REPLACED, NAME):
            reason = f'its attn_implementation is "{current}"'
        inner.config._attn_implementation = current if reason else NAME
        rows.append(
            Row(name, type(inner).__name__, "attention", reason is None, reason or f'attn_implementation "{NAME}"')
        )
        if not reason and current != NAME:
            inner.__dict__[ATTENTION_BEFORE] = current
    return rows


def unsupported(model: PreTrainedModel) -> str | None:
    """Why attention of a model must stay its own.

    One that supports flash_attention_2 hands its mask on unread, and asks attention for nothing that is not known here.
    """
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    if model._supports_flash_attn:
        return None
    return "it does not support flash_attention_2, so it may read its mask or ask for other scores"

"""The attention mask of a Hugging Face model, as boundaries of sequences instead of a (T, T) table.

transformers makes the mask once per forward and hands it to every layer. Ours says where each row's tokens begin and
end, so that attention skips the padding, and how far a query sees. Each row is four sequences, the queries before its
tokens, the keys before them, the tokens, and what lies behind, so that the number of sequences is fixed whatever the
padding, as torch.compile(fullgraph=True) needs. Causal queries before the tokens see nothing and get 0, as from sdpa: a
recurrence carries what they give to the tokens. Padding behind attends to itself.

The mask travels through code that expects a tensor, so it is one: int32 (2, sequences + 1, left, right), the boundaries
of queries and keys, expanded without memory. The last two sizes say how many keys to the left and right a query sees,
plus 2, and 1 without a limit. (1, 1, left, right) says that every row is one sequence, which ends with its last key.

What cannot be said so, a mask with holes, chunks or images, stays a boolean table (B, 1, Tq, Tk), True where a query
sees a key.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from fastlm.nn._masks import cu_seqlens, spans

Limit = int | None  # keys that a query sees to one side of its own; None is all


class Boundaries(NamedTuple):
    """What such a mask says."""

    cu_seqlens_q: Tensor | None  # int32 (sequences + 1,), over the B Tq queries; None: every row is one sequence
    cu_seqlens_k: Tensor | None
    window: tuple[Limit, Limit]


def encode(bounds: Boundaries, device: torch.device | str) -> Tensor:
    table = (
        torch.zeros(1, 1, dtype=torch.int32, device=device)
        if bounds.cu_seqlens_q is None
        else torch.stack([bounds.cu_seqlens_q, bounds.cu_seqlens_k]).int()  # type: ignore[list-item]
    )
    left, right = (1 if limit is None else limit + 2 for limit in bounds.window)
    return table[..., None, None].expand(*table.shape, left, right)


def is_encoded(mask: Tensor) -> bool:
    return mask.dtype == torch.int32


def decode(mask: Tensor) -> Boundaries:
    left, right = (None if size == 1 else size - 2 for size in mask.shape[2:])
    if mask.shape[0] == 1:
        return Boundaries(None, None, (left, right))
    cu_seqlens_q, cu_seqlens_k = mask[..., 0, 0].unbind()
    return Boundaries(cu_seqlens_q, cu_seqlens_k, (left, right))


# Which queries see which keys, read from transformers' mask function


class Pattern(NamedTuple):
    window: tuple[Limit, Limit] = (None, None)
    document_of: Tensor | None = None  # (B, T) of packed sequences: tokens of one document have the same number


def pattern_of(function: Callable[..., Any]) -> Pattern | None:
    """What a mask function of transformers computes; None if it is anything else than causal, windowed and packed."""
    if function is masking_utils.causal_mask_function:
        return Pattern((None, 0))
    if function is masking_utils.bidirectional_mask_function:
        return Pattern()
    if torch.compiler.is_compiling() or function.__module__ != masking_utils.__name__:
        return None  # Dynamo cannot read what a function closed over
    closed_over = dict(
        zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    )
    match function.__qualname__.split(".")[0]:
        case "and_masks":
            return _both(closed_over["mask_functions"])
        case "sliding_window_overlay":
            return Pattern((closed_over["sliding_window"] - 1, None))
        case "sliding_window_bidirectional_overlay":
            return Pattern((closed_over["sliding_window"], closed_over["sliding_window"]))
        case "packed_sequence_mask_function":
            return Pattern(document_of=closed_over["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":  # within a document positions differ as places do
            return pattern_of(closed_over["mask_function"])
    return None


def _both(functions: tuple[Callable[..., Any], ...]) -> Pattern | None:
    found = [pattern_of(function) for function in functions]
    if any(pattern is None for pattern in found):
        return None
    sides = zip(*(pattern.window for pattern in found if pattern is not None), strict=True)
    left, right = (min((limit for limit in side if limit is not None), default=None) for side in sides)
    documents = [p.document_of for p in found if p is not None and p.document_of is not None]
    return None if len(documents) > 1 else Pattern((left, right), documents[0] if documents else None)


# The mask function that transformers calls


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """The mask of a forward, for transformers' AttentionMaskInterface; the arguments are those of its sdpa_mask.

    attention_mask  (B, tokens so far) bool, False at padding
    q_offset        the position of the first query; a tensor where a static cache keeps it
    """
    pattern = None if use_vmap else pattern_of(mask_function)
    own_key = q_offset - kv_offset  # of the first query
    bounds = None
    if pattern is not None and pattern.document_of is not None:
        bounds = packed(pattern.document_of)
    elif pattern is not None:
        valid = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        valid = None if valid is None else valid[:, kv_offset : kv_offset + kv_length].bool()
        is_full = isinstance(own_key, int) and own_key + q_length == kv_length
        if is_full and (valid is None or (not is_traced(valid) and bool(valid.all()))):
            return encode(Boundaries(None, None, pattern.window), device)
        if q_length > 1:  # one query sees its row of the table faster than the keys of all rows are joined
            bounds = padded(batch_size, q_length, kv_length, own_key, valid, pattern.window != (None, None), device)
    if pattern is not None and bounds is not None:
        return encode(Boundaries(*bounds, pattern.window), device)
    table = masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )
    assert table is not None, "no skip was allowed"
    return table


def is_traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or masking_utils.is_tracing(x)


def padded(
    B: int,
    Tq: int,
    Tk: int,
    own_key: int | Tensor,
    valid: Tensor | None,
    is_local: bool,
    device: torch.device | str,
) -> tuple[Tensor, Tensor] | None:
    """(cu_seqlens_q, cu_seqlens_k) of rows with padding before or behind their tokens; None if a mask has holes.

    own_key   of the first query: its place among the keys
    valid     (B, Tk) bool, or None where there is no padding
    is_local  whether a query's place decides what it sees. If not, padding too attends to the tokens, as elsewhere
    """
    places = torch.arange(Tk, device=device)
    written = (own_key + Tq) if isinstance(own_key, Tensor) else min(own_key + Tq, Tk)
    is_token = places < written  # a static cache has slots that nobody wrote to
    is_token = is_token.expand(B, Tk) if valid is None else valid & is_token
    start, end, has_hole = spans(is_token)
    if is_traced(is_token):
        torch._assert_async(
            ~has_hole,
            "fastlm: attention_mask has a hole, which compiled attention does not support; "
            "call fastlm.accelerate(model, attention=False), or compile without the mask",
        )
    elif has_hole:
        return None
    q_start, q_end = torch.zeros_like(start), torch.full_like(end, Tq)
    if is_local:
        q_start, q_end = (start - own_key).clamp(0, Tq), (end - own_key).clamp(0, Tq)
    none, q_last, last = torch.zeros_like(start), torch.full_like(end, Tq), torch.full_like(end, Tk)
    return cu_seqlens(q_start, q_start, q_end, q_last), cu_seqlens(none, start, end, last)


def packed(document_of: Tensor) -> tuple[Tensor, Tensor]:
    """Boundaries of the documents, which never cross from one row to the next."""
    begins = F.pad(document_of.diff(dim=-1) != 0, (1, 0), value=True).flatten()
    cu_seqlens = F.pad(begins.nonzero()[:, 0], (0, 1), value=document_of.numel()).int()
    return cu_seqlens, cu_seqlens

"""What a mask of torch.nn.MultiheadAttention says, read from its values: the future is hidden, or padding.

The kernels take no table of scores. Causality they know, and padding becomes boundaries of sequences, which attention
skips. So a mask is looked at before it is used: a boolean one hides where it is True, an added one where it is -inf and
must be 0 elsewhere. What hides anything else cannot be read, and PyTorch's code runs.

Reading waits for a GPU. What was read is therefore kept there until the mask is written to or is gone: a mask that all
layers share is read once. Of a CPU's masks nothing is kept, since NumPy writes to them without a trace.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastlm.ops._dispatch import is_plain_tensor


class Part(NamedTuple):
    """Varlen attention of some queries, over the tokens of all rows; other queries have sequences without keys."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    causal: bool


class Masking(NamedTuple):
    """What the masks of a call say."""

    causal: bool = False
    parts: tuple[Part, ...] = ()  # where there is padding; their results add up


def can_be_read(mask: Tensor) -> bool:
    """Whether the values of mask may be looked at now, and no gradient of it would be lost."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not is_plain_tensor(mask) or mask.requires_grad:
        return False
    return mask.is_cpu or (mask.is_cuda and not torch.cuda.is_current_stream_capturing())


def read(attn_mask: Tensor | None, key_padding_mask: Tensor | None, Tq: int, Tk: int) -> Masking | None:
    """The masking of (Tq, Tk) attn_mask and (B, Tk) key_padding_mask, or None if it cannot be read."""
    causal = False if attn_mask is None else kept(attn_mask, hides_the_future, Tq, Tk)
    if causal is None or key_padding_mask is None:
        return None if causal is None else Masking(causal)
    if causal and Tq != Tk:
        return None  # kernels align causality at the end, PyTorch at the start
    parts = kept(key_padding_mask, parts_of, Tq, causal)
    return None if parts is None else Masking(causal, parts)


READ = WeakIdKeyDictionary()  # mask on a GPU: (its version, {(reader, arguments): what was read})


def kept(mask: Tensor, reader: Callable[..., Any], *arguments: Any) -> Any:
    """reader(mask, *arguments), read once for each version of a mask on a GPU."""
    if mask.is_cpu or mask.is_inference():  # a tensor of inference mode counts no versions
        return reader(mask, *arguments)
    version, known = READ.get(mask, (None, {}))
    if version != mask._version:
        known = {}
        READ[mask] = mask._version, known
    if (reader, arguments) not in known:
        with torch.inference_mode(False):  # a backward pass may need what an evaluation read
            known[reader, arguments] = reader(mask, *arguments)
    return known[reader, arguments]


def hides_the_future(mask: Tensor, Tq: int, Tk: int) -> bool | None:
    """True for the causal mask, False for one that hides nothing, None for any other."""
    if mask.shape != (Tq, Tk):
        return None
    nothing = torch.zeros_like(mask)
    future = torch.ones_like(mask, dtype=torch.bool).triu(1)
    for answer, expected in ((True, nothing.masked_fill(future, hiding(mask))), (False, nothing)):
        if torch.equal(mask, expected):
            return answer
    return None


def hiding(mask: Tensor) -> float | bool:
    """The value by which mask hides a key."""
    return True if mask.dtype == torch.bool else -torch.inf


def parts_of(mask: Tensor, Tq: int, causal: bool) -> tuple[Part, ...] | None:
    """The parts of attention under a (B, Tk) padding mask, () if nothing is padded, None if they cannot be read.

    Every query attends to the tokens alone, a causal one to those before it. A causal query behind the tokens sees all
    of them: bottom-right alignment cannot say so together with the others, so these are a part of their own.
    """
    is_token, Tk = mask == 0, mask.shape[1]
    start, end, has_hole = spans(is_token)
    is_other = (~is_token & (mask != hiding(mask))).any()
    unread, is_padded, is_padded_behind = torch.stack(
        [has_hole | is_other, (end - start < Tk).any(), (end < Tk).any()]
    ).tolist()
    if unread:
        return None
    if not is_padded:
        return ()
    first, last = torch.zeros_like(start), torch.full_like(end, Tk)
    if not causal:
        every = torch.full_like(end, Tq)
        return (Part(cu_seqlens(first, every, every), cu_seqlens(start, end, last), False),)
    own = Part(cu_seqlens(start, start, end, last, last), cu_seqlens(first, start, end, end, last), True)
    behind = Part(cu_seqlens(end, end, last, last), cu_seqlens(first, start, end, last), False)
    return (own, behind) if is_padded_behind else (own,)


def spans(is_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(start (B,) of each row's tokens (B, T), their end, whether any row has a hole between tokens)."""
    places = torch.arange(is_token.shape[1], device=is_token.device)
    start = is_token.int().argmax(-1)
    end = start + is_token.sum(-1)
    has_hole = (torch.where(is_token, places, -1).amax(-1) >= end).any()
    return start, end, has_hole


def cu_seqlens(*ends: Tensor) -> Tensor:
    """int32 boundaries of sequences that end at these places (B,) of each row; the last are the ends of the rows."""
    table = torch.stack(ends, dim=1)
    rows = ends[-1].cumsum(0) - ends[-1]
    return F.pad((table + rows[:, None]).flatten(), (1, 0)).int()

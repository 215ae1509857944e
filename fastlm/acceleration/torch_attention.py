"""fastlm's attention behind PyTorch's own switch of flash attention kernels.

    from fastlm.acceleration import torch_attention

    torch_attention.register()
    torch.nn.attention.activate_flash_attention_impl("fastlm")
    torch.nn.attention.restore_flash_attention_impl()

Between the last two calls PyTorch's flash attention ops on a GPU run our Triton kernels, whoever calls them:
scaled_dot_product_attention where it chooses flash attention, varlen_attn, nested tensors, compiled programs. PyTorch
still chooses by its own rules: what it sends to cuDNN or to other kernels stays there, unless sdpa_kernel says
otherwise. Causality is aligned at the end (bottom right) in these ops, as in ours.

Source: torch/nn/attention/_registry.py; schemas: native_functions.yaml.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlm.ops._dispatch import TRITON, triton_refusal
from fastlm.ops.attention import attention_backward_op, attention_op, check_inputs, maybe_contiguous, options_of
from fastlm.ops.attention_reference import Call, Inputs

NAME = "fastlm"
RESTORE = "torch.nn.attention.restore_flash_attention_impl() brings PyTorch's own kernels back"


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, logsumexp, rng_state, unused, debug_attn_mask) of query (B, Tq, H, D), or (total_q, H, D) with cum_seq_q.

    out has the layout of query; logsumexp is float32, (B, H, Tq) or (H, total_q). The last three are uninitialised:
    without dropout nothing reads them. num_splits makes no difference: our kernels never split the keys of a query.
    """
    refuse(
        "_flash_attention_forward",
        dropout_p=dropout_p,
        return_debug_mask=return_debug_mask,
        seqused_k=seqused_k,
        alibi_slopes=alibi_slopes,  # PyTorch's backward op does not get them: gradients would be wrong
        block_table=block_table,
    )
    bounds, window = (cum_seq_q, cum_seq_k), (window_size_left, window_size_right)
    call = call_of("_flash_attention_forward", (query, key, value), bounds, is_causal, scale, window)
    out, lse, _ = attention_op(*call.flat())
    rng_state = query.new_empty((2,), dtype=torch.uint64)
    unused = query.new_empty((), dtype=torch.uint64)
    return laid_out_as(query, out), lse, rng_state, unused, query.new_empty((0,))


def flash_attention_forward_into(out: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """logsumexp of flash_attention_forward, whose out is copied into the given one."""
    result, lse, *_ = flash_attention_forward(*arguments, **options)
    out.copy_(result)
    return lse


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, each in the layout of its tensor."""
    refuse("_flash_attention_backward", dropout_p=dropout_p)
    bounds, window = (cum_seq_q, cum_seq_k), (window_size_left, window_size_right)
    call = call_of("_flash_attention_backward", (query, key, value), bounds, is_causal, scale, window)
    out, no_remainder = maybe_contiguous(out), query.new_empty((0,))
    dq, dk, dv, *_ = attention_backward_op(grad_out, None, out, logsumexp.contiguous(), no_remainder, *call.flat())
    return laid_out_as(query, dq), laid_out_as(key, dk), laid_out_as(value, dv)


def sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor]:
    """flash_attention_forward of query (B, H, Tq, D), with the boundaries, which are None, and the lengths."""
    (q, k, v), Tq, Tk = exchanged(query, key, value), query.shape[2], key.shape[2]
    out, lse, *state = flash_attention_forward(
        q, k, v, None, None, Tq, Tk, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    rng_state, unused, debug_mask = state
    return out.transpose(1, 2), lse, None, None, Tq, Tk, rng_state, unused, debug_mask


def sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *arguments: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    """flash_attention_backward of tensors (B, H, T, D)."""
    grad_out, query, key, value, out = exchanged(grad_out, query, key, value, out)
    return exchanged(*flash_attention_backward(grad_out, query, key, value, out, logsumexp, *arguments, **options))


KERNELS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": flash_attention_forward,
    "_flash_attention_forward_no_dropout_inplace": flash_attention_forward_into,
    "_flash_attention_backward": flash_attention_backward,
    "_scaled_dot_product_flash_attention": sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": sdpa_backward,
}


def refuse(op: str, **arguments: Any) -> None:
    """Raises for an argument that changes the result and that the kernels do not support."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) or value:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
            raise ValueError(
                f"{op}: {name} is {what}, expected none: fastlm's kernels behind PyTorch's switch do not support it; "
                f"{RESTORE}"
            )


def call_of(
    op: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Tensor | None, Tensor | None],
    is_causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None],
) -> Call:
    """The call of our raw op, checked: PyTorch's ops may be called with anything."""
    if (bounds[0] is None) != (bounds[1] is None):
        raise ValueError(f"{op}: of cum_seq_q and cum_seq_k one is None, expected both or neither; {RESTORE}")
    inputs = Inputs(*tensors, *bounds)
    check_inputs(inputs, (None, None))
    options = options_of(tensors[0].shape[-1], is_causal, scale, window, None, 0.0)
    if refusal := triton_refusal(inputs, options):
        raise ValueError(f"{op}: {refusal}; {RESTORE}")
    return Call(inputs, TRITON, False, options)


def exchanged(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Heads and tokens exchanged."""
    return tuple(x.transpose(1, 2) for x in tensors)


def laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """x with the strides of torch.empty_like(like), which compiled programs take for granted."""
    if x.stride() == like.stride():
        return x
    result = torch.empty_like(like)
    return x if x.stride() == result.stride() else result.copy_(x)


class Overrides:
    """Keeps our kernels in the place of PyTorch's, which come back once the library is let go."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        self.library = None


def override(dispatch_key: str = "CUDA") -> Overrides:
    """Put our kernels in the place of those that this PyTorch has for the dispatch key."""
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in KERNELS.items():
        if hasattr(torch.ops.aten, name):  # PyTorch 2.11 has not all of them
            library.impl(name, kernel, dispatch_key)
    return Overrides(library)


def register() -> None:
    """Make "fastlm" known to torch.nn.attention.activate_flash_attention_impl; nothing is activated.

    The activated kernels support float16, bfloat16 and float32, up to 256 features, grouped heads, causality, windows,
    packed sequences and gradients. Dropout, ALiBi slopes, paged keys (block_table) and seqused_k raise ValueError.
    Raises ImportError if this PyTorch has no registry of flash attention kernels.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError as missing:
        raise ImportError(
            f"torch_attention.register: PyTorch {torch.__version__} has no "
            "torch.nn.attention.register_flash_attention_impl, expected a newer one; call fastlm.accelerate(model) or "
            "fastlm.ops.scaled_dot_product_attention instead"
        ) from missing
    register_flash_attention_impl(NAME, register_fn=override)

"""Attention, dense and over packed documents, forward alone and with backward: FLOP rates beside a bare matrix product.

Each backend of PyTorch's scaled_dot_product_attention is a provider of its own, named to sdpa_kernel: which one PyTorch
would choose depends on its version. The first row or document is held against float64, as many of its heads as fit.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, Provider, Size, Tensors, UnavailableError, Work, import_peer

CHECKED_SCORES = 2**28  # float64 elements that the truth may hold of one matrix of scores: 2 GiB
MATH_SCORES = 2**31  # elements of all scores up to which SDPA math, which holds several float32 copies, fits in 80 GB
Attention = Callable[..., Tensor]  # of q, k, v and, packed, cu_seqlens


class Shape(NamedTuple):
    """Dense (B, T, H, D), or packed documents of these lengths end to end as (total, H, D)."""

    T: int
    H: int
    D: int
    causal: bool
    B: int = 1
    lengths: tuple[int, ...] = ()
    window: int | None = None  # keys before its own that a query sees; all if None

    @property
    def documents(self) -> tuple[int, ...]:
        return self.lengths or (self.T,) * self.B

    @property
    def flops(self) -> float:
        """Of the forward pass. The products q k and p v, 2 FLOPs per multiply-add: 4 T^2 D per head and document.

        Causality leaves half of them, a window of W keys W (T - W / 2) of T^2. Backward has five such products
        (q k again, dp, dv, dq, dk), 2.5 times forward.
        """
        return 4.0 * self.H * self.D * sum(map(self.pairs, self.documents))

    def pairs(self, length: int) -> float:
        if self.window is not None:
            width = min(self.window + 1, length)
            return width * (length - width / 2)
        return length**2 * (0.5 if self.causal else 1.0)

    def __str__(self) -> str:
        kind = f"packed {len(self.lengths)} documents of {self.T} tokens" if self.lengths else f"B{self.B} T{self.T}"
        return f"{kind} {self.heads}"

    @property
    def heads(self) -> str:
        window = "" if self.window is None else f" window {self.window}"
        return f"H{self.H} D{self.D} {'causal' if self.causal else 'full'}{window}"

    def size(self, kind: str) -> Size:
        if self.lengths:
            return Size(f"packed {self.heads} {kind}", self.T / len(self.lengths), "tokens a document on average")
        return Size(f"{self.heads} {kind}", self.T, "tokens a row")


def cases(device: torch.device) -> list[Case]:
    """The family of the published figures: 16k tokens, H D = 2048; on a CPU what takes less than a second."""
    if device.type == "cpu":
        dense = [
            Shape(T, H, D, causal, B=2048 // T)
            for T in (512, 2048)
            for H, D in ((6, 64), (3, 128))
            for causal in (True, False)
        ]
        packed = [Shape(4096, 6, 64, True, lengths=documents(4096, mean)) for mean in (2, 64, 512)]
        windows = [Shape(2048, 6, 64, True, window=255)]
        return [
            _case(shape, backward, device, torch.float32)
            for shape in dense + packed + windows
            for backward in (False, True)
        ]
    widths = (32, 64), (16, 128)  # GPT-2's first, at its own length first
    kinds = (1024, True), (4096, True), (16384, True), (512, True), (4096, False)
    dense = [Shape(T, H, D, causal, B=16384 // T) for H, D in widths for T, causal in kinds]
    packed = [Shape(16384, H, D, True, lengths=documents(16384, mean)) for H, D in widths for mean in (500, 2000)]
    windows = [Shape(16384, H, D, True, window=1023) for H, D in widths]
    return [
        _case(shape, backward, device, torch.bfloat16)
        for shape in dense + packed + windows
        for backward in (False, True)
    ]


def documents(total: int, mean: int) -> tuple[int, ...]:
    """Lengths from half to one and a half times the mean, the last cut to fit; the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(mean // 2, mean + mean // 2 + 1, (2 * total // mean + 2,), generator=generator).cumsum(0)
    bounds = [0, *(end for end in ends.tolist() if end < total), total]
    return tuple(end - start for start, end in itertools.pairwise(bounds))


def _case(shape: Shape, backward: bool, device: torch.device, dtype: torch.dtype) -> Case:
    packed, names = bool(shape.lengths), ("q", "k", "v")
    kind = f"{str(dtype).removeprefix('torch.')}, forward{' + backward' * backward}"
    size = (shape.T, shape.H, shape.D) if packed else (shape.B, shape.T, shape.H, shape.D)

    def inputs() -> Tensors:
        given = {name: torch.randn(size, device=device).to(dtype).requires_grad_(backward) for name in names}
        if backward:
            given["dout"] = torch.randn(size, device=device).to(dtype)
        if packed:
            bounds = [0, *itertools.accumulate(shape.lengths)]
            given["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        return given

    # Whole heads of one document or row: of a head's part its keys' gradients would be sums over what is left out.
    heads = min(shape.H, max(1, CHECKED_SCORES // max(shape.documents) ** 2))
    checked = slice(0, shape.lengths[0]) if packed else slice(0, 1)

    def sample(outputs: Tensors) -> Tensors:
        return {name: x[checked, :heads] if packed else x[checked, :, :heads] for name, x in outputs.items()}

    def truth(given: Tensors) -> Tensors:
        whole = {name: x for name, x in given.items() if name != "cu_seqlens"}
        part = {name: x.double().requires_grad_(backward) for name, x in sample(whole).items()}
        part = {name: x[None] if packed else x for name, x in part.items()}
        plain = functools.partial(_sdpa, backend=SDPBackend.MATH, causal=shape.causal, mask=_mask(shape, device))
        results = _run(plain, backward, part)
        return {name: x[0] if packed else x for name, x in results.items()}

    provider = functools.partial(_provider, shape=shape, backward=backward, device=device)
    multiple = 3.5 if backward else 1.0
    return Case(
        name=f"{shape} {kind}",
        device=device,
        inputs=inputs,
        truth=truth,
        sample=sample,
        # Not SDPA math: of bfloat16 it computes in float32 throughout, which no fused kernel can be held to.
        reference=_reference(shape, device),
        providers=[provider(name, build) for name, build in (PACKED if packed else DENSE).items()],
        work=(
            Work(
                "flop",
                multiple * shape.flops,
                f"{multiple:g} x 4 H D {_counted(shape)}",
            ),
        ),
        dtype=dtype,
        weight=2.0 if backward else 1.0,
        size=shape.size(kind),
    )


def _counted(shape: Shape) -> str:
    """Which pairs of tokens the work is of."""
    if shape.window is not None:
        return "B W (T - W / 2)"
    return ("sum of squared lengths" if shape.lengths else "B T^2") + " / 2" * shape.causal


def _reference(shape: Shape, device: torch.device) -> str:
    """The peer whose error is the measure: on a GPU PyTorch's flash kernel takes no mask, as a window needs one."""
    if shape.lengths:
        return "SDPA of each document"
    return "SDPA flash" if shape.window is None or device.type == "cpu" else "SDPA efficient"


def _mask(shape: Shape, device: torch.device) -> Tensor | None:
    """Who sees whom (T, T), where is_causal does not say it."""
    if shape.window is None:
        return None
    return torch.ones(shape.T, shape.T, dtype=torch.bool, device=device).tril().triu(-shape.window)


def _provider(
    name: str, build: Callable[[Shape, torch.device], Attention], shape: Shape, backward: bool, device: torch.device
) -> Provider:
    role = "ours" if name == "fastlm" else "peer"
    return Provider(name, lambda: functools.partial(_run, build(shape, device), backward), role)


def _run(attention: Attention, backward: bool, given: Tensors) -> Tensors:
    q, k, v = (given[name] for name in ("q", "k", "v"))
    bounds = [given["cu_seqlens"]] if "cu_seqlens" in given else []
    out = attention(q, k, v, *bounds)
    if not backward:
        return {"out": out}
    gradients = torch.autograd.grad(out, (q, k, v), given["dout"])
    return {"out": out} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


# Providers


def _fastlm(shape: Shape, device: torch.device) -> Attention:
    from fastlm.ops import attention

    if not shape.lengths:
        window = None if shape.window is None else (shape.window, None)
        return functools.partial(attention, causal=shape.causal, window=window)
    return lambda q, k, v, cu_seqlens: attention(
        q, k, v, causal=shape.causal, cu_seqlens_q=cu_seqlens, max_seqlen_q=max(shape.lengths)
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, causal: bool, mask: Tensor | None) -> Tensor:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=causal and mask is None)
    return out.transpose(1, 2)


def _backend(backend: SDPBackend) -> Callable[[Shape, torch.device], Attention]:
    def build(shape: Shape, device: torch.device) -> Attention:
        if device.type == "cpu" and backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            raise UnavailableError("not timed: its kernels need a GPU")
        if device.type == "cuda" and backend is SDPBackend.FLASH_ATTENTION and shape.window is not None:
            raise UnavailableError("not timed: it takes no mask, which a window needs")
        if backend is SDPBackend.MATH and shape.B * shape.H * shape.T**2 > MATH_SCORES:
            raise UnavailableError("not timed: it holds all scores at once, which do not fit in memory")
        return functools.partial(_sdpa, backend=backend, causal=shape.causal, mask=_mask(shape, device))

    return build


def _each_document(shape: Shape, device: torch.device) -> Attention:
    """One call per document, which is what packing has to beat; lengths are known, so a GPU need not wait.

    On a GPU by PyTorch's flash kernels: cuDNN, which PyTorch may choose, builds a plan for every length.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        parts = zip(*(x.split(shape.lengths) for x in (q, k, v)), strict=True)
        heads = ([x.transpose(0, 1)[None] for x in part] for part in parts)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            outs = [F.scaled_dot_product_attention(*part, is_causal=shape.causal) for part in heads]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    return attention


def _flex(shape: Shape, device: torch.device) -> Attention:
    """Compiled FlexAttention; a block mask says which tiles are hidden, the function which scores within a tile."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device.type == "cpu":
        raise UnavailableError("not timed: on a CPU it has no backward, and compiling its forward takes seconds a case")
    document = torch.repeat_interleave(
        torch.arange(len(shape.documents), device=device), torch.tensor(shape.documents, device=device)
    )

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = i >= j if shape.causal else i == i
        if shape.window is not None:
            visible = visible & (i - j <= shape.window)
        return visible & (document[i] == document[j]) if shape.lengths else visible

    mask = (
        create_block_mask(seen, None, None, shape.T, shape.T, device=device) if shape.lengths or shape.causal else None
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor) -> Tensor:
        rows = (x.view(-1, shape.T, shape.H, shape.D).transpose(1, 2) for x in (q, k, v))
        return compiled(*rows, block_mask=mask).transpose(1, 2).view(q.shape)

    return attention


def _varlen(shape: Shape, device: torch.device) -> Attention:
    if device.type == "cpu":
        raise UnavailableError("not timed: its kernels need a GPU")
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise UnavailableError(f"not timed: torch {torch.__version__} has no varlen_attn")
    from torch.nn.attention.varlen import varlen_attn

    longest, window = max(shape.lengths), (-1, 0 if shape.causal else -1)
    return lambda q, k, v, bounds: varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window)


def _flash_attn(shape: Shape, device: torch.device) -> Attention:
    flash_attn = import_peer("flash_attn", "flash-attn", device)
    if not shape.lengths:
        window = (-1 if shape.window is None else shape.window, -1)
        return functools.partial(flash_attn.flash_attn_func, causal=shape.causal, window_size=window)
    longest = max(shape.lengths)
    return lambda q, k, v, bounds: flash_attn.flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, causal=shape.causal
    )


def _flash_attn_4(shape: Shape, device: torch.device) -> Attention:
    """Of Hopper and Blackwell; some versions give lse beside the result."""
    module = import_peer("flash_attn.cute", "flash-attn-4", device)
    window = (None if shape.window is None else shape.window, None)
    longest = max(shape.documents)

    def attention(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor) -> Tensor:
        if bounds:
            out = module.flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[0],
                max_seqlen_q=longest, max_seqlen_k=longest, causal=shape.causal,
            )  # fmt: skip
        else:
            out = module.flash_attn_func(q, k, v, causal=shape.causal, window_size=window)
        return out[0] if isinstance(out, tuple) else out

    return attention


Builders = dict[str, Callable[[Shape, torch.device], Attention]]
DENSE: Builders = {
    "fastlm": _fastlm,
    "SDPA flash": _backend(SDPBackend.FLASH_ATTENTION),
    "SDPA efficient": _backend(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA cuDNN": _backend(SDPBackend.CUDNN_ATTENTION),
    "SDPA math": _backend(SDPBackend.MATH),
    "FlexAttention": _flex,
    "flash-attn": _flash_attn,
    "flash-attn-4": _flash_attn_4,
}
PACKED: Builders = {
    "fastlm": _fastlm,
    "SDPA of each document": _each_document,
    "varlen_attn": _varlen,
    "FlexAttention": _flex,
    "flash-attn": _flash_attn,
    "flash-attn-4": _flash_attn_4,
}

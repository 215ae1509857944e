"""The logits of a linear layer in chunks of rows, and its gradients from those of the logits.

    logits = logit_scale * (input @ weight.T + bias)

With g_i the gradient of row i of the logits, scaled by s_i:
dinput_i = logit_scale s_i g_i @ weight,  dweight = sum_i g_i^T (logit_scale s_i input_i),  dbias likewise.
Both products follow while a chunk's g lies in the one reused buffer. The scale goes to the small input, not to g.

On a CPU logits and sums are float32: products of low precision would round every chunk's share of dweight. bfloat16
factors stay as they are where the CPU multiplies them (bf16_gemm_), and g is rounded to bfloat16 once, with its scale;
elsewhere all is float32. Rows without a valid target are left out: their logits are needed nowhere. On a GPU the host
does not know how many these are, and waits for no answer.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops._library import has_bf16_units

# Fewer rows lose to re-reading the weight and its gradient once per chunk; more rows only cost memory.
CHUNK_ROWS = {"cpu": 512, "cuda": 2048}
CPU_COLUMNS = 1024  # logits of a row that a CPU multiplies out at a time: with their weights they stay in its caches
MOST_ROWS = 1 << 40  # of a chunk: a larger number is none that the op's int could hold

Needs = tuple[bool, bool, bool]  # gradients of input, weight and bias


class Chunk(NamedTuple):
    """Some rows: which, what they hold, their logits, and where in the memory of these their gradient belongs."""

    rows: slice | Tensor
    input: Tensor
    logits: Tensor
    gradient: Tensor


class Chunks:
    """The logits, chunk by chunk; rows says which rows of input they are of, None all."""

    def __init__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, most: int, logit_scale: float
    ) -> None:
        self.input, self.bias, self.rows, self.logit_scale = input, bias, rows, logit_scale
        self.operand = multipliable(weight.to(operand_dtype(input)))
        N = input.shape[0] if rows is None else rows.shape[0]
        self.num_rows = N
        self.most = math.ceil(N / math.ceil(N / most)) if N else 0  # equal chunks: no sliver at the end
        dtype = torch.float32 if input.is_cpu else input.dtype
        self.buffer = torch.empty((self.most, weight.shape[0]), dtype=dtype, device=input.device)

    def __iter__(self) -> Iterator[Chunk]:
        for start in range(0, self.num_rows, self.most or 1):
            chunk = slice(start, min(start + self.most, self.num_rows))
            rows = chunk if self.rows is None else self.rows[chunk]
            x = multipliable(self.input[rows].to(self.operand.dtype))
            memory = self.buffer[: chunk.stop - start]
            logits, gradient = (memory.view(dtype)[:, : len(self.operand)] for dtype in (memory.dtype, x.dtype))
            self._multiply(x, logits)
            if self.bias is not None:
                logits.add_(self.bias, alpha=self.logit_scale)
            yield Chunk(rows, x, logits, gradient)

    def _multiply(self, x: Tensor, logits: Tensor) -> None:
        """Write logit_scale * (x @ weight.T), scaled before it is rounded."""
        if x.is_cpu and x.dtype == torch.bfloat16:
            torch.ops.fastlm.bf16_gemm_(logits, x, self.operand.t(), self.logit_scale, False)
            return
        V = len(self.operand)
        for columns in range(0, V, CPU_COLUMNS if x.is_cpu else V):
            own = slice(columns, columns + CPU_COLUMNS) if x.is_cpu else slice(None)
            product = logits[:, own]
            if self.logit_scale == 1:
                torch.mm(x, self.operand[own].t(), out=product)
            else:
                torch.addmm(product, x, self.operand[own].t(), beta=0, alpha=self.logit_scale, out=product)


def operand_dtype(input: Tensor) -> torch.dtype:
    """What is multiplied: on a CPU float32, but for bfloat16 where it has units for that."""
    if input.is_cpu and not (input.dtype == torch.bfloat16 and has_bf16_units()):
        return torch.float32
    return input.dtype


def multipliable(matrix: Tensor) -> Tensor:
    """The matrix with unit stride in a dimension, as bf16_gemm_ takes it."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def valid_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """The rows with a valid target, or None where it pays to take all."""
    if not target.is_cpu:
        return None
    rows = (target != ignore_index).nonzero()[:, 0]
    return rows if len(rows) < len(target) else None


class Gradients:
    """The gradients of a linear layer, summed over the chunks; one not needed has no elements."""

    def __init__(
        self,
        chunks: Chunks,
        found: tuple[Tensor, Tensor, Tensor],
        scale: Tensor | None,
        needs: Needs,
    ) -> None:
        (self.dinput, self.dweight, self.dbias), self.needs = found, needs
        self.operand, self.is_first = chunks.operand, True
        if chunks.logit_scale != 1:
            scale = self.dbias.new_full((1,), chunks.logit_scale) if scale is None else scale * chunks.logit_scale
        self.scale = None if scale is None else scale.expand(chunks.input.shape[0])
        self.scales_logits = chunks.input.is_cpu and self.operand.dtype == torch.bfloat16
        self.top: Tensor | float = 1.0
        if scale is not None and self.operand.dtype == torch.float16 and scale.numel():
            # Times the scale itself, 1 / N or a loss scaler's, float16 would lose small inputs or hold infinite ones.
            self.top = scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        # In float32 its error would grow with the chunks.
        self.dbias_sum = torch.zeros_like(self.dbias, dtype=torch.float64)
        if chunks.num_rows < chunks.input.shape[0]:
            self.dinput.zero_()
        if not chunks.num_rows:
            self.dweight.zero_()

    def scale_of_logits(self, chunk: Chunk) -> Tensor | None:
        """What the gradient of each row of logits is to be multiplied with before add; None for 1."""
        return self.scale[chunk.rows] if self.scales_logits and self.scale is not None else None

    def add(self, chunk: Chunk) -> None:
        """Add what follows from a chunk whose logits were overwritten with their gradient."""
        rows, x, _, g = chunk
        needs_input, needs_weight, needs_bias = self.needs
        s = None if self.scale is None or self.scales_logits else self.scale[rows]
        if needs_weight:
            scaled = x if s is None else (x * (s / self.top)[:, None]).to(x.dtype)
            add_product(self.dweight, g.t(), scaled, first=self.is_first)
            self.is_first = False
        if needs_input and isinstance(rows, slice):
            write_product(self.dinput[rows], g, self.operand, s)
        elif needs_input:
            self.dinput[rows] = write_product(self.dinput.new_empty(x.shape), g, self.operand, s)
        if needs_bias:
            # g is needed no more. A product with s would sum all rows in one float32 chain, PyTorch's sum does not.
            self.dbias_sum.add_((g.float() if s is None else g.float().mul_(s[:, None])).sum(0))

    def finish(self) -> None:
        self.dbias.copy_(self.dbias_sum)
        if self.operand.dtype == torch.float16:
            self.dweight.mul_(self.top)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (float32) += a @ b, or = if this is the first: a fresh total then needs no pass of zeros."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif a.is_cpu:
        torch.ops.fastlm.bf16_gemm_(total, a, b, 1.0, not first)
    elif first:  # products of low precision, summed over all chunks in float32
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


def write_product(target: Tensor, a: Tensor, b: Tensor, scale: Tensor | None) -> Tensor:
    """target = scale * (a @ b), row by row, in float32 or in the dtype of a and b."""
    if target.dtype == torch.float32:
        add_product(target, a, b, first=True)
    else:
        torch.mm(a, b, out=target)
    return target if scale is None else target.mul_(scale[:, None])


def empty_gradients(input: Tensor, weight: Tensor, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """(dinput, dweight, dbias), float32: what scales them in the backward comes before their rounding, and in float16
    their range.

    But for dinput of a GPU's bfloat16, which its product rounds; in float32 that would take twice the memory.
    """
    needs_input, needs_weight, needs_bias = needs
    keeps_dtype = not input.is_cpu and input.dtype == torch.bfloat16
    return (
        input.new_empty(input.shape if needs_input else (0, 0), dtype=input.dtype if keeps_dtype else torch.float32),
        weight.new_empty(weight.shape if needs_weight else (0, 0), dtype=torch.float32),
        weight.new_empty((weight.shape[0] if needs_bias else 0,), dtype=torch.float32),
    )


def rounded(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are needed, each in the dtype of its input."""
    return [
        gradient.to(x.dtype) if needed and x is not None else None
        for gradient, x, needed in zip(gradients, inputs, needs, strict=True)
    ]


def wanted_gradients(input: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
    """Which of them need a gradient, now."""
    if not torch.is_grad_enabled():
        return False, False, False
    return input.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


# What the public functions decide and check, in the name of the one that was called


def shifted(op: str, input: Tensor, target: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Every position but the last ones against the target that lies shift further on."""
    if shift < 0:
        raise ValueError(f"{op}: shift is {shift}, expected 0 or more positions")
    if input.dim() < 2 or target.dim() != input.dim() - 1:
        shapes = f"input {tuple(input.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"{op}: shift needs input (..., T, C) and target (..., T), got {shapes}")
    return input[..., :-shift, :], target[..., shift:]


def rows_of_chunk(op: str, input: Tensor, num_columns: int, memory_budget: int | None, options: Any = None) -> int:
    """Rows whose logits are held at a time: by the budget, by torch's options, or the default of the device."""
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise TypeError(f"{op}: options is {options!r}, expected torch.nn.LinearCrossEntropyOptions")
    if memory_budget is None:
        return getattr(options, "batch_chunk_size", None) or CHUNK_ROWS.get(input.device.type, CHUNK_ROWS["cuda"])
    needed = (4 if input.is_cpu else input.element_size()) * max(num_columns, 1)
    if memory_budget < needed:
        raise ValueError(f"{op}: memory_budget is {memory_budget} bytes, one row of logits needs {needed}")
    return min(memory_budget // needed, MOST_ROWS)


def check_positive(op: str, option: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{op}: {option} is {value}, expected a positive number")


def check_layer(op: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    if input.dim() < 1 or linear_weight.dim() < 2:
        shapes = f"input {tuple(input.shape)} and linear_weight {tuple(linear_weight.shape)}"
        raise ValueError(f"{op}: expected input (..., C) and linear_weight (V, C), got {shapes}")
    C = linear_weight.shape[-1]
    if input.shape[-1] != C:
        shapes = f"input has {input.shape[-1]} features (shape {tuple(input.shape)}), linear_weight {C}"
        raise ValueError(f"{op}: {shapes}; they must agree")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        shapes = f"linear_bias has shape {tuple(linear_bias.shape)}, expected {tuple(linear_weight.shape[:-1])}"
        raise ValueError(f"{op}: {shapes}, as linear_weight without its features")


def check_rows(
    op: str,
    input: Tensor,
    tensors: dict[str, Tensor | None],
    V: int,
    num_classes: int | None,
    autocast: bool,
) -> None:
    """Devices and dtypes of "linear_weight", "target" and what else comes with input, and the classes among V."""
    if num_classes is not None and not 0 < num_classes <= V:
        raise ValueError(f"{op}: num_classes is {num_classes}, expected 1 to {V} (rows of linear_weight)")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != input.device:
            there = f"{input.device}, where input is; move it there"
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {there}")
    weight, target, bias = (tensors[name] for name in ("linear_weight", "target", "linear_bias"))
    assert weight is not None, "a linear layer has a weight"
    assert target is not None, "every row has a target"
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: target is {target.dtype}, expected int64 class indices")
    if not autocast and (input.dtype != weight.dtype or not input.is_floating_point()):
        kinds = f"input is {input.dtype} and linear_weight {weight.dtype}"
        raise TypeError(f"{op}: {kinds}, expected one floating dtype")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"{op}: linear_bias is {bias.dtype}, expected a floating dtype")

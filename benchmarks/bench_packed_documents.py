"""A whole training step on the same documents: packed into rows, or each in a row of its own, padded to the longest.

Padding has no target, so that loss and gradients are equal. What counts is useful tokens: those that have a target.
"""

import copy
import functools
import itertools

import torch
from torch import Tensor, nn

from benchmarks.bench_training import (
    IGNORED,
    Shape,
    fastlm_model,
    loss_error,
    plain_model,
    precision_name,
    step_of,
    truth,
)
from benchmarks.harness import Case, Provider, Run, Tensors, Work
from fastlm.data.packing import pack_documents

FEWEST, MEAN = 16, 0.25  # tokens of a document, and their mean as a share of a row; log-normal, as web pages are


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [_case(device, Shape(4, 4, 256, 2048, 4, 256), torch.float32)]
    return [_case(device, Shape(12, 12, 768, 50304, 16, 1024), torch.bfloat16)]


def _case(device: torch.device, shape: Shape, dtype: torch.dtype) -> Case:
    lengths = document_lengths(shape)
    initial = functools.cache(lambda: plain_model(shape, device))

    def step(model: nn.Module, packed: bool) -> Run:
        names = ("tokens", "targets", "cu_seqlens", "positions") if packed else ("tokens", "targets")
        kind = "packed" if packed else "padded"
        run = step_of(model, shape, device, dtype)
        return lambda given: run({name: given[f"{kind} {name}"] for name in names})

    def padded(given: Tensors) -> Tensors:
        return {name: given[f"padded {name}"] for name in ("tokens", "targets")}

    return Case(
        name=f"{len(lengths)} documents of {sum(lengths) / len(lengths):.0f} tokens, the longest of {max(lengths)}, "
        f"{shape.style} {shape.L} layers C {shape.C} V {shape.V}, rows of {shape.T}, "
        f"{precision_name(dtype)}, whole step",
        device=device,
        inputs=lambda: _inputs(shape, lengths, device),
        truth=lambda given: truth(initial(), padded(given)),
        torch_error=lambda given: loss_error(initial(), padded(given), dtype),
        reference="plain PyTorch, padded",
        providers=[
            Provider("fastlm, packed", lambda: step(fastlm_model(initial(), shape, device), True), "ours"),
            Provider("fastlm, padded", lambda: step(fastlm_model(initial(), shape, device), False), "ours"),
            Provider("plain PyTorch, padded", lambda: step(copy.deepcopy(initial()), False)),
            Provider("plain PyTorch, packed, with a mask", lambda: step(copy.deepcopy(initial()), True)),
        ],
        work=(Work("token", float(sum(lengths)), "those with a target"),),
        dtype=dtype,
    )


def document_lengths(shape: Shape) -> list[int]:
    """Of documents that fill the rows of a batch; the same on every machine."""
    drawn = torch.empty(shape.B * shape.T).log_normal_(0.0, 1.0, generator=torch.Generator().manual_seed(0))
    lengths = (drawn * (MEAN * shape.T / 1.65)).long().clamp(FEWEST, shape.T)  # the mean of drawn is exp(1 / 2)
    return lengths[lengths.cumsum(0) <= shape.B * shape.T].tolist()


def _inputs(shape: Shape, lengths: list[int], device: torch.device) -> Tensors:
    """Padded to the longest, (documents, longest), and packed, (rows, T), where the end of a row is padding."""
    longest = max(lengths)
    drawn = torch.randint(shape.V, (len(lengths), longest + 1))
    is_padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    padded = {
        "tokens": drawn[:, :-1].masked_fill(is_padding, 0),
        "targets": drawn[:, 1:].masked_fill(is_padding, IGNORED),
    }
    starts = torch.arange(len(lengths)) * longest  # in padded, flattened
    packing = pack_documents(starts.numpy(), torch.tensor(lengths).numpy(), shape.T)
    size = packing.num_rows * shape.T
    packed = {"tokens": torch.zeros(size, dtype=torch.long), "targets": torch.full((size,), IGNORED)}
    bounds = []
    for row, pieces in enumerate(itertools.starmap(slice, itertools.pairwise(packing.row_starts))):
        end = row * shape.T
        for start, length in zip(packing.starts[pieces], packing.lengths[pieces], strict=True):
            bounds.append(end)
            end += int(length)
            for name in packed:
                packed[name][bounds[-1] : end] = padded[name].flatten()[start : start + length]
        if end < (row + 1) * shape.T:
            bounds.append(end)
    cu_seqlens = torch.tensor([*bounds, size], dtype=torch.int32)
    begun = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())  # where the document of a token begins
    packed |= {"positions": torch.arange(size) - begun}
    found: dict[str, Tensor] = {f"padded {name}": tensor for name, tensor in padded.items()}
    found |= {f"packed {name}": tensor.view(-1, shape.T) for name, tensor in packed.items()}
    return {name: tensor.to(device) for name, tensor in (found | {"packed cu_seqlens": cu_seqlens}).items()}

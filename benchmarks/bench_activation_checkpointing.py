"""Activation checkpointing: time and memory of a whole training step, by what the blocks keep.

Every provider trains the same GPT on the same packed rows and must give the same loss and gradients. Gradients and the
optimiser's state are there before the step that is measured, so its working memory is that of activations, loss and
what backward needs for a moment.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_training import Shape
from benchmarks.harness import Case, Provider, Run, Size, Tensors, Work
from fastlm.models import GPT
from fastlm.train.activation_checkpointing import ActivationKnobs, checkpoint_activations, keep_within_budget, plan
from fastlm.train.memory import profile_forward
from fastlm.train.precision import DevicePrecision

COMPARED = ("token_embedding.weight", "blocks.0.attention.qkv.weight", "final_norm.weight")
KNOBS = {
    "none": ActivationKnobs(),
    "selective (budget 0.5)": ActivationKnobs(activation_checkpointing="selective"),
    "budget 0.25": ActivationKnobs(activation_checkpointing="selective", activation_memory_budget=0.25),
    "budget 0.65": ActivationKnobs(activation_checkpointing="selective", activation_memory_budget=0.65),
    "full": ActivationKnobs(activation_checkpointing="full"),
}


@dataclass(frozen=True)
class Rows:
    """A batch as the trainer's loader gives it."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        shapes = [Shape(L, 4, 256, 1024, 4, 256) for L in (4, 8, 12)]
        return [_case(device, shape) for shape in (*shapes, Shape(12, 8, 512, 1024, 2, 256))]
    return [_case(device, Shape(L, 12, 768, 50304, 16, 1024)) for L in (4, 8, 12)]


def _case(device: torch.device, shape: Shape) -> Case:
    precision = DevicePrecision(device, "bf16" if device.type == "cuda" else "fp32", "as a run would")
    torch.manual_seed(0)
    with device:
        initial = GPT(shape.config)
    return Case(
        name=f"{shape}, documents of {shape.T // 2}, {precision.precision}, whole step",
        device=device,
        inputs=lambda: _inputs(shape, device),
        truth=lambda given: _truth(initial, given),
        reference="none",
        providers=[
            Provider(name, lambda knobs=knobs: _step(copy.deepcopy(initial), knobs, precision), "ours")
            for name, knobs in KNOBS.items()
        ],
        work=(Work("token", float(shape.B * shape.T), "B T"),),
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        weight=shape.L / 6,
        size=Size(f"C {shape.C}, B {shape.B} T {shape.T}, {precision.precision}", shape.L, "layers"),
    )


def _inputs(shape: Shape, device: torch.device) -> Tensors:
    tokens = torch.randint(shape.V, (shape.B, shape.T + 1), device=device)
    half = shape.T // 2
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "targets": tokens[:, 1:].contiguous(),
        "positions": torch.arange(half, device=device).repeat(2).expand(shape.B, shape.T).contiguous(),
        "cu_seqlens": torch.arange(0, shape.B * shape.T + 1, half, dtype=torch.int32, device=device),
    }


def _step(model: nn.Module, knobs: ActivationKnobs, precision: DevicePrecision) -> Run:
    checkpoint_activations(model, knobs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
    is_planned = False

    def run(given: Tensors) -> Tensors:
        nonlocal is_planned
        if not is_planned:
            profile = profile_forward(model, Rows(**given), precision)
            plans = plan(profile.blocks, knobs.activation_checkpointing, knobs.activation_memory_budget)
            keep_within_budget(model, plans)
            is_planned = True
        optimizer.zero_grad(set_to_none=False)
        with precision.autocast():
            loss_sum, num_valid = model(**given)
            loss = loss_sum / num_valid
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.detach(), **_gradients(model)}

    return run


def _gradients(model: nn.Module) -> Tensors:
    return {name: model.get_parameter(name).grad for name in COMPARED}


def _truth(initial: GPT, given: Tensors) -> Tensors:
    """Loss and clipped gradients in float64, over all logits at once: the model itself gives a float32 loss."""
    model = copy.deepcopy(initial).double()
    logits = model(given["tokens"], cu_seqlens=given["cu_seqlens"], positions=given["positions"])
    loss = F.cross_entropy(logits.flatten(0, 1), given["targets"].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return {"loss": loss.detach(), **_gradients(model)}

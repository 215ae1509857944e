"""A training step of Hugging Face models as they come, and under fastlm.accelerate: forward, backward, AdamW.

Memory is what a step needs above the weights and the state of the optimiser, so it includes all gradients. The peers
are the model as transformers builds it, whose attention is SDPA, and the same model compiled. On a CPU that has units
for bfloat16 the large models run under autocast too.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.bench_training import precision
from benchmarks.harness import Case, Provider, Run, Tensors, Work, import_peer
from fastlm.acceleration.verification import InFloat64
from fastlm.ops._library import has_bf16_units

LEARNING_RATE = 3e-4
VOCABULARY = 50257


class Shape(NamedTuple):
    """Of a model and its batch."""

    layers: int
    heads: int
    C: int
    B: int
    T: int

    def __str__(self) -> str:
        return f"{self.layers} layers C {self.C} V {VOCABULARY}, B {self.B} T {self.T}"


GPT2_SIZED = Shape(12, 12, 768, 4, 256)
SMALL = Shape(4, 6, 384, 4, 128)
LARGE = Shape(16, 32, 2048, 12, 1024)  # Llama 3.2 1B, nearly, on a GPU
SIZED_LIKE_GPT2 = ("gpt2", "llama")
FAMILIES = ("gpt2", "llama", "qwen3", "mistral", "gemma3", "phi3", "olmo2", "smollm3", "modernbert", "t5")


def cases(device: torch.device) -> list[Case]:
    if device.type != "cpu":
        return [_case("llama", device, LARGE, torch.bfloat16)]
    dtypes = (torch.float32, torch.bfloat16) if has_bf16_units() else (torch.float32,)
    large = [_case(name, device, GPT2_SIZED, torch.float32, dtype) for dtype in dtypes for name in SIZED_LIKE_GPT2]
    return [*large, *(_case(name, device, SMALL, torch.float32) for name in FAMILIES)]


def _case(
    name: str, device: torch.device, shape: Shape, dtype: torch.dtype, autocast: torch.dtype = torch.float32
) -> Case:
    """A step of a model whose weights have this dtype, under autocast to another unless that is float32."""

    def inputs() -> Tensors:
        return {"tokens": torch.randint(VOCABULARY, (shape.B, shape.T), device=device)}

    def step(change: Callable[[nn.Module], Any]) -> Run:
        model = _model(name, shape, device, dtype)
        return _step(model, change(model), precision(device, autocast))

    in_what = str(dtype).removeprefix("torch.")
    if autocast != torch.float32:
        in_what = f"{str(autocast).removeprefix('torch.')} autocast"
    return Case(
        name=f"{name} {shape}, {in_what}, whole step",
        device=device,
        inputs=inputs,
        truth=lambda given: _truth(name, shape, device, dtype, given),
        torch_error=lambda given: _loss_error(name, shape, device, dtype, autocast, given),
        reference="transformers",
        providers=[
            Provider("accelerated", lambda: step(_accelerated), "ours"),
            Provider("transformers", lambda: step(lambda model: model)),
            Provider("transformers compiled", lambda: step(lambda model: torch.compile(model, dynamic=False))),
        ],
        work=(Work("token", float(shape.B * shape.T), "B T"),),
        dtype=dtype if autocast == torch.float32 else autocast,
        weight=6.0 if shape == GPT2_SIZED else 1.0,
    )


def _accelerated(model: nn.Module) -> nn.Module:
    from fastlm import accelerate

    return accelerate(model)


def _model(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The same weights at each call."""
    import_peer("transformers", "transformers")
    from tests.support.hugging_face import FAMILIES

    torch.manual_seed(0)
    with device:
        model = FAMILIES[name](**_sizes(name, shape))
    return model.to(dtype).train()


def _sizes(name: str, shape: Shape) -> Mapping[str, object]:
    layers, heads, C, _, T = shape
    if name == "gpt2":
        return {"n_layer": layers, "n_head": heads, "n_embd": C, "n_positions": T, "vocab_size": VOCABULARY}
    if name == "t5":
        sizes = {"num_layers": layers // 2, "num_decoder_layers": layers // 2, "num_heads": heads, "d_model": C}
        # As in T5 1.1. Of so many inputs of a ReLU one or two are nearer to 0 than rounding: a gradient there is luck.
        return {**sizes, "d_kv": C // heads, "d_ff": 4 * C, "vocab_size": VOCABULARY, "feed_forward_proj": "gated-gelu"}
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": C, "vocab_size": VOCABULARY}
    sizes |= {"intermediate_size": 8 * C // 3, "max_position_embeddings": T}
    if name == "modernbert":
        return sizes
    sizes |= {"num_key_value_heads": heads}
    if name in ("qwen3", "gemma3"):
        sizes |= {"head_dim": C // heads}
    if name == "gemma3":  # one local layer in two
        sizes |= {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)}
    if name in ("mistral", "gemma3"):
        sizes |= {"sliding_window": T // 2}
    return sizes


def _step(model: nn.Module, forward: Callable[..., Any], precision: AbstractContextManager) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def run(given: Tensors) -> Tensors:
        with precision:
            loss = forward(input_ids=given["tokens"], labels=given["tokens"]).loss
        loss.backward()
        optimizer.step()
        gradients = _compared(model)
        optimizer.zero_grad(set_to_none=True)  # last, so that what a step starts from is weights and moments
        return {"loss": loss.detach(), "gradients": gradients}

    return run


def _compared(model: nn.Module) -> Tensor:
    """The gradients of norms and biases in one: of those of the first layer everything behind it is a part."""
    return torch.cat([p.grad for p in model.parameters() if p.dim() == 1 and p.grad is not None])


def _truth(name: str, shape: Shape, device: torch.device, dtype: torch.dtype, given: Tensors) -> Tensors:
    """Loss and gradients in float64, row by row: all logits of a batch in float64 may not fit."""
    model = copy.deepcopy(_model(name, shape, device, dtype)).double()
    tokens, losses = given["tokens"], []
    with InFloat64():
        for row in tokens.split(1):
            loss = model(input_ids=row, labels=row).loss / len(tokens)
            loss.backward()
            losses.append(loss.detach())
    return {"loss": torch.stack(losses).sum(), "gradients": _compared(model)}


@torch.no_grad()
def _loss_error(
    name: str, shape: Shape, device: torch.device, dtype: torch.dtype, autocast: torch.dtype, given: Tensors
) -> dict[str, float]:
    """PyTorch's largest error of the losses of single rows and of the batch: one number alone may be right by luck."""
    model = _model(name, shape, device, dtype)
    exact, tokens = copy.deepcopy(model).double(), given["tokens"]
    with InFloat64():
        expected = [float(exact(input_ids=row, labels=row).loss) for row in tokens.split(1)]
    expected.append(sum(expected) / len(expected))
    with precision(device, autocast):
        found = [float(model(input_ids=rows, labels=rows).loss) for rows in (*tokens.split(1), tokens)]
    return {"loss": max(abs(a - b) for a, b in zip(found, expected, strict=True))}

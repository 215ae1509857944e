"""One whole training step in the styles of GPT-2 and of Llama: forward, backward, gradient clipping, AdamW.

Every provider starts from the same weights and must give the same loss and gradients. The plain model is written the
way nanoGPT writes one: PyTorch's own layers, SDPA, all logits at once. The floor is what no implementation of these
shapes avoids: the bare matrix products, SDPA forward and backward, one fused AdamW.
"""

import contextlib
import copy
import functools
import operator
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Provider, Run, Size, Tensors, Work, import_peer
from fastlm.models import GPT, GPTConfig
from fastlm.models.hub_families import places, to_hub
from fastlm.ops._library import has_bf16_units
from tests.support.plain_gpt import PlainGPT

LEARNING_RATE = 3e-4
CLIP = 1.0
IGNORED = -100
COMPARED = ("token_embedding.weight", "blocks.0.attention.qkv.weight", "final_norm.weight")


@dataclass(frozen=True)
class Shape:
    L: int  # layers
    H: int  # heads
    C: int  # features
    V: int  # vocabulary
    B: int
    T: int
    llama: bool = False  # in Llama's style, else in GPT-2's

    def __str__(self) -> str:
        return f"{self.style} {self.L} layers C {self.C} V {self.V}, B {self.B} T {self.T}"

    @property
    def style(self) -> str:
        return "Llama" if self.llama else "GPT"

    @property
    def config(self) -> GPTConfig:
        config = GPTConfig.llama if self.llama else GPTConfig
        return config(
            vocab_size=self.V, sequence_length=self.T, num_layers=self.L, num_heads=self.H, hidden_size=self.C
        )

    @property
    def linears(self) -> list[tuple[int, int, int]]:
        """(inputs, outputs, how many) of every matrix product with a weight."""
        C, inner = self.C, self.config.mlp_size
        up = 2 * inner if self.llama else inner
        return [(C, 3 * C, self.L), (C, C, self.L), (C, up, self.L), (inner, C, self.L), (C, self.V, 1)]

    @property
    def num_parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in PlainGPT(self.config, padded=False).parameters())

    @property
    def flops(self) -> float:
        weights = sum(inputs * outputs * count for inputs, outputs, count in self.linears)
        return self.B * self.T * (6.0 * weights + 6.0 * self.L * self.C * self.T)


def cases(device: torch.device) -> list[Case]:
    if device.type != "cpu":
        return [_case(device, Shape(12, 12, 768, 50304, 64, 1024), torch.bfloat16)]
    middle, gpt2 = Shape(6, 6, 384, 50304, 8, 256), Shape(12, 12, 768, 50304, 4, 256)
    shapes = Shape(4, 4, 128, 65, 12, 64), middle, gpt2, Shape(6, 6, 384, 32000, 4, 256, llama=True)
    float32 = [_case(device, shape, torch.float32) for shape in shapes]
    return float32 + [_case(device, shape, torch.bfloat16) for shape in (middle, gpt2) if has_bf16_units()]


def _case(device: torch.device, shape: Shape, dtype: torch.dtype) -> Case:
    """One step in float32 or under bfloat16 autocast; on a CPU the latter stands beside those in float32."""
    initial = functools.cache(lambda: plain_model(shape, device))  # not before the case begins: it may be large
    kind = f"{precision_name(dtype)}, whole step"
    transformers = f"transformers {'Llama' if shape.llama else 'GPT-2'}"

    def ours(**options: Any) -> Run:
        return step_of(fastlm_model(initial(), shape, device), shape, device, **({"dtype": dtype} | options))

    def plain(**options: Any) -> Run:
        return step_of(copy.deepcopy(initial()), shape, device, **({"dtype": dtype} | options))

    in_float32 = [
        Provider("fastlm, float32", lambda: ours(dtype=torch.float32), "ours"),
        Provider("plain PyTorch compiled, float32", lambda: plain(compiled=True, dtype=torch.float32)),
    ]
    return Case(
        name=f"{shape}, {kind}",
        device=device,
        inputs=lambda: batch(shape, device),
        truth=lambda given: truth(initial(), given),
        torch_error=lambda given: loss_error(initial(), given, dtype),
        reference="plain PyTorch",
        providers=[
            # Compilation takes most of the time: what comes last may be left out.
            Provider("fastlm", ours, "ours"),
            Provider("plain PyTorch", plain),
            Provider("products + SDPA + AdamW", lambda: _floor(initial(), shape, device, dtype), "floor"),
            Provider(transformers, lambda: _transformers(initial(), shape, device, dtype)),
            Provider("plain PyTorch compiled", lambda: plain(compiled=True)),
            Provider("fastlm compiled", lambda: ours(compiled=True), "ours"),
            *(in_float32 if dtype != torch.float32 and device.type == "cpu" else ()),
        ],
        work=(
            Work("token", float(shape.B * shape.T), "B T"),
            # 2 FLOPs per weight and token in each of forward, dx and dweight; causal attention is half of T x T.
            Work("flop", shape.flops, "B T (6 weights of products + 6 L C T)"),
        ),
        dtype=dtype,
        weight=1.0 if shape.V < 1000 else 5.0,  # seconds a step on a CPU, and the longest compilation
        size=Size(f"{shape.style}, {kind}", shape.num_parameters, "parameters"),
    )


def batch(shape: Shape, device: torch.device) -> Tensors:
    tokens = torch.randint(shape.V, (shape.B, shape.T + 1), device=device)
    return {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def step_of(model: nn.Module, shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> Run:
    """A step of a model that gives the summed loss and the number of valid targets."""
    forward = torch.compile(model, dynamic=False) if compiled else model

    def mean_loss(**given: Tensor) -> Tensor:
        loss_sum, num_valid = forward(**given)
        return loss_sum / num_valid

    return _step(model, mean_loss, device, dtype, lambda: _gradients(model, shape.V))


def precision(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """What a step runs in: float32, or autocast to dtype."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def precision_name(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else f"{str(dtype).removeprefix('torch.')} autocast"


def _step(
    model: nn.Module,
    mean_loss: Callable,
    device: torch.device,
    dtype: torch.dtype,
    gradients: Callable[[], Tensors],
) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def run(given: Tensors) -> Tensors:
        optimizer.zero_grad(set_to_none=True)
        with precision(device, dtype):
            loss = mean_loss(**given)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return {"loss": loss.detach(), **gradients()}

    return run


def _gradients(model: nn.Module, V: int) -> Tensors:
    """The compared gradients; rows that fastlm adds to the vocabulary are cut off."""
    return {name: model.get_parameter(name).grad[: V if "embedding" in name else None] for name in COMPARED}


def truth(initial: PlainGPT, given: Tensors) -> Tensors:
    """Loss and clipped gradients in float64, row by row: all logits of a batch in float64 may not fit."""
    model = copy.deepcopy(initial).double()
    tokens, targets = given["tokens"], given["targets"]
    num_valid, losses = (targets != IGNORED).sum(), []
    for row in range(len(tokens)):
        loss = model(tokens[row : row + 1], targets[row : row + 1])[0] / num_valid
        loss.backward()
        losses.append(loss.detach())
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    return {"loss": torch.stack(losses).sum(), **_gradients(model, model.token_embedding.num_embeddings)}


@torch.no_grad()
def loss_error(initial: PlainGPT, given: Tensors, dtype: torch.dtype) -> dict[str, float]:
    """PyTorch's largest error of the losses of single rows and of the batch: one number alone may be right by luck."""
    exact, batch = copy.deepcopy(initial).double(), (given["tokens"], given["targets"])
    rows = list(zip(*(x.split(1) for x in batch), strict=True))
    sums, counts = zip(*(map(float, exact(*row)) for row in rows), strict=True)
    expected = [*map(operator.truediv, sums, counts), sum(sums) / sum(counts)]
    with precision(given["tokens"].device, dtype):
        found = [operator.truediv(*map(float, initial(*part))) for part in (*rows, batch)]
    return {"loss": max(abs(a - b) for a, b in zip(found, expected, strict=True))}


def plain_model(shape: Shape, device: torch.device) -> PlainGPT:
    torch.manual_seed(0)
    with device:
        model = PlainGPT(shape.config, padded=False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    return model


def fastlm_model(initial: PlainGPT, shape: Shape, device: torch.device) -> nn.Module:
    with device:
        model = GPT(shape.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            given = initial.get_parameter(name)
            parameter.zero_()[: len(given)] = given  # fastlm pads the vocabulary
    return model


def _transformers(initial: PlainGPT, shape: Shape, device: torch.device, dtype: torch.dtype) -> Run:
    """The model of transformers with the same weights, with SDPA."""
    transformers = import_peer("transformers", "transformers")
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        fastlm_model(initial, shape, torch.device("cpu")).save_pretrained(f"{folder}/model")
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", attn_implementation="sdpa")
    model.to(device).train()
    parameters = dict(model.named_parameters())
    compared = [place for place in places(shape.config, to_hub(shape.config)[1]) if place.parameter in COMPARED]

    def mean_loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten())

    def gradients() -> Tensors:
        parts: dict[str, list[Tensor]] = {}
        for place in compared:
            gradient = parameters[place.name].grad
            parts.setdefault(place.parameter, []).append(gradient.t() if place.transposed else gradient)
        return {name: torch.cat(found) if len(found) > 1 else found[0] for name, found in parts.items()}

    return _step(model, mean_loss, device, dtype, gradients)


def _floor(initial: PlainGPT, shape: Shape, device: torch.device, dtype: torch.dtype) -> Run:
    parts = floors(initial, shape, device, dtype).values()

    def run(given: Tensors) -> Tensors:
        for part in parts:
            part()
        return {}

    return run


def floors(
    initial: PlainGPT, shape: Shape, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """What each part of a step of these shapes costs at least."""
    products = [
        matrix_products(shape.B * shape.T, inputs, outputs, device, dtype) for inputs, outputs, _ in shape.linears
    ]
    q, k, v, dout = (
        torch.randn(shape.B, shape.H, shape.T, shape.C // shape.H, device=device, dtype=dtype) for _ in range(4)
    )
    attended = [tensor.requires_grad_() for tensor in (q, k, v)]
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in initial.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def linear_layers() -> None:
        for product, (_, _, count) in zip(products[:-1], shape.linears[:-1], strict=True):
            for _ in range(count):
                product()

    def attention() -> None:
        for _ in range(shape.L):
            out = F.scaled_dot_product_attention(*attended, is_causal=True)
            torch.autograd.grad(out, attended, dout)

    return {
        "linear layers": linear_layers,
        "head and loss": products[-1],
        "attention": attention,
        "optimiser": optimizer.step,
    }


def matrix_products(
    rows: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """y = x W^T, dx = dy W, dW = dy^T x, into warm buffers."""
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    dy = torch.randn(rows, outputs, device=device).to(dtype)
    y, dx, dweight = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        torch.mm(x, weight.t(), out=y)
        torch.mm(dy, weight, out=dx)
        torch.mm(dy.t(), x, out=dweight)

    return run

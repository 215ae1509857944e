"""A language model's head: linear, then cross entropy, with the gradients of input and weight."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_cross_entropy import (
    CHECKED_ROWS,
    IGNORED,
    error_of_rows,
    evenly,
    loss_and_gradients,
    random_target,
)
from benchmarks.bench_training import matrix_products
from benchmarks.harness import Case, Provider, Run, Tensors, UnavailableError, Work, import_peer
from fastlm.ops._library import has_bf16_units

CHECKED_CLASSES = 1024  # rows of the weight's gradient: so many that dozens of them are some row's target
# Rows of a chunk for F.linear_cross_entropy: as many as fastlm holds, then as many as were found fastest.
CHUNK_ROWS = {"cpu": (512, 1024), "cuda": (2048, 8192)}
OTHER_CHUNK_ROWS = {"cuda": (4096, 8192, 16384)}  # than fastlm's own, whose products may not fill the chip


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        dtypes = (torch.float32, torch.bfloat16) if has_bf16_units() else (torch.float32,)
        return [_case(device, 2048, 384, 50304, dtype) for dtype in dtypes]
    return [_case(device, N, C, V, torch.bfloat16) for N, C, V in ((16384, 768, 50304), (8192, 4096, 128256))]


def _case(device: torch.device, N: int, C: int, V: int, dtype: torch.dtype) -> Case:
    rows, classes = evenly(N, CHECKED_ROWS), evenly(V, CHECKED_CLASSES)

    def inputs() -> Tensors:
        input = torch.randn(N, C, device=device).to(dtype).requires_grad_()
        weight = (torch.randn(V, C, device=device) * C**-0.5).to(dtype).requires_grad_()  # logits of variance 1
        return {"input": input, "linear_weight": weight, "target": random_target(N, V, device)}

    def sample(outputs: Tensors) -> Tensors:
        return {
            "loss": outputs["loss"].to(dtype),  # some peers give that of bfloat16 inputs in float32
            "dinput": outputs["dinput"][rows],
            "dlinear_weight": outputs["dlinear_weight"][classes],
        }

    return Case(
        name=f"N {N} C {C} V {V} {str(dtype).removeprefix('torch.')}, forward + backward",
        device=device,
        inputs=inputs,
        truth=lambda given: _truth(*given.values(), rows, classes),
        sample=sample,
        torch_error=lambda given: error_of_rows(
            functools.partial(_torch_loss, reduction="none"),
            given["input"][rows],
            given["linear_weight"],
            given["target"][rows],
        ),
        reference="torch eager",
        providers=[
            Provider("fastlm", _fastlm, "ours"),
            *(
                Provider(
                    f"fastlm, {rows} rows", functools.partial(_fastlm, memory_budget=rows * V * dtype.itemsize), "ours"
                )
                for rows in OTHER_CHUNK_ROWS.get(device.type, ())
            ),
            Provider("torch eager", lambda: loss_and_gradients(_torch_loss)),
            Provider("torch.compile", lambda: loss_and_gradients(torch.compile(_torch_loss, dynamic=False))),
            Provider("F.linear_cross_entropy, auto", lambda: _torch_automatic_chunks(device)),
            *(
                Provider(
                    f"F.linear_cross_entropy, {chunk} rows", functools.partial(_torch_chunks, batch_chunk_size=chunk)
                )
                for chunk in CHUNK_ROWS[device.type]
            ),
            *_cut_cross_entropy(device),
            Provider("liger", lambda: _liger(device)),
            Provider("liger, float32 sums", lambda: _liger(device, accum_dtype=torch.float32)),
            Provider("quack", lambda: _quack(device)),
            Provider("three bare products", lambda: _products(N, C, V, device, dtype), "floor"),
        ],
        # logits, dinput and dweight: 2 FLOPs per multiply-add each. What follows the products is little beside them.
        work=(Work("flop", 6.0 * N * C * V, "6 N C V: the products of logits, dinput and dweight"),),
        dtype=dtype,
        weight=8.0,  # on a CPU everyone takes seconds a run
    )


def _truth(input: Tensor, weight: Tensor, target: Tensor, rows: slice, classes: slice) -> Tensors:
    """Loss over all rows, gradients of the chosen rows of input and of weight, in float64.

    One pass over chunks of float64 logits gives every row's logsumexp; the loss and the chosen columns of the logits'
    gradient follow from it. The gradients in full would take three times the products.
    """
    weight, counts = weight.double(), target != IGNORED
    scale, index = counts.double() / counts.sum(), target.masked_fill(~counts, 0)  # (N,)
    numbers = torch.arange(len(weight), device=weight.device)[classes]
    loss, dweight = 0.0, 0.0
    for x, t, s in zip(input.split(256), index.split(256), scale.split(256), strict=True):
        logits = x.double() @ weight.t()
        lse = logits.logsumexp(1, keepdim=True)
        loss += (s * (lse - logits.gather(1, t[:, None]))[:, 0]).sum()
        g = (logits[:, classes] - lse).exp() - (t[:, None] == numbers).double()
        dweight += (g * s[:, None]).t() @ x.double()
    x = input[rows].double().requires_grad_()
    share = F.cross_entropy(F.linear(x, weight), target[rows], reduction="sum") / counts.sum()
    return {"loss": loss, "dinput": torch.autograd.grad(share, x)[0], "dlinear_weight": dweight}


def _fastlm(**options: int) -> Run:
    from fastlm.ops import linear_cross_entropy

    return loss_and_gradients(functools.partial(linear_cross_entropy, **options))


def _torch_loss(input: Tensor, weight: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """F.linear_cross_entropy without options is these two calls, so it is not timed beside them."""
    return F.cross_entropy(F.linear(input, weight), target, reduction=reduction)


def _torch_automatic_chunks(device: torch.device) -> Run:
    if device.type == "cpu":
        raise UnavailableError("not timed: with float32 on a CPU it takes 8 rows at a time, and minutes of the budget")
    return _torch_chunks()


def _torch_chunks(**options: int) -> Run:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"not timed: torch {torch.__version__} has no F.linear_cross_entropy")
    if options:
        options["chunking_method"] = None  # the automatic one refuses a size of one's own
    chosen = torch.nn.LinearCrossEntropyOptions(**options)
    return loss_and_gradients(functools.partial(F.linear_cross_entropy, options=chosen))


def _cut_cross_entropy(device: torch.device) -> list[Provider]:
    """As it comes it leaves out gradients below an epsilon; and without that. On a CPU only its torch.compile runs."""

    def build(**options: object) -> Run:
        module = import_peer("cut_cross_entropy", "cut-cross-entropy")
        return loss_and_gradients(functools.partial(module.linear_cross_entropy, **options))

    if device.type == "cpu":
        return [Provider("cut-cross-entropy (torch_compile)", lambda: build(impl="torch_compile"))]
    return [
        Provider("cut-cross-entropy", build),
        Provider("cut-cross-entropy, nothing left out", lambda: build(filter_eps=None)),
    ]


def _liger(device: torch.device, **options: object) -> Run:
    liger = import_peer("liger_kernel.transformers.functional", "liger-kernel", device)
    return loss_and_gradients(functools.partial(liger.liger_fused_linear_cross_entropy, **options))


def _quack(device: torch.device) -> Run:
    quack = import_peer("quack.linear_cross_entropy", "quack-kernels", device)
    return loss_and_gradients(quack.chunked_linear_cross_entropy)


def _products(N: int, C: int, V: int, device: torch.device, dtype: torch.dtype) -> Run:
    run = matrix_products(N, C, V, device, dtype)
    return lambda given: run() or {}

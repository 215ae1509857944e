"""Log-probabilities of tokens and entropies under a language model's head, with the gradients of input and weight."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_cross_entropy import CHECKED_ROWS, IGNORED, evenly, random_target
from benchmarks.bench_linear_cross_entropy import CHECKED_CLASSES
from benchmarks.harness import Case, Provider, Run, Tensors, Work

Function = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, ...]]


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        sizes, dtype = (2048, 384, 50304), torch.float32
        return [_case(device, *sizes, dtype, entropy) for entropy in (False, True)]
    return [_case(device, 16384, 768, 50304, torch.bfloat16, True)]


def _case(device: torch.device, N: int, C: int, V: int, dtype: torch.dtype, entropy: bool) -> Case:
    rows, classes = evenly(N, CHECKED_ROWS), evenly(V, CHECKED_CLASSES)

    def inputs() -> Tensors:
        input = torch.randn(N, C, device=device).to(dtype).requires_grad_()
        weight = (torch.randn(V, C, device=device) * C**-0.5).to(dtype).requires_grad_()  # logits of variance 1
        upstream = torch.randn(2 if entropy else 1, N, device=device)
        target = random_target(N, V, device)
        return {"input": input, "linear_weight": weight, "target": target, "upstream": upstream}

    def sample(outputs: Tensors) -> Tensors:
        return outputs | {
            "dinput": outputs["dinput"][rows],
            "dlinear_weight": outputs["dlinear_weight"][classes],
        }

    return Case(
        name=f"N {N} C {C} V {V} {str(dtype).removeprefix('torch.')}{' with entropy' * entropy}, forward + backward",
        device=device,
        inputs=inputs,
        truth=lambda given: _truth(*given.values(), rows, classes),
        sample=sample,
        reference="torch eager",
        providers=[
            Provider("fastlm", lambda: _results(_fastlm, entropy), "ours"),
            Provider("torch eager", lambda: _results(_torch, entropy)),
            Provider("torch.compile", lambda: _results(torch.compile(_torch, dynamic=False), entropy)),
        ],
        # logits, dinput and dweight: 2 FLOPs per multiply-add each. Making the logits again is ours to pay.
        work=(Work("flop", 6.0 * N * C * V, "6 N C V: the products of logits, dinput and dweight"),),
        dtype=dtype,
        weight=8.0,  # on a CPU everyone takes seconds a run
    )


def _results(function: Function, entropy: bool) -> Run:
    def run(given: Tensors) -> Tensors:
        input, weight, target, upstream = given.values()
        found = function(input, weight, target, entropy)
        dinput, dweight = torch.autograd.grad(found, (input, weight), [*upstream])
        named = dict(zip(("logprobs", "entropy"), found, strict=False))
        return named | {"dinput": dinput, "dlinear_weight": dweight}

    return run


def _fastlm(input: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    from fastlm.ops import linear_logprobs

    return linear_logprobs(input, weight, target, entropy=entropy)[: 1 + entropy]


def _torch(input: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    logits = F.linear(input, weight)
    logp = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    valid = target != IGNORED
    found = [logp.gather(1, target.masked_fill(~valid, 0)[:, None])[:, 0]]
    if entropy:
        found.append(-(logp.exp() * logp).sum(1))
    return tuple(torch.where(valid, x, 0.0) for x in found)


def _truth(input: Tensor, weight: Tensor, target: Tensor, upstream: Tensor, rows: slice, classes: slice) -> Tensors:
    """Results of all rows, gradients of the chosen rows of input and of weight, in float64, by chunks."""
    weight, upstream, entropy = weight.double(), upstream.double(), len(upstream) > 1
    numbers = torch.arange(len(weight), device=weight.device)[classes]
    parts, dweight = [], 0.0
    for x, y, up in zip(input.split(256), target.split(256), upstream.split(256, 1), strict=True):
        found = _torch(x.double(), weight, y, entropy)
        parts.append(torch.stack(found))
        logp = F.linear(x.double(), weight).log_softmax(1)[:, classes]
        g = up[0][:, None] * ((y[:, None] == numbers).double() - logp.exp())
        if entropy:
            g -= up[1][:, None] * logp.exp() * (logp + found[1][:, None])
        dweight += (g * (y != IGNORED)[:, None]).t() @ x.double()
    x = input[rows].double().requires_grad_()
    share = (torch.stack(_torch(x, weight, target[rows], entropy)) * upstream[:, rows]).sum()
    named = dict(zip(("logprobs", "entropy"), torch.cat(parts, 1), strict=False))
    return named | {"dinput": torch.autograd.grad(share, x)[0], "dlinear_weight": dweight}

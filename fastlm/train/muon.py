"""Muon: momentum, made orthogonal, for the hidden matrices of a model.

    buffer = momentum * buffer + (1 - momentum) * gradient
    update = Newton-Schulz(nesterov: momentum * buffer + (1 - momentum) * gradient, else buffer)   (M, N)
    matrix = matrix * (1 - lr * weight_decay) - lr * update * {0.2 * sqrt(max(M, N)), or sqrt(max(1, M / N))}

Sources: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the first factor, by which an update has the
size of AdamW's, is from Liu et al. 2025, arXiv 2502.16982.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.train.shards import gathered, local_part


class Muon(torch.optim.Muon):
    """torch.optim.Muon with what PyTorch's fused optimisers have, and with Newton-Schulz in fp32 on a CPU.

    grad_scale  gradients are divided by it
    found_inf   1.0 leaves parameters and state untouched, whatever the gradients are; neither is read by the host
    wholes      the sharded matrices of which parameters are local parts: each rank orthogonalises the whole

    On a CUDA device Newton-Schulz runs in bf16, as PyTorch's. A CPU has mostly no bf16 units, and fp32 is exact there.
    """

    grad_scale: Tensor
    found_inf: Tensor
    wholes: Mapping[Tensor, Tensor] = MappingProxyType({})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; there is no closure to call."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, matrix.grad, group)

    def _update(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        taken = 1 - self.found_inf  # 0 or 1: a factor of every change
        gradient = torch.where(self.found_inf == 1, 0, gradient / self.grad_scale)  # NaN * 0 would be NaN
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        buffer, momentum = state["momentum_buffer"], group["momentum"]
        buffer.lerp_(gradient, ((1 - momentum) * taken).to(buffer.dtype))
        direction = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
        whole = self.wholes.get(matrix, matrix)
        direction = gathered(direction, whole).to(torch.bfloat16 if matrix.is_cuda else matrix.dtype)
        update = orthogonalized(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
        update = local_part(update, whole)
        step_size = group["lr"] * _size(group["adjust_lr_fn"], *whole.shape)
        matrix.mul_(1 - group["lr"] * group["weight_decay"] * taken)
        matrix.addcmul_(update.to(matrix.dtype), (step_size * taken).to(matrix.dtype), value=-1)


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of a matrix, in its dtype, by matrix products alone."""
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller of the two Gram matrices
    x = wide / wide.norm().clamp(min=eps)  # no singular value above 1, or the iteration diverges
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T


def _size(adjustment: str, rows: int, columns: int) -> float:
    """The factor on the learning rate of a matrix."""
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def hidden_matrices(model: nn.Module) -> set[Tensor]:
    """The parameters that Muon is made for: two-dimensional weights between the embeddings and the logits.

    Where the model has `blocks`, those inside of them. Else all whose name ends in "weight", but for those of
    nn.Embedding, a head that is tied to one included, and for those of an nn.Linear with as many outputs as the largest
    nn.Embedding has rows: the head onto the vocabulary. A model that this does not fit names its matrices itself
    (`protocols.py`).
    """
    blocks = getattr(model, "blocks", None)
    inside = blocks if isinstance(blocks, nn.Module) else model
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside: set[Tensor] = {module.weight for module in embeddings}
    if inside is model and embeddings:
        vocabulary = max(module.num_embeddings for module in embeddings)
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        outside |= {module.weight for module in linears if module.out_features == vocabulary}
    return {
        parameter
        for name, parameter in inside.named_parameters()
        if parameter.dim() == 2 and name.endswith("weight") and parameter not in outside
    }

"""Adagrad: each number has a learning rate of its own, which falls with the squared gradients it has seen.

    sum = sum + gradient^2
    x   = x - lr * gradient / (sqrt(sum) + eps)

Source: Duchi, Hazan, Singer 2011, https://jmlr.org/papers/v12/duchi11a.html.
"""

from typing import Any

import torch
from torch import Tensor


def adagrad(groups: list[dict[str, Any]], eps: float) -> torch.optim.Optimizer:
    """PyTorch's fused Adagrad, or where it has none for the device (CUDA before torch 2.13) the one below."""
    fused = _is_fused_on(next(leaf.device for group in groups for leaf in group["params"]))
    return torch.optim.Adagrad(groups, lr=0.0, eps=eps, fused=True) if fused else Adagrad(groups, lr=0.0, eps=eps)


class Adagrad(torch.optim.Adagrad):
    """torch.optim.Adagrad with what PyTorch's fused optimisers have; the host never waits for the device.

    grad_scale  gradients are divided by it
    found_inf   1.0 leaves parameters and state untouched, whatever the gradients are
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, groups: list[dict[str, Any]], lr: float, eps: float) -> None:
        super().__init__(groups, lr=lr, eps=eps)
        for leaf, state in self.state.items():
            state["step"] = torch.zeros((), device=leaf.device)  # else the host would have to know what was skipped

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; there is no closure to call."""
        for group in self.param_groups:
            for leaf in group["params"]:
                if leaf.grad is None:
                    continue
                state = self.state[leaf]
                gradient = torch.where(self.found_inf == 1, 0, leaf.grad / self.grad_scale)  # 0 changes nothing below
                state["step"] += 1 - self.found_inf
                state["sum"].addcmul_(gradient, gradient)
                leaf.addcdiv_(gradient, state["sum"].sqrt().add_(group["eps"]), value=-group["lr"])


def _is_fused_on(device: torch.device) -> bool:
    """Whether the fused kernel takes tensors of a device: tried, since no release of PyTorch tells."""
    number = torch.ones(1, device=device)
    number.grad = torch.ones(1, device=device)
    try:
        torch.optim.Adagrad([number], fused=True).step()
    except RuntimeError:
        return False
    return True

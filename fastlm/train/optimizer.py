"""Optimisers: built from the model's parameter groups, stepped without asking the device anything."""

from typing import Any

import torch
from torch import Tensor, nn

from fastlm.train.config import TrainConfig
from fastlm.train.protocols import as_trainable


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over model.parameter_groups().

    Each group's weight decay is config.weight_decay times its weight_decay_scale. Raises ValueError unless every
    trainable parameter is in exactly one group, since a parameter left out would silently never learn.
    """
    groups = [
        {"params": list(group["params"]), "weight_decay": config.weight_decay * group["weight_decay_scale"]}
        for group in as_trainable(model).parameter_groups()
    ]
    _check_groups(model, groups)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def update(optimizer: torch.optim.AdamW, *, learning_rate: float, divisor: Tensor, skip: Tensor) -> None:
    """Step with every gradient divided by divisor, or leave parameters and state untouched where skip is true.

    divisor, skip   float32 and bool scalars on the parameters' device; neither is read by the host

    These are the two attributes by which torch.amp.GradScaler talks to PyTorch's fused optimisers: the division happens
    inside the update itself, so averaging and clipping cost no pass over the gradients.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    fused: Any = optimizer  # the attributes below are no declared ones
    fused.grad_scale, fused.found_inf = divisor, skip.float()
    optimizer.step()


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as tensors named <parameter>/<quantity>: independent of the order of groups."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{quantity}": value
        for parameter, state in optimizer.state.items()
        for quantity, value in state.items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of state_tensors. Raises ValueError for a tensor that belongs to no trainable parameter."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        by_parameter.setdefault(name, {})[quantity] = value
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unknown = by_parameter.keys() - {names[parameter] for parameter in parameters}
    if unknown:
        raise ValueError(f"the optimizer state is of {sorted(unknown)[0]}, no trainable parameter of the model")
    state: dict[str, Any] = optimizer.state_dict()
    state["state"] = {
        index: by_parameter[names[parameter]]
        for index, parameter in enumerate(parameters)
        if names[parameter] in by_parameter
    }
    optimizer.load_state_dict(state)


def _check_groups(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    grouped = [parameter for group in groups for parameter in group["params"]]
    if len(set(grouped)) != len(grouped):
        raise ValueError("model.parameter_groups() lists a parameter twice")
    trainable = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := trainable.keys() - set(grouped):
        raise ValueError(f"model.parameter_groups() leaves out {sorted(trainable[p] for p in missing)[0]}")
    if foreign := set(grouped) - trainable.keys():
        raise ValueError(f"model.parameter_groups() lists {len(foreign)} tensors that are no trainable parameters")

"""Optimisers: built from the model's parameter groups, stepped as one without asking the device anything."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.train.knobs import Knobs
from fastlm.train.protocols import parameter_groups


@dataclasses.dataclass
class OptimizerKnobs(Knobs):
    """How gradients become updates."""

    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; the model's parameter groups exempt biases and norms."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the mean and of the squared gradient."""
    eps: float = 1e-8
    """AdamW's guard against division by zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("weight_decay")
        self.check_positive("eps")
        if len(self.betas) != 2:
            raise ValueError(f"{type(self).__name__}: betas is {self.betas!r}, expected two numbers")
        self.betas = (self.betas[0], self.betas[1])
        for beta in self.betas:
            self.check_value("betas", beta, float, "two numbers from 0 to below 1", lambda value: 0 <= value < 1)


class Optimizers:
    """All optimisers of a model, each over parameters of its own, behind one step and one state.

    AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over the model's parameter groups. Each group's weight decay is
    knobs.weight_decay times its weight_decay_scale.

    Raises ValueError unless every trainable parameter is in exactly one group, since a parameter left out would
    silently never learn, and for a parameter that no optimiser can update; TypeError for a dtype that none takes.
    """

    def __init__(self, model: nn.Module, knobs: OptimizerKnobs) -> None:
        groups = parameter_groups(model)
        _check_groups(model, groups)
        _check_memory(model)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        decayed = [
            {"params": list(group["params"]), "weight_decay": knobs.weight_decay * group["weight_decay_scale"]}
            for group in groups
        ]
        self._adamw = torch.optim.AdamW(decayed, lr=0.0, betas=knobs.betas, eps=knobs.eps, fused=True)

    @property
    def parameters(self) -> list[Tensor]:
        """Every trainable parameter, in the order of the groups."""
        return [parameter for group in self._adamw.param_groups for parameter in group["params"]]

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of those parameters that have one."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def step(self, learning_rate: float, *, divisor: Tensor, skip: Tensor) -> None:
        """Step with every gradient divided by divisor, or leave parameters and state untouched where skip is true.

        divisor, skip   float32 and bool scalars on the parameters' device; neither is read by the host

        These are the two attributes by which torch.amp.GradScaler talks to PyTorch's fused optimisers: the division
        happens inside the update itself, so averaging and clipping cost no pass over the gradients.
        """
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        fused: Any = self._adamw  # the attributes below are no declared ones
        fused.grad_scale, fused.found_inf = divisor, skip.float()
        with _dense(self.parameters):
            self._adamw.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as tensors named <parameter>/<quantity>: independent of the order of groups."""
        return {
            f"{self._names[parameter]}/{quantity}": value
            for parameter, state in self._adamw.state.items()
            for quantity, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of state_tensors.

        Raises ValueError for a tensor that belongs to no trainable parameter, is missing beside others of its
        parameter, or has another shape or dtype than AdamW's.
        """
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, quantity = key.rpartition("/")
            by_parameter.setdefault(name, {})[quantity] = value
        unknown = by_parameter.keys() - {self._names[parameter] for parameter in self.parameters}
        if unknown:
            raise ValueError(f"the optimizer state is of {sorted(unknown)[0]}, no trainable parameter of the model")
        state: dict[str, Any] = self._adamw.state_dict()
        state["state"] = {
            index: _fitted(by_parameter[name], parameter, name)
            for index, parameter in enumerate(self.parameters)
            if (name := self._names[parameter]) in by_parameter
        }
        self._adamw.load_state_dict(state)


def _fitted(tensors: dict[str, Tensor], parameter: Tensor, name: str) -> dict[str, Tensor]:
    """AdamW's state of a parameter, in the strides of its memory: the fused kernel looks at no others."""
    average, step = f"{parameter.dtype} {tuple(parameter.shape)}", f"{torch.float32} ()"
    expected = {"exp_avg": average, "exp_avg_sq": average, "step": step}
    found = {quantity: f"{tensor.dtype} {tuple(tensor.shape)}" for quantity, tensor in tensors.items()}
    for quantity in sorted(expected.keys() | found.keys()):
        was, wanted = found.get(quantity, "missing"), expected.get(quantity, "no such entry")
        if was != wanted:
            raise ValueError(f"the optimizer state {name}/{quantity} is {was}, expected {wanted}")
    averages = {key: torch.empty_like(parameter).copy_(tensors[key]) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": tensors["step"], **averages}


@contextlib.contextmanager
def _dense(parameters: list[Tensor]) -> Iterator[None]:
    """Lay parameters that are parts of a larger tensor out in one piece: the fused kernel takes them for such."""
    scattered = [(parameter, parameter.data) for parameter in parameters if _is_scattered(parameter)]
    for parameter, data in scattered:
        parameter.data = data.contiguous()
    try:
        yield
    finally:
        for parameter, data in scattered:
            data.copy_(parameter.data)
            parameter.data = data


def _is_scattered(parameter: Tensor) -> bool:
    """Whether there are gaps between the elements; a dense tensor, also a transposed one, keeps its strides."""
    return not parameter.is_contiguous() and torch.empty_like(parameter, device="meta").stride() != parameter.stride()


def _check_memory(model: nn.Module) -> None:
    """Raise unless an optimiser can update every parameter: each element is a number of its own."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not parameter.is_floating_point():
            raise TypeError(
                f"parameter {name} is {parameter.dtype}, expected a floating point dtype: AdamW takes no other"
            )
        if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
            raise ValueError(f"parameter {name} is expanded: several elements are one place in memory; clone() it")


def _check_groups(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    grouped = [parameter for group in groups for parameter in group["params"]]
    if len(set(grouped)) != len(grouped):
        raise ValueError("model.parameter_groups() lists a parameter twice")
    trainable = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := trainable.keys() - set(grouped):
        raise ValueError(f"model.parameter_groups() leaves out {sorted(trainable[p] for p in missing)[0]}")
    if foreign := set(grouped) - trainable.keys():
        raise ValueError(f"model.parameter_groups() lists {len(foreign)} tensors that are no trainable parameters")

"""Optimisers: built from the model's parameter groups, stepped as one without asking the device anything.

What they update are leaves (`leaves.py`). Each takes two scalars on the device: grad_scale, by which gradients are
divided, and found_inf, which leaves everything untouched. PyTorch's fused optimisers have these for its GradScaler, so
averaging and clipping cost no pass over the gradients; `muon.py` and `adagrad.py` add them to the two that lack them.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastlm.train.adagrad import adagrad
from fastlm.train.knobs import Knobs
from fastlm.train.leaves import Leaves
from fastlm.train.muon import Muon, hidden_matrices
from fastlm.train.protocols import parameter_groups
from fastlm.train.shards import as_sharded, is_sharded, local

OptimizerName = Literal["adamw", "sgd", "adagrad", "muon"]
MuonSize = Literal["match_rms_adamw", "original"]


@dataclasses.dataclass
class OptimizerKnobs(Knobs):
    """How gradients become updates."""

    optimizer: OptimizerName = "adamw"
    """Who updates the parameters; muon takes the hidden matrices and leaves all others to adamw."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; the model's parameter groups exempt biases and norms."""
    l1: float = 0.0
    """Penalty on the absolute values of the parameters that decay: its slope, sign(p), joins the clipped gradient."""
    l2: float = 0.0
    """Penalty on half the squares of the parameters that decay: its slope, p, joins the clipped gradient."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the mean and of the squared gradient."""
    eps: float = 1e-8
    """AdamW's and Adagrad's guard against division by zero."""
    momentum: float = 0.95
    """Momentum of SGD and Muon."""
    nesterov: bool = True
    """Nesterov's momentum for SGD and Muon, which looks one step ahead."""
    muon_size: MuonSize = "match_rms_adamw"
    """Size of Muon's updates: as AdamW's, so that the same learning rate applies, or as in the original Muon."""
    adamw_lr_ratio: float = 1.0
    """Learning rate of AdamW beside Muon, as a share of Muon's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("optimizer", get_args(OptimizerName))
        self.check_choice("muon_size", get_args(MuonSize))
        self.check_not_negative("weight_decay", "l1", "l2")
        self.check_positive("eps", "adamw_lr_ratio")
        self._check("momentum", float, "a number from 0 to below 1", lambda value: 0 <= value < 1)
        self.check_tuple("betas", "two numbers from 0 to below 1")
        if len(self.betas) != 2:
            raise ValueError(f"{type(self).__name__}: betas is {self.betas!r}, expected two numbers")
        for beta in self.betas:
            self.check_value("betas", beta, float, "two numbers from 0 to below 1", lambda value: 0 <= value < 1)


class Optimizers:
    """All optimisers of a model, each over leaves of its own, behind one step and one state.

    with_masters  make the parameters bf16 copies of fp32 masters, and update these

    Weight decay and penalties of a parameter group are those of knobs times the group's weight_decay_scale. Decay is
    decoupled from the gradient (Loshchilov and Hutter 2019, arXiv 1711.05101), whoever the optimiser is.

    Raises ValueError unless every trainable parameter is in exactly one group, since a parameter left out would
    silently never learn, and for a parameter that no optimiser can update; TypeError for a dtype that none takes.
    """

    def __init__(self, model: nn.Module, knobs: OptimizerKnobs, *, with_masters: bool = False) -> None:
        groups = parameter_groups(model)
        _check_memory(model)
        _check_groups(model, groups)
        named_groups = _divided(model, groups) if knobs.optimizer == "muon" else {knobs.optimizer: groups}
        self.leaves = Leaves(model, with_masters=with_masters)
        wholes = {leaf: parameter for parameter, leaf in self.leaves.items() if is_sharded(parameter)}
        with _dense(self.leaves.names):
            self._optimizers = {
                name: _build(name, [self._described(name, group, knobs) for group in groups], knobs, wholes)
                for name, groups in named_groups.items()
                if groups
            }

    def _described(self, name: str, group: dict[str, Any], knobs: OptimizerKnobs) -> dict[str, Any]:
        """A group as torch.optim takes it, with what `step` reads besides."""
        scale = group["weight_decay_scale"]
        decay = knobs.weight_decay * scale
        couples_decay = name in ("sgd", "adagrad")  # to the gradient: then we decay ourselves
        return {
            "params": [self.leaves[parameter] for parameter in group["params"]],
            "weight_decay": 0.0 if couples_decay else decay,
            "decoupled_decay": decay if couples_decay else 0.0,
            "l1": knobs.l1 * scale,
            "l2": knobs.l2 * scale,
            "lr_ratio": knobs.adamw_lr_ratio if (name, knobs.optimizer) == ("adamw", "muon") else 1.0,
        }

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of those leaves that have one, in the order of the groups."""
        leaves = [leaf for optimizer in self._optimizers.values() for leaf in _leaves_of(optimizer)]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the state once all of it is there, masters apart."""
        return sum(
            leaf.nbytes * sum(quantity != "step" for quantity in _QUANTITIES[name])
            for name, optimizer in self._optimizers.items()
            for leaf in _leaves_of(optimizer)
        )

    def step(self, learning_rate: float, *, divisor: Tensor, skip: Tensor) -> None:
        """Step with every gradient divided by divisor, or leave parameters and state untouched where skip is true.

        divisor, skip   float32 and bool scalars on the parameters' device; neither is read by the host
        """
        found_inf = skip.float()
        with _dense(self.leaves.names):
            for optimizer in self._optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * group["lr_ratio"]
                    _penalize(group, divisor)
                    _decay(group, skip)
                scaled: Any = optimizer  # the attributes below are no declared ones
                scaled.grad_scale, scaled.found_inf = divisor, found_inf
                optimizer.step()
        self.leaves.publish()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.leaves.zero_grad()

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as tensors named <parameter>/<quantity>: independent of the order of groups."""
        names = self.leaves.names
        parameters = {leaf: parameter for parameter, leaf in self.leaves.items()}
        return {
            f"{names[leaf]}/{quantity}": as_sharded(value, parameters[leaf])
            for optimizer in self._optimizers.values()
            for leaf, state in optimizer.state.items()
            for quantity, value in state.items()
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of state_tensors.

        Raises ValueError for a tensor that belongs to no trainable parameter, is missing beside others of its
        parameter, or has another shape or dtype than the optimiser's.
        """
        by_leaf: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, quantity = key.rpartition("/")
            by_leaf.setdefault(name, {})[quantity] = local(value)
        if unknown := by_leaf.keys() - set(self.leaves.names.values()):
            raise ValueError(f"the optimizer state is of {sorted(unknown)[0]}, no trainable parameter of the model")
        for kind, optimizer in self._optimizers.items():
            for leaf in _leaves_of(optimizer):
                name = self.leaves.names[leaf]
                found = by_leaf.get(name, {})
                if found:  # nothing before the first step
                    optimizer.state[leaf].update(_fitted(found, leaf, name, _QUANTITIES[kind], kind))


# What each optimiser remembers of a leaf: tensors like it, and the number of steps.
_QUANTITIES = {
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
    "sgd": ("momentum_buffer",),
    "adagrad": ("sum", "step"),
    "muon": ("momentum_buffer",),
}


def _build(
    name: str, groups: list[dict[str, Any]], knobs: OptimizerKnobs, wholes: Mapping[Tensor, Tensor]
) -> torch.optim.Optimizer:
    """An optimiser that knows grad_scale and found_inf; the learning rate comes with each step.

    wholes   the parameters of which leaves are local parts
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=knobs.betas, eps=knobs.eps, fused=True)
    if name == "sgd":
        return _sgd(groups, knobs)
    if name == "adagrad":
        return adagrad(groups, eps=knobs.eps)
    muon = Muon(groups, lr=0.0, momentum=knobs.momentum, nesterov=knobs.nesterov, adjust_lr_fn=knobs.muon_size)
    muon.wholes = wholes
    return muon


def _sgd(groups: list[dict[str, Any]], knobs: OptimizerKnobs) -> torch.optim.SGD:
    momentum = knobs.momentum
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=knobs.nesterov and momentum > 0, fused=True)
    for leaf in _leaves_of(sgd) if momentum else []:
        # Its own first buffers are uninitialised memory, and stay so where the first step is skipped.
        sgd.state[leaf]["momentum_buffer"] = torch.zeros_like(leaf)
    return sgd


def _leaves_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [leaf for group in optimizer.param_groups for leaf in group["params"]]


def _divided(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The groups of Muon and of AdamW: as a group says, else hidden matrices to Muon and all others to AdamW."""
    hidden = hidden_matrices(model)
    divided: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
    for group in groups:
        asked = group.get("optimizer")
        if asked not in (None, *divided):
            raise ValueError(f"model.parameter_groups() names the optimizer {asked!r}, expected 'muon' or 'adamw'")
        for name in divided:
            params = [p for p in group["params"] if (asked or ("muon" if p in hidden else "adamw")) == name]
            if wrong := [p for p in params if name == "muon" and p.dim() != 2]:
                raise ValueError(f"Muon is asked for a parameter of shape {tuple(wrong[0].shape)}, expected a matrix")
            if params:
                divided[name].append({**group, "params": params})
    if not divided["muon"]:
        raise ValueError(
            f"{type(model).__name__} has no hidden matrix for Muon: name some in parameter_groups() by "
            '"optimizer": "muon", or choose adamw'
        )
    return divided


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in group["params"] if leaf.grad is not None]


@torch.no_grad()
def _penalize(group: dict[str, Any], divisor: Tensor) -> None:
    """Add the penalties' slopes to the gradients, times the divisor by which the optimiser will divide these."""
    for leaf in _with_gradient(group) if group["l1"] or group["l2"] else []:
        assert leaf.grad is not None
        slope = group["l1"] * leaf.sign() + group["l2"] * leaf
        leaf.grad.addcmul_(slope, divisor.to(slope.dtype))


@torch.no_grad()
def _decay(group: dict[str, Any], skip: Tensor) -> None:
    """Decoupled weight decay, where the optimiser's own would go into the gradient."""
    if group["decoupled_decay"] and (leaves := _with_gradient(group)):
        torch._foreach_mul_(leaves, torch.where(skip, 1.0, 1 - group["lr"] * group["decoupled_decay"]))


def _fitted(
    tensors: dict[str, Tensor], leaf: Tensor, name: str, quantities: tuple[str, ...], kind: str
) -> dict[str, Tensor]:
    """An optimiser's state of a leaf, in the strides of its memory: the fused kernels look at no others."""
    like_leaf, step = f"{leaf.dtype} {tuple(leaf.shape)}", f"{torch.float32} ()"
    expected = {quantity: step if quantity == "step" else like_leaf for quantity in quantities}
    found = {quantity: f"{tensor.dtype} {tuple(tensor.shape)}" for quantity, tensor in tensors.items()}
    for quantity in sorted(expected.keys() | found.keys()):
        was, wanted = found.get(quantity, "missing"), expected.get(quantity, f"no such entry of {kind}")
        if was != wanted:
            raise ValueError(f"the optimizer state {name}/{quantity} is {was}, expected {wanted}")
    memory = torch.contiguous_format if _is_scattered(leaf) else torch.preserve_format
    return {
        quantity: torch.empty_like(tensor if quantity == "step" else leaf, device=leaf.device, memory_format=memory)
        .detach()
        .copy_(tensor)
        for quantity, tensor in tensors.items()
    }


@contextlib.contextmanager
def _dense(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Lay leaves that are parts of a larger tensor out in one piece: the fused kernels take them for such."""
    scattered = [(leaf, leaf.data) for leaf in leaves if _is_scattered(leaf)]
    for leaf, data in scattered:
        leaf.data = data.contiguous()
    try:
        yield
    finally:
        for leaf, data in scattered:
            data.copy_(leaf.data)
            leaf.data = data


def _is_scattered(parameter: Tensor) -> bool:
    """Whether there are gaps between the elements; a dense tensor, also a transposed one, keeps its strides."""
    return not parameter.is_contiguous() and torch.empty_like(parameter, device="meta").stride() != parameter.stride()


def _check_memory(model: nn.Module) -> None:
    """Raise unless an optimiser can update every parameter: each element is a number of its own."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: there is nothing to train")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not parameter.is_floating_point():
            raise TypeError(
                f"parameter {name} is {parameter.dtype}, expected a floating point dtype: no optimiser takes another"
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

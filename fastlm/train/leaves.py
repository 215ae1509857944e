"""Leaves: the tensors that optimisers update, one for each trainable parameter, and how gradients reach them.

parameter itself   its .grad is the leaf's
fp32 master        of a bf16 parameter: after each backward its gradient is added to the master's .grad and freed,
                   so that many small gradients of an accumulation are not lost to bf16's eight bits; after a step
                   the parameter is the master, rounded
local part         of a parameter that is shared out over ranks: the memory and the gradient that are here. The fused
                   kernels take no mixture of sharded parameters and plain scalars, which divisor and skip are
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.train.distributed import Ranks
from fastlm.train.shards import as_sharded, is_sharded, local

_HOOK = "_fastlm_master_hook"  # attribute of a parameter: the handle of its hook


class Leaves:
    """The leaves of a model, in the order of its parameters.

    with_masters   turn every floating-point parameter, those of norms included, into bf16; trainable ones get a master.
                   Buffers, which hold statistics and tables, stay as they are. Parameters that are shared out are
                   their own masters: what computes is a bf16 copy that FSDP makes

    A checkpoint holds state_dict, which is the same in any precision: a run may be resumed in another one.
    """

    def __init__(self, model: nn.Module, *, with_masters: bool = False) -> None:
        self.are_sharded = any(is_sharded(parameter) for parameter in model.parameters())
        self.with_masters = with_masters and not self.are_sharded
        for parameter in model.parameters():
            _unhook(parameter)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._leaves: dict[Tensor, Tensor] = {parameter: self._leaf(parameter) for _, parameter in named}
        self.names: dict[Tensor, str] = {self._leaves[parameter]: name for name, parameter in named}
        self._frozen: dict[Tensor, torch.dtype] = {}  # dtypes of the parameters that were made bf16 without a master
        if self.with_masters:
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    if not parameter.requires_grad:
                        self._frozen[parameter] = parameter.dtype
                    parameter.data = parameter.data.bfloat16()

    def _leaf(self, parameter: Tensor) -> Tensor:
        if is_sharded(parameter):
            return nn.Parameter(local(parameter))
        if not self.with_masters:
            return parameter
        master = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        setattr(parameter, _HOOK, parameter.register_post_accumulate_grad_hook(_adds_to(master)))  # type: ignore[attr-defined]
        return master

    def __getitem__(self, parameter: Tensor) -> Tensor:
        """The leaf of a parameter."""
        return self._leaves[parameter]

    def items(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, leaf) of every trainable parameter."""
        return list(self._leaves.items())

    @property
    def masters(self) -> list[Tensor]:
        """The leaves that take memory beside the parameters."""
        return list(self._leaves.values()) if self.with_masters else []

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The model's state_dict before parameters became bf16: masters, and frozen parameters in their own dtype."""
        if not self.with_masters:
            return model.state_dict()
        frozen = {parameter: parameter.detach().to(dtype) for parameter, dtype in self._frozen.items()}
        return model.state_dict() | by_name(model, self._leaves | frozen)

    @torch.no_grad()
    def adopt(self, model: nn.Module, saved: Mapping[str, Any]) -> None:
        """Let the masters follow what state_dict gave, which was loaded into the model."""
        for name, master in by_name(model, self._leaves).items() if self.with_masters else ():
            master.copy_(saved[name])

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter, leaf in self._leaves.items():
            parameter.grad = leaf.grad = None

    def take_gradients(self, ranks: Ranks) -> None:
        """Give the leaves what backward has left elsewhere, and add up over ranks what no hook has.

        The latter are the masters' gradients, in fp32 and once per step.
        Raises ValueError where there are several ranks and one of them has no gradient of a parameter.
        """
        for parameter, leaf in self._leaves.items() if self.are_sharded else ():
            if is_sharded(parameter):  # FSDP may have moved the memory
                leaf.data = local(parameter)
                leaf.grad = None if parameter.grad is None else local(parameter.grad)
        if ranks.world_size == 1:
            return
        check_all_used([name for leaf, name in self.names.items() if leaf.grad is None])
        for leaf in self.masters:
            assert leaf.grad is not None
            ranks.sum(leaf.grad)

    @torch.no_grad()
    def publish(self) -> None:
        """Let the parameters follow their leaves."""
        if self.with_masters and self._leaves:
            torch._foreach_copy_(list(self._leaves.keys()), list(self._leaves.values()))


def check_all_used(without_gradient: Sequence[str]) -> None:
    """Raise ValueError, naming the first, if parameters have no gradient: the sum over ranks waits for each."""
    if without_gradient:
        others = f" nor have {len(without_gradient) - 1} others" if len(without_gradient) > 1 else ""
        raise ValueError(
            f"parameter {without_gradient[0]} has no gradient{others}, and with several ranks each needs one in every "
            "step: freeze it with requires_grad_(False), or let the loss use it, if only as 0 * parameter.sum()"
        )


def by_name(model: nn.Module, values: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """What belongs to parameters, by the names of the state_dict: a tied weight has several."""
    return {
        name: as_sharded(values[parameter], parameter)
        for name, parameter in model.state_dict(keep_vars=True).items()
        if isinstance(parameter, nn.Parameter) and parameter in values
    }


def _adds_to(master: Tensor) -> Callable[[Any], None]:
    """A hook that moves a parameter's fresh gradient into its master's."""

    def hook(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None, "PyTorch calls the hook right after it wrote the gradient"
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad += gradient

    return hook


def _unhook(parameter: Tensor) -> None:
    """Remove the hook that an earlier trainer of the same model left, which would take the gradients away."""
    if handle := getattr(parameter, _HOOK, None):
        handle.remove()
        delattr(parameter, _HOOK)

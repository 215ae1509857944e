"""Activation checkpointing: a block keeps little of its forward pass and computes the rest again in backward.

    none       all that backward reads is kept
    selective  the block's inputs, and results of matrix products and attention as far as a budget goes
    full       the block's inputs alone

The budget is a share of what none keeps. A matrix product of C features costs 2 C FLOPs for each number of its result,
whatever its width, so which of them are kept hardly matters, only how many: results are given up in the order of FLOPs
per byte until the rest fits. To keep all of them is no half: a block of GPT-2 keeps 16 C numbers of a token, and its
input, q, k and v, the result of attention, that of the projection and that of the first feed-forward layer are 10 C.

Sources: Chen et al. 2016, arXiv 1604.06174 (full); Korthikanti et al. 2022, arXiv 2205.05198 (selective). torchtitan
keeps every second matrix product. PyTorch's activation_memory_budget solves the same knapsack in the graph that its
compiler sees (torch/_functorch/partitioners.py); here no compiler is needed.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastlm.train.knobs import Knobs

ActivationCheckpointing = Literal["none", "selective", "full"]

SELECTIVE_BUDGET = 0.5
# What costs much to compute again, by namespace; those that are not registered in this process are passed over.
_COSTLY_OPS = {
    "aten": [
        *("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm", "convolution"),
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
    ],
    "torch_attn": ["_varlen_attn"],
    "flash_attn": ["_flash_attn_forward", "_flash_attn_varlen_forward"],
    "fastlm": ["attention"],
}


@dataclasses.dataclass
class ActivationKnobs(Knobs):
    """What the blocks of the model keep for backward."""

    activation_checkpointing: ActivationCheckpointing = "none"
    """What blocks keep for backward: all, selected results, or in full checkpointing their inputs alone."""
    activation_memory_budget: float | None = None
    """Share of what none keeps that selective may keep, from 0 (as full) to 1 (as none); None is a half."""
    offload_activations: bool = False
    """Hold what a GPU's blocks save in the host's memory; with selective, their inputs alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("activation_checkpointing", get_args(ActivationCheckpointing))
        if self.activation_memory_budget is None:
            return
        self.check_shares("activation_memory_budget")
        if self.activation_checkpointing != "selective":
            raise ValueError(
                f"{type(self).__name__}: activation_memory_budget is {self.activation_memory_budget} and "
                f"activation_checkpointing {self.activation_checkpointing}, expected selective: it alone has a budget"
            )


# What is checkpointed


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """(name, modules) of model.blocks, else of the longest list of modules of one class; ("", []) if there is none."""
    own = getattr(model, "blocks", None)
    if isinstance(own, nn.ModuleList | nn.Sequential | list | tuple) and len(own):
        return "blocks", list(own)
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and len(set(map(type, module))) == 1
    ]
    return max(lists, key=lambda found: len(found[1]), default=("", []))


def saved_ops(model: nn.Module) -> frozenset[OpOverload]:
    """The ops whose results are worth keeping: the model's own list, or matrix products and attention."""
    if callable(own := getattr(model, "saved_ops", None)):
        return frozenset(own())
    import torch.nn.attention.varlen  # registers torch_attn, and imports torch.compile: not before it is needed

    found = (getattr(getattr(torch.ops, space), name, None) for space, names in _COSTLY_OPS.items() for name in names)
    return frozenset(packet.default for packet in found if packet is not None)


def checkpoint_activations(model: nn.Module, knobs: ActivationKnobs) -> None:
    """Change what the blocks of model keep, in place; parameters keep their names.

    Until `keep_within_budget` is called, selective keeps the result of every saved op.
    Raises ValueError if blocks are asked for and the model has none.
    """
    mode, offloads = knobs.activation_checkpointing, knobs.offload_activations
    _, blocks = find_blocks(model)
    for block in blocks:
        _restore(block)  # what an earlier trainer of the same model has put there
    if mode == "none" and not offloads:
        return
    if not blocks:
        asked = "offload_activations is set" if mode == "none" else f"activation_checkpointing is {mode}"
        raise ValueError(
            f"{asked}, but {type(model).__name__} has neither an attribute blocks nor a ModuleList of several modules "
            "of one class: call the list of its layers blocks, or leave the option out"
        )
    kept = frozenset[int]() if mode == "full" else None
    ops = saved_ops(model) if mode == "selective" else frozenset()
    for block in blocks:
        # An attribute of the instance: a module around it, as PyTorch's checkpoint_wrapper is, would rename parameters.
        vars(block)["forward"] = CheckpointedForward(block, ops, kept, recomputes=mode != "none", offloads=offloads)


class CheckpointedForward:
    """Stands in the place of a block's forward.

    kept  which calls of the saved ops, by their order in the block, keep their results; None: all
    """

    def __init__(
        self,
        block: nn.Module,
        ops: frozenset[OpOverload],
        kept: frozenset[int] | None,
        recomputes: bool,
        offloads: bool,
    ) -> None:
        self.block, self.ops, self.kept, self.recomputes, self.offloads = block, ops, kept, recomputes, offloads
        self.inner = vars(block).get("forward")  # where somebody has put another one before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.inner or partial(type(self.block).forward, self.block)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with _Offload(self.block) if self.offloads else contextlib.nullcontext():
            if not self.recomputes:
                return forward(*args, **kwargs)
            if self.kept is not None and not self.kept:
                return checkpoint(forward, *args, use_reentrant=False, **kwargs)
            contexts = partial(_contexts, self.ops, self.kept)
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(ops: frozenset[OpOverload], kept: frozenset[int] | None) -> tuple[Any, Any]:
    contexts = create_selective_checkpoint_contexts(_Policy(ops, kept))
    if torch.compiler.is_compiling():
        return contexts  # the compiler wants PyTorch's own, and a policy for every op
    return _OnlyOps(contexts[0], ops), _OnlyOps(contexts[1], ops)


class _OnlyOps(TorchDispatchMode):
    """Shows PyTorch's mode the saved ops alone.

    It insists that every op it sees comes as often in recomputation, and autocast's casts do not: of a weight that two
    blocks share, the forward pass casts once, recomputation once for each block.
    """

    def __init__(self, mode: Any, ops: frozenset[OpOverload]) -> None:
        super().__init__()
        self._mode, self._ops = mode, ops

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._mode.__torch_dispatch__(op, types, args, kwargs) if op in self._ops else op(*args, **kwargs)


class _Policy:
    """Says of each op of one forward pass whether its result is kept."""

    def __init__(self, ops: frozenset[OpOverload], kept: frozenset[int] | None) -> None:
        self._ops, self._kept = ops, kept
        self._calls = {False: 0, True: 0}  # of the forward pass, and of recomputation, where PyTorch 2.11 asks again

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op not in self._ops:
            return CheckpointPolicy.PREFER_RECOMPUTE
        call = self._calls[context.is_recompute]
        self._calls[context.is_recompute] += 1
        is_kept = self._kept is None or call in self._kept
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


class _Offload(saved_tensors_hooks):
    """PyTorch's save_on_cpu, but for parameters: they stay on the GPU anyway, and copies of them would only cost."""

    def __init__(self, block: nn.Module) -> None:
        parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        hooks = save_on_cpu(pin_memory=torch.cuda.is_available())

        def pack(tensor: Tensor) -> Any:
            return tensor if tensor.untyped_storage().data_ptr() in parameters else hooks.pack_hook(tensor)

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else hooks.unpack_hook(packed)

        super().__init__(pack, unpack)


# What fits a budget


@dataclasses.dataclass(frozen=True)
class Result:
    """What a call of a saved op gives, as far as recomputation would reach that call."""

    num_bytes: int
    flops: float


@dataclasses.dataclass(frozen=True)
class BlockProfile:
    """What a block keeps for backward, in bytes, and which results could be kept instead."""

    everything: int
    largest: int  # of a single tensor in it
    inputs: int
    results: tuple[Result, ...]


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Whether a block is checkpointed, and if so which results it keeps, by their order."""

    recomputes: bool
    kept: frozenset[int] = frozenset()

    def num_bytes(self, profile: BlockProfile) -> int:
        """What a block of that profile keeps under this plan."""
        if not self.recomputes:
            return profile.everything
        return profile.inputs + sum(profile.results[index].num_bytes for index in self.kept)


def plan(profiles: Sequence[BlockProfile], mode: ActivationCheckpointing, budget: float | None) -> list[BlockPlan]:
    """What each block keeps: with selective, at most the budget's share of everything, at the least FLOPs in backward.

    Where the budget is below the inputs of all blocks, these alone are kept.
    """
    if mode != "selective":
        return [BlockPlan(recomputes=mode == "full")] * len(profiles)
    limit = (SELECTIVE_BUDGET if budget is None else budget) * sum(profile.everything for profile in profiles)
    kept = [set(range(len(profile.results))) for profile in profiles]
    excess = sum(profile.inputs + sum(r.num_bytes for r in profile.results) for profile in profiles) - limit
    for (block, index), result in _cheapest_first(profiles):
        if excess <= 0:
            break
        kept[block].discard(index)
        excess -= result.num_bytes
    plans = [BlockPlan(True, frozenset(indices)) for indices in kept]
    for index, profile in enumerate(profiles):  # what is left of the budget spares whole blocks
        more = profile.everything - plans[index].num_bytes(profile)
        if more <= -excess:
            plans[index], excess = BlockPlan(recomputes=False), excess + more
    return plans


def _cheapest_first(profiles: Sequence[BlockProfile]) -> list[tuple[tuple[int, int], Result]]:
    """((block, index), result) of all results, in the order of FLOPs per byte."""
    found = [
        ((block, index), result)
        for block, profile in enumerate(profiles)
        for index, result in enumerate(profile.results)
    ]
    return sorted(found, key=lambda item: item[1].flops / max(1, item[1].num_bytes))


def keep_within_budget(model: nn.Module, plans: Sequence[BlockPlan]) -> None:
    """Make the blocks that `checkpoint_activations` has changed keep what the plans say."""
    for block, its_plan in zip(find_blocks(model)[1], plans, strict=True):
        forward = vars(block).get("forward")
        if isinstance(forward, CheckpointedForward):
            forward.recomputes, forward.kept = its_plan.recomputes, its_plan.kept


def _restore(block: nn.Module) -> None:
    """Give a block the forward back that it had before `checkpoint_activations`."""
    forward = vars(block).get("forward")
    if isinstance(forward, CheckpointedForward):
        del vars(block)["forward"]
        if forward.inner is not None:
            vars(block)["forward"] = forward.inner


@contextlib.contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Run the blocks as they were before `checkpoint_activations`."""
    replaced: list[tuple[nn.Module, CheckpointedForward]] = [
        (block, forward)
        for block in find_blocks(model)[1]
        if isinstance(forward := vars(block).get("forward"), CheckpointedForward)
    ]
    for block, _ in replaced:
        _restore(block)
    try:
        yield
    finally:
        for block, forward in replaced:
            vars(block)["forward"] = forward

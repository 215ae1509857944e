"""What a step takes of the device's memory: estimated before the first one, compared with the peak after the last.

    total = weights + gradients + optimizer state + activations + loss

The activations are not computed by a formula: a forward pass on the first batch counts the storages that autograd asks
to keep, and keeps none of them, so it takes no more memory than inference and works for anyone's model. From the same
counts follows what fewer rows or another checkpointing would take, and so what fits where memory is short.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastlm.module_state import unchanged
from fastlm.train import random_state
from fastlm.train.activation_checkpointing import (
    ActivationCheckpointing,
    BlockPlan,
    BlockProfile,
    Result,
    find_blocks,
    keep_within_budget,
    plan,
    saved_ops,
    without_checkpointing,
)
from fastlm.train.config import TrainConfig
from fastlm.train.distributed import Ranks
from fastlm.train.optimizers import Optimizers
from fastlm.train.precision import DevicePrecision
from fastlm.train.progress import count
from fastlm.train.protocols import Batch
from fastlm.train.throughput import peak_memory, resident_memory

NOTICEABLE = 10_000_000  # bytes: what a process holds besides varies by more, and no device lacks them


class OutOfMemoryError(OSError, RuntimeError):
    """A step did not fit the device's memory; the message says what would."""


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's CPU allocator has no class of its own for it, nor for a size that overflows."""
    words = ["out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc"]
    words += ["Storage size calculation overflowed", "integer multiplication overflow"]
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and not isinstance(error, OSError) and any(word in str(error) for word in words)
    )


# What a forward pass keeps


@dataclasses.dataclass(frozen=True)
class ForwardProfile:
    """Bytes that a forward pass of a batch keeps for backward where nothing is checkpointed."""

    rows: int
    blocks: tuple[BlockProfile, ...]
    others: int  # kept before and between the blocks, by an embedding, say; by all of a model without blocks
    loss: int  # kept after the last block
    gradients: int  # of weights, which a loss may make in its forward pass: as many for any number of rows
    casts: int  # copies of the weights in autocast's dtype: as many for any number of rows


def profile_forward(model: nn.Module, batch: Batch, precision: DevicePrecision) -> ForwardProfile:
    """Run the model forward on a batch and count; random numbers, buffers and attributes of modules stay as they are.

    Raises whatever the model raises, and RuntimeError if it computes gradients within its forward pass.
    """
    blocks = find_blocks(model)[1]
    recorder = _Recorder(model, len(blocks))
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state.preserved(precision.device))
        stack.enter_context(unchanged(model))
        stack.enter_context(without_checkpointing(model))
        for index, block in enumerate(blocks):
            enter, leave = recorder.hooks(index)
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        stack.enter_context(precision.autocast())
        stack.enter_context(saved_tensors_hooks(recorder.pack, _refuse))
        stack.enter_context(recorder)
        # forward, not the module itself: a model that is to be compiled would be compiled under these hooks
        model.forward(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
    return recorder.profile(rows=batch.tokens.shape[0])


def _refuse(packed: None) -> Tensor:
    raise RuntimeError("the model computes gradients within its forward pass")


class _Block:
    """What is counted of one block."""

    def __init__(self) -> None:
        self.everything = self.largest = self.inputs = 0
        self.results: list[Result] = []
        self.num_reached = 0  # results that were there when the last tensor was saved: recomputation ends there


class _Recorder(TorchDispatchMode):
    """Counts storages once each, for the block that saves them first; those of parameters and buffers not at all."""

    def __init__(self, model: nn.Module, num_blocks: int) -> None:
        super().__init__()
        self._own = {_storage(tensor) for tensor in _with_storage([*model.parameters(), *model.buffers()])}
        self._weight_shapes = {parameter.shape for parameter in model.parameters() if parameter.dim() > 1}
        self._ops = saved_ops(model)
        # References that keep no memory: the address of a storage is not given to another one while they live.
        self._casts: set[StorageWeakRef] = set()
        self._saved: set[StorageWeakRef] = set()
        self._inputs: set[StorageWeakRef] = set()
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._block: _Block | None = None
        self._num_left = 0  # blocks that are done
        self._others = self._loss = self._gradients = self._cast_bytes = 0

    def hooks(self, index: int) -> tuple[Any, Any]:
        """(forward_pre_hook, forward_hook) of a block."""

        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            self._block = self._blocks[index]
            for tensor in _tensors((args, kwargs)):
                self._block.inputs += self._count(tensor, self._inputs)

        def leave(block: nn.Module, args: Any, output: Any) -> None:
            self._block = None
            self._num_left += 1

        return enter, leave

    def pack(self, tensor: Tensor) -> None:
        """Count a tensor that autograd saves, and keep nothing of it."""
        if self._block is not None:
            self._block.num_reached = len(self._block.results)
        num_bytes = self._count(tensor, self._saved)
        if self._block is not None:
            self._block.everything += num_bytes
            self._block.largest = max(self._block.largest, num_bytes)
        elif not self._blocks or self._num_left < len(self._blocks):
            self._others += num_bytes
        elif tensor.shape in self._weight_shapes:
            self._gradients += num_bytes
        else:
            self._loss += num_bytes

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten._to_copy.default and any(_storage(x) in self._own for x in _tensors(args[0])):
            self._cast_bytes += self._count(out, self._casts)
        if self._block is not None and op in self._ops:
            formula = flop_registry.get(op.overloadpacket)
            flops = float(formula(*args, **(kwargs or {}), out_val=out)) if formula else float("inf")
            storages = {_storage(tensor): tensor for tensor in _tensors(out)}
            num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
            self._block.results.append(Result(num_bytes, flops))
        return out

    def _count(self, tensor: Tensor, seen: set[StorageWeakRef]) -> int:
        """Bytes of the tensor's storage, if it is neither seen yet nor one of the model's own."""
        if tensor.layout != torch.strided:
            return 0
        storage = _storage(tensor)
        if storage in seen or storage in self._own or storage in self._casts:
            return 0
        seen.add(storage)
        return tensor.untyped_storage().nbytes()

    def profile(self, rows: int) -> ForwardProfile:
        blocks = tuple(
            BlockProfile(block.everything, block.largest, block.inputs, tuple(block.results[: block.num_reached]))
            for block in self._blocks
        )
        return ForwardProfile(rows, blocks, self._others, self._loss, self._gradients, self._cast_bytes)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _tensors(tree: Any) -> list[Tensor]:
    return _with_storage(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _with_storage(tensors: Iterable[Tensor]) -> list[Tensor]:
    """All but sparse tensors and the like, of which nothing is counted."""
    return [tensor for tensor in tensors if tensor.layout == torch.strided]


# What a step takes


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of a step, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = [f"{name} {count(num_bytes)}B" for name, num_bytes in dataclasses.asdict(self).items()]
        return f"about {count(self.total)}B = {' + '.join(parts)}"


class StepMemory:
    """Memory of the steps of one run: the estimate, the peak, and advice where a step does not fit."""

    def __init__(
        self, model: nn.Module, optimizers: Optimizers, config: TrainConfig, precision: DevicePrecision, ranks: Ranks
    ) -> None:
        self._model, self._optimizers, self._config, self._precision = model, optimizers, config, precision
        self._num_batches = config.grad_accumulation_steps
        self._holds_gradients = ranks.world_size > 1  # in buckets that are there from the first step on
        self._weights = _bytes_of([*model.parameters(), *model.buffers()])
        self._gradients = _bytes_of(optimizers.leaves.names)
        self._profile: ForwardProfile | None = None
        self._num_steps = 0  # of this process so far

    @contextlib.contextmanager
    def of_step(self, step: int, batch: Batch, on_log: Callable[[str], None]) -> Iterator[None]:
        """Run a step that begins with that batch: the estimate is told before the first, the peak after the second.

        Raises OutOfMemoryError, which says what would fit, where the step fails for want of memory.
        """
        try:
            if self._num_steps == 0 and (line := self.prepare(batch)):
                on_log(line)
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise OutOfMemoryError(f"out of memory in step {step}: {self.advice()} ({reason})") from error
        self._num_steps += 1
        if self._num_steps == 2 and (line := self.compared()):  # the first made the optimiser's state at its end
            on_log(line)

    def prepare(self, batch: Batch) -> str | None:
        """Profile the model on its first batch, and let its blocks keep what fits the budget; a line for the user.

        None where a step takes so little that nobody need know.

        Raises what says that memory is short; another error of the model only costs the estimate.
        """
        self._state = _bytes_of([*self._optimizers.state_tensors().values(), *self._optimizers.leaves.masters])
        self._resident = self._peak = None
        kept = "; every product is kept" if self._config.activation_checkpointing == "selective" else ""
        if self._optimizers.leaves.are_sharded:  # a rank that fails in its forward pass would leave the others waiting
            return f"memory of a step is not estimated where ranks share the model out{kept}"
        try:
            self._profile = profile_forward(
                self._model, batch.to(self._precision.device, non_blocking=True), self._precision
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return f"memory of a step is not estimated{kept}: {' '.join(str(error).split()) or type(error).__name__}"
        keep_within_budget(self._model, self._plans())
        self._resident, self._peak = resident_memory(), peak_memory(self._precision.device)
        estimate = self.estimate()
        return f"memory of a step: {estimate}" if estimate.total >= NOTICEABLE else None

    def estimate(self, rows: int | None = None, mode: ActivationCheckpointing | None = None) -> Estimate:
        """What a step takes with so many rows in a batch and that checkpointing; None: as configured."""
        profile = self._profile
        assert profile is not None, "prepare comes first"
        share = 1.0 if rows is None else rows / profile.rows
        plans = self._plans(mode)
        activations = round(share * (profile.others + _peak_of_blocks(profile.blocks, plans)))
        # Where a block is computed again, its weights are cast again too.
        casts = profile.casts if not any(its_plan.recomputes for its_plan in plans) else 0
        loss = round(share * profile.loss)
        # Of a single batch, gradients come as activations go; of several, they are there while the next one is kept.
        holds_gradients = self._holds_gradients or self._num_batches / share > 1
        single = max(profile.gradients, self._gradients - activations - loss)
        return Estimate(
            weights=self._weights + casts,
            gradients=self._gradients + profile.gradients if holds_gradients else single,
            optimizer=self._optimizers.nbytes + _bytes_of(self._optimizers.leaves.masters),
            activations=activations,
            loss=loss,
        )

    def _plans(self, mode: ActivationCheckpointing | None = None) -> list[BlockPlan]:
        assert self._profile is not None, "prepare comes first"
        budget = self._config.activation_memory_budget
        return plan(self._profile.blocks, mode or self._config.activation_checkpointing, budget)

    def compared(self) -> str | None:
        """The measured peak beside the estimate, in a line for the user; None where one of them is not known.

        On a GPU PyTorch's allocator counts. On a CPU it is the growth of the process's resident memory since before the
        first step, code that was loaded for it included; not known if the process held more before than in any step.
        """
        peak = peak_memory(self._precision.device)
        if self._profile is None or peak is None or self.estimate().total < NOTICEABLE:
            return None
        if self._precision.device.type == "cuda":
            return f"memory: {count(peak)}B at the peak, {count(self.estimate().total)}B estimated"
        if self._resident is None or self._peak is None or peak <= self._peak:
            return None
        expected = self.estimate().total - self._weights - self._state
        return f"memory: grew by {count(peak - self._resident)}B at the peak, {count(expected)}B estimated"

    def advice(self) -> str:
        """Which batch size, accumulation or checkpointing would fit the device, at the same tokens per step."""
        if self._profile is None:
            return "take a smaller batch_size with more grad_accumulation_steps, or a smaller model"
        present, estimate = _present(self._precision.device), self.estimate()
        limit = min(estimate.total - 1, present)  # what was tried does not fit, whatever the device is said to have
        tried = f"batch_size {self._profile.rows} takes {estimate}"
        modes = get_args(ActivationCheckpointing) if self._profile.blocks else ()
        modes = modes[modes.index(self._config.activation_checkpointing) + 1 :] if modes else ()
        options = [self._option(rows, None) for rows in self._smaller_batches()]
        fitting = [told for told, total in options if total <= limit][:1]
        fitting += [told for told, total in (self._option(None, mode) for mode in modes) if total <= limit]
        if not fitting:
            both = [self._option(rows, "full") for rows in self._smaller_batches()]
            fitting = [told for told, total in both if total <= limit][:1]
        of_present = f" of {count(present)}B" if present < float("inf") else ""
        if not fitting:
            return f"{tried}{of_present}, and no smaller batch_size fits: take a smaller model or shorter rows"
        return f"{tried}{of_present}; with as many tokens per step these fit: {', or '.join(fitting)}"

    def _smaller_batches(self) -> list[int]:
        """Numbers of rows that divide those of the batch, the largest first."""
        assert self._profile is not None, "prepare comes first"
        rows = self._profile.rows
        return [rows // parts for parts in range(2, rows + 1) if rows % parts == 0]

    def _option(self, rows: int | None, mode: ActivationCheckpointing | None) -> tuple[str, int]:
        """(what to set, bytes that a step then takes)."""
        assert self._profile is not None, "prepare comes first"
        total = self.estimate(rows, mode).total
        knobs = [f"activation_checkpointing {mode}"] if mode else []
        if rows:
            knobs.append(
                f"batch_size {rows} with grad_accumulation_steps {self._num_batches * self._profile.rows // rows}"
            )
        return f"{' and '.join(knobs)} (about {count(total)}B)", total


def _peak_of_blocks(profiles: Sequence[BlockProfile], plans: Sequence[BlockPlan]) -> int:
    """Most bytes that blocks hold in backward, which goes from the last to the first.

    It holds what the blocks up to one have kept, what that one computes again, and the gradient of its widest tensor.
    """
    peak = kept = 0
    for profile, its_plan in zip(profiles, plans, strict=True):
        its_own = its_plan.num_bytes(profile)
        peak = max(peak, kept + max(its_own, profile.everything) + profile.largest)
        kept += its_own
    return peak


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once; of a tensor that is shared out over ranks, of this rank's part."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum({_storage(tensor): tensor.untyped_storage().nbytes() for tensor in _with_storage(local)}.values())


def _present(device: torch.device) -> float:
    """Bytes of a GPU that this process has or can get. What a CPU's can get depends on who else asks: infinite."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)

"""What is done to a model before it trains, in this order: checkpointed, compiled, replicated or sharded over ranks.

Gradients are summed, not averaged, over ranks: the trainer divides once, by the number of valid tokens of all ranks, so
ranks with more tokens count for more and two ranks equal two accumulated batches to the bit.
"""

import contextlib
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlm.train.activation_checkpointing import ActivationKnobs, checkpoint_activations
from fastlm.train.distributed import Ranks
from fastlm.train.leaves import check_all_used
from fastlm.train.shards import is_sharded

DataParallel = Literal["auto", "ddp", "fsdp"]

# torch 2.13 renamed the argument and warns of the old name
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


@dataclasses.dataclass
class ParallelKnobs(ActivationKnobs):
    """What is done to the model before it trains."""

    compile: bool = False
    """Compile the model with torch.compile before the first step."""
    cuda_graphs: bool = False
    """With compile: record the kernels of a step once, on a CUDA device, and replay them without the host."""
    data_parallel: DataParallel = "auto"
    """How ranks share the work: ddp keeps all weights on each, fsdp a part of them (FSDP2); auto is ddp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("data_parallel", get_args(DataParallel))
        if self.cuda_graphs and not self.compile:
            raise ValueError(f"{type(self).__name__}: cuda_graphs is true and compile is not, expected both")
        if self.compile and self.offload_activations:
            raise ValueError(
                f"{type(self).__name__}: compile and offload_activations are both set, expected one of them: "
                "torch.compile does not follow tensors to the host's memory"
            )


def parallelize(
    model: nn.Module, knobs: ParallelKnobs, device: torch.device, ranks: Ranks, *, has_masters: bool = False
) -> nn.Module:
    """What to call in place of the model: the same function of the same parameters.

    has_masters  the model computes in bf16 parameters that have fp32 masters. These are the parameters themselves where
                 FSDP makes bf16 copies; else `leaves.py` keeps them, and sums their gradients in the place of backward

    Raises ValueError if the device cannot do what knobs ask for.
    """
    if knobs.cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a CUDA device, and this is {device.type}")
    checkpoint_activations(model, knobs)
    if knobs.compile:
        model.compile(**({"mode": "reduce-overhead"} if knobs.cuda_graphs else {}))
    if ranks.world_size == 1:
        return model
    if knobs.data_parallel == "fsdp":
        return _sharded(model, device, ranks, has_masters=has_masters)
    if has_masters:
        _copy_from_main([*model.parameters(), *model.buffers()])
        return model
    return _replicated(model, device)


class CompilationError(OSError, RuntimeError):
    """torch.compile did not work on this machine: it has no compiler, say."""


@contextlib.contextmanager
def naming_compiler_failures(knobs: ParallelKnobs) -> Iterator[None]:
    """Tell a failure of torch.compile from a failure of training."""
    try:
        yield
    except RuntimeError as error:
        if not knobs.compile or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        reason = textwrap.shorten(str(error), 400, placeholder=" ...")  # it may hold a compiler's whole output
        raise CompilationError(
            f"torch.compile failed: {reason}; train without compile, or install what it asks for; the checkpoints "
            "are unharmed"
        ) from error


def _replicated(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, summing its gradients over ranks during backward."""
    options: dict[str, Any] = {_SYNC_BUFFERS: False}  # those that change are (Buffers); tables of a model are not
    device_ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **options)
    wrapped.register_comm_hook(None, _sum_gradients)
    return wrapped


def _sum_gradients(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def _sharded(model: nn.Module, device: torch.device, ranks: Ranks, *, has_masters: bool) -> nn.Module:
    """The model with its parameters, and so gradients and optimiser state, shared out over ranks, block by block.

    A block's parameters are gathered when it runs and freed after; those outside of model.blocks stay from the forward
    pass to the end of the backward pass, since both need them first and last.

    Raises ValueError if the parameters are of several dtypes, or if a block shares one with the rest of the model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    blocks = list(getattr(model, "blocks", ()))
    _check_shardable(model, blocks)
    _copy_from_main([*model.parameters(), *model.buffers()])
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    is_half = has_masters or any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if has_masters else None,
        reduce_dtype=torch.float32 if is_half else None,  # 16 bits are summed in 32
        cast_forward_inputs=False,  # else the tables of rotary positions would be bf16 too
    )
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # sums
        module.set_force_sum_reduction_for_comms(True)  # else it multiplies while it sums, which gloo does not know
    return model


def _check_shardable(model: nn.Module, blocks: list[nn.Module]) -> None:
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError("data_parallel fsdp: the model is shared out already, by an earlier trainer: build it anew")
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    if len(dtypes) > 1:
        raise ValueError(
            f"data_parallel fsdp: the model's parameters are {', '.join(dtypes)}, expected one dtype: use ddp, or make "
            "them one"
        )
    in_blocks = {module for block in blocks for module in block.modules()}
    rest = [module for module in model.modules() if module not in in_blocks]
    units = [set(block.parameters()) for block in blocks]
    units.append({parameter for module in rest for parameter in module.parameters(recurse=False)})
    if sum(map(len, units)) != len(set().union(*units)):
        raise ValueError(
            "data_parallel fsdp: a block shares a parameter with another, or with what is no block: use ddp"
        )


def _copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values of rank 0, as DDP does before it starts: weights may be drawn from other seeds."""
    for tensor in tensors:
        if tensor.layout == torch.strided:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0)
            tensor.detach().copy_(whole)


class Buffers:
    """Keeps buffers that a model changes as it runs, such as running means, alike on all ranks: as rank 0 has them.

    A checkpoint holds rank 0's, so a run in which each rank went on with its own could not be resumed exactly.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._buffers = list(model.buffers()) if ranks.world_size > 1 else []
        self._versions = [buffer._version for buffer in self._buffers]
        self._ranks = ranks

    def agree(self) -> None:
        """After a step: send those around that it changed on any rank."""
        if not self._buffers:
            return
        changed = [buffer._version != version for buffer, version in zip(self._buffers, self._versions, strict=True)]
        counts = self._ranks.sum(torch.tensor(changed, dtype=torch.int32)).tolist()
        for buffer, count in zip(self._buffers, counts, strict=True):
            if count:
                _copy_from_main([buffer])
        self._versions = [buffer._version for buffer in self._buffers]


@contextlib.contextmanager
def gradients_summed(forward: nn.Module, now: bool) -> Iterator[None]:
    """Sum gradients over ranks in backward only if now: the earlier batches of an accumulation stay local.

    Raises ValueError for a parameter that the last batch of the step before did not use, and an earlier one did.
    """
    if set_sync := getattr(forward, "set_requires_gradient_sync", None):  # FSDP2 has made the module one of its own
        set_sync(now)
    if not isinstance(forward, DistributedDataParallel):
        yield
        return
    with contextlib.nullcontext() if now else forward.no_sync():
        try:
            yield
        except RuntimeError as error:
            if indices := re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error)):
                trainable = [name for name, parameter in forward.module.named_parameters() if parameter.requires_grad]
                check_all_used([trainable[int(index)] for index in indices[1].split()])
            raise

"""What is done to a model before it trains, in this order: checkpointed, compiled, then replicated over ranks.

Gradients are summed, not averaged, over ranks: the trainer divides once, by the number of valid tokens of all ranks, so
ranks with more tokens count for more and two ranks equal two accumulated batches to the bit.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlm.train.activation_checkpointing import ActivationKnobs, checkpoint_activations
from fastlm.train.distributed import Ranks

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

    def __post_init__(self) -> None:
        super().__post_init__()
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

    has_masters  gradients go to fp32 masters (`leaves.py`), which are summed there: none is to be summed in backward

    Raises ValueError if the device cannot do what knobs ask for.
    """
    if knobs.cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a CUDA device, and this is {device.type}")
    checkpoint_activations(model, knobs)
    if knobs.compile:
        model.compile(**({"mode": "reduce-overhead"} if knobs.cuda_graphs else {}))
    if ranks.world_size == 1:
        return model
    if has_masters:
        _send_weights(model)
        return model
    return _replicated(model, device)


def _send_weights(model: nn.Module) -> None:
    """Start every rank from the weights and buffers of rank 0, as DistributedDataParallel does."""
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), src=0)


def _replicated(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, summing its gradients over ranks during backward."""
    options: dict[str, Any] = {_SYNC_BUFFERS: False}  # else rotary's tables are sent around before every forward
    device_ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **options)
    wrapped.register_comm_hook(None, _sum_gradients)
    return wrapped


def _sum_gradients(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


@contextlib.contextmanager
def gradients_summed(forward: nn.Module, now: bool) -> Iterator[None]:
    """Sum gradients over ranks in backward only if now: the earlier batches of an accumulation stay local."""
    with forward.no_sync() if isinstance(forward, DistributedDataParallel) and not now else contextlib.nullcontext():
        yield

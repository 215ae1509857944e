"""Tensors that are shared out over the ranks, as FSDP2 does with parameters: each rank holds some of the rows.

Such a tensor is a torch.distributed.tensor.DTensor. The optimisers update its local part; a checkpoint holds all parts,
written and read by torch.distributed.checkpoint's safetensors storage, and may be read on another number of ranks. Its
default storage is not used: that unpickles a file of the checkpoint, which may run any code.

Both modules are imported where they are first needed: a command without them starts half a second sooner.
"""

import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from fastlm.train.distributed import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(value: object) -> TypeGuard["DTensor"]:
    """Whether the value is a tensor of which this rank holds a part."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has made one before
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this rank holds, in the same memory; all of it where nothing is shared out."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def sharded_parameters(model: nn.Module) -> dict[str, "DTensor"]:
    """The entries of the model's state_dict that are shared out."""
    return {name: value for name, value in model.state_dict().items() if is_sharded(value)}


def reshard(model: nn.Module) -> None:
    """Drop weights that FSDP holds gathered since an evaluation, say: they would hide a change of the local parts."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def as_sharded(part: Tensor, parameter: Tensor) -> Tensor:
    """What belongs to a parameter and has the shape of its local part, as shared out as the parameter is."""
    if not is_sharded(parameter) or part.shape != local(parameter).shape:
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements, shape, stride = parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def gathered(part: Tensor, parameter: Tensor) -> Tensor:
    """The whole of what as_sharded describes, on every rank."""
    sharded = as_sharded(part, parameter)
    return sharded.full_tensor() if is_sharded(sharded) else part


def local_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """Inverse of gathered."""
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))


def norm_over_ranks(norms: Tensor, ranks: Ranks) -> Tensor:
    """2-norms of tensors that are shared out over the ranks, from those of their local parts; stays on the device."""
    return ranks.sum(norms.double().square()).sqrt().to(norms.dtype)  # a square of float32 may overflow


# Checkpoints


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a group of tensors into a new folder, each rank its part, rank 0 what all have; every rank calls this.

    Raises OSError, on all ranks, if any cannot write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    planner = dcp.DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=planner)
    except CheckpointException as error:  # a BaseException: one of a rank's, told to all
        rank, (cause, _) = min(error.failures.items())
        raise OSError(f"rank {rank}: {' '.join(str(cause).split())}") from error


def read(folder: Path, sharded: Mapping[str, "DTensor"]) -> dict[str, Tensor]:
    """The tensors of a group that any number of ranks wrote, those of the sharded parameters shared out as these are.

    Each rank reads its own parts alone, and asks no other. Raises ValueError if a part of a tensor is missing.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    reader = dcp.HuggingFaceStorageReader(str(folder))
    described: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {}
    for name, saved in described.items():
        if sum(math.prod(chunk.sizes) for chunk in saved.chunks) != math.prod(saved.size):
            raise ValueError(f"a part of {name} is missing in {folder.name}")
        dtype, like = saved.properties.dtype, _like(name, saved.size, sharded)
        tensors[name] = torch.empty(saved.size, dtype=dtype) if like is None else torch.empty_like(like, dtype=dtype)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # meant so
            dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        raise ValueError(" ".join(str(next(iter(error.failures.values()))[0]).split())) from error
    return tensors


def shared_out(name: str, tensor: Tensor, sharded: Mapping[str, "DTensor"]) -> Tensor:
    """A whole tensor as the parameter of this name is shared out, if one is."""
    like = _like(name, tensor.shape, sharded)
    if like is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _like(name: str, shape: torch.Size, sharded: Mapping[str, "DTensor"]) -> "DTensor | None":
    """The sharded parameter that a saved tensor is, or of which it is a quantity: <parameter>/<quantity>."""
    parameter = sharded.get(name, sharded.get(name.rpartition("/")[0]))
    return parameter if parameter is not None and parameter.shape == shape else None

"""One process or many: the same calls. torchrun's variables are read here and nowhere else."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class PeerError(ConnectionError, RuntimeError):
    """Another rank failed, or cannot be reached: what happened is told there."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among its peers. Without torchrun: rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; CPU tensors go by gloo, CUDA tensors by NCCL."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """Run a block in which one rank may fail: then all fail, else the others would wait for it for ever."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = int(self.sum(torch.tensor(int(error is not None))))
        if error is not None:
            raise error
        if failed:
            raise PeerError(f"rank {self.rank} stops because {failed} other ranks failed: see their message")

    @contextlib.contextmanager
    def aware_of_peers(self) -> Iterator[None]:
        """Run a block in which another rank may die: PyTorch's error then becomes a PeerError."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "NCCL" in str(error)
            if self.world_size == 1 or not lost or isinstance(error, PeerError):
                raise
            reason = " ".join(str(error).split())
            raise PeerError(
                f"rank {self.rank} lost another rank, which failed or was killed: see its message ({reason})"
            ) from error


def connect() -> Ranks:
    """Join the process group that torchrun describes, once; later calls return the same ranks.

    Raises ValueError if torchrun's variables are incomplete or wrong, PeerError if the ranks do not find each other.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"RANK and WORLD_SIZE are set but {missing[0]} is not: start with torchrun, or unset them")
    rank, local_rank, world_size, port = map(_number, ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= world_size:
        raise ValueError(f"RANK is {rank}, expected less than WORLD_SIZE, which is {world_size}")
    if world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, rank=rank, world_size=world_size)
        except RuntimeError as error:  # the port is another process's, the host is unknown, or a rank never came
            reason = " ".join(str(error).split())
            raise PeerError(
                f"rank {rank} cannot meet the other ranks at {os.environ['MASTER_ADDR']}, port {port}: {reason}; "
                "is another run there? choose another port with torchrun --master-port"
            ) from error
    return Ranks(rank, local_rank, world_size)


def _number(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise ValueError(f"{name} is {value!r}, expected a number as torchrun sets it")
    return int(value)


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

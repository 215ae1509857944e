"""One process or many: the same calls. torchrun's variables are read here and nowhere else."""

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Batch = TypeVar("Batch")


PATIENCE = 5.0  # seconds in which a living rank must tell so


class PeerError(ConnectionError, RuntimeError):
    """Another rank failed, or cannot be reached: what happened is told there."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among its peers. Without torchrun: rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    restarts: int = 0  # of all ranks by torchrun --max-restarts

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; CPU tensors go by gloo, CUDA tensors by NCCL."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def in_step(self, batches: Iterable[Batch], *, equally_many: bool) -> Iterator[Batch | None]:
        """The batches, one by one on all ranks; None where this rank has no more, and another has.

        Raises ValueError on every rank where one has no batch and another has, if they must be equally many.
        """
        iterator = iter(batches)
        while True:
            batch = next(iterator, None)
            having = int(self.sum(torch.tensor(int(batch is not None))))
            if having == 0:
                return
            if equally_many and having != self.world_size:
                raise ValueError(
                    f"eval_loader: {having} of {self.world_size} ranks have one more batch than the others, expected "
                    "equally many under data_parallel fsdp: give each rank as many, or use ddp"
                )
            yield batch

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """Run a block in which one rank may fail: then all fail, else the others would wait for it for ever."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        if not int(self.sum(torch.tensor(int(error is not None)))):
            return
        reasons = self.gather(error and f"{type(error).__name__}: {' '.join(str(error).split())}")
        if error is not None:
            raise error
        told = "; ".join(f"rank {rank} failed: {reason}" for rank, reason in enumerate(reasons) if reason)
        raise PeerError(told)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on each; small ones, of plain Python types."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def aware_of_peers(self) -> Iterator[None]:
        """Run a block in which another rank may die: PyTorch's error then becomes a PeerError."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "NCCL" in str(error)
            if self.world_size == 1 or not lost or isinstance(error, PeerError):
                raise
            silent = ", ".join(map(str, self._silent_ranks())) or "another"
            reason = " ".join(str(error).split())
            raise PeerError(
                f"rank {self.rank} lost rank {silent}, which failed or was killed: see its message ({reason})"
            ) from error

    def _silent_ranks(self) -> list[int]:
        """Those that do not tell within a few seconds that they live, as each does that has lost another."""
        silent = [rank for rank in range(self.world_size) if rank != self.rank]
        address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
        try:
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        except RuntimeError:
            return [0]  # in whose process the store was
        with contextlib.suppress(RuntimeError):  # rank 0 has heard from all it waited for, and is gone
            store.set(f"fastlm/{self.restarts}/{self.rank}", "alive")
            deadline = time.monotonic() + PATIENCE
            while silent and time.monotonic() < deadline:
                time.sleep(0.05)
                silent = [rank for rank in silent if not store.check([f"fastlm/{self.restarts}/{rank}"])]
        return silent


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
    return Ranks(rank, local_rank, world_size, restarts=_number("TORCHELASTIC_RESTART_COUNT", "0"))


def _number(name: str, default: str | None = None) -> int:
    value = os.environ[name] if default is None else os.environ.get(name, default)
    if not value.isdecimal():
        raise ValueError(f"{name} is {value!r}, expected a number as torchrun sets it")
    return int(value)


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a DistributedDataParallel that outlives its group ends the process with SIGABRT now and then
        dist.destroy_process_group()

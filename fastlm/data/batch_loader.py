"""Batches that somebody else makes, such as a torch.utils.data.DataLoader, in the trainer's protocol."""

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlm.data.loader import Batch, num_ranks
from fastlm.wording import quantity


class BatchLoader:
    """An endless, resumable iterator over batches of whole rows: each row is one document, nothing is packed.

    batches  an iterable that begins again whenever it is iterated, such as a DataLoader or a list, of pairs (tokens,
             targets), both (B, T) integers: targets[:, t] follows tokens[:, t], and -100 does not count. Padding goes
             to the right. On several ranks each has an iterable of its own share, as DistributedSampler makes it
    seed     torch's generator starts each epoch from seed and the epoch's number, so that a DataLoader with
             shuffle=True shuffles by these alone; the random numbers of training stay as they are. set_epoch(epoch) of
             the iterable, or of its sampler, is called too where there is one

    The state counts the batches that all ranks took of the current epoch, each as many. So another number of ranks goes
    on from there, where it divides that count; DistributedSampler then gives each row of the epoch that is left once.

    Resuming makes the batches that were taken of the current epoch once more and drops them, which takes as long as
    they took. It is exact unless making an item draws from a generator that training draws from as well.
    Raises TypeError for an iterator, which could not begin again, and for batches of another form.
    """

    def __init__(self, batches: Iterable[Any], *, seed: int = 0) -> None:
        if isinstance(batches, Iterator):
            raise TypeError(
                f"BatchLoader: batches is {type(batches).__name__}, which ends after one pass; expected an iterable "
                "that begins again, such as a DataLoader or a list"
            )
        self._batches, self._seed = batches, seed
        self._epoch, self._taken = 0, 0
        self._pass: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._pass is None:
            self._pass = self._batches_of(self._epoch)
        item = next(self._pass, None)
        while item is None:
            self._epoch, self._taken = self._epoch + 1, 0
            self._pass = self._batches_of(self._epoch)
            item = next(self._pass, None)
        self._taken += 1
        return as_batch(item)

    def one_pass(self) -> "OneEpoch":
        """The batches of the first epoch, as an iterable for evaluation."""
        return OneEpoch(self)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batches_taken": self._taken * num_ranks(), "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place that state_dict() describes. Raises ValueError if these batches have no such place."""
        if state["seed"] != self._seed:
            was = state["seed"]
            raise ValueError(f"the loader's seed is {self._seed}, but the saved position was reached with {was}")
        place = {name: state[name] for name in ("epoch", "batches_taken")}
        if any(type(value) is not int or value < 0 for value in place.values()):
            raise ValueError(f"the loader's position is {place}, expected counts")
        taken, rest = divmod(place["batches_taken"], num_ranks())
        if rest:
            done = quantity(place["batches_taken"], "batch", "batches")
            raise ValueError(
                f"the saved position is after {done} of an epoch, which {num_ranks()} ranks cannot have taken, each as "
                "many: resume on a number of ranks that divides it, or start a new run"
            )
        self._epoch, self._taken = place["epoch"], taken
        self._pass = self._batches_of(self._epoch)
        found = sum(1 for _ in zip(range(self._taken), self._pass, strict=False))
        if found < self._taken:
            raise ValueError(
                f"an epoch has {quantity(found, 'batch', 'batches')} of each rank, but the saved position is after "
                f"{self._taken}: resume with the same batches and number of ranks, or start a new run"
            )

    def _batches_of(self, epoch: int) -> Iterator[Any]:
        """What the iterable gives in an epoch; a shuffling sampler draws its order when asked for the first batch."""
        for owner in (self._batches, getattr(self._batches, "sampler", None)):
            if callable(set_epoch := getattr(owner, "set_epoch", None)):
                set_epoch(epoch)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0]))
            batches = iter(self._batches)
            first = list(zip(range(1), batches, strict=False))
        if not first:
            raise ValueError("BatchLoader: batches is empty, expected at least one batch in a pass")
        return chain((batch for _, batch in first), batches)


@dataclasses.dataclass(frozen=True)
class OneEpoch:
    """Batches that end: each iteration gives those of the loader's first epoch."""

    loader: BatchLoader

    def __iter__(self) -> Iterator[Batch]:
        return map(as_batch, self.loader._batches_of(0))


def as_batch(item: Any) -> Batch:
    """A pair (tokens, targets) as a batch whose rows are one document each; a Batch stays one."""
    if isinstance(item, Batch):
        return item
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise TypeError(f"BatchLoader: a batch is of type {type(item).__name__}, expected a pair (tokens, targets)")
    tokens, targets = (_integers(name, values) for name, values in zip(("tokens", "targets"), item, strict=True))
    if tokens.dim() != 2 or tokens.shape != targets.shape:
        raise ValueError(
            f"BatchLoader: tokens have shape {tuple(tokens.shape)} and targets {tuple(targets.shape)}, expected (B, T)"
        )
    B, T = tokens.shape
    return Batch(
        tokens=tokens,
        targets=targets,
        positions=torch.arange(T).expand(B, T).contiguous(),
        cu_seqlens=torch.arange(0, B * T + 1, T, dtype=torch.int32),
    )


def _integers(name: str, values: Any) -> Tensor:
    values = torch.as_tensor(values)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"BatchLoader: {name} are {values.dtype}, expected integers")
    return values.long()

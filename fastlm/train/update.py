"""One optimiser update from several batches, without asking the device anything.

Backward runs on the summed loss, so gradients are sums over tokens; the division by the number of valid tokens of all
batches and ranks, and clipping, happen inside the optimiser's own pass over the gradients. Where the loss or a gradient
is not finite or an outlier, or no token is valid, the update is skipped, again on the device.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.train.distributed import Ranks
from fastlm.train.ema import Ema
from fastlm.train.knobs import Knobs
from fastlm.train.optimizers import Optimizers
from fastlm.train.outliers import OutlierDetector
from fastlm.train.parallelize import gradients_summed
from fastlm.train.precision import DevicePrecision
from fastlm.train.protocols import Batch
from fastlm.train.shards import norm_over_ranks


@dataclasses.dataclass
class UpdateKnobs(Knobs):
    """When and how far a step may go."""

    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    skip_outliers: float = 0.0
    """Skip a step whose loss or gradient norm is this many standard deviations above the last 128; 0 skips none."""
    max_skipped_steps: int = 20
    """Stop after this many skipped steps in a row, not finite or outliers; on a GPU once the host learns of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("grad_clip", "skip_outliers")
        self.check_integers("max_skipped_steps", minimum=1)


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counts since the start of the run, over all ranks; a skipped step adds to none but the last two."""

    loss_sum: float = 0.0
    num_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0  # up to the last step

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Totals":
        """Those that a file holds as asdict gave them. Raises KeyError or TypeError where one is no number."""
        for field in dataclasses.fields(cls):
            if type(values[field.name]) not in (int, float):
                raise TypeError(f"{field.name} is {values[field.name]!r}, expected a number")
        return cls(**values)


class HostCopy:
    """A count on the device as it last reached the host, which does not wait for it: on a GPU it is some steps old."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._buffer = torch.zeros((), dtype=torch.float64, pin_memory=is_cuda)
        self._bytes = self._buffer.numpy()  # the same memory
        self._arrival = torch.cuda.Event() if is_cuda else None
        self._newest = 0

    def send(self, count: Tensor) -> None:
        """Send the present count after the last one, once that has arrived."""
        if self._has_arrived():
            self._newest = int(self._bytes)
            self._buffer.copy_(count, non_blocking=True)
            if self._arrival is not None:
                self._arrival.record()

    @property
    def value(self) -> int:
        """The newest that has arrived."""
        if self._has_arrived():
            self._newest = int(self._bytes)
        return self._newest

    def _has_arrived(self) -> bool:
        return self._arrival is None or self._arrival.query()


class Updater:
    """A model, called as forward, with its optimisers, the average of its weights if there is one, and loss scale."""

    def __init__(
        self,
        forward: nn.Module,
        optimizers: Optimizers,
        knobs: UpdateKnobs,
        precision: DevicePrecision,
        ranks: Ranks,
        ema: Ema | None = None,
    ) -> None:
        self.knobs, self.precision, self.ranks = knobs, precision, ranks
        self.optimizers, self.ema = optimizers, ema
        self.loss_scale = precision.loss_scale()
        self.outliers = OutlierDetector(knobs.skip_outliers, precision.device)
        self._forward = forward
        self._norm = torch.zeros((), device=precision.device)
        self.totals = Totals()
        self.skipped_in_a_row = HostCopy(precision.device)

    @property
    def totals(self) -> Totals:
        """The totals so far; waits for the device."""
        loss_sum, num_tokens, skipped, in_a_row = self._totals.tolist()
        return Totals(loss_sum, int(num_tokens), int(skipped), int(in_a_row))

    @totals.setter
    def totals(self, totals: Totals) -> None:
        self._totals = torch.tensor(dataclasses.astuple(totals), dtype=torch.float64, device=self.precision.device)

    @property
    def grad_norm(self) -> float:
        """Global norm of the last step's gradient, before clipping; waits for the device."""
        return self._norm.item()

    def update(
        self,
        batches: list[Batch],
        learning_rate: float,
        *,
        around: Callable[[Tensor], AbstractContextManager[None]] = lambda divisor: contextlib.nullcontext(),
    ) -> None:
        """Update the parameters from this rank's batches and those of the other ranks.

        around   a context for the step of the optimisers, given what the summed gradients are still to be divided by
        """
        loss_sum, num_valid = self.ranks.sum(self._backward(batches))
        self.optimizers.leaves.take_gradients(self.ranks)
        divisor = num_valid * self.loss_scale.factor
        norm_of_sum = torch.nn.utils.get_total_norm(self.optimizers.gradients)
        if self.optimizers.leaves.are_sharded:
            norm_of_sum = norm_over_ranks(norm_of_sum, self.ranks)
        self._norm = norm_of_sum / divisor  # NaN if no token is valid
        loss = loss_sum / num_valid
        skip = ~torch.isfinite(self._norm + loss) | self.outliers.is_outlier(loss, self._norm)
        excess = (self._norm / self.knobs.grad_clip).clamp(min=1) if self.knobs.grad_clip else 1
        with around(divisor):
            self.optimizers.step(learning_rate, divisor=(divisor * excess).float(), skip=skip)
        if self.ema:
            self.ema.update(skip)
        self.loss_scale.update(is_finite=torch.isfinite(norm_of_sum))
        self.outliers.add(loss, self._norm, skip)
        self.optimizers.zero_grad()
        self._count(loss_sum, num_valid, skip)

    def _backward(self, batches: list[Batch]) -> Tensor:
        """Add the gradients of the summed loss to .grad; (summed loss, valid tokens) of this rank as float64."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.precision.device)
        for index, batch in enumerate(batches):
            batch = batch.to(self.precision.device, non_blocking=True)
            with gradients_summed(self._forward, now=index == len(batches) - 1):
                with self.precision.autocast():
                    loss_sum, num_valid = self._forward(
                        batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, positions=batch.positions
                    )
                (loss_sum * self.loss_scale.factor).backward()
            totals += torch.stack([loss_sum.detach().double(), num_valid.double()])
        return totals

    def _count(self, loss_sum: Tensor, num_valid: Tensor, skip: Tensor) -> None:
        loss_total, tokens, skipped, in_a_row = self._totals
        done = torch.stack([loss_total + loss_sum, tokens + num_valid, skipped, torch.zeros_like(in_a_row)])
        self._totals = torch.where(skip, torch.stack([loss_total, tokens, skipped + 1, in_a_row + 1]), done)
        self.skipped_in_a_row.send(self._totals[3])

"""How large gradient, weights and update of each layer are: where training goes wrong first, and with which layer.

    grad_norm      |g|            gradient of the mean loss, before clipping
    weight_norm    |w|            before the update
    update_ratio   |w' - w| / |w|  w' after the update; about 1e-3 where training goes well

All are 2-norms over the parameters of a layer. Between log lines they stay on the device: nobody waits for it.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from fastlm.train.distributed import Ranks
from fastlm.train.knobs import Knobs
from fastlm.train.leaves import Leaves
from fastlm.train.shards import norm_over_ranks

QUANTITIES = ("grad_norm", "weight_norm", "update_ratio")


@dataclasses.dataclass
class LayerStatisticsKnobs(Knobs):
    """When each layer's norms are recorded."""

    layer_statistics_interval: int = 0
    """Steps between records of each layer's gradient norm, weight norm and update; 0 for none. One takes the memory of
    another copy of the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_integers("layer_statistics_interval", minimum=0)


class LayerStatistics:
    """Records norms of a model's layers around updates, every knobs.layer_statistics_interval steps.

    leaves  what the optimisers update
    """

    def __init__(self, leaves: Leaves, ranks: Ranks, knobs: LayerStatisticsKnobs) -> None:
        self._interval = knobs.layer_statistics_interval
        self._layers = layers(leaves.names) if self._interval else {}
        self._ranks, self._are_sharded = ranks, leaves.are_sharded
        self._pending: list[tuple[int, Tensor]] = []  # (step, (layers, quantities) on the device)

    def around(self, step: int) -> Callable[[Tensor], AbstractContextManager[None]]:
        """What Updater.update enters around the optimisers of update number step (1, 2, ...)."""
        if self._interval == 0 or step % self._interval:
            return lambda divisor: contextlib.nullcontext()
        return lambda divisor: self._around(step, divisor)

    def take(self) -> list[dict[str, Any]]:
        """The new records, {"step": ..., "layers": {layer: {quantity: number}}}; waits for the device."""
        pending, self._pending = self._pending, []
        return [
            {
                "step": step,
                "layers": {
                    layer: dict(zip(QUANTITIES, numbers, strict=True))
                    for layer, numbers in zip(self._layers, norms.tolist(), strict=True)
                },
            }
            for step, norms in pending
        ]

    @contextlib.contextmanager
    def _around(self, step: int, divisor: Tensor) -> Iterator[None]:
        """divisor is what the summed gradients are still to be divided by."""
        groups = list(self._layers.values())
        grad_norms = self._norms([[p.grad for p in group if p.grad is not None] for group in groups]) / divisor
        copies = [[p.detach().clone() for p in group] for group in groups]
        weight_norms = self._norms(copies)
        yield
        for group, copy in zip(groups, copies, strict=True):
            torch._foreach_sub_(copy, [p.detach() for p in group])
        update_norms = self._norms(copies)
        self._pending.append((step, torch.stack([grad_norms, weight_norms, update_norms / weight_norms], dim=1)))

    def _norms(self, groups: list[list[Tensor]]) -> Tensor:
        """Float32 norms (layers,), each of all tensors of a layer together; NaN for one that took no part."""
        found = [get_total_norm([tensor.float() for tensor in group]) if group else None for group in groups]
        known = next((norm for norm in found if norm is not None), torch.zeros(()))
        norms = torch.stack([torch.full_like(known, math.nan) if norm is None else norm for norm in found])
        return norm_over_ranks(norms, self._ranks) if self._are_sharded else norms


def layers(names: Mapping[Tensor, str]) -> dict[str, list[Tensor]]:
    """The tensors by layer: a name up to its first number ("blocks.3"), else the module ("final_norm")."""
    found: dict[str, list[Tensor]] = {}
    for tensor, name in names.items():
        found.setdefault(_layer_of(name), []).append(tensor)
    return found


def _layer_of(parameter: str) -> str:
    path = parameter.split(".")
    depth = next((index + 1 for index, part in enumerate(path) if part.isdecimal()), max(1, len(path) - 1))
    return ".".join(path[:depth])

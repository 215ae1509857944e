"""An exponential moving average of the weights, which is evaluated and saved beside them.

    average = decay * average + (1 - decay) * weight        after each step; at first the weights themselves

About the last 1 / (1 - decay) steps count. The averaging is torch.optim.swa_utils's, to the last bit in float32 and
float64. Buffers, such as the statistics of a batch norm, are no weights: the average goes with the model's own.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.train.knobs import Knobs
from fastlm.train.leaves import Leaves, by_name
from fastlm.train.shards import local, reshard


@dataclasses.dataclass
class EmaKnobs(Knobs):
    """Whether weights are averaged."""

    ema_decay: float = 0.0
    """Decay of a moving average of the weights, such as 0.999: it is what is evaluated and generated with; 0 is off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("ema_decay", float, "a share from 0 to below 1", lambda value: 0 <= value < 1)


class Ema:
    """The averages of a model's leaves: masters are averaged, not their rounded copies."""

    def __init__(self, model: nn.Module, leaves: Leaves, decay: float) -> None:
        self._model, self._leaves = model, leaves
        self._averages = {leaf: leaf.detach().clone() for _, leaf in leaves.items()}
        self._decay = decay

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """Take in the weights after a step, or nothing where skip, a bool scalar on the device, is true."""
        weight = (1 - self._decay) * (~skip).double()  # 0 leaves the average as it is
        weights = {dtype: weight.to(dtype) for dtype in {average.dtype for average in self._averages.values()}}
        averages, leaves = list(self._averages.values()), list(self._averages)
        torch._foreach_lerp_(averages, leaves, [weights[average.dtype] for average in averages])

    @torch.no_grad()
    def reset(self) -> None:
        """Start anew from the present weights."""
        for leaf, average in self._averages.items():
            average.copy_(leaf)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Run a block with the averages as the model's weights; those come back afterwards to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Leaf by leaf, so that no second copy of the model is needed."""
        for leaf, average in self._averages.items():
            kept = leaf.clone()
            leaf.copy_(average)
            average.copy_(kept)
        self._leaves.publish()
        reshard(self._model)

    def state_dict(self) -> dict[str, Any]:
        """The model's state_dict with averages in the place of trainable parameters; it loads into the same model."""
        named = self._named()
        return self._leaves.state_dict(self._model) | named

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Inverse of state_dict. Raises KeyError or ValueError, naming the average that is missing or another's."""
        for name, average in self._named().items():
            value, average = local(saved[name]), local(average)
            if (value.shape, value.dtype) != (average.shape, average.dtype):
                was, wanted = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (value, average))
                raise ValueError(f"the average of {name} is {was}, expected {wanted}")
            average.copy_(value)

    def _named(self) -> dict[str, Tensor]:
        return by_name(self._model, {parameter: self._averages[leaf] for parameter, leaf in self._leaves.items()})

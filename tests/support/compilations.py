"""How often torch.compile must compile a function for calls of several sizes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend


def compilations(function: Callable[..., Tensor], calls: Iterable[Sequence[Any]], dynamic: bool | None = True) -> int:
    """The number of graphs for these calls, each without a graph break and with eager's result."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    for call in calls:
        assert torch.equal(compiled(*call), function(*call))
    return counter.frame_count

"""Running a module without leaving a trace in it: to look at what it does, before it trains or while."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Run a block; buffers that it writes to or replaces, and attributes that it sets, are then put back.

    Random numbers are not: which generators count, the caller knows. Buffers of inference mode, which do not tell
    whether they were written to, stay as the block leaves them.
    """
    attributes = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        for part, its_attributes, its_buffers in attributes:
            vars(part).clear()
            vars(part).update(its_attributes)
            part._buffers.clear()
            part._buffers.update(its_buffers)
        with torch.no_grad():
            for buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)

"""PyTorch's own sample inputs for ops and modules: the calls that its test-suite holds its kernels to."""

import fcntl
import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPS = (
    "softmax",
    "log_softmax",
    "nn.functional.layer_norm",
    "nn.functional.rms_norm",
    "nn.functional.gelu",
    "nn.functional.cross_entropy",
    "nn.functional.linear_cross_entropy",
    "nn.functional.scaled_dot_product_attention",
)
MODULES = (
    "nn.LayerNorm",
    "nn.RMSNorm",
    "nn.GELU",
    "nn.Softmax",
    "nn.LogSoftmax",
    "nn.MultiheadAttention",
    "nn.CrossEntropyLoss",
    "nn.LinearCrossEntropyLoss",
)
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "samples"
# In a process of its own: PyTorch's test code, once imported, forbids any change of a backend's flags, and imports a
# package for the base class of its tests alone.
COLLECT = """
import random, sys, types, unittest, torch
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase, ACCEPT=False))
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

path, *names = sys.argv[1:]
dtypes = torch.float32, torch.float64, torch.float16, torch.bfloat16
random.seed(0)  # some samples are drawn by Python's generator
torch.manual_seed(0)


def of_op(sample):
    return sample.input, sample.args, sample.kwargs


def of_module(sample):
    made, called = sample.constructor_input, sample.forward_input
    return made.args, made.kwargs, called.args, called.kwargs


def errors_of_op(op):
    return [of_op(error.sample_input) for error in op.error_inputs("cpu")] if op.error_inputs_func else []


def inputs_of_module(function, module, dtype):
    given = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": True}
    return function(module, **given) if function else []


found = {}
for entry in (*op_db, *module_db):
    if entry.name not in names:
        continue
    for dtype in dtypes:
        samples, errors = found.setdefault((entry.name, dtype), ([], []))
        if hasattr(entry, "module_cls"):
            samples += map(of_module, inputs_of_module(entry.module_inputs_func, entry, dtype))
            wrong = inputs_of_module(entry.module_error_inputs_func, entry, dtype)
            errors += [of_module(error.module_error_input) for error in wrong]
        else:
            samples += map(of_op, entry.sample_inputs("cpu", dtype, requires_grad=True))
            errors += errors_of_op(entry)
torch.save(found, path)
"""


class Sample(NamedTuple):
    """One call of the op, as PyTorch draws it on the CPU; a tensor that PyTorch differentiates requires a gradient."""

    input: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class ModuleSample(NamedTuple):
    """What a module is made with, and one call of it."""

    made_args: tuple[Any, ...]
    made_kwargs: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@functools.cache
def _collected() -> dict[tuple[str, torch.dtype], tuple[list[Any], list[Any]]]:
    """(samples, samples that PyTorch refuses) of each name and dtype, kept for the next run of the tests."""
    key = hashlib.sha256(repr((torch.__version__, COLLECT, OPS, MODULES)).encode()).hexdigest()[:16]
    path = CACHE / f"{key}.pt"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two workers of a test run the second waits, and finds all collected
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            command = [sys.executable, "-c", COLLECT, unfinished, *OPS, *MODULES]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.replace(unfinished, path)
    return torch.load(path, weights_only=False)


def torch_samples(name: str, dtype: torch.dtype = torch.float32) -> list[Sample]:
    """All samples of an op, named as in torch; there is at least one."""
    samples = [Sample(*fields) for fields in _collected()[name, dtype][0]]
    assert samples, f"torch has no samples of {name}"
    return samples


def torch_error_samples(name: str) -> list[Sample]:
    """The calls of an op that PyTorch says it refuses; some ops have none."""
    return [Sample(*fields) for fields in _collected()[name, torch.float32][1]]


def torch_module_samples(name: str, dtype: torch.dtype) -> list[ModuleSample]:
    """All samples of torch.nn's module of this name; there is at least one."""
    samples = [ModuleSample(*fields) for fields in _collected()[name, dtype][0]]
    assert samples, f"torch has no samples of {name}"
    return samples


def torch_module_error_samples(name: str) -> list[ModuleSample]:
    """The constructions and calls of a module that PyTorch says it refuses; some modules have none."""
    return [ModuleSample(*fields) for fields in _collected()[name, torch.float32][1]]

"""On a GPU: at the very shapes that are timed later, ours are as exact as the tests ask, and nothing fails.

`make gpu` runs these before anything else. The interpreter and the other tests see shapes of a few hundred elements, at
which no offset passes 2^31, no grid its limit, and no program has a second wave.
"""

import dataclasses
import importlib

import pytest
import torch

from benchmarks import harness
from benchmarks.__main__ import names

PARTS = {"attention": 6, "norms": 3, "activations": 3}  # for as many processes; of other benchmarks one
ELSEWHERE = ("packing", "training", "accelerate")  # of the host; and what takes the memory of all


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name in names() if name not in ELSEWHERE for part in range(PARTS.get(name, 1))]
)
def test_ours_are_right_at_the_shapes_of_the_benchmarks(name: str, part: int) -> None:
    device = torch.device("cuda")
    cases = importlib.import_module(f"benchmarks.bench_{name}").cases(device)
    for case in cases[part :: PARTS.get(name, 1)]:
        ours = [provider for provider in case.providers if provider.role == "ours" or provider.name == case.reference]
        proven, _ = harness.prove(dataclasses.replace(case, providers=ours), harness.Budget(60.0))
        failed = {name: why for name, why in proven.rejected.items() if not why.startswith("not timed")}
        assert not failed, f"{case.name}: {failed}"
        torch.cuda.empty_cache()  # other processes test beside this one

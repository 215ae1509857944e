"""A fixture for tests that run by every instruction set of this CPU; a module that wants it gives it a name."""

import pytest
import torch

from fastlm.ops._library import INSTRUCTION_SETS, facts, is_loaded


@pytest.fixture(params=range(len(INSTRUCTION_SETS)), ids=INSTRUCTION_SETS)
def instruction_set(request):
    """Each instruction set of this CPU in turn, by its number."""
    if not is_loaded("cpu"):
        pytest.skip(facts()["_cpu"])
    best = torch.ops.fastlm.cpu_instruction_set(-1)
    if request.param > best:
        pytest.skip(f"this CPU has no {INSTRUCTION_SETS[request.param]}")
    yield torch.ops.fastlm.cpu_instruction_set(request.param)
    torch.ops.fastlm.cpu_instruction_set(best)

"""Triton compiles a kernel once per class of shapes, never once per length, batch size or number of documents."""

import pytest

from fastlm.ops._triton import HAS_TRITON
from tests.support.specializations import CASES, compilations_in_a_fresh_process

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton, which would compile the kernels, is not installed")


@pytest.fixture(scope="module")
def compilations():
    return compilations_in_a_fresh_process()


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_compiled_once_per_class_of_shapes(name, compilations):
    case, found = CASES[name], compilations[name]
    assert found.numbers == case.compilations, "\n".join([f"expected: {case.classes}", *found.differences])

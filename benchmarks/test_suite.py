"""The suite through pytest-benchmark: a benchmark for each provider, a group for each case.

    pytest benchmarks/test_suite.py --benchmark-only -k softmax

A provider is proved right before it is timed, one that is wrong fails. Those of a case are timed one after the other:
`python -m benchmarks` times them in turn, so that a machine whose clock or load drifts drifts for all of them alike.
"""

import math

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness, machine

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.timeout(0)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [
        pytest.param(case, provider.name, id=f"{name}: {case.name}: {provider.name}")
        for name, case in command._cases(command.usual(DEVICE), DEVICE)
        for provider in case.providers
    ]
    metafunc.parametrize(("proven", "provider"), pairs, indirect=["proven"])


@pytest.fixture(scope="module")  # once for a case, whose inputs go before those of the next are made
def proven(request: pytest.FixtureRequest) -> harness.Proven:
    return harness.prove(request.param, harness.Budget(math.inf))[0]


def test_provider(benchmark, request: pytest.FixtureRequest, proven: harness.Proven, provider: str) -> None:
    if reason := proven.rejected.get(provider):
        (pytest.fail if provider in proven.wrong else pytest.skip)(reason)
    benchmark.group, benchmark.name = request.node.callspec.id.removesuffix(f": {provider}"), provider
    run, restore = proven.runs[provider], proven.restores[provider]

    def to_the_end() -> None:
        run()
        machine.synchronize(DEVICE)

    if restore:
        benchmark.pedantic(to_the_end, setup=restore, rounds=harness.MAX_ROUNDS)
        restore()
    else:
        benchmark(to_the_end)

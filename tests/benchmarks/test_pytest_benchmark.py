"""Through pytest-benchmark, too, what is right is timed, in a group for each case, and what is wrong fails."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.harness import Case, Provider, UnavailableError

pytest.importorskip("pytest_benchmark")


def absent():
    raise UnavailableError("not timed: it is not installed")


def test_every_right_provider_is_a_benchmark_in_the_group_of_its_case(monkeypatch, tmp_path, capsys) -> None:
    def times(factor: float) -> Provider:
        return Provider(f"times {factor}", lambda: lambda given: {"y": factor * given["x"]})

    in_place = Provider("in place", lambda: lambda given: {"y": given["x"].mul_(2)}, "ours", mutates=("x",))
    case = Case(
        "doubling", torch.device("cpu"), lambda: {"x": torch.ones(8)}, lambda given: {"y": 2 * given["x"].double()},
        [times(2.0), in_place, times(2.001), Provider("absent", absent), times(2)], reference="times 2.0",
    )  # fmt: skip
    monkeypatch.setattr(command, "_cases", lambda chosen, device: [("arithmetic", case)])
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    suite, timings = command.HERE / "test_suite.py", tmp_path / "timings.json"
    quickly = ["--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "-p", "no:xdist"]
    code = pytest.main([str(suite), *quickly, f"--benchmark-json={timings}", "-p", "no:cacheprovider"])
    printed = capsys.readouterr().out
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "1 failed, 3 passed, 1 skipped" in printed
    assert "wrong, so not timed" in printed
    found = [(one["group"], one["name"]) for one in json.loads(timings.read_text())["benchmarks"]]
    assert found == [("arithmetic: doubling", name) for name in ("times 2.0", "in place", "times 2")]

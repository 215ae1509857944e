"""`make gpu` refuses without a GPU, ends what hangs, keeps what was measured, and gives every benchmark its time."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bench_linear_cross_entropy, children, gpu, harness, machine, pictures
from benchmarks.machine import ROOT
from tests.support import outcomes

META = torch.device("meta")  # lists the cases of a GPU without one


@functools.cache
def cases_of_a_gpu() -> list[tuple[str, harness.Case]]:
    return command._cases(gpu.usual(META), META)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Simulation:
    """gpu.main on a clock of its own: processes that take as long as they are told, benchmarks with real weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, seconds: dict[str, float], beyond: float) -> None:
        self.clock, self.seconds, self.beyond = Clock(), seconds, beyond
        self.exit_codes: dict[str, int] = {}
        self.hangs: set[str] = set()  # cases
        self.breaks: set[str] = set()
        self.started: list[list[str]] = []
        self.timed: dict[str, float] = {}  # by case, for how long its providers could be timed
        budget = harness.Budget
        monkeypatch.setattr(harness, "Budget", lambda seconds, clock=None: budget(seconds, clock or self.clock))
        monkeypatch.setattr(gpu, "Budget", harness.Budget)
        monkeypatch.setattr(gpu, "Child", lambda *start: SimulatedChild(self, *start))
        monkeypatch.setattr(gpu, "STATE", folder)
        monkeypatch.setattr(gpu, "RESULTS", folder / "results")
        which = shutil.which
        monkeypatch.setattr(shutil, "which", lambda name: name if name == "compute-sanitizer" else which(name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(machine, "answers", self.answers)
        monkeypatch.setattr(machine, "device_name", lambda device: "Simulated GPU")
        monkeypatch.setattr(harness, "time_ceiling", lambda ceiling, device: 1.0)
        monkeypatch.setattr(machine, "copy_ceiling", lambda device: machine.Ceiling("copy", "byte", 1.0, lambda: None))
        monkeypatch.setattr(machine, "matmul_ceiling", lambda *device: machine.copy_ceiling(device))
        monkeypatch.setattr(pictures, "draw", lambda *record: [])
        monkeypatch.setattr(harness, "measure", self.measure)
        monkeypatch.setitem(bench_linear_cross_entropy.CHUNK_ROWS, "meta", ())
        cases = cases_of_a_gpu()
        monkeypatch.setattr(command, "_cases", lambda chosen, device: [x for x in cases if x[0] in chosen])
        self.cases = [f"{name}: {case.name}" for name, case in cases]
        self.running = ""

    def measure(self, case: harness.Case, budget: harness.Budget, whole: harness.Budget) -> dict:
        self.running = case.name
        if case.name in self.hangs:
            self.clock.now += 1e6
            raise TimeoutError
        share = budget.remaining()
        self.clock.now += share + self.beyond  # compilation that the share did not foresee
        self.timed[case.name] = share / 2
        return {"case": case.name, "providers": [], "work": [], "ceilings": {}, "reference": "", "rejected": {},
                "wrong": [], "left_out": []}  # fmt: skip

    def answers(self, device: torch.device) -> bool:
        return self.running not in self.breaks

    def run(self, *arguments: str) -> int:
        return gpu.main(list(arguments))


class SimulatedChild:
    """As children.Child, on the simulation's clock."""

    def __init__(self, simulation: Simulation, arguments: Sequence[str], log: Path, environment: dict) -> None:
        self.simulation, self.name, self.arguments = simulation, log.stem, list(arguments)
        self.start = simulation.clock.now
        self.seconds = simulation.seconds.get(self.name, 0.0)
        simulation.started.append(self.arguments)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("tests/ops/test_contract.py::test_a\n" if self.name == "collect" else "what it printed\n")

    def wait(self, seconds: float, watched: Path | None = None, idle_seconds: float = 0.0) -> int | None:
        clock = self.simulation.clock
        if self.name == "benchmarks":
            return self.measured(seconds, idle_seconds)
        end = self.start + self.seconds
        clock.now = max(clock.now, min(end, clock.now + seconds))
        return self.simulation.exit_codes.get(self.name, 0) if clock.now >= end else None

    def measured(self, seconds: float, idle_seconds: float) -> int | None:
        clock, start = self.simulation.clock, self.simulation.clock.now
        clock.now += 8.0  # imports
        try:
            code = command.main(self.arguments[3:])
        except TimeoutError:
            code, clock.now = None, clock.now - 1e6 + idle_seconds
        if clock.now - start > seconds:
            code, clock.now = None, start + seconds
        return code

    def end(self) -> None: ...


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Simulation:
    return Simulation(monkeypatch, tmp_path, {"library": 8.0}, 0.0)


@pytest.mark.parametrize("beyond", [0.0, 1.0])
@pytest.mark.parametrize(("build", "tests"), [(0, 0), (85, 0), (60, 110), (0, 250), (240, 250)])
def test_every_case_gets_its_time_whatever_build_and_tests_take(
    monkeypatch, tmp_path, build: int, tests: int, beyond: float
) -> None:
    seconds = {"library": 8.0, "build": build, "deciding": tests / 3, "tests": tests * 2 / 3, "memcheck": 40.0}
    run = Simulation(monkeypatch, tmp_path, seconds, beyond)
    if build:
        run.exit_codes["library"] = 1
    run.run()
    assert run.clock.now <= gpu.TOTAL_SECONDS
    assert run.timed.keys() == {name.partition(": ")[2] for name in run.cases}
    assert min(run.timed.values()) > 0.4, "a case was left without time for its rounds"
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["left_out"] == []


def test_a_failed_build_stops_neither_tests_nor_benchmarks(simulation, capsys) -> None:
    simulation.exit_codes |= {"library": 1, "build": 1}
    assert simulation.run() == 1
    assert capsys.readouterr().err.splitlines() == ["make gpu: build: failed with exit code 1"]
    assert simulation.timed


def test_a_library_that_loads_is_not_built(simulation) -> None:
    assert simulation.run() == 0
    assert not any("setup.py" in arguments for arguments in simulation.started)


def test_cases_that_hang_or_break_the_device_are_named_and_the_others_measured(simulation, capsys) -> None:
    first, second = simulation.cases[:2]
    simulation.hangs.add(first.partition(": ")[2])
    simulation.breaks.add(second.partition(": ")[2])
    assert simulation.run() == 1
    assert capsys.readouterr().err.splitlines() == [
        f"make gpu: benchmark {first}: it hung, or an error ended it",
        f"make gpu: benchmark {second}: the device's context was lost",
    ]
    (path,) = (gpu.STATE / "results").glob("*.json")
    results = json.loads(path.read_text())["results"]
    assert len(results) == len(simulation.cases) - 2


def test_continue_measures_what_is_missing_and_spares_tests_that_passed(simulation, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "TOTAL_SECONDS", 120)
    monkeypatch.setattr(gpu, "BENCHMARK_SECONDS", 60)
    simulation.beyond = 10.0
    simulation.run()
    measured = set(simulation.timed)
    assert 0 < len(measured) < len(simulation.cases)
    (gpu.STATE / "outcomes.jsonl").write_text('{"test": "a", "outcome": "passed", "text": ""}\n')
    simulation.timed.clear()
    simulation.run("--continue")
    assert simulation.timed
    assert not measured & simulation.timed.keys()
    assert (gpu.STATE / "spared.jsonl").read_text() == (gpu.STATE / "outcomes.jsonl").read_text()
    simulation.run()
    assert not (gpu.STATE / "outcomes.jsonl").exists(), "a new run begins anew"


def test_continue_refuses_the_record_of_another_commit(simulation, capsys) -> None:
    simulation.run()
    path = gpu.STATE / "record.json"
    record = json.loads(path.read_text())
    record["run"]["commit"] = "0123abc"
    path.write_text(json.dumps(record))
    capsys.readouterr()
    assert simulation.run("--continue") == 2
    assert "is of commit 0123abc" in capsys.readouterr().err


def test_failed_tests_are_named_with_their_text_in_a_file(simulation, capsys, monkeypatch) -> None:
    ended = '{"test": "tests/a.py::b", "outcome": "failed", "text": "E  1 != 2"}\n'

    class Failing(SimulatedChild):
        def wait(self, *arguments: object, **options: object) -> int | None:
            if self.name == "tests":
                (gpu.STATE / "outcomes.jsonl").write_text(ended)
            return super().wait(*arguments, **options)

    monkeypatch.setattr(gpu, "Child", lambda *start: Failing(simulation, *start))
    assert simulation.run() == 1
    assert "make gpu: tests/a.py::b failed" in capsys.readouterr().err
    assert "E  1 != 2" in (gpu.STATE / "failed.txt").read_text()
    assert "failed: tests/a.py::b" in next((gpu.STATE / "results").glob("*.txt")).read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_run_refuses_without_a_gpu_in_one_line_before_it_builds(monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu.Run, "library", lambda self: pytest.fail("it began"))
    assert gpu.main([]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "sees no NVIDIA GPU" in message


def test_child_that_hangs_is_ended_with_its_children(tmp_path) -> None:
    grandchild = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grandchild!r}]); time.sleep(60)"
    child = children.Child([sys.executable, "-c", code], tmp_path / "log", {})
    assert child.wait(1.0) is None
    child.end()
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_child_gives_its_exit_code_and_leaves_what_it_printed(tmp_path) -> None:
    code = "import os; print('told', os.environ['FASTLM_TEST']); raise SystemExit(3)"
    child = children.Child([sys.executable, "-c", code], tmp_path / "log", {"FASTLM_TEST": "it"})
    assert child.wait(20.0) == 3
    child.end()
    assert (tmp_path / "log").read_text() == "told it\n"


def test_child_that_writes_nothing_for_long_is_given_up(tmp_path) -> None:
    watched = tmp_path / "watched"
    code = f"import time\nfor _ in range(6): open({str(watched)!r}, 'a').write('.'); time.sleep(0.3)\ntime.sleep(60)"
    child = children.Child([sys.executable, "-c", code], tmp_path / "log", {})
    assert child.wait(30.0, watched, 1.2) is None
    child.end()
    assert watched.read_text() == "......"


def test_gpu_tests_are_chosen_by_marker_fixture_and_parameter(capsys) -> None:
    chosen = {
        "marker": "@pytest.mark.gpu\ndef test_it(): ...",
        "fixture": "def test_it(kernel_device): ...",
        "layers": "def test_it(layer_device): ...",
        "parameter": "@pytest.mark.parametrize('d', [pytest.param(1, marks=pytest.mark.gpu)])\ndef test_it(d): ...",
    }
    others = {"cpu": "def test_it(): ...  # mark.gpu", "broken": "import no_such_package"}
    folder = ROOT / "tests" / "benchmarks" / "chosen"  # below whose conftest the fixtures are
    folder.mkdir()
    try:
        for name, code in (chosen | others).items():
            (folder / f"test_{name}.py").write_text(f"import pytest\n{code}\n")
        collecting = [sys.executable, *gpu.PYTEST, "--collect-only", str(folder)]
        done = subprocess.run(collecting, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(folder)
    files = gpu.gpu_test_files(done.stdout)
    assert {Path(file).stem.removeprefix("test_") for file in files} == set(chosen)
    assert "not collected: " in capsys.readouterr().out


def test_outcomes_are_written_as_tests_end_and_spare_those_that_passed(tmp_path) -> None:
    code = "def test_right(): ...\ndef test_wrong(): assert 1 == 2\n"
    (tmp_path / "test_it.py").write_text(code)
    ended = tmp_path / "outcomes.jsonl"
    options = ["-p", "tests.support.outcomes", "--outcomes", str(ended), "--spare", str(ended)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *options]
    printed = []
    for _ in range(2):
        done = subprocess.run(
            [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        printed.append(done.stdout.splitlines()[-1])
    assert printed[0].startswith("1 failed, 1 passed")
    assert printed[1].startswith("1 failed, 1 deselected")
    known = outcomes.read(ended)
    assert {Path(test).name: outcome["outcome"] for test, outcome in known.items()} == {
        "test_it.py::test_right": "passed",
        "test_it.py::test_wrong": "failed",
    }
    assert "assert 1 == 2" in next(x["text"] for x in known.values() if x["outcome"] == "failed")


def test_gpu_module_starts_with_nothing_but_torch_and_the_standard_library() -> None:
    """A GPU machine has no tyro, rich or tokenizers for certain."""
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['tyro', 'rich', 'tokenizers', 'safetensors', 'matplotlib']));"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked + "import benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

"""`make gpu` refuses without a GPU, ends what hangs, and joins what the benchmarks wrote."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.machine import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_run_refuses_without_a_gpu_in_one_line_before_it_builds(monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu, "build", lambda: pytest.fail("it began to build"))
    assert gpu.main([]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "sees no NVIDIA GPU" in message


def test_gpu_run_ends_a_process_that_hangs_with_its_children(tmp_path) -> None:
    child = f"import time; time.sleep(4); open({str(tmp_path / 'alive')!r}, 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.perf_counter()
    assert gpu._failure("hang", ["-c", parent], 2.0) == ["hang: ended after 2 s"]
    assert time.perf_counter() - start < 10
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize(("code", "failures"), [(0, []), (3, ["step: failed with exit code 3"])])
def test_gpu_run_reports_the_exit_code(code: int, failures: list[str]) -> None:
    assert gpu._failure("step", ["-c", f"raise SystemExit({code})"], 20.0) == failures


def test_gpu_run_goes_on_after_a_failure_and_names_it(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "build", lambda: [])
    monkeypatch.setattr(gpu, "test", lambda budget: ["tests/a.py: failed with exit code 1"])
    monkeypatch.setattr(gpu, "benchmark", lambda budget, commit: [f"benchmark b: ended ({commit})"])
    assert gpu.main(["--commit", "abc"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "make gpu: tests/a.py: failed with exit code 1",
        "make gpu: benchmark b: ended (abc)",
    ]


def test_gpu_tests_are_chosen_by_marker_fixture_and_parameter() -> None:
    chosen = {
        "marker": "@pytest.mark.gpu\ndef test_it(): ...",
        "fixture": "def test_it(kernel_device): ...",
        "layers": "def test_it(layer_device): ...",
        "parameter": "@pytest.mark.parametrize('d', [pytest.param(1, marks=pytest.mark.gpu)])\ndef test_it(d): ...",
    }
    others = {"cpu": "def test_it(): ...  # mark.gpu", "broken": "import no_such_package"}
    with tempfile.TemporaryDirectory(dir=ROOT / "tests" / "benchmarks") as folder:  # whose conftest has the fixtures
        for name, code in (chosen | others).items():
            (Path(folder) / f"test_{name}.py").write_text(f"import pytest\n{code}\n")
        files = gpu.gpu_test_files(folder)
    assert {Path(file).stem.removeprefix("test_") for file in files} == set(chosen)


def test_gpu_run_fails_where_no_gpu_test_is_collected(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "gpu_test_files", list)
    assert gpu.test(gpu.Budget(60.0)) == ["tests: pytest collected none for a GPU"]


def test_joined_record_holds_every_result_and_one_description() -> None:
    def record(name: str, seconds: float) -> dict:
        return {
            "machine": {"device": "GPU"},
            "run": {"seconds": seconds, "command": f"python -m benchmarks {name}"},
            "results": [{"benchmark": name}],
            "left_out": [f"{name}: a case"],
        }

    joined = gpu.join([record("a", 2.0), record("b", 3.5)])
    assert [result["benchmark"] for result in joined["results"]] == ["a", "b"]
    assert joined["left_out"] == ["a: a case", "b: a case"]
    assert joined["run"] == {"seconds": 5.5, "command": "make gpu", "budget_seconds": gpu.TOTAL_SECONDS}


def test_gpu_module_starts_with_nothing_but_torch_and_the_standard_library() -> None:
    """A GPU machine has no tyro, rich or tokenizers for certain."""
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['tyro', 'rich', 'tokenizers', 'safetensors', 'matplotlib']));"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked + "import benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

"""make gpu: build the CUDA extension, run the GPU tests and the benchmarks on this machine, within nine minutes.

It needs an NVIDIA GPU, nvcc, ninja, pybind11, PyTorch, Triton and pytest, and neither network nor installation: the
package is used where it lies. Whatever may run a kernel runs in a process group of its own with a time-out, so a kernel
that hangs is ended with its process and the rest goes on; each benchmark writes its record after every case, so what
was measured before a hang is kept. Writes benchmarks/results/<device>.json. Exit code: 0, 1 if something failed, 2 if
the machine cannot do it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import machine, report
from benchmarks.__main__ import RESULTS, names
from benchmarks.harness import Budget
from benchmarks.machine import ROOT

TOTAL_SECONDS = 530
BUILD_SECONDS = 240
TEST_FILE_SECONDS = 90
# The options of pyproject.toml ask for plugins that a GPU machine may lack.
GPU_TESTS = ["-m", "pytest", "-o", "addopts=", "-q", "--strict-markers", "-p", "no:cacheprovider", "-m", "gpu"]
GRACE_SECONDS = 40  # beyond its budget a benchmark may take: imports, and the case that it is in


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--commit", help="commit to record where the tree has no repository")
    commit = parser.parse_args(argv).commit
    if not torch.cuda.is_available():
        built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(
            f"make gpu: PyTorch {torch.__version__} ({built_for}) sees no NVIDIA GPU; nothing was run", file=sys.stderr
        )
        return 2
    budget = Budget(TOTAL_SECONDS)
    failures = build()
    if not failures:
        failures += test(budget.part(0.4))
        failures += benchmark(budget, commit)
    for failure in failures:
        print(f"make gpu: {failure}", file=sys.stderr)
    return 1 if failures else 0


def build() -> list[str]:
    """Compile with the nvcc of this machine; a missing one is an error here."""
    return _failure("build", ["setup.py", "--quiet", "build_ext", "--inplace"], BUILD_SECONDS, FASTLM_CUDA="1")


def test(budget: Budget) -> list[str]:
    """Run the tests marked gpu, one process per file: a hang costs one file's results."""
    failures = []
    files = gpu_test_files()
    if not files:
        failures.append("tests: pytest collected none for a GPU")
    for name in files:
        seconds = min(TEST_FILE_SECONDS, budget.remaining())
        if seconds < 10:
            failures.append(f"{name}: not run, the time for tests was used up")
            continue
        failures += _failure(name, [*GPU_TESTS, name], seconds)
    return failures


def gpu_test_files(*paths: str) -> list[str]:
    """Files that hold a gpu test, as pytest collects them below the paths, or below all of tests.

    A search of the sources would miss the tests that are marked by a fixture's parameters. Files that need a package
    which this machine lacks are named: none of the GPU's own tests does.
    """
    command = [sys.executable, *GPU_TESTS, "--collect-only", *paths]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for line in lines:
        if line.startswith("ERROR "):
            print(f"not collected: {line.removeprefix('ERROR ')}", flush=True)
    return list(dict.fromkeys(line.partition("::")[0] for line in lines if "::" in line and line.startswith("tests/")))


def benchmark(budget: Budget, commit: str | None) -> list[str]:
    """Run each benchmark in its own process and join their records into one file."""
    failures, records = [], []
    chosen = names()
    with tempfile.TemporaryDirectory() as folder:
        for done, name in enumerate(chosen):
            seconds = budget.remaining() / (len(chosen) - done) - GRACE_SECONDS
            if seconds < 10:
                failures.append(f"benchmark {name}: not run, the time was used up")
                continue
            path = Path(folder) / f"{name}.json"
            command = ["-m", "benchmarks", name, "--device", "cuda", "--json", str(path), "--seconds", f"{seconds:.0f}"]
            command += ["--commit", commit] if commit else []
            failures += _failure(f"benchmark {name}", command, seconds + GRACE_SECONDS)
            if path.exists():
                records.append(json.loads(path.read_text()))
    if records:
        joined = join(records)
        # The name comes from a record: this process asks the device nothing, for a device that hangs would hang it.
        path = RESULTS / f"{machine.slug('cuda', joined['machine']['device'])}.json"
        print(f"wrote {', '.join(map(str, report.write(joined, path)))}")
    return failures


def join(records: list[dict]) -> dict:
    """One record of several runs on one machine: the first one's description, everyone's results."""
    joined = {**records[0], "results": [], "left_out": []}
    joined["run"] = {**records[0]["run"], "command": "make gpu"}
    joined["run"]["seconds"] = round(sum(record["run"].get("seconds", 0.0) for record in records), 1)
    joined["run"]["budget_seconds"] = TOTAL_SECONDS
    for record in records:
        joined["results"] += record["results"]
        joined["left_out"] += record["left_out"]
    return joined


def _failure(
    name: str, arguments: list[str], seconds: float, passing: tuple[int, ...] = (0,), **more: str
) -> list[str]:
    """Run this Python with arguments for at most so many seconds; [] or [what went wrong]."""
    print(f"\n== {name} (at most {seconds:.0f} s)", flush=True)
    start = time.perf_counter()
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1", **more}
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return [f"{name}: ended after {seconds:.0f} s"]
    finally:
        _end_group(process)
    print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return [] if code in passing else [f"{name}: failed with exit code {code}"]


def _end_group(process: subprocess.Popen) -> None:
    """End the process, and the compilers and workers that it started, if they are still there."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        # A process inside the GPU driver may not end before its kernel does; waiting for it would hang the rest too.
        print(f"make gpu: process {process.pid} does not end; going on without it", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

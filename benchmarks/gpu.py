"""make gpu: prove and measure the kernels on this machine's NVIDIA GPU, within nine minutes.

It needs an NVIDIA GPU, PyTorch, Triton and pytest, and neither network nor installation: the package is used where it
lies, and the compiled extension too if it loads here; if not, nvcc, ninja and pybind11 build it. In this order:

    library     load the compiled extension, or build it
    deciding    ours at the shapes of the benchmarks against float64, and every op in a CUDA graph, without a host sync
    tests       all other GPU tests, and compute-sanitizer over a few where it is installed
    benchmarks  the rest of the time

Beside the tests, the benchmarks' kernels compile into the caches that all of them share. Whatever may run a kernel runs
in a process group of its own with a time-out, so a kernel that hangs is ended with its process and the rest goes on.
Everything is kept as soon as it is known, in .cache/gpu: logs, the end of each test, the figures after each case.
`--continue` goes on from there: tests that passed and cases that were measured are not run again.
`--rehearse` goes through all of it on a processor, where the GPU tests are skipped.

Writes benchmarks/results/<device>.json. Exit code: 0, 1 if something failed, 2 if the machine cannot do it.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import machine, page
from benchmarks.__main__ import RESULTS, usual
from benchmarks.children import Child
from benchmarks.harness import Budget
from benchmarks.machine import ROOT
from tests.support import outcomes

STATE = ROOT / ".cache" / "gpu"
TOTAL_SECONDS = 520
LOAD_SECONDS = 60
BUILD_SECONDS = 240
BENCHMARK_SECONDS = 250  # that the steps before leave to the benchmarks; a build may use up that of the tests
STARTING_SECONDS = 15  # for imports, and for the case that a process is in when its time is up
HANG_SECONDS = 100  # without a finished case: hung, or compiling what no one would wait for
TEST_SECONDS = 100  # of one test, where pytest-timeout is installed

PYTEST = ["-m", "pytest", "-o", "addopts=", "-q", "--strict-markers", "-p", "no:cacheprovider", "-m", "gpu"]
DECIDING = ["tests/benchmarks/test_real_shapes.py", "tests/ops/test_contract.py", "-k", "shapes or cuda_graph"]
SANITIZED = ["tests/ops/test_contract.py", "-k", "equal_plain_pytorch and not derivatives and not autocast"]
SANITIZERS = ("memcheck", "racecheck")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--commit", help="commit to record where the tree has no repository")
    parser.add_argument("--continue", dest="resume", action="store_true", help="go on where the last run stopped")
    parser.add_argument("--rehearse", action="store_true", help="on the processor, for nothing but to see it run")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() and not arguments.rehearse:
        built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(
            f"make gpu: PyTorch {torch.__version__} ({built_for}) sees no NVIDIA GPU; nothing was run", file=sys.stderr
        )
        return 2
    if arguments.resume and (of_another := of_another_commit(arguments.commit)):
        print(f"make gpu: {STATE} is of commit {of_another}; without --continue a new run begins", file=sys.stderr)
        return 2
    if not arguments.resume:
        for path in (STATE / "outcomes.jsonl", STATE / "record.json"):
            path.unlink(missing_ok=True)
    run = Run("cpu" if arguments.rehearse else "cuda", arguments.commit)
    run.library()
    run.tests()
    run.benchmarks()
    for failure in run.failures:
        print(f"make gpu: {failure}", file=sys.stderr)
    return 1 if run.failures else 0


class Run:
    """One run, step by step; failures hold what went wrong in it."""

    def __init__(self, device: str, commit: str | None) -> None:
        self.device, self.commit = device, commit
        self.budget = Budget(TOTAL_SECONDS)
        self.failures: list[str] = []
        self.cores = os.cpu_count() or 1

    def library(self) -> None:
        """Build only what does not load. Triton's kernels need none of it, so a failed build stops nothing."""
        loads = f"import sys; from fastlm.ops import _library; sys.exit(not _library.is_loaded({self.device!r}))"
        if self.finish("library", self.start("library", ["-c", loads]), LOAD_SECONDS):
            print("the compiled extension does not load here; building it", flush=True)
            build = self.start("build", ["setup.py", "--quiet", "build_ext", "--inplace"], FASTLM_CUDA="1")
            self.failures += self.finish("build", build, BUILD_SECONDS)

    def tests(self) -> None:
        """The deciding ones, then all others; beside them kernels compile, and sanitizers watch a few tests."""
        compiling = {
            f"compile-{chosen[0]}": self.start_benchmarks(f"compile-{chosen[0]}", chosen, "--compile-only")
            for chosen in groups(usual(torch.device(self.device)), max(1, self.cores // 3))
        }
        collecting = self.start("collect", [*PYTEST, "--collect-only"])
        self.test("deciding", DECIDING)
        failed = self.finish("collect", collecting, self.seconds_for_tests(), passing=(0, 2))
        files = gpu_test_files(log("collect").read_text())
        if failed or not files:
            self.failures.append("tests: pytest collected none for a GPU")
        sanitizer = shutil.which("compute-sanitizer")
        watched = {
            tool: self.start(tool, [*PYTEST, *SANITIZED], [sanitizer, "--tool", tool, "--error-exitcode", "9"])
            for tool in (SANITIZERS if sanitizer else ())
        }
        if files:
            self.test("tests", files)
        for tool, child in watched.items():
            self.failures += self.finish(tool, child, self.seconds_for_tests())
        for name, child in compiling.items():
            self.finish(name, child, self.seconds_for_tests())  # what it did not compile, a timed run compiles
        self.failures += [f"{test} failed; why stands in {STATE / 'failed.txt'}" for test in failed_tests()]

    def test(self, name: str, chosen: list[str]) -> None:
        ended, spared = STATE / "outcomes.jsonl", STATE / "spared.jsonl"
        spared.write_text(ended.read_text() if ended.exists() else "")  # the workers must not see it grow
        options = ["-p", "tests.support.outcomes", "--outcomes", str(ended), "--spare", str(spared), "--tb=short"]
        if importlib.util.find_spec("xdist"):
            options += ["-n", str(max(1, self.cores - self.cores // 3)), "--dist", "worksteal"]
        if importlib.util.find_spec("pytest_timeout"):
            options += [f"--timeout={TEST_SECONDS}"]
        before = len(outcomes.read(ended))
        # 1: some failed, and are counted below; 5: all were spared.
        failures = self.finish(
            name, self.start(name, [*PYTEST, *options, *chosen]), self.seconds_for_tests(), (0, 1, 5)
        )
        known, failed = outcomes.read(ended), failed_tests()
        print(f"{len(known) - before} tests ended, of all until now {len(failed)} failed", flush=True)
        (STATE / "failed.txt").write_text("\n\n".join(f"{test}\n{known[test]['text']}" for test in failed))
        self.failures += failures

    def benchmarks(self) -> None:
        """All in one process; a new one goes on after a case that took the process with it."""
        path, chosen = STATE / "record.json", usual(torch.device(self.device))
        chosen.sort(key=lambda name: name == "packing")  # of the host: last
        while (seconds := self.budget.remaining() - STARTING_SECONDS) > 0:
            before = ended_cases(path)
            options = ["--json", str(path), "--seconds", f"{seconds:.0f}", "--continue"]
            options += ["--commit", self.commit] if self.commit else []
            child = self.start_benchmarks("benchmarks", chosen, *options)
            failed = self.finish("benchmarks", child, seconds + STARTING_SECONDS, (0,), path)
            record = json.loads(path.read_text()) if path.exists() else None
            broke = record and (record["running"] or record["lost_device"])
            if not broke or ended_cases(path) <= before:
                self.failures += failed
                break
        else:
            if not path.exists():
                self.failures.append("benchmarks: not run, the time was used up")
        if path.exists():
            self.write(json.loads(path.read_text()))

    def write(self, record: dict) -> None:
        passed = outcomes.passed(outcomes.read(STATE / "outcomes.jsonl"))
        self.failures += [f"benchmark {what}: {why}" for what, why in record["ended_in"].items()]
        record["run"] |= {"command": "make gpu", "budget_seconds": TOTAL_SECONDS}
        record["tests"] = {"passed": len(passed), "failed": failed_tests()}
        record["left_out"] += filter(None, [record["running"]])
        # The name comes from the record: this process asks the device nothing, for one that hangs would hang it.
        folder = RESULTS if self.device == "cuda" else STATE
        path = folder / f"{machine.slug(self.device, record['machine']['device'])}.json"
        print(f"wrote {', '.join(map(str, page.write(record, path)))}")

    def seconds_for_tests(self) -> float:
        return max(0.0, self.budget.remaining() - BENCHMARK_SECONDS)

    def start_benchmarks(self, name: str, chosen: list[str], *options: str) -> Child:
        return self.start(name, ["-m", "benchmarks", *chosen, "--device", self.device, *options])

    def start(self, name: str, arguments: list[str], under: Sequence[str | None] = (), **environment: str) -> Child:
        caches = {"TRITON_CACHE_DIR": str(STATE / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(STATE / "inductor")}
        return Child([*filter(None, under), sys.executable, *arguments], log(name), caches | environment)

    def finish(
        self,
        name: str,
        child: Child,
        seconds: float,
        passing: tuple[int, ...] = (0,),
        watched: Path | None = None,
    ) -> list[str]:
        """Wait for a process and end it; [] or [what went wrong], with the end of what it printed."""
        print(f"\n== {name} (at most {seconds:.0f} s)", flush=True)
        before = self.budget.remaining()
        try:
            code = child.wait(seconds, watched, HANG_SECONDS)
        finally:
            child.end()
        print(f"== {name}: {before - self.budget.remaining():.0f} s, its output is in {log(name)}", flush=True)
        if code in passing:
            return []
        print("\n".join(log(name).read_text(errors="replace").splitlines()[-15:]) if log(name).exists() else "")
        return [f"{name}: ended after {seconds:.0f} s" if code is None else f"{name}: failed with exit code {code}"]


def of_another_commit(commit: str | None) -> str | None:
    """The commit of the run that would be continued, if the tree is at another."""
    path, commit = STATE / "record.json", str(machine.provenance(commit)["commit"])
    before = str(json.loads(path.read_text())["run"]["commit"]) if path.exists() else commit
    return before if before != commit else None


def failed_tests() -> list[str]:
    known = outcomes.read(STATE / "outcomes.jsonl")
    return sorted(test for test, outcome in known.items() if outcome["outcome"] == "failed")


def log(name: str) -> Path:
    return STATE / "logs" / f"{name}.log"


def groups(chosen: list[str], count: int) -> list[list[str]]:
    return [group for start in range(count) if (group := chosen[start::count])]


def ended_cases(path: Path) -> int:
    """Of how many cases the record says how they ended."""
    if not path.exists():
        return 0
    record = json.loads(path.read_text())
    return len(record["results"]) + len(record["ended_in"]) + bool(record["running"])


def gpu_test_files(collected: str) -> list[str]:
    """Files that hold a gpu test, as pytest's own collection printed them.

    A search of the sources would miss the tests that are marked by a fixture's parameters. Files that need a package
    which this machine lacks are named: none of the GPU's own tests does.
    """
    lines = collected.splitlines()
    for line in lines:
        if line.startswith("ERROR "):
            print(f"not collected: {line.removeprefix('ERROR ')}", flush=True)
    return list(dict.fromkeys(line.partition("::")[0] for line in lines if "::" in line and line.startswith("tests/")))


if __name__ == "__main__":
    sys.exit(main())

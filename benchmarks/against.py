"""python -m benchmarks.against CHECKOUT [name ...]: is this tree as fast as another one?

Each tree's fastlm runs in a process of its own, on the same inputs, and the two take turns (this, other, this, other),
so that a machine whose clock or load drifts drifts for both. Plain copies of memory, timed in the same turns by both
processes, show what the machine itself adds: a ratio counts only as far as it leaves theirs. CHECKOUT needs its
compiled libraries: run `python setup.py build_ext --inplace` there. Correctness is not looked at; the tests do that.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import harness, machine
from benchmarks.__main__ import names

ROUNDS = 15
# Without this glibc gives freed memory back at times, and one process then pays for fresh pages where the other does
# not: up to 2.4 times the time of the same code.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**33)}
COPY = "copy"


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    arguments.names = arguments.names or [name for name in names() if name != "training"]
    if arguments.worker:
        return _answer(arguments.checkout, arguments.names)
    if not (arguments.checkout / "fastlm" / "__init__.py").is_file():
        _parser().error(f"{arguments.checkout} holds no fastlm")
    print(_heading(arguments.checkout), flush=True)
    both = [_Worker(tree, arguments.names) for tree in (machine.ROOT, arguments.checkout)]
    for case in both[0].cases:
        print(_compare(case, both), flush=True)
    for worker in both:
        worker.close()


def _heading(checkout: Path) -> str:
    origin, described = machine.provenance(), machine.describe(torch.device("cpu"))
    dirty = " with changes" if origin["dirty"] else ""
    return (
        f"{described['device']}, {described['threads']} threads, {described['cpu_capability']}, torch "
        f"{torch.__version__}, {origin['date']}\n"
        f"this tree {str(origin['commit'])[:10]}{dirty} against {machine.commit_of(checkout)}, time of this / time of "
        f"that: ratio of medians and quartiles of {ROUNDS} rounds' own ratios; the same for copies in the same rounds"
    )


def _compare(case: str, both: list["_Worker"]) -> str:
    """A line: how the two trees' times relate."""
    rounds = [[worker.sample(case) for worker in both] for _ in range(ROUNDS)]
    ours, copies = (_ratio([[sample[key] for sample in pair] for pair in rounds]) for key in ("case", COPY))
    milliseconds = [1e3 * statistics.median(pair[i]["case"] for pair in rounds) for i in range(2)]
    return f"{case:<100} {milliseconds[0]:8.2f} / {milliseconds[1]:8.2f} ms = {ours}   copies {copies}"


def _ratio(pairs: list[list[float]]) -> str:
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    low, _, high = statistics.quantiles([this / other for this, other in pairs], n=4, method="inclusive")
    return f"{medians[0] / medians[1]:.2f} ({low:.2f} .. {high:.2f})"


class _Worker:
    """The process of one tree. It sleeps while the other one works."""

    def __init__(self, checkout: Path, chosen: list[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.against", "--worker", str(checkout), *chosen]
        self._process = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env=os.environ | KEEP_MEMORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.cases: list[str] = self._read()

    def sample(self, case: str) -> dict[str, float]:
        """Seconds of one run of a case, and of a copy."""
        assert self._process.stdin is not None
        print(json.dumps(case), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self._process.communicate()

    def _read(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the process of a tree ended with code {self._process.wait()}: see its message above")
        return json.loads(line)


def _answer(checkout: Path, chosen: list[str]) -> None:
    """What a worker does: time a run of the case that each line of stdin names."""
    sys.path.insert(0, str(checkout))
    fastlm = importlib.import_module("fastlm")
    assert Path(fastlm.__file__ or "").is_relative_to(checkout), f"fastlm was imported from {fastlm.__file__}"
    sys.path.remove(str(checkout))  # the benchmarks are this tree's, for both
    device = torch.device("cpu")
    cases = {
        f"{name}: {case.name}, {provider.name}": (case, provider)
        for name in chosen
        for case in importlib.import_module(f"benchmarks.bench_{name}").cases(device)
        for provider in case.providers
        if provider.role == "ours"
    }
    print(json.dumps(list(cases)), flush=True)
    copy, prepared = _sampler(machine.copy_ceiling(device).run), {}
    for line in sys.stdin:
        name = json.loads(line)
        if name not in prepared:
            prepared = {name: _prepare(*cases[name])}  # the one before is dropped: two may not fit into memory
        print(json.dumps({"case": prepared[name](), COPY: copy()}), flush=True)


def _prepare(case: harness.Case, provider: harness.Provider) -> Callable[[], float]:
    torch.manual_seed(0)
    inputs = dict(case.inputs())
    pristine = {name: inputs[name].detach().clone() for name in provider.mutates}
    run = provider.build()

    def restore() -> None:
        with torch.no_grad():
            for name, tensor in pristine.items():
                inputs[name].copy_(tensor)

    return _sampler(lambda: run(inputs), restore if pristine else None)


def _sampler(run: harness.Action, restore: harness.Action | None = None) -> Callable[[], float]:
    run()
    if restore:
        restore()
    estimate = harness._seconds(torch.device("cpu"), run)
    sample = harness.HostTimer(torch.device("cpu")).sampler(run, restore, estimate)
    repeats = 1 + min(8, int(0.1 / estimate))  # the first run after the other process's turn often gets half a core
    return lambda: statistics.median(sample() for _ in range(repeats))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.add_argument("checkout", type=lambda text: Path(text).resolve(), help="another checkout of fastlm, built")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(names())}; default: all but training")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()

"""python -m benchmarks: measure, print a table per case, write JSON and plots."""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from benchmarks import harness, machine, report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    for name in set(arguments.names) - set(names()):
        parser.error(f"there is no benchmark {name!r}, only {', '.join(names())}")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = arguments.json or (
        None if arguments.names else RESULTS / f"{machine.slug(device.type, machine.device_name(device))}.json"
    )
    record = run(arguments.names or names(), device, arguments.seconds, path, arguments.commit)
    if path:
        print(f"wrote {', '.join(map(str, report.write(record, path)))}")
    wrong = [
        f"{result['benchmark']}, {result['case']}: {', '.join(result['wrong'])}"
        for result in record["results"]
        if result["wrong"]
    ]
    for line in wrong:
        print(f"wrong result: {line}", file=sys.stderr)
    return 1 if wrong else 0


def names() -> list[str]:
    """Every benchmark, the whole training step last: it may use what time the others leave."""
    found = {file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py")}
    return sorted(found, key=lambda name: (name == "training", name))


def run(chosen: list[str], device: torch.device, seconds: float, path: Path | None, commit: str | None = None) -> dict:
    """Measure the chosen benchmarks within so many seconds; the JSON is rewritten after each case."""
    start, budget = time.perf_counter(), harness.Budget(seconds)
    record: dict = {
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "run": {**machine.provenance(commit), "budget_seconds": seconds},
        "ceilings": _ceilings(device),
        "results": [],
        "left_out": [],
    }
    print(report.text(record), flush=True)
    cases = [
        (name, case) for name in chosen for case in importlib.import_module(f"benchmarks.bench_{name}").cases(device)
    ]
    for done, (name, case) in enumerate(cases):
        if budget.remaining() <= 0:
            record["left_out"].append(f"{name}: {case.name}")
            continue
        result = {
            "benchmark": name,
            **harness.measure(case, budget.part(case.weight / sum(other.weight for _, other in cases[done:]))),
        }
        record["results"].append(result)
        record["run"]["seconds"] = round(time.perf_counter() - start, 1)
        print("\n" + report.table(result), flush=True)
        if path:
            report.write_json(record, path)
    for what in record["left_out"]:
        print(f"\nleft out, the {seconds:.0f} s were used up: {what}")
    return record


def _ceilings(device: torch.device) -> dict[str, dict[str, object]]:
    """Copy and matrix-product rates at the start, to describe the machine; shares use those of a case's own rounds."""
    ceilings = [machine.copy_ceiling(device)]
    ceilings += [machine.matmul_ceiling(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return {c.name: {"unit": c.unit, "rate": harness.time_ceiling(c, device), "amount": c.amount} for c in ceilings}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which to run: {', '.join(names())}; default: all")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to write the record and, beside it, the plots; if all are run, results/<machine>.json",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        help="total time; what does not fit is left out and named (default: %(default)s)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--commit", help="commit to record where the tree has no repository")
    return parser


if __name__ == "__main__":
    sys.exit(main())

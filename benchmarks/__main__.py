"""python -m benchmarks: measure, print a table per case, write JSON and plots."""

import argparse
import contextlib
import dataclasses
import importlib
import math
import re
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import compare, harness, machine, page, report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MINUTES_ON_A_CPU = ("accelerate",)  # for each case
SECONDS = 600.0
QUICK_SECONDS = 100.0  # and imports: together under two minutes
LOST_DEVICE = 70  # exit code: a kernel took the device's context with it, which only a new process gets back


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.compare:
        return compare_records(*arguments.compare, parser)
    for name in set(arguments.names) - set(names()):
        parser.error(f"there is no benchmark {name!r}, only {', '.join(names())}")
    with contextlib.ExitStack() as stack:
        if arguments.keep_memory:
            trainers = importlib.import_module("fastlm.train.kept_memory")  # which make gpu starts without
            stack.enter_context(trainers.kept_memory(torch.device("cpu")))
        return measure(arguments, parser)


def measure(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """What the command line asks for; 1 if a result is wrong, LOST_DEVICE if a kernel took the device with it."""
    if arguments.breakdown:
        if arguments.names != ["training"] or arguments.device == "cuda":
            parser.error("--breakdown is of training on a CPU: python -m benchmarks training --breakdown")
        breakdown = importlib.import_module("benchmarks.breakdown")  # with the models, which make gpu starts without
        breakdown.run(time_of(arguments), arguments.json)
        return 0
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    budget = harness.Budget(time_of(arguments))
    chosen = arguments.names or usual(device)
    cases = _cases(chosen, device)
    if arguments.op and not (cases := of_op(arguments.op, cases)):
        parser.error(f"no case of {', '.join(chosen)} names the op {arguments.op!r}")
    if arguments.compile_only:
        compile_only(cases, device)
        return 0
    path = arguments.json
    if not (path or arguments.names or arguments.op or arguments.quick):
        path = RESULTS / f"{machine.slug(device.type, machine.device_name(device))}.json"
    if arguments.resume and path is None:
        parser.error("--continue: there is no record to go on with; name it by --json")
    try:
        before = report.read(path, _check_continued) if arguments.resume and path and path.exists() else None
    except ValueError as error:
        parser.error(f"--continue: {error}")
    record = run(quick(cases) if arguments.quick else cases, device, budget, path, arguments.commit, before)
    if record["lost_device"]:
        return LOST_DEVICE
    if path:
        print(f"wrote {', '.join(map(str, page.write(record, path)))}")
    if arguments.quick:
        print("\nWithout torch.compile, which takes longer to compile than this run:")
        print("\n".join(report.aligned(report.beside_fastest_peer(record))))
    wrong = [
        f"{result['benchmark']}, {result['case']}: {', '.join(result['wrong'])}"
        for result in record["results"]
        if result["wrong"]
    ]
    for line in wrong:
        print(f"wrong result: {line}", file=sys.stderr)
    return 1 if wrong else 0


def time_of(arguments: argparse.Namespace) -> float:
    """The seconds that were asked for, or those of a run."""
    if arguments.seconds is not None:
        return arguments.seconds
    return QUICK_SECONDS if arguments.quick else SECONDS


def compare_records(before: Path, after: Path, parser: argparse.ArgumentParser) -> int:
    """Print what changed between two records; 1 if anything of ours became slower."""
    try:
        records = [report.read(path, lambda record: compare.text(record, record)) for path in (before, after)]
    except ValueError as error:
        parser.error(f"--compare: {error}")
    print(compare.text(*records))
    return int(any(change.verdict == "slower" for change in compare.changes(*records)))


def names() -> list[str]:
    """Every benchmark, the whole training step last: it may use what time the others leave."""
    found = {file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py")}
    return sorted(found, key=lambda name: (name == "training", name))


def usual(device: torch.device) -> list[str]:
    """What runs if no benchmark is named."""
    return [name for name in names() if device.type != "cpu" or name not in MINUTES_ON_A_CPU]


def of_op(op: str, cases: harness.Cases) -> harness.Cases:
    """Those that name the op: rms_norm is not in add_rms_norm."""
    named = re.compile(rf"\b{re.escape(op)}\b")
    return [(name, case) for name, case in cases if named.search(f"{name}: {case.name}")]


def run(
    cases: harness.Cases,
    device: torch.device,
    budget: harness.Budget,
    path: Path | None,
    commit: str | None = None,
    before: dict | None = None,
) -> dict:
    """Measure the cases within the budget; the JSON is rewritten before and after each case.

    Cases of which something was left out are measured again if there is more time for them after all others.

    before  the record of a run to be continued: what it measured is kept, and the case it was in when it ended, which
            may be why, is not tried again
    """
    record = _continued(before) if before else {"results": [], "ended_in": {}}
    record |= {
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "run": {**machine.provenance(commit), "budget_seconds": budget.seconds, "seconds": 0.0},
        "ceilings": _ceilings(device),
        "left_out": [],
        "running": None,
        "lost_device": False,
    }
    seconds_before = before["run"]["seconds"] if before else 0.0
    print(report.text(record), flush=True)
    by_name = {f"{name}: {case.name}": (name, case) for name, case in cases}
    measured = {f"{result['benchmark']}: {result['case']}": result for result in record["results"]}
    pending = [full_name for full_name in by_name if full_name not in measured.keys() | record["ended_in"].keys()]
    incomplete = [full_name for full_name in by_name if full_name in measured and measured[full_name]["left_out"]]
    overruns, given = [0.0], dict[str, float]()
    while (pending or incomplete) and not record["lost_device"]:
        if budget.remaining() <= 0:
            record["left_out"] = pending
            break
        waiting = pending or incomplete
        full_name = waiting[0]
        name, case = by_name[full_name]
        reserved = len(waiting) * statistics.mean(overruns)  # all cases may take as much longer than they should
        seconds_free = max(0.0, budget.remaining() - reserved)
        share = harness.Budget(seconds_free * case.weight / sum(by_name[other][1].weight for other in waiting))
        del waiting[0]
        if waiting is incomplete and share.seconds <= given.get(full_name, 0.0):
            continue  # it would end no further than before
        given[full_name] = share.seconds
        record["running"] = full_name
        if path:
            report.write_json(record, path)
        result = {"benchmark": name, **harness.measure(case, share, budget)}
        overruns.append(max(0.0, -share.remaining()))
        print("\n" + report.table(result), flush=True)
        record["running"], record["lost_device"] = None, not machine.answers(device)
        if record["lost_device"]:
            failed = [f"{provider}: {why}" for provider, why in result["rejected"].items() if why.startswith("failed")]
            record["ended_in"][full_name] = "; ".join(["the device's context was lost", *failed[:1]])
        elif full_name not in measured or len(result["providers"]) >= len(measured[full_name]["providers"]):
            measured[full_name] = result
        if waiting is pending and result["left_out"]:
            incomplete.append(full_name)
        record["results"] = list(measured.values())
        record["run"]["seconds"] = round(seconds_before + budget.seconds - budget.remaining(), 1)
        if path:
            report.write_json(record, path)
    for what in record["left_out"]:
        print(f"\nleft out, the {budget.seconds:.0f} s were used up: {what}")
    return record


def _continued(before: dict) -> dict:
    """What a new run keeps of the record of the one before."""
    ended_in = before["ended_in"]
    if before["running"]:
        ended_in.setdefault(before["running"], "it hung, or an error ended it")
    return {"results": before["results"], "ended_in": ended_in}


def _check_continued(record: dict) -> None:
    """Raise what run would raise."""
    report.text(record)
    _continued(record)
    float(record["run"]["seconds"])


def _cases(chosen: list[str], device: torch.device) -> harness.Cases:
    return [
        (name, case) for name in chosen for case in importlib.import_module(f"benchmarks.bench_{name}").cases(device)
    ]


def quick(cases: harness.Cases) -> harness.Cases:
    """Of each benchmark the first case that has a peer, without what torch.compile compiles; the whole step first."""
    firsts: dict[str, harness.Case] = {}
    for name, case in cases:
        if any(provider.role == "peer" for provider in case.providers):
            uncompiled = [provider for provider in case.providers if "compile" not in provider.name]
            firsts.setdefault(name, dataclasses.replace(case, providers=uncompiled))
    return sorted(firsts.items(), key=lambda first: first[0] != "training")


def compile_only(cases: harness.Cases, device: torch.device) -> None:
    """Run every provider once, so that what it compiles lies in the caches on disk by the time that counts."""
    for name, case in cases:
        if case.device.type != device.type:
            continue
        inputs = case.inputs()
        for provider in case.providers:
            with contextlib.suppress(Exception):  # the run that counts names what fails
                provider.build()(inputs)
        print(f"compiled {name}: {case.name}", flush=True)


def _ceilings(device: torch.device) -> dict[str, dict[str, object]]:
    """Copy and matrix-product rates at the start, to describe the machine; shares use those of a case's own rounds."""
    ceilings = [machine.copy_ceiling(device)]
    ceilings += [machine.matmul_ceiling(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return {c.name: {"unit": c.unit, "rate": harness.time_ceiling(c, device), "amount": c.amount} for c in ceilings}


def json_path(argument: str) -> Path:
    """Text and pictures go beside the record, under its name with other endings."""
    if not argument.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{argument} does not end in .json")
    return Path(argument)


def seconds(argument: str) -> float:
    value = float(argument)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{argument} is no time, expected 0 or more seconds")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"which to run: {', '.join(names())}; default: all but, on a CPU, {', '.join(MINUTES_ON_A_CPU)}",
    )
    parser.add_argument(
        "--json",
        type=json_path,
        metavar="FILE.json",
        help="where to write the record and, beside it, the plots; if all are run, results/<machine>.json",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        help="total time; what does not fit is left out and named "
        f"(default: {SECONDS:.0f}, with --quick {QUICK_SECONDS:.0f})",
    )
    parser.add_argument("--op", metavar="OP", help="only the cases of this op, such as swiglu or add_rms_norm")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE.json", "AFTER.json"),
        help="measure nothing: say which of our figures changed between two records by more than their noise",
    )
    parser.add_argument(
        "--breakdown",
        action="store_true",
        help="of training on a CPU: what each part of a step takes, in float32 and in bfloat16, beside its least",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the first case of each in under two minutes, without torch.compile, and a table of what matters",
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="on a CPU, keep freed memory as the trainer does, for all providers; by default glibc gives it back",
    )
    parser.add_argument("--commit", help="commit to record where the tree has no repository")
    parser.add_argument(
        "--continue", dest="resume", action="store_true", help="keep what the record holds and measure the rest"
    )
    parser.add_argument(
        "--compile-only", action="store_true", help="run everything once and time nothing: fills the caches on disk"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""A run's record as JSON and as text."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Record = Mapping[str, object]

UNITS = {
    "byte": ("GB/s", 1e9),
    "flop": ("GFLOP/s", 1e9),
    "token": ("tokens/s", 1.0),
    "document": ("M documents/s", 1e6),
}
CEILINGS = {"byte": "of copy", "flop": "of matmul"}


def write_json(record: Record, path: Path) -> None:
    """Write beside and rename, so that a run that is killed leaves the previous file or a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def read(path: Path, use: Callable[[dict], object]) -> dict:
    """The record in a file. ValueError, in words for the user, if it holds none of which use can be made."""
    try:
        record = json.loads(path.read_text())
        use(record)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError):
        raise ValueError(f"{path} is no record of python -m benchmarks; give the .json of a run") from None
    return record


def text(record: Mapping) -> str:
    """The whole record for a reader: where, when and how, then a table per case."""
    origin = record["run"]
    rates = ", ".join(f"{name} {rate(c['unit'], c['rate'])}" for name, c in record["ceilings"].items())
    heading = f"{origin_of(record)}\n{origin['command']}\nat the start: {rates}"
    left_out = [f"left out, the {origin['budget_seconds']:.0f} s were used up: {what}" for what in record["left_out"]]
    if tests := record.get("tests"):
        heading += f"\n{tests['passed']} tests on this device passed, {len(tests['failed'])} failed"
        heading += "".join(f"\n  failed: {test}" for test in tests["failed"])
    left_out += [f"not measured, {what}: {why}" for what, why in record.get("ended_in", {}).items()]
    return "\n\n".join([heading, *map(table, record["results"]), *left_out])


def origin_of(record: Mapping) -> str:
    """A line that says where, from which commit and when the figures below it were measured."""
    described, origin = record["machine"], record["run"]
    commit = (origin["commit"] or "unknown commit")[:10] + (" with changes" if origin["dirty"] else "")
    return (
        f"{described['device']}, {described['threads']} threads, {described['cpu_capability']}, "
        f"torch {record['versions']['torch']}, {commit}, {origin['date']}"
    )


def table(result: Mapping) -> str:
    """One case as text: every provider's median, quartiles, rate, share of the ceiling, memory and ratio."""
    lines = [f"{result['benchmark']}: {result['case']}"]
    lines += [f"  {line}" for line in [*_counted(result), *aligned(rows(result)), *_beside(result)]]
    return "\n".join(lines)


def rows(result: Mapping) -> list[list[str]]:
    """The head of a case's table, and a row for every provider; nothing where none was timed."""
    if not result["providers"]:
        return []
    units = [work["unit"] for work in result["work"]]
    header = ["", "median", "quartiles", *(UNITS[unit][0] for unit in units)]
    header += [CEILINGS[unit] for unit in units if unit in CEILINGS]
    header += ["peak memory", "working memory", f"vs {result['reference']}"]
    return [header] + [_row(provider, units) for provider in result["providers"]]


def notes(result: Mapping) -> list[str]:
    """What stands round the table of a case."""
    return [*_counted(result), *_beside(result)]


def _counted(result: Mapping) -> list[str]:
    lines = [f"{_amount(work['unit'], work['amount'])} = {work['formula']}" for work in result["work"]]
    return lines + [f"{name} {rate(c['unit'], c['rate'])} in the same rounds" for name, c in result["ceilings"].items()]


def _beside(result: Mapping) -> list[str]:
    lines = []
    for provider in result["providers"]:
        for floor, (ratio, low, high) in provider["times_floor"].items():
            lines.append(f"{provider['name']}: {ratio:.2f} times {floor} ({low:.2f} .. {high:.2f})")
    lines += [f"{name}: {reason}" for name, reason in result["rejected"].items()]
    return lines + [f"left out: {what}" for what in result["left_out"]]


def beside_fastest_peer(record: Mapping) -> list[list[str]]:
    """A head, and of every case the fastest of ours beside the fastest peer; none where nothing has a peer."""
    found = []
    for result in record["results"]:
        ours, peers = ([p for p in result["providers"] if p["role"] == role] for role in ("ours", "peer"))
        if not (ours and peers):
            continue
        best, peer = (min(providers, key=lambda p: p["median_ms"]) for providers in (ours, peers))
        shares = ", ".join(f"{_share(share)} {CEILINGS[unit]}" for unit, share in best["shares"].items())
        name = f"{result['benchmark']}: {result['case']}"
        found.append([name, f"{peer['median_ms'] / best['median_ms']:.2f}x", peer["name"], shares])
    head = ["", "speed of the fastest peer", "which is", "share of the machine's rate"]
    return [head, *found] if found else []


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return lines


def _row(provider: Mapping, units: list[str]) -> list[str]:
    low, high = provider["quartiles_ms"]
    counted = provider["role"] != "floor"  # a floor does part of the work, so the case's rate would flatter it
    rates = [f"{provider['rates'][unit] / UNITS[unit][1]:,.1f}" if counted else "" for unit in units]
    shares = [_share(provider["shares"].get(unit)) if counted else "" for unit in units if unit in CEILINGS]
    return [
        provider["name"],
        milliseconds(provider["median_ms"]),
        f"{milliseconds(low)} .. {milliseconds(high)}",
        *rates,
        *shares,
        megabytes(provider["peak_bytes"]),
        megabytes(provider.get("working_bytes")),  # which older records lack
        _speedup(provider),
    ]


def milliseconds(value: float) -> str:
    return f"{value * 1e3:.1f} us" if value < 1 else f"{value:,.1f} ms"


def megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:,.1f} MB"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _speedup(provider: Mapping) -> str:
    if provider["speedup"] is None:
        return ""
    low, high = provider["speedup_quartiles"]
    return f"{provider['speedup']:.2f}x ({low:.2f} .. {high:.2f})"


def _amount(unit: str, amount: float) -> str:
    names = {"byte": ("MB", 1e6), "flop": ("GFLOP", 1e9), "token": ("tokens", 1.0), "document": ("documents", 1.0)}
    name, scale = names[unit]
    return f"{amount / scale:,.0f} {name}"


def rate(unit: str, rate: float) -> str:
    name, scale = UNITS[unit]
    return f"{rate / scale:,.1f} {name}"

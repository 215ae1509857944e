"""`fastlm report`: runs on one HTML page that needs nothing else, neither network nor script nor another file.

It is drawn from what a run directory holds, whether the run has ended or not: metrics.jsonl, samples.jsonl, run.json
and the names of checkpoints and profiles. Whatever comes from a file is escaped, and the page's policy lets only its
own script run.
"""

import base64
import dataclasses
import datetime
import functools
import hashlib
import html
import json
import math
import os
import statistics
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastlm.charts import Axis, Series, line_chart, number, quantity, step_axis
from fastlm.files import atomic_write
from fastlm.report_style import SCRIPT, STYLE
from fastlm.train import checkpoint
from fastlm.train.layer_statistics import QUANTITIES
from fastlm.train.metrics import read_metrics
from fastlm.train.profiling import MEMORY_FILE, TRACE_FILE
from fastlm.train.run_facts import RUN_FILE

MARK = '<meta name="generator" content="fastlm report">'  # by which a page is known as one that may be replaced
NUM_COLORS = 8  # --series-0 ... in the style sheet
PATTERNS = ("", "dashed", "dotted")  # of lines, once the colours are used up
LONGEST_VALUE = 200  # characters of a setting that are shown
SHOWN_WITHOUT = ("config.", "metadata.", "model.", "machine.")  # what the names of settings begin with in run.json
PROFILES = {
    TRACE_FILE: ("every op and kernel on a timeline", "https://ui.perfetto.dev"),
    MEMORY_FILE: ("every block of CUDA memory and the code that allocated it", "https://pytorch.org/memory_viz"),
}

Curve = list[tuple[float, float]]


def report(runs: Sequence[Path], out: Path, *, log_loss: bool = False) -> Path:
    """Write a page about one or several runs into the file out, and return out.

    log_loss   losses on a logarithmic axis

    Raises ValueError if there is no run, one is no run directory, or out is a file that is no report; OSError if out
    cannot be written.
    """
    if not runs:
        raise ValueError("report: no run was named, expected at least one directory of a run")
    found = [read_run(Path(path), name) for path, name in zip(runs, _names(runs), strict=True)]
    out = Path(out)
    _check_replaceable(out)
    with atomic_write(out) as file:
        text = page(found, out.parent, log_loss=log_loss)
        file.write(text.encode("utf-8", errors="replace"))  # a path may be no text at all
    return out


def page(runs: Sequence["Run"], folder: Path, *, log_loss: bool = False) -> str:
    """The whole HTML document, for a file in that folder."""
    found = [record["step"] for run in runs for record in run.records]
    steps = step_axis(min(found, default=0), max(found, default=0))
    sections = [_headline(runs), _losses(runs, steps, log_loss), _updates(runs, steps), _layers(runs, steps)]
    sections += [_speed(runs, steps), _profiles(runs, folder), _packing(runs), _settings(runs), _samples(runs)]
    sections += [_checkpoints(runs)]
    title = html.escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    hashed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'"
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8>{MARK}"
        '<meta name=viewport content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{title} - fastlm report</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1><bdi>{title}</bdi></h1><p class=about>fastlm report, written {written}</p>"
        f"{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


# Reading a run


@dataclasses.dataclass(frozen=True)
class Run:
    """What the files of a run directory hold, and in one line each what is wrong with them."""

    path: Path
    name: str
    facts: dict[str, Any]  # of run.json
    records: list[dict[str, Any]]  # of metrics.jsonl, by step
    samples: list[dict[str, Any]]
    checkpoints: list[Path]
    best: Path | None
    profiles: list[Path]
    problems: list[str]

    def course(self, *path: str, scale: float = 1.0) -> Curve:
        """(step, value) wherever a record has this path, NaN for what is no number; of a step the last."""
        found: dict[int, float] = {}
        for record in self.records:
            holder = _at(record, path[:-1])
            if isinstance(holder, dict) and path[-1] in holder:
                value = _number(holder[path[-1]])
                found[record["step"]] = math.nan if value is None else value * scale
        return list(found.items())

    def curve(self, *path: str, scale: float = 1.0) -> Curve:
        """The points of the course that are numbers."""
        return [point for point in self.course(*path, scale=scale) if not math.isnan(point[1])]

    def fact(self, *path: str) -> Any:
        """What run.json says there, or None."""
        return _at(self.facts, path)

    @functools.cached_property
    def layers(self) -> list[str]:
        """Names of the layers whose norms were recorded, in the order of the model."""
        recorded = [record["layers"] for record in self.records if isinstance(record.get("layers"), dict)]
        return list(dict.fromkeys(layer for layers in recorded for layer in layers))


def read_run(path: Path, name: str) -> Run:
    """Read a run directory. Raises ValueError if it is none."""
    if not path.is_dir():
        raise ValueError(f"report: {path} is no directory, expected that of a run, as given to fastlm train --out")
    problems: list[str] = []
    records = _read(path / "metrics.jsonl", _records, problems) or []
    facts = _read(path / RUN_FILE, _facts, problems) or {}
    samples = _read(path / "samples.jsonl", _records, problems if (path / "samples.jsonl").exists() else []) or []
    checkpoints = checkpoint.paths(path)
    if not any((path / file).exists() for file in ("metrics.jsonl", RUN_FILE)) and not checkpoints:
        raise ValueError(f"report: {path} holds no run, expected metrics.jsonl, {RUN_FILE} or checkpoints in it")
    profiles = [path / file for file in PROFILES if (path / file).is_file()]
    return Run(path, name, facts, records, samples, checkpoints, checkpoint.best(path), profiles, problems)


def _read(path: Path, read: Callable[[Path, list[str]], Any], problems: list[str]) -> Any:
    """What read makes of a file; where that is nothing, a line about it in problems."""
    try:
        return read(path, problems)
    except FileNotFoundError:
        problems.append(f"there is no {path.name}, so what it would show is missing here")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name} is damaged: {' '.join(str(error).split())[:LONGEST_VALUE]}")
    return None


def _records(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    records = read_metrics(path)
    num_lines = sum(1 for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip())
    if not num_lines:
        problems.append(f"{path.name} is still empty")
    elif num_lines > len(records):
        problems.append(f"{num_lines - len(records)} of {num_lines} lines of {path.name} are damaged and left out")
    return sorted((record for record in records if 0 <= record["step"] < 2**53), key=lambda record: record["step"])


def _facts(path: Path, problems: list[str]) -> dict[str, Any]:
    facts = json.loads(path.read_text("utf-8"))
    if not isinstance(facts, dict):
        raise ValueError(f"it holds a JSON {type(facts).__name__}, expected an object")
    return facts


def _at(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _number(value: Any) -> float | None:
    """A finite number that a chart can hold, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def _names(runs: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole path where runs share the former."""
    short = [Path(run).resolve().name or str(run) for run in runs]
    return [name if short.count(name) == 1 else str(run) for name, run in zip(short, runs, strict=True)]


def _check_replaceable(out: Path) -> None:
    if out.is_dir():
        raise ValueError(f"report: {out} is a directory, expected the name of a file to write")
    if out.exists() and MARK.encode() not in out.read_bytes()[:1000]:
        raise ValueError(f"report: {out} exists and is no fastlm report: choose another file with --out")


# The sections of the page: each is "" where the runs have nothing for it


def _headline(runs: Sequence[Run]) -> str:
    """The figures that matter most: tiles for one run, a row each for several."""
    notes = "".join(
        f"<p class=problem>{_of(run, runs)}{html.escape(problem)}</p>"
        for run in runs
        for problem in (*run.problems, *_not_finite(run))
    )
    figures = [_figures(run) for run in runs]
    if len(runs) == 1:
        tiles = [
            f"<div class=card><span>{label}</span><b>{html.escape(value)}</b><small>{html.escape(note)}</small></div>"
            for label, (value, note) in figures[0].items()
        ]
        return f"{notes}<div class=tiles>{''.join(tiles)}</div>"
    labels = list(dict.fromkeys(label for found in figures for label in found))
    head = "".join(f"<th>{label}</th>" for label in labels)
    rows = [
        f"<tr><th>{_swatch(index)}<bdi>{html.escape(run.name)}</bdi></th>"
        + "".join(f"<td>{html.escape(found.get(label, ('', ''))[0])}</td>" for label in labels)
        for index, (run, found) in enumerate(zip(runs, figures, strict=True))
    ]
    return f"{notes}<div class='card wide figures'><table><tr><th>run</th>{head}</tr>{''.join(rows)}</table></div>"


def _figures(run: Run) -> dict[str, tuple[str, str]]:
    """{label: (value, note)}."""
    steps, last = _number(run.fact("config", "steps")), max((record["step"] for record in run.records), default=0)
    found = {"step": (f"{last:,}", f"of {steps:,.0f}" if steps else "")}
    loss, held_out, bits = run.course("loss"), run.curve("eval_loss"), run.curve("eval_bits_per_byte")
    if loss:
        found["training loss"] = (_loss(loss[-1][1]), "nats per token, last log line")
    if held_out:
        step, lowest = min(held_out, key=lambda point: point[1])
        found["held-out loss"] = (_loss(lowest), f"lowest, at step {step:,.0f}")
    if bits:
        baseline = _number(run.fact("baseline"))
        told = f"; unigram model: {number(baseline)}" if baseline else ""
        found["bits per byte"] = (_loss(min(value for _, value in bits)), f"lowest{told}")
    if tokens := run.curve("num_tokens"):
        found["tokens"] = (number(tokens[-1][1], 3), "trained on")
    if speeds := run.curve("tokens_per_second"):
        found["tokens/s"] = (number(statistics.median(value for _, value in speeds), 3), "median of the log lines")
    if shares := run.curve("mfu", scale=100):
        found["MFU"] = (f"{statistics.median(value for _, value in shares):.1f}%", "median of the log lines")
    if memory := run.curve("memory"):
        estimate = _number(run.fact("memory_estimate"))
        told = f"; {quantity(estimate, 'B')} estimated" if estimate else ""
        found["memory"] = (quantity(max(value for _, value in memory), "B"), f"peak{told}")
    if parameters := _number(run.fact("model", "num_parameters")):
        found["parameters"] = (number(parameters, 3), str(run.fact("model", "class"))[:LONGEST_VALUE])
    if skipped := run.curve("skipped_steps"):
        found["skipped steps"] = (f"{skipped[-1][1]:.0f}", "weights left unchanged" if skipped[-1][1] else "")
    return found


def _loss(value: float) -> str:
    """Four digits, the zeros at their end too, for losses are compared."""
    if math.isnan(value):
        return "not finite"
    return f"{value:#.4g}" if 0.01 <= value < 1000 else number(value)


def _not_finite(run: Run) -> Iterator[str]:
    """A line about each loss that was not finite somewhere."""
    for label, key, where in ("training loss", "loss", "log lines"), ("held-out loss", "eval_loss", "evaluations"):
        course = run.course(key)
        steps = [step for step, value in course if math.isnan(value)]
        if steps:
            yield f"the {label} was not finite at {len(steps)} of {len(course)} {where}, first at step {steps[0]:,.0f}"


def _losses(runs: Sequence[Run], steps: Axis, log: bool) -> str:
    if len(runs) == 1:
        both = [("training", "loss"), ("held out", "eval_loss")]
        lines = [
            Series(label, runs[0].course(key), *_look(index), has_markers=key == "eval_loss")
            for index, (label, key) in enumerate(both)
        ]
        charts = [line_chart("Loss", lines, steps, unit="nats per token", log=log)]
    else:
        charts = [
            _chart(runs, steps, "Training loss", "loss", "nats per token", log=log),
            _chart(runs, steps, "Held-out loss", "eval_loss", "nats per token", log=log, has_markers=True),
        ]
    charts.append(_chart(runs, steps, "Held-out bits per byte", "eval_bits_per_byte", log=log, has_markers=True))
    return _section("Loss", charts, "".join(_no_evaluation(run, runs) for run in runs))


def _no_evaluation(run: Run, runs: Sequence[Run]) -> str:
    """Why there is no held-out loss."""
    if run.course("eval_loss") or not run.course("loss"):
        return ""
    interval = _number(run.fact("config", "eval_interval"))
    why = "" if interval is None else " (eval_interval is 0)" if interval == 0 else f": one every {interval:,.0f} steps"
    return f"<p class=note>{_of(run, runs)}no evaluation so far{why}</p>"


def _updates(runs: Sequence[Run], steps: Axis) -> str:
    charts = [
        _chart(runs, steps, "Gradient norm", "grad_norm", "before clipping", log=True),
        _chart(runs, steps, "Learning rate", "learning_rate"),
    ]
    if any(value for run in runs for _, value in run.curve("skipped_steps")):
        charts.append(_chart(runs, steps, "Skipped steps", "skipped_steps", "since the start", whole=True))
    return _section("Updates", charts)


def _layers(runs: Sequence[Run], steps: Axis) -> str:
    titles = dict(zip(QUANTITIES, ("Gradient norm", "Weight norm", "Update / weight"), strict=True))
    charts = [
        line_chart(
            f"{titles[quantity]} by layer",
            [
                Series(layer, run.course("layers", layer, quantity), _shade(index, len(run.layers)))
                for index, layer in enumerate(run.layers)
            ],
            steps,
            unit=run.name if len(runs) > 1 else "2-norm",
            log=True,
            ramp=True,
        )
        for quantity in ("update_ratio", "grad_norm", "weight_norm")
        for run in runs
    ]
    return _section("Layers", charts)


def _speed(runs: Sequence[Run], steps: Axis) -> str:
    charts = [
        _chart(runs, steps, "Throughput", "tokens_per_second", "tokens/s", from_zero=True),
        _chart(runs, steps, "MFU", "mfu", "% of peak FLOP/s", scale=100, from_zero=True),
        _chart(runs, steps, "Memory", "memory", "GB, peak so far", scale=1e-9, from_zero=True),
    ]
    notes = [_flops(run, runs) for run in runs]
    if any(run.curve("mfu") for run in runs):
        notes.insert(
            0,
            "<p class=note>MFU = useful tokens/s &times; FLOPs per token / (ranks &times; peak FLOP/s)."
            " Useful tokens have a target, padding has none. The peak is that of dense matrices in the precision of the"
            " run.</p>",
        )
    return _section("Speed and memory", charts, "".join(notes))


def _flops(run: Run, runs: Sequence[Run]) -> str:
    """The numbers of a run from which MFU is computed."""
    rates = [
        record
        for record in run.records
        if _number(record.get("tokens_per_second")) and _number(record.get("flops_per_second"))
    ]
    if not rates:
        return ""
    per_token = rates[-1]["flops_per_second"] / rates[-1]["tokens_per_second"]
    peak, ranks = _number(run.fact("peak_flops")), _number(run.fact("world_size")) or 1
    device = html.escape(str(run.fact("machine", "device"))[:LONGEST_VALUE])
    words = f"{quantity(per_token, 'FLOP')} per token, forward and backward"
    if peak:
        words += f"; ranks: {ranks:.0f}; peak of {device}: {quantity(peak, 'FLOP/s')}"
    elif run.facts:
        words += f"; no MFU, for the peak FLOP/s of {device} is not known"
    return f"<p class=note>{_of(run, runs)}{words}</p>"


def _profiles(runs: Sequence[Run], folder: Path) -> str:
    """Links to the profiles of the runs, relative to the folder of the page."""
    lines = []
    for run in runs:
        for path in run.profiles:
            holds, viewer = PROFILES[path.name]
            lines.append(
                f'<p>{_of(run, runs)}<a href="{_relative_url(path, folder)}">{path.name}</a>: {holds};'
                f' open it in <a href="{viewer}">{viewer}</a></p>'
            )
    return f"<h2>Profile</h2><div class=card>{''.join(lines)}</div>" if lines else ""


def _relative_url(path: Path, folder: Path) -> str:
    """Where a page in that folder finds a file: every character that could end or begin something is quoted."""
    try:
        return urllib.parse.quote(os.fsencode(os.path.relpath(path, folder)).replace(os.fsencode(os.sep), b"/"))
    except ValueError:  # on another drive of Windows
        return path.absolute().as_uri()


def _packing(runs: Sequence[Run]) -> str:
    lines = [f"<p>{_of(run, runs)}{html.escape(str(run.fact('packing')))}</p>" for run in runs if run.fact("packing")]
    return f"<h2>Packing</h2><div class=card>{''.join(lines)}</div>" if lines else ""


def _settings(runs: Sequence[Run]) -> str:
    """Tables of run.json, a column for each run; rows in which runs differ come first and are marked."""
    groups = {
        "Training": ("config",),
        "Model and data": ("metadata", "model"),
        "Machine": ("precision", "machine", "versions", "started"),
    }
    tables = [_table(title, runs, keys) for title, keys in groups.items()]
    return (
        f"<h2>Settings</h2><div class={'columns' if len(runs) == 1 else 'stack'}>{''.join(tables)}</div>"
        if any(tables)
        else ""
    )


def _table(title: str, runs: Sequence[Run], keys: Sequence[str]) -> str:
    columns = [dict(_flat({key: run.facts[key] for key in keys if key in run.facts}, ())) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    if not names:
        return ""
    rows: list[tuple[bool, str]] = []
    for name in names:
        values = [column.get(name, "") for column in columns]
        differs = len(set(values)) > 1
        cells = "".join(f"<td>{html.escape(value[:LONGEST_VALUE])}</td>" for value in values)
        label = html.escape(functools.reduce(str.removeprefix, SHOWN_WITHOUT, name))
        rows.append((differs, f"<tr{' class=differs' if differs else ''}><th>{label}</th>{cells}</tr>"))
    rows.sort(key=lambda row: not row[0])
    head = "".join(f"<th>{_swatch(i)}<bdi>{html.escape(run.name)}</bdi></th>" for i, run in enumerate(runs))
    header = f"<tr><th></th>{head}</tr>" if len(runs) > 1 else ""
    body = "".join(row for _, row in rows)
    return f"<div class='card wide'><h3>{title}</h3><table>{header}{body}</table></div>"


def _flat(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, (*path, key))
    else:
        yield ".".join(path), (", ".join(map(str, value)) or "(empty)") if isinstance(value, list) else str(value)


def _samples(runs: Sequence[Run]) -> str:
    """The newest sample of each run, the older ones folded away."""
    cards = []
    for run in runs:
        texts = [
            f"<h3>{_of(run, runs)}step {record['step']:,}</h3>"
            f"<pre><i>{html.escape(str(record.get('prompt', '')))}</i>{html.escape(str(record.get('text', '')))}</pre>"
            for record in reversed(run.samples)
        ]
        older = (
            f"<details><summary>earlier samples: {len(texts) - 1}</summary>{''.join(texts[1:])}</details>"
            if texts[1:]
            else ""
        )
        if texts:
            cards.append(f"<div class=card>{texts[0]}{older}</div>")
    return _section("Samples", cards)


def _checkpoints(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        names = [
            html.escape(path.name) + (" (lowest held-out loss)" if path == run.best else "") for path in run.checkpoints
        ]
        lines.append(f"<p>{_of(run, runs)}{', '.join(names) or 'none yet'}</p>")
    return f"<h2>Checkpoints</h2><div class=card>{''.join(lines)}</div>"


def _section(title: str, parts: Sequence[str], note: str = "") -> str:
    if not any(parts):
        return ""
    return f"<h2>{title}</h2><div class=grid>{''.join(parts)}</div>{note}"


def _chart(runs: Sequence[Run], steps: Axis, title: str, key: str, unit: str = "", **options: Any) -> str:
    """One value over the steps, a line for each run; options are those of the line or the chart."""
    scale, has_markers = options.pop("scale", 1.0), options.pop("has_markers", False)
    lines = [
        Series(run.name, run.course(key, scale=scale), *_look(index), has_markers=has_markers)
        for index, run in enumerate(runs)
    ]
    return line_chart(title, lines, steps, unit=unit, **options)


def _of(run: Run, runs: Sequence[Run]) -> str:
    """Whose line it is, where there are several runs; HTML."""
    return f"<bdi>{html.escape(run.name)}</bdi>: " if len(runs) > 1 else ""


def _look(index: int) -> tuple[str, str]:
    """(colour, class) by which a line is known."""
    return f"var(--series-{index % NUM_COLORS})", PATTERNS[index // NUM_COLORS % len(PATTERNS)]


def _shade(index: int, count: int) -> str:
    """From the first layer's colour to the last one's."""
    return f"color-mix(in oklab, var(--ramp-low), var(--ramp-high) {100 * index / max(1, count - 1):.0f}%)"


def _swatch(index: int) -> str:
    color, css_class = _look(index)
    return f'<span class="{f"swatch {css_class}".strip()}" style="--color:{color}"></span>'

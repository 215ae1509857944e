"""The page is read as a browser reads it: by a parser here, and by a real Chromium where one is installed."""

import html.parser
import itertools
import json
import math
import os
import re
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

from fastlm.report import report
from fastlm.report_style import STYLE
from tests.support import chromium
from tests.support.toy import ToyLoader, toy_batch, toy_trainer

HOSTILE = '"><script>alert(1)</script><img src=http://example.com/x onerror=alert(2)>&lt;'


def records(steps, factor=1.0):
    for step in range(10, steps + 1, 10):
        loss = factor * (2 + 5 * math.exp(-step / 80)) + 0.04 * math.sin(step)
        layers = {
            f"blocks.{i}": {"grad_norm": 0.1 * (i + 1), "weight_norm": 9.0, "update_ratio": 1e-3 / (i + 1)}
            for i in range(4)
        }
        yield {
            "step": step,
            "loss": loss,
            "grad_norm": 0.5 + 1 / step,
            "learning_rate": 1e-3 * step / steps,
            "mfu": 0.41,
        }
        yield {"step": step, "num_tokens": step * 2048, "tokens_per_second": 9000.0 + step, "flops_per_second": 4e12}
        yield {"step": step, "memory": 2 * 10**9, "skipped_steps": int(step > 100)}
        yield {"step": step, "layers": layers}
        if step % 50 == 0:
            yield {"step": step, "eval_loss": loss + 0.1, "eval_bits_per_byte": (loss + 0.1) / 2}


def facts(**changes):
    config = {"steps": 200, "learning_rate": 1e-3, "out": HOSTILE} | changes
    return {"config": config, "world_size": 1, "metadata": {HOSTILE: HOSTILE}, "packing": f"99.7% used {HOSTILE}"} | {
        "machine": {"device": HOSTILE},
        "model": {"class": HOSTILE, "num_parameters": 1_234_567},
        "peak_flops": 9.89e14,
    }


def made_run(path: Path, steps=200, factor=1.0, **changes) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(steps, factor)))
    (path / "run.json").write_text(json.dumps(facts(**changes)))
    samples = [{"step": step, "prompt": HOSTILE, "text": f"{HOSTILE} of step {step}"} for step in (50, 100)]
    (path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


class Outline(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of script and style."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_data(self, data):
        if self._open[-1:] not in (["script"], ["style"]):
            self.text += data + "\n"

    def handle_endtag(self, tag):
        self._open = (
            self._open[: len(self._open) - 1 - self._open[::-1].index(tag)] if tag in self._open else self._open
        )

    def charts(self):
        return [attributes["aria-label"] for tag, attributes in self.tags if tag == "svg" and "role" in attributes]

    def links(self):
        return [attributes["href"] for tag, attributes in self.tags if tag == "a"]


def test_report_of_a_real_run_shows_what_it_recorded(tmp_path):
    held_out = [toy_batch(index, 4) for index in range(1000, 1002)]
    loader = ToyLoader()
    loader.report = "29 documents in 4 rows"
    changes = {
        "steps": 6,
        "eval_interval": 2,
        "eval_loader": held_out,
        "eval_bytes": 400,
        "layer_statistics_interval": 2,
    }
    result = toy_trainer(tmp_path / "run", loader=loader, **changes).fit()
    page = report([tmp_path / "run"], tmp_path / "page.html")
    shown = Outline(page)
    assert f"held out {result.evaluation.loss:.4g}" in shown.charts()[0]
    titles = [label.split(",")[0] for label in shown.charts()]
    assert titles == [
        "Loss",
        "Held-out bits per byte",
        "Gradient norm",
        "Learning rate",
        "Update / weight by layer",
        "Gradient norm by layer",
        "Weight norm by layer",
        "Throughput",
        "Memory",
    ]
    for words in ("29 documents in 4 rows", "learning_rate", "0.01", "step-00000006", "of 6", "ToyModel"):
        assert words in shown.text, words


def test_report_of_several_runs_draws_them_together_and_marks_where_they_differ(tmp_path):
    runs = [made_run(tmp_path / "a"), made_run(tmp_path / "b", factor=1.2, learning_rate=0.5)]
    shown = Outline(report(runs, tmp_path / "page.html"))
    assert shown.charts()[0].startswith("Training loss, at the end: a 2.")
    assert "; b 2." in shown.charts()[0]
    page = (tmp_path / "page.html").read_text()
    assert page.count("class=differs") == 1
    assert "<tr class=differs><th>learning_rate</th><td>0.001</td><td>0.5</td></tr>" in page


def test_all_charts_of_a_page_share_the_axis_of_steps(tmp_path):
    runs = [made_run(tmp_path / "long"), made_run(tmp_path / "short", steps=50)]
    for chosen in runs[:1], runs[1:], runs:
        figures = report(chosen, tmp_path / "page.html").read_text().split("<figure>")[1:]
        axes = {tuple(re.findall(r'class="x tick" x="([^"]*)"[^>]*>([^<]*)<', figure)) for figure in figures}
        assert len(axes) == 1
        assert next(iter(axes))[-1] == ("100.00%", "200" if runs[0] in chosen else "50")


def test_report_links_to_the_profiles_of_a_run_by_relative_paths(tmp_path):
    run = made_run(tmp_path / "runs" / HOSTILE.replace("/", ""))
    assert Outline(report([run], tmp_path / "page.html")).links() == []
    for name in "trace.json.gz", "memory.pickle":
        (run / name).touch()
    for page in run / "report.html", tmp_path / "runs" / "other" / "page.html":
        page.parent.mkdir(exist_ok=True)
        own, foreign = Outline(report([run], page)).links()[::2], Outline(page).links()[1::2]
        assert [os.path.normpath(page.parent / urllib.parse.unquote(link)) for link in own] == [
            str(run / "trace.json.gz"),
            str(run / "memory.pickle"),
        ]
        assert not any(link.startswith("/") or set(link) & set('"<>: ') for link in own)
        assert foreign == ["https://ui.perfetto.dev", "https://pytorch.org/memory_viz"]


def test_no_name_of_a_directory_makes_a_link_a_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = made_run(Path("javascript:alert(1)"))
    (run / "trace.json.gz").touch()
    assert Outline(report([run], Path("page.html"))).links()[0] == "javascript%3Aalert%281%29/trace.json.gz"


def test_report_tells_of_losses_that_are_not_finite(tmp_path):
    run = made_run(tmp_path / "run")
    records = [{"step": step, "loss": None if step > 6 else 2.0} for step in range(1, 11)]
    records += [{"step": 8, "eval_loss": None}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = Outline(report([run], tmp_path / "page.html")).text
    assert "the training loss was not finite at 4 of 10 log lines, first at step 7" in text
    assert "the held-out loss was not finite at 1 of 1 evaluations, first at step 8" in text
    assert "training loss\nnot finite\n" in text


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        (250, "no evaluation so far: one every 250 steps"),
        (0, "no evaluation so far (eval_interval is 0)"),
        (None, "no evaluation so far\n"),
    ],
)
def test_report_of_a_run_without_evaluation_says_so(tmp_path, interval, told):
    run = made_run(tmp_path / "run", steps=40, eval_interval=interval)
    assert told in Outline(report([run], tmp_path / "page.html")).text
    assert "no evaluation" not in report([made_run(tmp_path / "other")], tmp_path / "page.html").read_text()


def test_runs_beyond_the_colours_have_other_lines(tmp_path):
    runs = []
    for index in range(20):
        runs.append(tmp_path / f"run-{index}")
        runs[-1].mkdir()
        (runs[-1] / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    shown = Outline(report(runs, tmp_path / "page.html"))
    looks = [(attributes["class"], attributes["style"]) for tag, attributes in shown.tags if tag == "path"]
    assert len(looks) == len(set(looks)) == 20


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    runs = [made_run(tmp_path / "one" / "run"), made_run(tmp_path / "two" / "run")]
    shown = Outline(report(runs, tmp_path / "page.html"))
    assert str(runs[0]) in shown.charts()[0]
    assert str(runs[1]) in shown.charts()[0]


@pytest.mark.parametrize("together", [False, True])
def test_nothing_from_a_file_becomes_markup(tmp_path, together):
    names = [HOSTILE.replace("/", ""), "other"]
    runs = [made_run(tmp_path / name, **{HOSTILE: HOSTILE}) for name in names[: 1 + together]]
    metrics = runs[0] / "metrics.jsonl"
    hostile_layers = {"step": 20, "layers": {HOSTILE: {"grad_norm": 1.0, "update_ratio": HOSTILE}}, "loss": HOSTILE}
    metrics.write_text(metrics.read_text() + json.dumps(hostile_layers) + "\n" + HOSTILE + "\n")
    checkpoint = runs[0] / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    shown = Outline(report(runs, tmp_path / "page.html"))
    tags = [tag for tag, _ in shown.tags]
    assert tags.count("script") == 1
    assert not {"img", "link", "iframe", "object", "base"} & set(tags)
    assert not [
        key for _, attributes in shown.tags for key in attributes if key.startswith("on") or key in ("src", "href")
    ]
    assert HOSTILE in shown.text


def test_page_asks_the_network_for_nothing(tmp_path):
    page = report([made_run(tmp_path / "run")], tmp_path / "page.html").read_text()
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert "url(" not in page


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        (None, "there is no metrics.jsonl"),
        ("", "metrics.jsonl is still empty"),
        ("rubbish\n", "1 of 1 lines of metrics.jsonl are damaged"),
        ('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', "1 of 2 lines of metrics.jsonl are damaged"),
        ('{"step": 1, "loss": 1e999, "memory": true, "mfu": [1]}\n{"step": 1' + "0" * 400 + ', "loss": 1}\n', "step"),
        ('{"step": -5, "loss": 1' + "0" * 400 + "}\n", "step"),
    ],
)
def test_report_of_a_run_with_empty_or_damaged_metrics_says_so(tmp_path, metrics, told):
    run = made_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    if metrics is not None:
        (run / "metrics.jsonl").write_text(metrics)
    assert told in Outline(report([run], tmp_path / "page.html")).text


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, "\udcff"])
def test_report_of_a_run_with_a_damaged_run_json_says_so(tmp_path, content):
    run = made_run(tmp_path / "run")
    (run / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "run.json is damaged" in Outline(report([run], tmp_path / "page.html")).text


def test_report_of_a_run_that_has_only_just_begun(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts()))
    assert "there is no metrics.jsonl" in Outline(report([tmp_path / "run"], tmp_path / "page.html")).text


def test_report_refuses_what_is_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no run was named"):
        report([], tmp_path / "page.html")
    with pytest.raises(ValueError, match=r"nowhere is no directory, expected that of a run"):
        report([tmp_path / "nowhere"], tmp_path / "page.html")
    with pytest.raises(ValueError, match=r"holds no run, expected metrics.jsonl"):
        report([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_report_replaces_a_report_and_nothing_else(tmp_path):
    run, page = made_run(tmp_path / "run"), tmp_path / "page.html"
    report([run], page)
    (run / "metrics.jsonl").write_text('{"step": 777, "loss": 1.0}\n')
    assert report([run], page) == page
    assert "777" in page.read_text()
    for content in ("", "my thesis"):
        page.write_text(content)
        with pytest.raises(ValueError, match=r"page.html exists and is no fastlm report: choose another file"):
            report([run], page)
        assert page.read_text() == content
    with pytest.raises(ValueError, match="is a directory"):
        report([run], run)


def test_long_runs_make_small_pages(tmp_path):
    (tmp_path / "run").mkdir()
    lines = "".join(f'{{"step": {step}, "loss": {3 + step % 7}, "grad_norm": 1.5}}\n' for step in range(20_000))
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    assert report([tmp_path / "run"], tmp_path / "page.html").stat().st_size < 100_000


# How far colours are apart: OKLab (https://bottosson.github.io/posts/oklab), and what each kind of colour blindness
# makes of linear sRGB (Machado, Oliveira, Fernandes 2009, severity 1.0).
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
LMS = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
OKLAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


def linear_rgb(color):
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(first, second):
    """WCAG's contrast of two colours, 1 to 21."""
    low, high = sorted(float(linear_rgb(color) @ [0.2126, 0.7152, 0.0722]) for color in (first, second))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_told_apart_by_everyone_and_stand_out_from_the_card(scheme):
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    colors = dict(re.findall(r"--([\w-]+): (#\w{6})", light if scheme == "light" else dark))
    series = [color for name, color in colors.items() if name.startswith("series")]
    assert len(series) == 8
    assert min(contrast(color, colors["card"]) for color in series) >= 3
    assert min(contrast(colors[text], colors["card"]) for text in ("ink", "soft", "faint", "warn")) >= 4.5
    for vision, matrix in VISIONS.items():
        places = [np.cbrt((LMS @ (matrix @ linear_rgb(color))).clip(0)) @ np.transpose(OKLAB) for color in series]
        apart = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(places, 2))
        assert apart > 0.1, vision  # 0.02 is just noticed side by side


SIZES = """[...document.querySelectorAll('figure > svg')].map(svg => {
  const box = svg.getBoundingClientRect(), line = svg.querySelector('path').getBoundingClientRect();
  return [box.width, box.height, line.width];
})"""

# of each text of a chart: its font size on the screen, and how many pixels it sticks out of the card around the chart
TEXTS = """[...document.querySelectorAll('figure > svg text')].map(text => {
  const box = text.getBoundingClientRect(), card = text.closest('figure').getBoundingClientRect();
  const scale = text.getScreenCTM().d;
  return [parseFloat(getComputedStyle(text).fontSize) * scale, card.left - box.left, box.right - card.right];
})"""

# the least distance of two neighbouring ticks of an x axis
GAPS = """Math.min(...[...document.querySelectorAll('figure > svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('.x.tick')].map(text => text.getBoundingClientRect());
  return boxes.slice(1).map((box, index) => box.left - boxes[index].right);
}))"""

MIDDLE_OF_FIRST_CHART = """(svg => {
  svg.scrollIntoView();
  const box = svg.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + 60];
})(document.querySelector('svg'))"""


@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")
def test_page_in_a_real_browser_draws_every_chart_asks_for_nothing_and_shows_values_under_the_pointer(tmp_path):
    runs = [made_run(tmp_path / HOSTILE.replace("/", "")), made_run(tmp_path / "b", factor=1.2, learning_rate=0.5)]
    page = report(runs, tmp_path / "page.html")
    with chromium.open_page() as browser:
        browser.open(page.as_uri())
        assert browser.requests == [page.as_uri()]
        assert browser.complaints == []
        sizes = browser.evaluate(SIZES)
        assert len(sizes) == page.read_text().count("<figure")
        assert all(width > 300 and height > 150 and line > 200 for width, height, line in sizes)
        x, y = browser.evaluate(MIDDLE_OF_FIRST_CHART)
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        tip = browser.evaluate("document.querySelector('.tip:not([hidden])').innerText").split("\n")
        assert tip[0].startswith("step ")
        assert len(tip) == 3
        width = browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert width == 0, "the page is wider than its window"
        # what no markup of a file may do, the page's policy forbids too
        markup = "<img src=http://127.0.0.1:9/x onerror=window.ran=1>"
        browser.evaluate(f"document.body.insertAdjacentHTML('beforeend', '{markup}')")
        browser.evaluate("new Promise(done => setTimeout(done, 100))")
        assert browser.evaluate("window.ran") is None
        told = "".join(browser.complaints)
        assert "default-src 'none'" in told, "the image was asked for"
        assert "script-src 'sha256" in told


@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")
def test_page_on_a_phone_can_be_read_without_zoom_and_is_no_wider(tmp_path):
    names = [f"gpt2-124m-with-a-name-that-is-sixty-letters-long-and-number-{index}" for index in range(8)]
    runs = [made_run(tmp_path / name) for name in names]
    late = ({**record, "step": record["step"] * 501} for record in records(200))  # ticks such as 100.2k are the widest
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in late))
    with chromium.open_page() as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        for chosen in runs[:1], runs:
            browser.open(report(chosen, tmp_path / "page.html").as_uri())
            texts = browser.evaluate(TEXTS)
            assert min(size for size, *_ in texts) >= 11
            assert max(max(beyond) for _, *beyond in texts) <= 0
            assert browser.evaluate(GAPS) >= 4
            assert browser.evaluate("document.documentElement.scrollWidth") == 390

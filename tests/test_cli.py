"""The command line: a user's mistake is one line and exit code 2, and the whole way from text to a sample works."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm import cli

pytestmark = pytest.mark.usefixtures("obeyed_signals")

TEXT = (
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n"
)
TINY = [
    "--vocab-size",
    "300",
    "--sequence-length",
    "64",
    "--num-layers",
    "1",
    "--num-heads",
    "2",
    "--hidden-size",
    "32",
]
TINY += ["--batch-size", "2", "--log-interval", "1", "--eval-interval", "0", "--checkpoint-interval", "2"]


@dataclasses.dataclass
class Inner:
    """Nested options."""

    num_layers: int = 4
    """How many."""


@dataclasses.dataclass
class Outer:
    """Options of a command."""

    config: Path | None = None
    """TOML."""
    steps: int = 3
    """How long."""
    compile: bool = False
    """Whether to."""
    inner: Inner = dataclasses.field(default_factory=Inner)
    text: str = ""
    """What."""


def parsed(*argv: str) -> Outer:
    return cli.parse(Outer, list(argv), "fastlm outer")


def fastlm(*argv: object, cache: Path, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastlm", *map(str, argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"FASTLM_CACHE": str(cache)},
        **options,
    )


@pytest.fixture
def fastlm_here(cache, capsys, monkeypatch):
    """As fastlm, in this process: PyTorch is imported already. For calls that refuse before they change its state."""
    monkeypatch.setenv("FASTLM_CACHE", str(cache))

    def run(*argv: object) -> subprocess.CompletedProcess:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(map(str, argv)))
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(argv, stop.value.code, printed.out, printed.err)

    return run


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i}.py").write_text(TEXT.replace("Point", f"Point{i}") * (1 + i % 5))
    return folder


@pytest.fixture(scope="module")
def trained(corpus, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    done = fastlm("train", "--data", corpus, "--out", out, "--steps", 4, *TINY, cache=cache)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def assert_one_line_mistake(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fastlm: ")
    for word in words:
        assert word in lines[0]


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_parse_reads_flags_of_nested_options():
    assert parsed("--num-layers", "7", "--compile") == Outer(compile=True, inner=Inner(7))


def test_parse_puts_flags_over_the_file(tmp_path):
    file = tmp_path / "options with space.toml"
    file.write_text("steps = 5\nnum_layers = 2\ncompile = true\n")
    assert parsed("--config", str(file), "--steps", "9") == Outer(file, 9, True, Inner(2))
    assert parsed(f"--config={file}") == Outer(file, 5, True, Inner(2))


@pytest.mark.parametrize("value", ["--help", "--", "-1", "--steps", "-dash.txt", "", "a=b", "--text=x"])
def test_parse_takes_any_text_of_the_file(tmp_path, value):
    file = tmp_path / "options.toml"
    file.write_text(f"text = {json.dumps(value)}\n")
    assert parsed("--config", str(file)).text == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepz", "4"], "unknown option '--stepz' (did you mean --steps?); see fastlm outer --help"),
        (["--steps", "many"], "invalid literal for int() with base 10: 'many'"),
        (["--steps"], "Missing value for argument '--steps'"),
        (["surplus"], "unknown option 'surplus'; see fastlm outer --help"),
    ],
)
def test_parse_refuses_in_one_line(argv, message):
    with pytest.raises(cli.UsageError) as caught:
        parsed(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 4", "unknown key 'stepz' (did you mean --steps?)"),
        ("steps 4", "is not TOML"),
        ("steps = 'a'", "invalid literal"),
        ("a = " + "[" * 5000, "is not TOML"),
        (b"steps = '\xff'", "options.toml is not TOML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_config_file_is_checked_like_flags(tmp_path, text, message):
    file = tmp_path / "options.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(cli.UsageError) as caught:
        parsed("--config", str(file))
    assert message in str(caught.value)


def test_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"fastlm: unknown command 'trian' (did you mean train?); commands are {', '.join(cli.COMMANDS)}\n"
    )


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"]])
def test_help_and_version_need_no_torch(argv):
    code = f"import sys; from fastlm.cli import main; main({argv}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_our_own_mistake_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), cli.one_line_errors():
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    "take",
    [
        lambda: torch.empty(2**50),
        lambda: torch.empty(2**40, 2**40),
        lambda: np.empty(2**50),
    ],
)
def test_out_of_memory_is_one_line(take, capsys):
    with pytest.raises(SystemExit) as stop, cli.one_line_errors():
        take()
    assert stop.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("fastlm: out of memory: take a smaller batch_size, sequence_length or model (")
    assert complaint.count("\n") == 1


class CompilerError(OSError, RuntimeError):
    """As the trainer's, which tells in its own words what to do."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "out of memory: take a smal",
        ),
        (RuntimeError("std::bad_alloc"), "out of memory: take a smaller"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory: take a smaller"),
        (CompilerError("torch.compile failed: stack overflow, out of memory"), "torch.compile failed: "),
        (OverflowError("Python int too large to convert to C long"), "a number is too large: Python int"),
    ],
)
def test_situations_of_other_classes_are_one_line(error, message, capsys):
    with pytest.raises(SystemExit) as stop, cli.one_line_errors():
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"fastlm: {message}")


@pytest.mark.parametrize("error", [KeyError("a"), IndexError("b"), AttributeError("c"), ZeroDivisionError("d")])
def test_faults_of_the_program_are_not_hidden(error):
    with pytest.raises(type(error)), cli.one_line_errors():
        raise error
    with pytest.raises(type(error)), cli.extra("no sample"):
        raise error


def test_extra_that_fails_is_told_and_ends_nothing(capsys):
    with cli.extra("no sample"):
        raise ValueError("the logits\nare not finite")
    assert capsys.readouterr().err == "fastlm: no sample: the logits are not finite\n"


def without_home():
    raise RuntimeError("Could not determine home directory.")


def test_cache_directory_names_its_variable_where_there_is_no_home(monkeypatch):
    for name in "FASTLM_CACHE", "XDG_CACHE_HOME":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", without_home)
    with pytest.raises(cli.UsageError, match="no home directory to cache in: set FASTLM_CACHE"):
        cli.cache_directory()
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cli.cache_directory() == Path("/xdg/fastlm")
    monkeypatch.setenv("FASTLM_CACHE", "")
    assert cli.cache_directory() == Path("/xdg/fastlm")


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_console_tells_of_a_closed_pipe_once_and_is_silent_then(monkeypatch, capsys):
    with broken_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        console = cli.open_console(quiet=False)
        with pytest.raises(BrokenPipeError):
            console.print("words")
        console.print("more words")
        print("and more", flush=True)
    assert capsys.readouterr().err == (
        "fastlm: nobody reads the output any more: training stops after the next step, with a checkpoint\n"
    )


def test_mistake_that_nobody_can_be_told_keeps_its_exit_code(monkeypatch):
    with broken_pipe() as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(SystemExit) as stop, cli.one_line_errors():
            raise ValueError("a mistake")
        assert stop.value.code == 2


def test_text_that_the_terminal_cannot_show_is_replaced(trained, cache, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = fastlm("generate", trained[0], "--prompt", "h\u00e9", "--max-new-tokens", 2, cache=cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("h?")


def test_train_says_what_it_does_and_leaves_a_whole_run(trained):
    out, printed = trained
    for words in ("documents", "packing", "fp32 on cpu", "loss", "bits/byte", "unigram", "run directory"):
        assert words in printed, f"{words!r} is not in:\n{printed}"
    names = {path.name for path in out.iterdir()}
    assert {"checkpoints", "metrics.jsonl", "run.json", "samples.jsonl", "tokenizer.json"} <= names
    steps = [
        record["step"]
        for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "loss" in record
    ]
    assert set(steps) >= {1, 2, 3, 4}


def test_train_resumes_where_it_was(trained, corpus, cache):
    out, _ = trained
    done = fastlm("train", "--data", corpus, "--out", out, "--steps", 6, *TINY, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "resum" in done.stdout
    assert "step 3/6" not in done.stdout
    assert "step 5/6" in done.stdout


def test_generate_is_repeatable_by_seed(trained, cache):
    out, _ = trained
    texts = [
        fastlm("generate", out, "--prompt", "def ", "--max-new-tokens", 12, "--seed", 1, cache=cache) for _ in range(2)
    ]
    assert texts[0].returncode == 0, texts[0].stderr
    assert texts[0].stdout.startswith("def ")
    assert texts[0].stdout == texts[1].stdout


def test_report_draws_a_run_into_its_directory_and_several_where_it_is_told(trained, tmp_path, capsys):
    out, _ = trained
    cli.main(["report", str(out)])
    assert capsys.readouterr().out == f"open {out}/report.html in a browser\n"
    page = (out / "report.html").read_text()
    for words in ("<svg", "documents in", "hidden_size", "step-0000000"):
        assert words in page
    cli.main(["report", str(out), str(out), "--out", str(tmp_path / "two.html"), "--log-loss"])
    assert "Training loss" in (tmp_path / "two.html").read_text()


def test_mistakes_in_reporting_are_one_line(trained, tmp_path, fastlm_here):
    out, _ = trained
    (tmp_path / "thesis.html").write_text("mine")
    assert_one_line_mistake(fastlm_here("report"), "no run was named")
    assert_one_line_mistake(fastlm_here("report", tmp_path / "nowhere"), "nowhere is no directory")
    assert_one_line_mistake(fastlm_here("report", tmp_path), "holds no run")
    assert_one_line_mistake(fastlm_here("report", out, "--out", tmp_path / "thesis.html"), "is no fastlm report")
    assert (tmp_path / "thesis.html").read_text() == "mine"


def test_doctor_tells_versions_libraries_and_ops(cache):
    done = fastlm("doctor", cache=cache)
    assert done.returncode == 0, done.stderr
    for words in ("torch", "triton", "_cpu", "_cuda", "layer_norm", "cross_entropy"):
        assert words in done.stdout


def test_interrupt_saves_and_resumes(corpus, cache, tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "fastlm",
        "train",
        "--data",
        str(corpus),
        "--out",
        str(out),
        "--steps",
        "100000",
        *TINY,
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"FASTLM_CACHE": str(cache)},
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert "Traceback" not in complaint
    last = max(int(path.name.removeprefix("step-")) for path in out.glob("checkpoints/step-*"))
    done = fastlm("train", "--data", corpus, "--out", out, "--steps", last + 1, *TINY, cache=cache)
    assert done.returncode == 0, done.stderr
    assert f"step {last + 1}/{last + 1}" in done.stdout


def test_mistakes_in_training_are_one_line(trained, corpus, cache, tmp_path, fastlm_here):
    out, _ = trained
    empty, binary, blocked = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "file"
    empty.write_text(" \n")
    binary.write_bytes(b"\x00\xff\x01" * 1000)
    blocked.write_text("in the way")
    before = files_of(out)

    def train(*arguments: object) -> subprocess.CompletedProcess:
        return fastlm_here("train", *arguments, "--steps", 8)

    fresh = ["--out", tmp_path / "fresh"]
    assert_one_line_mistake(fastlm("train", "--unknown", cache=cache), "--unknown")
    assert_one_line_mistake(train("--data", tmp_path / "missing.txt", *fresh, *TINY), "missing.txt")
    assert_one_line_mistake(train("--data", empty, *fresh, *TINY), "empty.txt")
    assert_one_line_mistake(train("--data", binary, *fresh, *TINY), "binary.txt")
    assert_one_line_mistake(train("--data", "", *fresh, *TINY), "no source of text was named")
    assert_one_line_mistake(train("--eval-tokens", 0), "eval_tokens is 0, expected at least 1")
    huge = [*TINY, "--vocab-size", 10**12]
    assert_one_line_mistake(train("--data", corpus, *fresh, *huge), "vocab_size", "expected at most")
    assert_one_line_mistake(train("--data", corpus, "--out", blocked / "run", *TINY), "file")
    longer = [*TINY, "--sequence-length", "128"]
    assert_one_line_mistake(train("--data", corpus, "--out", out, *longer), "sequence_length", "64", "128")
    other = [*TINY, "--vocab-size", "310"]
    assert_one_line_mistake(train("--data", corpus, "--out", out, *other), "300", "310")
    assert_one_line_mistake(fastlm_here("generate", tmp_path / "nowhere"), "nowhere")
    assert_one_line_mistake(fastlm("generate", out, "--prompt", "\udcff", cache=cache), "'\\udcff' is not text")
    assert files_of(out) == before, "a refused run wrote something"

"""The command line: a user's mistake is one line and exit code 2, and the whole way from text to a sample works."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import tyro

from fastlm import cli
from fastlm import pretrain as fastlm_pretrain
from fastlm.configuration import to_toml
from fastlm.pretrain import PretrainOptions
from fastlm.train import TrainResult
from tests.test_configuration import OF_TRAINING

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

    run: tyro.conf.Positional[Path] = Path("runs")
    """Where."""
    steps: int = 3
    """How long."""
    compile: bool = False
    """Whether to."""
    inner: Inner = dataclasses.field(default_factory=Inner)
    text: str = ""
    """What."""
    tokenizer: Path | None = None
    """A file."""
    mode: Literal["fast-one", "exact", "fast-two"] | None = None
    """Which."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Two."""
    sinks: tuple[Literal["file", "screen"], ...] = ()
    """Some."""


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


def test_parse_takes_none_and_homes_for_paths():
    assert parsed("~/a", "--tokenizer", "None") == Outer(run=Path.home() / "a")
    assert parsed("--tokenizer", "~/b") == Outer(tokenizer=Path.home() / "b")
    assert parsed("here", "--text=--steps") == Outer(Path("here"), text="--steps")


def test_parse_reads_every_type():
    argv = "--steps -3 --text 7 --mode exact --betas 1 -1e-3 --sinks screen file"
    expected = Outer(steps=-3, text="7", mode="exact", betas=(1.0, -1e-3), sinks=("screen", "file"))
    assert parsed(*argv.split()) == expected
    assert parsed("--sinks", "--mode", "None") == Outer()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepz", "4"], "unknown option '--stepz' (did you mean --steps?); see fastlm outer --help"),
        (["-steps=4"], "unknown option '-steps' (did you mean --steps?); see fastlm outer --help"),
        (["--steps", "many"], "--steps is 'many', expected an integer"),
        (["--steps", "1e3"], "--steps is '1e3', expected an integer"),
        (["--num_layers", "x"], "--num-layers is 'x', expected an integer"),
        (["--steps"], "--steps has no value, expected an integer; see fastlm outer --help"),
        (["--steps", "--compile"], "--steps has no value, expected an integer"),
        (["--steps", "1", "2", "3"], "unexpected '3': --steps is given its value already, expected an integer"),
        (["a", "surplus"], "unexpected 'surplus': options begin with --; see fastlm outer --help"),
        (["a", "--compile", "yes"], "unexpected 'yes': --compile takes no value, expected --compile or --no-compile"),
        (["a", "--compile=yes"], "--compile takes no value, expected --compile or --no-compile alone"),
        (["--mode", "fast"], 'expected one of fast-one, exact, fast-two or "None" (did you mean fast-one?)'),
        (["--mode", "EXACT"], "--mode is 'EXACT', expected one of fast-one, exact, fast-two"),
        (["--betas", "0.9"], "--betas is '0.9', expected a list of 2, each a number"),
        (["--betas", "0.9", "x"], "--betas is '0.9 x', expected a number"),
        (["--sinks", "file", "scren"], "--sinks is 'file scren', expected one of file, screen (did you mean screen?)"),
        (["--tokenizer", ""], "--tokenizer is '', expected a path or \"None\""),
        (["--tokenizer", "~nobody-of-this-name"], "--tokenizer is '~nobody-of-this-name', expected a path"),
    ],
)
def test_parse_refuses_in_one_line(argv, message):
    with pytest.raises(cli.UsageError) as caught:
        parsed(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parse_refuses_in_the_same_words_where_the_terminal_is_not_utf_8(monkeypatch):
    for encoding in "utf-8", "ascii":
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with pytest.raises(
            cli.UsageError, match=r"^--steps has no value, expected an integer; see fastlm outer --help$"
        ):
            parsed("--steps")


def train_options(*argv: object) -> PretrainOptions:
    return cli.read_train_options(list(map(str, argv)))[0]


def test_train_without_flags_is_the_defaults():
    assert cli.read_train_options([]) == (PretrainOptions(), None)


def test_train_puts_flags_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "options with space.toml"
    file.write_text("preset = 'llama-135m'\nnum_layers = 2\nsteps = 5\nhidden_size = 100\n[training]\ncompile = true\n")
    options = train_options("--config", file, "--steps", 9, "--num-heads", 10, "--num-kv-heads", "None", "--no-compile")
    assert (options.training.steps, options.training.compile, options.training.learning_rate) == (9, False, 3e-3)
    model = options.model
    assert (model.num_layers, model.hidden_size, model.num_heads, model.kv_heads) == (2, 100, 10, 10)
    assert (model.vocab_size, options.training.seed) == (49152, 0)


def test_train_refuses_a_start_that_the_file_leaves_nothing_of(tmp_path):
    (tmp_path / "all.toml").write_text(to_toml(PretrainOptions()))
    with pytest.raises(cli.UsageError, match=r"depth 4 changes nothing: .*all.toml sets all that it would"):
        train_options("--config", tmp_path / "all.toml", "--depth", 4)


@pytest.mark.parametrize(
    "argv",
    [["--preset", "gpt2-124m", "--device", "cpu"], ["--depth", "3", "--vocab-size", "500", "--prompt", "a\nb"]],
)
def test_printed_configuration_gives_the_same_run(tmp_path, argv):
    options, toml = cli.read_train_options([*argv, "--print-config"])
    (tmp_path / "printed.toml").write_text(toml)
    assert train_options(f"--config={tmp_path / 'printed.toml'}") == options


def test_printed_configuration_tells_where_each_value_is_from(tmp_path):
    (tmp_path / "my\nown.toml").write_text("seed = 3")
    argv = ["--config", str(tmp_path / "my\nown.toml"), "--depth", "2", "--vocab-size", "500", "--print-config"]
    lines = cli.read_train_options(argv)[1].splitlines()
    assert "num_layers = 2  # depth 2" in lines
    assert "vocab_size = 500  # flag" in lines
    assert "sequence_length = 256" in lines
    assert any(line.startswith("seed = 3  # ") and line.endswith('my\\nown.toml"') for line in lines)


def test_train_prints_its_configuration_and_trains_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cli.main(["train", "--print-config", "--steps", "3"])
    printed = capsys.readouterr()
    assert "\nsteps = 3  # flag\n" in printed.out
    assert printed.err == ""
    assert list(tmp_path.iterdir()) == []


def test_train_names_the_place_of_a_mistake_in_a_file(tmp_path, fastlm_here):
    file = tmp_path / "mine.toml"
    file.write_text("\nstepz = 4")
    assert_one_line_mistake(
        fastlm_here("train", "--config", file), "mine.toml:2: unknown key 'stepz' (did you mean steps"
    )
    assert_one_line_mistake(fastlm_here("train", "--config", tmp_path / "none.toml"), "none.toml: No such file")
    assert_one_line_mistake(fastlm_here("train", "--out", ""), "--out is '', expected a path")
    assert_one_line_mistake(fastlm_here("train", "a.txt"), "unexpected 'a.txt'", "such as --data a.txt")
    assert_one_line_mistake(
        fastlm_here("train", "--preset", "gpt2"), "expected one of tiny, gpt2-124m, ", "(did you mean gpt2-124m?)"
    )


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # the test has no stderr with a descriptor
def test_mistake_of_all_ranks_is_told_by_one_and_in_every_error_file(tmp_path, fastlm_here, monkeypatch):
    line = "fastlm: TrainConfig: steps is 0, expected an integer of at least 1"
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank))
        done = fastlm_here("train", "--steps", 0)
        assert (done.returncode, done.stderr) == (2, f"{line}\n" if rank == "0" else "")
        told = json.loads((tmp_path / rank).read_text())["message"]
        assert told["extraInfo"]["py_callstack"] == line


def test_help_of_training_has_a_group_for_each_dataclass_and_lists_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    titles = [line.strip("╭─╮ ") for line in text.splitlines() if line.strip("╭─╮ ").endswith("options")]
    assert titles[1:] == list(dict.fromkeys(f"{option.group} options" for option in OF_TRAINING))
    assert "gpt2-1.5b" in text
    assert "--depth INT|None " in text
    assert "(default: 700)" in text


def test_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"fastlm: unknown command 'trian' (did you mean train?); commands are {', '.join(cli.COMMANDS)}\n"
    )


def test_option_in_the_place_of_the_command_is_told(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--steps", "3"])
    assert "--steps stands where a command is expected: one of train, generate" in capsys.readouterr().err


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
    assert {"checkpoints", "metrics.jsonl", "run.json", "samples.jsonl", "tokenizer.json", "config.toml"} <= names
    assert "config-4.toml" not in names
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
    assert "\nsteps = 6\n" in (out / "config.toml").read_text()
    assert "\nsteps = 4\n" in (out / "config-4.toml").read_text()
    assert "step 5/6" in done.stdout


def test_train_that_stops_early_ends_as_one_that_is_done(monkeypatch, capsys, tmp_path):
    done = types.SimpleNamespace(stopped_by="early stopping")
    monkeypatch.setattr(fastlm_pretrain, "prepare_data", lambda *arguments: None)
    monkeypatch.setattr(fastlm_pretrain, "pretrain", lambda *arguments: done)
    monkeypatch.setattr(fastlm_pretrain, "load_run", lambda run: (None, None))
    monkeypatch.setattr(cli, "continue_text", lambda model, tokenizer, options: print("the sample"))
    cli.main(["train", "--out", str(tmp_path)])
    assert "the sample" in capsys.readouterr().out


def test_generate_is_repeatable_by_seed(trained, cache):
    out, _ = trained
    texts = [
        fastlm("generate", out, "--prompt", "def ", "--max-new-tokens", 12, "--seed", 1, cache=cache) for _ in range(2)
    ]
    assert texts[0].returncode == 0, texts[0].stderr
    assert texts[0].stdout.startswith("def ")
    assert texts[0].stdout == texts[1].stdout


def test_export_writes_a_directory_that_generates_the_same(trained, tmp_path, fastlm_here, capsys):
    out = shutil.copytree(trained[0], tmp_path / "run")
    cli.main(["export", str(out), str(tmp_path / "export"), "--dtype", "float32"])
    assert f"{tmp_path / 'export'} holds the model and its tokenizer" in capsys.readouterr().out
    texts = []
    for source in out, tmp_path / "export":
        cli.main(["generate", str(source), "--prompt", "def ", "--max-new-tokens", "12", "--temperature", "0"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) > len("def \n")
    cli.main(["export", str(out)])
    assert (out / "export" / "tokenizer_config.json").exists()
    assert_one_line_mistake(fastlm_here("export", out), "export: there is something already; choose another directory")


def test_mistakes_of_a_directory_of_hugging_face_are_one_line(trained, tmp_path, fastlm_here):
    assert_one_line_mistake(fastlm_here("export", tmp_path / "nowhere"), "nowhere holds no checkpoint")
    (tmp_path / "text.jsonl").touch()
    assert_one_line_mistake(fastlm_here("generate", tmp_path / "text.jsonl"), "text.jsonl is a file, expected the dir")
    cli.main(["export", str(trained[0]), str(tmp_path / "export")])
    weights, configuration = tmp_path / "export" / "model.safetensors", tmp_path / "export" / "config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    assert_one_line_mistake(fastlm_here("generate", tmp_path / "export"), "model.safetensors: is damaged")
    weights.write_bytes(content)
    for text, message in ("{", "config.json: is not JSON"), ('{"model_type": "bert"}', "model_type is 'bert'"):
        configuration.write_text(text)
        assert_one_line_mistake(fastlm_here("generate", tmp_path / "export"), message)


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


def test_preempted_run_saves_exits_with_75_and_resumes(corpus, cache, tmp_path):
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
    process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 75, complaint
    assert "Traceback" not in complaint
    last = max(int(path.name.removeprefix("step-")) for path in out.glob("checkpoints/step-*"))
    done = fastlm("train", "--data", corpus, "--out", out, "--steps", last + 1, *TINY, cache=cache)
    assert done.returncode == 0, done.stderr
    assert f"step {last + 1}/{last + 1}" in done.stdout


@pytest.mark.parametrize(
    ("stopped_by", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGHUP", 75), ("SIGINT", 130), ("a closed pipe", 0)]
)
def test_train_tells_by_its_exit_code_what_stopped_it(fastlm_here, monkeypatch, tmp_path, stopped_by, code):
    stopped = TrainResult(3, 9, 0, None, None, tmp_path, stopped_by)
    monkeypatch.setattr("fastlm.pretrain.prepare_data", lambda *arguments: None)
    monkeypatch.setattr("fastlm.pretrain.pretrain", lambda *arguments: stopped)
    assert fastlm_here("train", "--out", tmp_path / "run").returncode == code


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

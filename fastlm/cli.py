"""The `fastlm` command: the only place that reads the command line and the environment, and the only one that prints.

A command is a dataclass of options and a function. Flags, defaults and help are read off the dataclass (tyro). A TOML
file given by `--config` is turned into flags that stand before those of the command line, so these win. A user's
mistake is one line on stderr and exit code 2; FASTLM_TRACEBACK=1 shows where it was noticed.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import sys
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

import tyro

import fastlm

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from fastlm.data import Tokenizer
    from fastlm.models import GPT

Options = TypeVar("Options")

MISTAKE, INTERRUPTED = 2, 130


class UsageError(ValueError):
    """The command line, or the file that --config names, cannot be understood; the message is one line."""


@dataclasses.dataclass
class GenerateOptions:
    """Continue a text with a trained model."""

    run: tyro.conf.Positional[Path] = Path("runs/stdlib")
    """Directory of the run, as given to `fastlm train --out`."""
    prompt: str = ""
    """Text to continue; empty starts a new document."""
    max_new_tokens: int = 200
    """Stop after this many tokens, or at the end of the document."""
    temperature: float = 0.8
    """Below 1 is more careful, above 1 more varied; 0 always takes the most likely token."""
    top_k: int | None = 50
    """Sample among this many most likely tokens; None for all."""
    seed: int | None = None
    """Makes the sample repeatable."""


@dataclasses.dataclass
class ReportOptions:
    """Draw runs, finished or going on, on one HTML page."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs, as given to `fastlm train --out`; several are compared."""
    out: Path | None = None
    """File to write; None is report.html, in the run's directory if there is but one."""
    log_loss: bool = False
    """Draw losses on a logarithmic axis."""


def main(argv: list[str] | None = None) -> None:
    """Run the command that argv names, then exit: 0 done, 2 a mistake told in one line, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # else a terminal that is not UTF-8 ends a sample with an error
    with one_line_errors():
        name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
        if name in ("-h", "--help", "help"):
            print(overview())
        elif name in ("-V", "--version"):
            print(f"fastlm {fastlm.__version__}")
        elif name in COMMANDS:
            COMMANDS[name](rest)
        else:
            raise UsageError(f"unknown command {name!r}{nearest(name, COMMANDS)}; commands are {', '.join(COMMANDS)}")


def overview() -> str:
    lines = [f"  {name:<10} {(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items()]
    return "\n".join(["usage: fastlm COMMAND [--help] [options]", "", *lines])


def train(argv: list[str]) -> None:
    """Train a GPT on text: no flag is needed, and running it again resumes."""
    from fastlm.pretrain import PretrainOptions, load_run, prepare_data, pretrain
    from fastlm.train.distributed import connect, disconnect
    from fastlm.train.progress import live_progress

    options = parse(PretrainOptions, argv, "fastlm train")
    out, is_main = options.training.out, connect().is_main
    console = open_console(quiet=not is_main)
    with preparation_progress(console) as on_progress:
        data = prepare_data(options, cache_directory(), on_progress)
    with live_progress(console, options.training.steps) as (on_log, on_step):
        result = pretrain(options, data, on_log, on_step)
    disconnect()
    if result.stopped_by:
        sys.exit(INTERRUPTED if result.stopped_by == "SIGINT" else 0)
    if is_main:
        print(f"\n{out} holds the checkpoints, losses.png and metrics.jsonl; a sample of its best checkpoint:\n")
        with extra("no sample"):
            continue_text(*load_run(out), GenerateOptions(out, prompt=options.prompt or "", seed=options.training.seed))
        print(f"\nmore of it: fastlm generate {out} --prompt 'some text'; its curves: fastlm report {out}")


def generate(argv: list[str]) -> None:
    """Continue a text with a trained model."""
    options = parse(GenerateOptions, argv, "fastlm generate")
    from fastlm.pretrain import load_run

    continue_text(*load_run(options.run), options)


def continue_text(model: "GPT", tokenizer: "Tokenizer", options: GenerateOptions) -> None:
    """Print the prompt and, as it is drawn, its continuation."""
    from fastlm.pretrain import continuation

    print(options.prompt, end="", flush=True)
    drawn = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "seed")}
    for text in continuation(model, tokenizer, options.prompt, **drawn):
        print(text, end="", flush=True)
    print()


def report(argv: list[str]) -> None:
    """Draw runs on one HTML page: curves, speed, settings, samples."""
    options = parse(ReportOptions, argv, "fastlm report")
    from fastlm.report import report as write_report

    folder = options.runs[0] if len(options.runs) == 1 else Path()
    page = write_report(options.runs, options.out or folder / "report.html", log_loss=options.log_loss)
    print(f"open {page} in a browser")


def doctor(argv: list[str]) -> None:
    """Print versions, devices, the compiled libraries, and which op runs on what and why."""
    parse(NoOptions, argv, "fastlm doctor")
    from fastlm.doctor import report

    print(report())


@dataclasses.dataclass
class NoOptions:
    """Takes no options."""


COMMANDS = {"train": train, "generate": generate, "report": report, "doctor": doctor}


# Reading the command line


def parse(options_class: type[Options], argv: list[str], prog: str) -> Options:
    """Options from flags, after those of the TOML file that --config names."""
    argv = flags_of_file(options_class, argv) + argv
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options, unknown = tyro.cli(
                options_class,
                args=argv,
                prog=prog,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{in_one_line(complaint.getvalue())}; see {prog} --help") from None
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UsageError(f"unknown option {flag!r}{nearest(flag, flags(options_class))}; see {prog} --help")
    return options


def flags_of_file(options_class: type, argv: list[str]) -> list[str]:
    """The TOML file named by --config as command-line flags, so that they are checked like any others."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words[:-1]:
        return []
    path = Path(words[words.index("--config") + 1])
    try:
        settings = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    known = flags(options_class)
    arguments = []
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if flag not in known:
            raise UsageError(f"{path}: unknown key {key!r}{nearest(flag, known)}")
        arguments += as_arguments(flag, value)
    return arguments


def as_arguments(flag: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]  # as two words, a value that begins with a dash would be taken for a flag


def flags(options_class: type) -> list[str]:
    """Every flag of a dataclass of options; the fields of a nested dataclass stand beside the others."""
    found = []
    for field, kind in typing.get_type_hints(options_class).items():
        nested = dataclasses.is_dataclass(kind)
        found += flags(kind) if nested else ["--" + field.replace("_", "-")]
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def in_one_line(box: str) -> str:
    """The message of tyro's framed error, which begins after the frame's title and ends at the first rule."""
    words = []
    for line in box.splitlines():
        if line.startswith("│ ───"):
            break
        if line.startswith("│"):
            words.append(line.strip("│ "))
    return " ".join(words).rstrip(".") or " ".join(box.split())


# The edge of the program


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a user's mistake or situation into one line; what is our own mistake keeps its traceback.

    The classes below are those of a refusal, here and in the libraries that this one calls. An error of another class
    that a machine or a file can cause is turned into one of them where the cause is known, and nowhere else: whatever
    else arrives here is a fault of the program.
    """
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        close_quietly(sys.stdout)
        sys.exit(0)
    except Exception as error:
        if not is_situation(error) or os.environ.get("FASTLM_TRACEBACK"):
            raise
        fail(message(error), MISTAKE)


@contextlib.contextmanager
def extra(what: str) -> Iterator[None]:
    """Run what a finished run can do without: its failure is told in one line and changes no exit code."""
    try:
        yield
    except BrokenPipeError:
        close_quietly(sys.stdout)
    except Exception as error:
        if not is_situation(error) or os.environ.get("FASTLM_TRACEBACK"):
            raise
        tell(f"{what}: {message(error)}")


def is_situation(error: Exception) -> bool:
    return isinstance(error, (ValueError, TypeError, OSError, ImportError, OverflowError)) or out_of_memory(error)


def message(error: Exception) -> str:
    """The error in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, UnicodeEncodeError):
        text = f"{error.object[:80]!a} is not text: UTF-8 cannot spell it"
    elif isinstance(error, OverflowError):
        text = f"a number is too large: {error}"
    elif out_of_memory(error):
        text = f"out of memory: take a smaller batch_size, sequence_length or model ({error})"
    return " ".join(text.split())


def out_of_memory(error: Exception) -> bool:
    """PyTorch's CPU allocator has no class of its own for it, nor for a size that overflows."""
    words = ["out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc"]
    words += ["Storage size calculation overflowed", "integer multiplication overflow"]
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and not isinstance(error, OSError) and any(word in str(error) for word in words)
    )


def fail(message: str, code: int) -> typing.NoReturn:
    tell(message)
    sys.exit(code)


def tell(message: str) -> None:
    try:
        print(f"fastlm: {message}", file=sys.stderr, flush=True)
    except OSError:
        close_quietly(sys.stderr)  # nobody is there to be told


def close_quietly(stream: TextIO | None) -> None:
    """Send the rest of a broken stream nowhere, or Python complains again at exit and changes the exit code."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_console(quiet: bool) -> "Console":
    """The console of a training run; rich's own ends the process where its pipe is closed."""
    from rich.console import Console

    class Patient(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            close_quietly(sys.stdout)
            tell("nobody reads the output any more: training stops after the next step, with a checkpoint")
            raise BrokenPipeError

    return Patient(highlight=False, quiet=quiet)


@contextlib.contextmanager
def preparation_progress(console: "Console") -> Iterator[Callable[[str, int, int], None]]:
    """on_progress(stage, bytes done, bytes in all) for fastlm.data.prepare: a bar, if the console is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = TextColumn("{task.description:>9}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage)
            bar.update(tasks[stage], completed=done, total=total)

        yield on_progress


def cache_directory() -> Path:
    """Where tokenizers and token shards are kept between runs: FASTLM_CACHE, or the user's cache folder."""
    if named := os.environ.get("FASTLM_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"
    except RuntimeError:  # neither HOME nor an entry in passwd, as in a container under any user number
        raise UsageError("there is no home directory to cache in: set FASTLM_CACHE to a directory") from None

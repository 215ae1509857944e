"""The `fastlm` command: the only place that reads the command line and the environment, and the only one that prints.

A command is a dataclass of options and a function. Flags, defaults and help are read off the dataclass, and parsed by
tyro. Options are put together and checked once, when it is known which values are given: those of the command line go
over those of the TOML file that `--config` names, these over a preset or `--depth`, these over the defaults. A user's
mistake is one line on stderr and exit code 2; FASTLM_TRACEBACK=1 shows where it was noticed.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeVar

import tyro

import fastlm
from fastlm.configuration import (
    Option,
    build,
    described,
    from_words,
    is_union,
    options_of,
    read_toml,
    spelled,
    to_toml,
)
from fastlm.wording import nearest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from fastlm.data import Tokenizer
    from fastlm.models import GPT
    from fastlm.pretrain import PretrainOptions

Options = TypeVar("Options")

# Exit codes beside 0, which a closed pipe gives too. A run that was preempted has saved, and the same command continues
# it: a queue may start it again. 75 is EX_TEMPFAIL of sysexits.h, and 130 what a shell calls Ctrl-C.
MISTAKE, PREEMPTED, INTERRUPTED = 2, 75, 130


class UsageError(ValueError):
    """The command line cannot be understood; the message is one line, and the same on every rank."""


@dataclasses.dataclass
class FileOptions:
    """Files of options. What stands in one goes over a preset or depth, and flags go over it."""

    heading = "configuration file"

    config: Path | None = None
    """TOML file of the options below, as --print-config writes it."""
    print_config: bool = False
    """Print every option as the run would have it, in TOML, and stop."""


@dataclasses.dataclass
class GenerateOptions:
    """Continue a text with a trained model."""

    run: tyro.conf.Positional[Path] = Path("runs/stdlib")
    """Directory of the run, as given to `fastlm train --out`, or of a model of Hugging Face."""
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
class ExportOptions:
    """Write a trained model as a directory that transformers loads."""

    run: tyro.conf.Positional[Path] = Path("runs/stdlib")
    """Directory of the run, as given to `fastlm train --out`."""
    out: tyro.conf.Positional[Path | None] = None
    """Directory to write, which must be new or empty; None is export, in the run's directory."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights in the files; None is that of the run."""


@dataclasses.dataclass
class ReportOptions:
    """Draw runs, finished or going on, on one HTML page."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Directories of runs, as given to `fastlm train --out`; several are compared."""
    out: Path | None = None
    """File to write; None is report.html, in the run's directory if there is but one."""
    log_loss: bool = False
    """Draw losses on a logarithmic axis."""


def main(argv: list[str] | None = None) -> None:
    """Run the command that argv names, then exit: 0 done, 2 a mistake, 75 preempted and saved, 130 interrupted."""
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
            recorded(COMMANDS[name])(rest)
        elif name.startswith("-"):
            raise UsageError(f"{name} stands where a command is expected: one of {', '.join(COMMANDS)}")
        else:
            raise UsageError(f"unknown command {name!r}{nearest(name, COMMANDS)}; commands are {', '.join(COMMANDS)}")


def overview() -> str:
    lines = [f"  {name:<10} {(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items()]
    return "\n".join(["usage: fastlm COMMAND [--help] [options]", "", *lines])


def train(argv: list[str]) -> None:
    """Train a GPT on text: no flag is needed, and running it again resumes."""
    from fastlm.pretrain import load_run, prepare_data, pretrain
    from fastlm.train.distributed import connect, disconnect
    from fastlm.train.progress import live_progress
    from fastlm.train.trainer import CLOSED_PIPE, EARLY_STOPPING

    with refusing_on_every_rank():
        options, toml = read_train_options(argv)
    out, is_main = options.training.out, connect().is_main
    if toml is not None:
        print(toml if is_main else "", end="")
        return disconnect()
    console = open_console(quiet=not is_main)
    with preparation_progress(console) as on_progress:
        data = prepare_data(options, cache_directory(), on_progress)
    with live_progress(console, options.training.steps) as (on_log, on_step):
        result = pretrain(options, data, on_log, on_step)
    disconnect()
    if result.stopped_by and result.stopped_by != EARLY_STOPPING:
        sys.exit({"SIGINT": INTERRUPTED, CLOSED_PIPE: 0}.get(result.stopped_by, PREEMPTED))
    if is_main:
        print(f"\n{out} holds the checkpoints, losses.png and metrics.jsonl")
        if options.sample_tokens:
            print("a sample of its best checkpoint:\n")
            with extra("no sample"):
                chosen = GenerateOptions(out, prompt=options.prompt or "", seed=options.training.seed)
                continue_text(*load_run(out), chosen)
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


def export(argv: list[str]) -> None:
    """Write a trained model as a directory that transformers loads."""
    options = parse(ExportOptions, argv, "fastlm export")
    import torch

    from fastlm.pretrain import load_run

    model, tokenizer = load_run(options.run)
    out = options.out or options.run / "export"
    model.save_pretrained(out, tokenizer=tokenizer, dtype=getattr(torch, options.dtype) if options.dtype else None)
    print(f"{out} holds the model and its tokenizer: transformers, vLLM and others load it")


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


COMMANDS = {"train": train, "generate": generate, "export": export, "report": report, "doctor": doctor}


# Reading the command line


def parse(options_class: type[Options], argv: list[str], prog: str) -> Options:
    """Options from flags alone."""
    return build(options_class, given_flags(options_of(options_class), argv, prog, options_class.__doc__))


def read_train_options(argv: list[str]) -> tuple["PretrainOptions", str | None]:
    """The options of training and, if --print-config asks for it, all of them as TOML that tells whence each comes."""
    from fastlm.presets import StartOptions, devices_here, starting_values
    from fastlm.pretrain import PretrainOptions

    own, start_options = options_of(PretrainOptions), options_of(StartOptions)
    flags = given_flags([*options_of(FileOptions), *start_options, *own], argv, "fastlm train", PretrainOptions.__doc__)
    files = build(FileOptions, {name: flags.pop(name) for name in ("config", "print_config") if name in flags})
    file = read_toml(files.config, [*start_options, *own]) if files.config else {}
    given = file | flags
    start = build(
        StartOptions, {option.name: given.pop(option.name) for option in start_options if option.name in given}
    )
    defaults = {option.name: option.default for option in own}
    chosen = {}
    if start != StartOptions():
        chosen = starting_values(start, given, defaults, devices_here(given.get("device", defaults["device"])))
    if chosen and chosen.keys() <= file.keys():
        raise UsageError(f"{start} changes nothing: {files.config} sets all that it would; take those keys out of it")
    options = build(PretrainOptions, chosen | given)
    origins = (
        dict.fromkeys(chosen, str(start)) | dict.fromkeys(file, spelled(files.config)) | dict.fromkeys(flags, "flag")
    )
    return options, to_toml(options, origins) if files.print_config else None


def given_flags(options: list[Option], argv: list[str], prog: str, description: str | None) -> dict[str, Any]:
    """The values that argv gives, by the names of options, each of its option's type."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                flags_type(options),
                args=argv,
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(
            f"{incomplete(argv, options) or in_one_line(complaint.getvalue())}; see {prog} --help"
        ) from None
    if unknown:
        raise UsageError(f"{surplus(argv, unknown[0], options)}; see {prog} --help")
    given = {name: value for group in parsed.values() for name, value in group.items()}
    return {option.name: as_option(given[option.name], option) for option in options if option.name in given}


def as_option(words: Any, option: Option) -> Any:
    """The value of a flag, from the words that tyro has for it."""
    if isinstance(words, bool):
        return words
    words = words if isinstance(words, str) else list(words)
    try:
        return from_words(words, option.kind)
    except ValueError as error:
        text = words if isinstance(words, str) else " ".join(words)
        raise UsageError(f"{option.flag} is {text!r}, expected {error}") from None


def incomplete(argv: list[str], options: list[Option]) -> str:
    """What is said of the first flag that has too few values, or nothing."""
    flags = {option.flag: option for option in options}
    for place, word in enumerate(argv):
        option = flags.get(word.replace("_", "-"))
        if option is None or option.kind is bool:
            continue
        rest = argv[place + 1 :]
        values = rest[: next((i for i, other in enumerate(rest) if other.startswith("--")), len(rest))]
        if len(values) < num_words(option.kind):
            was = f"is {' '.join(values)!r}" if values else "has no value"
            return f"{option.flag} {was}, expected {described(option.kind)}"
    return ""


def surplus(argv: list[str], word: str, options: list[Option]) -> str:
    """What is said of a word that belongs to no option."""
    if word.startswith("-"):
        flag = word.split("=")[0]
        known = [option.flag for option in options]
        return f"unknown option {flag!r}{nearest(flag, known)}"
    flags = {option.flag: option for option in options}
    place = next(i for i, other in enumerate(argv) if other.split("=", 1)[-1] == word)
    before = next((other for other in reversed(argv[: place + 1]) if other.startswith("--")), "").split("=")[0]
    option = flags.get(before.replace("_", "-").replace("--no-", "--"))
    if option is None:
        example = f", such as --data {word}" if "--data" in flags else ""
        return f"unexpected {word!r}: options begin with --{example}"
    if option.kind is bool:
        no = option.flag.replace("--", "--no-", 1)
        return f"unexpected {word!r}: {before} takes no value, expected {option.flag} or {no} alone"
    return f"unexpected {word!r}: {before} is given its value already, expected {described(option.kind)}"


def num_words(kind: Any) -> int:
    """The least number of words that a flag of this type takes."""
    if typing.get_origin(kind) is not tuple:
        return 1
    arguments = typing.get_args(kind)
    return 0 if arguments[1:] == (...,) else len(arguments)


def flags_type(options: list[Option]) -> Any:
    """The type that tyro parses: a dict of groups, in which only flags that are given get a value."""
    make: Any = typing.TypedDict  # mypy takes literal ones alone
    groups: dict[str, dict[str, Any]] = {}
    for option in options:
        groups.setdefault(option.group, {})[option.name] = annotated(option)
    kinds = {group: make(group, flags, total=False) for group, flags in groups.items()}
    for option in options:
        kinds[option.group].__doc__ = option.group_help
    return make("flags", kinds)


def annotated(option: Option) -> Any:
    """An option's type as tyro takes it, with its help."""
    about = tyro.conf.arg(
        help=option.help,
        help_behavior_hint=f"(default: {option.default_text})",
        metavar=None if option.kind is bool else placeholder(option.kind),
    )
    return Annotated[as_words(option.kind), about]


def as_words(kind: Any) -> Any:
    """The type with text for all but booleans: what the text says is ours to read, and to refuse in our words."""
    if typing.get_origin(kind) is Annotated:
        inner, *notes = typing.get_args(kind)
        return Annotated[as_words(inner), *notes]
    if typing.get_origin(kind) is tuple:
        return tuple[tuple(other if other is ... else str for other in typing.get_args(kind))]  # type: ignore[misc]
    return bool if kind is bool else str


def placeholder(kind: Any) -> str:
    """What stands for a value of the type in the help: INT, PATH|None, {adamw,sgd}, FLOAT FLOAT."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Annotated:
        return placeholder(arguments[0])
    if is_union(kind):
        return "|".join(map(placeholder, arguments))
    if typing.get_origin(kind) is typing.Literal:
        return f"{{{','.join(arguments)}}}"
    if typing.get_origin(kind) is tuple:
        return (
            f"[{placeholder(arguments[0])} ...]" if arguments[1:] == (...,) else " ".join(map(placeholder, arguments))
        )
    return {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}.get(kind, "None")


def in_one_line(frame: str) -> str:
    """The message of tyro's framed error, which ends at the first rule after it; ASCII frames have no sides."""
    words: list[str] = []
    for line in frame.splitlines()[1:]:
        text = line.strip("│ ")
        if text.strip("─-╰╯"):
            words.append(text)
        elif words:
            break
    return " ".join(words).rstrip(".") or " ".join(frame.split())


# The edge of the program


def recorded(command: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """The command; under torchrun what ends it is also written to the file that torchrun's summary shows."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return command
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

    class InOneLine(ErrorHandler):
        """Leaves out the traceback, which the summary would show in place of the message, where we would."""

        def record_exception(self, e: BaseException) -> None:
            if not is_told_in_one_line(e):
                return super().record_exception(e)
            shown = {"py_callstack": f"fastlm: {message(e)}", "timestamp": str(int(time.time()))}
            told = {"message": {"message": f"{type(e).__name__}: {message(e)}", "extraInfo": shown}}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(told))

    return record(command, InOneLine())


@contextlib.contextmanager
def refusing_on_every_rank() -> Iterator[None]:
    """Run what every rank finds wrong alike, so that one of them tells it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(message(error)) from error


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
        if not is_told_in_one_line(error):
            raise
        if isinstance(error, UsageError) and os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(MISTAKE)  # the first rank of this machine tells it
        fail(message(error), MISTAKE)


@contextlib.contextmanager
def extra(what: str) -> Iterator[None]:
    """Run what a finished run can do without: its failure is told in one line and changes no exit code."""
    try:
        yield
    except BrokenPipeError:
        close_quietly(sys.stdout)
    except Exception as error:
        if not is_told_in_one_line(error):
            raise
        tell(f"{what}: {message(error)}")


def is_told_in_one_line(error: BaseException) -> bool:
    return is_situation(error) and not os.environ.get("FASTLM_TRACEBACK")


def is_situation(error: BaseException) -> bool:
    return isinstance(error, (ValueError, TypeError, OSError, ImportError, OverflowError)) or out_of_memory(error)


def message(error: BaseException) -> str:
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


def out_of_memory(error: BaseException) -> bool:
    if not isinstance(error, (MemoryError, RuntimeError)):
        return False  # without importing torch to say so
    from fastlm.train.memory import is_out_of_memory

    return is_out_of_memory(error)


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

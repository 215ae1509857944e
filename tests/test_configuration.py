"""Options read off dataclasses: each has one name and a help, and what is written as TOML is read back the same."""

import dataclasses
import re
import tomllib
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

from fastlm.cli import FileOptions, GenerateOptions
from fastlm.configuration import ConfigurationError, build, convert, options_of, read_toml, spelled, to_toml
from fastlm.presets import StartOptions
from fastlm.pretrain import PretrainOptions
from tests.support.generated_pages import ROOT

OF_TRAINING = [option for kind in (FileOptions, StartOptions, PretrainOptions) for option in options_of(kind)]
HOSTILE = "\"quotes\" 'too', \\ back\\nslash, line\nbreak, tab\t, bell\a, DEL\x7f, é, \U0001f600, # none, [steps]"


@dataclasses.dataclass
class Inner:
    """Nested options."""

    num_layers: int = 4
    """How
    many."""
    mode: Literal["fast", "exact"] = "fast"
    """Which."""


@dataclasses.dataclass
class Outer:
    """Options of a command."""

    steps: int = 3
    """How long."""
    rate: float = 0.5
    """How fast."""
    compile: bool = False
    """Whether to."""
    out: Path = Path("runs")
    """Where."""
    seed: int | None = None
    """Perhaps."""
    inner: Inner = dataclasses.field(default_factory=lambda: Inner(num_layers=6))
    betas: tuple[float, float] = (0.9, 0.95)
    """Two."""
    sinks: tuple[str, ...] = ()
    """Some."""


@dataclasses.dataclass
class Ambiguous:
    """Two options of one name."""

    mode: str = ""
    inner: Inner = dataclasses.field(default_factory=Inner)


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "options.toml"
    file.write_text(text)
    return read_toml(file, options_of(Outer))


def test_options_are_the_fields_of_nested_dataclasses_too():
    options = {option.name: option for option in options_of(Outer)}
    assert list(options) == ["steps", "rate", "compile", "out", "seed", "num_layers", "mode", "betas", "sinks"]
    layers = options["num_layers"]
    assert (layers.flag, layers.default, layers.help, layers.section) == ("--num-layers", 6, "How many.", "inner")
    assert (layers.group, layers.group_help) == ("inner", "Nested options.")
    assert (options["sinks"].default_text, options["betas"].default_text) == ("none", "0.9 0.95")


def test_every_heading_is_in_words():
    headings = list(dict.fromkeys(option.group for option in OF_TRAINING))
    assert headings[:5] == ["configuration file", "starting point", "data and samples", "model", "training loop"]
    assert {"early stopping", "layer statistics", "checkpoint"} < set(headings)


def test_options_refuse_two_of_one_name():
    with pytest.raises(TypeError, match="Ambiguous has two options of the name mode: rename one"):
        options_of(Ambiguous)


@pytest.mark.parametrize("options", [OF_TRAINING, options_of(GenerateOptions)], ids=["train", "generate"])
def test_every_option_of_a_command_has_a_name_of_its_own_and_a_help(options):
    names = [option.name for option in options]
    assert len(set(names)) == len(names)
    assert [option.name for option in options if not option.help or not option.group_help] == []


def test_build_keeps_defaults_of_the_outer_dataclass():
    assert build(Outer, {"mode": "exact", "steps": 5}) == Outer(steps=5, inner=Inner(6, "exact"))


def test_toml_takes_keys_flat_or_in_tables(tmp_path):
    flat = "num_layers = 2\nsteps = 7\nbetas = [0, 1]\nsinks = ['--steps', 'b']\nout = '~/x'\nseed = 'None'\nrate = 1\n"
    values = read(tmp_path, flat)
    assert values == {
        "num_layers": 2,
        "steps": 7,
        "betas": (0.0, 1.0),
        "sinks": ("--steps", "b"),
        "out": Path.home() / "x",
        "seed": None,
        "rate": 1.0,
    }
    assert read(tmp_path, "steps = 7\n[inner]\nnum_layers = 2\n") == {"steps": 7, "num_layers": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nstepz = 4", "options.toml:2: unknown key 'stepz' (did you mean steps?)"),
        ("[inner]\n'num_layer' = 4", "options.toml:2: unknown key 'num_layer' (did you mean num_layers?)"),
        ("[iner]\nnum_layers = 4", "options.toml:1: unknown table [iner] (did you mean inner?); tables are [inner]"),
        ("[inner.inner]\nsteps = 4", "options.toml:1: unknown table [inner.inner]; tables are [inner]"),
        ("inner = 4", "options.toml:1: inner is 4, expected a table of options below [inner]"),
        ("\n[x.y]\nsteps = 4", "options.toml:2: unknown table [x]; tables are [inner]"),
        ("\ninner.num_layer = 4", "options.toml: unknown key 'num_layer' (did you mean num_layers?)"),
        ("[inner]\nsteps = 4", "options.toml:2: steps stands in [inner], expected it in no table"),
        ("num_layers = 1\n[inner]\nnum_layers = 2", "num_layers is given twice, in a table and outside; keep one"),
        ("steps = true", "options.toml:1: steps is true, expected an integer"),
        ("steps = 2.5", "options.toml:1: steps is 2.5, expected an integer"),
        ("rate = 'fast'", 'options.toml:1: rate is "fast", expected a number'),
        ("rate = true", "options.toml:1: rate is true, expected a number"),
        ("compile = 1", "options.toml:1: compile is 1, expected true or false"),
        ("out = ''", 'options.toml:1: out is "", expected a path'),
        ("out = '~nobody-of-this-name/x'", "expected a path without ~, as there is no such home directory"),
        ("seed = 'x'", 'options.toml:1: seed is "x", expected an integer or "None"'),
        ("steps = 'None'", 'options.toml:1: steps is "None", expected an integer'),
        ("mode = 'exac'", "expected one of fast, exact (did you mean exact?)"),
        ("betas = [1.0]", "options.toml:1: betas is [1.0], expected a list of 2"),
        ("betas = ['--steps', 9]", 'options.toml:1: betas is ["--steps", 9], expected a number'),
        ("sinks = 'a'", 'options.toml:1: sinks is "a", expected a list of a string'),
        ("seed = None", 'TOML has no word for None: leave the line out, or write "None"'),
        ("steps = 3\ncompile = True  # yes", "(at line 2, column 11); write true"),
        ("mode = exact", '(at line 1, column 8); text stands in quotes: "exact"'),
        ("steps 4", "options.toml is not TOML: Expected '=' after a key"),
        ("steps = 4\nsteps = 5", "options.toml is not TOML: Cannot overwrite a value"),
        ("a = " + "[" * 5000, "options.toml is not TOML"),
    ],
)
def test_toml_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.toml", "none.toml: No such file or directory; expected a TOML file of options"),
        ("", "Is a directory; expected a TOML file of options"),
    ],
)
def test_file_that_cannot_be_read_is_named(tmp_path, name, message):
    with pytest.raises(ConfigurationError, match=message):
        read_toml(tmp_path / name, options_of(Outer))


def test_toml_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "options.toml").write_bytes(b"steps = '\xff'")
    with pytest.raises(ConfigurationError, match="is not TOML: 'utf-8' codec can't decode byte 0xff"):
        read_toml(tmp_path / "options.toml", options_of(Outer))


def samples(kind: Any) -> list[Any]:
    """Values of an option's type, the awkward ones among them."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return list(arguments)
    if typing.get_origin(kind) is tuple:
        items = samples(arguments[0])
        return [(), tuple(items)] if arguments[1:] == (...,) else [tuple(items[: len(arguments)])]
    if arguments:
        return [value for member in arguments for value in samples(member)]
    of = {int: [0, -1, 2**70], float: [0.1, -1e-8, 1e300, float("inf"), 2.0], bool: [True, False], str: [HOSTILE, ""]}
    of |= {Path: [Path(HOSTILE), Path("a/b"), Path(".")], type(None): [None]}
    return of[kind]


def test_every_option_of_training_is_read_as_it_was_written(tmp_path):
    options = options_of(PretrainOptions)
    for turn in range(5):
        values = {option.name: samples(option.kind)[turn % len(samples(option.kind))] for option in options}
        file = tmp_path / "options.toml"
        file.write_text("".join(f"{name} = {spelled(value)}\n" for name, value in values.items()))
        assert read_toml(file, options) == values
    for option in options:
        for value in samples(option.kind):
            assert convert(tomllib.loads(f"x = {spelled(value)}")["x"], option.kind) == value


def test_dataclass_is_read_as_it_was_written_and_says_what_each_option_is(tmp_path):
    options = PretrainOptions(data=HOSTILE, prompt="# no comment\n[model]")
    text = to_toml(options, {"steps": "flag"})
    (tmp_path / "options.toml").write_text(text)
    known = options_of(PretrainOptions)
    values = read_toml(tmp_path / "options.toml", known)
    assert values.keys() == {option.name for option in known}
    assert build(PretrainOptions, values) == options
    assert "steps = 700  # flag\n" in text
    prose = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert [option.name for option in known if option.help not in prose or option.group_help not in prose] == []


def test_toml_of_the_page_is_read():
    text = re.search(r"```toml\n(.*?)```", (ROOT / "docs/configuration.md").read_text(), re.DOTALL)[1]
    values = {key: value for key, value in tomllib.loads(text).items() if not isinstance(value, dict)}
    assert values == {"data": "~/texts", "steps": 2000}

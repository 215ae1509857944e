"""The options of a command, read off its dataclass, and TOML that holds them.

A command's options are the fields of one dataclass. Those of a nested dataclass stand beside the others in flags, and
in a table of their own, or beside the others too, in TOML. Help, defaults and types live with the fields; whatever is
shown or read of them derives from `options_of`.
"""

import ast
import collections
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastlm.wording import nearest

Options = TypeVar("Options")

NONE = "None"  # how None is written in TOML, which has no word for it, and in flags
WIDTH = 118  # of comments in TOML, before their "# "


class ConfigurationError(ValueError):
    """A file of options cannot be understood; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of a dataclass of options."""

    name: str
    kind: Any  # its type, such as int, Path | None, Literal["a", "b"] or tuple[float, float]
    default: Any
    help: str  # in one line
    section: str  # the field that holds its dataclass, or "" for one of the outer dataclass
    group: str  # heading of the dataclass that declares it: that of its field where it is a nested one
    group_help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default as the flag would have it; "none" for no values."""
        values = self.default if isinstance(self.default, tuple) else (self.default,)
        return " ".join(spelled(value).strip('"') or '""' for value in values) or "none"


def options_of(options_class: type) -> list[Option]:
    """Every option of a dataclass and of those nested in it.

    Raises TypeError where two have one name: a flag could not tell them apart.
    """
    found = list(_options(options_class, "", None))
    counts = collections.Counter(option.name for option in found)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise TypeError(f"{options_class.__name__} has two options of the name {twice[0]}: rename one")
    return found


def _options(options_class: type, section: str, instance: object | None) -> Iterator[Option]:
    kinds = typing.get_type_hints(options_class, include_extras=True)
    for field in dataclasses.fields(options_class):
        default = _default(field) if instance is None else getattr(instance, field.name)
        kind = kinds[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _options(kind, field.name, default)
            continue
        home = next(cls for cls in options_class.__mro__ if field.name in inspect.get_annotations(cls))
        yield Option(
            field.name,
            kind,
            default,
            _helps(home).get(field.name, ""),
            section,
            section if section and home is options_class else _heading(home),
            inspect.cleandoc(home.__doc__ or "").split("\n\n")[0].replace("\n", " "),
        )


def _heading(home: type) -> str:
    """The heading that a dataclass names, else its own name in words."""
    words = re.findall("[A-Z][a-z]*", re.sub("(Options|Knobs|Config)$", "", home.__name__))
    return vars(home).get("heading", " ".join(words).lower())


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def _helps(options_class: type) -> dict[str, str]:
    """The string below each field of a dataclass, in one line."""
    try:
        source = inspect.getsource(options_class)
    except OSError:  # installed as byte code alone
        return {}
    body = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def build(options_class: type[Options], values: Mapping[str, Any]) -> Options:
    """The dataclass, and those nested in it, with these values by name and defaults for the rest.

    Every check of the dataclasses runs here, once, on values as they come together.
    """
    kinds = typing.get_type_hints(options_class)
    chosen = {}
    for field in dataclasses.fields(options_class):  # type: ignore[arg-type]
        if not dataclasses.is_dataclass(kinds[field.name]):
            if field.name in values:
                chosen[field.name] = values[field.name]
            continue
        own = {
            inner.name: values[inner.name] for inner in dataclasses.fields(kinds[field.name]) if inner.name in values
        }
        if own:
            chosen[field.name] = dataclasses.replace(_default(field), **own)
    return options_class(**chosen)


# From TOML


def read_toml(path: Path, options: Iterable[Option]) -> dict[str, Any]:
    """The values that a file sets, by name, each of its option's type.

    Raises ConfigurationError, naming file and line, for what is not TOML, no option, given twice or of another type.
    """
    known = {option.name: option for option in options}
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}; expected a TOML file of options") from None
    try:
        settings = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}{_hint_at_value(text, str(error))}") from None
    values: dict[str, Any] = {}
    sections = {option.section for option in known.values()} - {""}
    for section, key, value in _entries(settings, sections):
        where = f"{path}{_line(text, key)}"
        option = known.get(key)
        if option is None and isinstance(value, dict):
            table, tables = f"{section}.{key}" if section else key, ", ".join(f"[{name}]" for name in sorted(sections))
            hint = "" if section else nearest(key, sections)
            raise ConfigurationError(f"{where}: unknown table [{table}]{hint}; tables are {tables}")
        if option is None and key in sections:
            raise ConfigurationError(f"{where}: {key} is {_shown(value)}, expected a table of options below [{key}]")
        if option is None:
            raise ConfigurationError(f"{where}: unknown key {key!r}{nearest(key, known)}")
        if section not in ("", option.section):
            home = f"[{option.section}]" if option.section else "no table"
            raise ConfigurationError(f"{where}: {key} stands in [{section}], expected it in {home}")
        if key in values:
            raise ConfigurationError(f"{where}: {key} is given twice, in a table and outside; keep one")
        try:
            values[key] = convert(value, option.kind)
        except ValueError as error:
            raise ConfigurationError(f"{where}: {key} is {_shown(value)}, expected {error}") from None
    return values


def _entries(settings: dict[str, Any], sections: set[str]) -> Iterator[tuple[str, str, Any]]:
    """(table or "", key, value) of every setting."""
    for key, value in settings.items():
        if key in sections and isinstance(value, dict):
            yield from ((key, inner, inner_value) for inner, inner_value in value.items())
        else:
            yield "", key, value


def _line(text: str, key: str) -> str:
    """ ":7" if the key begins line 7, else nothing: tomllib does not tell where it found a key."""
    found = re.search(rf"""^[ \t]*\[?[ \t]*["']?{re.escape(key)}["']?[ \t]*[=\].]""", text, re.MULTILINE)
    return f":{text.count(chr(10), 0, found.end()) + 1}" if found else ""


def _hint_at_value(text: str, complaint: str) -> str:
    """What to write instead of a value that is none in TOML, or nothing."""
    place = re.search(r"Invalid value \(at line ([0-9]+), column ([0-9]+)\)", complaint)
    if not place:
        return ""
    line, column = map(int, place.groups())
    word = text.split("\n")[line - 1][column - 1 :].split("#")[0].strip()
    if word.lower() in ("none", "null", "nil"):
        return f'; TOML has no word for None: leave the line out, or write "{NONE}"'
    if word.lower() in ("true", "false"):
        return f"; write {word.lower()}"
    return f'; text stands in quotes: "{word}"' if re.fullmatch(r"[\w./~:@+-]+", word) else ""


def _shown(value: object) -> str:
    return textwrap.shorten(json.dumps(value, default=str, ensure_ascii=False), 60, placeholder=" ...")


def convert(value: object, kind: Any) -> Any:
    """A value of TOML as one of an option's type. Raises ValueError whose message is what was expected instead."""
    if typing.get_origin(kind) is typing.Annotated:
        return convert(value, typing.get_args(kind)[0])
    if is_union(kind):
        for member in sorted(typing.get_args(kind), key=lambda member: member is not types.NoneType):
            try:
                return convert(value, member)
            except ValueError:
                continue
    elif kind is types.NoneType and value == NONE:
        return None
    elif kind is float and type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    elif kind is Path and isinstance(value, str):
        return as_path(value)
    elif typing.get_origin(kind) is Literal and isinstance(value, str) and value in typing.get_args(kind):
        return value
    elif typing.get_origin(kind) is tuple and isinstance(value, list):
        return _converted_items(value, typing.get_args(kind))
    elif type(value) is kind:
        return value
    raise ValueError(described(kind) + (nearest(value, _choices(kind)) if isinstance(value, str) else ""))


def from_words(words: str | list[str], kind: Any) -> Any:
    """What the words of a flag say, as one of an option's type. Raises ValueError as convert does."""
    if typing.get_origin(kind) is typing.Annotated:
        return from_words(words, typing.get_args(kind)[0])
    if isinstance(words, str):
        return convert(_number(words, kind), kind)
    return convert([_number(word, typing.get_args(kind)[0]) for word in words], kind)


def _number(word: str, kind: Any) -> int | float | str:
    """The number that a word spells, where the type takes numbers."""
    members = typing.get_args(kind) if is_union(kind) else (kind,)
    for number in (member for member in (int, float) if member in members):
        with contextlib.suppress(ValueError):
            return number(word)
    return word


def as_path(text: str) -> Path:
    """A path, whose ~ is the user's home. Raises ValueError for no text, which Path takes for the present folder."""
    if not text:
        raise ValueError("a path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("a path without ~, as there is no such home directory") from None


def _converted_items(items: list[Any], kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if kinds[1:] == (...,):
        kinds = (kinds[0],) * len(items)
    if len(items) != len(kinds):
        raise ValueError(f"a list of {len(kinds)}")
    return tuple(convert(item, kind) for item, kind in zip(items, kinds, strict=True))


def is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _choices(kind: Any) -> tuple[Any, ...]:
    """The words of a Literal, or of one in a union."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    return tuple(word for member in typing.get_args(kind) for word in _choices(member)) if is_union(kind) else ()


def described(kind: Any) -> str:
    """What values of a type are, in words."""
    arguments = typing.get_args(kind)
    if is_union(kind):
        return " or ".join(map(described, arguments))
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(kind) is typing.Annotated:
        return described(arguments[0])
    if typing.get_origin(kind) is tuple:
        if arguments[1:] != (...,):
            return f"a list of {len(arguments)}, each {described(arguments[0])}"
        choices = ", ".join(_choices(arguments[0]))
        return f"a list of any of {choices}" if choices else f"a list of {described(arguments[0])}"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path"}
    return f'"{NONE}"' if kind is types.NoneType else words[kind]


# To TOML


def to_toml(options: object, origins: Mapping[str, str] | None = None) -> str:
    """Every option as TOML that read_toml takes and from which build makes an equal dataclass, help as comments.

    origins   where a value comes from, by name, told in a comment behind it

    Paths and texts that UTF-8 cannot spell lose the bytes that are none: TOML has no way to write them.
    """
    lines = [f"# {line}" for line in textwrap.wrap(inspect.cleandoc(type(options).__doc__ or ""), WIDTH)]
    known = options_of(type(options))
    known.sort(key=lambda option: option.section != "")  # a key behind the head of a table would be the table's
    section, group = "", known[0].group if known else ""
    for option in known:
        if option.section != section:
            lines += ["", "", f"[{option.section}]"]
        if option.group != group:
            lines += ["", *(f"## {line}" for line in textwrap.wrap(option.group_help, WIDTH - 1))]
        section, group = option.section, option.group
        holder = getattr(options, section) if section else options
        origin = (origins or {}).get(option.name)
        lines += ["", *(f"# {line}" for line in textwrap.wrap(option.help, WIDTH))]
        lines += [f"{option.name} = {spelled(getattr(holder, option.name))}" + (f"  # {origin}" if origin else "")]
    return "\n".join(lines) + "\n"


def spelled(value: object) -> str:
    """A value in TOML."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(spelled, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    text = NONE if value is None else str(value)
    spellable = text.encode("utf-8", "replace").decode("utf-8")
    return json.dumps(spellable, ensure_ascii=False).replace("\x7f", "\\u007F")  # JSON lets DEL stand, TOML does not

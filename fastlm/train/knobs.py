"""What every dataclass of knobs has in common: a check of each value, with one message that names the knob.

A knob, its default, its help and its check live in the module that reads it, in a small dataclass derived from Knobs;
`config.py` puts these together into TrainConfig by inheritance, so that a user sees one flat list.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from fastlm.wording import nearest


@dataclasses.dataclass
class Knobs:
    """Derived classes check their own fields in `__post_init__`, after calling that of super().

    Raises ValueError if a value is out of its range, TypeError if it is of the wrong type or no field has the name.
    """

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Names the nearest field, which the __init__ of a dataclass does not."""
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in named.keys() - set(fields):
            raise TypeError(
                f"{cls.__name__}: unknown field {name!r}{nearest(name, fields)}; help({cls.__name__}) lists all"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Begins the checks: those of booleans and texts, which need no other fact than the field's type."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for kind, expected in (bool, "True or False"), (str, "a text"):
                if field.type is kind and not isinstance(value, kind):
                    raise TypeError(self._complaint(field.name, value, expected))

    def check_integers(self, *names: str, minimum: int) -> None:
        """Integers of at least minimum."""
        for name in names:
            self._check(name, int, f"an integer of at least {minimum}", lambda value: value >= minimum)

    def check_positive(self, *names: str) -> None:
        """Finite numbers above 0."""
        for name in names:
            self._check(name, float, "a number above 0", lambda value: value > 0)

    def check_not_negative(self, *names: str) -> None:
        """Finite numbers of at least 0."""
        for name in names:
            self._check(name, float, "a number of at least 0", lambda value: value >= 0)

    def check_shares(self, *names: str) -> None:
        """Numbers from 0 to 1."""
        for name in names:
            self._check(name, float, "a share from 0 to 1", lambda value: 0 <= value <= 1)

    def check_path(self, name: str) -> None:
        """A path, kept as a Path whose ~ is the user's home."""
        value = getattr(self, name)
        if not isinstance(value, str | os.PathLike):
            raise TypeError(self._complaint(name, value, "a path"))
        if not str(value) or "\0" in str(value):
            raise ValueError(self._complaint(name, str(value), "a path of at least a character, none of them NUL"))
        try:
            setattr(self, name, Path(value).expanduser())
        except RuntimeError:
            raise ValueError(self._complaint(name, str(value), "a path in a home directory that there is")) from None

    def check_tuple(self, name: str, expected: str) -> None:
        """A tuple or list, kept as a tuple."""
        value = getattr(self, name)
        if not isinstance(value, tuple | list):
            raise TypeError(self._complaint(name, value, expected))
        setattr(self, name, tuple(value))

    def check_choice(self, name: str, choices: tuple[str, ...], value: object = None) -> None:
        """One of a few words; value is one of several that the knob holds."""
        value = getattr(self, name) if value is None else value
        if value not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise ValueError(self._complaint(name, value, f"one of {', '.join(choices)}{hint}"))

    def _check(self, name: str, kind: type, expected: str, holds: Callable[[Any], bool]) -> None:
        self.check_value(name, getattr(self, name), kind, expected, holds)

    def check_value(self, name: str, value: Any, kind: type, expected: str, holds: Callable[[Any], bool]) -> None:
        """A number of a kind (int, or float that may also be an int) for which a condition holds."""
        is_number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if not is_number:
            raise TypeError(self._complaint(name, value, expected))
        if not (math.isfinite(value) and holds(value)):
            raise ValueError(self._complaint(name, value, expected))

    def _complaint(self, name: str, value: object, expected: str) -> str:
        return f"{type(self).__name__}: {name} is {value!r}, expected {expected}"

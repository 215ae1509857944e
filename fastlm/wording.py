"""Words that messages share: the nearest right name, a number with its noun, the first of many names."""

import difflib
import re
from collections.abc import Iterable, Sequence

NEAR = 0.7  # difflib's 0.6 takes epochs for eps


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that was perhaps meant, or nothing; of equally near ones the first."""
    alike = {candidate: _likeness(word, candidate) for candidate in known}
    closest = max(alike, key=alike.__getitem__, default="")
    return f" (did you mean {closest}?)" if alike.get(closest, 0) >= NEAR else ""


def _likeness(word: str, candidate: str) -> float:
    """From 0 to 1, whatever the case. Where one begins or abbreviates the other (lr, seq-len) they are near."""
    short, long = (re.sub("[-_]+", "-", name.casefold()).strip("-") for name in (word, candidate))
    ratio = difflib.SequenceMatcher(a=short, b=long).ratio()
    begins = min(len(short), len(long)) >= 3 and (long.startswith(short) or short.startswith(long))
    return max(ratio, NEAR) if begins or _abbreviates(short, long) else ratio


def _abbreviates(short: str, long: str) -> bool:
    """Whether the parts of one begin the parts of the other, or its letters do."""
    parts = long.split("-")
    return len(parts) > 1 and any(
        len(beginnings) == len(parts) and all(map(str.startswith, parts, beginnings))
        for beginnings in (short.split("-"), list(short))
    )


def quantity(number: int, noun: str, plural: str = "") -> str:
    """1 document, 2,000 documents; the plural is given where it is another than the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def first_few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and dots for the rest: a, b, c, ..."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)

"""Where text comes from: the standard library, text, JSON lines and Parquet files, and folders of them.

A source is iterated as often as needed and holds one document at a time, so its memory is bounded at any size. What is
not text is an error that names the file and the place; among the many files of a folder it is left out and listed.

A file is what its name says, in capitals or not; a link goes by its own name. Text and JSON lines may be gzipped. One
text file is one document, unless lines holding only <|endoftext|> separate several. A JSON lines or Parquet file has
one document per record, and so has a .json file of one record per line. A document of only white space is none. A
document of more than MAX_CHARACTERS goes on in another one.
"""

import codecs
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import stat
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastlm.data.tokenizer import END_OF_TEXT
from fastlm.wording import quantity

STDLIB = "stdlib"
MAX_CHARACTERS = 1 << 18  # some 70,000 tokens; without a limit one giant file is one evaluation of hours, or no memory
MAX_BLANK_PARTS = 64  # of MAX_CHARACTERS: more white space than that at the start of a document is text
JSON_LINES = (".jsonl", ".ndjson")
JSON_START = 1 << 22  # characters that show whether a .json file holds one record per line
MAX_GROUPS = 1 << 16  # some 15 MB; up to so many distinct documents are each looked at
SMALLEST_TAIL = 64  # bytes: copies of shorter documents are not cut only to have something to hold out
LEFT_OUT_OF_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class NotTextError(ValueError):
    """A file holds something else than UTF-8 text."""


@dataclasses.dataclass
class Source:
    """Documents in files, in a fixed order; `skipped` lists, after a pass, what was left out and why."""

    name: str
    root: Path
    files: list[Path]
    read: Callable[[Path, str], Iterator[Iterable[str]]]  # the documents of a file, each in parts
    text_field: str
    leave_out_non_text: bool
    linked_folders: list[Path] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        self.skipped = [f"{path}: is a link to a folder; give that folder itself" for path in self.linked_folders]
        for path in self.files:
            try:
                documents = self.read(path, self.text_field)
            except NotTextError as error:
                if not self.leave_out_non_text:
                    raise
                self.skipped.append(str(error))
                continue
            for parts in documents:
                yield from unless_blank(parts)

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed or written to: by path, size and time, nothing is read."""
        identity = repr((self.name, os.path.realpath(self.root), self.text_field))  # repr spells any name in ASCII
        state = hashlib.blake2b(identity.encode(), digest_size=16)
        for path in self.files:
            facts = path.stat()
            target = os.path.realpath(path) if path.is_symlink() else ""
            state.update(repr((str(path), target, facts.st_size, facts.st_mtime_ns)).encode())
        return state.hexdigest()

    def size_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def open_source(source: str | Path, *, text_field: str = "text") -> Source:
    """The documents of "stdlib", a text, JSON lines or Parquet file (each also .gz, but Parquet), or a folder of these.

    Raises OSError, or ValueError if there is nothing to read. Hidden files of a folder are left out.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files, _ = visible_files(root, LEFT_OUT_OF_STDLIB)
        files = [path for path in files if path.suffix == ".py"]
        return Source(STDLIB, root, files, read_python_file, text_field, leave_out_non_text=True)
    if not str(source):
        raise FileNotFoundError(f"no source of text was named; give a text file, a folder, or {STDLIB}")
    root, mode = locate(Path(source))
    if stat.S_ISDIR(mode):
        files, linked = visible_files(root)
        return Source(root.name, root, files, read_checked_file, text_field, True, linked)
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{source}: is not a regular file; a corpus is read more than once, so write it to a file first"
        )
    return Source(root.name, root, [root], read_file, text_field, leave_out_non_text=False)


def locate(source: Path) -> tuple[Path, int]:
    """(absolute path under the name that the user gave, mode of what is there). Raises OSError that names it."""
    try:
        if source.name in ("", ".."):  # only what it stands for has a name
            root = Path(os.path.realpath(source))
        else:
            root = Path(os.path.realpath(source.parent), source.name)
        return root, root.stat().st_mode
    except FileNotFoundError:
        if source.is_symlink():
            raise FileNotFoundError(f"{source}: is a link to {os.readlink(source)}, which does not exist") from None
        raise FileNotFoundError(f"{source}: no such file or folder; give a text file, a folder, or {STDLIB}") from None
    except ValueError as error:
        raise ValueError(f"{str(source)!r} cannot name a file ({error})") from None


def visible_files(root: Path, left_out: frozenset[str] = frozenset()) -> tuple[list[Path], list[Path]]:
    """(regular files, links to folders) under root in a fixed order, but for hidden names and folders in left_out."""
    found: list[Path] = []
    linked: list[Path] = []
    for folder, names, files in os.walk(root, onerror=_refuse):
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in left_out)
        linked += [path for path in (Path(folder, name) for name in names) if path.is_symlink()]
        paths = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return found, linked


def _refuse(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that it may not list, and its text would be missing unnoticed


def unless_blank(parts: Iterable[str]) -> Iterator[str]:
    """The parts of a document, or none if all of it is white space; a blank part of another document is kept."""
    parts, blank = iter(parts), list[str]()
    for part in parts:
        blank.append(part)
        if part.strip() or len(blank) > MAX_BLANK_PARTS:
            yield from blank
            yield from parts


# Readers: one iterator of documents per kind of file, each document in parts of at most MAX_CHARACTERS


def read_file(path: Path, text_field: str) -> Iterator[Iterable[str]]:
    """A file as its name says; whatever is not JSON lines or Parquet should be text."""
    name = telling_name(path)
    if name.endswith(".parquet"):
        return map(pieces, read_parquet(path, text_field))
    name = name.removesuffix(".gz")
    if name.endswith(JSON_LINES) or (name.endswith(".json") and holds_json_lines(path, text_field)):
        return map(pieces, read_json_lines(path, text_field))
    return read_text(path)


def read_checked_file(path: Path, text_field: str) -> Iterator[Iterable[str]]:
    """As read_file, but NotTextError comes before any document: a file is left out of a folder whole or not at all."""
    if not telling_name(path).endswith(".parquet"):
        check_text(path)
    return read_file(path, text_field)


def read_python_file(path: Path, text_field: str) -> Iterator[Iterable[str]]:
    return map(pieces, list(read_python(path)))  # NotTextError comes before any document


def telling_name(path: Path) -> str:
    """The name that says what a file holds, in lower case: that of a link, unless it says nothing."""
    if not path.suffix and path.is_symlink():
        path = Path(os.path.realpath(path))
    return path.name.lower()


def read_python(path: Path) -> Iterator[str]:
    """A Python file in the encoding that it declares (PEP 263)."""
    try:
        with tokenize.open(path) as handle:
            yield handle.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        raise NotTextError(f"{path}: is not in the encoding that it declares ({error})") from None


def read_text(path: Path) -> Iterator[Iterable[str]]:
    """The document of a text file, or those between lines that hold only <|endoftext|>."""
    for separates, lines in itertools.groupby(decoded_lines(path), key=_is_separator):
        if not separates:
            yield runs(text for _, text, _ in lines)


def _is_separator(line: tuple[int, str, bool]) -> bool:
    _, text, is_whole = line
    return is_whole and text.strip() == END_OF_TEXT


def runs(lines: Iterable[str]) -> Iterator[str]:
    """Lines put together to parts of at most MAX_CHARACTERS."""
    held: list[str] = []
    size = 0
    for line in lines:
        if held and size + len(line) > MAX_CHARACTERS:
            yield "".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
    yield "".join(held)


def holds_json_lines(path: Path, text_field: str) -> bool:
    """Whether a .json file holds one object per line, as a .jsonl file does; else it is text like any other.

    Raises NotTextError if it holds records in another form, which as text would be a corpus of quotes and braces.
    """
    start = beginning(path)
    lines = itertools.islice(filter(str.strip, io.StringIO(start)), 8)
    records = [_decoded(json.loads, line) for line in lines]
    all_objects = records and all(isinstance(record, dict) for record in records)
    if all_objects and (len(records) > 1 or isinstance(records[0].get(text_field), str)):
        return True
    records.append(_decoded(lambda text: json.JSONDecoder().raw_decode(text)[0], start.lstrip("[ \t\r\n")))
    if any(isinstance(record, dict) and text_field in record for record in records):
        raise NotTextError(
            f"{path}: holds {text_field!r} in another form than one JSON object per line; write it as JSON lines, "
            "or name it .txt to train on it as it stands"
        )
    if len(start) >= JSON_START and "\n" not in start:
        raise NotTextError(
            f"{path}: its first line has more than {JSON_START:,} characters; name it .jsonl if it holds one object "
            "per line, else .txt"
        )
    return False


def beginning(path: Path) -> str:
    """The first JSON_START characters or so of a text file, in whole lines unless the first is longer than that."""
    parts: list[str] = []
    size = 0
    for _, text, _ in decoded_lines(path):
        parts.append(text)
        size += len(text)
        if size >= JSON_START:
            start = "".join(parts)
            return start[: start.rfind("\n") + 1] or start
    return "".join(parts)


def _decoded(decode: Callable[[str], Any], text: str) -> Any:
    """What decode makes of text, or None where it is not JSON."""
    try:
        return decode(text)
    except (ValueError, RecursionError):
        return None


def read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    """The text field of one JSON object per line."""
    for number, line in joined_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error}); expected one object per line") from None
        yield well_formed(text_of(record, text_field, f"{path}: line {number}"))


def text_of(record: object, text_field: str, place: str) -> str:
    """The text field of a record, or a ValueError that names the place."""
    if not isinstance(record, dict):
        raise ValueError(f"{place} is a JSON {type(record).__name__}, expected an object with a field {text_field!r}")
    if text_field not in record:
        fields = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(
            f"{place} has no field {text_field!r}; its fields are {fields}: name the one that holds the text as "
            "text_field"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: field {text_field!r} is {type(text).__name__}, expected a string")
    return text


def read_parquet(path: Path, text_field: str) -> Iterator[str]:
    """The text column of a Parquet file, a few rows at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install 'fastlm[parquet]'") from None
    row = 0
    try:
        # An open file, because pyarrow takes only names that are UTF-8.
        with open(path, "rb") as handle, pyarrow.parquet.ParquetFile(handle) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise ValueError(f"{path}: has no column {text_field!r}; its columns are {', '.join(names)}")
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    yield text_of({text_field: value.as_py()}, text_field, f"{path}: row {row}")
    except UnicodeDecodeError as error:
        place = f"row {row}" if row else "the name of a column"
        raise ValueError(f"{path}: {place} is not UTF-8 ({error.reason})") from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as Parquet after row {row} ({reason})") from None


# Bytes to text


def decoded_lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(number, line with its line end, is whole) of a UTF-8 file.

    A giant line comes in parts of at most MAX_CHARACTERS bytes, which are not whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, starts_file, starts_line = 1, True, True
    with open_bytes(path) as handle:
        for raw in byte_lines(handle, path):
            if b"\0" in raw:
                raise NotTextError(
                    f"{path}: line {number} holds a NUL byte; expected UTF-8 text, this is a binary file"
                )
            try:
                line = decoder.decode(raw)
            except UnicodeDecodeError as error:
                raise NotTextError(f"{path}: line {number} is not UTF-8 ({error.reason}); convert the file") from None
            ends_line = raw.endswith(b"\n")
            is_whole = starts_line and (ends_line or len(raw) < MAX_CHARACTERS)
            yield number, line.removeprefix("\ufeff") if starts_file else line, is_whole
            number += ends_line
            starts_file, starts_line = False, ends_line
    if decoder.getstate()[0]:
        raise NotTextError(f"{path}: ends inside a UTF-8 character; the file was cut short")


def check_text(path: Path) -> None:
    """Raise NotTextError, as decoded_lines does, unless a file is UTF-8 text to its end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open_bytes(path) as handle:
            while chunk := handle.read(MAX_CHARACTERS):
                if b"\0" in chunk:
                    raise ValueError
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except (ValueError, OSError, EOFError, zlib.error):
        for _ in decoded_lines(path):  # slower, but it tells the line
            pass


def joined_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) where a giant line is put together again: half a JSON object cannot be read."""
    parts: list[str] = []
    for number, line, _ in decoded_lines(path):
        parts.append(line)
        if line.endswith("\n"):
            yield number, "".join(parts)
            parts = []
    if parts:
        yield number, "".join(parts)


def open_bytes(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if telling_name(path).endswith(".gz") else open(path, "rb")


def byte_lines(handle: io.BufferedIOBase, path: Path) -> Iterator[bytes]:
    try:
        while raw := handle.readline(MAX_CHARACTERS):
            yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise NotTextError(f"{path}: the gzip data is damaged or cut short ({error})") from None
    except OSError as error:  # of the disk; reading, unlike opening, says not which file
        raise OSError(error.errno, error.strerror, str(path)) from None


def well_formed(text: str) -> str:
    """Half a surrogate pair, which JSON can spell but UTF-8 cannot, becomes U+FFFD; a whole pair its character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def pieces(text: str) -> Iterator[str]:
    """The text in runs of at most MAX_CHARACTERS, cut at the end of a line where one is near."""
    start = 0
    while len(text) - start > MAX_CHARACTERS:
        end = start + MAX_CHARACTERS
        end = text.rfind("\n", end - MAX_CHARACTERS // 2, end) + 1 or end
        yield text[start:end]
        start = end
    yield text[start:]


# Which text is held out


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one pass over a source found."""

    root: Path
    num_documents: int
    num_bytes: int
    groups: dict[int, tuple[int, int]]  # by group_of a document's hash: bytes in all, and of the largest document
    group_bits: int
    content_hash: str


def survey(source: Source, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> Survey:
    """Read a source once: its size, the identity of its content, and how its bytes lie along its documents' hashes.

    Raises ValueError if it has no documents.
    """
    num_documents = num_bytes = 0
    groups: dict[int, tuple[int, int]] = {}
    bits = 32
    content = hashlib.blake2b(digest_size=16)
    for text in source:
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        content.update(digest)
        _add(groups, group_of(_as_number(digest), bits), len(data), len(data))
        while len(groups) > MAX_GROUPS:
            bits -= 1
            finer, groups = groups, {}
            for group, (size, largest) in finer.items():
                _add(groups, group_of(group, bits), size, largest)
        num_documents += 1
        num_bytes += len(data)
        on_bytes(num_bytes)
    if num_documents == 0:
        why = f" ({source.skipped[0]})" if source.skipped else ""
        files = quantity(len(source.files), "file")
        raise ValueError(f"{source.root}: no text in {files}{why}; a corpus needs at least one document")
    return Survey(source.root, num_documents, num_bytes, groups, bits, content.hexdigest())


def _as_number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


def group_of(key: int, bits: int) -> int:
    """The smallest hash with the same first bits from the highest 1 on: any share of all hashes is finely divided."""
    shift = max(0, key.bit_length() - bits)
    return key >> shift << shift


def _add(groups: dict[int, tuple[int, int]], group: int, size: int, largest: int) -> None:
    size_before, largest_before = groups.get(group, (0, 0))
    groups[group] = size_before + size, max(largest_before, largest)


@dataclasses.dataclass(frozen=True)
class Split:
    """Which part of each document is for training and which is held out, decided by its content alone.

    A document goes to one side whole, by its hash, so a copy of it goes to the same side; one whose copies alone would
    make up the held-out share, or much of it, is for training. A document larger than the whole held-out share is cut
    instead: its last part is held out. So one file alone can be trained on, and one giant file among small ones cannot
    end up held out whole.
    """

    fraction: float
    threshold: int
    largest_whole: float
    kept: frozenset[int]  # groups of documents that are trained on whatever the threshold
    group_bits: int

    @classmethod
    def of(cls, found: Survey, fraction: float) -> "Split":
        """The split of a source that holds out about `fraction` of its bytes, with something on either side.

        Raises ValueError if there is none because the text is copies of a few short documents.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"the held-out share is {fraction}, expected more than 0 and less than 1")
        share = fraction * found.num_bytes
        # An evaluation on copies of one document tells little, and so does training on them.
        for most_copies in (share / 8, min(2 * share, found.num_bytes / 3)):
            split, held_out = cls._in_whole_documents(found, fraction, most_copies)
            if held_out >= share / 2:
                return split
        if split.kept and share < SMALLEST_TAIL * found.num_documents:
            copies = sum(found.groups[group][0] for group in split.kept) / found.num_bytes
            raise ValueError(
                f"{found.root}: {copies:.1%} of the text is copies of so few documents ({len(split.kept)}) that "
                f"{held_out / found.num_bytes:.2%} of it can be held out instead of {fraction:.2%}, because copies "
                "stay on one side; remove copies, or choose another share"
            )
        return dataclasses.replace(split, largest_whole=0)  # all documents are cut

    @classmethod
    def _in_whole_documents(cls, found: Survey, fraction: float, most_copies: float) -> tuple["Split", float]:
        """The split where no document has more bytes of copies held out, and how many bytes it holds out about."""
        share = fraction * found.num_bytes
        # Cut, a document gives a character at least, so many documents would together give more than one of them whole.
        largest_whole = max(share, min(1 / fraction, found.num_documents))
        groups = found.groups.items()
        kept = frozenset(group for group, (size, largest) in groups if size > max(largest, most_copies))
        whole = {group: size for group, (size, largest) in groups if largest <= largest_whole and group not in kept}
        cut = fraction * sum(size for size, largest in found.groups.values() if largest > largest_whole)
        wanted = min(share - cut, max(fraction, 0.5) * sum(whole.values()))  # half of what has few copies, at most
        threshold, held_out = choose_threshold(whole, wanted, share / 5, may_be_none=cut > 0)
        return cls(fraction, threshold, largest_whole, kept, found.group_bits), cut + held_out

    def divide(self, text: str) -> tuple[str, str]:
        """(text to train on, text held out); either may be empty."""
        data = text.encode()
        if len(data) > self.largest_whole:
            return self._cut(text)
        key = _as_number(hashlib.blake2b(data, digest_size=16).digest())
        held_out = key < self.threshold and group_of(key, self.group_bits) not in self.kept
        return ("", text) if held_out else (text, "")

    def _cut(self, text: str) -> tuple[str, str]:
        """Head and tail, neither only white space; the tail begins at the start of a line if one is near."""
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if end - start < 2:
            return text, ""
        size = max(1, round(len(text) * self.fraction))
        cut = min(max(len(text) - size, start + 1), end - 1)
        line = text.rfind("\n", max(start + 1, cut - size), cut) + 1
        return text[: line or cut], text[line or cut :]


def choose_threshold(whole: dict[int, int], wanted: float, leeway: float, *, may_be_none: bool) -> tuple[int, int]:
    """(hash below which documents are held out, bytes that they have) for groups of such sizes.

    It is the wanted fraction of all hashes where that gives the wanted bytes, but for the leeway. Where few documents
    or copies make it something else, it is the hash up to which every group brings the bytes nearer to those wanted.
    """
    total = sum(whole.values())
    threshold = int(wanted / max(total, 1) * 2**64)
    held_out = sum(size for group, size in whole.items() if group < threshold)
    if abs(held_out - wanted) <= leeway and held_out < total:
        return threshold, held_out
    threshold = held_out = 0
    for threshold in sorted(whole):
        is_near = held_out + whole[threshold] / 2 > wanted and (held_out or may_be_none)
        if is_near or held_out + whole[threshold] >= total:
            break
        held_out += whole[threshold]
    return threshold, held_out

"""From a source of text to two token datasets, training and held out, cached so that the second call is instant.

Three passes, each with bounded memory: survey (sizes and hashes, which decide the split), training the tokenizer on at
most SAMPLE_BYTES of the training text, encoding. The cache knows a source by the names, sizes and modification times of
its files, so a file that is rewritten with both unchanged is not noticed; delete the cache directory then.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from fastlm.data.documents import Source, Split, Survey, open_source, survey
from fastlm.data.shards import ShardError, TokenDataset, unigram_bits_per_byte, write_shard
from fastlm.data.tokenizer import TRAINING_VERSION, Tokenizer
from fastlm.files import atomic_write
from fastlm.wording import quantity

PREPARATION_VERSION = 2  # raise it when the same source would give other shards: caches follow it
HELD_OUT_FRACTION, HELD_OUT_BYTES = 0.05, 1 << 24  # the default share, and the size beyond which more tells no more
SAMPLE_BYTES = 1 << 25  # more text moves few merges of a tokenizer, but its training time grows in step
SAMPLE_BLOCK = 1 << 14  # characters
NAME_BYTES = 100  # of the source's name in that of its place in the cache; file systems allow 255 for all of it
UNFINISHED = re.compile(r"(\..*-[0-9a-f]{16})(\.lock|\.\w+\.building)", re.DOTALL)
ENCODING_BLOCK = 1 << 21  # characters encoded at once: enough for all cores, and about 150 MB of token objects

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a preparation found and made; str() is one line."""

    source: str
    num_files: int
    num_documents: int
    num_bytes: int
    num_tokens: int
    num_held_out_documents: int
    num_held_out_bytes: int
    num_held_out_tokens: int
    held_out: float  # the share that was asked for
    vocab_size: int
    tokenizer_hash: str
    unigram_bits_per_byte: float
    skipped: list[str]
    seconds: float
    cached: bool = False

    def __str__(self) -> str:
        share = self.num_held_out_bytes / self.num_bytes
        size = f"{self.num_bytes / 1e6:.1f} MB" if self.num_bytes >= 1e5 else quantity(self.num_bytes, "byte")
        asked = "" if abs(share / self.held_out - 1) < 0.25 else f" where {self.held_out:.1%} was asked for"
        skipped = f", {quantity(len(self.skipped), 'file')} left out" if self.skipped else ""
        return (
            f"{self.source}: {quantity(self.num_documents, 'document')}, {size}, "
            f"{quantity(self.num_tokens, 'token')} of {self.num_bytes / self.num_tokens:.2f} bytes, "
            f"vocabulary {self.vocab_size:,}; held out {share:.1%}{asked}{skipped}"
            + (" (cached)" if self.cached else f" ({self.seconds:.1f} s)")
        )


@dataclasses.dataclass(frozen=True)
class Prepared:
    train: TokenDataset
    held_out: TokenDataset
    tokenizer: Tokenizer
    facts: Facts


def prepare(
    source: str | Path,
    cache_directory: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    text_field: str = "text",
    held_out: float | None = None,
    on_progress: Progress | None = None,
) -> Prepared:
    """Read, split, tokenise and store a source of text; with the same source and settings, load what is stored.

    tokenizer      a tokenizer.json to use; None trains one of vocab_size tokens on the training text
    held_out       share of the text to hold out; None for 5 %, but at most 16 MiB
    on_progress    called with a stage ("reading", "tokenizer", "encoding"), bytes of text done, bytes in all

    Safe to call in several processes at once. Raises FileNotFoundError or ValueError for a source without usable text.
    """
    progress = on_progress or (lambda stage, done, total: None)
    documents = open_source(source, text_field=text_field)
    given = None if tokenizer is None else Tokenizer.load(tokenizer)
    plan = Plan(documents, Path(cache_directory), vocab_size, given, held_out)
    if stored := load(plan.home):
        return stored
    plan.cache.mkdir(parents=True, exist_ok=True)
    clear(plan.cache)
    with locked(plan.cache / f".{plan.home.name}.lock"):
        return load(plan.home) or build(plan, progress)  # another process may have made it while this one waited


@dataclasses.dataclass(frozen=True)
class Plan:
    """A source, the settings, and the place that both together have in the cache."""

    source: Source
    cache: Path
    vocab_size: int
    tokenizer: Tokenizer | None
    held_out: float | None

    @functools.cached_property
    def home(self) -> Path:
        tokens = self.vocab_size if self.tokenizer is None else self.tokenizer.hash
        key = digest(PREPARATION_VERSION, TRAINING_VERSION, self.source.fingerprint(), tokens, self.held_out)
        name = self.source.name.encode(errors="ignore")[:NAME_BYTES].decode(errors="ignore")
        return self.cache / f"{name}-{key}"


def digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def load(home: Path) -> Prepared | None:
    """What is stored in a directory, verified; None if that is nothing, or damaged: it can be made again."""
    if not home.is_dir():
        return None
    try:
        facts = Facts(**json.loads((home / "facts.json").read_text()))
        return Prepared(
            train=TokenDataset(home / "train.tokens"),
            held_out=TokenDataset(home / "held_out.tokens"),
            tokenizer=Tokenizer.load(home / "tokenizer.json"),
            facts=dataclasses.replace(facts, cached=True),
        )
    except (ValueError, TypeError, FileNotFoundError):
        return None


def build(plan: Plan, progress: Progress) -> Prepared:
    """Do the work beside the final place, then rename, so that the place is never half filled."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=plan.cache, prefix=f".{plan.home.name}.", suffix=".building") as name:
        place = Path(name, "prepared")
        facts = fill(place, plan, progress)
        facts = dataclasses.replace(facts, seconds=round(time.monotonic() - start, 2))
        write_facts(place / "facts.json", facts)
        if os.path.lexists(plan.home):  # damaged, or load() would have taken it
            plan.home.rename(Path(name, "damaged"))
        place.rename(plan.home)
    made = load(plan.home)
    if made is None:
        raise ShardError(f"{plan.home}: what was just written there cannot be read back; check that disk")
    return dataclasses.replace(made, facts=facts)


def fill(place: Path, plan: Plan, progress: Progress) -> Facts:
    """Make the tokenizer and both shards in a directory."""
    on_disk = plan.source.size_on_disk()
    found = survey(plan.source, lambda done: progress("reading", done, max(done, on_disk)))
    share = plan.held_out
    if share is None:
        share = min(HELD_OUT_FRACTION, HELD_OUT_BYTES / found.num_bytes)
    split = Split.of(found, share)
    tokenizer = plan.tokenizer or trained(place, plan, split, found, progress)
    tokenizer.save(place / "tokenizer.json")
    encode(plan.source, split, tokenizer, place, lambda done: progress("encoding", done, found.num_bytes))
    train, held_out = TokenDataset(place / "train.tokens"), TokenDataset(place / "held_out.tokens")
    for side, dataset in (("train on", train), ("hold out", held_out)):
        if len(dataset) == 0:
            raise ValueError(
                f"{plan.source.root}: a text of {quantity(found.num_bytes, 'byte')} leaves nothing to {side}; give more"
            )
    return Facts(
        source=plan.source.name,
        num_files=len(plan.source.files),
        num_documents=found.num_documents,
        num_bytes=found.num_bytes,
        num_tokens=train.num_tokens + held_out.num_tokens,
        num_held_out_documents=len(held_out),
        num_held_out_bytes=held_out.num_bytes,
        num_held_out_tokens=held_out.num_tokens,
        held_out=share,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        unigram_bits_per_byte=unigram_bits_per_byte(train, held_out),
        skipped=plan.source.skipped,
        seconds=0.0,
    )


def trained(place: Path, plan: Plan, split: Split, found: Survey, progress: Progress) -> Tokenizer:
    """A tokenizer trained on the training text, or the one that was trained on the same text before."""
    key = digest(PREPARATION_VERSION, TRAINING_VERSION, found.content_hash, split.fraction, plan.vocab_size)
    stored = plan.cache / "tokenizers" / f"{key}.json"
    with contextlib.suppress(ValueError, FileNotFoundError):
        return Tokenizer.load(stored)
    texts = (split.divide(text)[0] for text in plan.source)
    share = min(1.0, SAMPLE_BYTES / found.num_bytes)
    total = round(share * found.num_bytes)
    tokenizer = Tokenizer.train(
        counted(sample(texts, share), lambda done: progress("tokenizer", min(done, total), total)), plan.vocab_size
    )
    unfinished = place / stored.name  # there it is cleared if this process is killed
    tokenizer.save(unfinished)
    stored.parent.mkdir(exist_ok=True)
    unfinished.replace(stored)
    return tokenizer


def sample(texts: Iterable[str], share: float) -> Iterator[str]:
    """About that share of the texts in short blocks, chosen by their content."""
    for text in texts:
        for start in range(0, len(text), SAMPLE_BLOCK):
            block = text[start : start + SAMPLE_BLOCK]
            if share >= 1 or int(digest(block), 16) < share * 2**64:
                yield block


def counted(texts: Iterable[str], on_bytes: Callable[[int], None]) -> Iterator[str]:
    done = 0
    for text in texts:
        yield text
        done += len(text.encode())
        on_bytes(done)


def encode(source: Source, split: Split, tokenizer: Tokenizer, place: Path, on_bytes: Callable[[int], None]) -> None:
    """Write train.tokens and held_out.tokens."""
    with (
        write_shard(place / "train.tokens", tokenizer) as train,
        write_shard(place / "held_out.tokens", tokenizer) as held_out,
    ):
        done = 0
        for block in blocks(source, split):
            tokens = tokenizer.encode_batch([text for _, text in block])
            for (is_held_out, text), document in zip(block, tokens, strict=True):
                size = len(text.encode())
                (held_out if is_held_out else train).append(document, size)
                done += size
            on_bytes(done)


def blocks(source: Source, split: Split) -> Iterator[list[tuple[bool, str]]]:
    """(is held out, text) of the source's documents, in lists of at least ENCODING_BLOCK characters but the last."""
    block: list[tuple[bool, str]] = []
    size = 0
    for document in source:
        for is_held_out, text in enumerate(split.divide(document)):
            if text:
                block.append((bool(is_held_out), text))
                size += len(text)
        if size >= ENCODING_BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def write_facts(path: Path, facts: Facts) -> None:
    with atomic_write(path) as handle:
        handle.write(json.dumps(dataclasses.asdict(facts), indent=2).encode())


def clear(cache: Path) -> None:
    """Remove what killed preparations left in the cache: what is unfinished though nobody holds its lock."""
    for path in sorted(cache.iterdir()):
        if unfinished := UNFINISHED.fullmatch(path.name):
            with (
                contextlib.suppress(PermissionError),  # of another user
                locked(cache / f"{unfinished[1]}.lock", wait=False) as is_alone,
            ):
                if is_alone and path.suffix == ".building":
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Whether this process holds the lock that a file stands for. The file is removed with the end of the block.

    It waits for others, unless `wait` is False. The system opens the lock when its process dies, however it dies. Where
    the system has no locks, two processes may both do the work, and the first to finish wins.
    """
    handle = None if sys.platform == "win32" else acquire(path, wait)
    try:
        yield handle is not None
    finally:
        if handle:
            path.unlink(missing_ok=True)
            handle.close()


def acquire(path: Path, wait: bool) -> TextIO | None:
    """The file of a lock, held; None where another holds it or the file system has no locks."""
    import fcntl

    while True:
        handle = path.open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                return handle
        except FileNotFoundError:
            pass  # who held it has removed the file: what is held now, nobody else will ask for
        except OSError:
            handle.close()
            return None
        handle.close()

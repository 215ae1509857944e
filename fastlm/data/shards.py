"""Token shards: documents as numbers in one memory-mapped file, and the dataset read from such files.

    header    128 bytes: what the file is, its counts, and three checksums
    tokens    end-of-text, then each document's tokens followed by end-of-text; uint16, or uint32 for large vocabularies
    table     per document its length (tokens and one end-of-text) and its size in bytes of UTF-8, uint32 each

A document of n tokens t[0..n) gives n + 1 inputs [end, t...] with n + 1 targets [t..., end]. Both are runs of the same
stream, one token apart, and the end-of-text between two documents serves both. So the loss summed over all targets,
divided by the bytes and ln 2, is the exact number of bits per byte.

Everything is little-endian. A file is written in one pass with 8 bytes of memory per document, and appears only when
complete. Opening one checks every byte by CRC-32, at the speed of reading the file (about 2 GB/s when it is in memory).
"""

import array
import dataclasses
import functools
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastlm.data.in_memory import read_documents
from fastlm.data.tokenizer import Tokenizer
from fastlm.files import atomic_write
from fastlm.wording import quantity

MAGIC = b"fastlmTK"
VERSION = 1
HEADER_SIZE = 128
_LAYOUT = struct.Struct("<8sIIQQQQQ16sII")  # the fields of Header in order, after the magic and the version
_CHECKSUM = struct.Struct("<I")  # the last bytes of the header, of all that precede them
_CHUNK = 1 << 24  # bytes per step of a checksum, tokens per step of a count


class ShardError(ValueError):
    """A file is not a token shard, or not whole; the message names it in one line."""


@dataclasses.dataclass(frozen=True)
class Header:
    token_size: int
    num_documents: int
    num_tokens: int
    num_bytes: int
    vocab_size: int
    end_of_text: int
    tokenizer_hash: bytes
    stream_checksum: int
    table_checksum: int

    @property
    def stream_dtype(self) -> str:
        return f"<u{self.token_size}"

    @property
    def stream_size(self) -> int:
        return (self.num_tokens + 1) * self.token_size  # the first end-of-text precedes all documents

    @property
    def table_offset(self) -> int:
        return HEADER_SIZE + self.stream_size

    @property
    def file_size(self) -> int:
        return self.table_offset + 8 * self.num_documents

    def to_bytes(self) -> bytes:
        packed = _LAYOUT.pack(MAGIC, VERSION, *dataclasses.astuple(self))
        covered = packed.ljust(HEADER_SIZE - _CHECKSUM.size, b"\0")
        return covered + _CHECKSUM.pack(zlib.crc32(covered))

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> "Header":
        if data[: len(MAGIC)] != MAGIC:
            raise ShardError(f"{path}: is not a fastlm token shard")
        if len(data) < HEADER_SIZE:
            raise ShardError(f"{path}: was cut short inside its header; prepare the data again")
        _, version, *fields = _LAYOUT.unpack_from(data)
        if version != VERSION:
            raise ShardError(
                f"{path}: is a token shard of version {version}, expected {VERSION}; prepare the data again"
            )
        covered, checksum = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
        if _CHECKSUM.unpack(checksum)[0] != zlib.crc32(covered):
            raise ShardError(f"{path}: its header is damaged; prepare the data again")
        header = cls(*fields)
        if header.token_size not in (2, 4):
            raise ShardError(f"{path}: its header is not one that fastlm writes; prepare the data again")
        return header


class ShardWriter:
    """Appends documents to a shard; made by `write_shard`, which finishes it."""

    def __init__(self, handle: BinaryIO, tokenizer: Tokenizer) -> None:
        self._handle, self._tokenizer = handle, tokenizer
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._lengths, self._sizes = array.array("I"), array.array("I")
        self._checksum = 0
        handle.write(bytes(HEADER_SIZE))
        self._write(np.array([tokenizer.end_of_text]))

    def append(self, tokens: Sequence[int] | NDArray[np.integer], num_bytes: int) -> None:
        """Add one document: its tokens without end-of-text, and its size in bytes of UTF-8."""
        document = np.empty(len(tokens) + 1, dtype=np.int64)
        document[:-1] = tokens
        document[-1] = self._tokenizer.end_of_text
        if document.min() < 0 or document.max() >= self._tokenizer.vocab_size:
            raise ValueError(f"a token is outside the vocabulary: expected 0 to {self._tokenizer.vocab_size - 1}")
        self._write(document)
        self._lengths.append(len(document))
        self._sizes.append(num_bytes)

    def finish(self) -> None:
        """Write the table and, last, the header."""
        header = Header(
            token_size=self._dtype.itemsize,
            num_documents=len(self._lengths),
            num_tokens=sum(self._lengths),
            num_bytes=sum(self._sizes),
            vocab_size=self._tokenizer.vocab_size,
            end_of_text=self._tokenizer.end_of_text,
            tokenizer_hash=bytes.fromhex(self._tokenizer.hash),
            stream_checksum=self._checksum,
            table_checksum=zlib.crc32(self._table()),
        )
        self._handle.write(self._table())
        self._handle.seek(0)
        self._handle.write(header.to_bytes())

    def _table(self) -> bytes:
        return np.array([self._lengths, self._sizes], dtype="<u4").tobytes()

    def _write(self, tokens: NDArray[np.int64]) -> None:
        data = tokens.astype(self._dtype).tobytes()
        self._checksum = zlib.crc32(data, self._checksum)
        self._handle.write(data)


@contextmanager
def write_shard(path: Path, tokenizer: Tokenizer) -> Iterator[ShardWriter]:
    """A writer whose shard appears under `path` when the block ends, and not at all if it fails."""
    with atomic_write(path) as handle:
        writer = ShardWriter(handle, tokenizer)
        yield writer
        writer.finish()


class TokenDataset:
    """Documents in token shards, or in memory.

    Positions of tokens count through all shards: document d takes the inputs starts[d] to starts[d] + lengths[d], its
    targets lie one further, and `gather` reads tokens at any positions.
    """

    starts: NDArray[np.int64]  # (documents,)
    lengths: NDArray[np.int64]  # (documents,) one more than the document's tokens; one less without end-of-text
    sizes: NDArray[np.int64]  # (documents,) bytes of UTF-8, 0 where they are not known
    end_of_text: int | None  # None: nothing stands between documents

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        """Open and verify shards. Raises ShardError if one is foreign, damaged or of another tokenizer."""
        listed = [paths] if isinstance(paths, str | Path) else list(paths)
        if not listed:
            raise ValueError("no token shard was given")
        shards = [open_shard(Path(path)) for path in listed]
        first = shards[0].header
        for path, shard in zip(listed, shards, strict=True):
            if shard.header.tokenizer_hash != first.tokenizer_hash:
                raise ShardError(f"{path}: was made with another tokenizer than {listed[0]}; use the same for both")
        self.vocab_size, self.end_of_text = first.vocab_size, first.end_of_text
        self.tokenizer_hash = first.tokenizer_hash.hex()
        self._streams = [shard.stream for shard in shards]
        self._bases = _exclusive_sum([len(stream) for stream in self._streams])
        self._checksum = zlib.crc32(b"".join(shard.header.to_bytes() for shard in shards))
        within = [base + _exclusive_sum(shard.lengths) for base, shard in zip(self._bases, shards, strict=True)]
        self.starts = np.concatenate(within)
        self.lengths = np.concatenate([shard.lengths for shard in shards]).astype(np.int64)
        self.sizes = np.concatenate([shard.sizes for shard in shards]).astype(np.int64)

    @classmethod
    def from_documents(cls, documents: Iterable[Any], *, end_of_text: int | None = None) -> "TokenDataset":
        """Documents that are token ids already, kept in memory.

        documents    an iterable that ends: lists, arrays or tensors (n,) of ids, or mappings that hold them as
                     "input_ids". It is read once. 2 bytes of memory per token, 4 if an id is above 65,535
        end_of_text  put before and after each document, as in a shard: the first token and the end are predicted too.
                     None adds nothing: documents are predicted from their second token on, as for ids that hold such
                     marks already

        Raises ValueError for no documents, one too short to predict anything in, or an id out of range; TypeError for
        what are no integers.
        """
        stream, lengths = read_documents(documents, end_of_text)
        dataset = object.__new__(cls)
        dataset.vocab_size, dataset.end_of_text = int(stream.max()) + 1, end_of_text
        dataset.tokenizer_hash = ""
        dataset._streams, dataset._bases = [stream], _exclusive_sum([len(stream)])
        dataset._checksum = _checksum(stream)
        dataset.starts = _exclusive_sum(lengths)
        dataset.lengths = lengths if end_of_text is not None else lengths - 1
        dataset.sizes = np.zeros(len(lengths), dtype=np.int64)
        return dataset

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Targets: every document's tokens, and the end-of-text of each; without one all but the first of each."""
        return int(self.lengths.sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of the text in UTF-8, 0 where they are not known."""
        return int(self.sizes.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells apart datasets of different content or order; read from checksums, not from the tokens."""
        return f"{self._checksum:08x}{zlib.crc32(self.starts.tobytes()):08x}{zlib.crc32(self.lengths.tobytes()):08x}"

    def gather(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens at positions, of any shape."""
        if len(self._streams) == 1:
            return self._streams[0][positions].astype(np.int64)
        tokens = np.empty(positions.shape, dtype=np.int64)
        shard = np.searchsorted(self._bases, positions, side="right") - 1
        for index in np.unique(shard):
            inside = shard == index
            tokens[inside] = self._streams[index][positions[inside] - self._bases[index]]
        return tokens

    def sample(self, max_tokens: int, *, seed: int = 0) -> "TokenDataset":
        """Random documents of at most max_tokens in all, but at least one; the whole dataset if it is small enough.

        num_bytes is exact for the chosen documents, so a quick evaluation on them still gives true bits per byte.
        """
        if self.num_tokens <= max_tokens:
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        count = max(1, int(np.searchsorted(np.cumsum(self.lengths[order]), max_tokens, side="right")))
        return self._only(np.sort(order[:count]))

    def token_counts(self) -> NDArray[np.int64]:
        """(vocab_size,) how often each token is a target."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        groups = np.searchsorted(np.cumsum(self.lengths), np.arange(0, max(1, self.num_tokens), _CHUNK), side="right")
        for first, last in zip(groups, [*groups[1:], len(self)], strict=True):
            lengths = self.lengths[first:last]
            within = np.arange(lengths.sum()) - np.repeat(_exclusive_sum(lengths), lengths)
            targets = self.gather(np.repeat(self.starts[first:last], lengths) + within + 1)
            counts += np.bincount(targets, minlength=self.vocab_size)
        return counts

    def _only(self, documents: NDArray[np.int64]) -> "TokenDataset":
        chosen = object.__new__(TokenDataset)
        chosen.__dict__.update({key: value for key, value in self.__dict__.items() if key != "fingerprint"})
        chosen.starts, chosen.lengths, chosen.sizes = (
            column[documents] for column in (self.starts, self.lengths, self.sizes)
        )
        return chosen

    def __repr__(self) -> str:
        counts = {"document": len(self), "token": self.num_tokens, "byte": self.num_bytes}
        return f"TokenDataset({', '.join(quantity(number, noun) for noun, number in counts.items())})"


@dataclasses.dataclass(frozen=True)
class Shard:
    header: Header
    stream: NDArray[np.unsignedinteger]  # (num_tokens + 1,) on disk
    lengths: NDArray[np.uint32]  # (num_documents,)
    sizes: NDArray[np.uint32]  # (num_documents,)


def open_shard(path: Path) -> Shard:
    """The shard in a file, every byte verified. Raises ShardError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such token shard")
    with path.open("rb") as handle:
        header = Header.from_bytes(handle.read(HEADER_SIZE), path)
        size = os.fstat(handle.fileno()).st_size
    if size != header.file_size:
        raise ShardError(
            f"{path}: has {size} bytes, its header says {header.file_size}: it was cut short or appended to; "
            "prepare the data again"
        )
    stream = np.memmap(path, header.stream_dtype, "r", HEADER_SIZE, (header.num_tokens + 1,))
    table = np.fromfile(path, "<u4", 2 * header.num_documents, offset=header.table_offset)
    if _checksum(stream) != header.stream_checksum or _checksum(table) != header.table_checksum:
        raise ShardError(f"{path}: its content is damaged (a checksum disagrees); prepare the data again")
    lengths, sizes = table.reshape(2, header.num_documents)
    if lengths.sum(dtype=np.int64) != header.num_tokens or stream.max() >= header.vocab_size:
        raise ShardError(f"{path}: its counts contradict its content; prepare the data again")
    return Shard(header, stream, lengths, sizes)


def _checksum(values: NDArray[np.generic]) -> int:
    data = values.view(np.uint8)
    checksum = 0
    for start in range(0, len(data), _CHUNK):
        checksum = zlib.crc32(data[start : start + _CHUNK].data, checksum)
    return checksum


def _exclusive_sum(values: ArrayLike) -> NDArray[np.int64]:
    total = np.cumsum(values, dtype=np.int64)
    return total - np.asarray(values, dtype=np.int64)


def unigram_bits_per_byte(train: TokenDataset, held_out: TokenDataset) -> float:
    """Bits per byte of held-out text if every token is predicted by its frequency in training, plus one.

        -sum over targets of log2((count(target) + 1) / (all tokens + vocab_size)) / bytes

    A language model that does not get below this has learned nothing from context.
    """
    if train.tokenizer_hash != held_out.tokenizer_hash:
        raise ValueError("unigram_bits_per_byte: the datasets were made with different tokenizers")
    frequency = (train.token_counts() + 1) / (train.num_tokens + train.vocab_size)
    return float(-(held_out.token_counts() @ np.log2(frequency)) / held_out.num_bytes)

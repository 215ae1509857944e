"""Byte-level byte-pair encoding, trained here or read from any Hugging Face tokenizer.json.

Every byte is a token, so any text is encoded without loss (Sennrich, Haddow, Birch 2016, arXiv 1508.07909; on bytes:
Radford et al. 2019, GPT-2). The one special token ends a document. Text that merely contains the words "<|endoftext|>"
is encoded as the characters it holds: a document cannot end itself early, nor can a prompt.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fastlm.files import atomic_write

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")
SMALLEST_VOCABULARY = 257  # every byte and the end of a document
LARGEST_VOCABULARY = 1 << 24  # the library reserves memory for it at once, and ends the process if there is not enough
TOKENIZER_FILE = "tokenizer.json"
TRAINING_VERSION = 1  # raise it when training would give another tokenizer for the same text: caches follow it


class Tokenizer:
    """Text to token ids and back; `hash` is that of the file it is saved to, `start_of_text` what precedes a text.

    Made by Tokenizer.train, Tokenizer.load or Tokenizer.from_pretrained.
    """

    def __init__(self, serialized: bytes, *, name: str = "tokenizer", end_of_text: str | None = None) -> None:
        self._serialized = serialized
        self._name = name
        self._backend = _deserialize(serialized, name)
        self._end = _end_token(self._backend, end_of_text, name)
        self._backend.add_special_tokens([self._end])  # a file may hold it as a plain word, which text could produce
        self._backend.encode_special_tokens = True  # the flag's sense in that library: as ordinary text
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.end_of_text: int = vocabulary[self._end]
        self.start_of_text: list[int] = [self.end_of_text]  # as documents are packed
        self.vocab_size: int = 1 + max(vocabulary.values())  # some files leave numbers out
        self.hash: str = hashlib.blake2b(serialized, digest_size=16).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE with at most vocab_size tokens; fewer if the text has no more pairs to merge."""
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size is {vocab_size}, expected at least {SMALLEST_VOCABULARY}: all bytes and {END_OF_TEXT}"
            )
        if vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"vocab_size is {vocab_size}, expected at most {LARGEST_VOCABULARY}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend.to_str().encode())

    @classmethod
    def load(cls, path: str | Path, *, end_of_text: str | None = None) -> "Tokenizer":
        """A tokenizer.json; end_of_text names the token that ends a document where it is none of the usual ones."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such tokenizer file; expected a Hugging Face tokenizer.json")
        return cls(path.read_bytes(), name=str(path), end_of_text=end_of_text)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """The tokenizer in a directory of Hugging Face, whose texts start and end as that directory says.

        Raises FileNotFoundError without a tokenizer.json, ValueError if a file is not what it is named.
        """
        path = Path(directory) / TOKENIZER_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory}: holds no {TOKENIZER_FILE}; of another kind of tokenizer transformers makes one: "
                f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
            )
        tokenizer = cls.load(path, end_of_text=_named_end(path.with_name("tokenizer_config.json")))
        tokenizer.start_of_text = _prefix(tokenizer._backend)
        return tokenizer

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; with these transformers puts start_of_text before a text."""
        backend = _deserialize(self._serialized, self._name)
        backend.add_special_tokens([self._end])
        if _prefix(backend) != self.start_of_text:
            backend.post_processor = self._starting()
        names = [self._backend.id_to_token(token) for token in [*self.start_of_text, self.end_of_text]]
        config = {
            # of every version of transformers, for whatever tokenizer.json says; without the next line those before 5
            # decode "a ." to "a."
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": names[0],
            "eos_token": names[-1],
        }
        for name, text in (TOKENIZER_FILE, backend.to_str(pretty=True)), ("tokenizer_config.json", json.dumps(config)):
            with atomic_write(Path(directory) / name) as handle:
                handle.write(text.encode())

    def _starting(self) -> processors.TemplateProcessing:
        """What puts start_of_text before a text."""
        names = {self._backend.id_to_token(token): token for token in self.start_of_text}
        single, pair = [*names, "$A"], [*names, "$A", *names, "$B"]
        return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(names.items()))

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json, whole or not at all."""
        with atomic_write(Path(path)) as handle:
            handle.write(self._serialized)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of text; special=True turns the names of special tokens in it into those tokens."""
        text.encode()  # raises UnicodeEncodeError, where the library says only that a str must be a str
        backend = self._with_special if special else self._backend
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens; special=True spells out special tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(token) for token in tokens], skip_special_tokens=not special)

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        backend = _deserialize(self._serialized, self._name)
        backend.add_special_tokens([self._end])
        return backend

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, end_of_text={self._end!r}, hash={self.hash[:8]})"


def _deserialize(serialized: bytes, name: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_buffer(serialized)
    except Exception as error:  # that library raises nothing narrower
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: is not a Hugging Face tokenizer.json ({reason})") from None
    backend.no_truncation()  # files often carry the length limit of the model they came with
    backend.no_padding()
    return backend


def _prefix(backend: tokenizers.Tokenizer) -> list[int]:
    """The special tokens that a tokenizer.json itself puts before a text."""
    encoding = backend.encode("a", add_special_tokens=True)
    return encoding.ids[: [*encoding.special_tokens_mask, 0].index(0)]


def _named_end(path: Path) -> str | None:
    """The eos_token of a tokenizer_config.json; None if it names none."""
    if not path.is_file():
        return None
    try:
        settings: Any = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    token = settings.get("eos_token") if isinstance(settings, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _end_token(backend: tokenizers.Tokenizer, wanted: str | None, name: str) -> str:
    candidates = KNOWN_ENDS if wanted is None else (wanted,)
    for token in candidates:
        if backend.token_to_id(token) is not None:
            return token
    raise ValueError(f"{name}: has no token {' or '.join(candidates)} to end a document; name the one that it uses")

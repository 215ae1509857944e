import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data.tokenizer import END_OF_TEXT, Tokenizer
from tests.support.made_text import sentences

TRICKY = [
    "",
    " ",
    "\0",
    "\r\n\t",
    "Zoë ❄ 日本語 👩‍👩‍👧 ﷽",
    "e\u0301 \ufeff \u2028",
    "  x  \n\n\n  y ",
    "\U0010ffff\ud7ff",
]


@pytest.mark.parametrize("text", TRICKY)
def test_tokenizer_round_trips_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_tokenizer_round_trips_any_text(text):
    assert TRAINED.decode(TRAINED.encode(text)) == text


TRAINED = Tokenizer.train(sentences(50), 280)


def test_tokenizer_never_ends_a_document_because_the_text_says_so(tokenizer):
    text = f"a{END_OF_TEXT}b <|endoftext|><|endoftext|>"
    tokens = tokenizer.encode(text)
    assert tokenizer.end_of_text not in tokens
    assert tokenizer.decode(tokens) == text
    assert tokenizer.encode_batch([text, "x"]) == [tokens, tokenizer.encode("x")]


def test_tokenizer_gives_the_special_token_only_when_asked(tokenizer):
    tokens = tokenizer.encode(f"a{END_OF_TEXT}b", special=True)
    assert tokens == [*tokenizer.encode("a"), tokenizer.end_of_text, *tokenizer.encode("b")]
    assert tokenizer.decode(tokens) == "ab"
    assert tokenizer.decode(tokens, special=True) == f"a{END_OF_TEXT}b"
    assert tokenizer.end_of_text not in tokenizer.encode(END_OF_TEXT), "asking once changed the default"


def test_tokenizer_training_is_deterministic_and_fills_the_vocabulary():
    texts = sentences(100)
    first, second = (Tokenizer.train(iter(texts), 350) for _ in range(2))
    assert first.hash == second.hash
    assert first.vocab_size == 350
    assert Tokenizer.train(texts, 351).hash != first.hash
    assert len(first.encode(texts[0])) < len(texts[0].encode()) / 2


def test_tokenizer_refuses_a_vocabulary_smaller_than_the_bytes():
    assert Tokenizer.train([""], 257).vocab_size == 257
    with pytest.raises(ValueError, match="vocab_size is 256, expected at least 257"):
        Tokenizer.train([""], 256)


def test_tokenizer_loads_what_it_saved(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert (loaded.hash, loaded.vocab_size, loaded.end_of_text) == (
        tokenizer.hash,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    assert loaded.encode("the quick brown") == tokenizer.encode("the quick brown")


def foreign(path, **changes):
    """A tokenizer.json as other tools write it: cut to a length, with a start token, its end a plain word."""
    backend = tokenizers.Tokenizer.from_buffer(TRAINED._serialized)
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.add_special_tokens(["<s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    content = json.loads(backend.to_str())
    end = changes.pop("end", "</s>")
    for token in content["added_tokens"]:
        if token["content"] == END_OF_TEXT:
            token.update(content=end, special=False)
    content["model"]["vocab"][end] = content["model"]["vocab"].pop(END_OF_TEXT)
    path.write_text(json.dumps(content))
    return path


def test_tokenizer_reads_foreign_files_whole_and_bare(tmp_path):
    loaded = Tokenizer.load(foreign(tmp_path / "tokenizer.json"))
    text = "the quick brown fox jumps over the lazy dog"
    assert loaded.encode(text) == TRAINED.encode(text)
    assert loaded.end_of_text == TRAINED.end_of_text
    assert loaded.end_of_text not in loaded.encode("a</s>b")
    assert loaded.decode(loaded.encode("a</s>b")) == "a</s>b"
    assert loaded.end_of_text in loaded.encode("a</s>b", special=True)


def test_tokenizer_takes_the_name_of_an_unusual_end(tmp_path):
    path = foreign(tmp_path / "tokenizer.json", end="<stop>")
    with pytest.raises(ValueError, match=r"tokenizer.json: has no token <|endoftext|> or .* to end a document"):
        Tokenizer.load(path)
    assert Tokenizer.load(path, end_of_text="<stop>").end_of_text == TRAINED.end_of_text


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff\0", b'{"model": 5}', b"[" * 100_000, TRAINED._serialized[:-50]]
)
def test_tokenizer_refuses_a_damaged_file_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a Hugging Face tokenizer\.json") as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokenizer_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.json: no such tokenizer file"):
        Tokenizer.load(tmp_path / "gone.json")

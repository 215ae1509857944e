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


# As a directory of Hugging Face


def test_transformers_encodes_and_decodes_as_documents_are_packed(tmp_path):
    transformers = pytest.importorskip("transformers")
    TRAINED.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TRICKY, "a , b . don't do n't", *sentences(20)]:
        tokens = [TRAINED.end_of_text, *TRAINED.encode(text)]
        assert theirs(text)["input_ids"] == tokens
        assert theirs.decode(tokens, skip_special_tokens=True) == text
    pair = theirs("a", "b")["input_ids"]
    assert pair == [TRAINED.end_of_text, *TRAINED.encode("a"), TRAINED.end_of_text, *TRAINED.encode("b")]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (END_OF_TEXT, END_OF_TEXT, None)
    assert theirs.eos_token_id == TRAINED.end_of_text


def test_tokenizer_comes_back_from_its_directory(tmp_path):
    TRAINED.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    for fact in "end_of_text", "start_of_text", "vocab_size":
        assert getattr(again, fact) == getattr(TRAINED, fact)
    assert again.encode("the quick brown") == TRAINED.encode("the quick brown")
    (tmp_path / "again").mkdir()
    again.save_pretrained(tmp_path / "again")
    for name in "tokenizer.json", "tokenizer_config.json":
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_a_foreign_directory_says_what_starts_and_ends_a_text(tmp_path, eos):
    foreign(tmp_path / "tokenizer.json", end="<stop>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.end_of_text == TRAINED.end_of_text
    assert [loaded.decode(loaded.start_of_text, special=True)] == ["<s>"]
    trained_with = Tokenizer.load(tmp_path / "tokenizer.json", end_of_text="<stop>")
    assert trained_with.start_of_text == [TRAINED.end_of_text], "training puts the end before each document"
    transformers = pytest.importorskip("transformers")
    for number, tokenizer in enumerate([loaded, trained_with]):
        (tmp_path / str(number)).mkdir()
        tokenizer.save_pretrained(tmp_path / str(number))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert theirs("the quick")["input_ids"] == [*tokenizer.start_of_text, *tokenizer.encode("the quick")]
        assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.start_of_text[0], tokenizer.end_of_text)


def test_a_directory_that_puts_nothing_before_a_text_starts_with_nothing(tmp_path):
    TRAINED.save(tmp_path / "tokenizer.json")
    assert Tokenizer.from_pretrained(tmp_path).start_of_text == []


def test_a_directory_without_a_tokenizer_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.json; .*AutoTokenizer.from_pretrained"):
        Tokenizer.from_pretrained(tmp_path)
    TRAINED.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: is not JSON"):
        Tokenizer.from_pretrained(tmp_path)

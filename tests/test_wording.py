import pytest

from fastlm.wording import first_few, nearest, quantity

FLAGS = ["--steps", "--eps", "--l1", "--learning-rate", "--sequence-length", "--out", "--batch-size"]
PRESETS = ["tiny", "gpt2-124m", "gpt2-350m", "llama-1b"]


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("--stepz", FLAGS, "--steps"),
        ("-steps", FLAGS, "--steps"),
        ("--lr", FLAGS, "--learning-rate"),
        ("--seq_len", FLAGS, "--sequence-length"),
        ("--batchsize", FLAGS, "--batch-size"),
        ("--output", FLAGS, "--out"),
        ("gpt2", PRESETS, "gpt2-124m"),  # the first of equally near ones
        ("GPT2-350M", PRESETS, "gpt2-350m"),
        ("Adam", ["adamw", "sgd"], "adamw"),
    ],
)
def test_nearest_finds_what_was_perhaps_meant(word, known, expected):
    assert nearest(word, known) == f" (did you mean {expected}?)"


@pytest.mark.parametrize(
    ("word", "known"), [("--epochs", FLAGS), ("--", FLAGS), ("", PRESETS), ("x", []), ("l", FLAGS)]
)
def test_nearest_says_nothing_where_no_name_is_near(word, known):
    assert nearest(word, known) == ""


def test_quantity_counts_one_in_the_singular():
    told = [quantity(0, "token"), quantity(1, "token"), quantity(2000, "token"), quantity(2, "batch", "batches")]
    assert told == ["0 tokens", "1 token", "2,000 tokens", "2 batches"]


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["a"], "a"), (list("abc"), "a, b, c"), (list("abcd"), "a, b, c, ...")]
)
def test_first_few_shows_where_it_leaves_names_out(names, text):
    assert first_few(names) == text

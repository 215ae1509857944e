import math

import numpy as np
import pytest

from fastlm.data import ShardError, TokenDataset, Tokenizer, unigram_bits_per_byte, write_shard
from fastlm.data.shards import HEADER_SIZE
from tests.support.made_text import documents_of, write_documents

LENGTHS = [1, 5, 2, 17, 1, 9, 40, 3]


def read_back(dataset: TokenDataset) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of every document."""
    places = [start + np.arange(length) for start, length in zip(dataset.starts, dataset.lengths, strict=True)]
    return [(dataset.gather(place).tolist(), dataset.gather(place + 1).tolist()) for place in places]


def expected(documents: list[list[int]], end: int) -> list[tuple[list[int], list[int]]]:
    return [([end, *tokens], [*tokens, end]) for tokens in documents]


def test_shard_gives_back_inputs_and_targets_one_token_apart(dataset_of, tokenizer):
    dataset = dataset_of(LENGTHS)
    assert read_back(dataset) == expected(documents_of(LENGTHS, tokenizer), tokenizer.end_of_text)
    assert len(dataset) == len(LENGTHS)
    assert dataset.num_tokens == sum(LENGTHS)
    assert dataset.num_bytes == sum(3 * (length - 1) + 1 for length in LENGTHS)
    assert (dataset.vocab_size, dataset.end_of_text, dataset.tokenizer_hash) == (
        tokenizer.vocab_size,
        tokenizer.end_of_text,
        tokenizer.hash,
    )


def test_shard_of_a_large_vocabulary_takes_four_bytes_per_token(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 1 << 17)
    documents = [[70_000, 1, 131_071], [65_536]]
    write_documents(tmp_path / "large.tokens", documents, tokenizer)
    assert read_back(TokenDataset(tmp_path / "large.tokens")) == expected(documents, tokenizer.end_of_text)


def test_several_shards_read_like_one(dataset_of, tokenizer, tmp_path):
    documents = documents_of(LENGTHS, tokenizer)
    whole = dataset_of(LENGTHS)
    paths = []
    for n, part in enumerate([documents[:3], documents[3:4], documents[4:]]):
        paths.append(tmp_path / f"{n}.tokens")
        write_documents(paths[-1], part, tokenizer)
    parts = TokenDataset(paths)
    assert read_back(parts) == read_back(whole)
    assert np.array_equal(parts.token_counts(), whole.token_counts())


def test_shards_of_different_tokenizers_do_not_mix(dataset_of, tmp_path):
    dataset_of([3])
    write_documents(tmp_path / "other.tokens", [[5]], Tokenizer.train(["other"], 257))
    with pytest.raises(ShardError, match=r"other.tokens: was made with another tokenizer"):
        TokenDataset([tmp_path / "made.tokens", tmp_path / "other.tokens"])


def test_shard_cut_short_anywhere_is_one_clear_error(dataset_of, tmp_path):
    dataset_of(LENGTHS)
    data = (tmp_path / "made.tokens").read_bytes()
    path = tmp_path / "cut.tokens"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ShardError, match=r"cut.tokens: (was cut|has \d+ bytes|is not a fastlm token shard)"):
            TokenDataset(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ShardError, match="cut short or appended to"):
        TokenDataset(path)


def test_shard_with_any_bit_flipped_is_one_clear_error(dataset_of, tmp_path):
    dataset_of(LENGTHS)
    data = bytearray((tmp_path / "made.tokens").read_bytes())
    path = tmp_path / "flipped.tokens"
    for position in range(len(data)):
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        data[position] ^= 1 << position % 8
        with pytest.raises(ShardError, match=r"flipped.tokens: ") as caught:
            TokenDataset(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(data)
    assert len(TokenDataset(path)) == len(LENGTHS)


def test_a_foreign_or_missing_file_is_named(tmp_path):
    path = tmp_path / "foreign.tokens"
    path.write_bytes(b"\x89PNG" * 100)
    with pytest.raises(ShardError, match=r"foreign.tokens: is not a fastlm token shard"):
        TokenDataset(path)
    with pytest.raises(FileNotFoundError, match=r"gone.tokens: no such token shard"):
        TokenDataset(tmp_path / "gone.tokens")


@pytest.mark.parametrize("token", [-1, 300, 1 << 20])
def test_shard_refuses_a_token_outside_the_vocabulary_and_leaves_nothing(tokenizer, tmp_path, token):
    with (
        pytest.raises(ValueError, match="outside the vocabulary: expected 0 to 299"),
        write_shard(tmp_path / "bad.tokens", tokenizer) as writer,
    ):
        writer.append([5, token], num_bytes=2)
    assert list(tmp_path.iterdir()) == []


def test_shard_tokens_stay_on_disk(dataset_of):
    dataset = dataset_of([1000] * 20)
    (stream,) = dataset._streams
    assert isinstance(stream, np.memmap)
    assert stream.offset == HEADER_SIZE


def test_fingerprint_tells_content_order_and_choice_apart(dataset_of):
    datasets = [dataset_of([3, 4], "a"), dataset_of([4, 3], "b"), dataset_of([3, 4, 5], "c")]
    prints = {dataset.fingerprint for dataset in datasets}
    prints.add(datasets[2].sample(5).fingerprint)
    assert len(prints) == 4
    assert dataset_of([3, 4], "a").fingerprint in prints


def test_sample_takes_whole_documents_and_counts_their_bytes(dataset_of):
    dataset = dataset_of(LENGTHS * 20)
    whole = read_back(dataset)
    few = dataset.sample(200)
    assert 150 < few.num_tokens <= 200
    assert few.num_bytes == sum(3 * (length - 1) + 1 for length in few.lengths)
    assert all(document in whole for document in read_back(few))
    assert read_back(few) == read_back(dataset.sample(200))
    assert read_back(few) != read_back(dataset.sample(200, seed=1))
    assert len(dataset.sample(1)) == 1
    assert dataset.sample(10**9) is dataset


def test_unigram_bits_per_byte_equals_the_formula_written_out(dataset_of, tokenizer, monkeypatch):
    monkeypatch.setattr("fastlm.data.shards._CHUNK", 20)  # documents then fall into several chunks
    train, held_out = dataset_of([30, 1, 20, 300], "train"), dataset_of([7, 50, 1], "held_out")
    seen = [token for _, targets in read_back(train) for token in targets]
    asked = [token for _, targets in read_back(held_out) for token in targets]
    probability = [(seen.count(token) + 1) / (len(seen) + tokenizer.vocab_size) for token in asked]
    bits = math.fsum(-math.log2(p) for p in probability)
    assert f"{unigram_bits_per_byte(train, held_out):.12g}" == f"{bits / held_out.num_bytes:.12g}"


def test_unigram_bits_per_byte_refuses_two_tokenizers(dataset_of, tmp_path):
    write_documents(tmp_path / "other.tokens", [[5]], Tokenizer.train(["other"], 257))
    with pytest.raises(ValueError, match="different tokenizers"):
        unigram_bits_per_byte(dataset_of([3]), TokenDataset(tmp_path / "other.tokens"))

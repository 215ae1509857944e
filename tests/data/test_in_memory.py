"""Token ids from plain iterables, as datasets and in PackedLoader."""

import json

import numpy as np
import pytest
import torch

from fastlm.data import PackedLoader, TokenDataset
from fastlm.data.loader import IGNORED

DOCUMENTS = [[5, 6, 7, 8], [9, 1], [2, 3, 4, 5, 6, 7, 8, 9, 1]]


def read_back(dataset: TokenDataset) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of every document."""
    places = [start + np.arange(length) for start, length in zip(dataset.starts, dataset.lengths, strict=True)]
    return [(dataset.gather(place).tolist(), dataset.gather(place + 1).tolist()) for place in places]


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        np.array,
        lambda ids: np.array(ids, dtype=np.uint8),
        torch.tensor,
        lambda ids: {"input_ids": ids, "attention_mask": [1] * len(ids)},
    ],
    ids=["list", "tuple", "array", "bytes", "tensor", "mapping"],
)
def test_documents_of_any_form_are_predicted_from_their_second_token_on(form):
    dataset = TokenDataset.from_documents(form(ids) for ids in DOCUMENTS)
    assert read_back(dataset) == [(ids[:-1], ids[1:]) for ids in DOCUMENTS]
    assert (len(dataset), dataset.num_tokens, dataset.num_bytes, dataset.vocab_size) == (3, 12, 0, 10)


def test_end_of_text_is_put_before_and_after_each_document():
    dataset = TokenDataset.from_documents([*DOCUMENTS, [3]], end_of_text=0)
    assert read_back(dataset) == [([0, *ids], [*ids, 0]) for ids in [*DOCUMENTS, [3]]]


def test_a_tensor_of_rows_is_a_document_per_row():
    rows = torch.arange(12).view(3, 4)
    assert read_back(TokenDataset.from_documents(rows)) == read_back(TokenDataset.from_documents(rows.tolist()))


@pytest.mark.parametrize(("largest", "size"), [(65_535, 2), (65_536, 4), (2**32 - 1, 4)])
def test_ids_take_two_bytes_where_they_fit(largest, size):
    dataset = TokenDataset.from_documents([[largest, 0, 1]])
    assert dataset._streams[0].itemsize == size
    assert read_back(dataset) == [([largest, 0], [0, 1])]


def test_fingerprint_tells_content_boundaries_and_end_of_text_apart():
    sets = [DOCUMENTS, [[5, 6, 7], [8, 9, 1], DOCUMENTS[2]], [[5, 6, 7, 9], *DOCUMENTS[1:]]]
    datasets = [TokenDataset.from_documents(documents) for documents in sets]
    datasets.append(TokenDataset.from_documents(DOCUMENTS, end_of_text=0))
    assert len({dataset.fingerprint for dataset in datasets}) == 4
    assert TokenDataset.from_documents(map(torch.tensor, DOCUMENTS)).fingerprint == datasets[0].fingerprint


def test_packed_loader_takes_documents_and_resumes_on_the_same_ones_alone():
    def loader(documents: list[list[int]]) -> PackedLoader:
        return PackedLoader(iter(documents), batch_size=2, sequence_length=8)

    straight, resumed = loader(DOCUMENTS), loader(DOCUMENTS)
    assert straight.report.num_tokens == 12
    next(straight)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed.load_state_dict(state)
    assert torch.equal(next(straight).tokens, next(resumed).tokens)
    with pytest.raises(ValueError, match="the loader's dataset is"):
        loader([*DOCUMENTS, [1, 2]]).load_state_dict(state)


def test_packed_rows_of_documents_hold_each_target_once():
    held_out = PackedLoader(DOCUMENTS, batch_size=2, sequence_length=8).one_pass()
    targets = torch.cat([batch.targets.flatten() for batch in held_out])
    expected = sorted(token for ids in DOCUMENTS for token in ids[1:])
    assert sorted(targets[targets != IGNORED].tolist()) == expected


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ([], ValueError, "there are no documents: the iterable is empty"),
        (["some text"], TypeError, "document 0 is text, expected token ids: tokenize it first"),
        ("some text", TypeError, "documents are str, expected an iterable of lists of token ids"),
        ([[1, 2], []], ValueError, "document 1 holds 0 tokens, expected at least 2: there is nothing to predict"),
        ([[1, 2], [1]], ValueError, "document 1 holds 1 token, expected at least 2"),
        ([[1, 2], [3, -1]], ValueError, "document 1 holds the token id -1, expected 0 to 4,294,967,295"),
        ([[1, 2**32]], ValueError, "document 0 holds the token id 4294967296"),
        ([[1.0, 2.0]], TypeError, "document 0 holds float64, expected integers"),
        ([[True, False]], TypeError, "document 0 holds bool, expected integers"),
        ([1, 2, 3], ValueError, r"document 0 has shape \(\), expected \(tokens,\); a single long stream goes in as"),
        ([[[1, 2], [3, 4]]], ValueError, r"document 0 has shape \(2, 2\), expected \(tokens,\)"),
        ([{"text": "words"}], ValueError, "document 0 has the entries text, expected input_ids"),
    ],
)
def test_what_are_no_token_ids_is_refused_by_its_number(documents, error, message):
    with pytest.raises(error, match=message):
        PackedLoader(documents, batch_size=1, sequence_length=8)


def test_wrong_end_of_text_and_empty_documents_are_refused_with_it_too():
    with pytest.raises(ValueError, match="end_of_text is -1, expected a token id"):
        TokenDataset.from_documents(DOCUMENTS, end_of_text=-1)
    with pytest.raises(ValueError, match="document 1 holds 0 tokens, expected at least 1"):
        TokenDataset.from_documents([[1], []], end_of_text=0)

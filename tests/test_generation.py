"""Sampling: the cache against reading the whole row again, and what each option leaves to draw from."""

import pytest
import torch

from fastlm.generation import generate, sampling_probabilities
from fastlm.models import GPT
from tests.support.packed_batch import STYLES


def model_and_tokens(style="Llama", B=3, T=5):
    torch.manual_seed(0)
    model = GPT(STYLES[style]).eval()
    return model, torch.randint(model.config.vocab_size, (B, T))


@pytest.mark.parametrize("style", STYLES)
def test_generate_with_cache_takes_the_tokens_of_whole_rows_read_anew(style):
    model, tokens = model_and_tokens(style)
    expected = tokens
    with torch.no_grad():
        for _ in range(11):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, tokens, 11, temperature=0), expected)


def test_generate_goes_on_past_the_longest_row():
    model, tokens = model_and_tokens(B=1)
    result = generate(model, tokens, 40, temperature=0)
    assert result.shape == (1, 45)
    prompt = result[:, :16]  # a longer prompt: the same as one cut to its last 16 tokens
    assert torch.equal(generate(model, torch.cat([tokens, prompt], 1), 3, temperature=0)[:, -3:],
                       generate(model, prompt, 3, temperature=0)[:, -3:])  # fmt: skip


def test_generate_is_repeated_by_its_seed():
    model, tokens = model_and_tokens()
    first, again, other = (generate(model, tokens, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_generate_stops_where_every_row_met_the_stop_token():
    model, tokens = model_and_tokens()
    free = generate(model, tokens, 11, temperature=0)[:, 5:]
    stop = int(free[0, 2])
    stopped = generate(model, tokens, 11, temperature=0, stop_token=stop)[:, 5:]
    for row, unstopped in zip(stopped.tolist(), free.tolist(), strict=True):
        end = row.index(stop) if stop in row else len(row)
        assert row[:end] == unstopped[:end]
        assert set(row[end:]) <= {stop}


def test_generate_reports_each_token_as_it_is_drawn():
    model, tokens = model_and_tokens()
    seen = []
    result = generate(model, tokens, 6, seed=0, on_token=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), result[:, 5:])


def test_sampling_options_leave_the_tokens_they_name():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64).log()
    assert sampling_probabilities(logits, temperature=0).tolist() == [[0, 1, 0, 0]]
    assert (sampling_probabilities(logits, top_k=2) > 0).tolist() == [[False, True, False, True]]
    assert (sampling_probabilities(logits, top_p=0.75) > 0).tolist() == [[False, True, True, True]]
    assert (sampling_probabilities(logits, top_p=0.01) > 0).tolist() == [[False, True, False, False]]
    assert (sampling_probabilities(logits, top_k=9) > 0).tolist() == [[True] * 4]
    hot = sampling_probabilities(logits, temperature=2.0)
    assert torch.equal(hot, (logits.float() / 2).softmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "tokens have shape"),
    ],
)
def test_generate_says_what_is_wrong(options, message):
    model, tokens = model_and_tokens()
    arguments = {"tokens": tokens, "max_new_tokens": 1} | options
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


def test_sampling_at_a_tiny_temperature_takes_the_most_likely_token():
    logits = torch.randn(3, 11) * 5
    greedy = sampling_probabilities(logits, temperature=0)
    for temperature in (1e-30, 1e-40, 1e-300):
        assert torch.equal(sampling_probabilities(logits, temperature=temperature), greedy)


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_generate_rejects_a_temperature_that_is_no_number_of_at_least_zero(temperature):
    with pytest.raises(ValueError, match="temperature is"):
        generate(*model_and_tokens(), 1, temperature=temperature)


def test_generate_rejects_a_seed_beyond_64_bits():
    with pytest.raises(ValueError, match="seed is"):
        generate(*model_and_tokens(), 1, seed=10**30)


def test_generate_says_that_a_model_has_diverged():
    model, tokens = model_and_tokens()
    torch.nn.init.constant_(model.token_embedding.weight, float("nan"))
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, tokens, 1)

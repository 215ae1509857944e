import math

import pytest
import torch
from torch import nn

from fastlm.evaluation import evaluate, in_eval_mode
from tests.support.toy import toy_batch

BATCHES = [toy_batch(index, rows) for index, rows in enumerate([4, 1, 7])]


class QuarterOfTarget(nn.Module):
    """The loss of a token is a quarter of its target: sums are exact in float32, so results can be compared exactly."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.25))
        self.seen = []

    def forward(self, tokens, targets, *, cu_seqlens, positions):
        self.seen.append((self.training, torch.is_grad_enabled()))
        valid = targets != -100
        return (targets * valid).sum() * self.scale, valid.sum()


def valid_targets(batches):
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    return targets[targets != -100]


def test_evaluate_averages_over_tokens_not_batches():
    found = evaluate(QuarterOfTarget(), BATCHES, num_bytes=1000)
    targets = valid_targets(BATCHES)
    assert found.num_tokens == len(targets)
    assert found.loss == targets.sum().item() / 4 / len(targets)
    assert found.perplexity == math.exp(found.loss)
    assert found.bits_per_byte == targets.sum().item() / 4 / (math.log(2) * 1000)


def test_evaluate_does_not_depend_on_how_tokens_are_batched():
    rows = [
        type(batch)(batch.tokens[i : i + 1], batch.targets[i : i + 1], batch.positions[i : i + 1], batch.cu_seqlens)
        for batch in BATCHES
        for i in range(len(batch.tokens))
    ]
    assert evaluate(QuarterOfTarget(), rows) == evaluate(QuarterOfTarget(), BATCHES)


def test_evaluate_sums_over_ranks():
    alone, together = evaluate(QuarterOfTarget(), BATCHES[:1]), evaluate(QuarterOfTarget(), BATCHES)
    rest = valid_targets(BATCHES[1:])
    others = torch.tensor([rest.sum().item() / 4, len(rest)], dtype=torch.float64)
    assert evaluate(QuarterOfTarget(), BATCHES[:1], reduce=lambda total: total + others) == together != alone


@pytest.mark.parametrize("mode", [True, False])
def test_evaluate_takes_no_gradient_and_restores_the_mode(mode):
    model = QuarterOfTarget().train(mode)
    evaluate(model, BATCHES)
    assert model.seen == [(False, False)] * 3
    assert model.training is mode


def test_evaluate_gives_infinite_perplexity_where_exp_overflows():
    model = QuarterOfTarget()
    model.scale.data.fill_(1e4)
    assert evaluate(model, BATCHES).perplexity == math.inf


def test_evaluate_refuses_batches_without_a_valid_token():
    with pytest.raises(ValueError, match="no valid token"):
        evaluate(QuarterOfTarget(), [toy_batch(0, 2, share_ignored=1.0)])
    with pytest.raises(ValueError, match="no valid token"):
        evaluate(QuarterOfTarget(), [])


def test_evaluate_leaves_every_module_in_its_own_mode():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    model[1][0].eval()
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, True, False, True]

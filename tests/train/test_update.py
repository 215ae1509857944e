import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.train.distributed import Ranks
from fastlm.train.optimizers import Optimizers
from fastlm.train.precision import choose_precision
from fastlm.train.update import HostCopy, Updater
from tests.support.accuracy import assert_accurate
from tests.support.toy import ToyBatch, ToyModel, toy_batch, toy_config


def updater(model, **changes):
    config = toy_config("unused", **changes)
    precision = choose_precision(config)
    optimizers = Optimizers(model, config, with_masters=precision.has_masters)
    return Updater(model, optimizers, config, precision, Ranks())


def textbook_optimizers(model, config):
    """As a user would write them; decay of SGD and Adagrad, which is decoupled, is left to the caller."""
    matrices, [hidden, bias] = [model.embedding.weight, model.hidden.weight], model.hidden.parameters()
    if config.optimizer == "sgd":
        return [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=config.momentum, nesterov=True)]
    if config.optimizer == "adagrad":
        return [torch.optim.Adagrad(model.parameters(), lr=1e-2, eps=config.eps)]
    muon = []
    if config.optimizer == "muon":
        matrices = [model.embedding.weight]
        muon = [torch.optim.Muon([hidden], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    return [*muon, torch.optim.AdamW(groups, lr=1e-2, betas=config.betas, eps=config.eps)]


def plain_pytorch(model, batches, config, dtype):
    """The textbook: mean over all valid tokens, clip_grad_norm_, an optimiser of torch.optim."""
    model = model.to(dtype)
    optimizers = textbook_optimizers(model, config)
    norms = []
    for batch in batches:
        model.zero_grad()
        hidden = torch.tanh(model.hidden(model.embedding(batch.tokens)))
        nn.functional.cross_entropy(model.head(hidden).flatten(0, 1), batch.targets.flatten()).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float("inf")))
        with torch.no_grad():
            for weight in (
                [model.embedding.weight, model.hidden.weight] if config.optimizer in ("sgd", "adagrad") else []
            ):
                weight *= 1 - 1e-2 * 0.1
        for optimizer in optimizers:
            optimizer.step()
    return list(model.parameters()), norms[-1].detach()


def joined(batches):
    fields = ("tokens", "targets", "positions", "cu_seqlens")
    return ToyBatch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in fields))


@pytest.mark.parametrize("grad_clip", [1.0, 0.0, 100.0])
def test_update_equals_the_textbook(grad_clip):
    batches, model = [toy_batch(index, 4) for index in range(5)], ToyModel()
    ours = updater(model, grad_clip=grad_clip)
    for batch in batches:
        ours.update([batch], 1e-2)
    torch_parameters, torch_norm = plain_pytorch(ToyModel(), batches, ours.knobs, torch.float32)
    truth, true_norm = plain_pytorch(ToyModel(), batches, ours.knobs, torch.float64)
    for index, parameter in enumerate(model.parameters()):
        assert_accurate(parameter, torch_parameters[index], truth[index], f"parameter {index}")
    assert_accurate(torch.tensor(ours.grad_norm), torch_norm, true_norm, "norm")


def test_accumulation_equals_one_big_batch_although_batches_differ_in_valid_tokens():
    parts = [toy_batch(0, 4, share_ignored=0.9), toy_batch(1, 4, share_ignored=0.0), toy_batch(2, 1)]
    accumulated, big = ToyModel(), ToyModel()
    one, other = updater(accumulated), updater(big)
    one.update(parts, 1e-2)
    other.update([joined(parts)], 1e-2)
    truth, _ = plain_pytorch(ToyModel(), [joined(parts)], one.knobs, torch.float64)
    for mine, torchs, true in zip(accumulated.parameters(), big.parameters(), truth, strict=True):
        assert_accurate(mine, torchs, true)
    assert one.totals.num_tokens == other.totals.num_tokens == int((joined(parts).targets != -100).sum())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adagrad", "muon"])
def test_twenty_steps_of_masked_accumulated_batches_equal_the_textbook(optimizer, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # by which torch.optim.Muon would round
    first = int(torch.randint(1000, ()))
    parts = [
        [
            toy_batch(first + 3 * step, 4, 0.9),
            toy_batch(first + 3 * step + 1, 2, 0.0),
            toy_batch(first + 3 * step + 2, 1),
        ]
        for step in range(20)
    ]
    model = ToyModel()
    ours = updater(model, optimizer=optimizer, grad_clip=0.5)
    for batches in parts:
        ours.update(batches, 1e-2)
    joint = [joined(batches) for batches in parts]
    torchs, torch_norm = plain_pytorch(ToyModel(), joint, ours.knobs, torch.float32)
    truth, true_norm = plain_pytorch(ToyModel(), joint, ours.knobs, torch.float64)
    assert true_norm > 0.5  # so that it was clipped
    for index, parameter in enumerate(model.parameters()):
        assert_accurate(parameter, torchs[index], truth[index], f"parameter {index}")
    assert_accurate(torch.tensor(ours.grad_norm), torch_norm, true_norm, "norm")


class Poisoned(ToyModel):
    """Multiplies its loss by a factor that a test can set."""

    factor = 1.0

    def forward(self, *args, **kwargs):
        loss_sum, num_valid = super().forward(*args, **kwargs)
        return loss_sum * self.factor, num_valid


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-params", "fp16"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_update_skips_a_loss_that_is_not_finite_and_counts_it(precision, factor):
    model = Poisoned()
    ours = updater(model, precision=precision)
    ours.update([toy_batch(0, 4)], 1e-2)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(ours.optimizers.state_tensors()), ours.totals
    assert before[2].skipped_steps == 0
    model.factor = factor
    for row in 1, 2:
        ours.update([toy_batch(1, 4)], 1e-2)
        assert (ours.totals.skipped_steps, ours.totals.skipped_in_a_row) == (row, row)
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[1][name]) for name, value in ours.optimizers.state_tensors().items())
    assert (ours.totals.loss_sum, ours.totals.num_tokens) == (before[2].loss_sum, before[2].num_tokens)
    model.factor = 1.0
    ours.update([toy_batch(2, 4)], 1e-2)
    assert (ours.totals.skipped_steps, ours.totals.skipped_in_a_row) == (2, 0)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(model.embedding.weight, before[0]["embedding.weight"])


def test_update_does_nothing_where_no_token_is_valid():
    model = ToyModel()
    ours = updater(model)
    ours.update([toy_batch(0, 4)], 1e-2)
    before, totals = copy.deepcopy(model.state_dict()), ours.totals
    ours.update([toy_batch(1, 4, share_ignored=1.0)], 1e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (ours.totals.num_tokens, ours.totals.skipped_steps) == (totals.num_tokens, 1)


def test_fp16_lowers_its_scale_until_gradients_fit():
    ours = updater(ToyModel(), precision="fp16")
    ours.loss_scale.factor.fill_(2.0**40)
    for index in range(40):
        ours.update([toy_batch(index, 4)], 1e-2)
    assert 0 < ours.totals.skipped_steps < 40
    assert ours.totals.skipped_in_a_row == 0


class NoSync(TorchDispatchMode):
    """Fails where the host asks for a value, which on a GPU waits for all work queued before."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        asked = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        assert function not in asked, f"the host waits in {function}"
        return function(*args, **(kwargs or {}))


class Arrival:
    """Stands for the event after a copy to the host."""

    def __init__(self):
        self.has_come = True

    def query(self):
        return self.has_come

    def record(self):
        self.has_come = False


def test_host_copy_gives_what_has_arrived_and_waits_for_nothing():
    copy = HostCopy(torch.device("cpu"))
    copy._arrival = Arrival()
    copy.send(torch.tensor(1.0))
    copy.send(torch.tensor(2.0))
    assert copy.value == 0
    copy._arrival.has_come = True
    assert copy.value == 1
    copy.send(torch.tensor(3.0))
    assert copy.value == 1
    copy._arrival.has_come = True
    copy.send(torch.tensor(4.0))
    assert copy.value == 3, "a value that has arrived is not lost to the next one"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_update_never_asks_the_device_for_a_value(precision):
    ours = updater(ToyModel(), precision=precision, skip_outliers=4.0)
    batches = [toy_batch(index, 4) for index in range(3)]
    ours.update(batches, 1e-2)
    with NoSync():
        ours.update(batches, 1e-2)
    with pytest.raises(AssertionError, match="the host waits"), NoSync():
        ours.grad_norm  # noqa: B018

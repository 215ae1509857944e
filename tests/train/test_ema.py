import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.evaluation import evaluate
from fastlm.train.ema import Ema
from fastlm.train.leaves import Leaves
from tests.support.toy import ToyLoader, ToyModel, toy_trainer
from tests.train.test_trainer import HELD_OUT

TAKE, SKIP = torch.tensor(False), torch.tensor(True)


def with_statistics(model):
    model.register_buffer("seen", torch.zeros(()))
    return model


def change(leaves, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for leaf in leaves:
            leaf += torch.randn(leaf.shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ema_equals_torchs_averaged_model_and_carries_the_models_buffers(dtype):
    model = with_statistics(ToyModel().to(dtype))
    ema = Ema(model, Leaves(model), decay=0.75)
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    torchs.update_parameters(model)  # its first update is a copy
    for step in range(5):
        change(model.parameters(), step)
        model.seen += 1
        ema.update(TAKE)
        torchs.update_parameters(model)
    expected = torchs.module.state_dict() | {"seen": torch.tensor(5.0)}
    ours = ema.state_dict()
    assert list(ours) == list(expected)
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


class Calls(TorchDispatchMode):
    """Notes the names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_ema_takes_in_all_leaves_in_one_call():
    model = ToyModel()
    leaves = Leaves(model)
    ema = Ema(model, leaves, decay=0.75)
    with Calls() as calls:
        ema.update(TAKE)
    assert [name for name in calls.names if "lerp" in name or "where" in name] == ["aten::_foreach_lerp_.List"]


@pytest.mark.parametrize("with_masters", [False, True])
def test_ema_is_not_changed_by_a_step_that_is_skipped(with_masters):
    model = ToyModel()
    leaves = Leaves(model, with_masters=with_masters)
    ema = Ema(model, leaves, decay=0.75)
    change(leaves.names, 0)
    ema.update(TAKE)
    before = copy.deepcopy(ema.state_dict())
    change(leaves.names, 1)
    ema.update(SKIP)
    assert all(torch.equal(value, before[name]) for name, value in ema.state_dict().items())


@pytest.mark.parametrize("with_masters", [False, True])
def test_ema_in_place_is_the_model_and_leaves_no_trace(with_masters):
    model = ToyModel()
    leaves = Leaves(model, with_masters=with_masters)
    ema = Ema(model, leaves, decay=0.75)
    change(leaves.names, 0)
    leaves.publish()
    ema.update(TAKE)
    before = copy.deepcopy([model.state_dict(), ema.state_dict(), [*leaves.names]])
    with ema.in_place():
        assert all(torch.equal(value, before[1][name].to(value.dtype)) for name, value in model.state_dict().items())
    after = [model.state_dict(), ema.state_dict()]
    assert all(torch.equal(was[name], now[name]) for was, now in zip(before, after, strict=False) for name in now)
    assert all(map(torch.equal, before[2], leaves.names))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("hidden.bias"), "hidden.bias"),
        (
            lambda saved: saved.update({"hidden.bias": torch.ones(1)}),
            r"the average of hidden.bias is torch.float32 \(1,\), expected torch.float32 \(16,\)",
        ),
    ],
)
def test_ema_names_an_average_that_is_not_its_own(change, message):
    model = ToyModel()
    ema = Ema(model, Leaves(model), decay=0.75)
    saved = ema.state_dict()
    change(saved)
    with pytest.raises((KeyError, ValueError), match=message):
        ema.load_state_dict(saved)


def test_held_out_loss_is_that_of_the_averaged_weights_and_says_so(tmp_path):
    lines, model = [], ToyModel()
    changes = {"steps": 6, "eval_interval": 3, "ema_decay": 0.5, "eval_loader": HELD_OUT}
    trainer = toy_trainer(tmp_path, model=model, on_log=lines.append, **changes)
    result = trainer.fit()
    assert [line.endswith("(EMA weights)") for line in lines if "held-out loss" in line] == [True, True]
    averaged = ToyModel()
    averaged.load_state_dict(trainer.ema.state_dict())
    assert result.evaluation == evaluate(averaged, HELD_OUT)


def test_ema_that_is_turned_on_later_starts_from_the_weights_it_finds(tmp_path):
    toy_trainer(tmp_path, steps=2).fit()
    trainer = toy_trainer(tmp_path, steps=2, ema_decay=0.5)
    trainer.fit()
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in trainer.ema.state_dict().items())


def test_ema_passes_over_a_batch_without_a_valid_token(tmp_path):
    straight, broken = (
        toy_trainer(
            tmp_path / str(len(steps)),
            loader=ToyLoader(broken=steps),
            steps=3 + len(steps),
            ema_decay=0.5,
            schedule="constant",
            warmup_ratio=0.0,
        )
        for steps in ((), (3,))
    )
    straight.fit()
    assert broken.fit().skipped_steps == 1
    assert all(torch.equal(value, straight.ema.state_dict()[name]) for name, value in broken.ema.state_dict().items())

import copy

import pytest
import torch

from fastlm.train import TrainConfig
from fastlm.train.optimizers import Optimizers
from tests.train.toy import ToyModel


def test_optimizers_decays_by_group():
    optimizers = Optimizers(ToyModel(), TrainConfig(weight_decay=0.5))
    assert [group["weight_decay"] for group in optimizers._adamw.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda model: model.parameter_groups()[:1], "leaves out hidden.bias"),
        (lambda model: model.parameter_groups() + model.parameter_groups()[1:], "lists a parameter twice"),
        (
            lambda model: [
                *model.parameter_groups(),
                {"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay_scale": 0.0},
            ],
            "1 tensors that are no trainable parameters",
        ),
    ],
)
def test_optimizers_wants_every_parameter_once(groups, message, monkeypatch):
    model = ToyModel()
    listed = groups(model)
    monkeypatch.setattr(model, "parameter_groups", lambda: listed)
    with pytest.raises(ValueError, match=message):
        Optimizers(model, TrainConfig())


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.ones(4, 1).expand(4, 3), "parameter odd is expanded: several elements are one place in memory"),
        (torch.ones(3, dtype=torch.complex64), "parameter odd is torch.complex64, expected a floating point dtype"),
    ],
)
def test_optimizers_refuses_what_adamw_cannot_update(parameter, message):
    model = ToyModel()
    model.odd = torch.nn.Parameter(parameter)
    model.parameter_groups = lambda: [{"params": list(model.parameters()), "weight_decay_scale": 1.0}]
    with pytest.raises((TypeError, ValueError), match=message):
        Optimizers(model, TrainConfig())


def filled(model):
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5 + index)
    return model


def test_update_that_is_skipped_changes_nothing():
    model = filled(ToyModel())
    optimizers = Optimizers(model, TrainConfig())
    optimizers.step(0.1, divisor=torch.tensor(1.0), skip=torch.tensor(False))
    before = copy.deepcopy([*model.parameters()]), copy.deepcopy(optimizers.state_tensors())
    for parameter in filled(model).parameters():
        parameter.grad.fill_(float("nan"))
    optimizers.step(0.1, divisor=torch.tensor(float("nan")), skip=torch.tensor(True))
    assert all(map(torch.equal, before[0], model.parameters()))
    after = optimizers.state_tensors()
    assert len(after) == 9
    assert all(torch.equal(before[1][key], after[key]) for key in after)


def test_state_tensors_do_not_depend_on_the_order_of_groups(monkeypatch):
    model = filled(ToyModel())
    optimizers = Optimizers(model, TrainConfig())
    optimizers.step(0.1, divisor=torch.tensor(1.0), skip=torch.tensor(False))
    saved = optimizers.state_tensors()
    other = ToyModel()
    turned = other.parameter_groups()[::-1]
    monkeypatch.setattr(other, "parameter_groups", lambda: turned)
    restored = Optimizers(other, TrainConfig())
    restored.load_state_tensors(saved)
    loaded = restored.state_tensors()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("exp_avg", None, r"hidden.bias/exp_avg is missing, expected torch.float32 \(16,\)"),
        ("exp_avg_sq", torch.ones(16, 1), r"exp_avg_sq is torch.float32 \(16, 1\), expected torch.float32 \(16,\)"),
        ("exp_avg", torch.ones(16, dtype=torch.int64), r"exp_avg is torch.int64 \(16,\), expected torch.float32"),
        ("step", torch.ones(2), r"step is torch.float32 \(2,\), expected torch.float32 \(\)"),
        ("momentum", torch.ones(16), r"momentum is torch.float32 \(16,\), expected no such entry"),
    ],
)
def test_load_state_tensors_names_an_entry_that_is_not_adamws(entry, value, message):
    model = filled(ToyModel())
    optimizers = Optimizers(model, TrainConfig())
    optimizers.step(0.1, divisor=torch.tensor(1.0), skip=torch.tensor(False))
    saved = optimizers.state_tensors() | {f"hidden.bias/{entry}": value}
    saved = {key: tensor for key, tensor in saved.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        Optimizers(model, TrainConfig()).load_state_tensors(saved)


def test_load_state_tensors_refuses_the_state_of_another_model():
    model = ToyModel()
    with pytest.raises(ValueError, match="the optimizer state is of elsewhere, no trainable parameter"):
        Optimizers(model, TrainConfig()).load_state_tensors({"elsewhere/step": torch.tensor(1.0)})

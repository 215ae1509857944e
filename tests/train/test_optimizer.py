import copy

import pytest
import torch

from fastlm.train import TrainConfig
from fastlm.train.optimizer import build_optimizer, load_state_tensors, state_tensors, update
from tests.train.toy import ToyModel


def test_build_optimizer_decays_by_group():
    optimizer = build_optimizer(ToyModel(), TrainConfig(weight_decay=0.5))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


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
def test_build_optimizer_wants_every_parameter_once(groups, message, monkeypatch):
    model = ToyModel()
    listed = groups(model)
    monkeypatch.setattr(model, "parameter_groups", lambda: listed)
    with pytest.raises(ValueError, match=message):
        build_optimizer(model, TrainConfig())


def test_build_optimizer_names_the_method_a_model_lacks():
    with pytest.raises(TypeError, match=r"Linear has no method parameter_groups\(\)"):
        build_optimizer(torch.nn.Linear(2, 2), TrainConfig())


def filled(model):
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5 + index)
    return model


def test_update_that_is_skipped_changes_nothing():
    model = filled(ToyModel())
    optimizer = build_optimizer(model, TrainConfig())
    update(optimizer, learning_rate=0.1, divisor=torch.tensor(1.0), skip=torch.tensor(False))
    before = copy.deepcopy([*model.parameters()]), copy.deepcopy(state_tensors(optimizer, model))
    for parameter in filled(model).parameters():
        parameter.grad.fill_(float("nan"))
    update(optimizer, learning_rate=0.1, divisor=torch.tensor(float("nan")), skip=torch.tensor(True))
    assert all(map(torch.equal, before[0], model.parameters()))
    after = state_tensors(optimizer, model)
    assert len(after) == 9
    assert all(torch.equal(before[1][key], after[key]) for key in after)


def test_state_tensors_do_not_depend_on_the_order_of_groups(monkeypatch):
    model = filled(ToyModel())
    optimizer = build_optimizer(model, TrainConfig())
    update(optimizer, learning_rate=0.1, divisor=torch.tensor(1.0), skip=torch.tensor(False))
    saved = state_tensors(optimizer, model)
    other = ToyModel()
    turned = other.parameter_groups()[::-1]
    monkeypatch.setattr(other, "parameter_groups", lambda: turned)
    restored = build_optimizer(other, TrainConfig())
    load_state_tensors(restored, other, saved)
    loaded = state_tensors(restored, other)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_load_state_tensors_refuses_the_state_of_another_model():
    model = ToyModel()
    with pytest.raises(ValueError, match="the optimizer state is of elsewhere, no trainable parameter"):
        load_state_tensors(build_optimizer(model, TrainConfig()), model, {"elsewhere/step": torch.tensor(1.0)})

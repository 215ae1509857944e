import pytest
import torch
from torch import nn

from fastlm.train import TrainConfig
from fastlm.train.leaves import Leaves
from fastlm.train.optimizers import Optimizers
from tests.support.toy import ToyModel, toy_batch, toy_trainer


class Mixed(nn.Module):
    """Weights, a norm, a frozen weight, an integer, and statistics in buffers."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.statistics = nn.Linear(3, 3), nn.LayerNorm(3), nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.number = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)


def test_masters_hold_the_weights_of_which_parameters_are_bf16_copies():
    model, plain = Mixed(), Mixed()
    model.load_state_dict(plain.state_dict())
    leaves = Leaves(model, with_masters=True)
    trainable = {name: parameter for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert [*leaves.names.values()] == [*trainable]
    assert all(torch.equal(leaf, trainable[name]) for leaf, name in leaves.names.items())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.int64 if name == "number" else torch.bfloat16)
        assert torch.equal(parameter, plain.get_parameter(name).to(parameter.dtype))
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32, torch.int64}


def test_masters_add_up_gradients_in_fp32():
    model = nn.Linear(1, 1, bias=False)
    leaves = Leaves(model, with_masters=True)
    [leaf] = leaves.names
    for size in [1.0, *[2.0**-9] * 64]:  # each too small to change a bf16 sum of 1
        (model.weight * size).sum().backward()
        assert model.weight.grad is None
    assert leaf.grad.item() == 1.125


def test_small_updates_move_masters_and_at_last_the_parameters():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizers = Optimizers(model, TrainConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0), with_masters=True)
    seen = []
    for _ in range(4):
        model.weight.sum().backward()
        optimizers.step(2.0**-10, divisor=torch.tensor(1.0), skip=torch.tensor(False))
        optimizers.zero_grad()
        seen.append(model.weight.item())
    assert seen == [1.0, 1.0, 1.0 - 2.0**-8, 1.0 - 2.0**-8]  # the next bf16 number below 1 is 1 - 2^-8
    assert [leaf.item() for leaf in optimizers.leaves.names] == [1.0 - 2.0**-8]


def test_model_of_a_trainer_with_masters_trains_on_in_another(tmp_path):
    model = ToyModel()
    toy_trainer(tmp_path / "one", model=model, precision="bf16-params")
    toy_trainer(tmp_path / "two", model=model, precision="bf16-params", steps=2).fit()
    before = model.hidden.weight.clone()
    result = toy_trainer(tmp_path / "three", model=model.float(), steps=2).fit()
    assert (result.skipped_steps, model.hidden.weight.dtype) == (0, torch.float32)
    assert not torch.equal(model.hidden.weight, before)


def test_state_dict_is_that_of_the_model_before_it_became_bf16_and_comes_back():
    model, plain, other = Mixed(), Mixed(), Mixed()
    nn.init.constant_(plain.frozen, 1 / 3)
    model.load_state_dict(plain.state_dict())
    saved = Leaves(model, with_masters=True).state_dict(model)
    assert list(saved) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert saved[name].dtype == value.dtype
        assert torch.equal(saved[name], value.bfloat16().float() if name == "frozen" else value)
    leaves = Leaves(other, with_masters=True)
    other.load_state_dict(saved)
    leaves.adopt(other, saved)
    assert all(torch.equal(leaf, saved[name]) for leaf, name in leaves.names.items())


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_of_masters_are_those_of_the_bf16_model(rows):
    batch = toy_batch(0, rows)
    arguments = batch.tokens, batch.targets
    documents = {"cu_seqlens": batch.cu_seqlens, "positions": batch.positions}
    model, plain = ToyModel(), ToyModel().bfloat16()
    leaves = Leaves(model, with_masters=True)
    for each in model, plain:
        each(*arguments, **documents)[0].backward()
    for leaf, parameter in zip(leaves.names, plain.parameters(), strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, parameter.grad.float())

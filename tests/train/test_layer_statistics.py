import pytest
import torch
from torch import nn

from fastlm.models import GPT, GPTConfig
from fastlm.train.distributed import Ranks
from fastlm.train.layer_statistics import LayerStatistics, LayerStatisticsKnobs, layers
from fastlm.train.leaves import Leaves
from fastlm.train.metrics import read_metrics
from tests.support.toy import ToyModel, toy_batch, toy_trainer
from tests.train.test_update import updater

pytestmark = pytest.mark.usefixtures("undrawn")


def norm(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).norm().item()


def names(model):
    """What the optimisers of the model update, and its names."""
    return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_layers_of_a_gpt_are_its_blocks_and_what_is_beside_them():
    model = GPT(GPTConfig.llama(vocab_size=30, sequence_length=8, num_layers=12, num_heads=1, hidden_size=8))
    found = layers(names(model))
    assert list(found) == ["token_embedding", *(f"blocks.{i}" for i in range(12)), "final_norm", "head"]
    assert sum(len(group) for group in found.values()) == len(list(model.parameters()))


def test_layers_of_a_bare_parameter_have_its_name():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(3))
    assert list(layers(names(model))) == ["scale"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_layer_statistics_are_those_of_the_mean_gradient_the_weights_and_the_update(precision):
    batch, model = toy_batch(0, 4), ToyModel()
    plain = ToyModel()
    before = {name: [p.clone() for p in group] for name, group in layers(names(model)).items()}
    loss_sum, num_valid = plain(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
    (loss_sum / num_valid).backward()
    norms = LayerStatistics(Leaves(model), Ranks(), LayerStatisticsKnobs(layer_statistics_interval=1))
    updater(model, precision=precision).update([batch], 1e-2, around=norms.around(1))
    [record] = norms.take()
    assert record["step"] == 1
    assert list(record["layers"]) == ["embedding", "hidden"]
    tolerance = {"rel": 1e-5 if precision == "fp32" else 1e-2}
    for name, group in layers(names(model)).items():
        found = record["layers"][name]
        changed = [new - old for new, old in zip(group, before[name], strict=True)]
        assert found["grad_norm"] == pytest.approx(norm(p.grad for p in layers(names(plain))[name]), **tolerance)
        assert found["weight_norm"] == pytest.approx(norm(before[name]), **tolerance)
        assert found["update_ratio"] == pytest.approx(norm(changed) / norm(before[name]), **tolerance)
    assert norms.take() == []


def test_layer_statistics_of_a_skipped_step_tell_that_nothing_changed():
    model = ToyModel()
    norms = LayerStatistics(Leaves(model), Ranks(), LayerStatisticsKnobs(layer_statistics_interval=1))
    updater(model).update([toy_batch(0, 4, share_ignored=1.0)], 1e-2, around=norms.around(1))
    [record] = norms.take()
    assert {values["update_ratio"] for values in record["layers"].values()} == {0.0}


def test_layer_statistics_are_recorded_when_due_and_change_nothing(tmp_path):
    plain, watched = ToyModel(), ToyModel()
    toy_trainer(tmp_path / "plain", model=plain, steps=7).fit()
    toy_trainer(tmp_path / "watched", model=watched, steps=7, layer_statistics_interval=3, log_interval=5).fit()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    records = read_metrics(tmp_path / "watched" / "metrics.jsonl")
    assert [record["step"] for record in records if "layers" in record] == [3, 6]
    assert not any("layers" in record for record in read_metrics(tmp_path / "plain" / "metrics.jsonl"))


def test_layer_statistics_before_a_checkpoint_are_not_lost_with_a_killed_process(tmp_path):
    class Killed(BaseException):
        pass

    def kill(step):
        if step == 5:
            raise Killed

    changes = {"steps": 8, "layer_statistics_interval": 3, "log_interval": 8, "checkpoint_interval": 4}
    with pytest.raises(Killed):
        toy_trainer(tmp_path, on_step=kill, **changes).fit()
    toy_trainer(tmp_path, **changes).fit()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "layers" in record] == [3, 6]


def test_layer_statistics_ask_the_device_nothing_within_a_step():
    """Whatever waits for a device reads a value; a meta tensor has none to read."""
    model = ToyModel().to("meta")
    norms = LayerStatistics(Leaves(model), Ranks(), LayerStatisticsKnobs(layer_statistics_interval=1))
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    with norms.around(1)(torch.empty((), device="meta")):
        pass
    with pytest.raises(RuntimeError, match="meta"):
        norms.take()

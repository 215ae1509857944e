import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastlm.train import TrainConfig
from fastlm.train.adagrad import Adagrad
from fastlm.train.ema import Ema
from fastlm.train.muon import orthogonalized
from fastlm.train.optimizers import Optimizers
from tests.support.accuracy import assert_accurate
from tests.support.toy import ToyModel

PAGE = Path(__file__).resolve().parents[2] / "docs/optimizers.md"
NAMES = ["adamw", "sgd", "adagrad", "muon"]
TAKE, SKIP = torch.tensor(False), torch.tensor(True)
ONE = torch.tensor(1.0)


@pytest.mark.parametrize("name", NAMES)
def test_optimizers_decays_by_group(name):
    model = ToyModel()
    before = copy.deepcopy([*model.parameters()])
    optimizers = Optimizers(model, TrainConfig(optimizer=name, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step(0.5, divisor=ONE, skip=TAKE)
    for was, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(parameter, was * (0.75 if parameter.dim() == 2 else 1.0))


def draw_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def rate(step):
    return 0.05 / (1 + step)


def steps_of_torchs(name, dtype, config, kind, more):
    """The weights after 20 steps of torch.optim, which decays matrices alone; SGD and Adagrad are decayed by hand."""
    parameters = [*ToyModel().to(dtype).parameters()]
    matrices, vectors = ([p for p in parameters if (p.dim() == 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if name != "adamw":
        groups = [group | {"weight_decay": 0.0} for group in groups]
    optimizer = kind(groups, lr=0.0, **more)
    for step in range(20):
        draw_gradients(parameters, step)
        with torch.no_grad():
            for matrix in matrices if name != "adamw" else []:
                matrix *= 1 - rate(step) * config.weight_decay
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    return parameters


def steps_of_ours(config, model, divisor=1.0):
    optimizers = Optimizers(model, config)
    for step in range(20):
        draw_gradients(model.parameters(), step)
        for parameter in model.parameters():
            parameter.grad *= divisor
        optimizers.step(rate(step), divisor=torch.tensor(divisor), skip=TAKE)
    return [*model.parameters()]


TORCHS = {
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.95), "eps": 1e-8}),
    "sgd": (torch.optim.SGD, {"momentum": 0.95, "nesterov": True}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}),
}


@pytest.mark.parametrize("name", TORCHS)
def test_optimizers_equal_torchs_to_the_bit(name):
    config = TrainConfig(optimizer=name)
    kind, more = TORCHS[name]
    torchs = steps_of_torchs(name, torch.float32, config, kind, more | {"fused": True})
    ours = steps_of_ours(config, ToyModel(), divisor=8.0)  # which loses no bit
    assert all(map(torch.equal, ours, torchs))
    assert not torch.equal(ours[0], next(iter(ToyModel().parameters())))


def test_adagrad_without_a_fused_kernel_equals_torchs(monkeypatch):
    monkeypatch.setattr("fastlm.train.adagrad._is_fused_on", lambda device: False)
    config = TrainConfig(optimizer="adagrad")
    assert isinstance(Optimizers(ToyModel(), config)._optimizers["adagrad"], Adagrad)
    torchs, truth = (
        steps_of_torchs("adagrad", dtype, config, *TORCHS["adagrad"]) for dtype in (torch.float32, torch.float64)
    )
    for ours, theirs, true in zip(steps_of_ours(config, ToyModel()), torchs, truth, strict=True):
        assert_accurate(ours, theirs, true)


def rectangles():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8))


def steps_of_torchs_muon(dtype, config):
    """As a user would write it: Muon for the matrices, AdamW for the biases."""
    model = rectangles().to(dtype)
    matrices, biases = ([p for p in model.parameters() if p.dim() == wanted] for wanted in (2, 1))
    muon = torch.optim.Muon(matrices, weight_decay=config.weight_decay, adjust_lr_fn=config.muon_size)
    adamw = torch.optim.AdamW(biases, weight_decay=0.0, betas=config.betas, eps=config.eps)
    for step in range(20):
        draw_gradients(model.parameters(), step)
        muon.param_groups[0]["lr"] = rate(step)
        adamw.param_groups[0]["lr"] = rate(step) * config.adamw_lr_ratio
        muon.step()
        adamw.step()
    return [*model.parameters()]


@pytest.mark.parametrize("size", ["match_rms_adamw", "original"])
def test_muon_equals_torchs_with_newton_schulz_in_full_precision(size, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # by which torch.optim.Muon would round
    config = TrainConfig(optimizer="muon", muon_size=size, adamw_lr_ratio=0.5)
    torchs, truth = (steps_of_torchs_muon(dtype, config) for dtype in (torch.float32, torch.float64))
    for ours, theirs, true in zip(steps_of_ours(config, rectangles()), torchs, truth, strict=True):
        assert_accurate(ours, theirs, true)


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24), (1, 5)])
def test_orthogonalized_equals_torchs_in_bf16_and_is_near_u_vt(shape):
    matrix = torch.randn(shape)
    muon = torch.optim.Muon([nn.Parameter(matrix)]).param_groups[0]
    arguments = muon["ns_coefficients"], muon["ns_steps"], muon["eps"]
    theirs = torch.optim._muon._zeropower_via_newtonschulz(matrix, *arguments)
    assert torch.equal(orthogonalized(matrix.bfloat16(), *arguments), theirs)
    singular = torch.linalg.svdvals(orthogonalized(matrix, *arguments))
    assert 0.5 < singular.min() <= singular.max() < 1.3


class Untied(nn.Module):
    """Embeddings of tokens and positions, hidden layers and a head of its own."""

    def __init__(self, blocks=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(29, 16), nn.Embedding(16, 16)
        self.mixer = nn.Linear(16, 16)
        layers = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16))
        if blocks:
            self.blocks = layers
        else:
            self.layers = layers
        self.table = nn.Parameter(torch.ones(2, 2))
        self.head = nn.Linear(16, 29)


@pytest.mark.parametrize(
    ("model", "matrices"),
    [
        (ToyModel(), {"hidden.weight"}),
        (Untied(), {"mixer.weight", "layers.0.weight", "layers.2.weight"}),
        (Untied(blocks=True), {"blocks.0.weight", "blocks.2.weight"}),
    ],
)
def test_muon_takes_the_hidden_matrices_alone(model, matrices):
    optimizers = Optimizers(model, TrainConfig(optimizer="muon"))
    names = optimizers.leaves.names
    taken = {
        kind: {names[leaf] for group in optimizer.param_groups for leaf in group["params"]}
        for kind, optimizer in optimizers._optimizers.items()
    }
    assert taken == {"muon": matrices, "adamw": {name for name, _ in model.named_parameters()} - matrices}


class Named(nn.Module):
    """Its head would be taken for a hidden matrix: the groups of the page on optimisers say which are."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 29)

    example = re.search("```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(example[1])


def test_muon_takes_what_a_model_names():
    model = Named()
    muon = Optimizers(model, TrainConfig(optimizer="muon"))._optimizers["muon"]
    assert [group["params"] for group in muon.param_groups] == [[model.up.weight, model.down.weight]]


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("sgd", "names the optimizer 'sgd', expected 'muon' or 'adamw'"),
        ("muon", r"Muon is asked for a parameter of shape \(16,\), expected a matrix"),
        ("adamw", "ToyModel has no hidden matrix for Muon: name some in parameter_groups"),
    ],
)
def test_muon_refuses_a_split_that_it_cannot_update(role, message):
    model = ToyModel()
    groups = [group | {"optimizer": role} for group in model.parameter_groups()]
    model.parameter_groups = lambda: groups
    with pytest.raises(ValueError, match=message):
        Optimizers(model, TrainConfig(optimizer="muon"))


def test_penalties_join_the_clipped_mean_gradient_of_what_decays():
    model = ToyModel()
    before = copy.deepcopy([*model.parameters()])
    config = TrainConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0, l1=0.25, l2=0.5)
    optimizers = Optimizers(model, config)
    draw_gradients(model.parameters(), 0)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizers.step(0.5, divisor=torch.tensor(4.0), skip=TAKE)
    for was, gradient, now in zip(before, gradients, model.parameters(), strict=True):
        truth, plain = was.detach().double(), was.detach()
        slope = lambda p: 0.25 * p.sign() + 0.5 * p if p.dim() == 2 else 0.0  # noqa: E731
        assert_accurate(now, *(p - 0.5 * (gradient.to(p.dtype) / 4 + slope(p)) for p in (plain, truth)))


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


@pytest.mark.parametrize("with_masters", [False, True])
@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize("name", [*NAMES, "unfused adagrad"])
def test_step_that_is_skipped_changes_nothing(name, skipped, with_masters, monkeypatch):
    if name == "unfused adagrad":
        name = "adagrad"
        monkeypatch.setattr("fastlm.train.adagrad._is_fused_on", lambda device: False)
    model, straight = ToyModel(), ToyModel()
    config = TrainConfig(optimizer=name, l1=0.1, l2=0.1)
    ours, other = (Optimizers(each, config, with_masters=with_masters) for each in (model, straight))
    for step in range(3):
        if step == skipped:
            for leaf in ours.leaves.names:
                leaf.grad = torch.full_like(leaf, float("nan"))
            ours.step(0.1, divisor=torch.tensor(float("nan")), skip=SKIP)
        for optimizers in ours, other:
            draw_gradients(optimizers.leaves.names, step)
            optimizers.step(0.1, divisor=ONE, skip=TAKE)
    assert all(map(torch.equal, model.parameters(), straight.parameters()))
    state, expected = ours.state_tensors(), other.state_tensors()
    assert state.keys() == expected.keys()
    assert [key for key in state if not torch.equal(state[key], expected[key])] == []


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


def test_load_state_tensors_refuses_the_state_of_another_optimizer():
    model = filled(ToyModel())
    optimizers = Optimizers(model, TrainConfig())
    optimizers.step(0.1, divisor=ONE, skip=TAKE)
    with pytest.raises(ValueError, match=r"exp_avg is torch.float32 \(29, 16\), expected no such entry of sgd"):
        Optimizers(model, TrainConfig(optimizer="sgd")).load_state_tensors(optimizers.state_tensors())


@pytest.mark.parametrize("with_masters", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_nbytes_is_what_the_state_takes(name, with_masters):
    optimizers = Optimizers(ToyModel(), TrainConfig(optimizer=name), with_masters=with_masters)
    draw_gradients(optimizers.leaves.names, 0)
    optimizers.step(0.1, divisor=ONE, skip=TAKE)
    state = optimizers.state_tensors()
    assert optimizers.nbytes == sum(value.nbytes for key, value in state.items() if not key.endswith("/step"))


def test_load_state_tensors_refuses_the_state_of_another_model():
    model = ToyModel()
    with pytest.raises(ValueError, match="the optimizer state is of elsewhere, no trainable parameter"):
        Optimizers(model, TrainConfig()).load_state_tensors({"elsewhere/step": torch.tensor(1.0)})


@pytest.mark.parametrize("with_masters", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "unfused adagrad"])
def test_step_never_waits_for_the_device(name, with_masters, monkeypatch):
    if name == "unfused adagrad":
        name = "adagrad"
        monkeypatch.setattr("fastlm.train.adagrad._is_fused_on", lambda device: False)
    with FakeTensorMode():  # whose tensors have no values: to read one is an error
        model = ToyModel()
        config = TrainConfig(optimizer=name, l1=0.1, l2=0.1)
        optimizers = Optimizers(model, config, with_masters=with_masters)
        ema = Ema(model, optimizers.leaves, decay=0.5)
        draw_gradients(optimizers.leaves.names, 0)
        skip = torch.zeros(()) > 1
        optimizers.step(0.1, divisor=torch.ones(()), skip=skip)
        ema.update(skip)
        with pytest.raises(DataDependentOutputException):
            bool(skip)

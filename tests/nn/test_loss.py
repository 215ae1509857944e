"""The losses stand in for PyTorch's in every form of their constructors."""

import copy
import inspect

import pytest
import torch

from fastlm.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from tests.support.accuracy import assert_accurate

ARGUMENTS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none", "ignore_index": 2},
    {"weight": torch.tensor([1.0, 2.0, 0.5, 0.0, 1.5]), "label_smoothing": 0.1},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_cross_entropy_loss_equals_torchs_for_the_same_arguments(arguments):
    logits, target = torch.randn(7, 5), torch.randint(5, (7,))
    ours, theirs = CrossEntropyLoss(**arguments), torch.nn.CrossEntropyLoss(**arguments)
    truth = torch.nn.CrossEntropyLoss(**arguments).double()
    assert_accurate(ours(logits, target), theirs(logits, target), truth(logits.double(), target))


def test_cross_entropy_loss_takes_torchs_arguments_in_torchs_order():
    weight = torch.rand(5)
    with pytest.warns(UserWarning, match="deprecated"):
        loss = CrossEntropyLoss(weight, False, 3, True, "mean", 0.2)
    assert loss.weight is weight
    assert (loss.ignore_index, loss.reduction, loss.label_smoothing) == (3, "sum", 0.2)


def test_cross_entropy_loss_passes_every_extra_to_the_op():
    logits, target = torch.randn(7, 9), torch.randint(5, (7,))
    extras = {"z_loss": 0.1, "softcap": 2.0, "num_classes": 5}
    assert torch.equal(CrossEntropyLoss(**extras)(logits, target), cross_entropy(logits, target, **extras))
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    of_op = [p.name for p in inspect.signature(cross_entropy).parameters.values() if p.kind == keyword_only]
    of_module = [p.name for p in inspect.signature(CrossEntropyLoss).parameters.values() if p.kind == keyword_only]
    assert of_module == of_op


def test_cross_entropy_loss_overwrites_the_logits_when_told_to():
    leaf, target = torch.randn(7, 9, requires_grad=True), torch.randint(9, (7,))
    logits = leaf * 1
    CrossEntropyLoss(inplace=True)(logits, target).backward()
    assert torch.equal(logits.detach(), leaf.grad)


def test_cross_entropy_loss_state_loads_either_way():
    weight = torch.rand(5)
    ours, theirs = CrossEntropyLoss(weight, z_loss=0.1), torch.nn.CrossEntropyLoss(torch.rand(5))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.weight, weight)


def test_cross_entropy_loss_names_the_extras_that_are_set():
    assert repr(CrossEntropyLoss(num_classes=5)) == "CrossEntropyLoss(num_classes=5)"


HEADS = [
    {},
    {"bias": True, "reduction": "sum", "dtype": torch.float64},
    {"weight": torch.linspace(0.2, 0.9, 9), "label_smoothing": 0.1, "ignore_index": 3, "reduction": "none"},
    {"out_features": (2,), "bias": True},
]
NEEDS_TORCHS = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="this PyTorch has no LinearCrossEntropyLoss"
)


@NEEDS_TORCHS
@pytest.mark.parametrize("arguments", HEADS, ids=str)
def test_linear_cross_entropy_loss_equals_torchs_for_the_same_arguments_and_state(arguments):
    ours, theirs = LinearCrossEntropyLoss(4, 9, **arguments), torch.nn.LinearCrossEntropyLoss(4, 9, **arguments)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    truth = copy.deepcopy(theirs).double()
    x = torch.randn(7, 4, dtype=ours.linear.weight.dtype)
    target = torch.randint(9, (7, *arguments.get("out_features", ())))
    assert_accurate(ours(x, target), theirs(x, target), truth(x.double(), target))


def test_linear_cross_entropy_loss_passes_every_extra_to_the_op():
    extras = {"z_loss": 0.1, "logit_scale": 0.5, "softcap": 2.0, "shift": True, "memory_budget": 100}
    loss, x, target = LinearCrossEntropyLoss(4, 9, **extras), torch.randn(2, 7, 4), torch.randint(9, (2, 7))
    assert torch.equal(loss(x, target), linear_cross_entropy(x, loss.linear.weight, target, **extras))
    assert "z_loss=0.1, logit_scale=0.5, softcap=2.0, shift=True, memory_budget=100" in repr(loss)


def test_linear_cross_entropy_loss_may_share_its_weight_with_an_embedding():
    embedding, loss = torch.nn.Embedding(9, 4), LinearCrossEntropyLoss(4, 9)
    loss.linear.weight = embedding.weight
    tokens = torch.randint(9, (2, 5))
    loss(embedding(tokens[:, :-1]), tokens[:, 1:]).backward()
    plain = embedding.weight.detach().double().requires_grad_()
    logits = torch.nn.functional.embedding(tokens[:, :-1], plain) @ plain.T
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    single = embedding.weight.detach().clone().requires_grad_()
    logits = torch.nn.functional.embedding(tokens[:, :-1], single) @ single.T
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert_accurate(embedding.weight.grad, single.grad, plain.grad)


def test_linear_cross_entropy_loss_rejects_weights_of_other_classes():
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(9,\)"):
        LinearCrossEntropyLoss(4, 9, weight=torch.rand(3))

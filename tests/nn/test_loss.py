"""CrossEntropyLoss stands in for PyTorch's in every form of its constructor."""

import inspect

import pytest
import torch

from fastlm.nn.loss import CrossEntropyLoss
from fastlm.ops.cross_entropy import cross_entropy
from tests.accuracy import assert_accurate

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

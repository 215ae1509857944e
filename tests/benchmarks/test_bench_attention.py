"""The benchmark of attention: its truth is PyTorch in float64, its providers pass it, its FLOPs add up."""

import dataclasses

import pytest
import torch

from benchmarks import bench_attention, harness
from benchmarks.bench_attention import Shape, documents
from benchmarks.harness import Budget, Case
from tests.support.accuracy import assert_accurate

CPU = torch.device("cpu")
SHAPES = [
    Shape(32, 3, 8, True, B=2),
    Shape(32, 3, 8, False, B=2),
    Shape(64, 3, 8, True, lengths=(20, 1, 12, 31)),
    Shape(32, 3, 8, True, B=2, window=5),
]
CASES = [bench_attention._case(shape, backward, CPU, torch.float32) for shape in SHAPES for backward in (False, True)]
each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@each_case
def test_truth_of_attention_is_the_reference_in_float64(case: Case) -> None:
    given = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in case.inputs().items()
    }
    (reference,) = (provider for provider in case.providers if provider.name == case.reference)
    expected = case.sample(reference.build()(given))
    truth = case.truth({name: x.detach() for name, x in given.items()})
    assert truth.keys() == expected.keys()
    for name, x in truth.items():
        assert_accurate(x.float(), expected[name].float(), expected[name].detach(), name)


@each_case
def test_providers_of_attention_are_right(case: Case) -> None:
    uncompiled = [provider for provider in case.providers if provider.name != "FlexAttention"]
    proven, left_out = harness.prove(dataclasses.replace(case, providers=uncompiled), Budget(60))
    assert (proven.wrong, left_out) == ([], [])
    assert {"fastlm", case.reference} <= proven.runs.keys()
    assert all(reason.startswith("not timed: ") for reason in proven.rejected.values()), proven.rejected


def test_truth_of_attention_covers_the_heads_that_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "CHECKED_SCORES", 2 * 32**2)
    case = bench_attention._case(SHAPES[0], True, CPU, torch.float32)
    truth = case.truth({name: x.detach() for name, x in case.inputs().items()})
    assert {tuple(x.shape) for x in truth.values()} == {(1, 32, 2, 8)}
    assert harness.prove(dataclasses.replace(case, providers=case.providers[:3]), Budget(60))[0].wrong == []


def test_flops_of_attention_are_those_of_its_products() -> None:
    causal, full, packed, _ = SHAPES
    assert full.flops == 2 * 3 * (2 * 32 * 32 * 8 + 2 * 32 * 32 * 8)
    assert causal.flops == full.flops / 2
    assert packed.flops == sum(Shape(length, 3, 8, True).flops for length in packed.lengths)
    seen = torch.ones(32, 32).tril().triu(-5).sum().item()
    assert Shape(32, 3, 8, True, window=5).flops == 4 * 3 * 8 * (seen - 6 / 2)  # half the diagonal of the corner
    assert Shape(32, 3, 8, True, window=31).flops == Shape(32, 3, 8, True).flops
    assert [case.work[0].amount for case in CASES[:2]] == [causal.flops, 3.5 * causal.flops]


def test_documents_fill_the_row_and_vary_round_their_mean() -> None:
    lengths = documents(16384, 500)
    assert sum(lengths) == 16384
    assert all(250 <= length <= 750 for length in lengths[:-1])
    assert len(set(lengths)) > 20


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_tell_cases_and_providers_of_attention_apart(device: str) -> None:
    cases = bench_attention.cases(torch.device(device))
    for names in [[case.name for case in cases], *([p.name for p in case.providers] for case in cases)]:
        assert len(set(names)) == len(names), names
    assert all(case.reference in {p.name for p in case.providers} for case in cases)

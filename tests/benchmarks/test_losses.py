"""The benchmarks of the losses: their truth is PyTorch in float64, and whoever runs without compilation passes it."""

import dataclasses

import pytest
import torch

from benchmarks import bench_cross_entropy, bench_linear_cross_entropy, bench_linear_logprobs, harness
from benchmarks.harness import Budget, Case

CPU = torch.device("cpu")
N, C, V = 300, 16, 2050  # more than one chunk of rows, and more classes than are checked

CASES = [
    bench_cross_entropy._case(CPU, N, V, torch.float32),
    bench_cross_entropy._case(CPU, N, V, torch.bfloat16),
    bench_cross_entropy._case(CPU, N, V, torch.float32, **bench_cross_entropy.TRAINING),
    bench_linear_cross_entropy._case(CPU, N, C, V, torch.float32),
    *(bench_linear_logprobs._case(CPU, N, C, V, torch.float32, entropy) for entropy in (False, True)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@each_case
def test_truth_is_pytorch_in_float64(case: Case) -> None:
    given = {
        name: tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in case.inputs().items()
    }
    (torch_eager,) = (provider for provider in case.providers if provider.name == case.reference)
    outputs = torch_eager.build()(given)
    expected = case.sample(outputs)
    if "loss" in outputs:
        expected["loss"] = outputs["loss"]  # sample gives it in the dtype of the case
    truth = case.truth({name: tensor.detach() for name, tensor in given.items()})
    assert truth.keys() == expected.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-12, atol=1e-15)


@each_case
def test_providers_of_the_losses_are_right(case: Case) -> None:
    uncompiled = [provider for provider in case.providers if "compile" not in provider.name]
    proven, left_out = harness.prove(dataclasses.replace(case, providers=uncompiled), Budget(60))
    assert (proven.wrong, left_out) == ([], [])
    assert {provider.name for provider in uncompiled if provider.role != "peer"} <= proven.runs.keys()
    assert all(reason.startswith("not timed: ") for reason in proven.rejected.values()), proven.rejected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("module", [bench_cross_entropy, bench_linear_cross_entropy, bench_linear_logprobs])
def test_names_tell_cases_and_providers_apart(module, device: str) -> None:
    cases = module.cases(torch.device(device))
    for names in [[case.name for case in cases], *([p.name for p in case.providers] for case in cases)]:
        assert len(set(names)) == len(names), names

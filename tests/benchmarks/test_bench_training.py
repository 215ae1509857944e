"""Whole steps are right from equal weights: of everyone in both styles, and of packed and padded documents."""

import dataclasses

import pytest
import torch

from benchmarks import bench_packed_documents, harness
from benchmarks.bench_training import Shape, _case

CPU = torch.device("cpu")


def proven_without_compilation(case: harness.Case) -> harness.Proven:
    providers = [provider for provider in case.providers if "compiled" not in provider.name]
    proven, left_out = harness.prove(dataclasses.replace(case, providers=providers), harness.Budget(60))
    assert (proven.rejected, left_out) == ({}, [])
    return proven


@pytest.mark.parametrize("llama", [False, True], ids=["GPT", "Llama"])
def test_step_of_everyone_is_right(llama: bool) -> None:
    pytest.importorskip("transformers")
    proven = proven_without_compilation(_case(CPU, Shape(2, 2, 32, 65, 2, 16, llama), torch.float32))
    assert f"transformers {'Llama' if llama else 'GPT-2'}" in proven.runs


def test_packed_and_padded_documents_have_one_loss_and_one_gradient() -> None:
    shape = Shape(2, 2, 32, 65, 4, 64)
    case = bench_packed_documents._case(CPU, shape, torch.float32)
    assert len(proven_without_compilation(case).runs) == 4
    given = case.inputs()
    num_useful = case.work[0].amount
    for kind in ("packed", "padded"):
        assert (given[f"{kind} targets"] != -100).sum() == num_useful
    assert given["packed tokens"].shape[1] == shape.T
    assert num_useful < given["packed tokens"].numel() < given["padded tokens"].numel()

"""Whole steps of ours, of plain PyTorch and of transformers are right from equal weights, in both styles."""

import dataclasses

import pytest
import torch

from benchmarks import harness
from benchmarks.bench_training import Shape, _case

CPU = torch.device("cpu")


@pytest.mark.parametrize("llama", [False, True], ids=["GPT", "Llama"])
def test_step_of_everyone_is_right(llama: bool) -> None:
    pytest.importorskip("transformers")
    case = _case(CPU, Shape(2, 2, 32, 65, 2, 16, llama), torch.float32)
    providers = [provider for provider in case.providers if "compiled" not in provider.name]
    proven, left_out = harness.prove(dataclasses.replace(case, providers=providers), harness.Budget(60))
    assert (proven.rejected, left_out) == ({}, [])
    assert f"transformers {'Llama' if llama else 'GPT-2'}" in proven.runs

import gzip
import json

import pytest
import torch

from fastlm.train import profiling
from tests.support.toy import ToyModel, toy_trainer

pytestmark = pytest.mark.usefixtures("undrawn")


def num_updates(run):
    with gzip.open(run / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events)


def test_profile_holds_the_steps_asked_for_and_changes_none(tmp_path):
    lines, plain, profiled = [], ToyModel(), ToyModel()
    toy_trainer(tmp_path / "plain", model=plain, steps=8).fit()
    toy_trainer(tmp_path / "profiled", model=profiled, steps=8, profile_steps=2, on_log=lines.append).fit()
    assert num_updates(tmp_path / "profiled") == 2
    trace = tmp_path / "profiled" / "trace.json.gz"
    assert f"{trace} holds a profile up to step 5: open it in https://ui.perfetto.dev" in lines
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), profiled.parameters(), strict=True))
    assert not (tmp_path / "plain" / "trace.json.gz").exists()


def test_profile_of_a_run_that_ends_before_is_written(tmp_path):
    toy_trainer(tmp_path, steps=4, profile_steps=100).fit()
    assert num_updates(tmp_path) == 1


def test_profiler_that_fails_is_told_and_ends_no_training(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, **options):
            raise RuntimeError("CUPTI is not\nto be had")

    monkeypatch.setattr(profiling, "profile", Broken)
    lines = []
    assert toy_trainer(tmp_path, steps=6, profile_steps=2, on_log=lines.append).fit().step == 6
    assert [line for line in lines if "profile" in line] == [
        "no profile: CUPTI is not to be had; training goes on without it"
    ]


@pytest.mark.gpu
def test_profile_of_a_cuda_device_holds_kernels_and_memory(tmp_path):
    toy_trainer(tmp_path, steps=8, profile_steps=2, device="cuda").fit()
    with gzip.open(tmp_path / "trace.json.gz") as file:
        assert any(event.get("cat") == "kernel" for event in json.load(file)["traceEvents"])
    assert (tmp_path / "memory.pickle").stat().st_size > 0

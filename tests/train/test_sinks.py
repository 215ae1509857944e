"""Trackers: TensorBoard's files are read by its own reader; the others are stood in for by modules that note calls."""

import os
import random
import signal
import sys
import types

import pytest
import torch

from fastlm.train import sinks
from fastlm.train.metrics import read_metrics
from fastlm.train.sinks import OPENED_BY, TrackedRun, open_sinks, scalars
from tests.support.toy import ToyModel, toy_batch, toy_trainer

pytestmark = pytest.mark.usefixtures("undrawn")

HELD_OUT = [toy_batch(1000, 4)]


def test_scalars_of_a_record_are_grouped_and_finite():
    record = {
        "step": 3,
        "loss": 2.0,
        "mfu": None,
        "eval_loss": 1.5,
        "eval_perplexity": float("inf"),
        "skipped_steps": 0,
    }
    record["layers"] = {"blocks.0": {"grad_norm": 0.5, "update_ratio": float("nan")}}
    assert scalars(record) == {
        "train/loss": 2.0,
        "eval/loss": 1.5,
        "train/skipped_steps": 0.0,
        "layers/blocks.0/grad_norm": 0.5,
    }


def test_config_refuses_an_unknown_tracker(tmp_path):
    with pytest.raises(ValueError, match=r"log_to is 'tensorbord', expected one of .* \(did you mean tensorboard\?\)"):
        toy_trainer(tmp_path, log_to=("tensorbord",))


def test_tensorboard_of_a_resumed_run_holds_every_step_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines, changes = [], {"log_to": ["tensorboard"], "checkpoint_interval": 2, "eval_interval": 3}

    def kill(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path, on_step=kill, eval_loader=HELD_OUT, **changes).fit()
    toy_trainer(tmp_path, steps=5, eval_loader=HELD_OUT, on_log=lines.append, **changes).fit()
    assert any("step-00000002" in line for line in lines)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {(event.step, event.value) for event in events.Scalars("train/loss")}
    recorded = read_metrics(tmp_path / "metrics.jsonl")
    assert found == {(r["step"], torch.tensor(r["loss"]).item()) for r in recorded if "loss" in r}
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("eval/loss")] == [3, 5]
    assert f"tensorboard: tensorboard --logdir {tmp_path}/tensorboard" in lines


class Tracker(types.ModuleType):
    """What fastlm uses of wandb and trackio, noting each call; broken names what fails."""

    def __init__(self, name, broken=""):
        super().__init__(name)
        self.calls, self.broken, self.url, self.dir = [], broken, "https://wandb.example/run", "/somewhere/files"
        self.settings = types.SimpleNamespace(
            mode="online", api_key=None, base_url="http://127.0.0.1:9", project=None, silent=False, console="auto"
        )
        self.Settings = dict

    def setup(self):
        return self

    def init(self, **options):
        random.random(), torch.rand(1)
        return self._note("init", options)

    def log(self, values, step):
        return self._note("log", step, values)

    def finish(self):
        return self._note("finish")

    def _note(self, name, *arguments):
        if name == self.broken:
            raise RuntimeError(f"{name} is\nbroken")
        self.calls.append((name, *arguments))
        return self


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    module = Tracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.setattr("netrc.netrc", lambda: types.SimpleNamespace(authenticators=lambda host: None))
    return module


def test_tracker_gets_every_record_and_a_resumed_run_keeps_its_name(tmp_path, tracker):
    changes = {"log_to": [tracker.__name__], "eval_loader": HELD_OUT, "eval_interval": 2}
    for steps in 3, 4:
        toy_trainer(tmp_path / "run", steps=steps, **changes).fit()
    starts = [arguments for name, *arguments in tracker.calls if name == "init"]
    assert [options["project"] for [options] in starts] == ["fastlm", "fastlm"]
    names = [options.get("id") or options["name"] for [options] in starts]
    assert names[0] == names[1]
    assert (tmp_path / "run" / "tracking-id.txt").read_text().strip() in names[0]
    assert starts[0][0]["config"]["config"]["steps"] == 3
    logged = [(step, *values) for name, step, values in (c for c in tracker.calls if c[0] == "log")]
    losses = [step for step, *tags in logged if "train/loss" in tags]
    assert losses == [1, 2, 3, 4]
    assert [step for step, *tags in logged if "eval/loss" in tags] == [2, 3, 4]
    assert tracker.calls[-1] == ("finish",)


def test_new_run_in_a_used_directory_gets_a_new_name(tmp_path):
    names = {TrackedRun(tmp_path, {}, first_step).identity for first_step in (0, 0)}
    assert len(names) == 2
    (tmp_path / "tracking-id.txt").write_text("../../etc/passwd\n")
    assert "/" not in TrackedRun(tmp_path, {}, first_step=5).identity


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_tracker_that_fails_is_told_once_and_changes_no_training(tmp_path, tracker, broken):
    plain, tracked, lines = ToyModel(dropout=0.2), ToyModel(dropout=0.2), []
    tracker.broken = broken
    toy_trainer(tmp_path / "plain", model=plain, steps=3).fit()
    toy_trainer(tmp_path / "run", model=tracked, steps=3, log_to=[tracker.__name__], on_log=lines.append).fit()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), tracked.parameters(), strict=True))
    told = [line for line in lines if "broken" in line]
    name = tracker.__name__
    assert (
        told
        == {
            "init": [f"{name} is left out: init is broken"],
            "log": [f"{name} ends here: log is broken; training goes on without it"],
            "finish": [f"the end of {name} may be missing: finish is broken"],
        }[broken]
    )


@pytest.mark.parametrize("name", sorted(OPENED_BY))
def test_tracker_that_is_not_installed_is_told_before_the_first_step(tmp_path, monkeypatch, name):
    for module in "torch.utils.tensorboard", "wandb", "trackio":
        monkeypatch.setitem(sys.modules, module, None)
    lines = []
    toy_trainer(tmp_path, steps=1, log_to=[name], on_log=lines.append).fit()
    told = [line.endswith(f"; pip install {name}") for line in lines]
    assert told.index(True) < next(index for index, line in enumerate(lines) if line.startswith("step 1/1"))


@pytest.mark.parametrize(
    ("mode", "key", "answers", "expected"),
    [
        ("online", "secret", True, "online"),
        ("online", "secret", False, "offline"),
        ("online", None, True, "offline"),
        ("offline", "secret", True, "offline"),
        ("disabled", "secret", True, "disabled"),
    ],
)
def test_wandb_is_offline_without_a_key_or_a_network_or_where_it_was_asked_to_be(
    tmp_path, monkeypatch, mode, key, answers, expected
):
    module, lines = Tracker("wandb"), []
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("netrc.netrc", lambda: types.SimpleNamespace(authenticators=lambda host: None))
    monkeypatch.setattr(sinks, "_answers", lambda url: answers)
    module.settings.mode, module.settings.api_key = mode, key
    open_sinks(["wandb"], TrackedRun(tmp_path, {}, 0), lines.append)
    [(_, options)] = module.calls
    assert options["mode"] == expected
    assert options["settings"] == {"silent": True, "console": "off"}
    assert lines == [
        "wandb: https://wandb.example/run"
        if expected == "online"
        else "wandb: offline; to upload it later: wandb sync /somewhere"
    ]


def test_server_that_refuses_does_not_answer(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    assert not sinks._answers("http://127.0.0.1:9")
    assert not sinks._answers("http://[bad")


def test_interrupted_run_closes_its_trackers(tmp_path, tracker, obeyed_signals):
    def stop(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    toy_trainer(tmp_path, log_to=[tracker.__name__], on_step=stop).fit()
    assert tracker.calls[-1] == ("finish",)

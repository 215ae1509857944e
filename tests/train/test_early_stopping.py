import math

import pytest

from fastlm.train import TrainConfig
from fastlm.train.checkpoint import best
from fastlm.train.early_stopping import EarlyStopping
from tests.support.toy import ToyModel, toy_trainer
from tests.train.test_trainer import HELD_OUT


def due_after(losses, patience=2, min_delta=0.0):
    """The number of evaluations after which it is due, or None."""
    stopping = EarlyStopping(TrainConfig(early_stopping_patience=patience, early_stopping_min_delta=min_delta))
    for index, loss in enumerate(losses):
        stopping.observe(index, loss)
        if stopping.is_due:
            return index + 1
    return None


@pytest.mark.parametrize(
    ("losses", "more", "expected"),
    [
        ([3.0, 2.0, 1.0, 0.5], {}, None),
        ([3.0, 2.0, 2.0, 2.0, 1.0], {}, 4),
        ([3.0, 2.0, 2.5, 1.0, 1.5, 1.0], {}, 6),
        ([3.0, 2.9, 2.8, 2.7], {"min_delta": 0.25}, 3),
        ([3.0, 2.9, 2.7, 2.6, 2.5], {"min_delta": 0.25}, 5),
        ([3.0, math.nan, math.inf], {}, 3),
        ([math.nan, 3.0, math.nan], {}, None),
        ([1.0] * 9, {"patience": 0}, None),
    ],
)
def test_early_stopping_counts_evaluations_without_a_better_loss(losses, more, expected):
    assert due_after(losses, **more) == expected


def run(out, lines, model=None, **changes):
    """A run that cannot learn after its first steps: the best held-out loss is at step 4."""
    model = model or ToyModel()

    def spoil(step):
        if step == 4:
            model.requires_grad_(False).hidden.bias += 1.0
            model.requires_grad_(True)

    changes = {"steps": 20, "eval_interval": 2, "checkpoint_interval": 4, "early_stopping_patience": 3} | changes
    return toy_trainer(out, model=model, eval_loader=HELD_OUT, on_log=lines.append, on_step=spoil, **changes).fit()


def test_run_stops_early_with_a_checkpoint_and_tells_the_best_step(tmp_path):
    lines = []
    result = run(tmp_path, lines, learning_rate=1e-5)
    assert (result.stopped_by, result.step, result.checkpoint.name) == ("early stopping", 10, "step-00000010")
    assert result.checkpoint.is_dir()
    assert lines[-1].startswith(
        "stopped early after step 10: for 3 evaluations the held-out loss has not fallen more than 0 below the best, "
    )
    assert lines[-1].endswith(" at step 4")
    assert best(tmp_path).name == "step-00000004"


def test_early_stopping_is_resumed(tmp_path):
    lines = []
    stopped = run(tmp_path, lines, learning_rate=1e-5, steps=8)
    assert (stopped.stopped_by, stopped.step) == (None, 8)
    resumed = run(tmp_path, lines, learning_rate=1e-5)
    assert (resumed.stopped_by, resumed.step) == ("early stopping", 10)
    again = run(tmp_path, lines, learning_rate=1e-5)
    assert (again.stopped_by, again.step, again.checkpoint.name) == ("early stopping", 10, "step-00000010")
    assert run(tmp_path, lines, learning_rate=1e-5, steps=12, early_stopping_patience=9).step == 12


def test_early_stopping_wants_held_out_data(tmp_path):
    with pytest.raises(ValueError, match="early_stopping_patience needs a held-out loss: give an eval_loader"):
        toy_trainer(tmp_path, early_stopping_patience=1)


def test_early_stopping_state_of_another_kind_is_named():
    stopping = EarlyStopping(TrainConfig())
    for wrong in {"best_step": "four"}, {"waited": None}, {"best_loss": "low"}:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
            stopping.load_state_dict(stopping.state_dict() | wrong)

import pytest
import torch

from fastlm.train import outliers
from fastlm.train.outliers import WINDOW, OutlierDetector
from tests.support.toy import ToyModel, toy_batch, toy_trainer
from tests.train.test_trainer import assert_same_run
from tests.train.test_update import updater


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def filled(threshold, mean=2.0, deviation=0.5):
    """A detector that has seen losses and norms of a mean and standard deviation, alternating round the mean."""
    detector = OutlierDetector(threshold, torch.device("cpu"))
    half = deviation * ((WINDOW - 1) / WINDOW) ** 0.5
    for index in range(WINDOW):
        value = scalar(mean + (half if index % 2 else -half))
        detector.add(value, 10 * value, torch.tensor(False))
    return detector


@pytest.mark.parametrize(
    ("loss", "grad_norm", "expected"),
    [(3.4, 20.0, False), (3.6, 20.0, True), (2.0, 34.0, False), (2.0, 36.0, True), (-9.0, -90.0, False)],
)
def test_outlier_is_what_stands_threshold_deviations_above_the_mean(loss, grad_norm, expected):
    assert bool(filled(3.0).is_outlier(scalar(loss), scalar(grad_norm))) is expected


def test_nothing_is_an_outlier_before_the_window_is_full():
    detector = OutlierDetector(3.0, torch.device("cpu"))
    for index in range(WINDOW):
        assert not detector.is_outlier(scalar(1e9), scalar(1e9))
        detector.add(scalar(1.0 + index % 2), scalar(1.0), torch.tensor(False))
    assert detector.is_outlier(scalar(1e9), scalar(1.0))


def test_skipped_steps_are_not_remembered():
    detector = filled(3.0)
    before = detector.state_dict()
    detector.add(scalar(float("nan")), scalar(float("inf")), torch.tensor(True))
    assert detector.state_dict() == before


def test_history_goes_on_from_a_saved_state():
    one = filled(3.0)
    other = OutlierDetector(3.0, torch.device("cpu"))
    other.load_state_dict(one.state_dict())
    for detector in one, other:
        detector.add(scalar(3.3), scalar(21.0), torch.tensor(False))
    assert other.state_dict() == one.state_dict()


@pytest.mark.parametrize("change", [{"loss": [1.0]}, {"num_accepted": "many"}, {"grad_norm": None}])
def test_history_of_another_kind_is_refused(change):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        filled(3.0).load_state_dict(filled(3.0).state_dict() | change)


def test_update_skips_an_outlier_and_counts_it():
    model = ToyModel()
    ours = updater(model, skip_outliers=5.0)
    for index in range(WINDOW):
        ours.update([toy_batch(index, 4)], 0.0)
    assert ours.totals.skipped_steps == 0
    before = model.hidden.weight.detach().clone()
    with torch.no_grad():
        model.hidden.weight.mul_(50)  # as a broken batch would, this raises loss and gradient
    ours.update([toy_batch(0, 4)], 1e-2)
    assert ours.totals.skipped_steps == 1
    assert torch.equal(model.hidden.weight, before * 50)


def test_run_that_looks_for_outliers_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(outliers, "WINDOW", 8)

    def train(out, steps):
        rate = {"schedule": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-4}
        return toy_trainer(out, steps=steps, skip_outliers=1.0, **rate).fit()

    straight = train(tmp_path / "straight", 30)
    before = train(tmp_path / "resumed", 17)
    resumed = train(tmp_path / "resumed", 30)
    assert straight.skipped_steps == resumed.skipped_steps > before.skipped_steps
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")

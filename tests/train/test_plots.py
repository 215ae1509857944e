import sys

from fastlm.train.metrics import MetricsLog
from fastlm.train.plots import plot_losses


def metrics(path, records):
    log = MetricsLog(path, 0)
    for record in records:
        log.write(record)
    log.close()
    return path


def test_draw_losses_draws_a_picture_that_depends_on_the_losses(tmp_path):
    pictures = []
    for index, loss in enumerate([2.0, 3.0]):
        path = metrics(
            tmp_path / f"{index}.jsonl",
            [{"step": 1, "loss": 4.0}, {"step": 2, "loss": loss}, {"step": 2, "eval_loss": loss}],
        )
        assert plot_losses(path, tmp_path / f"{index}.png")
        pictures.append((tmp_path / f"{index}.png").read_bytes())
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] != pictures[1]


def test_draw_losses_draws_an_empty_run(tmp_path):
    assert plot_losses(metrics(tmp_path / "metrics.jsonl", []), tmp_path / "losses.png")


def test_draw_losses_passes_over_values_that_are_no_numbers(tmp_path):
    path = metrics(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 4.0}, {"step": 2, "loss": "low"}])
    assert plot_losses(path, tmp_path / "losses.png")


def test_draw_losses_does_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot_losses(metrics(tmp_path / "metrics.jsonl", []), tmp_path / "losses.png")
    assert not (tmp_path / "losses.png").exists()

import json

import pytest

from fastlm.train.metrics import MetricsLog, read_metrics


def write(path, steps, last_step=0):
    log = MetricsLog(path, last_step)
    for step in steps:
        log.write({"step": step, "loss": step / 3})
    log.close()


def test_metrics_log_drops_the_lines_that_a_resumed_run_writes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4])
    write(path, [3, 4, 5], last_step=2)
    assert read_metrics(path) == [{"step": step, "loss": step / 3} for step in (1, 2, 3, 4, 5)]


def test_metrics_log_starts_anew_with_a_new_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    write(path, [1], last_step=0)
    assert [record["step"] for record in read_metrics(path)] == [1]


def test_metrics_log_survives_a_line_cut_short_by_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    path.write_text(path.read_text()[:-9])
    write(path, [3], last_step=5)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_metrics_log_keeps_every_record_round_lines_that_are_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    path.write_bytes(b"\xff\xfe\n[1]\n{}\n" + path.read_bytes())
    write(path, [3], last_step=2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": ' + "9" * 5000 + "}", '{"step": "1"}'])
def test_metrics_log_passes_over_lines_that_json_cannot_read(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    write(path, [1])
    assert [record["step"] for record in read_metrics(path)] == [1]


def test_metrics_log_names_the_file_that_a_full_disk_does_not(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.close()
    with (
        open("/dev/full", "ab", buffering=0) as log._file,
        pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"),
    ):
        log.write({"step": 1})


def test_metrics_log_writes_json_for_what_is_not_finite(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1, "loss": float("nan"), "layers": {"head": {"grad_norm": float("inf"), "weight_norm": 1.0}}})
    log.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    layers = {"head": {"grad_norm": None, "weight_norm": 1.0}}
    assert json.loads(line, parse_constant=lambda name: name) == {"step": 1, "loss": None, "layers": layers}

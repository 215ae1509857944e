"""The comparison of two checkouts: what is made of the samples, and a tree compared with itself."""

import io
import json

import pytest

from benchmarks import against
from benchmarks.machine import ROOT


class Fake:
    """A tree whose runs take so many seconds, one value per round."""

    def __init__(self, seconds):
        self.seconds = iter(seconds)

    def sample(self, case):
        return {"case": next(self.seconds), "copy": 0.5}


def test_compare_gives_the_ratio_of_medians_and_the_quartiles_of_the_rounds(monkeypatch):
    monkeypatch.setattr(against, "ROUNDS", 5)
    both = [Fake([0.002, 0.003, 0.002, 0.009, 0.002]), Fake([0.001, 0.001, 0.001, 0.001, 0.004])]
    line = against._compare("softmax: 8 x 64", both)
    assert " 2.00 /     1.00 ms = 2.00 (2.00 .. 3.00)   copies 1.00 (1.00 .. 1.00)" in line


def test_worker_times_each_case_that_it_is_asked_for(monkeypatch, capsys):
    case = "softmax: 8 x 64 float32, forward + backward, fastlm"
    monkeypatch.setattr("sys.stdin", io.StringIO(2 * (json.dumps(case) + "\n")))
    monkeypatch.setattr(against.machine, "copy_ceiling", lambda device: against.harness.Ceiling("copy", "byte", 1, int))
    against._answer(ROOT, ["softmax"])
    cases, *samples = map(json.loads, capsys.readouterr().out.splitlines())
    assert case in cases
    assert [0 < sample["case"] < 1 for sample in samples] == [True, True]


def test_folder_without_fastlm_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        against.main([str(tmp_path)])
    assert "holds no fastlm" in capsys.readouterr().err

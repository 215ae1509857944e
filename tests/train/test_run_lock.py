import os
import signal
import time

import pytest

from fastlm.train import checkpoint
from fastlm.train.run_lock import RunInUseError, locked
from tests.support.processes import start
from tests.support.toy import toy_trainer
from tests.train.test_checkpoint import train_for_ever


def test_second_run_in_a_directory_is_refused_and_the_first_goes_on(tmp_path):
    process = start(train_for_ever, tmp_path)
    try:
        while not checkpoint.paths(tmp_path):
            assert process.is_alive()
            time.sleep(0.002)
        with pytest.raises(RunInUseError, match="another process is training in"):
            toy_trainer(tmp_path)
        newest = checkpoint.paths(tmp_path)[-1]
        while checkpoint.paths(tmp_path)[-1] <= newest:
            assert process.is_alive()
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    toy_trainer(tmp_path, steps=1).fit()  # the lock died with its process


def test_locked_may_be_entered_again_by_its_process_and_leaves_nothing_locked(tmp_path):
    with locked(tmp_path), locked(tmp_path):
        pass
    process = start(enter, tmp_path)
    process.join()
    assert process.exitcode == 0


def enter(run):
    with locked(run):
        pass


def test_fit_holds_the_lock_and_an_error_lifts_it(tmp_path):
    def step(number):
        process = start(enter, tmp_path)
        process.join()
        assert process.exitcode != 0, "another process came in"
        raise KeyError("any error")

    with pytest.raises(KeyError):
        toy_trainer(tmp_path, on_step=step).fit()
    enter(tmp_path)

"""Long tests, run by `make soak`: what a short run would pass by luck."""

import os
import random
import signal
import time

import pytest

from fastlm.train import checkpoint
from tests.train.processes import start
from tests.train.toy import toy_trainer

KILLS = 1000
INTERVAL = 3  # steps between checkpoints


def train_for_ever(out, told):
    """Train, and keep the number of the last step done in a file."""
    file = os.open(told, os.O_WRONLY)
    toy_trainer(
        out,
        steps=10**7,
        schedule="constant",
        warmup_ratio=0.0,
        checkpoint_interval=INTERVAL,
        log_interval=10**6,
        on_step=lambda step: os.pwrite(file, b"%12d" % step, 0),
    ).fit()


@pytest.mark.soak
def test_no_kill_loses_a_checkpoint_or_more_than_the_steps_since_the_last(tmp_path):
    out, told, moments, kept = tmp_path / "run", tmp_path / "step", random.Random(11), 0
    for _ in range(KILLS):
        told.write_bytes(b"%12d" % 0)
        process = start(train_for_ever, out, told)
        while int(told.read_bytes()) <= kept:  # until it has gone on from where the last one was killed
            assert process.is_alive(), "the run did not resume"
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.2))  # up to some tens of steps and checkpoints
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        last_step, lines = int(told.read_bytes()), []
        saved = checkpoint.read_newest(out, on_log=lines.append)
        assert lines == [], "a checkpoint was left damaged"
        step = 0 if saved is None else saved.state["step"]
        assert step >= kept, "a finished checkpoint was lost"
        assert last_step - step < INTERVAL, f"killed after step {last_step}, but only {step} was saved"
        kept = step
    assert kept > 0, "no checkpoint was ever finished"

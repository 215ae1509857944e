"""Long tests, run by `make soak`: what a short run would pass by luck."""

import os
import random
import signal
import time

import pytest
import torch

from fastlm.train import checkpoint
from tests.support.processes import start, start_ranks
from tests.support.toy import DeepModel, ToyLoader, toy_trainer
from tests.train.test_trainer import everything, losses

KILLS = 1000  # over all cases
INTERVAL = 3  # steps between checkpoints
LOGGED = 5  # steps between log lines
CASES = [(precision, ranks) for precision in ("fp32", "bf16", "fp16") for ranks in ("one", "ddp", "fsdp")]


def train(out, told, precision, ranks, steps=10**7):
    """Train, and keep the number of the last step done in a file."""
    place = {"rank": int(os.environ.get("RANK", "0")), "world_size": 1 if ranks == "one" else 2}
    file = os.open(told, os.O_WRONLY)
    toy_trainer(
        out,
        model=DeepModel(dropout=0.2),
        loader=ToyLoader(**place),
        steps=steps,
        precision=precision,
        data_parallel="auto" if ranks == "one" else ranks,
        schedule="constant",
        warmup_ratio=0.0,
        checkpoint_interval=INTERVAL,
        log_interval=LOGGED,
        ema_decay=0.5,
        on_step=lambda step: os.pwrite(file, b"%12d" % step, 0),
    ).fit()


def started(ranks, errors, *arguments):
    return [start(train, *arguments)] if ranks == "one" else start_ranks(2, train, *arguments, errors=errors)


def regular(records):
    return [record for record in records if record["step"] % LOGGED == 0]


@pytest.mark.soak
@pytest.mark.parametrize(("precision", "ranks"), CASES)
def test_no_kill_loses_a_finished_checkpoint_or_changes_a_bit(tmp_path, precision, ranks, record_property):
    out, told, errors = tmp_path / "run", tmp_path / "step", tmp_path / "errors"
    moments, kept, kills = random.Random(f"{precision} {ranks}"), 0, -(-KILLS // len(CASES))
    longest = 0.2  # seconds from going on to the kill: up to some tens of steps and checkpoints
    for _ in range(kills):
        told.write_bytes(b"%12d" % 0)
        processes = started(ranks, errors, out, told, precision, ranks)
        while int(told.read_bytes()) <= kept:  # until it has gone on from where the last one was killed
            assert all(process.is_alive() for process in processes), "the run did not resume"
            time.sleep(0.001)
        time.sleep(moments.uniform(0, longest))
        for process in moments.sample(processes, len(processes)):
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        last_step, lines = int(told.read_bytes()), []
        saved = checkpoint.read_newest(out, on_log=lines.append)
        assert lines == [], "a checkpoint was left damaged"
        step = 0 if saved is None else saved.state["step"]
        assert step >= kept, "a finished checkpoint was lost"
        assert last_step - step < INTERVAL, f"killed after step {last_step}, but only {step} was saved"
        longest *= 0.9 if step > kept else 1.1  # on any machine some kills come before a checkpoint, and some after
        kept = step
    assert kept > 0, "no checkpoint was ever finished"
    record_property("kills", kills)

    straight = tmp_path / "straight"
    for process in started(ranks, errors, straight, told, precision, ranks, kept):
        process.join()
    (killed_tensors, killed_state), (tensors, state) = everything(out), everything(straight)
    assert [name for name in tensors if not torch.equal(tensors[name], killed_tensors[name])] == []
    assert killed_state == state
    assert regular(losses(out))[: kept // LOGGED] == regular(losses(straight))

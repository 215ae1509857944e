import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from fastlm.train import checkpoint
from fastlm.train.checkpoint import CheckpointError, DamagedCheckpointError, read, read_newest
from fastlm.train.distributed import Ranks
from tests.train.processes import start
from tests.train.toy import ToyModel, toy_trainer

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "rank-00000.json", "SHA256SUMS"]


def write(run, step, eval_loss=None, size=8):
    checkpoint.prepare(run)
    weight = torch.arange(size) + float(step)
    return checkpoint.write(
        run,
        step,
        model={"weight": weight, "tied": weight, "view": weight[::2]},
        optimizer={"weight/step": torch.tensor(float(step))},
        state={"metadata": {"vocab_size": 7, "model": {"bias": True}}, "eval_loss": eval_loss},
        rank_state={"loader": step},
        ranks=Ranks(),
    )


def steps_of(run):
    return [int(path.name.split("-")[1]) for path in checkpoint.paths(run)]


def test_read_returns_what_was_written(tmp_path):
    saved = read(write(tmp_path, 3, eval_loss=0.1))
    weight = torch.arange(8) + 3.0
    assert all(
        torch.equal(saved.model[name], value)
        for name, value in {"weight": weight, "tied": weight, "view": weight[::2]}.items()
    )
    assert saved.optimizer == {"weight/step": torch.tensor(3.0)}
    assert (saved.state["step"], saved.state["eval_loss"], saved.rank_state) == (3, 0.1, {"loader": 3})
    assert saved.metadata == {"vocab_size": 7, "model": {"bias": True}}


def test_tied_weights_are_stored_once(tmp_path):
    assert load_file(write(tmp_path, 1) / "model.safetensors").keys() == {"weight", "view"}


def test_checksums_are_those_of_sha256sum(tmp_path):
    path = write(tmp_path, 1)
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
    assert (done.returncode, sorted(done.stdout.split())) == (
        0,
        sorted([f"{name}:" for name in FILES[:-1]] + ["OK"] * 4),
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_the_file_named(tmp_path, name, damage):
    path = write(tmp_path, 1)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=str(path)) as caught:
        read(path)
    assert name in str(caught.value)


def test_read_newest_skips_the_damaged_and_says_so(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "state.json").write_text("{}")
    lines = []
    assert read_newest(tmp_path, on_line=lines.append).state["step"] == 1
    assert len(lines) == 1
    assert "step-00000002/state.json is damaged" in lines[0]


def seal(path):
    """Make the checksums those of the files, as one who tampers would."""
    sums = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES[:-1]]
    (path / "SHA256SUMS").write_text("".join(sums))


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b'{"step": "x", "metadata": {}, "aliases": {}}'])
def test_content_of_another_kind_is_damage_even_under_its_right_checksum(tmp_path, name, content):
    path = write(tmp_path, 1)
    if name == "rank-00000.json" and content.startswith(b"{"):
        content = b"{"  # any JSON object is the trainer's own affair
    (path / name).write_bytes(content)
    seal(path)
    with pytest.raises(DamagedCheckpointError, match=r"step-00000001.* that fastlm writes"):
        read(path)
    if name == "state.json":
        with pytest.raises(DamagedCheckpointError, match=r"state\.json is not one that fastlm writes"):
            checkpoint.check_metadata(tmp_path, {})
        assert checkpoint.best(tmp_path) is None


def test_read_best_takes_the_newest_where_the_best_is_damaged(tmp_path):
    assert checkpoint.read_best(tmp_path) is None
    write(tmp_path, 1, eval_loss=2.0)
    best = write(tmp_path, 2, eval_loss=1.0)
    write(tmp_path, 3, eval_loss=3.0)
    assert checkpoint.read_best(tmp_path).state["step"] == 2
    (best / "model.safetensors").write_bytes(b"rotten")
    assert checkpoint.read_best(tmp_path).state["step"] == 3


def test_read_best_outlives_the_deletion_of_what_it_reads(tmp_path, monkeypatch):
    best = write(tmp_path, 1, eval_loss=1.0)
    write(tmp_path, 2, eval_loss=2.0)
    verify = checkpoint.verify

    def verified_then_deleted(path):
        verify(path)
        if path == best:
            checkpoint._delete(best)

    monkeypatch.setattr(checkpoint, "verify", verified_then_deleted)
    assert checkpoint.read_best(tmp_path).state["step"] == 2


def test_names_that_no_checkpoint_has_are_passed_over(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-old").mkdir()
    assert steps_of(tmp_path) == [1]


def test_read_newest_refuses_to_start_afresh_over_damage(tmp_path):
    assert read_newest(tmp_path) is None
    (write(tmp_path, 1) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints of .* are damaged"):
        read_newest(tmp_path)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"vocab_size": 8, "model": {"bias": True}}, "vocab_size = 7, and this run has 8"),
        ({"vocab_size": 7, "model": {"bias": False}}, "model.bias = True, and this run has False"),
        ({"vocab_size": 7, "model": {"bias": True}, "hash": "a"}, "hash = None, and this run has 'a'"),
    ],
)
def test_check_metadata_names_both_values_of_a_mismatch(tmp_path, expected, message):
    write(tmp_path, 1)
    checkpoint.check_metadata(tmp_path, {"vocab_size": 7, "model": {"bias": True}})
    with pytest.raises(CheckpointError, match=message):
        checkpoint.check_metadata(tmp_path, expected)


def test_check_metadata_passes_over_the_damaged(tmp_path):
    checkpoint.check_metadata(tmp_path, {"vocab_size": 8})
    write(tmp_path, 1)
    state = write(tmp_path, 2) / "state.json"
    state.write_text(state.read_text().replace("7", "8"))
    with pytest.raises(CheckpointError, match="step-00000001 was trained with vocab_size = 7, and this run has 8"):
        checkpoint.check_metadata(tmp_path, {"vocab_size": 8, "model": {"bias": True}})


def test_metadata_is_compared_as_json_sees_it(tmp_path):
    assert not list(checkpoint.differences({"betas": [1, 2]}, {"betas": (1, 2)}))


def test_retain_keeps_the_newest_and_the_best(tmp_path):
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 4.0], start=1):
        write(tmp_path, step, eval_loss=loss)
    assert checkpoint.best(tmp_path) == checkpoint.path_of(tmp_path, 2)
    checkpoint.retain(tmp_path, 2)
    assert steps_of(tmp_path) == [2, 4, 5]


def test_write_replaces_a_damaged_checkpoint_of_the_same_step(tmp_path):
    (write(tmp_path, 1) / "state.json").write_text("{}")
    assert read(write(tmp_path, 1)).state["step"] == 1


def test_full_disk_is_told_and_leaves_the_earlier_checkpoint_intact(tmp_path):
    write(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limit[1]))  # no file may grow beyond: writing fails half-way
    try:
        with pytest.raises(
            OSError, match=r"cannot save the checkpoint .*step-00000002: .*earlier checkpoints are untouched"
        ):
            write(tmp_path, 2, size=2**14)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert read_newest(tmp_path).state["step"] == 1


def test_write_asks_for_space_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"0\.00 GB free and a checkpoint takes 0\.00 GB: free some space"):
        write(tmp_path, 1)
    assert not steps_of(tmp_path)


def test_prepare_refuses_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write to the run directory .*file/run: Not a directory; choose another"):
        checkpoint.prepare(tmp_path / "file" / "run")


def train_for_ever(out):
    toy_trainer(out, steps=10**6, schedule="constant", warmup=0.0, checkpoint_interval=1, keep_checkpoints=2).fit()


def test_kill_at_any_moment_loses_no_finished_checkpoint(tmp_path):
    out, moments, reached = tmp_path / "killed", random.Random(5), 0
    for _ in range(5):
        process = start(train_for_ever, out)
        while not any(step > reached for step in steps_of(out)):
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        newest = max(steps_of(out))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lines = []
        reached = read_newest(out, on_line=lines.append).state["step"]
        assert lines == []
        assert reached >= newest
    straight = ToyModel()
    toy_trainer(
        tmp_path / "straight", model=straight, steps=reached, schedule="constant", warmup=0.0, log_interval=10**6
    ).fit()
    weights = read_newest(out).model
    assert all(torch.equal(weights[name], value) for name, value in straight.state_dict().items())


def test_prepare_clears_what_a_killed_process_left(tmp_path):
    write(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".step-00000002"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half")
    checkpoint.prepare(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_state_is_plain_json(tmp_path):
    path = write(tmp_path, 1)
    assert json.loads((path / "state.json").read_text())["aliases"] == {"tied": "weight"}

"""The real torchrun with two ranks, run by `make soak`: how a job ends whose rank dies, is preempted or is mistaken."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_cli import TEXT, TINY

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("obeyed_signals")]


@pytest.fixture
def torchrun(tmp_path):
    """Starts fastlm train on two ranks: torchrun(flags of torchrun, flags of fastlm)."""
    (tmp_path / "text.txt").write_text(TEXT * 200)
    here = Path(__file__).resolve().parent.parent
    variables = {"FASTLM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)}
    processes = []

    def run(flags, *arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *flags]
        command += ["--log-dir", str(tmp_path / "logs"), "-m", "fastlm", "train", "--data", str(tmp_path / "text.txt")]
        command += ["--out", str(tmp_path / "run"), *TINY, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=os.environ | variables, **pipes))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()


def wait_for_checkpoint(run, process, beyond=0):
    deadline = time.monotonic() + 120
    while not any(int(path.name[5:]) > beyond for path in run.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.05)


def rank_of(pid):
    with contextlib.suppress(OSError):
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                return int(variable[5:])
    return None


def pid_of(process, rank):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if rank_of(pid) == rank)


@pytest.mark.parametrize("data_parallel", ["ddp", "fsdp"])
def test_rank_that_is_killed_ends_the_job_within_a_minute_and_is_named(torchrun, tmp_path, data_parallel):
    process = torchrun([], "--steps", 10**6, "--data-parallel", data_parallel)
    wait_for_checkpoint(tmp_path / "run", process)
    os.kill(pid_of(process, 1), signal.SIGKILL)
    killed = time.monotonic()
    _, complaint = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert process.returncode == 1
    assert "fastlm: rank 0 lost rank 1, which failed or was killed" in complaint
    assert "Signal 9 (SIGKILL)" in complaint


def test_restarts_continue_from_the_last_checkpoint(torchrun, tmp_path):
    process = torchrun(["--max-restarts", "1"], "--steps", 400, "--resume", "none", "--log-interval", 10)
    wait_for_checkpoint(tmp_path / "run", process)
    os.kill(pid_of(process, 1), signal.SIGKILL)
    printed, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert printed.count("resumed from ") == 1
    assert "step 400/400" in printed


def test_preempted_ranks_save_and_exit_with_75(torchrun, tmp_path):
    process = torchrun([], "--steps", 10**6)
    wait_for_checkpoint(tmp_path / "run", process)
    os.kill(pid_of(process, 1), signal.SIGTERM)
    printed, complaint = process.communicate(timeout=60)
    assert "stopped by SIGTERM after step" in printed
    assert "exitcode  : 75" in complaint
    assert complaint.count("Traceback") == 1  # torchrun's own


def test_mistake_is_one_line_in_the_error_file(torchrun, tmp_path):
    process = torchrun([], "--steps", 2, "--resume", tmp_path / "nowhere")
    _, complaint = process.communicate(timeout=120)
    assert f"fastlm: there is no checkpoint {tmp_path}/nowhere" in complaint
    assert complaint.count("Traceback") == 1  # torchrun's own
    files = list((tmp_path / "logs").rglob("error.json"))
    messages = [json.loads(file.read_text())["message"]["message"] for file in files]
    assert any("CheckpointError: there is no checkpoint" in message for message in messages)
    assert not any("\n" in message for message in messages)

import os
import signal
import socket

import pytest
import torch

from fastlm.train import checkpoint
from fastlm.train.distributed import PeerError, connect, disconnect
from tests.accuracy import assert_accurate
from tests.train.processes import run_ranks
from tests.train.test_trainer import HELD_OUT, everything, losses
from tests.train.toy import ToyLoader, ToyModel, toy_trainer


def train_rank(out, changes):
    """One rank of two: every other batch, every other held-out batch; rank 1 may be told to stop."""
    rank = int(os.environ["RANK"])
    stop_rank, stop_step = changes.pop("stop", (None, None))
    on_update = ToyLoader.__next__

    class Loader(ToyLoader):
        def __next__(self):
            if (rank, self.position) == (stop_rank, stop_step):
                os.kill(os.getpid(), signal.SIGTERM)
            return on_update(self)

    toy_trainer(out, loader=Loader(rank=rank, world_size=2), eval_loader=HELD_OUT[rank::2], **changes).fit()
    disconnect()


@pytest.mark.parametrize("more", [{}, {"precision": "bf16-params", "optimizer": "muon", "ema_decay": 0.5}])
def test_two_ranks_equal_two_accumulated_batches_to_the_bit(tmp_path, more):
    changes = {"steps": 6, "eval_interval": 3} | more
    run_ranks(2, train_rank, tmp_path / "ranks", changes, errors=tmp_path / "errors")
    toy_trainer(tmp_path / "one", eval_loader=HELD_OUT, grad_accumulation_steps=2, **changes).fit()
    ours, one = everything(tmp_path / "ranks")[0], everything(tmp_path / "one")[0]
    assert ours.keys() == one.keys()
    assert [name for name in ours if not torch.equal(ours[name], one[name])] == []
    assert losses(tmp_path / "ranks") == losses(tmp_path / "one")


class Bypassed(ToyModel):
    """Rank 1 starts from other weights, and has no use for the hidden layer."""

    def __init__(self):
        super().__init__()
        self.bypassed = os.environ["RANK"] == "1"
        if self.bypassed:
            torch.nn.init.ones_(self.hidden.weight)

    def forward(self, tokens, targets, *, cu_seqlens, positions):
        hidden = self.embedding(tokens) if self.bypassed else torch.tanh(self.hidden(self.embedding(tokens)))
        losses = torch.nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
        return losses, (targets != -100).sum()


def bypassing_rank(out):
    """Both ranks must end with the same weights."""
    rank, model = int(os.environ["RANK"]), Bypassed()
    before = ToyModel().hidden.weight
    trainer = toy_trainer(out, model=model, loader=ToyLoader(rank=rank, world_size=2), precision="bf16-params", steps=2)
    trainer.fit()
    ours = torch.cat([leaf.flatten() for leaf in trainer.updater.optimizers.leaves.names])
    torch.testing.assert_close(trainer.ranks.sum(ours.clone()) / 2, ours, rtol=0, atol=0)
    assert 0 < (model.hidden.weight - before).abs().max() < 0.1
    disconnect()


def test_ranks_with_masters_start_alike_and_need_no_use_of_every_parameter(tmp_path):
    run_ranks(2, bypassing_rank, tmp_path / "run", errors=tmp_path / "errors")


def test_two_ranks_that_accumulate_equal_four_accumulated_batches(tmp_path):
    run_ranks(2, train_rank, tmp_path / "ranks", {"steps": 6, "grad_accumulation_steps": 2}, errors=tmp_path / "errors")
    toy_trainer(tmp_path / "one", steps=6, grad_accumulation_steps=4).fit()
    toy_trainer(tmp_path / "truth", model=ToyModel().double(), steps=6, grad_accumulation_steps=4).fit()
    ours, one, truth = (checkpoint.read_newest(tmp_path / name).tensors["model"] for name in ("ranks", "one", "truth"))
    for name in one:
        assert_accurate(ours[name], one[name], truth[name], name)


def test_signal_to_one_rank_stops_all_after_the_same_step_and_the_run_resumes(tmp_path):
    changes = {"steps": 6, "eval_interval": 3}
    run_ranks(2, train_rank, tmp_path / "straight", changes, errors=tmp_path / "errors")
    run_ranks(2, train_rank, tmp_path / "stopped", changes | {"stop": (1, 2)}, errors=tmp_path / "errors")
    assert checkpoint.read_newest(tmp_path / "stopped").state["step"] == 3
    run_ranks(2, train_rank, tmp_path / "stopped", changes, errors=tmp_path / "errors")
    straight, stopped = everything(tmp_path / "straight"), everything(tmp_path / "stopped")
    assert [name for name in straight[0] if not torch.equal(straight[0][name], stopped[0][name])] == []
    assert straight[1] == stopped[1]


def test_run_of_two_ranks_is_not_resumed_by_one(tmp_path):
    run_ranks(2, train_rank, tmp_path, {"steps": 2}, errors=tmp_path / "errors")
    with pytest.raises(ValueError, match="world_size = 2, and this run has 1"):
        toy_trainer(tmp_path, steps=4).fit()


def failing_rank(out, changes):
    """Rank 0 cannot write; rank 1 must not wait for it."""
    with pytest.raises(
        OSError if os.environ["RANK"] == "0" else RuntimeError, match=r"cannot write|1 other ranks failed"
    ):
        toy_trainer(out, **changes)
    disconnect()


def test_failure_of_one_rank_stops_the_other(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run_ranks(2, failing_rank, tmp_path / "file" / "run", {}, errors=tmp_path / "errors")


def dying_rank(out):
    """Rank 1 dies in its third step; rank 0 must say so."""
    rank = int(os.environ["RANK"])

    class Loader(ToyLoader):
        def __next__(self):
            if (rank, self.position) == (1, 2):
                os._exit(0)
            return super().__next__()

    with pytest.raises(PeerError, match="rank 0 lost another rank, which failed or was killed") as caught:
        toy_trainer(out, loader=Loader(rank=rank, world_size=2)).fit()
    assert "\n" not in str(caught.value)


def test_rank_that_dies_is_told_by_the_others(tmp_path):
    run_ranks(2, dying_rank, tmp_path / "run", errors=tmp_path / "errors")


def test_connect_names_a_port_that_is_in_use(monkeypatch):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(PeerError, match=f"cannot meet the other ranks at 127.0.0.1, port {port}: .*--master-port"):
            connect()


@pytest.mark.parametrize(("name", "value"), [("RANK", "one"), ("WORLD_SIZE", ""), ("MASTER_PORT", "-1"), ("RANK", "7")])
def test_connect_names_a_variable_that_is_wrong(monkeypatch, name, value):
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, number in (variables | {name: value}).items():
        monkeypatch.setenv(key, number)
    with pytest.raises(ValueError, match=f"{name} is '?{value}'?, expected"):
        connect()


def test_connect_without_torchrun_is_one_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert (connect().rank, connect().world_size, connect().is_main) == (0, 1, True)


def test_connect_names_a_missing_variable(monkeypatch):
    for name in "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR":
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match="MASTER_PORT is not: start with torchrun"):
        connect()

import os
import shutil
import signal
import socket

import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from fastlm.train import checkpoint, distributed
from fastlm.train.distributed import PeerError, Ranks, connect, disconnect
from fastlm.train.parallelize import ParallelKnobs, parallelize
from fastlm.train.shards import is_sharded, local
from tests.support.accuracy import assert_accurate
from tests.support.processes import run_ranks
from tests.support.toy import DeepModel, ToyLoader, ToyModel, toy_trainer
from tests.train.test_trainer import HELD_OUT, assert_same_run, everything, losses


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
    """From a call on it has no use for the hidden layer."""

    def __init__(self, first):
        super().__init__()
        self.calls, self.first = 0, first

    def forward(self, tokens, targets, *, cu_seqlens, positions):
        self.calls += self.training and torch.is_grad_enabled()
        hidden = self.embedding(tokens)
        if self.calls < self.first:
            hidden = torch.tanh(self.hidden(hidden))
        losses = torch.nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
        return losses, (targets != -100).sum()


def ranks_of_other_weights(root):
    """Both ranks must end with the same weights, and refuse a model that does not use all of them."""
    rank, model = int(os.environ["RANK"]), ToyModel()
    place = {"rank": rank, "world_size": 2}
    if rank:
        nn.init.ones_(model.hidden.weight)
    before = ToyModel().hidden.weight
    trainer = toy_trainer(root / "masters", model=model, loader=ToyLoader(**place), precision="bf16-params", steps=2)
    trainer.fit()
    ours = torch.cat([leaf.flatten() for leaf in trainer.updater.optimizers.leaves.names])
    torch.testing.assert_close(trainer.ranks.sum(ours.clone()) / 2, ours, rtol=0, atol=0)
    assert 0 < (model.hidden.weight - before).abs().max() < 0.1
    message = r"parameter hidden.weight has no gradient nor have 1 others, .*: freeze it with requires_grad_\(False\)"
    for name, bypassed, more in (
        ("fp32", Bypassed(first=0), {}),
        ("bf16-params", Bypassed(first=0), {"precision": "bf16-params"}),
        ("accumulated", Bypassed(first=2), {"grad_accumulation_steps": 2}),
    ):
        with pytest.raises(ValueError, match=message):
            toy_trainer(root / name, model=bypassed, loader=ToyLoader(**place), **more).fit()
    disconnect()


def test_ranks_start_alike_and_refuse_a_parameter_without_gradient_in_any_precision(tmp_path):
    run_ranks(2, ranks_of_other_weights, tmp_path, errors=tmp_path / "errors")


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


class Counting(ToyModel):
    """Scales by a running mean of the tokens it saw, which differ from rank to rank."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, tokens, *args, **kwargs):
        if self.training:
            self.mean.lerp_(tokens.float().mean() / 14, 0.5)
        loss_sum, num_valid = super().forward(tokens, *args, **kwargs)
        return loss_sum * self.mean, num_valid


def counting_ranks(root):
    """A straight run and a resumed one, whose model has a buffer that changes."""
    rank = int(os.environ["RANK"])

    def train(out, steps):
        rate = {"schedule": "constant", "warmup_ratio": 0.0}
        toy_trainer(out, model=Counting(), loader=ToyLoader(rank=rank, world_size=2), steps=steps, **rate).fit()

    train(root / "straight", 6)
    train(root / "resumed", 3)
    train(root / "resumed", 6)
    disconnect()


def test_buffers_that_change_are_alike_on_all_ranks_so_the_run_resumes_to_the_bit(tmp_path):
    run_ranks(2, counting_ranks, tmp_path, errors=tmp_path / "errors")
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


# Without clipping, whose norm is rounded otherwise where each rank has parts, one rank and two give the same bits.
SHARDED = {
    "data_parallel": "fsdp",
    "schedule": "constant",
    "warmup_ratio": 0.0,
    "keep_checkpoints": 9,
    "grad_clip": 0.0,
}
STEPS = {"steps": 6, "checkpoint_interval": 3, "eval_interval": 6}
MUON = {"optimizer": "muon", "ema_decay": 0.5, "layer_statistics_interval": 3, "eval_interval": 2}


def fit(out, rank=0, world_size=1, dropout=0.0, model=None, **changes):
    """A run of the deep model on its share of the batches."""
    changes = SHARDED | {"eval_loader": HELD_OUT[rank:2:world_size]} | changes
    model, loader = model or DeepModel(dropout), ToyLoader(rank=rank, world_size=world_size)
    if rank:
        nn.init.ones_(model.hidden.weight)  # other weights than rank 0's, whose count
    return toy_trainer(out, model=model, loader=loader, **changes).fit()


class Spoiled(DeepModel):
    """In its third step, on rank 1 alone, one gradient is NaN; the loss is finite."""

    steps = 0

    def forward(self, *args, **kwargs):
        loss_sum, num_valid = super().forward(*args, **kwargs)
        self.steps += 1
        is_spoiled = self.steps == 3 and os.environ["RANK"] == "1"
        return loss_sum + torch.sqrt(0 * self.shift + (not is_spoiled)).sum(), num_valid


class Noting(nn.Linear):
    """Notes the dtypes of the weights that it computes with."""

    def forward(self, x):
        self.seen = [*getattr(self, "seen", []), self.weight.dtype]
        return super().forward(x)


def sharded_ranks(root):
    """All runs of two ranks that the test below looks at, in one process group."""
    place, lines = {"rank": int(os.environ["RANK"]), "world_size": 2}, []
    fit(root / "sharded", **place, **STEPS)
    fit(root / "one, then sharded", **place, **STEPS, on_log=lines.append)
    told = [line for line in lines if "this run has 2 ranks and had 1: results are no longer equal" in line]
    assert len(told) == (place["rank"] == 0)
    assert len(set(connect().gather(float(torch.rand(1))))) == 2, "both ranks draw the same random numbers"
    fit(root / "replicated, then sharded", **place, **STEPS | {"steps": 3, "data_parallel": "ddp"})
    fit(root / "replicated, then sharded", **place, **STEPS)
    with pytest.MonkeyPatch.context() as patch:
        reductions, reduce = [], DefaultReduceScatter.__call__
        counted = lambda *args, **kwargs: reductions.append(1) or reduce(*args, **kwargs)  # noqa: E731
        patch.setattr(DefaultReduceScatter, "__call__", counted)
        fit(root / "accumulated", **place, steps=4, grad_accumulation_steps=2, grad_clip=0.01)
    assert len(reductions) == 4 * 3, "not one reduction per step, of each of two blocks and the rest"
    for data_parallel in "ddp", "fsdp":
        spoiled = Spoiled()
        changes = {"steps": 4, "data_parallel": data_parallel, "eval_loader": None}
        assert fit(root / data_parallel, **place, **changes, model=spoiled).skipped_steps == 1
        assert all(value.isfinite().all() for value in map(local, spoiled.state_dict().values()))
    for precision in "fp32", "fp16":
        changes = {"precision": precision, "dropout": 0.2, "steps": 4, "eval_interval": 2, "grad_clip": 1.0}
        fit(root / f"straight {precision}", **place, **changes)
        fit(root / f"stopped {precision}", **place, **changes | {"steps": 2})
        torch.rand(place["rank"] + 1)  # what happened in between must not matter
        fit(root / f"stopped {precision}", **place, **changes)
    fit(root / "muon", **place, **STEPS | MUON | {"steps": 3})
    fit(root / "muon", **place, **STEPS | MUON)
    noting = DeepModel()
    for block in noting.blocks:
        block.__class__ = Noting
    fit(root / "bf16", **place, steps=4, precision="bf16-params", model=noting)
    assert {dtype for block in noting.blocks for dtype in block.seen} == {torch.bfloat16}
    assert_resumes_to_the_bit(root / "bf16 of one")
    with pytest.raises(ValueError, match="eval_loader: 1 of 2 ranks have one more batch"):
        fit(root / "uneven", **place, steps=1, eval_loader=HELD_OUT[: 1 + place["rank"]])
    disconnect()


def assert_resumes_to_the_bit(run):
    """What a trainer of bf16-params takes from the checkpoint of another number of ranks is what is in there."""
    saved = checkpoint.read_newest(run).tensors
    resumed = toy_trainer(run, model=DeepModel(), precision="bf16-params", steps=9, **SHARDED)
    resumed._state.start()
    taken = resumed._state.as_saved()["tensors"]
    for group, tensors in saved.items():
        whole = {name: value.full_tensor() if is_sharded(value) else value for name, value in taken[group].items()}
        assert whole.keys() == tensors.keys()
        assert [name for name, value in tensors.items() if not torch.equal(value, whole[name])] == []


def halfway(source, target):
    """A run directory as it was at step 3."""
    shutil.copytree(checkpoint.path_of(source, 3), checkpoint.path_of(target, 3))


def test_sharded_ranks_equal_one_and_runs_resume_on_any_number_of_them(tmp_path):
    fit(tmp_path / "one", **STEPS, grad_accumulation_steps=2)
    fit(tmp_path / "accumulated by one", steps=4, grad_accumulation_steps=4, grad_clip=0.01)
    fit(tmp_path / "muon of one", **STEPS | MUON, grad_accumulation_steps=2)
    fit(tmp_path / "bf16 of one", steps=4, grad_accumulation_steps=2, precision="bf16-params")
    fit(tmp_path / "fp32 of one", steps=4, grad_accumulation_steps=2)
    halfway(tmp_path / "one", tmp_path / "one, then sharded")
    run_ranks(2, sharded_ranks, tmp_path, errors=tmp_path / "errors")
    halfway(tmp_path / "sharded", tmp_path / "sharded, then one")
    fit(tmp_path / "sharded, then one", **STEPS, grad_accumulation_steps=2)

    one, one_state = everything(tmp_path / "one")
    for name in "sharded", "one, then sharded", "sharded, then one", "replicated, then sharded":
        ours, state = everything(tmp_path / name)
        assert ours.keys() == one.keys()
        assert [key for key in one if not torch.equal(ours[key], one[key])] == [], name
        assert (state["totals"], state["loader"]) == (one_state["totals"], one_state["loader"])
        assert_same_losses(tmp_path / name, tmp_path / "one", steps=[4, 5, 6])
    assert_same_losses(tmp_path / "accumulated", tmp_path / "accumulated by one", steps=[1, 2, 3, 4])
    (ours, state), (one, one_state) = everything(tmp_path / "muon"), everything(tmp_path / "muon of one")
    assert any(name.startswith("ema ") for name in one)
    assert ours.keys() == one.keys()
    assert [key for key in one if not torch.equal(ours[key], one[key])] == []
    statistics, expected = (
        [record["layers"] for record in losses(tmp_path / name) if "layers" in record]
        for name in ("muon", "muon of one")
    )
    assert len(expected) == 2
    for layers, theirs in zip(statistics, expected, strict=True):
        assert layers == {name: pytest.approx(values, rel=1e-5) for name, values in theirs.items()}
    assert {value.dtype for value in checkpoint.read_newest(tmp_path / "bf16").tensors["model"].values()} == {
        torch.float32
    }
    assert_resumes_to_the_bit(tmp_path / "bf16")
    for name in "bf16 of one", "fp32 of one":
        told = [losses(tmp_path / run)[-1]["eval_loss"] for run in ("bf16", name)]
        assert told[0] == pytest.approx(told[1], rel=1e-2)
    for precision in "fp32", "fp16":
        assert_same_run(tmp_path / f"straight {precision}", tmp_path / f"stopped {precision}")
    files = {path.name for path in checkpoint.path_of(tmp_path / "sharded", 6).rglob("*.safetensors")}
    assert files == {"shard-00001-model-00001-of-00001.safetensors", "shard-00002-model-00001-of-00001.safetensors"}


def assert_same_losses(run, other, steps):
    """Losses and gradient norms of these steps to rounding, and the held-out loss."""
    for key, expected in (("loss", steps), ("grad_norm", steps), ("eval_loss", steps[-1:])):
        ours, theirs = (
            {record["step"]: record[key] for record in losses(out) if key in record and record["step"] in expected}
            for out in (run, other)
        )
        assert sorted(ours) == expected
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_models_that_cannot_be_sharded_are_refused():
    tied, mixed = DeepModel(), DeepModel()
    tied.blocks[1].bias = tied.blocks[0].bias
    mixed.blocks[1].double()
    with pytest.raises(ValueError, match="a block shares a parameter with another, or with what is no block: use ddp"):
        parallelize(tied, ParallelKnobs(data_parallel="fsdp"), torch.device("cpu"), Ranks(world_size=2))
    with pytest.raises(ValueError, match=r"parameters are torch.float32, torch.float64, expected one dtype: use ddp"):
        parallelize(mixed, ParallelKnobs(data_parallel="fsdp"), torch.device("cpu"), Ranks(world_size=2))


def failing_rank(out, changes):
    """Rank 0 cannot write; rank 1 must not wait for it."""
    with pytest.raises(
        OSError if os.environ["RANK"] == "0" else PeerError,
        match=r"^cannot write|^rank 0 failed: OSError: cannot write",
    ):
        toy_trainer(out, **changes)
    disconnect()


def test_failure_of_one_rank_stops_the_other(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run_ranks(2, failing_rank, tmp_path / "file" / "run", {}, errors=tmp_path / "errors")


def dying_rank(out):
    """Rank 1 dies in its third step; rank 0 must say so."""
    rank = int(os.environ["RANK"])
    distributed.PATIENCE = 1.0

    class Loader(ToyLoader):
        def __next__(self):
            if (rank, self.position) == (1, 2):
                os._exit(0)
            return super().__next__()

    with pytest.raises(PeerError, match="rank 0 lost rank 1, which failed or was killed") as caught:
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

"""Other people's batches in the trainer's protocol."""

import json
from itertools import chain, islice

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastlm.data import Batch, BatchLoader, batch_loader

ROWS = torch.arange(40).view(10, 4)


def shuffled() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(ROWS, ROWS + 1), batch_size=3, shuffle=True)


def tokens_of(loader: BatchLoader, count: int) -> list[list[int]]:
    return [batch.tokens.flatten().tolist() for batch in islice(loader, count)]


def test_rows_are_documents_of_their_own():
    batch = next(BatchLoader([(ROWS[:2], ROWS[:2].int() + 1)]))
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert batch.targets.dtype == torch.int64
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert (batch.cu_seqlens.tolist(), batch.cu_seqlens.dtype) == ([0, 4, 8], torch.int32)


def test_a_list_comes_again_and_a_batch_stays_as_it_is():
    batch = next(BatchLoader([(ROWS[:2], ROWS[:2])]))
    loader = BatchLoader([batch, (ROWS[2:3], ROWS[2:3])])
    assert next(loader) is batch
    assert tokens_of(loader, 2) == [ROWS[2].tolist(), batch.tokens.flatten().tolist()]


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_a_shuffling_loader_resumes_exactly_whatever_the_random_state(steps):
    straight, resumed = BatchLoader(shuffled(), seed=1), BatchLoader(shuffled(), seed=1)
    before = torch.get_rng_state()
    tokens_of(straight, steps)
    assert torch.equal(torch.get_rng_state(), before), "training's random numbers are disturbed"
    torch.manual_seed(99)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert tokens_of(resumed, 8) == tokens_of(straight, 8)


def test_epochs_and_seeds_give_other_orders_of_the_same_rows():
    loader = BatchLoader(shuffled())
    epochs = [list(chain.from_iterable(tokens_of(loader, 4))) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(chain.from_iterable(tokens_of(BatchLoader(shuffled(), seed=1), 4)))
    assert sorted(epochs[0]) == sorted(epochs[1]) == ROWS.flatten().tolist()


def test_one_pass_gives_the_same_batches_each_time_and_takes_none():
    loader = BatchLoader(shuffled())
    held_out = loader.one_pass()
    passes = [[batch.tokens.tolist() for batch in held_out] for _ in range(2)]
    assert passes[0] == passes[1]
    assert len(passes[0]) == 4
    assert loader.state_dict()["batches_taken"] == 0


def test_a_distributed_sampler_is_told_the_epoch():
    sampler = DistributedSampler(ROWS, num_replicas=2, rank=0, shuffle=True)
    loader = BatchLoader(DataLoader(TensorDataset(ROWS, ROWS), batch_size=5, sampler=sampler))
    epochs = tokens_of(loader, 2)
    assert sampler.epoch == 1
    assert epochs[0] != epochs[1]


def on_ranks(world_size: int, monkeypatch: pytest.MonkeyPatch) -> list[BatchLoader]:
    """The loaders of all ranks, which share 16 rows out."""
    monkeypatch.setattr(batch_loader, "num_ranks", lambda: world_size)
    rows = torch.arange(16).view(16, 1)
    samplers = [DistributedSampler(rows, num_replicas=world_size, rank=rank) for rank in range(world_size)]
    return [BatchLoader(DataLoader(TensorDataset(rows, rows), batch_size=2, sampler=sampler)) for sampler in samplers]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_another_number_of_ranks_goes_on_with_the_rows_that_are_left(world_size, monkeypatch):
    loaders = on_ranks(2, monkeypatch)
    taken = [rows for loader in loaders for rows in tokens_of(loader, 2)]
    state = loaders[0].state_dict()
    assert state["batches_taken"] == 4
    resumed = on_ranks(world_size, monkeypatch)
    for loader in resumed:
        loader.load_state_dict(state)
    left = [rows for loader in resumed for rows in tokens_of(loader, 4 // world_size)]
    assert sorted(chain.from_iterable(taken + left)) == list(range(16))


def test_a_position_that_ranks_cannot_share_is_refused(monkeypatch):
    state = on_ranks(1, monkeypatch)[0].state_dict() | {"batches_taken": 3}
    with pytest.raises(ValueError, match="after 3 batches of an epoch, which 2 ranks cannot have taken, each as many"):
        on_ranks(2, monkeypatch)[0].load_state_dict(state)


def test_a_position_that_cannot_be_is_refused():
    loader = BatchLoader([(ROWS, ROWS)])
    state = loader.state_dict()
    for change, message in (
        ({"seed": 5}, "the loader's seed is 0, but the saved position was reached with 5"),
        ({"batches_taken": -1}, "expected counts"),
        ({"epoch": 1.5}, "expected counts"),
        ({"batches_taken": 3}, "an epoch has 1 batch of each rank, but the saved position is after 3"),
    ):
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict(state | change)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches is empty"),
        ([ROWS], TypeError, r"a batch is of type Tensor, expected a pair \(tokens, targets\)"),
        ([{"input_ids": ROWS}], TypeError, "a batch is of type dict"),
        ([(ROWS, ROWS[:, 1:])], ValueError, r"tokens have shape \(10, 4\) and targets \(10, 3\), expected \(B, T\)"),
        ([(ROWS[0], ROWS[0])], ValueError, r"tokens have shape \(4,\)"),
        ([(ROWS.float(), ROWS)], TypeError, "tokens are torch.float32, expected integers"),
    ],
)
def test_batches_of_another_form_are_refused(batches, error, message):
    with pytest.raises(error, match=message):
        next(BatchLoader(batches))


def test_an_iterator_is_refused():
    with pytest.raises(TypeError, match="batches is generator, which ends after one pass"):
        BatchLoader((row, row) for row in ROWS)


def test_a_batch_is_one_of_fastlm_data():
    assert isinstance(next(BatchLoader([(ROWS, ROWS)])), Batch)

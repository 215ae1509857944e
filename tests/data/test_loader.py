import itertools
import json
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlm.data import Batch, PackedLoader, TokenDataset, loader
from fastlm.data.loader import BYTES_PER_TOKEN, IGNORED, attention_costs, balanced, check_batch

LENGTHS = [1, 5, 2, 17, 1, 9, 40, 3, 16, 15, 33, 2, 2, 8, 1, 64]
COLUMNS = ("tokens", "targets", "positions", "cu_seqlens")


def same(ours: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(ours, name), getattr(other, name)) for name in COLUMNS)


def segments(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, targets, positions) of every segment that cu_seqlens delimits, padding included."""
    sizes = batch.cu_seqlens.diff().tolist()
    columns = [getattr(batch, name).flatten().split(sizes) for name in COLUMNS[:3]]
    parts = ([part.tolist() for part in column] for column in columns)
    return [segment for segment in zip(*parts, strict=True) if segment[0]]


def pieces_of(dataset: TokenDataset, row_size: int, *, truncated: bool = False) -> Counter[tuple[tuple[int, ...], ...]]:
    """(tokens, targets) of every document, cut into row-sized pieces."""
    found: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for start, length in zip(dataset.starts, dataset.lengths, strict=True):
        for offset in range(0, row_size if truncated and length > row_size else length, row_size):
            places = np.arange(start + offset, start + min(offset + row_size, length))
            found[tuple(dataset.gather(places).tolist()), tuple(dataset.gather(places + 1).tolist())] += 1
    return found


def pieces_in(batches: list[Batch]) -> Counter[tuple[tuple[int, ...], ...]]:
    real = (segment for batch in batches for segment in segments(batch) if segment[1][0] != IGNORED)
    return Counter((tuple(tokens), tuple(targets)) for tokens, targets, _ in real)


def loader_of(dataset: TokenDataset, **changes: object) -> PackedLoader:
    return PackedLoader(dataset, **{"batch_size": 3, "sequence_length": 16, **changes})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=25), st.integers(1, 40), st.integers(1, 5), st.integers(1, 3))
def test_one_pass_visits_every_document_once_whatever_the_sizes(dataset_of, lengths, row_size, batch_size, world_size):
    dataset = dataset_of(lengths)
    ranks = [
        list(
            PackedLoader(
                dataset, batch_size=batch_size, sequence_length=row_size, rank=r, world_size=world_size
            ).one_pass()
        )
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "a rank has more batches than another"
    assert pieces_in([batch for batches in ranks for batch in batches]) == pieces_of(dataset, row_size)


def test_one_pass_can_be_repeated_and_knows_its_length_and_bytes(dataset_of):
    dataset = dataset_of(LENGTHS)
    held_out = loader_of(dataset).one_pass()
    first, second = list(held_out), list(held_out)
    assert len(first) == len(held_out) == len(second)
    assert all(map(same, first, second))
    assert held_out.num_bytes == dataset.num_bytes
    assert sum(int((batch.targets != IGNORED).sum()) for batch in first) == dataset.num_tokens


def test_targets_are_the_next_tokens_and_the_last_ends_the_document(dataset_of):
    dataset = dataset_of([5, 7, 3])
    (batch,) = loader_of(dataset).one_pass()
    real = [segment for segment in segments(batch) if segment[1][0] != IGNORED]
    assert len(real) == 3
    for tokens, targets, positions in real:
        assert tokens[0] == targets[-1] == dataset.end_of_text
        assert tokens[1:] == targets[:-1]
        assert positions == list(range(len(tokens)))


def test_padding_is_a_segment_of_its_own_that_is_ignored(dataset_of):
    dataset = dataset_of([5, 14])
    (batch,) = loader_of(dataset).one_pass()
    padding = [segment for segment in segments(batch) if segment[1][0] == IGNORED]
    assert sorted(len(tokens) for tokens, _, _ in padding) == [2, 11, 16]
    for tokens, targets, positions in padding:
        assert set(tokens) == {dataset.end_of_text}
        assert set(targets) == {IGNORED}
        assert positions == list(range(len(tokens)))


def test_batches_have_fixed_shapes_and_no_segment_crosses_a_row(dataset_of):
    loader = loader_of(dataset_of(LENGTHS * 5))
    shapes = set()
    for batch in [*islice(loader, 50), *loader.one_pass()]:
        shapes.add((batch.tokens.shape, batch.targets.shape, batch.positions.shape, batch.cu_seqlens.shape))
        assert [getattr(batch, name).dtype for name in COLUMNS] == [torch.int64] * 3 + [torch.int32]
        assert set(range(0, 49, 16)) <= set(batch.cu_seqlens.tolist())
        assert batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == 48
    assert len(shapes) == 1
    (shape,) = shapes
    assert shape[:3] == ((3, 16),) * 3


def rows_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch.tokens]


def test_training_visits_every_row_once_per_epoch_in_another_order(dataset_of):
    loader = loader_of(dataset_of(LENGTHS))
    num_rows = loader.report.num_rows
    assert num_rows % 3, "the test is to cross the end of an epoch inside a batch"
    rows = rows_of(list(islice(loader, num_rows)))
    epochs = [rows[start : start + num_rows] for start in range(0, len(rows), num_rows)]
    assert len(epochs) == 3
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert loader.epoch == 3
    assert loader.epoch_batches == -(-num_rows // 3)


def test_training_order_follows_the_seed(dataset_of):
    dataset = dataset_of(LENGTHS)
    orders = [rows_of(list(islice(loader_of(dataset, seed=seed), 5))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    unshuffled = rows_of(list(islice(loader_of(dataset, shuffle=False), 20)))
    num_rows = loader_of(dataset).report.num_rows
    assert unshuffled[:num_rows] == unshuffled[num_rows : 2 * num_rows]


def test_ranks_together_take_what_one_process_takes(dataset_of):
    dataset = dataset_of(LENGTHS)
    alone = loader_of(dataset, batch_size=6)
    ranks = [loader_of(dataset, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(7):
        together = rows_of([next(alone)])
        assert sorted(together) == sorted(rows_of([next(rank) for rank in ranks]))


def cost_of(batch: Batch) -> int:
    return int(batch.cu_seqlens.long().diff().square().sum())


def test_costs_are_the_squared_lengths_that_attention_sees(dataset_of):
    loader = loader_of(dataset_of(LENGTHS), batch_size=1, shuffle=False)
    costs = attention_costs(loader._packing, loader._row_tokens)
    assert costs.tolist() == [cost_of(next(loader)) for _ in costs]


def test_ranks_have_about_equal_costs_where_their_rows_differ(dataset_of):
    dataset = dataset_of([16] * 8 + [1] * 16 * 8)
    ranks = [loader_of(dataset, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    steps = [[cost_of(next(rank)) for rank in ranks] for _ in range(2)]
    rows = [16 * 16, 16]
    assert all(max(step) - min(step) <= rows[0] - rows[1] for step in steps), "a swap of two rows would even them out"


def smallest_possible(costs: list[int], world_size: int) -> int:
    """The largest cost of a rank in the best of all ways to deal rows out in equal numbers."""
    if world_size == 1:
        return sum(costs)
    ways = []
    for own in itertools.combinations(range(1, len(costs)), len(costs) // world_size - 1):
        rest = [cost for place, cost in enumerate(costs) if place not in (0, *own)]
        ways.append(max(costs[0] + sum(costs[place] for place in own), smallest_possible(rest, world_size - 1)))
    return min(ways)


@settings(max_examples=150)
@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_balanced_comes_close_to_the_best_of_all_ways(world_size, size, data):
    rows = world_size * size
    costs = data.draw(st.lists(st.integers(1, 1000), min_size=rows, max_size=rows))
    dealt = balanced(np.array(costs), world_size)
    assert sorted(dealt.flatten().tolist()) == list(range(rows))
    assert dealt.shape == (world_size, size)
    assert (np.diff(dealt, axis=1) > 0).all(), "a rank's rows keep their order"
    largest = max(sum(costs[place] for place in rank) for rank in dealt.tolist())
    assert largest <= 4 / 3 * smallest_possible(costs, world_size)


def test_one_rank_has_all_rows_as_they_come():
    assert balanced(np.array([3, 9, 1, 9]), 1).tolist() == [[0, 1, 2, 3]]


def test_ranks_are_those_of_the_process_group_once_there_is_one(dataset_of, monkeypatch):
    dataset = dataset_of(LENGTHS)
    loader_made_before = loader_of(dataset)
    assert (loader_made_before.rank, loader_made_before.world_size) == (0, 1)
    for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 2}.items():
        monkeypatch.setattr(loader.dist, name, lambda value=value: value)
    assert (loader_made_before.rank, loader_made_before.world_size) == (1, 2)
    assert same(next(loader_made_before), next(loader_of(dataset, rank=1, world_size=2)))
    with pytest.raises(ValueError, match="rank is 1 and world_size None, expected both or neither"):
        loader_of(dataset, rank=1)


def test_a_dataset_smaller_than_a_batch_is_repeated(dataset_of):
    loader = loader_of(dataset_of([4, 9]), batch_size=5)
    batch = next(loader)
    assert len(set(rows_of([batch]))) == 1
    assert batch.cu_seqlens.tolist()[:11] == [start + 16 * row for row in range(5) for start in (0, 9, 13)][:11]
    assert next(loader).cu_seqlens.shape == batch.cu_seqlens.shape


@pytest.mark.parametrize("steps", [0, 1, 4, 11])
def test_state_round_trip_continues_exactly(dataset_of, steps):
    dataset = dataset_of(LENGTHS)
    straight, resumed = loader_of(dataset), loader_of(dataset)
    for _ in range(steps):
        next(straight)
    next(resumed)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert resumed.epoch == straight.epoch
    assert all(same(next(resumed), next(straight)) for _ in range(8))


def test_state_may_continue_with_other_ranks_and_batch_size(dataset_of):
    dataset = dataset_of(LENGTHS)
    before = loader_of(dataset, batch_size=2, rank=0, world_size=2)
    for _ in range(3):
        next(before)
    whole = rows_of(list(islice(loader_of(dataset, batch_size=1), 20)))
    after = loader_of(dataset, batch_size=4)
    after.load_state_dict(before.state_dict())
    assert rows_of([next(after), next(after)]) == whole[12:20]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"shuffle": False}, "shuffle"),
        ({"sequence_length": 17}, "sequence_length"),
        ({"overlong": "truncate"}, "overlong"),
    ],
)
def test_state_of_other_rows_is_refused(dataset_of, changes, name):
    dataset = dataset_of(LENGTHS)
    state = loader_of(dataset, **changes).state_dict()
    with pytest.raises(ValueError, match=f"the loader's {name} is .* reached with"):
        loader_of(dataset).load_state_dict(state)


@pytest.mark.parametrize("taken", [-1, 10**30, 1.5, "7", True, None])
def test_a_position_that_is_no_number_of_rows_is_refused(dataset_of, taken):
    loader = loader_of(dataset_of(LENGTHS))
    with pytest.raises(ValueError, match=r"the loader's rows_taken is .*, expected the number of rows"):
        loader.load_state_dict(loader.state_dict() | {"rows_taken": taken})


def test_state_of_another_dataset_is_refused(dataset_of):
    state = loader_of(dataset_of([5, 6], "other")).state_dict()
    with pytest.raises(ValueError, match="the loader's dataset is"):
        loader_of(dataset_of([6, 5], "ours")).load_state_dict(state)


def test_seeking_costs_no_reading(dataset_of, monkeypatch):
    loader = loader_of(dataset_of(LENGTHS))
    state = {**loader.state_dict(), "rows_taken": 10**15}
    monkeypatch.setattr(TokenDataset, "gather", None)
    loader.load_state_dict(state)
    assert loader.state_dict() == state


def test_truncation_keeps_the_beginning_of_each_document(dataset_of):
    dataset = dataset_of(LENGTHS)
    loader = loader_of(dataset, overlong="truncate")
    assert pieces_in(list(loader.one_pass())) == pieces_of(dataset, 16, truncated=True)
    assert loader.report.num_truncated == sum(length > 16 for length in LENGTHS)


def test_batch_moves_all_its_columns(dataset_of):
    moved = next(loader_of(dataset_of(LENGTHS))).to("meta", non_blocking=True)
    columns: list[Tensor] = [getattr(moved, name) for name in COLUMNS]
    assert {column.device.type for column in columns} == {"meta"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1 row"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected 0 to 1 for a world size of 2"),
        ({"sequence_length": 0}, "sequence length is 0"),
        ({"overlong": "drop"}, "overlong is 'drop'"),
    ],
)
def test_loader_refuses_wrong_arguments(dataset_of, changes, message):
    with pytest.raises(ValueError, match=message):
        loader_of(dataset_of([3]), **changes)


def test_loader_refuses_an_empty_dataset(dataset_of):
    with pytest.raises(ValueError, match="no documents to pack"):
        loader_of(dataset_of([]))


@pytest.mark.parametrize(("batch_size", "sequence_length"), [(8, 10**9), (10**12, 16), (1, 1 << 62)])
def test_a_batch_beyond_the_memory_of_the_machine_is_refused_with_its_size(dataset_of, batch_size, sequence_length):
    gigabytes = f"{batch_size * sequence_length * BYTES_PER_TOKEN / 1e9:,.1f} GB"
    with pytest.raises(
        ValueError, match=f"batch of .*{batch_size:,} rows? of {sequence_length:,} tokens takes {gigabytes}"
    ):
        loader_of(dataset_of([5]), batch_size=batch_size, sequence_length=sequence_length)


def test_a_batch_beyond_the_memory_of_the_container_is_refused(tmp_path, monkeypatch):
    (tmp_path / "v1").write_text("max\n")
    (tmp_path / "v2").write_text("430000\n")
    monkeypatch.setattr(loader, "MEMORY_LIMITS", (tmp_path / "none", tmp_path / "v1", tmp_path / "v2"))
    check_batch(10, 1000)
    with pytest.raises(ValueError, match=r"machine has 0\.0 GB: take a smaller batch_size"):
        check_batch(10, 1001)


def test_a_batch_of_more_tokens_than_cu_seqlens_can_count_is_refused(monkeypatch):
    monkeypatch.setattr(loader, "memory", lambda: float("inf"))
    check_batch(1, (1 << 31) - 1)
    with pytest.raises(ValueError, match="more tokens than cu_seqlens, which is int32, can count"):
        check_batch(2, 1 << 30)


@pytest.mark.parametrize("lengths", [[3000, 4000], [7] * 900])
def test_a_batch_takes_the_memory_that_it_is_judged_by(dataset_of, lengths):
    batches = loader_of(dataset_of(lengths), batch_size=4, sequence_length=1 << 16)
    next(batches)
    tracemalloc.start()
    next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert BYTES_PER_TOKEN <= peak / (4 << 16) < BYTES_PER_TOKEN + 1

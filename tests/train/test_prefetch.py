import threading

import pytest

from fastlm.train.prefetch import Prefetcher, prefetched
from tests.support.toy import ToyLoader


class SelfContained(ToyLoader):
    is_self_contained = True


def positions(loader, count):
    """What the loader gives, told by the first token of each batch, and its state after each."""
    return [(int(next(loader).tokens[0, 0]), loader.state_dict()) for _ in range(count)]


@pytest.mark.parametrize("num_batches", [1, 2, 5])
def test_prefetched_batches_and_states_are_those_of_the_loader(num_batches):
    assert positions(Prefetcher(SelfContained(), num_batches), 9) == positions(SelfContained(), 9)


def test_prefetcher_goes_to_where_it_is_sent():
    loader = Prefetcher(SelfContained(), 3)
    positions(loader, 4)
    loader.load_state_dict({"position": 1})
    assert loader.state_dict() == {"position": 1}
    plain = SelfContained()
    plain.load_state_dict({"position": 1})
    assert positions(loader, 3) == positions(plain, 3)


def test_close_leaves_the_loader_behind_the_last_batch_given_out():
    inner = SelfContained()
    loader = Prefetcher(inner, 3)
    positions(loader, 2)
    loader.close()
    assert inner.state_dict() == {"position": 2}
    assert positions(loader, 1) == [positions(SelfContained(), 3)[2]]


def test_batches_are_prepared_while_the_caller_works():
    prepared = threading.Semaphore(0)

    class Telling(SelfContained):
        def __next__(self):
            batch = super().__next__()
            prepared.release()
            return batch

    next(Prefetcher(Telling(), 2))
    assert all(prepared.acquire(timeout=10) for _ in range(3))  # the one given out and two more, nobody asking


def test_failure_of_the_loader_reaches_the_step_that_needs_the_batch():
    class Failing(SelfContained):
        def __next__(self):
            if self.position == 2:
                raise OSError(5, "Input/output error", "shard.bin")
            return super().__next__()

    loader = Prefetcher(Failing(), 4)
    positions(loader, 2)
    with pytest.raises(OSError, match="Input/output error"):
        next(loader)


def test_loader_that_draws_from_the_global_generators_is_left_alone():
    loader = ToyLoader()
    assert prefetched(loader, 2) is loader
    assert prefetched(contained := SelfContained(), 0) is contained

"""The next batches, prepared in a thread while a step runs."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastlm.train.protocols import Loader


def prefetched(loader: Loader, num_batches: int) -> Loader:
    """The loader, prepared num_batches ahead if its batches depend on its state alone, as it then says of itself.

    A loader that draws from the global generators would, in a thread, draw other numbers in each run.
    """
    return Prefetcher(loader, num_batches) if num_batches and getattr(loader, "is_self_contained", False) else loader


class Prefetcher:
    """The batches of a loader in their order. Its state is that of the loader after the last batch given out."""

    def __init__(self, loader: Loader, num_batches: int) -> None:
        self._loader, self._num_batches = loader, num_batches
        self._state = loader.state_dict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._pending: deque[Future[tuple[Any, dict[str, Any]]]] = deque()

    def __next__(self) -> Any:
        while len(self._pending) <= self._num_batches:
            self._pending.append(self._thread.submit(self._prepare))
        batch, self._state = self._pending.popleft().result()
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Drop what was prepared and go to another place."""
        self.close()
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()

    def close(self) -> None:
        """Drop what was prepared and put the loader back to behind the last batch given out."""
        while self._pending:
            future = self._pending.pop()
            if not future.cancel():
                future.exception()  # waits: the loader is not to move any more
        self._loader.load_state_dict(self._state)

    def _prepare(self) -> tuple[Any, dict[str, Any]]:
        return next(self._loader), self._loader.state_dict()

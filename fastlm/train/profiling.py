"""A few steps in detail: where the time goes, and on a CUDA device which code holds which memory.

trace.json.gz    every op and kernel on a time line, for https://ui.perfetto.dev or chrome://tracing
memory.pickle    every block of CUDA memory with the stack that took it, for https://pytorch.org/memory_viz
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastlm.train.knobs import Knobs

TRACE_FILE, MEMORY_FILE = "trace.json.gz", "memory.pickle"
WARMUP_STEPS = 3  # the first compile, choose algorithms and fill caches: later ones look different
MOST_MEMORY_EVENTS = 1_000_000  # older ones are dropped; a step of a large model has thousands


@dataclasses.dataclass
class ProfileKnobs(Knobs):
    """Which steps are profiled."""

    profile_steps: int = 0
    """Steps to profile once the first three are done; 0 for none. Profiled steps are slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_integers("profile_steps", minimum=0)


class Profiler:
    """Profiles num_steps steps of this process; whatever goes wrong with it is told and fails no run."""

    def __init__(self, num_steps: int, out: Path, device: torch.device, on_log: Callable[[str], None]) -> None:
        self._num_steps, self._out, self._device, self._log = num_steps, out, device, on_log
        self._steps_done = 0
        self._profile: profile | None = None

    def step_done(self, step: int) -> None:
        """Called after every step with its number."""
        if self._num_steps == 0:
            return
        self._steps_done += 1
        if self._profile is None and self._steps_done == WARMUP_STEPS:
            with self._failing_no_run():
                self._start()
        elif self._profile is not None and self._steps_done == WARMUP_STEPS + self._num_steps:
            self.close(step)

    def close(self, last_step: int) -> None:
        """Write what was profiled, if that is still to be done: a run may end before."""
        if self._profile is None:
            return
        running, self._profile, self._num_steps = self._profile, None, 0
        with self._failing_no_run():
            self._write(running, last_step)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MOST_MEMORY_EVENTS)
        started = profile(activities=activities, record_shapes=True)
        started.start()
        self._profile = started

    def _write(self, running: profile, last_step: int) -> None:
        trace = self._out / TRACE_FILE
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # else kernels still queued are missing
        running.stop()
        running.export_chrome_trace(str(trace))
        self._log(f"{trace} holds a profile up to step {last_step}: open it in https://ui.perfetto.dev")
        if self._device.type == "cuda":
            snapshot = self._out / MEMORY_FILE
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            self._log(f"{snapshot} holds who took which memory: open it in https://pytorch.org/memory_viz")

    @contextlib.contextmanager
    def _failing_no_run(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the profiler, the disk, or another profiler that already runs
            self._num_steps, self._profile = 0, None
            self._log(f"no profile: {' '.join(str(error).split())}; training goes on without it")

"""A callback for transformers.Trainer: tokens per second, peak memory and what is accelerated, in every log."""

import resource
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlm.acceleration.swapping import accelerated, uncompiled


class ThroughputCallback(TrainerCallback):
    """Adds `tokens_per_second` and `peak_memory_gib` to every log with a loss, and `num_accelerated` to the first.

    Tokens are those of the attention mask, without padding, on all ranks; the first interval holds all warming up.
    Memory is the device's peak since training began, on a CPU the process's.

        Trainer(fastlm.accelerate(model), ..., callbacks=[ThroughputCallback()])
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.include_num_input_tokens_seen in ("no", False):
            args.include_num_input_tokens_seen = "non_padding"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.start, self.tokens = time.perf_counter(), state.num_input_tokens_seen
        self.num_accelerated: int | None = len(accelerated(uncompiled(model)).swapped) if model is not None else None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        now, tokens = time.perf_counter(), state.num_input_tokens_seen
        found: dict[str, float] = {
            "tokens_per_second": (tokens - self.tokens) / (now - self.start),
            "peak_memory_gib": peak_memory() / 2**30,
        }
        if self.num_accelerated is not None:
            found["num_accelerated"] = self.num_accelerated
        self.start, self.tokens, self.num_accelerated = now, tokens, None
        logs.update(found)
        state.log_history[-1].update(found)  # the trainer wrote it before it called


def peak_memory() -> int:
    """Bytes of the current CUDA device, or resident bytes of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

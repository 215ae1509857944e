import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastlm import GPT, GPTConfig, cli
from fastlm.train import memory
from fastlm.train.activation_checkpointing import plan
from fastlm.train.distributed import Ranks
from fastlm.train.memory import OutOfMemoryError, StepMemory, profile_forward
from fastlm.train.optimizers import Optimizers
from fastlm.train.parallelize import parallelize
from fastlm.train.precision import choose_precision
from fastlm.train.progress import count
from fastlm.train.update import Updater
from tests.support.toy import ToyBatch, ToyModel, toy_batch, toy_config, toy_trainer

V, T = 448, 64  # no number of tokens below is V: gradients of the head's weight are told by their shape


def wide_gpt(style="gpt2"):
    torch.manual_seed(7)
    make = GPTConfig.llama if style == "llama" else GPTConfig
    return GPT(make(vocab_size=V, sequence_length=T, num_layers=6, num_heads=4, hidden_size=64))


def wide_batch(rows):
    tokens = torch.randint(V, (rows, T))
    positions = torch.arange(T).expand(rows, T).contiguous()
    return ToyBatch(tokens, tokens.roll(-1, 1), positions, torch.arange(0, rows * T + 1, T // 2, dtype=torch.int32))


def prepared(model, rows=16, **changes):
    """(its StepMemory, its updater, batches of a step) after what the trainer does before the first step."""
    config = toy_config("unused", batch_size=rows, **changes)
    precision, ranks = choose_precision(config), Ranks()
    forward, optimizers = parallelize(model, config, precision.device, ranks), Optimizers(model, config)
    step_memory = StepMemory(model, optimizers, config, precision, ranks)
    batches = [wide_batch(rows) for _ in range(config.grad_accumulation_steps)]
    step_memory.prepare(batches[0])
    return step_memory, Updater(forward, optimizers, config, precision, ranks), batches


@pytest.mark.parametrize(
    ("style", "changes"),
    [
        ("gpt2", {}),
        ("llama", {"precision": "bf16", "grad_accumulation_steps": 2}),
        ("llama", {"activation_checkpointing": "selective", "grad_accumulation_steps": 2}),
        ("gpt2", {"activation_checkpointing": "full", "precision": "bf16"}),
    ],
)
def test_estimate_is_within_15_percent_of_the_measured_peak(style, changes):
    """Measured is what PyTorch's CPU allocator holds at most, by its own reports to the profiler."""
    model = wide_gpt(style)
    step_memory, updater, batches = prepared(model, **changes)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(2):
            updater.update(batches, 1e-3)
    held = peak = sum(parameter.nbytes for parameter in model.parameters())
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak == pytest.approx(step_memory.estimate().total, rel=0.15)


def test_estimate_of_fewer_rows_is_that_of_a_batch_of_so_many():
    for mode in "none", "selective", "full":
        from_more = prepared(wide_gpt(), rows=16)[0].estimate(rows=8, mode=mode)
        from_so_many = prepared(wide_gpt(), rows=8, activation_checkpointing=mode)[0].estimate()
        assert from_more.activations == pytest.approx(from_so_many.activations, rel=0.01), mode
        assert from_more.loss == pytest.approx(from_so_many.loss, rel=0.01), mode


def test_estimate_falls_from_none_to_selective_to_full():
    step_memory = prepared(wide_gpt())[0]
    none, selective, full = (step_memory.estimate(mode=mode).total for mode in ("none", "selective", "full"))
    assert full < selective < none


class Restless(ToyModel):
    """Draws, counts and caches in its forward pass."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.register_buffer("calls", torch.zeros(()))
        self.cached = None

    def forward(self, tokens, targets, *, cu_seqlens, positions):
        self.calls += 1
        self.cached = targets
        return super().forward(tokens, targets, cu_seqlens=cu_seqlens, positions=positions)


def test_profile_leaves_no_trace_in_the_model_or_the_generators():
    model, before = Restless(), torch.get_rng_state()
    profile_forward(model, toy_batch(0, 4), choose_precision(toy_config("unused")))
    assert (model.calls, model.cached) == (0, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_profile_counts_each_tensor_once_and_no_parameter():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8))

        def forward(self, tokens, targets, *, cu_seqlens, positions):
            x = torch.ones(4, 8) @ self.weight  # saves its left side: 128 bytes
            return (x * x).exp().sum(), torch.tensor(1)  # x, which is saved twice, and the exponentials: 256 bytes

    found = profile_forward(Twice(), toy_batch(0, 4), choose_precision(toy_config("unused")))
    assert dataclasses.astuple(found) == (4, (), 128 + 256, 0, 0, 0)


class Stubborn(ToyModel):
    """Takes a gradient within its forward pass."""

    def forward(self, *args, **kwargs):
        loss_sum, num_valid = super().forward(*args, **kwargs)
        torch.autograd.grad(loss_sum, self.hidden.weight, retain_graph=True)
        return loss_sum, num_valid


def test_a_model_that_cannot_be_profiled_trains_without_an_estimate(tmp_path):
    lines = []
    assert toy_trainer(tmp_path, model=Stubborn(), steps=2, on_log=lines.append).fit().step == 2
    told = "memory of a step is not estimated: the model computes gradients within its forward pass"
    assert [line for line in lines if line.startswith("memory")] == [told]


def test_estimate_is_told_before_the_first_step_and_the_peak_after_the_second(tmp_path, monkeypatch):
    peaks = iter([500_000, 530_000])
    monkeypatch.setattr(memory, "resident_memory", lambda: 400_000)
    monkeypatch.setattr(memory, "NOTICEABLE", 1_000)
    monkeypatch.setattr(memory, "peak_memory", lambda device: next(peaks))
    lines = []
    toy_trainer(tmp_path, steps=3, on_log=lines.append).fit()
    told = [line for line in lines if line.startswith(("memory", "step"))]
    assert [line.split()[0] for line in told] == ["memory", "step", "memory:", "step", "step"]
    assert re.fullmatch(r"memory: grew by 130kB at the peak, [\d.]+kB estimated", told[2])


def test_step_of_a_few_kilobytes_is_not_told_of(tmp_path):
    lines = []
    trainer = toy_trainer(tmp_path, steps=3, on_log=lines.append)
    trainer.fit()
    assert 0 < trainer.memory.estimate().total < 1_000_000
    assert not [line for line in lines if line.startswith("memory")]


# Out of memory

OUT_OF_MEMORY = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate"


class Hungry(nn.Module):
    """A GPT whose allocations fail from a call on."""

    def __init__(self, first_failure):
        super().__init__()
        self.gpt, self.num_calls, self.first_failure = wide_gpt(), 0, first_failure

    @property
    def blocks(self):
        return self.gpt.blocks

    def forward(self, *args, **kwargs):
        self.num_calls += 1  # of the estimate too, but that count is put back
        if self.num_calls > self.first_failure:
            raise RuntimeError(OUT_OF_MEMORY)
        return self.gpt(*args, **kwargs)


class WideLoader:
    def __init__(self, rows):
        self.rows = rows

    def __next__(self):
        return wide_batch(self.rows)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def advice(tmp_path, first_failure=2, **changes):
    trainer = toy_trainer(tmp_path, model=Hungry(first_failure), loader=WideLoader(6), batch_size=6, **changes)
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.fit()
    assert isinstance(caught.value.__cause__, RuntimeError)
    return trainer.memory, cli.message(caught.value)


def test_out_of_memory_is_one_line_that_says_what_fits(tmp_path):
    step_memory, line = advice(tmp_path, grad_accumulation_steps=2, first_failure=4)
    smaller, selective, full = (
        f"(about {count(step_memory.estimate(rows, mode).total)}B)"
        for rows, mode in ((3, None), (None, "selective"), (None, "full"))
    )
    assert line == (
        f"out of memory in step 3: batch_size 6 takes {step_memory.estimate()}; "
        "with as many tokens per step these fit: "
        f"batch_size 3 with grad_accumulation_steps 4 {smaller}, "
        f"or activation_checkpointing selective {selective}, or activation_checkpointing full {full} ({OUT_OF_MEMORY})"
    )


def test_advice_leaves_out_what_does_not_fit_the_device(tmp_path, monkeypatch):
    step_memory, _ = advice(tmp_path)
    single = step_memory.estimate(rows=1).total
    monkeypatch.setattr(memory, "_present", lambda device: single)
    assert "of " + count(single) + "B; with as many tokens per step these fit: batch_size 1" in step_memory.advice()
    assert "selective" not in step_memory.advice()
    both = step_memory.estimate(rows=1, mode="full").total
    monkeypatch.setattr(memory, "_present", lambda device: both)
    expected = "activation_checkpointing full and batch_size 1 with grad_accumulation_steps 6"
    assert f"these fit: {expected} (about {count(both)}B)" in step_memory.advice()
    monkeypatch.setattr(memory, "_present", lambda device: both - 1)
    assert step_memory.advice().endswith("and no smaller batch_size fits: take a smaller model or shorter rows")


def test_out_of_memory_before_there_is_an_estimate_is_told_too(tmp_path):
    _, line = advice(tmp_path, first_failure=0)
    assert line.startswith("out of memory in step 1: take a smaller batch_size with more grad_accumulation_steps")


def test_other_errors_of_a_step_pass_as_they_are(tmp_path):
    class Broken(ToyModel):
        def forward(self, *args, **kwargs):
            raise RuntimeError("shapes disagree")

    with pytest.raises(RuntimeError, match="shapes disagree"):
        toy_trainer(tmp_path, model=Broken()).fit()


def test_plans_of_the_estimate_are_those_of_the_blocks():
    model = wide_gpt()
    step_memory = prepared(model, activation_checkpointing="selective")[0]
    plans = plan(step_memory._profile.blocks, "selective", None)
    assert [(vars(block)["forward"].recomputes, vars(block)["forward"].kept) for block in model.blocks] == [
        (its_plan.recomputes, its_plan.kept) for its_plan in plans
    ]

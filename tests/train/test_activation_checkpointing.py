import copy
import dataclasses
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlm import GPT, GPTConfig
from fastlm.ops import _dispatch
from fastlm.train.activation_checkpointing import (
    ActivationKnobs,
    BlockPlan,
    BlockProfile,
    Result,
    checkpoint_activations,
    find_blocks,
    keep_within_budget,
    plan,
    saved_ops,
)
from fastlm.train.distributed import disconnect
from fastlm.train.memory import profile_forward
from fastlm.train.parallelize import ParallelKnobs
from fastlm.train.precision import DevicePrecision
from tests.support.processes import run_ranks
from tests.support.toy import ToyBatch, ToyLoader, ToyModel, toy_trainer
from tests.train.test_trainer import everything

V, C, T = 29, 32, 12  # V and T as those of toy.py
PRECISIONS = {name: DevicePrecision(torch.device("cpu"), name, "as asked") for name in ("fp32", "bf16", "fp16")}
MODES = {
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "budget 0.3": {"activation_checkpointing": "selective", "activation_memory_budget": 0.3},
    "all products": {"activation_checkpointing": "selective", "activation_memory_budget": 0.7},
    "budget 1": {"activation_checkpointing": "selective", "activation_memory_budget": 1.0},
    "offload": {"offload_activations": True},
    "full, offload": {"activation_checkpointing": "full", "offload_activations": True},
}


def small_gpt(style="gpt2", num_layers=3, **changes):
    torch.manual_seed(7)
    fields = {"vocab_size": V, "sequence_length": T, "num_layers": num_layers, "num_heads": 4, "hidden_size": C}
    make = GPTConfig.llama if style == "llama" else GPTConfig
    return GPT(make(**(fields | changes)))


def packed_batch(rows=3):
    """Three documents in each row, of 5, 4 and 3 tokens."""
    tokens = torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(rows))
    targets = tokens.roll(-1, dims=1)
    targets[:, [4, 8, 11]] = -100
    positions = torch.tensor([*range(5), *range(4), *range(3)]).expand(rows, T).contiguous()
    bounds = torch.tensor([5, 9, 12])[None] + T * torch.arange(rows)[:, None]
    cu_seqlens = torch.cat([torch.zeros(1), bounds.flatten()]).to(torch.int32)
    return ToyBatch(tokens, targets, positions, cu_seqlens)


def checkpointed(model, precision="fp32", batch=None, **knobs):
    """The model after what the trainer does to it before the first step."""
    knobs = ActivationKnobs(**knobs)
    checkpoint_activations(model, knobs)
    profile = profile_forward(model, batch or packed_batch(), PRECISIONS[precision])
    keep_within_budget(model, plan(profile.blocks, knobs.activation_checkpointing, knobs.activation_memory_budget))
    return model


def forward(model, batch, precision="fp32"):
    with PRECISIONS[precision].autocast():
        return model(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, positions=batch.positions)[0]


def loss_and_gradients(model, precision="fp32"):
    """Of two batches, one after the other: what one leaves behind, the random numbers too, must not change the next."""
    torch.manual_seed(3)
    found = {}
    for rows in 3, 2:
        loss = forward(model, packed_batch(rows), precision)
        loss.backward()
        found[f"loss of {rows}"] = loss.detach()
    return found | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(params=["PyTorch's code", "compiled code"])
def code(request, monkeypatch):
    """Which code serves norms, activations and rotary: of so few elements PyTorch's, unless it is told otherwise."""
    if request.param == "compiled code":
        monkeypatch.setattr(_dispatch, "CPU_MIN_NUMEL", dict.fromkeys(_dispatch.CPU_MIN_NUMEL, 0))


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_loss_and_gradients_equal_those_without_checkpointing_to_the_bit(style, precision):
    expected = loss_and_gradients(small_gpt(style, dropout=0.2), precision)
    assert all(value.isfinite().all() for value in expected.values())
    for name, knobs in MODES.items():
        found = loss_and_gradients(checkpointed(small_gpt(style, dropout=0.2), precision, **knobs), precision)
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], name


def test_draws_of_dropout_differ_from_batch_to_batch():
    model = checkpointed(small_gpt(dropout=0.2), activation_checkpointing="full")
    losses = [forward(model, packed_batch()).item() for _ in range(2)]
    assert losses[0] != losses[1]


def test_later_trainer_undoes_the_checkpointing_of_an_earlier_one():
    model = checkpointed(small_gpt(), activation_checkpointing="full")
    checkpoint_activations(model, ActivationKnobs())
    assert not any("forward" in vars(block) for block in model.blocks)


# Memory


class Storages(TorchDispatchMode):
    """Counts the bytes of tensors made and still alive, and the calls of matrix products and attention."""

    def __init__(self, model):
        super().__init__()
        self.made, self.calls = {}, 0
        self.weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = str(op)
        self.calls += "mm" in name or ("attention" in name and "backward" not in name)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.made[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return out

    def alive(self):
        alive = {storage: num_bytes for storage, num_bytes in self.made.items() if not storage.expired()}
        return sum(num_bytes for storage, num_bytes in alive.items() if storage not in self.weights)


def kept_and_calls(model, precision="fp32"):
    """(bytes that are alive between forward and backward, calls of products and attention in backward)."""
    with Storages(model) as storages:
        loss = forward(model, packed_batch(16), precision)
    kept = storages.alive()
    with Storages(model) as storages:
        loss.backward()
    return kept, storages.calls


def kept_by_blocks(precision="fp32", style="gpt2", **knobs):
    """Bytes that twelve blocks keep: what so deep a model keeps without what one without blocks does."""
    deep = checkpointed(small_gpt(style, num_layers=12), precision, batch=packed_batch(16), **knobs)
    shallow = small_gpt(style, num_layers=1)
    shallow.blocks = nn.ModuleList()
    return kept_and_calls(deep, precision)[0] - kept_and_calls(shallow, precision)[0]


@pytest.mark.parametrize(("style", "precision"), [("gpt2", "fp32"), ("llama", "fp32"), ("gpt2", "bf16")])
def test_selective_keeps_at_most_half_and_full_less(style, precision):
    none = kept_by_blocks(precision, style)
    selective = kept_by_blocks(precision, style, **MODES["selective"])
    full = kept_by_blocks(precision, style, **MODES["full"])
    assert 0 < full < 0.2 * none
    assert full < 0.3 * none < selective <= 0.5 * none


@pytest.mark.parametrize("budget", [0.2, 0.4, 0.6, 0.8, 1.0])
def test_blocks_keep_what_the_budget_allows(budget):
    share = kept_by_blocks(activation_checkpointing="selective", activation_memory_budget=budget) / kept_by_blocks()
    assert budget - 0.1 < share <= budget


def test_selective_recomputes_no_product_if_the_budget_holds_all_results():
    def calls(**knobs):
        return kept_and_calls(checkpointed(small_gpt(), batch=packed_batch(16), **knobs))[1]

    none, full = calls(), calls(**MODES["full"])
    assert calls(**MODES["all products"]) == none
    assert calls(**MODES["budget 1"]) == none
    assert none < calls(**MODES["selective"]) < full
    assert full == none + 3 * 4  # of three blocks: qkv, attention, projection and up; nothing needs the result of down


@pytest.mark.parametrize(("dropout", "widths"), [(0.0, [3, 1, 1, 4]), (0.2, [3, 1, 1, 4, 1])])
def test_profile_lists_the_results_that_recomputation_reaches(dropout, widths):
    """qkv, attention, projection and up; the result of down is needed only where its dropout saves a mask."""
    profile = profile_forward(small_gpt(dropout=dropout, num_layers=1), packed_batch(16), PRECISIONS["fp32"])
    assert [result.num_bytes // (16 * T * C * 4) for result in profile.blocks[0].results] == widths


# Plans


PROFILES = [BlockProfile(160, 40, 10, (Result(30, 60), Result(10, 90), Result(10, 20), Result(40, 80)))] * 4


def test_plan_gives_up_the_cheapest_results_first():
    plans = plan(PROFILES, "selective", 0.5)
    assert all(1 in its_plan.kept for its_plan in plans)  # attention costs most per byte
    given_up = [PROFILES[0].results[i] for p in plans for i in range(4) if i not in p.kept]
    excess = 4 * 100 - 4 * 80
    assert sum(result.num_bytes for result in given_up) >= excess
    assert sum(result.num_bytes for result in given_up[:-1]) < excess


@pytest.mark.parametrize("budget", [None, 0.0, 0.1, 0.33, 0.5, 0.625, 0.7, 0.9, 1.0])
def test_plan_keeps_within_the_budget_or_inputs_alone(budget):
    plans = plan(PROFILES, "selective", budget)
    kept = sum(p.num_bytes(profile) for p, profile in zip(plans, PROFILES, strict=True))
    assert kept <= max(640 * (0.5 if budget is None else budget), 40)
    if budget == 1.0:
        assert plans == [BlockPlan(recomputes=False)] * 4
    if budget == 0.0:
        assert plans == [BlockPlan(recomputes=True)] * 4


def test_plan_of_none_and_full_needs_no_budget():
    assert plan(PROFILES, "none", None) == [BlockPlan(recomputes=False)] * 4
    assert plan(PROFILES, "full", None) == [BlockPlan(recomputes=True)] * 4


# Anyone's model


class Feedforward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        return x + self.down(torch.relu_(self.up(x)))


class Layers(ToyModel):
    """Names its layers as it likes, has no saved_ops, and changes a kept result in place."""

    def __init__(self, layers):
        super().__init__()
        self.input, self.output = nn.Linear(16, C), nn.Linear(C, 16)
        self.encoder = nn.ModuleDict({"h": nn.ModuleList(layers)})

    def forward(self, tokens, targets, *, cu_seqlens, positions):
        x = self.input(self.embedding(tokens))
        for layer in self.encoder["h"]:
            x = layer(x)
        losses = nn.functional.cross_entropy(
            self.head(self.output(x)).flatten(0, 1), targets.flatten(), reduction="sum"
        )
        return losses, (targets != -100).sum()


def test_blocks_are_the_longest_list_of_one_class_where_nothing_is_called_blocks():
    model = Layers([Feedforward() for _ in range(3)])
    name, blocks = find_blocks(model)
    assert (name, blocks) == ("encoder.h", list(model.encoder["h"]))
    assert torch.ops.aten.mm.default in saved_ops(model)
    assert torch.ops.fastlm.attention.default in saved_ops(model)


def test_full_checkpointing_serves_a_model_of_any_names():
    layers = [Feedforward() for _ in range(3)]
    expected = loss_and_gradients(Layers(copy.deepcopy(layers)))
    found = loss_and_gradients(checkpointed(Layers(copy.deepcopy(layers)), activation_checkpointing="full"))
    assert [key for key in expected if found[key] is not None and not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_selective_serves_blocks_that_share_their_weights(precision):
    """Autocast casts a shared weight once in the forward pass, and in each block's recomputation again."""

    class Shared(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.norm = inner, nn.LayerNorm(C)

        def forward(self, x):
            return x + self.inner.down(torch.tanh(self.inner.up(self.norm(x))))

    def model():
        torch.manual_seed(1)
        inner = Feedforward()
        return Layers([Shared(inner) for _ in range(3)])

    expected = loss_and_gradients(model(), precision)
    for budget in 0.3, 0.7:
        knobs = {"activation_checkpointing": "selective", "activation_memory_budget": budget}
        found = loss_and_gradients(checkpointed(model(), precision, **knobs), precision)
        assert [key for key in expected if found[key] is not None and not torch.equal(found[key], expected[key])] == []


def test_a_model_without_blocks_is_told_what_it_needs():
    with pytest.raises(ValueError, match=r"activation_checkpointing is full, but ToyModel has neither .* blocks"):
        checkpoint_activations(ToyModel(), ActivationKnobs(activation_checkpointing="full"))
    with pytest.raises(ValueError, match="offload_activations is set, but ToyModel"):
        checkpoint_activations(ToyModel(), ActivationKnobs(offload_activations=True))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"activation_checkpointing": "ful"}, "did you mean full"),
        ({"activation_memory_budget": 0.5}, "activation_checkpointing none, expected selective"),
        ({"activation_checkpointing": "selective", "activation_memory_budget": 1.5}, "a share from 0 to 1"),
        ({"compile": True, "offload_activations": True}, "expected one of them"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        ParallelKnobs(**knobs)


# The model stays the user's


def test_names_of_parameters_and_buffers_do_not_change():
    names = list(small_gpt().state_dict())
    model = checkpointed(small_gpt(), **MODES["selective"])
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules()] == [name for name, _ in small_gpt().named_modules()]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_with_its_own_parameters(duplicate):
    model = checkpointed(small_gpt(), **MODES["full"])
    other = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = loss_and_gradients(other)
    expected = loss_and_gradients(small_gpt())
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


# Many ranks


class PackedLoader(ToyLoader):
    def __next__(self):
        batch = super().__next__()
        rows = len(batch.tokens)
        return dataclasses.replace(packed_batch(rows), tokens=batch.tokens, targets=batch.targets)


def train_rank(out, changes):
    loader = PackedLoader(rank=int(os.environ["RANK"]), world_size=2)
    toy_trainer(out, model=small_gpt(dropout=0.0), loader=loader, **changes).fit()
    disconnect()


def test_two_ranks_with_checkpointing_equal_one_without_to_the_bit(tmp_path):
    run_ranks(2, train_rank, tmp_path / "ranks", {"steps": 3} | MODES["selective"], errors=tmp_path / "errors")
    one = {"steps": 3, "grad_accumulation_steps": 2}
    toy_trainer(tmp_path / "one", model=small_gpt(), loader=PackedLoader(), **one).fit()
    ours, theirs = everything(tmp_path / "ranks")[0], everything(tmp_path / "one")[0]
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_varlen_attention_of_pytorch_is_kept_though_nothing_has_imported_it():
    code = "from torch import nn; import fastlm.train.activation_checkpointing as it; print(it.saved_ops(nn.ReLU()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch_attn._varlen_attn" in done.stdout

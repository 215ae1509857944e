"""Anyone's module in the trainer's protocol: packed rows against the documents run alone, by plain PyTorch."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastlm.models import GPT, CausalLM, causal_lm
from fastlm.models.causal_lm import similar_lengths
from tests.support.accuracy import assert_accurate
from tests.support.packed_batch import STYLES, PackedBatch, packed_batch
from tests.support.processes import run_ranks

CONFIG = STYLES["GPT-2"]
V, C, T = CONFIG.vocab_size, 16, CONFIG.sequence_length


class Plain(nn.Module):
    """A user's own transformer: knows nothing of documents, and nothing of the trainer."""

    def __init__(self, dropout: float = 0.0, softcap: float | None = None, tied: bool = False) -> None:
        super().__init__()
        self.softcap = softcap
        self.tokens, self.places = nn.Embedding(V, C), nn.Embedding(T, C)
        self.adapter = nn.Linear(C, C)
        self.block = nn.TransformerEncoderLayer(C, 2, 2 * C, dropout, batch_first=True, norm_first=True)
        self.head = nn.Linear(C, V, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.adapter(self.tokens(x) + self.places(torch.arange(x.shape[1])))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        logits = self.head(self.block(x, src_mask=mask, is_causal=True))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def hugging_face(name: str) -> nn.Module:
    """A tiny model. Its norms are PyTorch's: Hugging Face's turn float64 into float32, and the truth would be none."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": V, "hidden_size": C, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = shape | {"intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": T}
    if name == "GPT2":
        config = transformers.GPT2Config(**shape, n_positions=T, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return transformers.GPT2LMHeadModel(config)
    if name == "Llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama))
    else:
        caps = {"final_logit_softcapping": 0.05, "attn_logit_softcapping": None}
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**llama, **caps, head_dim=8))
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(path, nn.RMSNorm(C, 1e-6))
    return model


MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "plain, tied": lambda: Plain(tied=True),
    "plain, softcap": lambda: Plain(softcap=0.5),
    "takes cu_seqlens": lambda: GPT(CONFIG),
    "GPT2": lambda: hugging_face("GPT2"),
    "Llama": lambda: hugging_face("Llama"),
    "Gemma2": lambda: hugging_face("Gemma2"),
}
WITH_HEAD = ("plain", "plain, tied", "GPT2", "Llama")


def logits_of(module: nn.Module, tokens: Tensor) -> Tensor:
    output = module(tokens)
    return output if isinstance(output, Tensor) else output.logits


def alone(module: nn.Module, batch: PackedBatch) -> Tensor:
    """The summed loss of the documents, each run by itself, in PyTorch alone."""
    losses = [
        F.cross_entropy(logits_of(module, document.tokens)[0], document.targets[0], reduction="sum")
        for document in batch.documents()
    ]
    return torch.stack(losses).sum()


def packed(module: nn.Module, batch: PackedBatch, **options: Any) -> Tensor:
    loss, num_valid = CausalLM(module, **options)(
        batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, positions=batch.positions
    )
    assert num_valid.dtype == torch.int64
    assert int(num_valid) == int((batch.targets != -100).sum())
    return loss


def assert_is_loss_alone(loss: Tensor, module: nn.Module, batch: PackedBatch) -> None:
    """By the rule of accuracy.py, against the documents run alone."""
    assert_accurate(loss, alone(module, batch), alone(copy.deepcopy(module).double(), batch), "loss")


def with_gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter."""
    module.zero_grad()
    loss.backward()
    gradients = {name: x.grad.clone() for name, x in module.named_parameters() if x.grad is not None}
    assert len(gradients) == len(list(module.parameters()))
    return {"loss": loss.detach()} | gradients


def compare(make: Callable[[], nn.Module], **options: Any) -> None:
    """The packed loss and every gradient, over several batches, with those of the documents run alone."""
    module = make()
    true_module = copy.deepcopy(module).double()
    results = []
    for batch in (packed_batch(CONFIG, seed) for seed in range(6)):
        ours = with_gradients(module, packed(module, batch, **options))
        plain = with_gradients(module, alone(module, batch))
        results.append((ours, plain, with_gradients(true_module, alone(true_module, batch))))
    for name in results[0][2]:
        assert_accurate(*(torch.stack([found[i][name] for found in results]) for i in range(3)), name)


@pytest.mark.parametrize("name", MODULES)
def test_packed_loss_and_every_gradient_equal_documents_run_alone(name):
    compare(MODULES[name])


@pytest.mark.parametrize("name", ["plain", "takes cu_seqlens", "GPT2"])
def test_joined_documents_fail_that_comparison(name):
    with pytest.raises(AssertionError, match="error"):
        compare(MODULES[name], documents="joined")


@pytest.mark.parametrize("name", ["plain", "GPT2"])
def test_joined_documents_are_rows_run_as_they_are(name):
    module, batch = MODULES[name](), packed_batch(CONFIG)
    loss, truth = (
        F.cross_entropy(logits_of(each, batch.tokens).flatten(0, 1), batch.targets.flatten(), reduction="sum")
        for each in (module, copy.deepcopy(module).double())
    )
    assert_accurate(packed(module, batch, documents="joined"), loss, truth)


@pytest.mark.parametrize("name", ["plain", "plain, softcap", "takes cu_seqlens", "GPT2"])
def test_packed_logits_are_those_of_the_documents_run_alone(name):
    module, batch = MODULES[name](), packed_batch(CONFIG)
    logits = CausalLM(module)(batch.tokens, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
    apart = [logits_of(module, document.tokens)[0] for document in batch.documents()]
    true_module = copy.deepcopy(module).double()
    truth = [logits_of(true_module, document.tokens)[0] for document in batch.documents()]
    assert_accurate(logits, torch.cat(apart).view_as(logits), torch.cat(truth).view_as(logits))


@pytest.mark.parametrize("name", MODULES)
def test_logits_are_built_only_where_something_follows_the_head(name, monkeypatch):
    used = []
    for function in ("cross_entropy", "linear_cross_entropy"):
        real = getattr(causal_lm, function)
        spy = lambda *a, real=real, function=function, **k: (used.append(function), real(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(causal_lm, function, spy)
    packed(MODULES[name](), packed_batch(CONFIG))
    assert set(used) == {"linear_cross_entropy" if name in WITH_HEAD else "cross_entropy"}


def test_a_head_that_is_used_twice_is_not_passed_by():
    class Twice(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(super().forward(x), self.head.weight.t()))

    compare(lambda: Twice(tied=True))


def scaled(logits: Tensor) -> Tensor:
    logits *= 3
    return logits


def some_never(logits: Tensor) -> Tensor:
    logits[..., 5:] = -30.0
    return logits


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": scaled,
    "softcap": lambda logits: logits.div_(2).tanh_(),
    "some never": some_never,
    "through a view": lambda logits: (logits[..., :3].zero_(), logits)[1],
}


class ThenChanged(Plain):
    """What comes after the head may begin later."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.begins = change, True

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return self.change(logits) if self.begins else logits


@pytest.mark.parametrize("name", IN_PLACE)
def test_logits_that_are_changed_in_place_give_their_own_loss_and_gradients(name):
    compare(lambda: ThenChanged(IN_PLACE[name]))


@pytest.mark.parametrize("name", [*IN_PLACE, "another tensor"])
def test_a_change_that_begins_after_the_head_was_found_is_noticed(name):
    module, batch = ThenChanged(IN_PLACE.get(name, torch.tanh)), packed_batch(CONFIG)
    model = CausalLM(module)
    arguments = {"cu_seqlens": batch.cu_seqlens, "positions": batch.positions}
    for module.begins in (False, True, True, False):
        loss, _ = model(batch.tokens, batch.targets, **arguments)
        true_module = copy.deepcopy(module).double()
        found, expected = with_gradients(module, loss), with_gradients(module, alone(module, batch))
        truth = with_gradients(true_module, alone(true_module, batch))
        for key in expected:
            assert_accurate(found[key], expected[key], truth[key], key)


def test_in_inference_mode_the_loss_is_the_same():
    for module in (Plain(), ThenChanged(scaled)):
        batch = packed_batch(CONFIG)
        with torch.inference_mode():
            loss = packed(module, batch)
        assert_is_loss_alone(loss.clone(), module, batch)


class Counting(Plain):
    """Counts its calls in a buffer that it writes to, in one that it replaces, and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.replaced = self.replaced + 1
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_looking_for_the_head_leaves_no_trace_in_the_module(training):
    module, batch = Counting().train(training), packed_batch(CONFIG)
    packed(module, batch, documents="joined")
    assert (int(module.written), int(module.replaced), module.calls) == (1, 1, 1)
    with torch.inference_mode():
        packed(module, batch, documents="joined")
    packed(module, batch, documents="joined")
    assert (int(module.written), int(module.replaced), module.calls) == (3, 3, 3)


def test_a_new_head_is_found():
    module, batch = Plain(), packed_batch(CONFIG)
    model = CausalLM(module)
    arguments = {"cu_seqlens": batch.cu_seqlens, "positions": batch.positions}
    model(batch.tokens, batch.targets, **arguments)
    module.head = nn.Linear(C, V)
    loss, _ = model(batch.tokens, batch.targets, **arguments)
    assert_is_loss_alone(loss, module, batch)


def test_under_autocast_the_loss_is_float32_and_every_parameter_has_a_gradient():
    module, batch = Plain(), packed_batch(CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        loss = packed(module, batch)
        expected = alone(module, batch)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 2**-8 * expected.item()
    with_gradients(module, loss)


def test_random_numbers_are_drawn_as_by_a_wrapper_that_has_run_before():
    module, batch = Plain(dropout=0.5), packed_batch(CONFIG)
    arguments = {"cu_seqlens": batch.cu_seqlens, "positions": batch.positions}
    model = CausalLM(module)
    model(batch.tokens, batch.targets, **arguments)
    state = torch.get_rng_state()
    loss, _ = model(batch.tokens, batch.targets, **arguments)
    torch.set_rng_state(state)
    resumed, _ = CausalLM(module)(batch.tokens, batch.targets, **arguments)
    assert torch.equal(loss, resumed)


@pytest.mark.parametrize("name", ["plain", "plain, softcap"])
def test_a_batch_without_a_target_that_counts_has_loss_and_gradients_0(name):
    module, batch = MODULES[name](), packed_batch(CONFIG)
    batch.targets[:] = -100
    found = with_gradients(module, packed(module, batch))
    assert all(not value.any() for value in found.values())


def test_a_compiled_module_gives_the_same_losses_and_logits():
    module, batch = Plain(), packed_batch(CONFIG)
    arguments = {"cu_seqlens": batch.cu_seqlens, "positions": batch.positions}
    model = CausalLM(module)
    expected = model(batch.tokens, batch.targets, **arguments)[0], model(batch.tokens, **arguments)
    model.compile(backend="eager")
    assert model._compiled_call_impl is None, "the wrapper reads boundaries on the host: it is not to be traced"
    for _ in range(2):
        found = model(batch.tokens, batch.targets, **arguments)[0], model(batch.tokens, **arguments)
        for ours, other in zip(found, expected, strict=True):
            assert torch.equal(ours, other)


@pytest.mark.parametrize("compiled", ["by the wrapper", "before"])
def test_a_compiled_module_that_changes_its_logits_in_place_gives_their_loss(compiled):
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(V, C), nn.Linear(C, V)

        def forward(self, x: Tensor) -> Tensor:
            return IN_PLACE["through a view"](self.head(self.tokens(x)))

    module, batch = Small(), packed_batch(CONFIG)
    plain = copy.deepcopy(module)
    model = CausalLM(torch.compile(module, backend="aot_eager") if compiled == "before" else module)
    if compiled == "by the wrapper":
        model.compile(backend="aot_eager")
    call, forward = module._compiled_call_impl, vars(model.module).get("forward")
    loss, _ = model(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
    assert_is_loss_alone(loss, plain, batch)
    assert (module._compiled_call_impl, vars(model.module).get("forward")) == (call, forward), "it is compiled no more"


# The wrapper


@pytest.mark.parametrize("name", ["plain, tied", "GPT2"])
def test_parameters_keep_their_names_and_a_checkpoint_fits_the_bare_module(name):
    module, other = MODULES[name](), MODULES[name]()
    model = CausalLM(module)
    assert [(n, id(x)) for n, x in model.named_parameters()] == [(n, id(x)) for n, x in module.named_parameters()]
    saved = model.state_dict()
    assert list(saved) == list(module.state_dict())
    other.load_state_dict(saved)
    nn.Sequential(CausalLM(other)).load_state_dict(nn.Sequential(model).state_dict())
    CausalLM(other).load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), module.parameters(), strict=True))
    heads = [other.head, other.tokens] if name != "GPT2" else [other.lm_head, other.transformer.wte]
    assert heads[0].weight is heads[1].weight


def test_a_state_that_does_not_fit_is_refused():
    model = CausalLM(Plain())
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        model.load_state_dict({name: x for name, x in state.items() if name != "head.bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*stray"):
        model.load_state_dict(state | {"stray": torch.zeros(1)})


def test_the_wrapper_has_what_the_module_has_and_can_be_copied():
    class OwnCopy(Plain):
        def parameter_groups(self) -> list[str]:
            return ["the module's own"]

        def __deepcopy__(self, memo: dict) -> "OwnCopy":
            other = OwnCopy()
            other.load_state_dict(self.state_dict())
            return other

    module = OwnCopy()
    model = copy.deepcopy(CausalLM(module))
    assert type(model) is CausalLM
    assert model.parameter_groups() == ["the module's own"]
    assert model.block is model.module.block
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = model.nothing_of_the_kind
    batch = packed_batch(CONFIG)
    assert torch.equal(packed(model.module, batch), packed(module, batch))


# Sub-batches


@given(st.lists(st.integers(1, 64), max_size=60))
def test_sub_batches_hold_every_document_once_and_little_padding(lengths):
    documents = [(10 * n, length) for n, length in enumerate(lengths)]
    groups = similar_lengths(documents, 64)
    assert sorted(document for group in groups for document in group) == sorted(documents)
    assert len(groups) <= 1 + math.log2(max(lengths, default=1))
    cells = sum(len(group) * max(length for _, length in group) for group in groups)
    assert cells < 2 * sum(lengths) + 64


def test_a_few_short_documents_are_padded_rather_than_run_apart():
    long, short = [(0, 64), (64, 60)], [(124, 3), (127, 1)]
    assert similar_lengths([*short, *long], 128) == [[*long, *short]]
    assert similar_lengths([*short, *long], 127) == [long, short]


def train_sharded(out: str) -> None:
    """One rank of two, whose documents make different numbers of sub-batches: its loss and gradients into a file."""
    from torch.distributed.fsdp import fully_shard

    from fastlm.train.distributed import connect, disconnect

    rank = connect().rank
    torch.manual_seed(0)
    module = Plain()
    plain, true_module, model = copy.deepcopy(module), copy.deepcopy(module).double(), CausalLM(module)
    fully_shard(module.block)
    fully_shard(model)
    batch = packed_batch(CONFIG, rank)
    if rank:
        batch.cu_seqlens = torch.tensor([0, 16, 32], dtype=torch.int32)
    for wrapper in (model, CausalLM(plain), CausalLM(true_module)):
        loss, _ = wrapper(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
        loss.backward()
    for ours, other, true in zip(model.parameters(), plain.parameters(), true_module.parameters(), strict=True):
        for replicated in other, true:
            torch.distributed.all_reduce(replicated.grad, op=torch.distributed.ReduceOp.AVG)
        assert_accurate(ours.grad.full_tensor(), other.grad, true.grad)
    disconnect()
    Path(f"{out}-{rank}").touch()


@pytest.mark.soak  # two processes
def test_ranks_of_a_sharded_module_run_as_many_sub_batches(tmp_path):
    run_ranks(2, train_sharded, str(tmp_path / "done"), errors=tmp_path / "errors")
    assert len(list(tmp_path.glob("done-*"))) == 2


# Refusals


class Gives(nn.Module):
    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.output = output

    def forward(self, tokens: Tensor) -> Any:
        return self.output(tokens)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (
            lambda tokens: torch.zeros(len(tokens), 1, V),
            ValueError,
            r"gave \(2, 1, 83\) for tokens \(2, 16\), expected",
        ),
        (lambda tokens: {"loss": 1.0}, TypeError, "the module gave dict, expected logits"),
        (lambda tokens: (None, tokens), TypeError, "the module gave NoneType, expected logits"),
    ],
)
def test_a_module_without_logits_for_every_token_is_refused(output, error, message):
    tokens = packed_batch(CONFIG).tokens
    with pytest.raises(error, match=message):
        CausalLM(Gives(output))(tokens, tokens)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"module is of type function, expected a torch\.nn\.Module"):
        CausalLM(F.relu)
    with pytest.raises(ValueError, match="documents is 'mixed', expected 'apart' or 'joined'"):
        CausalLM(Plain(), documents="mixed")
    model, tokens = CausalLM(Plain()), packed_batch(CONFIG).tokens
    with pytest.raises(ValueError, match=r"targets have shape \(2, 15\), tokens \(2, 16\)"):
        model(tokens, tokens[:, 1:])
    for bounds in ([0, 5, 31], [1, 32], [0, 9, 5, 32]):
        with pytest.raises(ValueError, match="expected boundaries that grow from 0 to the 32 tokens"):
            model(tokens, tokens, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))

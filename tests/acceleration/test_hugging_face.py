"""Accelerated Hugging Face models against themselves: loss, every gradient, logits, generation, compilation."""

import copy

import pytest
import torch

import fastlm
from tests.support.accuracy import assert_accurate

pytest.importorskip("transformers")

import transformers

from fastlm.acceleration.verification import InFloat64
from tests.support.hugging_face import (
    ENCODERS,
    FAMILIES,
    GROUPED,
    MASKED,
    SIZES,
    batches,
    loss_and_gradients,
    made,
    relative,
)
from tests.support.processes import start

pytestmark = pytest.mark.usefixtures("compiled_small_calls")
DECODERS = [name for name in FAMILIES if name not in ENCODERS]
GENERATED = 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_accelerated_loss_and_gradients_match_the_original(name, dtype):
    model = made(name, dtype)
    ours = fastlm.accelerate(copy.deepcopy(model))
    truth = copy.deepcopy(model).double()
    for kind, batch in batches(name):
        with InFloat64():
            expected = loss_and_gradients(truth, batch)
        theirs, found = loss_and_gradients(model, batch), loss_and_gradients(ours, batch)
        assert found.keys() == theirs.keys() == expected.keys()
        assert found["loss"].dtype == theirs["loss"].dtype
        found, theirs, truths = (in_one(relative(results, expected)) for results in (found, theirs, expected))
        assert_accurate(found.to(dtype), theirs.to(dtype), truths, f"{name}, {kind}: loss and gradients")


def in_one(results):
    return torch.cat([x.flatten() for x in results.values()])


@pytest.mark.parametrize("name", FAMILIES)
def test_accelerated_logits_match_the_original_in_evaluation(name):
    model = made(name).eval()
    ours = fastlm.accelerate(copy.deepcopy(model))
    truth = copy.deepcopy(model).double()
    for kind, batch in batches(name):
        with torch.no_grad():
            with InFloat64():
                expected = truth(**batch).logits
            theirs, found = model(**batch).logits, ours(**batch).logits
        counts = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        assert_accurate(found[counts], theirs[counts], expected[counts], f"{name}, {kind}")


def recurrent_gemma():
    """A model whose recurrence carries to the tokens what attention gives for padding before them."""
    sizes = {"lru_width": 64, "attention_window_size": 8, "num_hidden_layers": 3}
    return transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**{**GROUPED, **sizes}))


@pytest.mark.parametrize("make", [lambda: made("llama"), recurrent_gemma], ids=["llama", "recurrent_gemma"])
def test_left_padding_gives_what_it_gives_in_the_original(make):
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    _, batch = list(batches("llama"))[2]
    truth, ours = copy.deepcopy(model).double(), fastlm.accelerate(copy.deepcopy(model))
    assert ours.config._attn_implementation == "fastlm"
    with torch.no_grad():
        with InFloat64():
            expected = truth(**batch).logits
        assert_accurate(ours(**batch).logits, model(**batch).logits, expected)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MASKED])
def test_accelerated_generation_gives_the_same_tokens(name, cache):
    model = made(name).eval()
    ours = fastlm.accelerate(copy.deepcopy(model))
    prompts = torch.randint(3, 99, (3, 9))
    padded = torch.ones_like(prompts)
    padded[1, :2] = padded[2, :5] = 0
    for mask in (torch.ones_like(prompts), padded):
        options = {
            "max_new_tokens": GENERATED,
            "do_sample": False,
            "attention_mask": mask,
            "cache_implementation": cache,
        }
        assert torch.equal(ours.generate(prompts, **options), model.generate(prompts, **options))


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents_equal_separate_ones(name):
    model = fastlm.accelerate(made(name).eval())
    lengths = (5, 1, 7)
    documents = [torch.randint(3, 99, (1, length)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    bounds = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    boundaries = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    with torch.no_grad():
        separate = torch.cat([model(document).logits for document in documents], dim=1)
        for form in ({}, boundaries):
            packed = model(torch.cat(documents, dim=1), position_ids=positions, use_cache=False, **form).logits
            torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)


def opt():
    """A model that does not tell its mask where position_ids start again."""
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (opt, {"use_cache": False}),
        (lambda: made("llama"), {"use_cache": True}),
        (lambda: made("mistral"), {"use_cache": False, "attention_mask": torch.ones(2, 13, dtype=torch.long)}),
    ],
    ids=["OPT", "beside a cache", "beside a mask"],
)
def test_packed_documents_do_not_see_each_other_where_the_mask_was_not_told(make, options):
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    truth, ours = copy.deepcopy(model).double(), fastlm.accelerate(copy.deepcopy(model))
    lengths = (5, 1, 7)
    documents = [torch.randint(3, 99, (2, length)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        with InFloat64():
            expected = torch.cat([truth(document).logits for document in documents], dim=1)
        separate = torch.cat([model(document).logits for document in documents], dim=1)
        packed = ours(torch.cat(documents, dim=1), position_ids=positions.expand(2, -1), **options).logits
    assert_accurate(packed, separate, expected)


def test_compiled_programs_refuse_documents_that_their_mask_was_not_told():
    torch._dynamo.reset()
    compiled = torch.compile(fastlm.accelerate(opt().eval()), fullgraph=True, backend="eager")
    tokens, positions = torch.randint(3, 99, (1, 9)), torch.arange(9)[None]
    compiled(tokens, position_ids=positions, use_cache=False)
    with pytest.raises(RuntimeError, match="position_ids start again"):
        compiled(tokens, position_ids=positions % 5, use_cache=False)


def test_attention_that_may_read_its_mask_stays_the_model_s_own():
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**GROUPED)).eval()  # adds to its mask
    tokens = torch.randint(3, 99, (2, 9))
    with torch.no_grad():
        expected = model(tokens).logits
        found = fastlm.accelerate(model)(tokens).logits
    torch.testing.assert_close(found, expected)
    assert [row.detail.split(",")[0] for row in fastlm.accelerated(model).skipped if not row.name] == [
        "it does not support flash_attention_2"
    ]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_accelerated_models_compile_without_a_graph_break(name):
    torch._dynamo.reset()
    model = fastlm.accelerate(made(name))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _, batch in list(batches(name))[:2]:
        expected, found = loss_and_gradients(model, batch), loss_and_gradients(compiled, batch)
        torch.testing.assert_close(found["loss"], expected["loss"])


class Wrapper(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_restore_leaves_a_model_as_it_was(name):
    model, (_, batch) = made(name), next(iter(batches(name)))
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append("hook"))
    before = loss_and_gradients(model, batch)
    text, classes, state = repr(model), [type(module) for module in model.modules()], list(model.state_dict())
    attributes = [{**vars(module)} for module in model.modules()]
    fastlm.accelerate(model)
    assert repr(model) == text
    loss_and_gradients(model, batch)
    fastlm.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert [vars(module) for module in model.modules()] == attributes
    assert (repr(model), list(model.state_dict())) == (text, state)
    after = loss_and_gradients(model, batch)
    assert all(torch.equal(after[key], x) for key, x in before.items())
    assert calls == ["hook"] * 3


@pytest.mark.parametrize("accelerated_inside", [True, False])
def test_a_wrapper_reports_and_restores_the_model_inside(accelerated_inside):
    model = made("llama")
    wrapper = Wrapper(fastlm.accelerate(model) if accelerated_inside else model)
    if not accelerated_inside:
        fastlm.accelerate(wrapper)
    assert model.config._attn_implementation == "fastlm"
    names = {row.name for row in fastlm.accelerated(wrapper).swapped}
    assert {"inner", "inner.model.layers.0.mlp", "inner.model.norm"} <= names
    fastlm.restore(wrapper if accelerated_inside else model)
    assert model.config._attn_implementation == "sdpa"
    assert fastlm.accelerated(model).rows == ()


def test_a_second_call_reports_what_the_first_swapped_inside():
    wrapper = Wrapper(fastlm.accelerate(made("llama")))
    before = {row.name for row in fastlm.accelerated(wrapper).swapped}
    fastlm.accelerate(wrapper)
    assert {row.name for row in fastlm.accelerated(wrapper).swapped} == before


def ask_in_another_process(path, tokens):
    model = torch.load(path, weights_only=False)
    with torch.no_grad():
        torch.save(model(tokens).logits, path)


def test_a_pickled_model_runs_in_another_process(tmp_path):
    model = fastlm.accelerate(made("llama").eval())
    tokens, path = torch.randint(3, 99, (2, 7)), tmp_path / "model.pt"
    torch.save(model, path)
    process = start(ask_in_another_process, path, tokens)
    process.join(60)
    assert process.exitcode == 0
    with torch.no_grad():
        torch.testing.assert_close(torch.load(path), model(tokens).logits)

"""Attention modules of Hugging Face rotate by apply_rotary where that is the same, and nobody else's calls change."""

import copy
from collections import Counter

import pytest
import torch

pytest.importorskip("transformers")

from transformers.models.llama import modeling_llama

import fastlm
from fastlm.acceleration import rotary
from fastlm.acceleration.rotary import doubles, rotary_form
from fastlm.acceleration.verification import InFloat64
from fastlm.ops import _dispatch
from tests.support.accuracy import assert_accurate
from tests.support.hugging_face import batches, loss_and_gradients, made, relative

HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}


@pytest.fixture
def rotations(monkeypatch):
    """How many calls ran ours, however small they are."""
    counts: Counter[str] = Counter()

    def count(*args, **kwargs):
        counts["ours"] += 1
        return fastlm.ops.apply_rotary(*args, **kwargs)

    rotary_form("apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # kept: no trial is counted
    monkeypatch.setattr(_dispatch, "CPU_MIN_NUMEL", dict.fromkeys(_dispatch.CPU_MIN_NUMEL, 0))
    monkeypatch.setattr(rotary, "apply_rotary", count)
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "changes"), [("llama", {}), ("phi3", HALF), ("gemma3", {}), ("olmo2", {})])
def test_loss_and_gradients_match_the_original(name, changes, dtype, rotations):
    model = made(name, dtype, **changes)
    ours = fastlm.accelerate(copy.deepcopy(model))
    for kind, batch in batches(name):
        rotations.clear()
        with InFloat64():
            truth = loss_and_gradients(copy.deepcopy(model).double(), batch)
        results = [loss_and_gradients(each, batch) for each in (ours, model)] + [truth]
        assert rotations["ours"] == 2, f"of two layers, {kind}"
        found, theirs, expected = (torch.cat([x.flatten() for x in relative(r, truth).values()]) for r in results)
        assert_accurate(found.to(dtype), theirs.to(dtype), expected, f"{name}, {kind}")


def test_a_default_that_is_written_out_is_the_same_call(rotations):
    model = fastlm.accelerate(made("modernbert"))
    rotations.clear()
    model(**next(iter(batches("modernbert")))[1])
    assert rotations["ours"] == 2


def test_other_models_keep_their_function_and_restore_gives_the_class_back(rotations):
    before = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    other, model = made("llama"), fastlm.accelerate(made("llama"))
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward) == before
    _, batch = next(iter(batches("llama")))
    other(**batch)
    assert not rotations
    fastlm.restore(model)(**batch)
    assert not rotations
    assert type(model.model.layers[0].self_attn) is modeling_llama.LlamaAttention


def test_a_function_that_somebody_puts_into_the_file_is_the_one_that_runs(monkeypatch, rotations):
    model = made("llama").eval()
    ours, (_, batch) = fastlm.accelerate(copy.deepcopy(model)), next(iter(batches("llama")))
    expected = model(**batch).logits
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    changed = model(**batch).logits
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(ours(**batch).logits, changed)


def test_dtypes_that_a_model_does_not_bring_together_run_its_own_code(rotations):
    """Under autocast q is bfloat16 and cos float32, whose product is float32."""
    model, (_, batch) = made("llama"), next(iter(batches("llama")))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fastlm.accelerate(copy.deepcopy(model))(**batch).loss, model(**batch).loss
    assert not rotations
    with InFloat64():
        truth = copy.deepcopy(model).double()(**batch).loss
    assert_accurate(found.detach(), expected.detach(), truth.detach(), "loss under autocast")


UNTRIED = {
    "angles that learn": lambda q, k, cos, sin: (q, k, cos.requires_grad_(), sin.requires_grad_()),
    "a sine of another dtype": lambda q, k, cos, sin: (*(x.bfloat16() for x in (q, k, cos)), sin),
    "keys of one row": lambda q, k, cos, sin: (q, k[:1], cos, sin),
}


@pytest.mark.parametrize("change", UNTRIED.values(), ids=UNTRIED)
def test_calls_that_were_not_tried_run_the_function_of_the_file(change, rotations):
    theirs = modeling_llama.apply_rotary_pos_emb
    form = rotary_form(theirs.__name__, theirs)
    half = torch.randn(2, 1, 5, 4)
    given = change(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), *half.repeat(1, 1, 1, 2))
    expected = theirs(*given)
    torch.testing.assert_close(rotary.rotation(modeling_llama, theirs, form)(*given), expected)
    assert not rotations
    as_tried = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), *half.repeat(1, 1, 1, 2)
    rotary.rotation(modeling_llama, theirs, form)(*as_tried)
    assert rotations["ours"] == 1


def test_generation_gives_the_same_tokens(rotations):
    model = made("llama").eval()
    ours, prompts = fastlm.accelerate(copy.deepcopy(model)), torch.randint(3, 99, (2, 7))
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompts)}
    assert torch.equal(ours.generate(prompts, **options), model.generate(prompts, **options))
    assert rotations["ours"] == 2 * 5


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def whole(q, k, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def in_float32(q, k, cos, sin):
    return tuple(y.to(q.dtype) for y in whole(q.float(), k.float(), cos.float(), sin.float()))


def partial(q, k, cos, sin):
    R = cos.shape[-1]
    rotated = whole(q[..., :R], k[..., :R], cos, sin)
    return tuple(torch.cat((y, x[..., R:]), dim=-1) for y, x in zip(rotated, (q, k), strict=True))


@pytest.mark.parametrize(
    ("function", "form"), [(whole, (False, False)), (in_float32, (False, True)), (partial, (True, False))]
)
def test_rotations_are_recognised_by_what_they_compute(function, form):
    assert rotary_form("f", function) == ("f", *form)


@pytest.mark.parametrize("is_partial", [True, False])
def test_angles_of_some_features_are_supported_where_they_were_tried(is_partial, rotations):
    q, k, cos, sin = rotary.tried(rows=1, R=4)
    assert rotary.is_supported(q, k, cos, sin, rotary.RotaryForm("f", is_partial, False)) == is_partial


def backwards(q, k, cos, sin):
    return whole(q, k, cos, -sin)


def of_q_alone(q, k, cos, sin):
    return whole(q, k, cos, sin)[0], k


def scaled(q, k, cos, sin):
    return tuple(1.001 * y for y in whole(q, k, cos, sin))


def interleaved(q, k, cos, sin):
    return whole(q.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), k, cos, sin)


def of_single_angles(q, k, cos, sin):
    return whole(q, k, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))


def without_gradients(q, k, cos, sin):
    return tuple(y.detach() for y in whole(q, k, cos, sin))


@pytest.mark.parametrize(
    "function", [backwards, of_q_alone, scaled, interleaved, of_single_angles, without_gradients, rotate_half]
)
def test_functions_that_compute_something_else_are_not_recognised(function):
    assert rotary_form("f", function) is None


class OtherRotary(modeling_llama.LlamaRotaryEmbedding):
    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return cos, torch.cat((sin[..., ::2], sin[..., 1::2]), dim=-1)


def test_angles_that_do_not_come_twice_are_refused_and_so_are_unknown_ones():
    model = made("llama")
    assert doubles(model.model.rotary_emb)
    layer = fastlm.accelerate(copy.deepcopy(model.model.layers[0]))
    model.model.rotary_emb.__class__ = OtherRotary
    for where, reason in (
        (fastlm.accelerate(model), "OtherRotary gives other angles"),
        (layer, "no module of the model"),
    ):
        details = [row.detail for row in fastlm.accelerated(where).rows if row.name.endswith("self_attn")]
        assert details
        assert all(reason in detail for detail in details)

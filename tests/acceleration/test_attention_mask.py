"""The mask of attn_implementation "fastlm" says what transformers' own table says, in boundaries wherever it can."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from fastlm.acceleration.attention_mask import attention_mask, decode, encode, is_encoded
from fastlm.acceleration.hugging_face_attention import attention_forward, table_of

B, T, H, D = 3, 9, 2, 8
PATTERNS = {
    "causal": causal_mask_function,
    "bidirectional": bidirectional_mask_function,
    "sliding": sliding_window_causal_mask_function(3),
    "sliding both ways": sliding_window_bidirectional_mask_function(2),
}
PADDINGS = {
    "none": [(0, T)] * B,
    "right": [(0, T), (0, 4), (0, 1)],
    "left": [(0, T), (5, T), (8, T)],
    "both sides": [(2, 7), (0, 3), (4, 5)],
    "an empty row": [(0, T), (0, 0), (1, T)],
}


def valid_tokens(spans, length=T):
    places = torch.arange(length)
    return torch.stack([(places >= start) & (places < end) for start, end in spans])


def dense_table(**arguments):
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(**arguments, **skips)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_boundaries_show_each_token_what_the_table_shows(pattern, padding):
    valid = valid_tokens(PADDINGS[padding])
    arguments = {
        "batch_size": B,
        "q_length": T,
        "kv_length": T,
        "mask_function": PATTERNS[pattern],
        "attention_mask": valid,
    }
    mask = attention_mask(**arguments)
    assert is_encoded(mask)
    assert (mask.shape[0] == 1) == (padding == "none")
    q, k = torch.empty(B, H, T, D), torch.empty(B, H, T, D)
    found, expected = table_of(mask, q, k), dense_table(**arguments)
    real = valid[:, None, :, None].expand(B, 1, T, T)
    assert torch.equal(found[real], expected[real])
    assert not (found & real & ~valid[:, None, None, :]).any(), "a token sees padding"
    if pattern in ("causal", "sliding"):
        before = (valid.cumsum(-1) == 0)[:, None, :, None].expand(B, 1, T, T) & valid.any(-1)[:, None, None, None]
        assert torch.equal(found[before], expected[before]), "padding before the tokens sees what it should not"


@pytest.mark.parametrize("pattern", ["causal", "sliding"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_queries_behind_a_cache_see_what_the_table_shows(pattern, padding):
    new = 3
    valid = valid_tokens(PADDINGS[padding])
    arguments = {
        "batch_size": B,
        "q_length": new,
        "kv_length": T,
        "q_offset": T - new,
        "mask_function": PATTERNS[pattern],
    }
    arguments["attention_mask"] = valid
    mask = attention_mask(**arguments)
    assert is_encoded(mask)
    found = table_of(mask, torch.empty(B, H, new, D), torch.empty(B, H, T, D))
    real = valid[:, None, -new:, None].expand(B, 1, new, T)
    assert torch.equal(found[real], dense_table(**arguments)[real])


@pytest.mark.parametrize("offset", [4, torch.tensor(4)], ids=["int", "tensor"])
def test_slots_of_a_static_cache_that_nobody_filled_are_not_seen(offset):
    arguments = {
        "batch_size": B,
        "q_length": 2,
        "kv_length": T,
        "q_offset": offset,
        "mask_function": causal_mask_function,
    }
    mask = attention_mask(**arguments)
    assert is_encoded(mask)
    found = table_of(mask, torch.empty(B, H, 2, D), torch.empty(B, H, T, D))
    assert torch.equal(found, dense_table(**arguments))


def test_packed_documents_become_boundaries():
    document_of = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 3], [0] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    function = and_masks(causal_mask_function, packed_sequence_mask_function(document_of))
    arguments = {"batch_size": B, "q_length": T, "kv_length": T, "mask_function": function}
    mask = attention_mask(**arguments)
    assert decode(mask).cu_seqlens_q.tolist() == [0, 3, 4, 8, 9, 18, 19, 27]
    found = table_of(mask, torch.empty(B, H, T, D), torch.empty(B, H, T, D))
    assert torch.equal(found, dense_table(**arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]] * B).bool()},
        {"mask_function": chunked_causal_mask_function(4, torch.zeros(B, dtype=torch.int64))},
        {"mask_function": and_masks(causal_mask_function, lambda b, h, q, k: k != 2)},
    ],
    ids=["hole", "chunks", "function of the user"],
)
def test_what_boundaries_cannot_say_stays_a_table(arguments):
    arguments = {"batch_size": B, "q_length": T, "kv_length": T, **arguments}
    mask = attention_mask(**arguments)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, dense_table(**arguments))


@pytest.mark.parametrize("window", [(None, None), (None, 0), (0, 0), (3, None), (4, 2)])
def test_a_mask_says_what_was_put_into_it(window):
    bounds = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7])
    for given in (bounds, (None, None)):
        found = decode(encode((*given, window) if False else _bounds(*given, window), "cpu"))
        assert found.window == window
        for a, b in zip(found[:2], given, strict=True):
            assert a is b if b is None else torch.equal(a, b.int())


def _bounds(q, k, window):
    from fastlm.acceleration.attention_mask import Boundaries

    return Boundaries(q, k, window)


def test_compiled_masks_with_a_hole_raise():
    compiled = torch.compile(attention_mask, fullgraph=True, backend="aot_eager")
    hole = torch.ones(B, T, dtype=torch.bool)
    compiled(batch_size=B, q_length=T, kv_length=T, attention_mask=hole)
    hole[1, 4] = False
    with pytest.raises(RuntimeError, match="has a hole"):
        compiled(batch_size=B, q_length=T, kv_length=T, attention_mask=hole)


def layer(groups=1, is_causal=True):
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, is_causal
    return module


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_table_and_boundaries_give_the_same_attention(softcap, sinks):
    q = torch.randn(B, 2 * H, T, D)
    k, v = torch.randn(2, B, H, T, D)
    valid = valid_tokens(PADDINGS["both sides"])
    arguments = {"batch_size": B, "q_length": T, "kv_length": T, "attention_mask": valid}
    options = {"softcap": softcap, "s_aux": torch.randn(2 * H) if sinks else None}
    by_boundaries, _ = attention_forward(layer(2), q, k, v, attention_mask(**arguments), **options)
    by_table, _ = attention_forward(layer(2), q, k, v, dense_table(**arguments), **options)
    torch.testing.assert_close(by_boundaries[valid], by_table[valid])


def test_values_narrower_than_keys_are_served():
    q, k = torch.randn(2, B, H, T, D)
    v = torch.randn(B, H, T, D - 3)
    out, _ = attention_forward(layer(), q, k, v, None)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, T])}, "cu_seq_lens_k is missing"),
        ({"cu_seq_lens_k": torch.tensor([0, T])}, "cu_seq_lens_q is missing"),
        ({"cu_seq_lens_q": torch.tensor([0, T]), "cu_seq_lens_k": torch.tensor([0, T])}, "batch of 3 rows"),
        ({"output_attentions": True}, "attention weights are never built"),
    ],
)
def test_ambiguous_calls_raise(arguments, message):
    q, k, v = torch.randn(3, B, H, T, D)
    with pytest.raises(ValueError, match=message):
        attention_forward(layer(), q, k, v, None, **arguments)

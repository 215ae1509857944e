"""Classic PyTorch under accelerate: torch.nn's transformer layers with every usual mask, and models written by hand.

Outputs, losses and gradients are those of the model before, at padding too.
"""

import copy
import gc
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm
from fastlm.nn import _masks
from fastlm.nn.attention import MultiheadAttention
from fastlm.ops import _dispatch
from tests.support.accuracy import assert_accurate

B, T, TK, C, H, HIDDEN, V = 3, 7, 6, 24, 4, 40, 29
FUTURE = torch.ones(T, T, dtype=torch.bool).triu(1)
ADDED = nn.Transformer.generate_square_subsequent_mask(T)  # float, -inf
LENGTHS = {"right": [(0, T), (0, 4), (0, 1)], "left": [(0, T), (3, T), (6, T)], "mixed": [(2, 5), (0, 3), (1, T)]}


def padding(kind, length=T):
    """(B, length) bool, True at padding."""
    places = torch.arange(length)
    return torch.stack([~((places >= start) & (places < end)) for start, end in LENGTHS[kind]])


def added(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


MASKS = {
    "none": {},
    "causal, boolean": {"mask": FUTURE},
    "causal, added": {"mask": ADDED},
    "causal, announced": {"mask": ADDED, "is_causal": True},
    "nothing hidden": {"mask": torch.zeros(T, T, dtype=torch.bool)},
    "padding right": {"padding": padding("right")},
    "padding left, added": {"padding": added(padding("left"))},
    "padding mixed": {"padding": padding("mixed")},
    "an empty row": {"padding": torch.tensor([[False] * T, [True] * T, [False] * T])},
    "no padding": {"padding": torch.zeros(B, T, dtype=torch.bool)},
    "padding with a hole": {"padding": torch.tensor([[False] * T, [False, True, True] + [False] * 4, [False] * T])},
    "causal and padding right": {"mask": FUTURE, "padding": padding("right")},
    "causal, announced, and padding left": {"mask": ADDED, "padding": added(padding("left")), "is_causal": True},
    "causal and padding mixed": {"mask": ADDED, "padding": added(padding("mixed"))},
    "a window": {"mask": FUTURE | torch.ones(T, T, dtype=torch.bool).tril(-3)},
}
INPUTS = ("x", "memory")  # which models take by place; all else are masks and tokens
BY_INTERPRETER = ["none", "causal, added", "padding mixed", "causal and padding mixed"]


@pytest.fixture(params=["plain", "compiled", pytest.param("interpreted", marks=pytest.mark.interpreted)])
def implementation(request):
    """What runs: a plain CPU as it decides, the compiled code also of small tensors, or Triton's kernels."""
    if request.param == "compiled":
        request.getfixturevalue("compiled_small_calls")
    return request.param


def randomised(model):
    """The model with norms and biases that count."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def in_dtype(arguments, dtype):
    """The arguments with floating tensors in dtype."""
    return {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def assert_model_is_the_same(model, arguments, result=lambda out: out):
    """Accelerated, model gives the same result and the same gradient for each input and parameter."""
    ours = fastlm.accelerate(copy.deepcopy(model))
    truth = copy.deepcopy(model).double()
    *results, expected = (
        result_and_gradients(each, in_dtype(arguments, dtype), result)
        for each, dtype in ((ours, torch.float32), (model, torch.float32), (truth, torch.float64))
    )
    scales = [max(float(x.abs().max()), 1e-30) for x in expected]
    in_one = [
        torch.cat([(x / scale).flatten() for x, scale in zip(r, scales, strict=True)]) for r in (*results, expected)
    ]
    assert_accurate(*in_one, "result and gradients")
    return ours


def result_and_gradients(model, arguments, result):
    inputs = {name: x.clone().requires_grad_() for name, x in arguments.items() if name in INPUTS}
    masks = {name: x for name, x in arguments.items() if name not in INPUTS}
    out = result(model(*inputs.values(), **masks))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    gradients = torch.autograd.grad(out, [*inputs.values(), *model.parameters()], upstream, allow_unused=True)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def layer_arguments(kind, names, batch_first):
    """Of an encoder or decoder layer: inputs and the masks under the names that the layer has for them."""
    x = torch.randn(B, T, C)
    masks = {names[name]: value for name, value in MASKS[kind].items()}
    return {"x": x if batch_first else x.transpose(0, 1).contiguous(), **masks}


ENCODER = {"mask": "src_mask", "padding": "src_key_padding_mask", "is_causal": "is_causal"}
DECODER = {"mask": "tgt_mask", "padding": "tgt_key_padding_mask", "is_causal": "tgt_is_causal"}
OPTIONS = [
    {"norm_first": norm_first, "batch_first": batch_first, "activation": activation, "bias": norm_first or batch_first}
    for norm_first, batch_first, activation in itertools.product([False, True], [False, True], ["relu", "gelu"])
]


def options_for(implementation, kind):
    """All options where the code is ours and a call is cheap, else a few that vary with the mask."""
    if implementation == "compiled":
        return OPTIONS
    first = list(MASKS).index(kind)
    if implementation == "plain":
        return OPTIONS[first % 4 :: 4]
    return [OPTIONS[first % len(OPTIONS)]] if kind in BY_INTERPRETER else []


@pytest.mark.parametrize("kind", MASKS)
def test_encoder_layers_and_their_gradients_stay_the_same(kind, implementation):
    for options in options_for(implementation, kind):
        layer = randomised(nn.TransformerEncoderLayer(C, H, HIDDEN, dropout=0.0, **options))
        for training in (True, False) if implementation == "plain" else (True,):
            assert_model_is_the_same(layer.train(training), layer_arguments(kind, ENCODER, options["batch_first"]))


@pytest.mark.parametrize("kind", MASKS)
def test_decoder_layers_and_their_gradients_stay_the_same(kind, implementation):
    for options in options_for(implementation, kind):
        layer = randomised(nn.TransformerDecoderLayer(C, H, HIDDEN, dropout=0.0, **options))
        arguments = layer_arguments(kind, DECODER, options["batch_first"])
        memory = torch.randn(B, TK, C)
        arguments["memory"] = memory if options["batch_first"] else memory.transpose(0, 1).contiguous()
        arguments["memory_key_padding_mask"] = padding("right", TK)
        assert_model_is_the_same(layer, arguments)


@pytest.mark.parametrize("kind", MASKS)
def test_encoder_layers_in_evaluation_without_gradients_stay_the_same(kind, implementation):
    """There PyTorch's own layer takes a path that runs none of its modules."""
    for options in options_for(implementation, kind):
        layer = randomised(nn.TransformerEncoderLayer(C, H, HIDDEN, **options)).eval()
        arguments = layer_arguments(kind, ENCODER, options["batch_first"])
        x = arguments.pop("x")
        expected = copy.deepcopy(layer).double()(x.double(), **in_dtype(arguments, torch.float64)).detach()
        with torch.no_grad():
            theirs, found = layer(x, **arguments), fastlm.accelerate(copy.deepcopy(layer))(x, **arguments)
        counts = ~theirs.isnan()  # their path gives NaN to a query that sees no key
        assert not found[counts].isnan().any()
        assert_accurate(found[counts], theirs[counts], expected[counts], str(options))


@pytest.mark.parametrize("kind", ["padding right", "causal, added", "padding mixed", "causal and padding right"])
@pytest.mark.parametrize("nested", [True, False])
def test_encoders_in_evaluation_stay_the_same(kind, nested, implementation):
    """Of padding on the right PyTorch's encoder makes nested tensors, and zeros of what it gives there."""
    layer = nn.TransformerEncoderLayer(C, H, HIDDEN, batch_first=True)
    encoder = randomised(nn.TransformerEncoder(layer, 1, nn.LayerNorm(C), enable_nested_tensor=nested)).eval()
    ours = fastlm.accelerate(copy.deepcopy(encoder))
    arguments = layer_arguments(kind, {**ENCODER, "mask": "mask"}, True)
    x = arguments.pop("x")
    with torch.no_grad():
        expected = copy.deepcopy(encoder).double()(x.double(), **in_dtype(arguments, torch.float64))
        assert_accurate(ours(x, **arguments), encoder(x, **arguments), expected)


# Models


def positions(length, width):
    """The sinusoidal table of Vaswani et al. 2017."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(V, C)
        self.register_buffer("table", positions(T, C))
        self.dropout = nn.Dropout(0.0)

    def forward(self, tokens):
        return self.dropout(self.tokens(tokens) * math.sqrt(C) + self.table[: tokens.shape[-1]])


class Translation(nn.Module):
    """As tutorials write it: sequence first, an all-False source mask, a float causal mask, padding three times."""

    def __init__(self, **options):
        super().__init__()
        self.source, self.target = Embedding(), Embedding()
        self.transformer = nn.Transformer(C, H, 1, 1, HIDDEN, dropout=0.0, **options)
        self.generator = nn.Linear(C, V)

    def forward(self, source, target):
        hidden_source, hidden_target = source == 0, target == 0
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x, y = self.source(source), self.target(target)
        if not self.transformer.batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        out = self.transformer(
            x,
            y,
            src_mask=torch.zeros(source.shape[1], source.shape[1], dtype=torch.bool),
            tgt_mask=causal.to(x.dtype),
            src_key_padding_mask=hidden_source,
            tgt_key_padding_mask=torch.zeros(target.shape, dtype=x.dtype).masked_fill(hidden_target, -torch.inf),
            memory_key_padding_mask=hidden_source,
        )
        return self.generator(out)


class Heads(nn.Module):
    """Multi-head attention by products, masked_fill and softmax."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(C, C) for _ in range(4))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, memory, mask):
        q, k, v = (
            layer(y).view(y.shape[0], -1, H, C // H).transpose(1, 2)
            for layer, y in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        scores = (q @ k.transpose(-2, -1) / math.sqrt(C // H)).masked_fill(mask == 0, -1e9)
        return self.out((self.dropout(F.softmax(scores, dim=-1)) @ v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm1, self.norm2 = Heads(), nn.LayerNorm(C), nn.LayerNorm(C)
        self.feed_forward = nn.Sequential(nn.Linear(C, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, C))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, mask):
        x = self.norm1(x + self.dropout(self.attention(x, x, mask)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class WrittenByHand(nn.Module):
    """A GPT of tutorials."""

    def __init__(self):
        super().__init__()
        self.embedding, self.blocks, self.head = Embedding(), nn.ModuleList([Block(), Block()]), nn.Linear(C, V)
        self.loss = nn.CrossEntropyLoss(ignore_index=0)

    def forward(self, tokens):
        x, mask = self.embedding(tokens), torch.ones(T, T).tril()
        for block in self.blocks:
            x = block(x, mask)
        return self.loss(self.head(x[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class OfEncoderLayers(nn.Module):
    """A GPT of nn.TransformerEncoderLayer, each given the float -inf mask that nobody announces."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head, self.loss = Embedding(), nn.Linear(C, V), nn.CrossEntropyLoss()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(C, H, HIDDEN, 0.0, batch_first=True, norm_first=True) for _ in range(2)
        )

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, ADDED.to(x.dtype))
        return self.loss(self.head(x).flatten(0, 1), tokens.flatten())


def tokens_with_padding(length):
    return torch.randint(1, V, (B, length)).masked_fill(padding("right", length), 0)


@pytest.mark.parametrize("options", [{}, {"batch_first": True, "norm_first": True, "activation": "gelu"}])
def test_a_translation_model_trains_the_same(options, implementation):
    if implementation == "interpreted" and options:
        pytest.skip("interpreted kernels take seconds, and the other options run them too")
    target = tokens_with_padding(T)

    def loss(out):
        logits = out if options else out.transpose(0, 1)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=0)

    model = randomised(Translation(**options))
    ours = assert_model_is_the_same(model, {"source": tokens_with_padding(TK), "target": target}, loss)
    assert len(fastlm.accelerated(ours).swapped) == 12  # 2 layers, 3 attentions, 5 norms in them and 2 behind
    assert not fastlm.accelerated(ours).skipped


@pytest.mark.parametrize("make", [WrittenByHand, OfEncoderLayers])
def test_a_language_model_of_tutorials_trains_the_same(make, implementation):
    ours = assert_model_is_the_same(randomised(make()), {"tokens": tokens_with_padding(T)})
    assert {row.family for row in fastlm.accelerated(ours).swapped} >= {"norms", "loss"}


# What else must hold


READABLE = [kind for kind in MASKS if kind not in ("padding with a hole", "a window")]


@pytest.mark.parametrize("kind", READABLE)
def test_no_mask_that_can_be_read_reaches_pytorchs_attention(kind, kernel_device, monkeypatch):
    monkeypatch.setattr(F, "multi_head_attention_forward", None)
    layer = fastlm.accelerate(nn.TransformerEncoderLayer(C, H, HIDDEN, batch_first=True)).to(kernel_device)
    arguments = layer_arguments(kind, ENCODER, True)
    x, *masks = (a.to(kernel_device) if isinstance(a, torch.Tensor) else a for a in arguments.values())
    layer(x, **dict(zip(list(arguments)[1:], masks, strict=True)))


@pytest.mark.parametrize(("tokens", "said"), [(63, "torch (padding on"), (64, "cpp (a CPU")])
def test_padding_on_a_cpu_is_skipped_where_that_is_faster(tokens, said, monkeypatch):
    monkeypatch.setattr(_dispatch, "num_threads", lambda: 1)
    attention, x = MultiheadAttention(256, 4), torch.randn(tokens, 4, 256)
    mask = torch.arange(tokens) >= torch.tensor([[tokens], [tokens // 2], [tokens], [1]])
    lines = _dispatch.explain(attention, x, x, x, mask, need_weights=False).splitlines()
    assert lines[0].startswith(f"padded attention: {said}")
    assert (lines[1:] != []) == (said[:3] == "cpp")


@pytest.mark.parametrize(("tokens", "is_one_call"), [(191, True), (192, False)])
def test_encoder_layers_in_evaluation_on_a_cpu_are_one_call_where_that_is_faster(tokens, is_one_call, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda x, *_: calls.append(x) or x)
    layer = fastlm.accelerate(nn.TransformerEncoderLayer(C, H, HIDDEN, batch_first=True)).eval()
    with torch.no_grad():
        layer(torch.randn(B, tokens, C))
    assert len(calls) == is_one_call


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_of_everything_leaves_what_pytorch_leaves(norm_first, implementation):
    """With a probability of 1 no draw decides, so that training can be compared."""
    layer = randomised(nn.TransformerDecoderLayer(C, H, HIDDEN, dropout=1.0, batch_first=True, norm_first=norm_first))
    memory = torch.randn(B, TK, C)
    assert_model_is_the_same(layer, {"x": torch.randn(B, T, C), "memory": memory, "tgt_mask": ADDED})


def test_dropout_draws_in_training_only(implementation):
    layer = fastlm.accelerate(nn.TransformerEncoderLayer(C, H, HIDDEN, dropout=0.5, norm_first=True))
    x, options = torch.randn(T, B, C), {"src_mask": ADDED, "src_key_padding_mask": added(padding("mixed"))}
    assert not torch.equal(layer(x, **options), layer(x, **options))
    layer.eval()
    assert torch.equal(layer(x, **options), layer(x, **options))


@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_under_autocast_keep_their_dtypes(norm_first, implementation):
    """The residual stream stays float32, and the branches are bfloat16."""
    layer = randomised(nn.TransformerEncoderLayer(C, H, HIDDEN, 0.0, batch_first=True, norm_first=norm_first))
    ours, truth, x = fastlm.accelerate(copy.deepcopy(layer)), copy.deepcopy(layer).double(), torch.randn(B, T, C)
    masks = {"src_mask": FUTURE, "src_key_padding_mask": padding("mixed")}
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = (each(x, **masks) for each in (ours, layer))
    assert_accurate(found, theirs, truth(x.double(), **masks).detach())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_of_every_part_are_called(register, norm_first):
    layer = fastlm.accelerate(nn.TransformerEncoderLayer(C, H, HIDDEN, 0.0, norm_first=norm_first))
    called = []
    for name, module in layer.named_modules():
        if name and not name.startswith("self_attn."):  # PyTorch too calls no module for the output's product
            getattr(module, register)(lambda *_, name=name: called.append(name))
    layer(torch.randn(T, B, C, requires_grad=True)).sum().backward()
    expected = {"self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"}
    assert set(called) == expected


def test_hooks_on_all_modules_are_called():
    layer = fastlm.accelerate(nn.TransformerEncoderLayer(C, H, HIDDEN, 0.0))
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        layer(torch.randn(T, B, C))
    finally:
        handle.remove()
    assert layer.norm1 in called
    assert layer.dropout1 in called


def test_layers_with_blocks_of_their_own_keep_them():
    class Weighted(nn.TransformerEncoderLayer):
        def _sa_block(self, *args, **kwargs):
            return 2 * super()._sa_block(*args, **kwargs)

    layer = Weighted(C, H, HIDDEN, 0.0)
    plain = nn.TransformerEncoderLayer(C, H, HIDDEN, 0.0)
    model = nn.ModuleList([copy.deepcopy(layer), copy.deepcopy(plain)])
    fastlm.accelerate(model)
    assert type(model[0]) is Weighted
    assert [row.detail for row in fastlm.accelerated(model).skipped] == ["its _sa_block is not PyTorch's"]
    model[1]._sa_block = lambda x, *_, **__: torch.zeros_like(x)
    plain._sa_block = model[1]._sa_block
    x = torch.randn(T, B, C)
    torch.testing.assert_close(model[1](x), plain(x))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        (nn.TransformerEncoderLayer, "_ff_block"),
        (nn.TransformerDecoderLayer, "_mha_block"),
        (nn.TransformerEncoderLayer, "forward"),
    ],
)
def test_methods_put_on_pytorchs_class_run(theirs, name, when, monkeypatch):
    layer, x = theirs(C, H, HIDDEN, 0.0), torch.randn(T, B, C)
    written = getattr(theirs, name)

    def patched(self, *args, **named):
        return 2 * written(self, *args, **named)

    if when == "after":
        fastlm.accelerate(layer)
    monkeypatch.setattr(theirs, name, patched)
    fastlm.accelerate(layer)
    inputs = (x,) if theirs is nn.TransformerEncoderLayer else (x, x)
    found = layer(*inputs)
    torch.testing.assert_close(found, fastlm.restore(layer)(*inputs))
    monkeypatch.undo()
    assert not torch.allclose(found, layer(*inputs))


def test_other_modules_in_a_layer_are_called():
    layer = nn.TransformerEncoderLayer(C, H, HIDDEN, 0.0)
    layer.norm1, layer.dropout2, layer.activation = nn.RMSNorm(C), nn.Identity(), nn.SiLU()
    assert_model_is_the_same(layer, {"x": torch.randn(T, B, C)})


def test_restore_and_state_dict_of_a_classic_model():
    model = Translation()
    classes, state = [type(module) for module in model.modules()], model.state_dict()
    fastlm.accelerate(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in state.items())
    assert {type(module).__name__ for module in model.modules()} == {made.__name__ for made in classes}
    fastlm.restore(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("kind", ["causal, announced", "padding mixed"])
@pytest.mark.usefixtures("compiled_small_calls")
def test_classic_layers_compile_without_a_graph_break(kind):
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(C, H, HIDDEN, 0.0, batch_first=True)
    arguments = layer_arguments(kind, ENCODER, True)
    x = arguments.pop("x")
    compiled = torch.compile(fastlm.accelerate(copy.deepcopy(layer)), fullgraph=True, backend="aot_eager")
    for found, expected in zip(*(steps(model, x, arguments) for model in (compiled, layer)), strict=True):
        torch.testing.assert_close(found, expected)


def steps(model, x, arguments):
    y = model(x, **arguments)
    return [y, *torch.autograd.grad(y.sum(), model.parameters())]


def test_causality_announced_without_a_mask_is_what_it_was():
    """An error with gradients; PyTorch's path for evaluation without them pays no heed."""
    layer = fastlm.accelerate(nn.TransformerEncoderLayer(C, H, HIDDEN, batch_first=True)).eval()
    x = torch.randn(1, _dispatch.ENCODER_LAYER_MIN_SEQLEN, C)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        layer(x, is_causal=True)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, is_causal=True), layer(x))


# Reading masks


def test_masks_that_need_a_gradient_get_it():
    ours = MultiheadAttention(C, H, batch_first=True)
    x, mask = torch.randn(B, T, C), ADDED.clone().requires_grad_()
    ours(x, x, x, need_weights=False, attn_mask=mask)[0].square().sum().backward()
    assert mask.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("attn_mask", "key_padding_mask"),
    [
        (ADDED.masked_fill(FUTURE, -1e4), None),
        (ADDED + 0.5, None),
        (FUTURE.T, None),
        (FUTURE.expand(B * H, T, T), None),
        (None, padding("right").float()),
        (None, MASKS["padding with a hole"]["padding"]),
    ],
    ids=["finite", "shifted", "the past", "of each head", "one added", "hole"],
)
def test_masks_that_hide_anything_else_are_not_read(attn_mask, key_padding_mask):
    assert _masks.read(attn_mask, key_padding_mask, T, T) is None


def test_masks_on_a_gpu_are_read_once_until_they_change():
    """A tensor on the meta device stands in for one that a CPU cannot look at."""
    mask, read = torch.zeros(T, device="meta"), []

    def reader(mask, size):
        read.append(size)
        return len(read)

    assert [_masks.kept(mask, reader, size) for size in (7, 7, 8, 7)] == [1, 1, 2, 1]
    mask.add_(1)
    assert _masks.kept(mask, reader, 7) == 3
    num_kept = len(_masks.READ)
    del mask
    gc.collect()
    assert len(_masks.READ) == num_kept - 1


def test_what_an_evaluation_read_serves_training():
    mask = torch.zeros(T, device="meta")
    with torch.inference_mode():
        assert not _masks.kept(mask, torch.zeros_like).is_inference()


def test_masks_on_a_cpu_are_read_at_every_call():
    """NumPy may have written to them."""
    mask, attention = ADDED.clone(), MultiheadAttention(C, H, batch_first=True)
    x = torch.randn(B, T, C)
    assert _masks.read(mask, None, T, T) == _masks.Masking(causal=True)
    mask.numpy()[:] = 0
    assert _masks.read(mask, None, T, T) == _masks.Masking()
    torch.testing.assert_close(
        attention(x, x, x, need_weights=False, attn_mask=mask)[0], attention(x, x, x, need_weights=False)[0]
    )


def test_encoder_layers_in_evaluation_keep_the_dtype_of_pytorchs_path():
    layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True).eval()
    ours, x = fastlm.accelerate(copy.deepcopy(layer)), torch.randn(2, 200, 64)
    padding = torch.zeros(2, 200).masked_fill(torch.arange(200) >= 150, float("-inf"))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x, src_key_padding_mask=padding.double()), layer(x, src_key_padding_mask=padding.double())
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == layer(x).dtype

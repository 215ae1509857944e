"""GPTConfig and what GPT tells a trainer; the numbers it computes are compared in test_training_equality.py."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlm.models import GPT, GPTConfig, gpt
from tests.support.accuracy import assert_accurate
from tests.support.packed_batch import STYLES, packed_batch
from tests.support.plain_gpt import PlainGPT

pytestmark = pytest.mark.usefixtures("kernels_of_few_logits")
SMALL = {"vocab_size": 70, "sequence_length": 16, "num_layers": 2, "num_heads": 2, "hidden_size": 16}


@pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
def test_config_survives_json(config):
    assert GPTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads 3 does not divide hidden_size 16"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"num_heads": 16, "position": "rotary"}, "rotary positions need an even head size, it is 1"),
        ({"norm": "batch_norm"}, "norm is 'batch_norm', expected one of layer_norm, rms_norm"),
        ({"num_layers": 0}, "num_layers is 0, expected at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"rope_base": 0.0}, "rope_base is 0.0, expected a number above 0"),
        ({"head_dim": 0}, "head_dim is 0, expected at least 1, or None"),
        ({"head_dim": 3, "position": "rotary"}, "rotary positions need an even head size, it is 3"),
        ({"sliding_window": 0}, "sliding_window is 0, expected at least 1, or None"),
    ],
)
def test_config_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**(SMALL | change))


@pytest.mark.parametrize("style", STYLES)
def test_loss_of_meta_tokens_is_a_meta_scalar_with_gradients(style):
    with torch.device("meta"):
        model, tokens = GPT(STYLES[style]), torch.zeros(2, 16, dtype=torch.int64)
        loss, _ = model(tokens, tokens)
        loss.backward()
    assert loss.is_meta
    assert all(parameter.grad.is_meta for parameter in model.parameters())


def test_rows_longer_than_the_model_takes_are_refused():
    model = GPT(GPTConfig(**SMALL))
    with pytest.raises(ValueError, match="17 tokens in a row, the model takes at most 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets have shape \(1, 3\), tokens \(1, 4\)"):
        model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wrong", [70, 127, 128, -1])
def test_ids_in_the_padding_of_the_vocabulary_are_refused_as_any_beyond_it(wrong, dtype):
    model = GPT(GPTConfig(**SMALL)).to(dtype)
    assert (model.config.vocab_size, model.config.padded_vocab_size) == (70, 128)
    tokens = torch.arange(66, 70)[None]
    beyond = tokens.clone()
    beyond[0, 2] = wrong
    model(tokens, tokens)[0].backward()
    for call in (
        lambda: model(beyond),
        lambda: model(beyond, tokens, cu_seqlens=torch.tensor([0, 1, 4], dtype=torch.int32)),
        lambda: model.next_token_logits(beyond, model.new_cache(1)),
        lambda: model(tokens, beyond),
    ):
        with pytest.raises(IndexError, match="out of"):
            call()


@pytest.mark.parametrize("style", STYLES)
def test_logits_match_plain_pytorch_and_hold_no_padding(style):
    config = STYLES[style]
    ours, plain, truth = GPT(config), PlainGPT(config), PlainGPT(config).double()
    for model in (plain, truth):
        model.load_state_dict(ours.state_dict())
    batch = packed_batch(config)
    rows = torch.tensor([0, 16, 32], dtype=torch.int32), torch.arange(16).expand(2, 16)
    logits = ours(batch.tokens)
    assert logits.shape == (2, 16, config.vocab_size)
    assert_accurate(logits, plain(batch.tokens, None, *rows), truth(batch.tokens, None, *rows))


def test_gpt2_style_starts_at_the_loss_of_a_uniform_guess_and_scales_residual_weights():
    config = GPTConfig(vocab_size=70, sequence_length=16, num_layers=8, num_heads=2, hidden_size=128)
    torch.manual_seed(0)
    model = GPT(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("attention.projection.weight", "mlp.down.weight"))
            expected = 0.02 / math.sqrt(16) if residual else 0.02
            spread = expected / math.sqrt(2 * parameter.numel())  # standard error of a standard deviation
            assert abs(parameter.std().item() - expected) < 5 * spread, name
    assert all(bool((x == 0).all()) for name, x in model.named_parameters() if name.endswith("bias"))


def test_flops_count_the_products_of_a_gpt2():
    config = GPTConfig(vocab_size=50257, sequence_length=8, num_layers=1, num_heads=2, hidden_size=16)
    with torch.device("meta"):
        model = GPT(config)
    matrices = 12 * 16 * 16 + 50304 * 16
    assert model.flops_per_token(8) == 6 * matrices + 12 * 16 * 8


def test_a_model_on_meta_has_every_parameter_and_imports_no_compiler():
    model, config = GPT.on_meta(GPTConfig(**SMALL)), "GPTConfig(num_layers=1)"
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {name: x.shape for name, x in model.named_parameters()} == {
        name: x.shape for name, x in GPT(GPTConfig(**SMALL)).named_parameters()
    }
    code = f"import sys; from fastlm import GPT, GPTConfig; GPT.on_meta({config}); print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_flops_count_heads_that_are_wider_than_the_model():
    config = GPTConfig.llama(vocab_size=64, num_layers=1, num_heads=3, num_kv_heads=1, head_dim=32, hidden_size=16)
    with torch.device("meta"):
        model = GPT(config)
    matrices = 16 * (5 + 3) * 32 + 3 * 16 * config.mlp_size + 64 * 16
    assert model.flops_per_token(8) == 6 * matrices + 12 * 3 * 32 * 8


@pytest.mark.parametrize("style", STYLES)
def test_flop_counter_counts_a_step_as_plain_pytorchs(style):
    config = STYLES[style]
    tokens, rows = torch.zeros(2, 16, dtype=torch.int64), torch.tensor([0, 16, 32], dtype=torch.int32)
    models = {GPT(config): {}, PlainGPT(config): {"positions": torch.arange(16).expand(2, 16)}}
    counts = []
    for model, positions in models.items():
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens, cu_seqlens=rows, **positions)[0].backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("style", STYLES)
def test_parameter_groups_hold_every_parameter_once_and_decay_matrices_alone(style):
    model = GPT(STYLES[style])
    model.final_norm.weight.requires_grad_(False)
    groups = {group["name"]: group for group in model.parameter_groups()}
    listed = [id(x) for group in groups.values() for x in group["params"]]
    assert sorted(listed) == sorted(id(x) for x in model.parameters() if x.requires_grad)
    assert {name: group["weight_decay_scale"] for name, group in groups.items()} == {
        "matrices": 1.0,
        "embeddings": 1.0,
        "vectors": 0.0,
    }
    assert all(x.dim() == 1 for x in groups["vectors"]["params"])


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, tokens: model.hidden(tokens).square().sum(),
        lambda model, tokens: model.logits(model.hidden(tokens)).square().sum(),
        lambda model, tokens: model(tokens).square().sum(),
        lambda model, tokens: model(tokens, tokens)[0],
        lambda model, tokens: model.hidden(tokens).square().sum() + model(tokens, tokens)[0] + model(tokens, tokens)[0],
    ],
    ids=["hidden", "logits of hidden", "logits", "loss", "hidden and loss twice"],
)
def test_tied_embedding_gets_a_dense_gradient_equal_to_plain_pytorchs(loss):
    model = GPT(GPTConfig(**SMALL))
    weight, tokens = model.token_embedding.weight, torch.randint(70, (2, 16))

    loss(model, tokens).backward()
    assert weight.grad.layout == torch.strided
    found, weight.grad = weight.grad, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", lambda indices, given, *_, **__: given[indices])
        loss(model, tokens).backward()
    torch.testing.assert_close(found, weight.grad)


def test_dropout_changes_training_and_not_evaluation():
    model = GPT(GPTConfig(**SMALL, dropout=0.5))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("style", STYLES)
def test_model_compiles_in_one_graph(style):
    model, batch = GPT(STYLES[style]), packed_batch(STYLES[style])
    call = {"cu_seqlens": batch.cu_seqlens, "positions": batch.positions}
    eager, _ = model(batch.tokens, batch.targets, **call)
    compiled, num_valid = torch.compile(model, fullgraph=True, backend="aot_eager")(batch.tokens, batch.targets, **call)
    assert num_valid.item() == 29
    truth = PlainGPT(STYLES[style]).double()
    truth.load_state_dict(model.state_dict())
    exact, _ = truth(batch.tokens, batch.targets, **call)
    gradients = [
        torch.autograd.grad(loss, list(source.parameters()))
        for loss, source in ((compiled, model), (eager, model), (exact, truth))
    ]
    for results in zip(*gradients, strict=True):
        assert_accurate(*results)


@pytest.mark.parametrize("config", [GPTConfig, GPTConfig.llama], ids=["gpt2", "llama"])
def test_norms_write_what_autocast_would_make_of_their_results(config, monkeypatch):
    """The products that follow would cast it anyway, so no bit differs."""
    model = GPT(config(vocab_size=64, sequence_length=16, num_layers=2, num_heads=2, hidden_size=32))
    tokens = torch.randint(64, (2, 16))

    def step() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss_sum, _ = model(tokens, tokens)
        return [loss_sum, *torch.autograd.grad(loss_sum, list(model.parameters()))]

    direct = step()
    monkeypatch.setattr(gpt, "autocast_dtype", lambda x: None)
    assert all(map(torch.equal, direct, step()))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(4, dtype=torch.long), ValueError, r"tokens have shape \(4,\), expected \(B, T\)"),
        (torch.zeros(1, 4), TypeError, "tokens are torch.float32, expected torch.int64: token ids"),
    ],
)
def test_gpt_rejects_what_are_no_rows_of_token_ids(tokens, error, message):
    with pytest.raises(error, match=message):
        GPT(GPTConfig(vocab_size=64, sequence_length=16, num_layers=1, num_heads=2, hidden_size=32))(tokens)


@pytest.mark.parametrize("value", ["2", 2.0, True])
def test_config_rejects_a_count_that_is_no_integer(value):
    with pytest.raises(TypeError, match=f"GPTConfig: num_layers is {value!r}, expected an integer of at least 1"):
        GPTConfig(num_layers=value)

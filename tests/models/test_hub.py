"""Directories of Hugging Face against transformers' own models: logits, loss, gradients, and weights to the bit."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.generation import generate
from fastlm.models import GPT, gpt, hub
from tests.support.accuracy import assert_accurate
from tests.support.packed_batch import STYLES

transformers = pytest.importorskip("transformers")

V, T = 83, 24
SHAPE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"bos_token_id": None, "eos_token_id": None}
LLAMA = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": T}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", SHAPE | {"n_positions": T}),
    "GPT-2, untied": ("GPT2", SHAPE | {"n_positions": T, "n_inner": 40, "tie_word_embeddings": False}),
    "Llama": ("Llama", LLAMA),
    "Llama, tied, biases, wide heads": (
        "Llama",
        LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "Mistral, window": ("Mistral", LLAMA | {"sliding_window": 5}),
    "Mistral": ("Mistral", LLAMA | {"sliding_window": None, "num_key_value_heads": 4}),
    "Qwen2": ("Qwen2", LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "Qwen3": ("Qwen3", LLAMA | {"head_dim": 16, "tie_word_embeddings": True}),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
EXPORTABLE = {name: config for name, config in STYLES.items() if not name.startswith("sin")} | {
    "GPT-2, untied": dataclasses.replace(STYLES["GPT-2"], tie_embeddings=False, dropout=0.1),
    "Llama, biases": dataclasses.replace(STYLES["Llama"], bias=True, tie_embeddings=True),
    "Mistral": dataclasses.replace(STYLES["Llama"], sliding_window=3, rope_base=5e5),
    "Qwen2": dataclasses.replace(STYLES["Llama"], qkv_bias=True, head_dim=16, intermediate_size=40),
}
EXPORTABLE.pop("sliding window, bias of qkv")


def randomised(model: Any) -> Any:
    """Every parameter drawn so that none may stand in another's place."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model


def hugging_face(name: str) -> Any:
    kind, values = CONFIGS[name]
    model = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM"))
    return randomised(model(getattr(transformers, f"{kind}Config")(**values))).eval()


def saved(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def in_float64(model: Any) -> Any:
    """A copy whose norms are PyTorch's: those of transformers turn float64 into float32, and it would be no truth."""
    truth = copy.deepcopy(model).double()
    for path, module in list(truth.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            truth.set_submodule(path, norm)
    return truth


def assert_logits(ours: GPT, theirs: Any, tokens: Tensor) -> None:
    assert_accurate(ours(tokens), theirs(tokens).logits, in_float64(theirs)(tokens).logits)


def of_transformers(model: Any, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Logits, summed loss, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    return {"logits": logits.detach(), "loss": loss.detach()} | {n: x.grad.clone() for n, x in model.named_parameters()}


def of_fastlm(model: GPT, tokens: Tensor, targets: Tensor, directory: Path) -> dict[str, Tensor]:
    """The same, gradients under the names that transformers has for them: they are written as if they were weights."""
    model.zero_grad()
    loss, _ = model(tokens, targets)
    loss.backward()
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for ours, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
            ours.copy_(parameter.grad)
    gradients.save_pretrained(directory)
    return {"logits": model(tokens).detach(), "loss": loss.detach()} | tensors_of(directory)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {
        name: x for file in directory.glob("*.safetensors") for name, x in safetensors.torch.load_file(file).items()
    }


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a directory."""
    tensors = tensors_of(directory)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / hub.WEIGHTS_FILE)


def configure(directory: Path, **values: Any) -> None:
    """Change keys of config.json; ... leaves one out."""
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@EVERY
def test_logits_loss_and_every_gradient_equal_those_of_transformers(name, tmp_path):
    plain = hugging_face(name)
    ours, truth = GPT.from_pretrained(saved(plain, tmp_path / "theirs")), in_float64(plain)
    results = []
    for seed in range(4):
        tokens, targets = torch.randint(V, (2, 3, T), generator=torch.Generator().manual_seed(seed))
        results.append(
            (
                of_fastlm(ours, tokens, targets, tmp_path / f"gradients-{seed}"),
                of_transformers(plain, tokens, targets),
                of_transformers(truth, tokens, targets),
            )
        )
    assert results[0][0].keys() == results[0][1].keys() == results[0][2].keys()
    for key in results[0][0]:
        assert_accurate(*(torch.stack([found[i][key] for found in results]) for i in range(3)), key)


@pytest.mark.parametrize("base", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("size", [8, 64, 96, 128, 256])
def test_rotary_angles_have_the_bits_of_transformers(size, base):
    """At the end of a long text an error of one bit in a frequency is one of many in the angle."""
    rope = {"rope_type": "default", "rope_theta": base}
    config = transformers.LlamaConfig(head_dim=size, rope_parameters=rope)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    positions = torch.tensor([0, 1, 4095, 131071])
    angles = gpt._wave_angles(positions, size, base)
    for ours, expected in zip((angles.cos(), angles.sin()), theirs(torch.ones(1), positions[None]), strict=True):
        assert torch.equal(torch.cat([ours, ours], -1)[None], expected)


@EVERY
def test_what_is_read_and_written_again_is_the_same_to_the_bit(name, tmp_path):
    theirs = hugging_face(name)
    GPT.from_pretrained(saved(theirs, tmp_path / "theirs")).save_pretrained(tmp_path / "ours")
    was, now = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert was.keys() == now.keys()
    assert all(was[key].dtype == now[key].dtype and torch.equal(was[key], now[key]) for key in was)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    if name == "Mistral":
        assert type(again) is transformers.LlamaForCausalLM, "without a window there is no difference"
        return
    assert type(again) is type(theirs)
    untold = {"n_inner", "_name_or_path"}
    configs = [{k: v for k, v in model.config.to_dict().items() if k not in untold} for model in (theirs, again)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXPORTABLE)
def test_a_model_comes_back_to_the_bit_and_transformers_finds_nothing_missing(name, dtype, tmp_path):
    model = randomised(GPT(EXPORTABLE[name])).to(dtype).eval()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    dropout = model.config.dropout if name.startswith("GPT-2") else 0.0
    assert again.config == dataclasses.replace(model.config, dropout=dropout)
    V = model.config.vocab_size
    for (key, was), now in zip(model.named_parameters(), again.parameters(), strict=True):
        rows = slice(V) if key in ("token_embedding.weight", "head.weight") else slice(None)
        assert was.dtype == now.dtype
        assert torch.equal(was[rows], now[rows]), key
        assert not now[rows.stop :].any() or rows.stop is None, "rows that pad the vocabulary hold something"
    theirs, facts = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(facts.values()), facts
    assert theirs.dtype == dtype
    tokens = torch.randint(V, (2, 16))
    assert_logits(model, theirs, tokens)


def test_a_gpt2_without_biases_is_written_with_biases_of_0(tmp_path):
    model = randomised(GPT(dataclasses.replace(STYLES["GPT-2"], bias=False))).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(V, (2, 16))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for ours in model, GPT.from_pretrained(tmp_path):
        assert_logits(ours, theirs, tokens)


@EVERY
def test_generated_tokens_equal_those_of_transformers(name, tmp_path):
    """With the caches of both, token by token."""
    theirs = hugging_face(name)
    ours, tokens = GPT.from_pretrained(saved(theirs, tmp_path)), torch.randint(V, (2, 7))
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=T - 7, do_sample=False, pad_token_id=0
    )
    assert torch.equal(generate(ours, tokens, T - 7, temperature=0), expected)


@pytest.mark.parametrize("name", ["GPT-2", "Llama, tied, biases, wide heads"])
def test_shards_hold_at_most_so_many_bytes_and_load_in_both(name, tmp_path):
    theirs = hugging_face(name)
    whole = GPT.from_pretrained(saved(theirs, tmp_path / "whole"))
    by_transformers = GPT.from_pretrained(saved(theirs, tmp_path / "theirs", max_shard_size="20KB"))
    whole.save_pretrained(tmp_path / "ours", max_shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = {file: safetensors.torch.load_file(tmp_path / "ours" / file) for file in files}
    for tensors in sizes.values():
        assert sum(x.nbytes for x in tensors.values()) <= 20_000 or len(tensors) == 1
    index = json.loads((tmp_path / "ours" / hub.INDEX_FILE).read_text())
    assert index["weight_map"] == {key: file for file, tensors in sizes.items() for key in tensors}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors_of(tmp_path / "whole").values())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(map(torch.equal, again.state_dict().values(), theirs.state_dict().values()))
    for other in by_transformers, GPT.from_pretrained(tmp_path / "ours"):
        assert all(map(torch.equal, other.parameters(), whole.parameters()))


# Names


@pytest.mark.parametrize("name", ["GPT-2", "Llama, tied, biases, wide heads"])
def test_tied_weights_load_under_either_name_and_are_never_lost(name, tmp_path):
    model = GPT.from_pretrained(saved(hugging_face(name), tmp_path))
    embedding = "transformer.wte.weight" if name == "GPT-2" else "model.embed_tokens.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    both = GPT.from_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(embedding))
    for other in both, GPT.from_pretrained(tmp_path):
        assert other.config == model.config
        assert other.head_weight is other.token_embedding.weight
        assert torch.equal(other.head_weight, model.head_weight)


def test_two_different_weights_that_config_json_calls_tied_stay_two_as_in_transformers(tmp_path):
    saved(hugging_face("Llama"), tmp_path)
    configure(tmp_path, tie_word_embeddings=True)
    model, tokens = GPT.from_pretrained(tmp_path), torch.randint(V, (1, 8))
    assert not model.config.tie_embeddings
    assert_logits(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tokens)


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3"])
def test_files_of_the_bare_model_and_of_older_versions_load(name, tmp_path):
    theirs = hugging_face(name)
    whole = GPT.from_pretrained(saved(theirs, tmp_path / "whole"))
    bare = saved(theirs.transformer if name == "GPT-2" else theirs.model, tmp_path / "bare")
    made = "h.0.attn.bias" if name == "GPT-2" else "layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(bare, lambda tensors: tensors.update({made: torch.ones(1)}))
    assert not any(key.startswith(("model.", "transformer.")) for key in tensors_of(bare))
    assert all(map(torch.equal, GPT.from_pretrained(bare).parameters(), whole.parameters()))


def test_a_config_json_of_version_4_says_the_same(tmp_path):
    model = GPT.from_pretrained(saved(hugging_face("Qwen2"), tmp_path))
    configure(tmp_path, rope_parameters=..., rope_theta=1e6, rope_scaling=None, layer_types=..., dtype=...)
    assert GPT.from_pretrained(tmp_path).config == model.config
    assert model.config.rope_base == 1e6


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_config_json_leaves_out_is_what_transformers_takes_for_it(kind, tmp_path):
    theirs = getattr(transformers, f"{kind}Config")()
    ours, _ = hub.from_hub({"model_type": theirs.model_type}, tmp_path, None)
    written, _ = hub.to_hub(ours)
    defaults = theirs.to_dict()
    told = {"architectures", "rope_theta", "n_inner"}
    assert {k: v for k, v in written.items() if k not in told} == {k: defaults[k] for k in written if k not in told}
    assert ours.dropout == (0.1 if kind == "GPT2" else 0.0)


def test_names_that_differ_are_an_error_that_tells_them(tmp_path):
    saved(hugging_face("Qwen3"), tmp_path)
    lost = "model.layers.1.self_attn.k_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(lost)
        tensors.update({"score.weight": torch.ones(2, 32), "score.bias": torch.ones(2)})

    whole = GPT.from_pretrained(tmp_path)
    rewrite(tmp_path, change)
    told = f"1 missing ({lost}); 2 unexpected (score.bias, score.weight)"
    with pytest.raises(ValueError, match=re.escape(told) + "; strict=False takes"):
        GPT.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=re.escape(told)):
        part = GPT.from_pretrained(tmp_path, strict=False)
    assert hub.load(tmp_path)[1:] == ([lost], ["score.bias", "score.weight"])
    keys = slice(64, 96)  # of q there are 4 x 16 rows, then of k 2 x 16
    for (key, was), now in zip(whole.named_parameters(), part.parameters(), strict=True):
        same = (was == now).view(len(was), -1).all(-1)
        if key == "blocks.1.attention.qkv.weight":
            assert not same[keys].any()
            assert 0.01 < now[keys].std() < 0.03, "drawn as the weights of a new model are"
            same[keys] = True
        assert same.all(), key


# Dtypes and dropout


def test_parameters_have_the_dtype_of_the_files_or_the_one_given(tmp_path):
    saved(hugging_face("GPT-2").to(torch.bfloat16), tmp_path)
    assert GPT.from_pretrained(tmp_path).token_embedding.weight.dtype == torch.bfloat16
    wide = GPT.from_pretrained(tmp_path, dtype=torch.float64)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    rewrite(tmp_path, lambda tensors: tensors.update({n: x.float() for n, x in tensors.items() if "ln_" in n}))
    mixed = GPT.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32}
    assert all(torch.equal(a.double(), b) for a, b in zip(mixed.parameters(), wide.parameters(), strict=True))
    mixed.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert {x.dtype for x in tensors_of(tmp_path / "half").values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


def test_dropout_is_that_of_config_json_unless_it_is_given(tmp_path):
    model = GPT.from_pretrained(saved(hugging_face("GPT-2"), tmp_path))
    assert (model.config.dropout, model.training) == (0.1, False)
    assert GPT.from_pretrained(tmp_path, dropout=0.0).config.dropout == 0.0
    configure(tmp_path, attn_pdrop=0.0)
    with pytest.raises(ValueError, match=r"not by embd_pdrop 0.1, attn_pdrop 0.0, resid_pdrop 0.1: give dropout"):
        GPT.from_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path, dropout=0.2).config.dropout == 0.2


def test_a_model_that_drops_attention_alone_is_loaded_with_a_dropout_of_ones_own(tmp_path):
    saved(hugging_face("Llama"), tmp_path)
    configure(tmp_path, attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"not by attention_dropout 0.1: give dropout"):
        GPT.from_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path, dropout=0.1).config.dropout == 0.1


# What is refused


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "Llama",
            {"model_type": "falcon"},
            "model_type is 'falcon', expected one of gpt2, llama, mistral, qwen2, qwen3",
        ),
        ("Llama", {"model_type": ...}, "model_type is None, expected one of"),
        ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and GPT computes 'silu' or 'swish' alone"),
        ("Llama", {"attention_bias": True}, "attention_bias differs from mlp_bias"),
        ("Llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters has rope_type 'llama3'"),
        ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has rope_type 'linear'"),
        ("Llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("Llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
        ("Llama", {"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4', expected a number"),
        ("Llama", {"num_attention_heads": 3}, "num_kv_heads 2 does not divide num_heads 3"),
        ("Llama", {"hidden_size": 0}, "hidden_size is 0, expected at least 1"),
        ("Llama", {"hidden_size": 32.0}, "hidden_size is 32.0, expected an integer"),
        ("Llama", {"num_key_value_heads": True}, "num_key_value_heads is True, expected an integer or null"),
        ("Llama", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected a number"),
        ("Llama", {"tie_word_embeddings": None}, "tie_word_embeddings is None, expected true or false"),
        ("Llama", {"vocab_size": 84}, r"embed_tokens.weight has shape \(83, 32\), expected \(84, 32\) by config.json"),
        ("Llama", {"vocab_size": 10**12, "hidden_size": 10**12}, "sizes are too large|has shape"),
        ("Llama", {"num_hidden_layers": 10**9}, "has 1000000000 layers for 21 tensors"),
        ("Mistral", {"sliding_window": 0}, "sliding_window is 0, expected at least 1, or None"),
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window is True, and GPT computes False alone"),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has other layers"),
        ("Qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("GPT-2", {"activation_function": "relu"}, "activation_function is 'relu', and GPT computes 'gelu_new' or"),
        ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("GPT-2", {"n_inner": 64}, r"c_fc.weight has shape \(32, 128\), expected \(32, 64\) by config.json"),
    ],
)
def test_what_a_gpt_cannot_express_is_refused_by_the_key_of_config_json(name, values, message, tmp_path):
    saved(hugging_face(name), tmp_path)
    configure(tmp_path, **values)
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(directory: Path) -> None:
    torch.save({}, directory / "pytorch_model.bin")
    (directory / hub.WEIGHTS_FILE).unlink()


def index(directory: Path, named: Any) -> None:
    (directory / hub.WEIGHTS_FILE).rename(directory / "part.safetensors")
    (directory / hub.INDEX_FILE).write_text(json.dumps({"weight_map": named}))


def to_int8(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


def adapter(directory: Path) -> None:
    (directory / "config.json").rename(directory / "adapter_config.json")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda d: truncate(d / hub.WEIGHTS_FILE), r"model.safetensors: is damaged, or no safetensors file"),
    "empty": (lambda d: (d / hub.WEIGHTS_FILE).write_bytes(b""), r"model.safetensors: is damaged"),
    "a pickle alone": (only_pickle, r"holds pytorch_model.bin, a pickle.*convert it once with transformers"),
    "no weights": (lambda d: (d / hub.WEIGHTS_FILE).unlink(), r"holds neither model.safetensors nor"),
    "no configuration": (lambda d: (d / "config.json").unlink(), r"holds no config.json, expected a directory"),
    "an adapter": (adapter, r"holds no config.json.*it holds an adapter alone: merge it"),
    "half a JSON": (lambda d: truncate(d / "config.json"), r"config.json: is not JSON"),
    "bytes that are no text": (lambda d: (d / "config.json").write_bytes(b"\xff{}"), r"config.json: is not JSON"),
    "JSON that is too deep": (lambda d: (d / "config.json").write_text("[" * 10**6), r"config.json: is not JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), r"config.json: holds a JSON list, expected an object"),
    "integers": (lambda d: rewrite(d, to_int8), r"model.norm.weight is of dtype I8, expected F64, F32, F16, BF16"),
    "an index without names": (lambda d: index(d, None), r"index.json: weight_map is 'None', expected file names"),
    "an index of a lost file": (lambda d: index(d, {"a": "b.safetensors"}), r"b.safetensors: is missing, and model"),
    "an index that leads elsewhere": (
        lambda d: index(d, {"a": "../x"}),
        r"index.json: names '../x', expected a file of",
    ),
    "an index that is wrong": (
        lambda d: index(d, {"a": "part.safetensors"}),
        r"part.safetensors: lacks a, which model",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_in_a_line_that_names_the_file(case, tmp_path):
    breaking, message = BROKEN[case]
    breaking(saved(hugging_face("Llama"), tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_name_of_a_model_of_the_hub_is_no_directory():
    with pytest.raises(FileNotFoundError, match="hf download some/model --local-dir"):
        GPT.from_pretrained("some/model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": "sinusoidal"}, "position is 'sinusoidal', expected 'learned'"),
        (
            {"norm": "rms_norm"},
            "GPT2LMHeadModel, the nearest, does not have: norm is 'rms_norm', expected 'layer_norm'",
        ),
        ({"num_kv_heads": 1}, "num_kv_heads is 1, expected None"),
        ({"head_dim": 4}, "head_dim is 4, expected None"),
        ({"sliding_window": 4}, "sliding_window is 4, expected None"),
        ({"position": "rotary", "norm": "rms_norm"}, "LlamaForCausalLM.*: activation is 'gelu', expected 'swiglu'"),
    ],
)
def test_a_model_that_no_architecture_has_is_refused_by_its_fields(change, message, tmp_path):
    model = GPT(dataclasses.replace(STYLES["GPT-2"], **change))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_something_is_never_written_to(tmp_path):
    model = GPT(STYLES["Llama"])
    for out in tmp_path / "full", tmp_path / "file":
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "mine").write_text("mine")
        (tmp_path / "file").write_text("mine")
        with pytest.raises(FileExistsError, match="there is something already; choose another directory"):
            model.save_pretrained(out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine"]
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        GPT(STYLES["Llama"]).save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# The model card


def test_the_model_card_tells_facts_and_its_header_is_read_by_the_hub(tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    GPT(STYLES["Llama"]).save_pretrained(tmp_path / "small-llama")
    card = huggingface_hub.ModelCard.load(tmp_path / "small-llama" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.tags) == (
        "transformers",
        "text-generation",
        ["fastlm"],
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small-llama")
    assert f"| parameters | {theirs.num_parameters():,} |" in card.text
    assert "| heads | 4, of keys and values 2 |" in card.text

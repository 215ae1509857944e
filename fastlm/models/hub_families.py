"""How each architecture of Hugging Face spells a GPT: the keys of its config.json and the names of its tensors.

A family is one `model_type`. What its config.json says is either a field of GPTConfig, or fixed by the architecture
(`style`), or must have the one value that GPT computes (`only`): everything else is refused by its key. The rotary
layout is the same on both sides, the two halves of a head, so no row of q or k moves.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from fastlm.models.gpt import GPTConfig

HEAD = "lm_head.weight"
ALL = slice(None)
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "an object", NoneType: "null"}
KINDS = get_type_hints(GPTConfig)
DERIVED = {"num_kv_heads": "kv_heads", "head_dim": "head_size", "intermediate_size": "mlp_size"}  # where it is None


class Family(NamedTuple):
    """An architecture of transformers."""

    model_type: str
    architecture: str
    prefix: str  # of all names but the head's; files of the bare model lack it
    embedding: str
    style: dict[str, Any]  # fields of GPTConfig that the architecture decides
    keys: dict[str, str]  # {field of GPTConfig: key of config.json}
    defaults: dict[str, Any]  # transformers leaves out of config.json what equals these
    only: dict[str, tuple[Any, ...]]  # {key: values that GPT computes}, the first is the default and is written
    dropouts: tuple[str, ...]
    not_weights: re.Pattern[str]  # tensors of older files that are made from the configuration

    def misfits(self, config: GPTConfig) -> list[str]:
        """What keeps the family from holding a model, a sentence for each field."""
        wrong = [
            f"{field} is {getattr(config, field)!r}, expected {value!r}"
            for field, value in self.style.items()
            if getattr(config, field) != value and not (config.bias and field == "qkv_bias")
        ]
        plain = {"num_kv_heads": config.num_heads, "head_dim": config.hidden_size / config.num_heads}
        for field, value in (plain | {"sliding_window": None}).items():
            if field not in self.keys and getattr(config, DERIVED.get(field, field)) != value:
                wrong.append(f"{field} is {getattr(config, field)}, expected None")
        return wrong


class Place(NamedTuple):
    """Where a tensor of the files stands in the model."""

    name: str  # in the files
    parameter: str  # of the GPT
    rows: slice  # of that parameter
    transposed: bool  # as GPT-2 keeps its matrices, (in, out)


_EVERYWHERE = {"quantization_config": (None,)}
_ROTARY = {"position": "rotary", "norm": "rms_norm", "activation": "swiglu", "qkv_bias": False, "qk_norm": False}
_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "sequence_length": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
}
_LLAMA_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")} | _EVERYWHERE
_QWEN_DEFAULTS = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
}
_QWEN_ONLY = _LLAMA_ONLY | {"use_sliding_window": (False,)}

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    embedding="transformer.wte.weight",
    style={"position": "learned", "norm": "layer_norm", "activation": "gelu", "qk_norm": False},
    keys={
        "vocab_size": "vocab_size",
        "sequence_length": "n_positions",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "tie_embeddings": "tie_word_embeddings",
        "norm_eps": "layer_norm_epsilon",
    },
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "n_inner": None,
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
    },
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    | _EVERYWHERE,
    dropouts=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    not_weights=re.compile(r"transformer\.h\.[0-9]+\.attn\.(masked_)?bias"),
)
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    embedding="model.embed_tokens.weight",
    style=_ROTARY,
    keys=_LLAMA_KEYS,
    defaults=_LLAMA_DEFAULTS,
    only=_LLAMA_ONLY,
    dropouts=("attention_dropout",),
    not_weights=re.compile(r"model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq"),
)
MISTRAL = LLAMA._replace(
    model_type="mistral",
    architecture="MistralForCausalLM",
    style=_ROTARY | {"bias": False},
    keys=_LLAMA_KEYS | {"sliding_window": "sliding_window"},
    defaults=_LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "sliding_window": 4096,
    },
)
QWEN2 = LLAMA._replace(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    style=_ROTARY | {"bias": False, "qkv_bias": True},
    defaults=_LLAMA_DEFAULTS | _QWEN_DEFAULTS,
    only=_QWEN_ONLY,
)
QWEN3 = LLAMA._replace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    style=_ROTARY | {"bias": False, "qk_norm": True},
    defaults=_LLAMA_DEFAULTS | _QWEN_DEFAULTS | {"head_dim": 128},
    only=_QWEN_ONLY | {"attention_bias": (False,)},
)
FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)}


# Configurations


def from_hub(values: dict[str, Any], path: Path, dropout: float | None) -> tuple[GPTConfig, Family]:
    """The GPTConfig that a config.json says, and its family.

    path     the file, for messages
    dropout  instead of the file's

    Raises ValueError that names the key which GPTConfig cannot express, or whose value is of another type.
    """
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        raise ValueError(
            f"{path}: model_type is {values.get('model_type')!r}, expected one of {', '.join(FAMILIES)}: GPT has no "
            "other architecture"
        )
    for key, known in family.only.items():
        if values.get(key, known[0]) not in known:
            expected = " or ".join(map(repr, known))
            raise ValueError(f"{path}: {key} is {values[key]!r}, and GPT computes {expected} alone")
    if "use_sliding_window" in family.only and set(values.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"{path}: layer_types has other layers than 'full_attention', and GPT's layers are all alike")

    def value_of(key: str, kind: Any) -> Any:
        return _checked(values.get(key, family.defaults[key]), kind, key, path)

    fields = family.style | {field: value_of(key, KINDS[field]) for field, key in family.keys.items()}
    if family is GPT2:
        fields["bias"] = True
    else:
        fields["rope_base"] = _rope_base(values, path)
    if family is LLAMA:
        fields["bias"] = value_of("mlp_bias", bool)
        if value_of("attention_bias", bool) != fields["bias"]:
            raise ValueError(f"{path}: attention_bias differs from mlp_bias, and GPT has biases in both or in neither")
    drops = {value_of(key, float) for key in family.dropouts} | (set() if family is GPT2 else {0.0})
    if dropout is None and len(drops) > 1:
        keys = ", ".join(f"{key} {value_of(key, float)}" for key in family.dropouts)
        raise ValueError(f"{path}: GPT drops everywhere alike, and not by {keys}: give dropout to choose it yourself")
    fields["dropout"] = drops.pop() if dropout is None else dropout
    try:
        return _with_nones(GPTConfig(**fields)), family
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _checked(value: Any, kind: Any, key: str, path: Path) -> Any:
    allowed = get_args(kind) or (kind,)
    if type(value) in allowed or (type(value) is int and float in allowed):
        return value
    raise ValueError(f"{path}: {key} is {value!r}, expected {' or '.join(WORDS[each] for each in allowed)}")


def _rope_base(values: dict[str, Any], path: Path) -> float:
    """The base of rotary wavelengths; transformers before 5 spelled rope_parameters otherwise."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = _checked(values.get(key) or {}, dict, key, path)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{path}: {key} has rope_type {kind!r}, and GPT has 'default' alone")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(f"{path}: partial_rotary_factor is {partial!r}, and GPT turns whole heads alone")
    return _checked(rope.get("rope_theta", values.get("rope_theta", 10000.0)), float, "rope_theta", path)


def _with_nones(config: GPTConfig) -> GPTConfig:
    """None in the fields whose number is the one that None stands for: a configuration comes back as it was written."""
    if config.head_dim is not None and config.head_dim * config.num_heads == config.hidden_size:
        config = dataclasses.replace(config, head_dim=None)
    for field in ("num_kv_heads", "intermediate_size"):
        none: dict[str, Any] = {field: None}
        plain = dataclasses.replace(config, **none)
        if getattr(plain, DERIVED[field]) == getattr(config, DERIVED[field]):
            config = plain
    return config


def to_hub(config: GPTConfig) -> tuple[dict[str, Any], Family]:
    """The config.json of a model, and the family that holds it.

    Raises ValueError that names the fields which no family has.
    """
    families = sorted(FAMILIES.values(), key=lambda family: len(family.misfits(config)))  # stable: Llama before Mistral
    family = families[0]
    if misfits := family.misfits(config):
        raise ValueError(
            f"no architecture of transformers computes this model; {family.architecture}, the nearest, does not have: "
            f"{'; '.join(misfits)}"
        )
    values: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    values |= {key: known[0] for key, known in family.only.items() if known[0] is not None}
    values |= {key: getattr(config, DERIVED.get(field, field)) for field, key in family.keys.items()}
    if family is GPT2:
        return values | dict.fromkeys(family.dropouts, config.dropout), family
    if family is QWEN2 and config.head_dim is None:
        del values["head_dim"]  # its configuration has no such key, though its layers obey one
    if family is LLAMA:
        values |= {"attention_bias": config.bias, "mlp_bias": config.bias}
    # transformers 5 reads rope_parameters; version 4, and what was made for it, rope_theta
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}, "rope_theta": config.rope_base}
    return values | rope | {"attention_dropout": 0.0}, family  # these drop nothing but attention, GPT more than that


# Tensors


def places(config: GPTConfig, family: Family) -> list[Place]:
    """Every tensor of the family's files, in the model of a configuration."""
    vocabulary = slice(config.vocab_size)  # without the rows that pad it
    found = [Place(family.embedding, "token_embedding.weight", vocabulary, False)]
    for layer in range(config.num_layers):
        block = f"blocks.{layer}."
        inner = _gpt2_block() if family is GPT2 else _llama_block(config)
        layers = f"{family.prefix}{'h' if family is GPT2 else 'layers'}.{layer}."
        found += [place._replace(name=layers + place.name, parameter=block + place.parameter) for place in inner]
    if family is GPT2:
        found += [Place("transformer.wpe.weight", "position_embedding.weight", ALL, False)]
        found += _norm("transformer.ln_f", "final_norm")
    else:
        found.append(Place("model.norm.weight", "final_norm.weight", ALL, False))
    return found if config.tie_embeddings else [*found, Place(HEAD, "head.weight", vocabulary, False)]


def _norm(name: str, parameter: str) -> list[Place]:
    return [Place(f"{name}.{each}", f"{parameter}.{each}", ALL, False) for each in ("weight", "bias")]


def _gpt2_block() -> Iterator[Place]:
    yield from _norm("ln_1", "attention_norm")
    yield from _norm("ln_2", "mlp_norm")
    matrices = {
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.projection",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }
    for name, parameter in matrices.items():
        yield Place(f"{name}.weight", f"{parameter}.weight", ALL, True)
        yield Place(f"{name}.bias", f"{parameter}.bias", ALL, False)


def _llama_block(config: GPTConfig) -> Iterator[Place]:
    yield Place("input_layernorm.weight", "attention_norm.weight", ALL, False)
    yield Place("post_attention_layernorm.weight", "mlp_norm.weight", ALL, False)
    if config.qk_norm:
        yield Place("self_attn.q_norm.weight", "attention.q_norm.weight", ALL, False)
        yield Place("self_attn.k_norm.weight", "attention.k_norm.weight", ALL, False)
    q, kv, inner = config.num_heads * config.head_size, config.kv_heads * config.head_size, config.mlp_size
    matrices = {
        "self_attn.q_proj": ("attention.qkv", slice(0, q)),
        "self_attn.k_proj": ("attention.qkv", slice(q, q + kv)),
        "self_attn.v_proj": ("attention.qkv", slice(q + kv, q + 2 * kv)),
        "self_attn.o_proj": ("attention.projection", ALL),
        "mlp.gate_proj": ("mlp.up", slice(0, inner)),
        "mlp.up_proj": ("mlp.up", slice(inner, 2 * inner)),
        "mlp.down_proj": ("mlp.down", ALL),
    }
    for name, (parameter, rows) in matrices.items():
        yield Place(f"{name}.weight", f"{parameter}.weight", rows, False)
        if config.bias or (config.qkv_bias and parameter == "attention.qkv"):
            yield Place(f"{name}.bias", f"{parameter}.bias", rows, False)

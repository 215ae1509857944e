"""GPTs from directories of Hugging Face, and GPTs written as directories that transformers loads.

    config.json              the architecture and its sizes (hub_families.py)
    model.safetensors        the weights, or model-00001-of-00002.safetensors, ... with model.safetensors.index.json
    generation_config.json   the tokens that begin and end a text
    tokenizer.json  tokenizer_config.json      where a tokenizer is given
    README.md                the model card

Reading runs no code of the files: pickles are refused. What a file says is checked against config.json before any
memory is taken. A directory is written beside, synced and then renamed.
"""

import contextlib
import dataclasses
import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlm.files import atomic_directory
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.models.hub_families import HEAD, Family, Place, from_hub, places, to_hub
from fastlm.wording import first_few

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # safetensors' names


class Loaded(NamedTuple):
    """A model from a directory, and the names of tensors in which that and its config.json differ."""

    model: GPT
    missing: list[str]  # of the files: drawn anew
    unexpected: list[str]  # in the files: left out


class PretrainedTokenizer(Protocol):
    """What is asked of a tokenizer that is to stand beside a model."""

    vocab_size: int
    start_of_text: list[int]
    end_of_text: int

    def save_pretrained(self, directory: Path) -> None: ...


# Reading


def load_whole(directory: str | os.PathLike, *, dtype: torch.dtype | None, dropout: float | None, strict: bool) -> GPT:
    """As load, where names that differ are an error, or unless strict a warning."""
    model, missing, unexpected = load(directory, dtype=dtype, dropout=dropout)
    kinds = {"missing": missing, "unexpected": unexpected}
    told = "; ".join(f"{len(names)} {kind} ({first_few(names)})" for kind, names in kinds.items() if names)
    if told and strict:
        raise ValueError(
            f"{directory}: the tensors are not those of {CONFIG_FILE}: {told}; strict=False takes those that fit"
        )
    if told:
        warnings.warn(f"{directory}: {told}; what is missing is drawn anew", stacklevel=3)
    return model


def load(directory: str | os.PathLike, *, dtype: torch.dtype | None = None, dropout: float | None = None) -> Loaded:
    """The model in a directory of Hugging Face, in evaluation mode; whatever the files lack is drawn anew.

    dtype    of the parameters; None is that of the files, the widest if they have several
    dropout  of training; None is that of config.json

    Raises ValueError that names the file and what is wrong with it, FileNotFoundError where there is none.
    """
    directory = Path(directory)
    config, family = from_hub(_read_json(_config_file(directory)), directory / CONFIG_FILE, dropout)
    with contextlib.ExitStack() as stack:
        tensors = _by_full_name(_open_weights(directory, stack), family)
        config = _settle_head(config, family, tensors)
        if config.num_layers > len(tensors):
            raise ValueError(f"{directory}: {CONFIG_FILE} has {config.num_layers} layers for {len(tensors)} tensors")
        wanted = places(config, family)
        present = [place for place in wanted if place.name in tensors]
        missing = [place.name for place in wanted if place.name not in tensors]
        unexpected = tensors.keys() - {place.name for place in wanted}
        model = _empty(config, directory / CONFIG_FILE)
        for place in present:
            _check_tensor(tensors[place.name], place, model)
        dtypes = [DTYPES[tensors[place.name].dtype] for place in present]
        model.to(dtype or functools.reduce(torch.promote_types, dtypes, dtypes[0] if dtypes else torch.float32))
        model.to_empty(device="cpu")
        if missing:
            model.reset_parameters()
        with torch.no_grad():
            for matrix in {model.token_embedding.weight, model.head_weight}:
                matrix[config.vocab_size :] = 0
            for place in present:
                tensor = tensors[place.name].read()
                model.get_parameter(place.parameter)[place.rows].copy_(tensor.t() if place.transposed else tensor)
    return Loaded(model.eval(), missing, sorted(name for name in unexpected if not family.not_weights.fullmatch(name)))


def _config_file(directory: Path) -> Path:
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: no such directory; expected one that holds {CONFIG_FILE}; a model of the Hub gets one by: "
            f"hf download {directory} --local-dir DIRECTORY"
        )
    if not (directory / CONFIG_FILE).is_file():
        hint = ""
        if (directory / "adapter_config.json").is_file():
            hint = "; it holds an adapter alone: merge it into its model first, as peft's merge_and_unload does"
        raise FileNotFoundError(f"{directory}: holds no {CONFIG_FILE}, expected a directory of Hugging Face{hint}")
    return directory / CONFIG_FILE


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


class Stored(NamedTuple):
    """A tensor of an open file."""

    file: Path
    opened: Any
    name: str

    def read(self) -> Tensor:
        return self.opened.get_tensor(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.opened.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        return self.opened.get_slice(self.name).get_dtype()


def _open_weights(directory: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Every tensor of the directory by its name in the files."""
    if (directory / WEIGHTS_FILE).is_file():
        return _open_file(directory / WEIGHTS_FILE, stack)
    index = directory / INDEX_FILE
    if not index.is_file():
        raise _without_weights(directory)
    found: dict[str, Stored] = {}
    named = _read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise ValueError(f"{index}: weight_map is {str(named)[:80]!r}, expected file names by tensor")
    for file in sorted(set(named.values())):
        if Path(file).name != file:
            raise ValueError(f"{index}: names {file!r}, expected a file of its own directory")
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory / file}: is missing, and {INDEX_FILE} names it")
        found |= _open_file(directory / file, stack)
    for name, file in named.items():
        if name not in found:
            raise ValueError(f"{directory / file}: lacks {name}, which {INDEX_FILE} says it holds")
    return found


def _open_file(file: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    try:
        opened = stack.enter_context(safe_open(file, "pt"))
    except SafetensorError as error:
        raise ValueError(f"{file}: is damaged, or no safetensors file: {error}") from None
    return {name: Stored(file, opened, name) for name in opened.keys()}  # noqa: SIM118 it is no dict


def _without_weights(directory: Path) -> Exception:
    pickles = sorted({path.name for pattern in PICKLES for path in directory.glob(pattern)})
    if not pickles:
        return FileNotFoundError(f"{directory}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    return ValueError(
        f"{directory}: holds {pickles[0]}, a pickle, which may run any code when it is read, and no {WEIGHTS_FILE}; if "
        "you trust it, convert it once with transformers: "
        f"AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained('ANOTHER_DIRECTORY')"
    )


def _by_full_name(tensors: dict[str, Stored], family: Family) -> dict[str, Stored]:
    """By the names of the whole model: files of the bare one, as of the first GPT-2, lack the prefix."""
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    return {name if name == HEAD else family.prefix + name: tensor for name, tensor in tensors.items()}


def _settle_head(config: GPTConfig, family: Family, tensors: dict[str, Stored]) -> GPTConfig:
    """Of tied weights either name may be the one in the files; where both are and differ, they are not tied.

    So does transformers. Without this an embedding that was saved as the head alone would be drawn anew.
    """
    if not config.tie_embeddings or HEAD not in tensors:
        return config
    embedding = tensors.setdefault(family.embedding, tensors[HEAD])
    if torch.equal(embedding.read(), tensors[HEAD].read()):
        del tensors[HEAD]
        return config
    return dataclasses.replace(config, tie_embeddings=False)


def _empty(config: GPTConfig, path: Path) -> GPT:
    """The model without memory."""
    try:
        return GPT.on_meta(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: its sizes are too large: {' '.join(str(error).split())[:200]}") from None


def _check_tensor(tensor: Stored, place: Place, model: GPT) -> None:
    shape = tuple(model.get_parameter(place.parameter)[place.rows].shape)
    expected = shape[::-1] if place.transposed else shape
    if tensor.shape != expected:
        raise ValueError(f"{tensor.file}: {tensor.name} has shape {tensor.shape}, expected {expected} by {CONFIG_FILE}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{tensor.file}: {tensor.name} is of dtype {tensor.dtype}, expected {', '.join(DTYPES)}")


# Writing


def save(
    model: GPT,
    directory: str | os.PathLike,
    *,
    tokenizer: PretrainedTokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a directory that transformers loads, whole or not at all; arguments as for GPT.save_pretrained."""
    directory = Path(directory)
    values, family = to_hub(model.config)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"save_pretrained: the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}"
        )
    dtypes = [dtype or parameter.dtype for parameter in model.parameters()]
    written = functools.reduce(torch.promote_types, dtypes)
    tokens = _first_and_last(tokenizer)
    values |= tokens | {"dtype": str(written).removeprefix("torch.")}
    with atomic_directory(directory) as partial:
        _write_weights(partial, model, places(model.config, family), dtype, max_shard_bytes)
        _write_json(partial / CONFIG_FILE, values)
        _write_json(
            partial / "generation_config.json", {key: token for key, token in tokens.items() if token is not None}
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(_card(model, family, str(written), directory.name), encoding="utf-8")


def _first_and_last(tokenizer: PretrainedTokenizer | None) -> dict[str, int | None]:
    """The ids that begin and end a text; null where they are not known, or transformers takes its defaults."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    return {
        "bos_token_id": [*tokenizer.start_of_text, tokenizer.end_of_text][0],
        "eos_token_id": tokenizer.end_of_text,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    directory: Path, model: GPT, wanted: list[Place], dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    """One file, or several of at most max_shard_bytes each (a tensor is never split) with their index."""
    parameters = dict(model.named_parameters())
    shards: list[list[Place]] = [[]]
    size = total = 0
    for place in wanted:
        num_bytes = _part(parameters, place, dtype).nbytes
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(place)
        size += num_bytes
        total += num_bytes
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHTS_FILE]
    for name, shard in zip(names, shards, strict=True):
        tensors = {place.name: _part(parameters, place, dtype).cpu().contiguous().clone() for place in shard}
        try:
            safetensors.torch.save_file(tensors, directory / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {name}: {error}") from error
    if len(shards) > 1:
        homes = {place.name: name for name, shard in zip(names, shards, strict=True) for place in shard}
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": homes})


@torch.no_grad()
def _part(parameters: dict[str, torch.nn.Parameter], place: Place, dtype: torch.dtype | None) -> Tensor:
    """A tensor as the files have it, on the model's device; a bias that the model lacks is 0."""
    whole: Tensor | None = parameters.get(place.parameter)
    if whole is None:
        weight = parameters[place.parameter.removesuffix("bias") + "weight"]
        whole = torch.zeros(len(weight), dtype=weight.dtype)
    tensor = whole[place.rows].to(dtype or whole.dtype)
    return tensor.t() if place.transposed else tensor


def _card(model: GPT, family: Family, dtype: str, name: str) -> str:
    """The model card: facts that the files hold, and how to load them."""
    config = model.config
    rows = {
        "architecture": family.architecture,
        "parameters": f"{_num_parameters(model):,}",
        "dtype": dtype.removeprefix("torch."),
        "vocabulary": f"{config.vocab_size:,}",
        "longest text": f"{config.sequence_length:,} tokens",
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "heads": f"{config.num_heads}, of keys and values {config.kv_heads}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- fastlm
---

# {name}

| | |
|---|---|
{table}

Written by fastlm. What it was trained on, and what it is good for, is not told here: add it before you publish it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""


def _num_parameters(model: GPT) -> int:
    """Parameters without the rows that pad the vocabulary."""
    config = model.config
    matrices = 1 if config.tie_embeddings else 2
    padding = matrices * (config.padded_vocab_size - config.vocab_size) * config.hidden_size
    return sum(parameter.numel() for parameter in model.parameters()) - padding

"""Groups of tensors as files of a checkpoint: each storage once, in safetensors, and the rest in extra.pt."""

import dataclasses
import functools
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastlm.train import shards
from fastlm.train.checkpoint_files import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

EXTRA_FILE = "extra.pt"

# Beside tensors, numbers, strings and containers of them, what extra.pt may hold: making these runs no code of the file
_HARMLESS: list[Any] = [io.BytesIO, frozenset, np.ndarray, np.dtype]
_HARMLESS += [np.empty(0).__reduce__()[0], np.float32(0).__reduce__()[0]]  # private functions of NumPy's, by use
_HARMLESS += {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"}


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of tensors as it is written: each storage once, and apart what safetensors cannot hold."""

    plain: dict[str, Tensor]
    aliases: dict[str, str]  # {name that is left out: name of the same tensor}
    extra: dict[str, Any]

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Group":
        plain, extra = divided(values)
        return cls(*without_aliases(plain), extra)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.plain.values())

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of it: then each writes its own."""
        return any(shards.is_sharded(tensor) for tensor in self.plain.values())


def read_group(
    path: Path,
    name: str,
    described: dict[str, Any],
    extra: dict[str, dict[str, Any]],
    sharded: Mapping[str, "DTensor"],
) -> dict[str, Any]:
    if (path / name).is_dir():
        values: dict[str, Any] = dict(shards.read(path / name, sharded))
    else:
        whole = read_tensors(path / group_file(name))
        values = {key: shards.shared_out(key, tensor, sharded) for key, tensor in whole.items()}
    values |= extra.get(name, {})
    values |= {alias: values[original] for alias, original in described["aliases"].items()}
    if len(values) != described["num_tensors"]:
        raise ValueError(f"the group {name} has {len(values)} tensors of {described['num_tensors']}")
    return values


def group_file(group: str) -> str:
    return f"{group}.safetensors"


def divided(values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(what safetensors can hold, what torch.save must): the second is other values than dense tensors, and dtypes."""
    plain = {name: value for name, value in values.items() if _is_plain(value)}
    return plain, {name: value for name, value in values.items() if name not in plain}


def _is_plain(value: Any) -> bool:
    return (
        (type(value) in (Tensor, nn.Parameter) or shards.is_sharded(value))
        and value.layout == torch.strided
        and not value.is_nested
        and value.device.type != "meta"
        and _safetensors_hold(value.dtype)
    )


@functools.cache
def _safetensors_hold(dtype: torch.dtype) -> bool:
    """Whether a tensor comes back: some dtypes are refused, others are written and cannot be read."""
    try:
        saved = safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
        return safetensors.torch.load(saved)["x"].dtype == dtype
    except (KeyError, ValueError, RuntimeError, SafetensorError):
        return False


def without_aliases(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors with each storage once, {left out name: name that holds the same}): tied weights are saved once."""
    first: dict[tuple, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        here = shards.local(tensor)
        bits = here.dtype, here.is_conj(), here.is_neg()
        # of the storage: the local part of a tied weight may be empty, and all ranks must find the same aliases
        start = (here.untyped_storage().data_ptr(), here.storage_offset())
        place = (start, here.shape, here.stride(), here.device, bits)
        if here.untyped_storage().nbytes() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
    return {name: tensors[name] for name in tensors if name not in aliases}, aliases


def pack_extra(values: dict[str, dict[str, Any]]) -> bytes:
    """The values as torch.save writes them. Raises CheckpointError, naming the first that could not be read again."""
    for group, named in values.items():
        for name, value in named.items():
            try:
                unpack_extra(_saved_by_torch(value))
            except Exception as error:  # of whatever class the value's own code raises
                kind = f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise CheckpointError(
                    f"no checkpoint can hold {name!r} of the {group}, a {kind}: expected tensors of dtypes that "
                    "PyTorch saves, numbers, text, bytes, NumPy arrays, or dicts, lists, tuples and sets of them"
                ) from error
    return _saved_by_torch(values)


def _saved_by_torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpack_extra(data: bytes) -> Any:
    with torch.serialization.safe_globals(_HARMLESS):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write each tensor, whatever its strides, and though it shares memory with another."""
    alone, taken = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        alone[name] = tensor.to("cpu", copy=True) if storage in taken else tensor  # safetensors refuses to share
        taken.add(storage)
    safetensors.torch.save_file(alone, path, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    if os.fsencode(path).decode(errors="ignore") != str(path):  # PyTorch maps no file whose name is not UTF-8
        return safetensors.torch.load(path.read_bytes())
    return safetensors.torch.load_file(path)

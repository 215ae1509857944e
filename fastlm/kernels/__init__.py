"""fastlm's layers in the layout of Hugging Face's `kernels`: this directory is a kernel that KernelConfig loads.

    from transformers import KernelConfig
    from fastlm.kernels import kernel_mapping

    model.set_use_kernels(True, KernelConfig(kernel_mapping(model), use_local_kernel=True))

metadata.json makes it a build that `kernels` loads from its path; the layers are those of fastlm.ops, so fastlm must be
installed. `kernels benchmark` runs benchmarks/benchmark.py.
"""

import contextlib
import functools
import inspect
from pathlib import Path

import torch
from torch import nn

from fastlm.acceleration.proof import agree, random, rows, trial_copy, unheard
from fastlm.kernels import layers

__all__ = ["LAYERS", "kernel_mapping", "layers"]

LAYERS: dict[str, type[nn.Module]] = {
    "RMSNorm": layers.RMSNorm,
    "RMSNormZeroCentered": layers.RMSNormZeroCentered,
    "LayerNorm": layers.LayerNorm,
    "GeLU": layers.GeLU,
    "GeluTanh": layers.GeluTanh,
    "NewGELU": layers.GeluTanh,
    "FastGELU": layers.GeluTanh,
    "SiluAndMul": layers.SiluAndMul,
    "SwiGLUMLP": layers.SwiGLUMLP,
    "GeGLUMLP": layers.GeGLUMLP,
    "rotary_pos_emb": layers.RotaryPosEmb,
    "ForCausalLMLoss": layers.ForCausalLMLoss,
}  # by the name under which transformers, or whoever calls replace_kernel_forward_from_hub, registers them


def kernel_mapping(model: nn.Module) -> dict[str, str]:
    """What transformers.KernelConfig takes for the layers of model: {name: "path:layer"} for each name that LAYERS has.

    Leaves out a name under which model has a layer that ours cannot replace: its forward takes other arguments or
    computes something else, as a feed-forward block of another activation does, or its rotary embedding pairs
    neighbours or may turn a part of the features. Raises ValueError if nothing is left.
    """
    found: dict[str, str] = {}
    unfit: set[str] = set()
    for module in model.modules():
        for theirs in (module, *getattr(module, "_kernel_funcs", {}).values()):
            name = getattr(type(theirs), "kernel_layer_name", None)
            if name in LAYERS:
                found[name] = f"{Path(__file__).parent}:{LAYERS[name].__name__}"
                if not can_replace(LAYERS[name], theirs):
                    unfit.add(name)
    mapping = {name: layer for name, layer in found.items() if name not in unfit}
    if not mapping:
        raise ValueError(
            f"kernel_mapping: {type(model).__name__} has no layer of ours registered by name, expected one of "
            f"{', '.join(LAYERS)}; transformers registers its layers if the version of `kernels` that it asks for is "
            "installed, and kernels.replace_kernel_forward_from_hub registers any other"
        )
    return mapping


def can_replace(ours: type[nn.Module], theirs: nn.Module) -> bool:
    """Whether ours takes as many arguments, of the same kinds, as `kernels` demands, and computes what theirs does."""
    kinds = [
        [parameter.kind for parameter in inspect.signature(layer.forward).parameters.values()]
        for layer in (ours, type(theirs))
    ]
    if kinds[0] != kinds[1] or not all(hasattr(theirs, name) for name in ours.__annotations__):
        return False
    if ours is layers.RotaryPosEmb:
        return turns_halves(theirs)
    return ours is layers.ForCausalLMLoss or computes_the_same(ours, theirs)


SIZES = {"gate_proj": (10, 6), "up_proj": (10, 6), "down_proj": (6, 10)}  # of weights to try a block with


def computes_the_same(ours: type[nn.Module], theirs: nn.Module) -> bool:
    """Whether the forward of ours gives values, gradients and dtypes of theirs, on a copy with random parameters."""
    generator = torch.Generator().manual_seed(5)
    own = {name: p for name, p in theirs._parameters.items() if p is not None}
    parameters = {name: nn.Parameter(random(generator, *p.shape)) for name, p in own.items()}
    children = {name: unheard(child) for name, child in theirs.named_children() if name not in SIZES}
    for name in SIZES.keys() & theirs._modules.keys():
        children[name] = linear = nn.utils.skip_init(nn.Linear, *reversed(SIZES[name]), bias=False)
        linear.weight = nn.Parameter(random(generator, *SIZES[name]))
    trial = trial_copy(theirs, {**dict.fromkeys(theirs._parameters), **parameters}, children)
    x = rows(parameters["weight"].shape[-1] if parameters else SIZES["gate_proj"][1])
    forward = functools.partial(ours.forward, trial)
    try:
        if not agree(forward, trial, x, list(trial.parameters())):
            return False
        with contextlib.suppress(RuntimeError):  # of a product of two dtypes
            return bool(forward(x.bfloat16()).dtype == trial.forward(x.bfloat16()).dtype)
    except Exception:  # the layer is anybody's code
        return False
    return True


def turns_halves(theirs: nn.Module) -> bool:
    """Whether a rotary embedding turns x_i with x_{i + D/2}: a quarter turn of 0, 1, 2, 3 shows which it takes.

    It may take cos and sin for every feature, for every pair, or both; as pairs it must not understand a part of the
    features.
    """
    x, turned = torch.arange(4.0).view(1, 1, 1, 4), []
    for columns in (4, 2):
        cos, sin = torch.zeros(1, 1, columns), torch.ones(1, 1, columns)
        with contextlib.suppress(RuntimeError):  # the wrong number of columns
            turned.append(type(theirs).forward(theirs, x, x, cos, sin)[0].flatten().tolist())
    return bool(turned) and all(found == [-2.0, -3.0, 0.0, 1.0] for found in turned)

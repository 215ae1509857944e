"""fastlm's layers in the layout of Hugging Face's `kernels`: this directory is a kernel that KernelConfig loads.

    from transformers import KernelConfig
    from fastlm.kernels import kernel_mapping

    model.set_use_kernels(True, KernelConfig(kernel_mapping(model), use_local_kernel=True))

metadata.json makes it a build that `kernels` loads from its path; the layers are those of fastlm.ops, so fastlm must be
installed. `kernels benchmark` runs benchmarks/benchmark.py.
"""

import contextlib
import inspect
from pathlib import Path

import torch
from torch import nn

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

    Leaves out a name under which model has a layer that ours cannot replace: its forward takes other arguments, or its
    rotary embedding pairs neighbours. Raises ValueError if nothing is left.
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
    """Whether ours takes as many arguments, of the same kinds, as `kernels` demands, and theirs has what ours reads.

    Of a rotary embedding also whether both pair the same features.
    """
    kinds = [
        [parameter.kind for parameter in inspect.signature(layer.forward).parameters.values()]
        for layer in (ours, type(theirs))
    ]
    has_all = all(hasattr(theirs, name) for name in ours.__annotations__)
    return kinds[0] == kinds[1] and has_all and (ours is not layers.RotaryPosEmb or pairs_halves(theirs))


def pairs_halves(theirs: nn.Module) -> bool:
    """Whether a rotary embedding turns x_i with x_{i + D/2}: a quarter turn of 0, 1, 2, 3 shows which it takes."""
    x = torch.arange(4.0).view(1, 1, 1, 4)
    for columns in (4, 2):  # of cos and sin: for every feature, or for every pair
        cos, sin = torch.zeros(1, 1, columns), torch.ones(1, 1, columns)
        with contextlib.suppress(RuntimeError):  # the wrong number of columns
            turned, _ = type(theirs).forward(theirs, x, x, cos, sin)
            return turned.flatten().tolist() == [-2.0, -3.0, 0.0, 1.0]
    return False

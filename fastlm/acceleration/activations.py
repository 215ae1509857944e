"""GELU under any name, and gated feed-forward blocks: down(dropout(activation(gate(x)) * up(x))).

The activation is SiLU (SwiGLU) or either form of GELU (GeGLU); the dropout is there or not.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlm.acceleration.matching import Match, Refusal, is_from_torch, is_watched, takes_one_tensor
from fastlm.acceleration.proof import agree, random, rows, trial_copy, unheard
from fastlm.acceleration.swapped_module import original_class
from fastlm.ops import geglu, gelu, swiglu

# GELU


class Gelu(nn.Module):
    """The forward of a module that computes GELU of approximation form. Any other call runs the module's own code."""

    form: str

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        return gelu(args[0], self.form)


def match_gelu(module: nn.Module) -> Match | Refusal | None:
    """What computes a module without parameters whose class says GELU."""
    if "gelu" not in type(module).__name__.lower() or is_from_torch(module) or not takes_one_tensor(module):
        return None
    if module._parameters or module._modules:
        return Refusal("it has parameters or children")
    trial, x = trial_copy(module), rows(64).flatten(0, 1)
    try:
        for approximate in ("none", "tanh"):
            if agree(functools.partial(gelu, approximate=approximate), trial, x, []):
                if trial.forward(x.bfloat16()).dtype != torch.bfloat16:
                    return Refusal("its result has another dtype than its input")
                return Match(Gelu, approximate, f"ops.gelu, approximate={approximate!r}")
    except Exception as error:  # the module is anybody's code
        return Refusal(f"its forward failed on a tensor: {error}")
    return Refusal("it computes neither form of gelu")


# Gated feed-forward blocks


class GatedForm(NamedTuple):
    """The names of the linear layers of a block; where gate and up are one, the order of its two halves."""

    gate: str
    up: str  # the same name where one layer gives both
    down: str
    gate_first: bool
    unit: str = "swiglu"  # of UNITS
    dropout: str | None = None  # the name of a torch.nn.Dropout
    activation: tuple[str, type[nn.Module]] | None = None  # name and class of the module that the unit stands for
    casts: bool = False  # to the dtype of down's weight before it, as T5 does for a last layer in float32


UNITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": swiglu,
    "geglu": geglu,
    "geglu, approximate='tanh'": functools.partial(geglu, approximate="tanh"),
}


def gated(module: nn.Module, x: Tensor, form: GatedForm) -> Tensor:
    """The block, through the layers that module has by now, so that adapters and hooks count."""
    if form.gate == form.up:
        halves = getattr(module, form.gate)(x).chunk(2, dim=-1)
        gate, up = halves if form.gate_first else reversed(halves)
    else:
        gate, up = getattr(module, form.gate)(x), getattr(module, form.up)(x)
    hidden = UNITS[form.unit](gate, up)
    if form.dropout is not None:
        hidden = getattr(module, form.dropout)(hidden)
    down = getattr(module, form.down)
    return down(hidden.to(down.weight.dtype) if form.casts else hidden)


class GatedFeedForward(nn.Module):
    """The forward of such a block. Any call but block(x) runs the module's own code, as does a block whose activation
    has hooks or was replaced, or whose dropout is gone.
    """

    form: GatedForm

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not self._is_as_found():
            return super().forward(*args, **kwargs)
        return gated(self, args[0], self.form)

    def _is_as_found(self) -> bool:
        form = self.form
        if form.dropout is not None and getattr(self, form.dropout) is None:
            return False
        if form.activation is None:
            return True
        name, found = form.activation
        activation = getattr(self, name)
        return original_class(activation) is found and not is_watched(activation)


TRIED_WIDTH, TRIED_HIDDEN = 6, 10  # features of the layers tried, and of what lies between them


def match_gated(module: nn.Module) -> Match | Refusal | None:
    """What computes a block of two or three linear layers, an activation of its own and at most one dropout."""
    children = dict(module.named_children())
    linear = [name for name, child in children.items() if isinstance(child, nn.Linear)]
    dropouts = [name for name, child in children.items() if type(child) is nn.Dropout]
    others = {name: child for name, child in children.items() if name not in (*linear, *dropouts)}
    if len(linear) not in (2, 3) or len(others) > 1 or len(dropouts) > 1 or module._parameters:
        return None
    if any(any(True for _ in child.parameters()) for child in others.values()) or not takes_one_tensor(module):
        return None
    for form, layers in possible_blocks(module, linear):
        if dropouts:
            form = form._replace(dropout=dropouts[0])
        for name, child in others.items():
            form = form._replace(activation=(name, original_class(child)))
        parameters: list[Tensor] = [p for layer in layers.values() for p in layer.parameters()]
        try:
            parts = {name: unheard(child) for name, child in others.items()}
            # In place of a dropout something that shows where it stands.
            trial = trial_copy(module, children={**parts, **layers, **{name: nn.Softsign() for name in dropouts}})
            if agree(functools.partial(gated, trial, form=form), trial, rows(TRIED_WIDTH), parameters):
                found = with_casts(trial, form)
                return found and Match(GatedFeedForward, found, f"ops.{form.unit} between its linear layers")
        except Exception:  # the module is anybody's code: with layers of these sizes it may do anything
            continue
    return None


@torch.no_grad()
def with_casts(trial: nn.Module, form: GatedForm) -> GatedForm | None:
    """The form with the casts of a block that computes it; None if it has others than ours."""
    x = rows(TRIED_WIDTH)
    if trial.bfloat16().forward(x.bfloat16()).dtype != torch.bfloat16 or runs(trial, x):
        return None
    getattr(trial, form.down).float()
    return form._replace(casts=runs(trial, x.bfloat16()))


def runs(trial: nn.Module, x: Tensor) -> bool:
    try:
        trial.forward(x)
    except RuntimeError:  # of a product of two dtypes
        return False
    return True


def possible_blocks(module: nn.Module, names: list[str]) -> Iterator[tuple[GatedForm, dict[str, nn.Module]]]:
    """Every unit, and every order of the linear layers that their sizes allow, with small layers in their places."""
    sizes = {name: (getattr(module, name).in_features, getattr(module, name).out_features) for name in names}
    for order in permutations(names):
        *inner, down = order
        hidden, width = sizes[down]
        if len(inner) == 2 and all(sizes[name] == (width, hidden) for name in inner):
            layers = _small_layers(inner, down, TRIED_HIDDEN)
            for unit in UNITS:
                yield GatedForm(inner[0], inner[1], down, gate_first=True, unit=unit), layers
        if len(inner) == 1 and sizes[inner[0]] == (width, 2 * hidden):
            layers = _small_layers(inner, down, 2 * TRIED_HIDDEN)
            for unit, gate_first in product(UNITS, (True, False)):
                yield GatedForm(inner[0], inner[0], down, gate_first, unit), layers


def _small_layers(inner: list[str], down: str, out_features: int) -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(4)
    shapes = {**dict.fromkeys(inner, (out_features, TRIED_WIDTH)), down: (TRIED_WIDTH, TRIED_HIDDEN)}
    layers: dict[str, nn.Module] = {}
    for name, (rows_of_weight, columns) in shapes.items():
        layers[name] = nn.utils.skip_init(nn.Linear, columns, rows_of_weight, bias=False)
        layers[name].weight = nn.Parameter(random(generator, rows_of_weight, columns))
    return layers

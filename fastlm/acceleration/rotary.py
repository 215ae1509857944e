"""Rotary embeddings of attention modules that call a function of their file for it, as those of Hugging Face do.

    q, k = apply_rotary_pos_emb(q, k, cos, sin)      q * cos + rotate_half(q) * sin, of q (B, H, T, D), cos (B, T, R)

The function is recognised by what it computes. Nobody else's calls may change, so the function stays what it is: the
swapped module runs a copy of its own forward that reads another name in its place, a name that its file gets. cos and
sin must hold each angle twice, which no attention module can tell: the modules of the model that make them are tried.
"""

import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlm.acceleration.matching import Row
from fastlm.acceleration.proof import is_close, random, unheard, values_and_gradients
from fastlm.acceleration.swapped_module import is_swapped, obstacle, swap
from fastlm.ops import apply_rotary
from fastlm.ops._dispatch import TORCH, route


class RotaryForm(NamedTuple):
    """The function that a forward calls, and for which arguments it is a rotation."""

    name: str
    is_partial: bool  # also where cos has fewer features than q: the others pass
    casts: bool  # to the dtype of q, where that of cos is another


class Rotary(nn.Module):
    """An attention module whose own forward calls a rotation of ours."""

    form: RotaryForm

    @staticmethod
    def forward_of(original: FunctionType, form: RotaryForm) -> FunctionType:
        """The forward of a module's class with the rotation of form replaced."""
        *_, innermost = wrapping(original)
        file, name = sys.modules[innermost.__module__], f"_fastlm_{form.name}"
        found = getattr(file, form.name)
        if rotary_form(form.name, found) != form:  # unpickled where somebody had replaced it
            return original
        if not hasattr(file, name):
            setattr(file, name, rotation(file, found, form))
        return with_name_replaced(original, form.name, name)


def rotation(file: Any, found: Callable[..., Any], form: RotaryForm) -> Callable[..., Any]:
    """What computes found by apply_rotary. It calls what file has by now where that is another function."""

    defaults = {name: parameter.default for name, parameter in inspect.signature(found).parameters.items()}

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        theirs = getattr(file, form.name)
        if torch.compiler.is_compiling():  # which fuses theirs with what lies around it
            return theirs(q, k, cos, sin, *args, **kwargs)
        is_as_tried = theirs is found and not args and all(defaults.get(name) is x for name, x in kwargs.items())
        if not is_as_tried or not is_supported(q, k, cos, sin, form):
            return theirs(q, k, cos, sin, *args, **kwargs)
        return rotated(q, k, cos, sin)

    return rotate


def is_supported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: RotaryForm) -> bool:
    """Whether a call is what was tried, and large enough for a kernel."""
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3:
        return False
    (B, _, T, D), (rows, tokens, R) = q.shape, cos.shape
    if tokens != T or k.shape[2:] != q.shape[2:] or rows not in (1, B) or not (R == D or (form.is_partial and R < D)):
        return False
    if k.shape[0] != B or (sin.shape, sin.dtype) != (cos.shape, cos.dtype):
        return False
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):  # of both halves, and ours reads one
        return False
    if k.dtype != q.dtype or not (cos.dtype == q.dtype or form.casts):
        return False
    return route("rotary", (q, k, cos)).implementation != TORCH


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k (B, H, T, D) rotated by cos and sin (B or 1, T, R), whose second halves repeat the first."""
    rows, T, R = cos.shape
    cos, sin = (table.reshape(rows * T, R)[:, : R // 2] for table in (cos, sin))
    positions = None if rows == 1 else torch.arange(rows * T, device=q.device).view(rows, T)
    q, k = apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, positions=positions)  # type: ignore[assignment]
    return q.transpose(1, 2), k.transpose(1, 2)


# A copy of a forward


def with_name_replaced(function: FunctionType, name: str, other: str) -> FunctionType:
    """A copy of function, and of what it wraps, that reads the global `other` for `name`."""
    code, closure = function.__code__, function.__closure__
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        code = code.replace(co_names=tuple(other if each == name else each for each in code.co_names))
    else:
        copied = CellType(with_name_replaced(wrapped, name, other))
        closure = tuple(copied if cell.cell_contents is wrapped else cell for cell in closure or ())
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# Which modules


def swap_rotations(model: nn.Module) -> Iterator[Row]:
    """Swap the attention modules of model that call a rotation, and say what became of each."""
    kinds = {type(module) for module in model.modules() if not is_swapped(module)}
    forms = {kind: form for kind in kinds if (form := rotation_of(kind)) is not None}
    if not forms:
        return
    reason = unproved_angles(model)
    for name, module in model.named_modules():
        form = forms.get(type(module))
        if form is None:
            continue
        row = Row(name, type(module).__name__, "attention", False, reason or obstacle(module) or "")
        if not row.detail:
            try:
                swap(module, Rotary, form)
                row = row._replace(swapped=True, detail="ops.apply_rotary inside")
            except Exception as error:  # a class may object to being derived from
                row = row._replace(detail=f"its class cannot be derived from: {error}")
        yield row


def rotation_of(kind: type[nn.Module]) -> RotaryForm | None:
    """The rotation that the forward of a class calls by a global name of its file."""
    try:
        chain = list(wrapping(kind.forward))
    except TypeError:
        return None
    function = chain[-1]
    file = sys.modules.get(function.__module__)
    if file is None or vars(file) is not function.__globals__:
        return None
    uses: dict[str, set[str]] = {}  # of a name, as a global and otherwise
    for instruction in dis.get_instructions(function):
        uses.setdefault(str(instruction.argval), set()).add(instruction.opname)
    for name in function.__code__.co_names:
        candidate = function.__globals__.get(name)
        if uses.get(name) == {"LOAD_GLOBAL"} and isinstance(candidate, FunctionType):
            form = rotary_form(name, candidate)
            if form is not None:
                return form
    return None


def wrapping(function: Any) -> Iterator[FunctionType]:
    """function, what it wraps, what that wraps, and so on. TypeError if one is no function that can be copied."""
    while True:
        if not isinstance(function, FunctionType):
            raise TypeError(f"{function} is no function")
        yield function
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None:
            return
        if not any(cell.cell_contents is wrapped for cell in function.__closure__ or ()):
            raise TypeError(f"{function} does not hold what it wraps")
        function = wrapped


@functools.cache
def rotary_form(name: str, function: Callable[..., Any]) -> RotaryForm | None:
    """Which rotation a function of q, k, cos and sin computes."""
    if list(inspect.signature(function).parameters)[2:4] != ["cos", "sin"]:
        return None
    try:
        if not all(is_rotation(function, rows, R=8) for rows in (1, 2)):
            return None
    except Exception:  # it is anybody's code
        return None
    try:
        is_partial = is_rotation(function, rows=2, R=4)
    except Exception:  # of shapes that it does not take
        is_partial = False
    q, k, cos, sin = tried(1, 8)
    casts = [x.dtype for x in function(q.bfloat16(), k.bfloat16(), cos, sin)] == [torch.bfloat16] * 2
    return RotaryForm(name, is_partial, casts)


def tried(rows: int, R: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, cos and sin, whose angles are in no relation."""
    generator = torch.Generator().manual_seed(5)
    q, k = (random(generator, 2, heads, 5, 8).requires_grad_() for heads in (3, 1))
    cos, sin = (random(generator, rows, 5, R // 2).repeat(1, 1, 2) for _ in range(2))
    return q, k, cos, sin


def is_rotation(function: Callable[..., Any], rows: int, R: int) -> bool:
    """Whether it gives the values and gradients of ours."""
    q, k, cos, sin = tried(rows, R)

    def found(rotate: Callable[..., Any]) -> list[Tensor]:
        return values_and_gradients(lambda x: torch.cat(rotate(x, k, cos, sin), dim=1), q, [k])

    return all(map(is_close, found(rotated), found(function)))


def unproved_angles(model: nn.Module) -> str | None:
    """Why cos and sin may not hold each angle twice; None if what makes them in model gives them so."""
    modules = {type(m): m for m in model.modules() if "rotary" in type(m).__name__.lower() and not m._modules}
    known = {kind: doubles(module) for kind, module in modules.items()}
    for kind, answer in known.items():
        if answer is False:
            return f"{kind.__name__} gives other angles than each twice"
    return None if True in known.values() else "no module of the model is known to make its angles"


@torch.no_grad()
def doubles(module: nn.Module) -> bool | None:
    """Whether a module makes cos and sin (1, T, R) with each angle twice; None if it makes none by a call as tried."""
    trial = unheard(module).cpu()
    x, positions = torch.zeros(1, 5, 8), torch.tensor([[0, 1, 2, 7, 11]])
    kinds: list[tuple[Any, ...]] = [(kind,) for kind in getattr(module, "layer_types", None) or ()]
    try:
        inspect.signature(module.forward).bind(x, positions)
        kinds = [()]
    except TypeError:
        pass  # one of layer_types is asked for
    try:
        tables = [table for kind in kinds for table in trial(x, positions, *kind)]
        return bool(tables) and all(torch.equal(*table.chunk(2, dim=-1)) for table in tables)
    except Exception:  # the module is anybody's code
        return None

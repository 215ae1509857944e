"""What is asked of every call that PyTorch's own samples make: the same tensors, by every way of differentiating it.

A check runs a function on tensors and gives all tensors that come of it. It runs on our function and on PyTorch's;
where the two differ, both are held against PyTorch in float64 by the rule of tests/support/accuracy.py, over more
draws if one draw misses it.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Module
from torch.utils import _pytree as pytree

from tests.support.accuracy import DRAWS, InaccurateError, assert_accurate
from tests.support.sample_exceptions import WITHOUT_CHUNKS, Excuse
from tests.support.samples import ModuleSample, Sample

Function = Callable[..., Sequence[Tensor]]


class Noise:
    """Upstream gradients and tangents, from a generator of their own; every dtype under test holds them exactly."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.of_shape(x.shape).to(x.device, x.dtype) for x in tensors]

    def of_shape(self, shape: Sequence[int]) -> Tensor:
        return torch.randint(-16, 17, tuple(shape), generator=self.generator) / 8


# Checks


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.requires_grad]


def gradients(results: Sequence[Tensor], wanted: Sequence[Tensor], upstream: Sequence[Tensor], **options: Any) -> Any:
    """One gradient for each that is wanted, zeros for one that the results do not depend on."""
    return torch.autograd.grad(results, wanted, upstream, allow_unused=True, materialize_grads=True, **options)


def backward(function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    results = function(*tensors)
    differentiable = leaves(results)
    return [*results, *gradients(differentiable, leaves(tensors), noise.like(differentiable))]


def double_backward(function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    results, wanted = leaves(function(*tensors)), leaves(tensors)
    upstream = [x.requires_grad_() for x in noise.like(results)]
    first = leaves(gradients(results, wanted, upstream, create_graph=True))
    return gradients(first, [*wanted, *upstream], noise.like(first))


def batched_gradients(function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    results = leaves(function(*tensors))
    upstream = [torch.stack(pair) for pair in zip(noise.like(results), noise.like(results), strict=True)]
    return gradients(results, leaves(tensors), upstream, is_grads_batched=True)


def forward_mode(function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    with forward_ad.dual_level():
        tangents = iter(noise.like(leaves(tensors)))
        duals = [forward_ad.make_dual(x.detach(), next(tangents)) if x.requires_grad else x for x in tensors]
        pairs = [forward_ad.unpack_dual(x) for x in function(*duals)]
        return [x for pair in pairs for x in (pair.primal, torch.zeros(()) if pair.tangent is None else pair.tangent)]


def vmap(function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    both = [torch.stack([x, turned(x)]) for x in tensors]
    return list(torch.func.vmap(lambda *tensors: tuple(function(*tensors)))(*both))


def vmap_of_one_tensor(function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    """Of the last that is differentiated, along its last dimension; the others are shared."""
    place = max(place for place, x in enumerate(tensors) if x.requires_grad)
    both = torch.stack([tensors[place], turned(tensors[place])], -1)
    mapped = torch.func.vmap(lambda x: tuple(function(*tensors[:place], x, *tensors[place + 1 :])), in_dims=-1)
    return list(mapped(both))


def vmap_of_gradients(function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    places = tuple(place for place, x in enumerate(tensors) if x.requires_grad)
    factors = [noise.of_shape(x.shape) for x in function(*tensors)]

    def scalar(*tensors: Tensor) -> Tensor:
        return torch.stack([(x * c.to(x)).sum() for x, c in zip(function(*tensors), factors, strict=True)]).sum()

    both = [torch.stack([x, turned(x)]).detach() for x in tensors]
    return list(torch.func.vmap(torch.func.grad(scalar, places))(*both))


def turned(x: Tensor) -> Tensor:
    """The same numbers in other places."""
    return x.flip(tuple(range(x.dim())))


def not_contiguous(function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    def spread(x: Tensor) -> Tensor:
        """Every other element of a tensor."""
        return torch.stack([x, torch.zeros_like(x)], -1).detach()[..., 0].requires_grad_(x.requires_grad)

    return backward(function, [spread(x) for x in tensors], noise)


def inference_mode(function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    with torch.inference_mode():
        return list(function(*tensors))


def no_grad(function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    with torch.no_grad():
        return list(function(*tensors))


def autocast(dtype: torch.dtype, function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    def under_autocast(*tensors: Tensor) -> Sequence[Tensor]:
        with torch.autocast(tensors[0].device.type, dtype):
            return function(*tensors)

    return backward(under_autocast, tensors, noise)


def meta(function: Function, tensors: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    return backward(function, [x.detach().to("meta").requires_grad_(x.requires_grad) for x in tensors], noise)


CHECKS: dict[str, Callable[[Function, Sequence[Tensor], Noise], list[Tensor]]] = {
    "backward": backward,
    "double backward": double_backward,
    "batched gradients": batched_gradients,
    "forward mode": forward_mode,
    "vmap": vmap,
    "vmap of one tensor": vmap_of_one_tensor,
    "vmap of gradients": vmap_of_gradients,
    "not contiguous": not_contiguous,
    "no_grad": no_grad,
    "inference mode": inference_mode,
    "autocast to bfloat16": functools.partial(autocast, torch.bfloat16),
    "autocast to float16": functools.partial(autocast, torch.float16),
    "meta": meta,
}


# Calls


class Call(NamedTuple):
    """One sample as functions of its tensors."""

    name: str
    tensors: list[Tensor]
    places: list[str]  # of the tensors among the arguments
    ours: Function
    theirs: Function
    plain: Function  # theirs without chunks, and in whatever dtype the tensors are: the truth if they are float64


def call_of_op(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], sample: Sample) -> Call:
    def on_tensors(function: Callable[..., Tensor], sample: Any) -> Function:
        return of_tensors(sample, lambda values: function(values[0], *values[1], **values[2]))

    values = tuple(sample)
    functions = on_tensors(ours, values), on_tensors(theirs, values), on_tensors(theirs, plain_values(values))
    return Call(described(values), tensors_in(values), places_in(values), *functions)


def call_of_module(
    ours: type[Module], theirs: type[Module], sample: ModuleSample, dtype: torch.dtype, training: bool = True
) -> Call:
    """Of the module's parameters and buffers, then of the tensors that it is called with."""
    plain = sample._replace(made_kwargs=plain_values(sample.made_kwargs))
    made_of = (ours, sample), (theirs, sample), (theirs, plain)
    modules = [made(cls, sample, dtype).train(training) for cls, sample in made_of]
    state = {name: x.detach().requires_grad_() for name, x in modules[0].named_parameters()}
    values = (state | dict(modules[0].named_buffers()), sample.args, sample.kwargs)
    functions = [of_tensors(values, lambda values, m=m: torch.func.functional_call(m, *values)) for m in modules]
    return Call(described(sample), tensors_in(values), places_in(values), *functions)


def made(cls: type[Module], sample: ModuleSample, dtype: torch.dtype, drawn: bool = True) -> Module:
    """The module that the sample asks for; if drawn, with other parameters than the ones and zeros of some modules."""
    torch.manual_seed(0)
    module = cls(*copied(sample.made_args), **copied(sample.made_kwargs)).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters() if drawn else ():
            parameter.normal_()
    return module


def of_tensors(values: Any, call: Callable[..., Any]) -> Function:
    """call(values) as a function of the tensors in values, which gives all tensors of the result."""
    flat, spec = pytree.tree_flatten(values)

    def function(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        filled = [next(given) if torch.is_tensor(x) else x for x in flat]
        return tensors_in(call(pytree.tree_unflatten(filled, spec)))

    return function


def tensors_in(values: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(values) if torch.is_tensor(x)]


def places_in(values: Any) -> list[str]:
    return [pytree.keystr(path) for path, x in pytree.tree_leaves_with_path(values) if torch.is_tensor(x)]


def copied(values: Any, dtype: torch.dtype | None = None) -> Any:
    """Values whose tensors are leaves of their own; those of floating point in dtype, if one is given."""

    def copy(x: Tensor) -> Tensor:
        return x.detach().to(dtype if x.is_floating_point() else None, copy=True).requires_grad_(x.requires_grad)

    return pytree.tree_map_only(Tensor, copy, values)


def plain_values(values: Any) -> Any:
    """Values in which nothing asks for chunks or for a dtype below float64."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64
        return None if type(value).__name__ == "LinearCrossEntropyOptions" else value

    return pytree.tree_map(plain, values)


def described(values: Any) -> str:
    """Values in words, of tensors the shape and dtype."""
    return str(pytree.tree_map_only(Tensor, lambda x: f"{str(x.dtype)[6:]}{tuple(x.shape)}", tuple(values)))


# Judgement

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
TRIES = 1, DRAWS, 4 * DRAWS  # draws of the same numbers in other places, the more the less luck


def outcome(call: Call, check: str, excuse: Excuse | None = None) -> str:
    """How our result compares with PyTorch's; AssertionError if it should not compare like that."""
    try:
        return compared(call, check, call.theirs, TRIES if excuse is None else TRIES[:1])
    except AssertionError:
        if excuse is None:
            raise
    if excuse.instead == WITHOUT_CHUNKS:
        compared(call, check, call.plain, TRIES)
    return "excused"


def outcome_of_wrong_call(call: Call, excuse: Excuse | None = None) -> str:
    """The same of a call that may be wrong: what PyTorch refuses, ours must refuse too."""
    try:
        result = compared(call, "no_grad", call.theirs, TRIES)
        torchs = attempted("no_grad", call.theirs, call.tensors)
        assert result == "refused by both" or not isinstance(torchs, Exception), f"computed, where torch says: {torchs}"
        return result
    except AssertionError:
        if excuse is None:
            raise
    if excuse.instead == WITHOUT_CHUNKS:
        outcome_of_wrong_call(call._replace(theirs=call.plain))
    return "excused"


def wrong_calls(call: Call) -> Iterator[Call]:
    """The call with one of its tensors shorter, of one dimension more or less, or of another kind of number."""
    for place, x in enumerate(call.tensors):
        other = torch.float32 if x.dtype == torch.float64 else torch.float64
        changes = {f"of {other}": x.to(other), "of a dimension more": x[None]}
        if x.numel() and x.dim():
            changes |= {"short": x[:-1], "narrow": x[..., :-1], "of a dimension less": x.select(0, 0)}
        for change, changed in changes.items():
            tensors = [*call.tensors[:place], changed.detach(), *call.tensors[place + 1 :]]
            yield call._replace(name=f"{call.name}, {call.places[place]} {change}", tensors=tensors)


def compared(call: Call, check: str, measure: Function, tries: Sequence[int]) -> str:
    ours, theirs = (attempted(check, function, call.tensors) for function in (call.ours, measure))
    if isinstance(theirs, Exception):
        if isinstance(ours, Exception):
            return "refused by both"
        return "computed by ours alone" if measure is call.plain else compared(call, check, call.plain, tries)
    assert not isinstance(ours, Exception), f"{type(ours).__name__}: {ours}, where torch computes it"
    if are_same(ours, theirs):
        return "the same bits"
    facts = [[(tuple(x.shape), x.dtype) for x in results] for results in (ours, theirs)]
    assert facts[0] == facts[1], f"results are {facts[0]}, torch's {facts[1]}"
    return judged(call, check, measure, tries)


def are_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether all dtypes and bits are equal; any NaN equals any other."""

    def numbers(x: Tensor) -> Tensor:
        return x.nan_to_num(0.0, math.inf, -math.inf) if x.is_floating_point() else x

    def same(x: Tensor, y: Tensor) -> bool:
        if (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
            return False
        return x.is_meta or all(torch.equal(f(x), f(y)) for f in (torch.isnan, numbers))

    return len(ours) == len(theirs) and all(map(same, ours, theirs))


def attempted(check: str, function: Function, tensors: Sequence[Tensor]) -> list[Tensor] | Exception:
    try:
        return run(check, function, tensors)
    except REFUSALS as refusal:
        return refusal


def run(check: str, function: Function, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    return [x.detach() for x in CHECKS[check](function, copied(tensors, dtype), Noise(0))]


def judged(call: Call, check: str, measure: Function, tries: Sequence[int]) -> str:
    """How many draws, pooled, hold to the rule: of one number alone, even a sum of many, the errors are luck."""
    sides = (call.ours, None), (measure, None), (call.plain, torch.float64)
    for draws in tries:
        torch.manual_seed(0)
        drawn = [call.tensors, *(shuffled(call.tensors) for _ in range(draws - 1))]
        results = [[run(check, function, tensors, dtype) for tensors in drawn] for function, dtype in sides]
        pooled = [[torch.stack(several) for several in zip(*of_side, strict=True)] for of_side in results]
        try:
            for place, three in enumerate(zip(*pooled, strict=True)):
                assert_accurate(*three, f"result {place}")
            return "within the rule" if draws == 1 else f"within the rule over {draws} draws"
        except InaccurateError as error:
            missed = error
    raise missed


def shuffled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in other places; indices stay. A number alone, which has no other place, is made smaller."""

    def shuffle(x: Tensor) -> Tensor:
        numbers = x.detach().flatten()
        numbers = numbers * torch.rand_like(numbers) if len(numbers) == 1 else numbers[torch.randperm(len(numbers))]
        return numbers.view(x.shape).requires_grad_(x.requires_grad)

    return [shuffle(x) if x.is_floating_point() else x for x in tensors]


SHOWN = 30  # kinds of failure that a report prints


class Report:
    """What came of all checks of all samples, as counts; failures and excuses that excused nothing fail the test."""

    def __init__(self, excuses: Sequence[Excuse]) -> None:
        self.excuses = excuses
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.used: set[tuple[int, str]] = set()
        self.failures: dict[str, list[str]] = collections.defaultdict(list)  # samples by what is wrong with them

    def add(self, check: str, name: str, compare: Callable[[Excuse | None], str]) -> None:
        """The outcome of one check of one sample."""
        found = [place for place, x in enumerate(self.excuses) if check in x.checks and x.applies(name)]
        try:
            result = compare(self.excuses[found[0]] if found else None)
        except Exception as failure:
            self.failures[f"{check}: {type(failure).__name__} {failure}"].append(name)
            result = "failed"
        if result == "excused":
            self.used.add((found[0], check))
        self.counts[check][result] += 1

    def ask(self, check: str, name: str, question: Callable[[], None]) -> None:
        """The same of a check that holds or fails."""
        self.add(check, name, lambda _: question() or "held")

    def conclude(self, record_property: Callable[[str, int], None]) -> None:
        total = sum(self.counts.values(), collections.Counter())
        record_property("calls", total.total())
        for what in sorted(total):
            record_property(what, total[what])
        wrong = [f"{len(names)} x {what}\n  as {names[0]}" for what, names in self.failures.items()]
        for check, counts in self.counts.items():
            if counts.keys() == {"refused by both"}:
                wrong.append(f"{check}: PyTorch refuses every sample, so nothing was compared")
        for place, excuse in enumerate(self.excuses):
            unused = [check for check in excuse.checks if (place, check) not in self.used]
            if unused:
                wrong.append(f"{unused}: no call needs the excuse any more that {excuse.reason}")
        shown = "\n".join(wrong[:SHOWN])
        assert not wrong, f"{total['failed']} of {total.total()} calls failed; {len(wrong)} kinds of failure:\n{shown}"

"""Prove every provider right, then time all of them in turn.

A case is one input and the providers that compute the same outputs from it. Each provider first runs on the very
inputs that are timed later; its outputs are held against float64 by the rule of the test-suite, and one that is wrong,
or that changes an input without saying so, gets no time. Then the providers take turns (A B C A B C, never A A A), so
that a machine whose clock or load drifts drifts for all of them alike, and the rate that the machine reaches at best
is timed in the same rounds. The table's ratios are ratios of medians; their spread is that of the rounds' own ratios.
"""

import importlib
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.machine import Ceiling, Memory
from tests.support.accuracy import assert_accurate

Tensors = Mapping[str, Tensor]
Run = Callable[[Tensors], Tensors]
Action = Callable[[], object]
Sample = Callable[[], float]

MIN_ROUNDS = 3
MAX_ROUNDS = 15
MIN_SAMPLE_SECONDS = 2e-3  # below this the clock and one interrupt weigh more than the call


class UnavailableError(Exception):
    """A provider cannot run on this machine; the message says why."""


def import_peer(module: str, package: str, device: torch.device | None = None) -> ModuleType:
    """Import module from package, or say why that peer is not timed; device is given if its kernels need a GPU."""
    if device is not None and device.type == "cpu":
        raise UnavailableError("not timed: its kernels need a GPU")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"not timed: {package} cannot be imported: {error}") from None


@dataclass(frozen=True)
class Work:
    """What a run cannot avoid doing: amount of unit ("byte", "flop", "token", ...), and how that was counted."""

    unit: str
    amount: float
    formula: str


@dataclass(frozen=True)
class Provider:
    """One implementation. build may take its time (compilation, weights); the function it returns is what is timed.

    role      "ours", "peer", or "floor": work that none can avoid, timed beside them and not compared with the truth
    mutates   names of the inputs that a run overwrites; they are restored, untimed, after each run
    """

    name: str
    build: Callable[[], Run]
    role: str = "peer"
    mutates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """How large a case is among those of its series, which differ in that alone: pictures draw them as one line."""

    series: str
    amount: float
    unit: str


@dataclass(frozen=True)
class Case:
    """One input and everyone who computes the same outputs from it.

    inputs       makes the input tensors: random data, never zeros
    truth        the outputs in float64 (judged by tests/support/accuracy.py) or integers (judged by equality)
    reference    name of the provider whose error is the measure and to which ratios are taken
    sample       the part of a provider's outputs that truth covers
    torch_error  PyTorch's error of an output of one number, in place of the reference's: a mean may be right by luck
    dtype        dtype of the matrix products, where work counts FLOPs
    weight       share of the time relative to other cases
    size         its place in a series of sizes
    is_small     what a call costs the host is the point: on a GPU too, wall time of calls made one after the other
    """

    name: str
    device: torch.device
    inputs: Callable[[], Tensors]
    truth: Callable[[Tensors], Tensors]
    providers: Sequence[Provider]
    reference: str
    work: tuple[Work, ...] = ()
    sample: Callable[[Tensors], Tensors] = dict
    torch_error: Callable[[Tensors], Mapping[str, float]] = lambda given: {}
    dtype: torch.dtype = torch.float32
    weight: float = 1.0
    size: Size | None = None
    is_small: bool = False


Cases = Sequence[tuple[str, Case]]  # with the benchmark of each


class Budget:
    """Seconds, and how many of them remain."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self.clock = seconds, clock
        self._end = clock() + seconds

    def remaining(self) -> float:
        return self._end - self.clock()

    def part(self, fraction: float) -> "Budget":
        return Budget(self.remaining() * fraction, self.clock)


@dataclass
class Proven:
    """The providers of one case that may be timed, and why the others may not."""

    runs: dict[str, Action] = field(default_factory=dict)
    restores: dict[str, Action | None] = field(default_factory=dict)
    estimates: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Memory | None] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def measure(case: Case, budget: Budget, whole: Budget | None = None) -> dict[str, object]:
    """Prove and time one case; returns its JSON record. `left_out` in it names what the budget did not allow.

    Half of the budget is for the proofs, half for the timings, however long the proofs took: what compiles at its first
    call takes no time from what is timed.

    whole   that of the run: where the case's own allows no timing at all, it has the least that one takes from there
    """
    for_timing = budget.remaining() / 2
    proven, left_out = prove(case, budget.part(0.5))
    budget = Budget(for_timing, budget.clock)
    ceilings = [_ceiling(case, unit) for unit in ("byte", "flop") if any(work.unit == unit for work in case.work)]
    timer = DeviceTimer(case.device) if case.device.type == "cuda" and not case.is_small else HostTimer(case.device)
    samplers = {
        name: timer.sampler(run, proven.restores[name], proven.estimates[name]) for name, run in proven.runs.items()
    }
    for ceiling in ceilings:
        samplers[ceiling.name] = timer.sampler(ceiling.run, None, _seconds(case.device, ceiling.run))
    left_out += _spare_the_slowest(case, proven, samplers, budget, whole or budget)
    return _record(case, proven, interleave(samplers, budget), ceilings, left_out)


def _spare_the_slowest(
    case: Case, proven: Proven, samplers: dict[str, Sample], budget: Budget, whole: Budget
) -> list[str]:
    """Take peers from the samplers, the slowest first, until MIN_ROUNDS fit into the budget.

    If even ours and the reference do not fit, they may into the whole one; else everyone is taken.
    """
    roles, left_out = {provider.name: provider.role for provider in case.providers}, []
    seconds = max(budget.remaining(), 0.0)
    while proven.runs and (needed := MIN_ROUNDS * sum(proven.estimates[x] for x in samplers if x in roles)) > seconds:
        peers = [name for name in samplers if name != case.reference and roles.get(name) == "peer"]
        if not peers and needed <= whole.remaining():
            break
        slowest = max(peers, key=lambda name: proven.estimates[name], default="timing")
        left_out.append(f"{slowest}: {MIN_ROUNDS} rounds of all need {needed:.2g} s, {seconds:.2g} s were left")
        if not peers:
            samplers.clear()
            break
        del samplers[slowest]
    return left_out


def prove(case: Case, budget: Budget) -> tuple[Proven, list[str]]:
    """Run every provider once and hold it against the truth, the reference first: its error is the measure.

    Peers whose turn comes when the budget is used up are left out; the reference and ours never are.
    """
    torch._dynamo.reset()  # a function compiled for more cases than Dynamo's limit would run eagerly in the last ones
    inputs = _fresh_inputs(case)
    overwritten = {name for provider in case.providers for name in provider.mutates}
    pristine = {name: inputs[name].detach().clone() for name in overwritten}
    fingerprints = {name: _fingerprint(tensor) for name, tensor in inputs.items()}
    detached = {name: tensor.detach() for name, tensor in inputs.items()}
    truth, torch_error = case.truth(detached), case.torch_error(detached)
    proven, left_out, measure_of_error = Proven(), [], None
    for provider in sorted(case.providers, key=lambda provider: provider.name != case.reference):
        if budget.remaining() <= 0 and provider.role != "ours" and provider.name != case.reference:
            left_out.append(f"{provider.name}: the time was used up before its check")
            continue
        try:
            run = provider.build()
            outputs = run(inputs)
            if provider.role != "floor":
                outputs = case.sample(outputs)
                if provider.name == case.reference:
                    measure_of_error = {name: tensor.detach().clone() for name, tensor in outputs.items()}
                    for name, error in torch_error.items():
                        measure_of_error[name] = (truth[name] + error).to(outputs[name].dtype)
                _assert_right(outputs, measure_of_error, truth)
            _assert_unchanged(inputs, fingerprints, provider.mutates)
            del outputs  # they may be as large as the inputs, and would count in no one's peak but hold memory
            _admit(proven, provider, run, inputs, pristine, case.device)
        except UnavailableError as reason:
            proven.rejected[provider.name] = str(reason)
        except AssertionError as difference:
            proven.rejected[provider.name] = f"wrong, so not timed: {difference}"
            proven.wrong.append(provider.name)
            _restore(inputs, _fresh_inputs(case), inputs)  # whatever it did to them, the next one is not to see
        except Exception as error:  # a peer that breaks on this machine must not take the others' figures with it
            first_line = str(error).strip().partition("\n")[0]
            proven.rejected[provider.name] = f"failed: {type(error).__name__}: {first_line}"
        _restore(inputs, pristine, overwritten)
    # The reference goes first for its error, but the table and the rounds follow the order of the case.
    order = [provider.name for provider in case.providers if provider.name in proven.runs]
    proven.runs = {name: proven.runs[name] for name in order}
    return proven, left_out


def _fresh_inputs(case: Case) -> Tensors:
    torch.manual_seed(0)  # the same each time
    return dict(case.inputs())


def _admit(
    proven: Proven, provider: Provider, run: Run, inputs: Tensors, pristine: Tensors, device: torch.device
) -> None:
    """Second run of a provider: peak memory, and how long a run takes about."""
    restore = (lambda: _restore(inputs, pristine, provider.mutates)) if provider.mutates else None
    _restore(inputs, pristine, provider.mutates)
    start = time.perf_counter()
    # Detached, the results hold no graph, and so nothing that a provider only keeps for its backward.
    memory = machine.memory_of(device, lambda: {name: tensor.detach() for name, tensor in run(inputs).items()})
    estimate = time.perf_counter() - start
    if estimate < 0.1:  # reading the peak takes milliseconds itself
        _restore(inputs, pristine, provider.mutates)
        estimate = _seconds(device, lambda: run(inputs))
    proven.runs[provider.name] = lambda: run(inputs)
    proven.restores[provider.name], proven.memory[provider.name] = restore, memory
    proven.estimates[provider.name] = estimate


def _assert_right(outputs: Tensors, torch_outputs: Tensors | None, truth: Tensors) -> None:
    assert torch_outputs is not None, "the reference provider did not run, so there is no measure of error"
    assert outputs.keys() == truth.keys(), f"gives {sorted(outputs)}, expected {sorted(truth)}"
    for name, expected in truth.items():
        if expected.is_floating_point():
            assert_accurate(outputs[name], torch_outputs[name], expected, name)
        else:
            assert torch.equal(outputs[name], expected), f"{name}: differs from the truth"


def _fingerprint(tensor: Tensor) -> float:
    """A sum that any overwriting changes; a second copy of every input would not fit beside large ones."""
    return tensor.detach().sum(dtype=torch.float64).item()


def _assert_unchanged(inputs: Tensors, fingerprints: Mapping[str, float], mutates: Iterable[str]) -> None:
    for name in inputs.keys() - set(mutates):
        same = _fingerprint(inputs[name]) == fingerprints[name]
        assert same, f"overwrites its input {name!r} without saying so"


@torch.no_grad()
def _restore(inputs: Tensors, pristine: Tensors, names: Iterable[str]) -> None:
    for name in names:
        inputs[name].copy_(pristine[name])


def _seconds(device: torch.device, run: Action) -> float:
    machine.synchronize(device)
    start = time.perf_counter()
    run()
    machine.synchronize(device)
    return time.perf_counter() - start


# Timing


class HostTimer:
    """Wall time; short calls are repeated within a sample, unless the input must be restored for each.

    On a GPU it ends when the device has done what was asked: of calls that it does faster than the host makes them, the
    time is the host's.

    An untimed call goes first: a virtual machine hands memory that was free for some seconds back to its host, and
    faulting a GB in anew can take ten seconds. A training loop, which runs the same thing again at once, never waits
    for that, but a provider that waited for its turn would.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sampler(self, run: Action, restore: Action | None, estimate: float) -> Sample:
        calls = 1 if restore else max(1, round(MIN_SAMPLE_SECONDS / max(estimate, 1e-7)))

        def sample() -> float:
            run()
            if restore:
                restore()
            machine.synchronize(self._device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            machine.synchronize(self._device)
            seconds = (time.perf_counter() - start) / calls
            if restore:
                restore()
            return seconds

        return sample


class DeviceTimer:
    """CUDA events round one run, behind enough queued work that the device never waits for the host.

    That work is the write of a buffer four times the L2 cache, so each run also begins with a cold cache.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(max(4 * cache_bytes, 2**28), dtype=torch.int8, device=device)
        self._flush()
        self._flush_seconds = _seconds(device, self._flush)

    def _flush(self) -> None:
        self._buffer.zero_()

    def sampler(self, run: Action, restore: Action | None, estimate: float) -> Sample:
        # The host needs no longer to enqueue a run than the run took from call to completion.
        flushes = 1 + min(round(1.5 * estimate / self._flush_seconds), 100)

        def sample() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(flushes):
                self._flush()
            start.record()
            run()
            end.record()
            if restore:
                restore()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return sample


def interleave(samplers: Mapping[str, Sample], budget: Budget) -> dict[str, list[float]]:
    """Seconds of each sampler per round: one sample of each in turn, until MAX_ROUNDS or the budget is used up.

    Each round has an order of its own: a small call finds caches and heap as what came before it left them.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    orders = random.Random(0)
    longest = 0.0
    for done in range(MAX_ROUNDS if samplers else 0):
        before = budget.remaining()
        if done >= MIN_ROUNDS and before < longest:
            break
        for name in orders.sample(list(samplers), len(samplers)):
            samples[name].append(samplers[name]())
        longest = max(longest, before - budget.remaining())
    return samples


def _ceiling(case: Case, unit: str) -> Ceiling:
    ceiling = machine.copy_ceiling(case.device) if unit == "byte" else machine.matmul_ceiling(case.device, case.dtype)
    ceiling.run()
    return ceiling


def time_ceiling(ceiling: Ceiling, device: torch.device, rounds: int = 7) -> float:
    """Amount per second of one ceiling, median of rounds; for the description of the machine."""
    ceiling.run()
    return ceiling.amount / statistics.median(_seconds(device, ceiling.run) for _ in range(rounds))


# The record


def _record(
    case: Case, proven: Proven, samples: dict[str, list[float]], ceilings: list[Ceiling], left_out: list[str]
) -> dict[str, object]:
    rates = {c.unit: c.amount / statistics.median(samples[c.name]) for c in ceilings if samples.get(c.name)}
    roles = {provider.name: provider.role for provider in case.providers}
    reference = samples.get(case.reference) or None
    return {
        "case": case.name,
        "reference": case.reference,
        "work": [{"unit": work.unit, "amount": work.amount, "formula": work.formula} for work in case.work],
        "size": case.size and asdict(case.size),
        "ceilings": {c.name: {"unit": c.unit, "rate": rates[c.unit]} for c in ceilings if c.unit in rates},
        "providers": [
            {
                "name": name,
                "role": roles[name],
                **_spread(samples[name]),
                **_memory(proven.memory[name]),
                "rates": {work.unit: work.amount / statistics.median(samples[name]) for work in case.work},
                "shares": {
                    work.unit: work.amount / statistics.median(samples[name]) / rates[work.unit]
                    for work in case.work
                    if work.unit in rates
                },
                **_ratio(samples[name], reference),
                "times_floor": _times_floor(samples, name, roles),
            }
            for name in proven.runs
            if samples.get(name)
        ],
        "rejected": proven.rejected,
        "wrong": proven.wrong,
        "left_out": left_out,
    }


def _memory(memory: Memory | None) -> dict[str, int | None]:
    return {"peak_bytes": memory and memory.peak, "working_bytes": memory and memory.working}


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _spread(seconds: list[float]) -> dict[str, object]:
    low, high = _quartiles(seconds)
    median = statistics.median(seconds)
    return {"median_ms": median * 1e3, "quartiles_ms": [low * 1e3, high * 1e3], "rounds": len(seconds)}


def _ratio(seconds: list[float], reference: list[float] | None) -> dict[str, object]:
    """How many times faster than the reference: ratio of medians, and the quartiles of the rounds' own ratios."""
    if reference is None:
        return {"speedup": None, "speedup_quartiles": None}
    rounds = [theirs / ours for theirs, ours in zip(reference, seconds, strict=True)]
    return {
        "speedup": statistics.median(reference) / statistics.median(seconds),
        "speedup_quartiles": list(_quartiles(rounds)),
    }


def _times_floor(samples: dict[str, list[float]], name: str, roles: Mapping[str, str]) -> dict[str, list[float]]:
    """For our providers: time as a multiple of each floor's, [ratio of medians, quartiles of the rounds' ratios]."""
    if roles[name] != "ours":
        return {}
    multiples = {}
    for floor in (other for other, role in roles.items() if role == "floor" and samples.get(other)):
        rounds = [ours / least for ours, least in zip(samples[name], samples[floor], strict=True)]
        multiples[floor] = [statistics.median(samples[name]) / statistics.median(samples[floor]), *_quartiles(rounds)]
    return multiples

"""The only tolerance rule of the test-suite and of the benchmarks.

    max|ours - truth| <= 2 * max|torch - truth| + one rounding

truth is the reference run in float64, torch is PyTorch's own code at the dtype under test, and one rounding is half a
unit in the last place of that dtype at the largest magnitude of truth. No test carries a tolerance of its own.

Of a few numbers PyTorch's largest error may be small by luck, and which numbers these are depends on the CPU. A test
that misses the rule is therefore drawn again, and each of its comparisons judged once, by the largest errors of all its
draws, each in roundings of its own: what was luck evens out, what is a fault of ours stays.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 16  # by which a test is judged whose first draw missed the rule


class InaccurateError(AssertionError):
    """A result misses the rule."""


class Comparison(NamedTuple):
    """One result's largest errors against the truth, and a rounding of the largest magnitude in it."""

    name: str
    error: float
    torch_error: float
    rounding: float

    @property
    def allowed(self) -> float:
        return 2 * self.torch_error + self.rounding

    def in_roundings(self) -> "Comparison":
        """With the errors in units of the rounding, so that draws of large numbers do not decide for all."""
        if not self.rounding:
            return self
        return Comparison(self.name, self.error / self.rounding, self.torch_error / self.rounding, 1.0)

    def judge(self) -> None:
        if not self.error <= self.allowed:
            rule = f"allowed {self.allowed:.3e} (2x torch's + one rounding)"
            raise InaccurateError(f"{self.name}: error {self.error:.3e} against float64, {rule}")


_collected: list[Comparison] | None = None  # where comparisons go that are judged later, with those of other draws


def assert_accurate(ours: Tensor, torch_result: Tensor, truth: Tensor, name: str = "result") -> None:
    """Fail unless the error of ours against the float64 truth is at most twice PyTorch's plus one rounding."""
    assert truth.dtype == torch.float64, f"{name}: truth must be float64, is {truth.dtype}"
    assert ours.shape == torch_result.shape, (
        f"{name}: shape {tuple(ours.shape)}, torch gives {tuple(torch_result.shape)}"
    )
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, truth has {tuple(truth.shape)}"
    assert ours.dtype == torch_result.dtype, f"{name}: dtype {ours.dtype}, torch gives {torch_result.dtype}"
    if truth.numel() == 0:
        return
    comparison = compared(ours, torch_result, truth, name)
    if _collected is None:
        comparison.judge()
    else:
        _collected.append(comparison)


def compared(ours: Tensor, torch_result: Tensor, truth: Tensor, name: str = "result") -> Comparison:
    """The errors over the elements where truth is finite; where it is NaN or infinite, ours must be the very same."""
    truth = truth.detach()  # compared where it is: of large results on a GPU a copy to the host would take minutes
    ours64, torch64 = (result.detach().to(truth.device, torch.float64) for result in (ours, torch_result))
    finite = truth.isfinite()
    same = (ours64 == truth) | (ours64.isnan() & truth.isnan())
    assert bool((finite | same).all()), f"{name}: NaN or infinity differs from the truth"
    ours64, torch64, truth = ours64[finite], torch64[finite], truth[finite]
    if truth.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0)
    assert not bool(ours64.isnan().any()), f"{name}: NaN where the truth is finite"
    rounding = torch.finfo(ours.dtype).eps / 2 * truth.abs().max().item()
    torch_error = torch64.sub(truth).abs().max().item()
    assert torch_error == torch_error, f"{name}: PyTorch's own result is NaN, it cannot serve as the measure"
    return Comparison(name, ours64.sub(truth).abs().max().item(), torch_error, rounding)


def redraw(missed: InaccurateError, test: Callable[[], object], before: Tensor) -> None:
    """Judge by many draws the test that missed the rule, where the generator was in this state before it."""
    warnings.warn(f"{missed}; judged over {DRAWS} draws", stacklevel=1)
    torch.set_rng_state(before)
    assert_accurate_over_draws(test)


def assert_accurate_over_draws(test: Callable[[], object], draws: int = DRAWS) -> None:
    """Run the test so many times, and hold each of its comparisons to the rule with the largest errors of all."""
    for runs in zip(*(_comparisons_of(test) for _ in range(draws)), strict=True):
        _, *largest = map(max, zip(*(run.in_roundings() for run in runs), strict=True))
        Comparison(runs[0].name, *largest).judge()


def _comparisons_of(test: Callable[[], object]) -> list[Comparison]:
    global _collected
    _collected = []
    try:
        test()
        return _collected
    finally:
        _collected = None

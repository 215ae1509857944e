import pytest

from fastlm.train import run_log


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of other things than losses.png: to draw it takes longer than a toy run."""
    monkeypatch.setattr(run_log, "plot_losses", lambda metrics, picture: True)

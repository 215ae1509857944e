import pytest


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of other things than losses.png: to draw it takes longer than a toy run."""
    monkeypatch.setattr("fastlm.train.run_log.plot_losses", lambda metrics, picture: True)

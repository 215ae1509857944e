"""The loss curve of a run as a picture."""

from pathlib import Path
from typing import Any

from fastlm.train.metrics import read_metrics


def plot_losses(metrics: Path, picture: Path) -> bool:
    """Draw training and held-out loss over steps into a PNG; False, and no picture, if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    records = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for key, label, style in ("loss", "training", "-"), ("eval_loss", "held out", "o-"):
        steps, losses = _curve(records, key)
        if steps:
            axes.plot(steps, losses, style, label=f"{label}, last {losses[-1]:.3f}", linewidth=1.2, markersize=3)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture, dpi=120)
    return True


def _curve(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[key]) for record in records if isinstance(record.get(key), (int, float))]
    return [step for step, _ in points], [loss for _, loss in points]

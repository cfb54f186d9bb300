"""Losses over steps, as a picture beside the run."""

from gemma_jax.runs.folder import METRICS, PLOT, RunFolder

MISSING = "a plot needs matplotlib: pip install 'gemma-jax[train]'"
SMOOTH = 0.9  # of the running mean that is drawn over the losses


def plot_losses(folder: RunFolder) -> bool:
    """Draws `loss.png` from `metrics.jsonl`; returns whether matplotlib is there to do so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = folder.lines(METRICS)
    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    if not trained or not folder.writes:
        return True
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*trained)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(steps, _running_mean(losses), color="tab:blue", label="training")
    if held_out:
        axes.plot(*zip(*held_out), color="tab:orange", marker="o", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.path.name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder.path / PLOT, dpi=120)
    return True


def _running_mean(values) -> list[float]:
    """Exponential, with the first ones weighed as much as there are of them."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = SMOOTH * mean + value, SMOOTH * weight + 1
        means.append(mean / weight)
    return means

"""Learning curves: interquartile mean over seeds with its 95 % bootstrap band."""

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from amortax.common import record

COLORS = {  # one per algorithm, in all figures; color-blind safe (Okabe and Ito, and Tol)
    "ddpg": "#0072B2",
    "td3": "#D55E00",
    "sac_value": "#009E73",
    "sac": "#CC79A7",
    "fqi": "#000000",
    "fqi_amortized": "#E69F00",
    "nfqca": "#56B4E9",
    "soft_fqi": "#888888",
    "svg": "#882255",
    "svg_model": "#44AA99",
    "shac": "#332288",
    "reinforce": "#999933",
    "ppo": "#EE3377",
    "dqn": "#117733",
}


def iqm(values, axis=0):
    """Interquartile mean: the mean without the lowest and the highest quarter."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values):
    """95 % percentile-bootstrap interval `(low, high)` of the IQM over the first axis of `values [num_seeds, ...]`."""
    if len(values) < 2:
        return values[0], values[0]
    result = stats.bootstrap((values,), iqm, method="percentile", n_resamples=2000, rng=np.random.default_rng(0))
    return result.confidence_interval


def summary(values):
    """The IQM of `values [num_seeds]`, its interval and the worst seed, as text."""
    low, high = interval(values)
    spread = f"95 % interval {low:.1f} to {high:.1f}, worst {values.min():.1f}"
    return f"{iqm(values):.1f} (interquartile mean of {len(values)} seeds, {spread})"


def read_group(group):
    """`(seeds, progress [num_epochs], returns [num_seeds, num_epochs], finite)` of the seeds with the most epochs.

    Those that diverged have fewer, and their returns are NaN from then on.
    """
    folders = {seed: record.seed_folder(group, seed) for seed in record.seeds(group)}
    runs = {seed: record.read_metrics(x) for seed, x in folders.items() if (x / "metrics.csv").exists()}
    epochs = max(len(c["step"]) for c in runs.values())
    runs = {seed: c for seed, c in runs.items() if len(c["step"]) == epochs or not c["finite"][-1]}
    longest = max(runs.values(), key=lambda c: len(c["step"]))
    returns, finite = np.full((len(runs), epochs), np.nan), np.array([c["finite"].all() for c in runs.values()])
    for row, c in zip(returns, runs.values(), strict=True):
        row[: len(c["step"])] = c["eval_return_mean"]
    return list(runs), record.progress(longest), returns, finite


def draw(group):
    """Write `curve.png` of a group."""
    save(curve(Path(group)), Path(group) / "curve.png")


def save(figure, path):
    """Write a figure as PNG; the same figure gives the same bytes."""
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    record.write_atomic(path, data.getvalue())


def curve(group):
    """The learning curves of a group; the title counts the seeds that diverged, the mean is that of the others."""
    seeds, progress, returns, finite = read_group(group)
    algorithm, env = group.parts[-3:-1]
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")  # needs no display, unlike one of pyplot
    axes = figure.subplots()
    color = COLORS.get(algorithm, "tab:blue")  # blue for one's own algorithm
    axes.plot(progress, returns.T, color=color, linewidth=0.7, alpha=0.35 if len(seeds) > 1 else 0)
    if finite.any():
        low, high = interval(returns[finite])
        label = f"interquartile mean of {finite.sum()} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
        axes.plot(progress, iqm(returns[finite]), color=color, linewidth=2, label=label)
        if finite.sum() > 1:
            band = {"color": color, "alpha": 0.25, "linewidth": 0}
            axes.fill_between(progress, low, high, label="95 % bootstrap interval", **band)
        axes.legend(loc="lower right")
    diverged = f" ({(~finite).sum()} of {len(seeds)} seeds diverged)" if not finite.all() else ""
    axes.set_title(f"{algorithm} on {env}{diverged}")
    unit = record.unit(record.read_metrics(record.seed_folder(group, seeds[0])))
    axes.set_xlabel("environment steps" if unit == "steps" else unit)
    axes.set_ylabel("greedy return (sum of rewards per episode)")
    axes.grid(alpha=0.3)
    return figure

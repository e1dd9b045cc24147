"""Parts of the figures."""

import numpy as np
from matplotlib.figure import Figure

from amortax.common import plot
from experiments import study

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"  # distinguishable by the color-blind
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def figure(width, height, num_rows=1, num_columns=1, **options):
    """`(Figure, panels [num_rows, num_columns])`, the size in inches."""
    page = Figure(figsize=(width, height), dpi=120, layout="constrained")  # not pyplot's: it needs no display
    return page, page.subplots(num_rows, num_columns, squeeze=False, **options)


def algorithm_color(label):
    """The color of the algorithm at the start of a label."""
    return plot.COLORS[label.replace(",", " ").split()[0]]


def draw_curve(axes, rows, label, name, column="return", per=1, **style):
    """Interquartile mean of a label's seeds over its progress divided by `per`, and its 95 % bootstrap band."""
    draw_values(axes, *study.returns(rows, label, column), name, per, **style)


def draw_values(axes, progress, values, name, per=1, **style):
    """The same of `values [num_seeds, num_epochs]` over `progress [num_epochs]`."""
    low, high = plot.interval(values)
    (line,) = axes.plot(progress / per, plot.iqm(values), label=name, **style)
    axes.fill_between(progress / per, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_points(axes, names, values, color):
    """For each `{label: name}` a point with its 95 % interval, in `color(label)`, and beside it the seeds.

    `values` is `{label: [num_seeds]}`.
    """
    for x, label in enumerate(names):
        mean, (low, high) = plot.iqm(values[label]), plot.interval(values[label])
        spread = 0.18 + 0.12 * np.linspace(-1, 1, len(values[label]))
        axes.plot(x + spread, values[label], ".", color="0.65", markersize=4, zorder=1)
        bars = [[mean - low], [high - mean]]
        axes.errorbar(x - 0.12, mean, bars, fmt="o", color=color(label), capsize=3, zorder=2)
    axes.set_xticks(range(len(names)), names.values())
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(axis="y", alpha=0.3)


def draw_optimum(axes, value):
    """A dashed line at the optimum, where it is known."""
    if value is not None:
        axes.axhline(value, color="black", linestyle="--", linewidth=1, label=f"optimum, {value:,.1f}")

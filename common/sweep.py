"""Sweeps: a grid of hyperparameters trained by one compiled program, its table and its heat map.

Each cell of the grid is a run folder of its own, named after its values; beside them stands `<name>-sweep/`:

    config.json  what was swept: algorithm, source, versions, first and last seed, the grid
    sweep.csv    a row for each cell: interquartile mean of the final greedy returns, 95 % interval, worst, diverged
    sweep.png    the interquartile means as a heat map
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from common import cli, plot


class Cell(NamedTuple):
    """One combination of the grid's values; `suffix` is added to the name of its folder."""

    suffix: str
    config: object


def parse(config, words):
    """`{field: values}` from words such as `gamma=0.9,0.99`; fails on what cannot be swept."""
    leaves = [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_flatten_with_path(config)[0]]
    grid = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = name.replace("-", "_")
        if not equals:
            cli.fail(f"--sweep {word}: must be FIELD=VALUE,VALUE,...")
        if name not in leaves and name in [field.name for field in dataclasses.fields(config)]:
            cli.fail(
                f"--sweep {word}: {name} shapes the compiled program; start a separate run for each value, "
                f"with --name to tell them apart"
            )
        if name not in leaves:
            cli.fail(f"--sweep {word}: no field {name}; these can be swept: {', '.join(leaves)}")
        if name in grid:
            cli.fail(f"--sweep {word}: {name} is swept twice")
        grid[name] = [parse_value(word, value, type(getattr(config, name))) for value in values.split(",")]
        for value in grid[name]:
            cli.check_value(name, value)
        if len(set(grid[name])) < len(grid[name]):
            cli.fail(f"--sweep {word}: a value stands twice")
    return grid


def parse_value(word, text, kind):
    """The number of type `kind` that `text` stands for."""
    try:
        return kind(text)
    except ValueError:
        cli.fail(f"--sweep {word}: {text!r} is not a number of type {kind.__name__}")


def cells(config, grid):
    """The cells of a grid, the last field's values next to each other; without a grid `config` alone."""
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    suffixes = ["".join(f"_{name}={value}" for name, value in chosen.items()) for chosen in combinations]
    return [
        Cell(suffix, dataclasses.replace(config, **chosen))
        for suffix, chosen in zip(suffixes, combinations, strict=True)
    ]


def describe(description, grid, seeds):
    """What a sweep's `config.json` holds, from that of its first run, `description`; `seeds` are the first and last."""
    fixed = {name: value for name, value in description["config"].items() if name not in grid}
    return description | {"seed": seeds, "config": fixed, "sweep": grid}


def table(grid, finals, diverged):
    """A dict for each cell, from the final returns `[num_finite_seeds]` and the number of diverged seeds of each."""
    rows = []
    for values, returns, lost in zip(itertools.product(*grid.values()), finals, diverged, strict=True):
        row = dict(zip(grid, values, strict=True)) | {"iqm": np.nan, "low": np.nan, "high": np.nan, "worst": np.nan}
        if len(returns):
            low, high = plot.interval(returns)
            row |= {"iqm": float(plot.iqm(returns)), "low": float(low), "high": float(high)}
            row["worst"] = float(returns.min())
        rows.append(row | {"diverged": lost})
    return rows


def text(rows):
    """The table for a terminal."""
    lines = [
        [*rows[0]],
        *([f"{v:.1f}" if k in ("iqm", "low", "high", "worst") else f"{v:g}" for k, v in row.items()] for row in rows),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines)


def draw(home, grid, rows):
    """Write `sweep.png`."""
    algorithm, env = home.parts[-3:-1]
    plot.save(heat_map(grid, rows, f"{algorithm} on {env}: interquartile means of the seeds"), home / "sweep.png")


def heat_map(grid, rows, title):
    """The interquartile means over the last two fields of the grid, a panel for each combination of the others."""
    names = list(grid)
    x, y = names[-1], names[-2] if len(names) > 1 else None
    height, width = len(grid[y]) if y else 1, len(grid[x])
    panels = np.array([row["iqm"] for row in rows]).reshape(-1, height, width)
    others = list(itertools.product(*(grid[name] for name in names[:-2])))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = columns * (1.5 + 0.9 * width) + 1.5, lines * (1.2 + 0.6 * height)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    finite = panels[np.isfinite(panels)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0, 0)
    for panel, chosen, ax in itertools.zip_longest(panels, others, axes.flat):
        if panel is None:
            ax.set_axis_off()
            continue
        image = ax.imshow(panel, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        for (i, j), value in np.ndenumerate(panel):
            dark = not np.isfinite(value) or value < (low + high) / 2
            label = f"{value:.1f}" if np.isfinite(value) else "diverged"
            ax.text(j, i, label, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        ax.set_facecolor("0.3")  # seen where no seed stayed finite
        ax.set_xticks(range(width), [f"{value:g}" for value in grid[x]])
        ax.set_yticks(range(height), [f"{value:g}" for value in grid[y]] if y else [""])
        ax.set_xlabel(x)
        ax.set_ylabel(y or "")
        if chosen:
            ax.set_title(", ".join(f"{n} = {v:g}" for n, v in zip(names, chosen, strict=False)), fontsize=9)
    figure.colorbar(image, ax=axes, label="greedy return")
    figure.suptitle(title)
    return figure

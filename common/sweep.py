"""Sweeps: a grid of hyperparameters trained by one compiled program, its table and its heat map.

Each cell of the grid is a group with a folder of its own, named after its values; beside them is `<name>-sweep/`:

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

from amortax.common import cli, plot, record


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
            each = "start a separate run for each value, with its own --name"
            cli.fail(f"--sweep {word}: {name} shapes the compiled program; {each}")
        if name not in leaves:
            cli.fail(f"--sweep {word}: no field {name}; these can be swept: {', '.join(leaves)}")
        if name in grid:
            cli.fail(f"--sweep {word}: {name} is swept twice")
        grid[name] = [parse_value(word, value, type(getattr(config, name))) for value in values.split(",")]
        if len(set(grid[name])) < len(grid[name]):
            cli.fail(f"--sweep {word}: a value is repeated")
    return grid


def parse_value(word, text, kind):
    """`text` as a number of type `kind`."""
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


def one_by_one(config, grid):
    """`config` with each swept value in turn, to be checked."""
    return [dataclasses.replace(config, **{name: value}) for name, values in grid.items() for value in values]


def describe(description, grid, seeds):
    """The content of a sweep's `config.json`: from that of its first run, and its first and last seed."""
    fixed = {name: value for name, value in description["config"].items() if name not in grid}
    return description | {"seed": seeds, "config": fixed, "sweep": grid}


def table(grid, returns, finite):
    """A dict for each cell, from the final returns `[num_cells, num_seeds]` and whether each seed is finite."""
    rows = []
    for values, final, kept in zip(itertools.product(*grid.values()), returns, finite, strict=True):
        row = dict(zip(grid, values, strict=True)) | {"iqm": np.nan, "low": np.nan, "high": np.nan, "worst": np.nan}
        if kept.any():
            low, high = plot.interval(final[kept])
            row |= {"iqm": float(plot.iqm(final[kept])), "low": float(low), "high": float(high)}
            row["worst"] = float(final[kept].min())
        rows.append(row | {"diverged": int((~kept).sum())})
    return rows


def text(rows):
    """The table for a terminal."""
    lines = [
        [*rows[0]],
        *([f"{v:.1f}" if k in ("iqm", "low", "high", "worst") else f"{v:g}" for k, v in row.items()] for row in rows),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines)


def write(out_folder, grid, rows, with_plot=True):
    """Write `sweep.csv` and `sweep.png`."""
    record.write_rows(out_folder / "sweep.csv", rows)
    if with_plot:
        algorithm, env = out_folder.parts[-3:-1]
        figure = heat_map(grid, rows, f"{algorithm} on {env}: interquartile means of the seeds")
        plot.save(figure, out_folder / "sweep.png")


def heat_map(grid, rows, title):
    """The interquartile means over the last two fields of the grid, a panel for each combination of the others."""
    names = list(grid)
    values_x, values_y = grid[names[-1]], grid[names[-2]] if len(names) > 1 else [None]
    height, width = len(values_y), len(values_x)
    panels = np.array([row["iqm"] for row in rows]).reshape(-1, height, width)
    others = list(itertools.product(*(grid[name] for name in names[:-2])))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = columns * (1.5 + 0.9 * width) + 1.5, lines * (1.2 + 0.6 * height)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    finite = panels[np.isfinite(panels)]
    limits = (finite.min(), finite.max()) if len(finite) else (0, 0)
    for panel, chosen, ax in zip(panels, others, axes.flat, strict=False):
        image = draw_panel(ax, panel, limits)
        ax.set_xticks(range(width), [f"{value:g}" for value in values_x])
        ax.set_yticks(range(height), ["" if value is None else f"{value:g}" for value in values_y])
        ax.set(xlabel=names[-1], ylabel=names[-2] if len(names) > 1 else "")
        ax.set_title(", ".join(f"{n} = {v:g}" for n, v in zip(names, chosen, strict=False)), fontsize=9)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    figure.colorbar(image, ax=axes, label="greedy return")
    figure.suptitle(title)
    return figure


def draw_panel(ax, panel, limits):
    """Draw `panel [height, width]` with a number in each cell; `limits` are the ends of the color scale."""
    image = ax.imshow(panel, cmap="viridis", vmin=limits[0], vmax=limits[1], aspect="auto")
    ax.set_facecolor("0.3")  # visible where all seeds diverged
    for (i, j), value in np.ndenumerate(panel):
        dark = not np.isfinite(value) or value < sum(limits) / 2
        label = f"{value:.1f}" if np.isfinite(value) else "diverged"
        ax.text(j, i, label, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return image

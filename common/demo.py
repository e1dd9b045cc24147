"""Command line of the gradient estimators: prints a table of their errors, saves the estimates and a figure."""

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from matplotlib.figure import Figure

from amortax.common import checks, cli, plot, record

FORMULAS = {"product": "x²θ", "square": "x²", "exp": "exp(x)", "sin": "sin(x)", "step": "1[x > 0]"}
COLORS = ("#0072B2", "#E69F00", "#009E73")  # color-blind safe


@dataclasses.dataclass(frozen=True)
class Options:
    """Which random numbers, and where the results go."""

    seed: Annotated[int, ">= 0"] = 0  # of the random numbers
    chapter_table: bool = False  # use the random numbers of the published table: seed 0 of JAX's former generator
    out: Path = Path("results/runs")  # folder of all results
    no_plot: bool = False  # do not draw estimates.png


def main(config_class, train, true_derivative, summarize):
    """Read the flags, estimate, print; exit code 2 for a mistake. The same flags give the same files."""
    script = Path(inspect.getsourcefile(train))
    config, options = parse(config_class)
    checks.check_config(config, train)
    if options.chapter_table:
        jax.config.update("jax_threefry_partitionable", False)
    estimates = jax.jit(train)(config, jax.random.key(options.seed))
    truth = true_derivative(config)
    if not all(np.isfinite(x).all() for x in (*estimates, truth)):
        cli.fail(f"--theta {config.theta}: {config.function} leaves the range of floating-point numbers")
    folder = Path(options.out) / script.stem / config.function / folder_name(config, options)
    try:
        record.write_config(folder, record.describe(script, config, options.seed))
        write_estimates(folder / "estimates.csv", estimates)
        if not options.no_plot:
            plot.save(violins(config, estimates, truth), folder / "estimates.png")
    except OSError as error:
        cli.fail(f"--out {options.out}: cannot write there: {error}")
    print_table(config, estimates, truth, summarize)
    print(f"\nresults: {folder}")


def print_table(config, estimates, truth, summarize):
    """Print mean, bias, variance and mean squared error of each estimator."""
    print(f"f = {config.function}, x ~ N(theta, 1), theta = {config.theta:g}: dE[f]/dtheta = {truth:.6f}")
    print(f"{config.num_trials:,} estimates, each from {config.batch_size:,} samples\n")
    print(f"{'':17}{'mean':>11}{'bias':>11}{'variance':>11}{'MSE':>11}")
    for name, values in zip(estimates._fields, estimates, strict=True):
        print(f"{name.replace('_', ' '):17}" + "".join(f"{x:>11.6f}" for x in summarize(values, truth)))


def parse(config_class):
    """Read `(Config, Options)` from the command line."""

    def read(estimate: config_class, run: Options):
        return estimate, run

    cli.show_rules(config_class)
    cli.show_rules(Options)
    config, options = cli.parse(read, prog=Path(sys.argv[0]).name, description=cli.summary(config_class))
    if config.num_trials < 2:
        cli.fail(f"--num-trials {config.num_trials}: must be 2 or more: one trial has no variance")
    cli.check_range("seed", options.seed, 0, cli.INT_MAX)
    if options.chapter_table and (config, options.seed) != (config_class(), 0):
        cli.fail("--chapter-table: needs the defaults of --theta, --batch-size, --num-trials, --function and --seed")
    return config, options


def folder_name(config, options):
    """A folder name for each set of flags, so that different runs never overwrite each other."""
    if options.chapter_table:
        return "chapter-table"
    return f"theta={config.theta}-batch={config.batch_size}-trials={config.num_trials}-seed={options.seed}"


def write_estimates(path, estimates):
    """Write a column per estimator and a row per trial."""
    rows = np.stack(estimates, axis=1).tolist()
    record.write_rows(path, [dict(zip(estimates._fields, row, strict=True)) for row in rows])


def violins(config, estimates, truth):
    """The figure: density and quartiles of each estimator's estimates beside the true derivative."""
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    values = [np.asarray(x, np.float64) for x in estimates]
    parts = axes.violinplot(values, showextrema=False, widths=0.8)
    for body, color in zip(parts["bodies"], COLORS, strict=True):
        body.set(facecolor=color, alpha=0.5)
    axes.boxplot(values, notch=True, showfliers=False, widths=0.15, medianprops={"color": "black"})
    axes.axhline(truth, color="black", linestyle="--", linewidth=1, label=f"true derivative, {truth:.4g}")
    axes.set_xticks([1, 2, 3], [name.replace("_", " ") for name in estimates._fields])
    axes.set_ylabel(f"estimate of d/dθ E[f(x, θ)] from {config.batch_size:,} samples")
    axes.set_title(f"f(x, θ) = {FORMULAS.get(config.function, config.function)}, x ~ N(θ, 1), θ = {config.theta:g}")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    return figure

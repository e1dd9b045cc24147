"""Command line of the demonstration of gradient estimators: prints its table, saves its estimates and a figure."""

import dataclasses
import inspect
import sys
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from common import cli, plot, record

FORMULAS = {"product": "x²θ", "square": "x²", "exp": "exp(x)", "sin": "sin(x)", "step": "1[x > 0]"}
COLORS = ("#0072B2", "#E69F00", "#009E73")  # told apart by the colour-blind


@dataclasses.dataclass(frozen=True)
class Options:
    """Which random numbers, and where the results go."""

    seed: int = 0  # of the random numbers, 0 or more
    chapter_table: bool = False  # the random numbers of the published table: seed 0 of JAX's former generator
    out: Path = Path("results/runs")  # folder of all results
    no_plot: bool = False  # draw no estimates.png


def main(config_class, train, true_derivative, summarize):
    """Read flags, estimate, print; exit code 2 for a mistake. The same flags give the same files."""
    script = Path(inspect.getsourcefile(train))
    config, options = parse(config_class)
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
    print(f"f = {config.function}, x ~ N(theta, 1), theta = {config.theta:g}: dE[f]/dtheta = {truth:.6f}")
    print(f"{config.num_trials:,} estimates, each from {config.batch_size:,} samples\n")
    print(f"{'':17}{'mean':>11}{'bias':>11}{'variance':>11}{'MSE':>11}")
    for name, values in zip(estimates._fields, estimates, strict=True):
        print(f"{name.replace('_', ' '):17}" + "".join(f"{x:>11.6f}" for x in summarize(values, truth)))
    print(f"\nresults: {folder}")


def parse(config_class):
    """Read `(Config, Options)` from the command line and check each value by itself."""

    def read(estimate: config_class, run: Options):
        return estimate, run

    summary = (sys.modules[config_class.__module__].__doc__ or "").strip().split("\n")[0]
    config, options = cli.parse(read, prog=Path(sys.argv[0]).name, description=summary)
    for name, value in vars(config).items():
        cli.check_value(name, value)
    if config.num_trials < 2:
        cli.fail(f"--num-trials {config.num_trials}: must be 2 or more, or there is no variance")
    if not 0 <= options.seed <= cli.INT_MAX:
        cli.fail(f"--seed {options.seed}: must be from 0 to {cli.INT_MAX}")
    if options.chapter_table and (config, options.seed) != (config_class(), 0):
        cli.fail(
            "--chapter-table: goes with the defaults of --theta, --batch-size, --num-trials, --function and --seed"
        )
    return config, options


def folder_name(config, options):
    """A folder of its own for each set of flags, so that nothing is overwritten by anything else."""
    if options.chapter_table:
        return "chapter-table"
    return f"theta={config.theta}-batch={config.batch_size}-trials={config.num_trials}-seed={options.seed}"


def write_estimates(path, estimates):
    """Write a column for each estimator, a row for each trial."""
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

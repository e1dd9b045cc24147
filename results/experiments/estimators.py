"""Three estimators of the derivative of an expectation: bias and variance, over the number of samples.

The estimators are those of `algorithms/gradient_estimators.py` with its defaults: f(x, theta) = x^2 theta and
x ~ N(theta, 1) at theta = 1, where the derivative is 4. The random numbers come from seed 0 of JAX's former generator,
with which 1,000 samples reproduce the published table, as `--chapter-table` does.
"""

import jax
import numpy as np
from matplotlib.cbook import boxplot_stats

from amortax.algorithms import gradient_estimators as ge
from experiments import drawing, study
from experiments.study import Criterion, Experiment

STYLES = {
    "naive": (drawing.BLUE, "o"),
    "score_function": (drawing.ORANGE, "s"),
    "reparameterized": (drawing.GREEN, "^"),
}
PARTS = {  # of the error
    "mse": {"linewidth": 6, "alpha": 0.3},
    "variance": {"linestyle": "-"},
    "bias": {"linestyle": ":"},
}
NAMES = {"mse": "mean squared error", "variance": "variance", "bias": "squared bias"}
STATISTICS = ge.Statistics._fields
PROBABILITIES = np.linspace(0, 1, 41)
SAMPLES, PUBLISHED = (10, 100, 1000, 10_000), 1000


def measure(cell):
    """Statistics and quantiles of each estimator over its trials; `cell` has the numbers of samples and trials."""
    config = ge.Config(batch_size=cell[0], num_trials=cell[1])
    with jax.threefry_partitionable(False):
        estimates = jax.jit(ge.train)(config, jax.random.key(0))
    rows = []
    for name, values in zip(estimates._fields, estimates, strict=True):
        found = dict(zip(STATISTICS, ge.summarize(values, ge.true_derivative(config)), strict=True))
        found |= {f"quantile {p:g}": np.quantile(values, p) for p in PROBABILITIES}
        for what, x in found.items():  # eight digits: the published table has six decimals
            rows.append({"samples": cell[0], "trials": cell[1], "estimator": name, "what": what, "x": f"{x:.8g}"})
    return rows


def cells(samples, num_trials):
    """`{label: (samples, trials)}`."""
    return {f"{n:,} samples": (n, num_trials) for n in samples}


def statistic(rows, name, what):
    """A statistic of an estimator: `(numbers of samples, values)`."""
    chosen = [row for row in rows if (row["estimator"], row["what"]) == (name, what)]
    return np.array([[row["samples"], row["x"]] for row in chosen]).T


def published(rows):
    """The rows with the published table's number of samples; in a quick run those with the most."""
    counts = {row["samples"] for row in rows}
    shown = PUBLISHED if PUBLISHED in counts else max(counts)
    return [row for row in rows if row["samples"] == shown]


def draw(rows):
    """Distribution of the estimates, and the parts of their error over the number of samples."""
    page, ((left, right),) = drawing.figure(11, 4.4, 1, 2)
    shown = published(rows)
    for x, (name, (color, marker)) in enumerate(STYLES.items()):
        quantiles = [statistic(shown, name, f"quantile {p:g}")[1, 0] for p in PROBABILITIES]
        values = np.interp(np.linspace(0, 1, 1001), PROBABILITIES, quantiles)
        (body,) = left.violinplot([values], [x], showextrema=False, widths=0.8)["bodies"]
        body.set(facecolor=color, alpha=0.5)
        box = boxplot_stats(values)
        left.bxp(box, [x], showfliers=False, widths=0.15, medianprops={"color": "black"}, manage_ticks=False)
        for what, style in PARTS.items():
            samples, x = statistic(rows, name, what)
            dots = {} if what == "mse" else {"marker": marker, "markersize": 4}
            right.loglog(samples, x**2 if what == "bias" else x, color=color, **style, **dots)
        right.plot([], [], color=color, marker=marker, label=name.replace("_", " "))
    for what, style in PARTS.items():
        right.plot([], [], color="0.3", label=NAMES[what], **style)
    left.axhline(4, color="black", linestyle="--", linewidth=1, label="true derivative, 4")
    left.set_xticks(range(len(STYLES)), [name.replace("_", " ") for name in STYLES])
    left.set(ylabel=f"estimate from {shown[0]['samples']:,.0f} samples", title="f(x, θ) = x²θ, x ~ N(θ, 1), θ = 1")
    right.set(xlabel="samples per estimate", ylabel="squared error of an estimate", ylim=(None, 3e3))
    left.legend(loc="lower right")
    right.legend(fontsize="small", ncols=2, loc="upper right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return page


def standard_errors_off(rows):
    """For each estimator and number of samples: distance of the mean from the true derivative in standard errors."""
    bias, variance = ({name: statistic(rows, name, what)[1] for name in STYLES} for what in ("bias", "variance"))
    return {name: np.abs(bias[name]) / np.sqrt(variance[name] / rows[0]["trials"]) for name in STYLES}


def holds(rows):
    """The parts of the claim, each for all numbers of samples."""
    distances = standard_errors_off(rows)
    variances = {name: statistic(rows, name, "variance")[1] for name in STYLES}
    return {
        "naive is biased": distances["naive"].min() > 10,
        "score function is unbiased": distances["score_function"].max() < 4,
        "reparameterized is unbiased": distances["reparameterized"].max() < 4,
        "reparameterized has the lower variance": (variances["reparameterized"] < variances["score_function"]).all(),
    }


def notes(rows):
    """The distances that decide."""
    distances = standard_errors_off(rows)
    naive = distances.pop("naive").min()
    return (
        f"The mean of the naive estimator is at least {naive:,.0f} standard errors off, those of the other two at most "
        f"{max(x.max() for x in distances.values()):.1f}. The estimators of a trial share their noise; the measured "
        "bias of an unbiased estimator is sampling error. The table is for "
        f"{published(rows)[0]['samples']:,.0f} samples."
    )


def table(rows):
    """The statistics of the published table."""
    lines = []
    for name in STYLES:
        found = [statistic(published(rows), name, what)[1, 0] for what in STATISTICS]
        lines.append([name.replace("_", " "), *(f"{x:.6f}" for x in found)])
    return study.table(["estimator", "mean", "bias", "variance", "MSE"], lines)


EXPERIMENTS = {
    "estimators": Experiment(
        title="The pathwise estimator is unbiased and has less variance than the score function",
        question="Which estimators of an expectation's derivative are unbiased, and how noisy are they?",
        cells=cells(SAMPLES, 1000),
        measure=measure,
        criterion=Criterion(
            "for every number of samples: the mean of the naive estimator is more than 10 standard errors from the "
            "true derivative, those of the other two less than 4, and the reparameterized estimator has a lower "
            "variance than the score function.",
            holds,
        ),
        notes=notes,
        table=table,
        draw=draw,
        quick=lambda _: cells((10, 100), 200),
        sources=("algorithms/gradient_estimators.py",),
        sample="1,000 estimates each",
    )
}

"""Three estimators of the derivative of an expectation: bias and variance, over the number of samples.

The estimators are those of `algorithms/gradient_estimators.py` with its defaults, f(x, theta) = x^2 theta and
x ~ N(theta, 1) at theta = 1, where the derivative is 4. The random numbers are from seed 0 of JAX's former generator,
with which 1,000 samples give the published table, as `--chapter-table` does.
"""

import jax
import numpy as np
import study
from matplotlib.cbook import boxplot_stats
from study import Experiment, verdict

from algorithms import gradient_estimators as ge

STYLES = {  # told apart by the colour-blind
    "naive": ("#0072B2", "o"),
    "score_function": ("#E69F00", "s"),
    "reparameterized": ("#009E73", "^"),
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
    """Statistics and quantiles of the trials of each estimator, `cell` being the numbers of samples and trials."""
    config = ge.Config(batch_size=cell[0], num_trials=cell[1])
    with jax.threefry_partitionable(False):
        estimates = jax.jit(ge.train)(config, jax.random.key(0))
    rows = []
    for name, values in zip(estimates._fields, estimates, strict=True):
        figures = dict(zip(STATISTICS, ge.summarize(values, ge.true_derivative(config)), strict=True))
        figures |= {f"quantile {p:g}": np.quantile(values, p) for p in PROBABILITIES}
        for what, x in figures.items():  # eight digits: the published table has six decimals
            rows.append({"samples": cell[0], "trials": cell[1], "estimator": name, "what": what, "x": f"{x:.8g}"})
    return rows


def cells(samples, num_trials):
    """`{label: (samples, trials)}`."""
    return {f"{n:,} samples": (n, num_trials) for n in samples}


def figures(rows, name, what):
    """Of an estimator: numbers of samples, and a figure for each."""
    chosen = [row for row in rows if (row["estimator"], row["what"]) == (name, what)]
    return np.array([[row["samples"], row["x"]] for row in chosen]).T


def published(rows):
    """The rows with the published table's number of samples, or in a quick run those with the most."""
    counts = {row["samples"] for row in rows}
    shown = PUBLISHED if PUBLISHED in counts else max(counts)
    return [row for row in rows if row["samples"] == shown]


def draw(rows):
    """Distribution of the estimates, and what makes their error up over the number of samples."""
    page, ((left, right),) = study.figure(11, 4.4, 1, 2)
    shown = published(rows)
    for x, (name, (color, marker)) in enumerate(STYLES.items()):
        quantiles = [figures(shown, name, f"quantile {p:g}")[1, 0] for p in PROBABILITIES]
        values = np.interp(np.linspace(0, 1, 1001), PROBABILITIES, quantiles)
        (body,) = left.violinplot([values], [x], showextrema=False, widths=0.8)["bodies"]
        body.set(facecolor=color, alpha=0.5)
        box = boxplot_stats(values)
        left.bxp(box, [x], showfliers=False, widths=0.15, medianprops={"color": "black"}, manage_ticks=False)
        for what, style in PARTS.items():
            samples, figure = figures(rows, name, what)
            dots = {} if what == "mse" else {"marker": marker, "markersize": 4}
            right.loglog(samples, figure**2 if what == "bias" else figure, color=color, **style, **dots)
        right.plot([], [], color=color, marker=marker, label=name.replace("_", " "))
    for what, style in PARTS.items():
        right.plot([], [], color="0.3", label=NAMES[what], **style)
    left.axhline(4, color="black", linestyle="--", linewidth=1, label="true derivative, 4")
    left.set_xticks(range(len(STYLES)), [name.replace("_", " ") for name in STYLES])
    left.set(ylabel=f"estimate from {shown[0]['samples']:,.0f} samples", title="f(x, θ) = x²θ, x ~ N(θ, 1), θ = 1")
    right.set(xlabel="samples of an estimate", ylabel="error of an estimate, squared", ylim=(None, 3e3))
    left.legend(loc="lower right")
    right.legend(fontsize="small", ncols=2, loc="upper right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return page


def report(rows):
    """Is the naive estimator biased, are the others not, and does reparameterising leave the least variance?"""
    held, distances = [], {}
    for name in STYLES:
        bias, variance = (figures(rows, name, what)[1] for what in ("bias", "variance"))
        distances[name] = np.abs(bias) / np.sqrt(variance / rows[0]["trials"])
    variances = {name: figures(rows, name, "variance")[1] for name in STYLES}
    held.append(distances["naive"].min() > 10)
    held += [distances[name].max() < 4 for name in ("score_function", "reparameterized")]
    held.append((variances["reparameterized"] < variances["score_function"]).all())
    naive = distances.pop("naive").min()
    text = (
        f"{verdict(held)} The claim is that the naive derivative is biased (its mean is {naive:,.0f} or more standard "
        "errors off), that the other two are not (their means are at most "
        f"{max(x.max() for x in distances.values()):.1f} standard errors off; held to 4), and that the reparameterised "
        "one has the lower variance of these two; asked of every number of samples. The estimators of a trial share "
        "their noise, and what bias is measured of an unbiased one is sampling error. The table is for "
        f"{published(rows)[0]['samples']:,.0f} samples."
    )
    lines = []
    for name in STYLES:
        found = [figures(published(rows), name, what)[1, 0] for what in STATISTICS]
        lines.append([name.replace("_", " "), *(f"{x:.6f}" for x in found)])
    return "\n".join([text, "", study.table(["estimator", "mean", "bias", "variance", "MSE"], lines)])


EXPERIMENTS = {
    "estimators": Experiment(
        title="Differentiate an expectation: three estimators",
        cells=cells(SAMPLES, 1000),
        measure=measure,
        report=report,
        draw=draw,
        quick=lambda _: cells((10, 100), 200),
        sources=("estimators",),
        sample="1,000 estimates of each",
    )
}

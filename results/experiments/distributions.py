"""Samples of `algorithms/gradient_estimators.py` against densities, and the bias and variance of Gumbel-softmax.

`distributions`: histograms of samples beside the densities; for Gumbel-softmax over three categories, the samples
themselves. `gumbel_softmax`: estimates of the derivative of E[f(z)] with respect to three logits, where z is one-hot
and f(z) = q z with q = (1, 0, 2). Compared are the squared bias and the variance of a pathwise estimate from one sample
of Gumbel-softmax, over its temperature, and those of the score function with Gumbel-max, which is unbiased. The true
derivative is a sum over the three values of z.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from amortax.algorithms import gradient_estimators as ge
from experiments import drawing, study
from experiments.drawing import BLUE, GREEN, ORANGE
from experiments.study import Experiment

LOGITS = np.array([0.5, 0.0, -1.0], np.float32)
VALUES = np.array([1.0, 0.0, 2.0], np.float32)
COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]], np.float32)
TEMPERATURES = [round(t, 4) for t in np.geomspace(0.05, 5, 13)]
BINS, BINS_OF_PLANE, POINTS_OF_BIN = 50, 18, 2000
SIMPLEX, PLANE = "Gumbel-softmax, temperature", "Gaussian, correlation"
PANELS = {  # name in the algorithm's file, parameters, range
    "Gaussian (0, 1)": ("GAUSSIAN", (0.0, 1.0), (-4, 4)),
    "truncated normal (0, 1) on [-1, 2]": ("TRUNCATED_NORMAL", (0.0, 1.0, -1.0, 2.0), (-1, 2)),
    "truncated normal (0, 1) on [6, 7]": ("TRUNCATED_NORMAL", (0.0, 1.0, 6.0, 7.0), (6, 7)),
    "Kumaraswamy (2, 5)": ("KUMARASWAMY", (2.0, 5.0), (0, 1)),
    "Kumaraswamy (0.5, 0.5)": ("KUMARASWAMY", (0.5, 0.5), (0, 1)),
    f"{PLANE} 0.8": ("MULTIVARIATE_GAUSSIAN", (), (-4, 4)),
    **{f"{SIMPLEX} {t:g}": ("GUMBEL_SOFTMAX", (t,), ()) for t in (0.1, 0.5, 2)},
}


# Samples and densities


def measure_panel(cell):
    """Rows with the center `x`, `y` of a bin and both densities there, or with a sample on the simplex.

    `density` is the mean over the bin, which the samples in a bin estimate.
    """
    (name, params, limits), num_samples = cell
    distribution, key = getattr(ge, name), random.key(0)
    if name == "GUMBEL_SOFTMAX":
        x = distribution.sample((LOGITS, *params), distribution.noise(key, (min(num_samples, 200), 3)))
        return [{"x": f"{u:.3f}", "y": f"{v:.3f}", "samples": "", "density": ""} for u, v in np.asarray(x)[:, 1:]]
    if name == "MULTIVARIATE_GAUSSIAN":
        params = jnp.zeros(2), jnp.linalg.cholesky(COVARIANCE)
        x = np.asarray(distribution.sample(params, distribution.noise(key, (num_samples, 2))))
        samples, edges, _ = np.histogram2d(*x.T, BINS_OF_PLANE, [limits, limits])
        samples, bins = samples.ravel() / num_samples / (edges[1] - edges[0]) ** 2, BINS_OF_PLANE
        middle = lambda edges, n: (edges[:-1, None] + np.diff(edges)[:, None] * (np.arange(n) + 0.5) / n).ravel()
        fine = np.stack(np.meshgrid(*[middle(edges, 8)] * 2, indexing="ij"), axis=-1)
        density = np.exp(distribution.log_prob(params, jnp.asarray(fine, jnp.float32)))
        density = density.reshape(bins, 8, bins, 8).mean(axis=(1, 3)).ravel()
        places = np.stack(np.meshgrid(*[middle(edges, 1)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    else:
        x = np.asarray(distribution.sample(params, distribution.noise(key, (num_samples,))))
        counts, edges = np.histogram(x, BINS, limits)
        samples = counts / num_samples / (edges[1] - edges[0])
        fine = np.linspace(*limits, 2 * BINS * POINTS_OF_BIN + 1)[1::2]
        density = np.exp(np.asarray(distribution.log_prob(params, jnp.asarray(fine, jnp.float32)), np.float64))
        density = density.reshape(BINS, -1).mean(axis=1)
        places = [(middle, "") for middle in (edges[:-1] + edges[1:]) / 2]
    text = lambda x: x if isinstance(x, str) else f"{x:.4g}"
    found = zip(places, samples, density, strict=True)
    return [{"x": text(x), "y": text(y), "samples": text(s), "density": text(d)} for (x, y), s, d in found]


def columns(rows, label, *names):
    """Columns of a label; entries may be empty."""
    chosen = [row for row in rows if row["label"] == label]
    return (np.array([row[name] for row in chosen]) for name in names)


def draw_panels(rows):
    """A panel for each distribution."""
    labels = study.labels(rows)
    page, panels = drawing.figure(10, 2.9 * -(-len(labels) // 3), -(-len(labels) // 3), 3)
    for axes in panels.ravel()[len(labels) :]:
        axes.set_axis_off()
    for axes, label in zip(panels.ravel(), labels, strict=False):
        kind = draw_simplex if label.startswith(SIMPLEX) else draw_plane if label.startswith(PLANE) else draw_line
        kind(axes, *columns(rows, label, "x", "y", "samples", "density"))
        axes.set_title(label, fontsize="medium")
    panels[0][0].legend(fontsize="small")
    return page


def draw_line(axes, x, _, samples, density):
    """The histogram of the samples, the density as a line."""
    axes.bar(x, samples, x[1] - x[0], color=BLUE, alpha=0.4, label="samples")
    axes.plot(x, density, color="black", label="density")
    axes.set(xlabel="x", ylabel="density (1 / unit of x)", ylim=(0, None))


def draw_plane(axes, x, y, samples, density):
    """The histogram of the samples as shades, and lines of equal density."""
    side = np.unique(x)
    x, y, samples, density = (values.reshape(len(side), -1) for values in (x, y, samples, density))
    mesh = axes.pcolormesh(x, y, samples, cmap="Blues", shading="nearest")
    axes.figure.colorbar(mesh, ax=axes, label="samples (1 / unit²)")
    axes.contour(x, y, density, 5, colors="black", linewidths=0.8)
    axes.set(xlabel="x₁", ylabel="x₂ (lines: density)")


def draw_simplex(axes, second, third, *_):
    """Samples over three categories, on the simplex as a triangle."""
    corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(3) / 2]])
    axes.scatter(*(np.stack([1 - second - third, second, third], axis=1) @ corners).T, s=5, color=ORANGE, alpha=0.6)
    axes.plot(*corners[[0, 1, 2, 0]].T, color="black", linewidth=1)
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum()
    for i, corner in enumerate(corners):
        offset = {"xytext": (0, -5 if i < 2 else 4), "textcoords": "offset points"}
        axes.annotate(f"π = {probabilities[i]:.2f}", corner, **offset, ha="center", va="top" if i < 2 else "bottom")
    axes.set(xticks=[], yticks=[], aspect="equal", xlim=(-0.2, 1.2), ylim=(-0.14, 1.02))


def misplaced(rows):
    """For each distribution with bins: percent of the samples that would have to move for the histogram to fit."""
    percents = {}
    for label in study.labels(rows):
        if not label.startswith(SIMPLEX):
            x, samples, density = columns(rows, label, "x", "samples", "density")
            width = np.diff(np.unique(x)).mean() ** (2 if label.startswith(PLANE) else 1)
            percents[label] = 50 * np.abs(samples - density).sum() * width
    return percents


def notes_on_panels(rows):
    """How far the samples are from the densities."""
    return (
        f"At most {max(misplaced(rows).values()):.2f} % of the samples would have to move to another bin for the "
        "histogram to match the density; some mismatch is sampling error. Each point in a triangle is a sample of "
        "Gumbel-softmax, and the corners are the categories with their probabilities: the lower the temperature, the "
        "closer the samples are to the corners."
    )


def table_of_panels(rows):
    """Samples in the wrong bin."""
    lines = [[label, f"{percent:.2f} %"] for label, percent in misplaced(rows).items()]
    return study.table(["distribution", "samples in another bin"], lines)


# Gumbel-softmax: bias and variance


def value(z, theta):
    """A value for each category, which depends on theta only through z."""
    return z @ VALUES


def bias_and_variance(estimator, distribution, num_samples):
    """Squared bias and variance of an estimate from one sample, each summed over the logits."""
    noise = distribution.noise(random.key(0), (num_samples, 1, 3))
    one = lambda noise: estimator(value, distribution, jnp.asarray(LOGITS), noise)
    estimates = np.asarray(jax.jit(lambda: lax.map(one, noise, batch_size=1000))(), np.float64)
    truth = np.asarray(jax.grad(lambda logits: jax.nn.softmax(logits) @ value(jnp.eye(3), logits))(LOGITS), np.float64)
    return np.square(estimates.mean(axis=0) - truth).sum(), estimates.var(axis=0).sum()


def at_temperature(temperature):
    """Gumbel-softmax of fixed temperature, whose parameters are the logits alone."""
    return ge.Distribution(
        ge.GUMBEL_SOFTMAX.noise,
        lambda logits, noise: ge.gumbel_softmax_sample((logits, temperature), noise),
        lambda logits, x: ge.gumbel_softmax_log_prob((logits, temperature), x),
    )


def measure_trade_off(cell):
    """The row of a temperature and a number of samples; without a temperature, that of the score function."""
    temperature, num_samples = cell
    if temperature:
        found = bias_and_variance(ge.reparameterized, at_temperature(temperature), num_samples)
    else:
        found = bias_and_variance(ge.score_function, ge.GUMBEL_MAX, num_samples)
    row = dict(zip(("squared_bias", "variance"), map(study.short, found), strict=True))
    return [{"temperature": temperature, "samples": num_samples} | row]


def trade_off_cells(temperatures, num_samples):
    """`{label: arguments}`."""
    cells = {"score function, Gumbel-max": ("", num_samples)}
    return cells | {f"pathwise, temperature {t:.2f}": (t, num_samples) for t in temperatures}


def draw_trade_off(rows):
    """Bias and variance over temperature."""
    page, ((axes,),) = drawing.figure(7.5, 4.5)
    (score,) = (row for row in rows if row["temperature"] == "")
    names = "temperature", "squared_bias", "variance", "samples"
    t, bias, variance, samples = np.array([[row[name] for name in names] for row in rows if row["temperature"] != ""]).T
    axes.loglog(t, bias, color=ORANGE, marker="s", label="Gumbel-softmax: squared bias")
    axes.loglog(t, variance / samples, color=ORANGE, linestyle=":", label="its sampling error")
    axes.loglog(t, variance, color=BLUE, marker="o", label="Gumbel-softmax: variance of one sample")
    axes.loglog(t, bias + variance / 100, color=GREEN, marker="^", label="Gumbel-softmax: mean squared error of 100")
    axes.axhline(score["variance"], color="black", linestyle="--", label="score function: variance of one sample")
    axes.axhline(
        score["variance"] / 100, color="black", linestyle="-.", label="score function: mean squared error of 100"
    )
    axes.set(xlabel="temperature", ylabel="of the gradient, summed over three logits\n(units of f, squared)")
    axes.set_ylim(bottom=1e-7)
    axes.legend(fontsize="x-small", loc="lower right")
    axes.grid(alpha=0.3)
    return page


def notes_on_trade_off(rows):
    """The best temperature for 100 samples, and whether it is better than the score function."""
    error = lambda row: row["squared_bias"] + row["variance"] / 100
    (score,) = (row for row in rows if row["temperature"] == "")
    best = min((row for row in rows if row["temperature"] != ""), key=error)
    return (
        f"With 100 samples the MSE is lowest at temperature {best['temperature']:.2f}: {error(best):.4f}; that of the "
        f"score function, which is unbiased, is {error(score):.4f}. The derivative is that of E[f(z)] with respect to "
        "the logits of a categorical z; squared biases of the size of the sampling error are not significant."
    )


def table_of_trade_off(rows):
    """Bias, its sampling error and variance of every estimator."""
    lines = []
    for row in rows:
        bias, error = f"{row['squared_bias']:.7f}", f"{row['variance'] / row['samples']:.1e}"
        lines.append([row["label"], bias, error, f"{row['variance']:.5f}"])
    return study.table(["estimator", "squared bias", "its sampling error", "variance of one sample"], lines)


SOURCES = ("algorithms/gradient_estimators.py",)
EXPERIMENTS = {
    "distributions": Experiment(
        title="Distributions with differentiable samples",
        question="Do the reparameterized samples follow their densities?",
        cells={label: (panel, 1_000_000) for label, panel in PANELS.items()},
        measure=measure_panel,
        notes=notes_on_panels,
        table=table_of_panels,
        draw=draw_panels,
        quick=lambda cells: {label: (cells[label][0], 1000) for label in (*list(cells)[:1], *list(cells)[5:7])},
        sources=SOURCES,
        sample="a million samples each, 200 of Gumbel-softmax",
    ),
    "gumbel_softmax": Experiment(
        title="Gumbel-softmax: bias and variance over temperature",
        question="Which temperature of Gumbel-softmax gives the best gradient estimate?",
        cells=trade_off_cells(TEMPERATURES, 1_000_000),
        measure=measure_trade_off,
        notes=notes_on_trade_off,
        table=table_of_trade_off,
        draw=draw_trade_off,
        quick=lambda _: trade_off_cells(TEMPERATURES[::6], 2000),
        sources=SOURCES,
        sample="a million samples each",
    ),
}

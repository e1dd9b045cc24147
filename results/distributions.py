"""Draw what `algorithms/gradient_estimators.py` samples, and what Gumbel-softmax's temperature trades.

    python results/distributions.py

`distributions.png`: histograms of samples under the densities. `gumbel_softmax.png`: of the derivative of E[f(z)] with
respect to three logits, z one-hot and f(z) = q z with q = (1, 0, 2), the squared bias and the variance of one sample's
pathwise estimate through Gumbel-softmax over its temperature, beside the score function through Gumbel-max,
which has no bias. The true derivative is a sum over the three values of z. `gumbel_softmax.md` holds the numbers.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from benchmark import ROOT, machine
from jax import lax, random
from matplotlib.figure import Figure

from algorithms import gradient_estimators as ge
from common import plot

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"  # told apart by the colour-blind
LOGITS = jnp.array([0.5, 0.0, -1.0])
VALUES = jnp.array([1.0, 0.0, 2.0])
TEMPERATURES = np.geomspace(0.05, 5, 13)
PANELS = {  # distribution, parameters, range
    "Gaussian (0, 1)": (ge.GAUSSIAN, (0.0, 1.0), (-4, 4)),
    "truncated normal (0, 1) on [-1, 2]": (ge.TRUNCATED_NORMAL, (0.0, 1.0, -1.0, 2.0), (-1, 2)),
    "truncated normal (0, 1) on [6, 7]": (ge.TRUNCATED_NORMAL, (0.0, 1.0, 6.0, 7.0), (6, 7)),
    "Kumaraswamy (2, 5)": (ge.KUMARASWAMY, (2.0, 5.0), (0, 1)),
    "Kumaraswamy (0.5, 0.5)": (ge.KUMARASWAMY, (0.5, 0.5), (0, 1)),
}


def panels(num_samples):
    """The figure of samples and densities."""
    figure = Figure(figsize=(11, 9), dpi=120, layout="constrained")
    cells = figure.subplots(3, 3).ravel()
    for axes, (name, (distribution, params, limits)) in zip(cells, PANELS.items(), strict=False):
        x = distribution.sample(params, distribution.noise(random.key(0), (num_samples,)))
        axes.hist(np.asarray(x), bins=60, range=limits, density=True, color=BLUE, alpha=0.4, label="samples")
        grid = jnp.linspace(*limits, 402)[1:-1]
        axes.plot(grid, jnp.exp(distribution.log_prob(params, grid)), color="black", label="density")
        axes.set(title=name, xlabel="x", ylabel="density", ylim=(0, None))
    cells[0].legend(fontsize="small")
    draw_plane(cells[5], num_samples)
    for axes, temperature in zip(cells[6:], (0.1, 0.5, 2.0), strict=True):
        draw_simplex(axes, temperature)
    return figure


def draw_plane(axes, num_samples):
    """Samples of a multivariate Gaussian, and lines of equal density."""
    params = jnp.zeros(2), jnp.linalg.cholesky(jnp.array([[1.0, 0.8], [0.8, 1.0]]))
    noise = ge.MULTIVARIATE_GAUSSIAN.noise(random.key(0), (min(num_samples, 2000), 2))
    x = ge.MULTIVARIATE_GAUSSIAN.sample(params, noise)
    axes.scatter(*x.T, s=2, color=BLUE, alpha=0.4)
    grid = np.stack(np.meshgrid(np.linspace(-4, 4, 80), np.linspace(-4, 4, 80)), axis=-1)
    density = jnp.exp(ge.MULTIVARIATE_GAUSSIAN.log_prob(params, jnp.asarray(grid)))
    axes.contour(*np.moveaxis(grid, -1, 0), density, 6, colors="black", linewidths=0.8)
    axes.set(title="Gaussian, correlation 0.8", xlabel="x₁", ylabel="x₂")


def draw_simplex(axes, temperature):
    """Samples of Gumbel-softmax over three categories, on the triangle that holds them."""
    x = ge.GUMBEL_SOFTMAX.sample((LOGITS, temperature), ge.GUMBEL_SOFTMAX.noise(random.key(0), (2000, 3)))
    corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(3) / 2]])
    axes.scatter(*(np.asarray(x) @ corners).T, s=2, color=ORANGE, alpha=0.5)
    axes.plot(*corners[[0, 1, 2, 0]].T, color="black", linewidth=1)
    for i, corner in enumerate(corners):
        axes.annotate(f"π = {jax.nn.softmax(LOGITS)[i]:.2f}", corner, ha="center", va="top" if i < 2 else "bottom")
    axes.set(title=f"Gumbel-softmax, temperature {temperature:g}", xticks=[], yticks=[], aspect="equal")
    axes.set(xlim=(-0.15, 1.15), ylim=(-0.12, 1.0))


def value(z, theta):
    """A value for each category, which depends on theta through z alone."""
    return z @ VALUES


def bias_and_variance(estimator, distribution, num_samples):
    """Squared bias and variance of one sample's estimate, each summed over the logits."""
    noise = distribution.noise(random.key(0), (num_samples, 1, 3))
    one = lambda noise: estimator(value, distribution, LOGITS, noise)
    estimates = np.asarray(jax.jit(lambda: lax.map(one, noise, batch_size=1000))(), np.float64)
    truth = np.asarray(jax.grad(lambda logits: jax.nn.softmax(logits) @ value(jnp.eye(3), logits))(LOGITS), np.float64)
    return np.square(estimates.mean(axis=0) - truth).sum(), estimates.var(axis=0).sum()


def at_temperature(temperature):
    """Gumbel-softmax with the logits alone for parameters."""
    return ge.Distribution(
        ge.GUMBEL_SOFTMAX.noise,
        lambda logits, noise: ge.gumbel_softmax_sample((logits, temperature), noise),
        lambda logits, x: ge.gumbel_softmax_log_prob((logits, temperature), x),
    )


def trade_off(relaxed, score):
    """The figure of bias and variance over temperature."""
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    bias, variance = relaxed.T
    axes.loglog(TEMPERATURES, bias, color=ORANGE, marker="s", label="Gumbel-softmax: squared bias")
    axes.loglog(TEMPERATURES, variance, color=BLUE, marker="o", label="variance of one sample")
    axes.loglog(TEMPERATURES, bias + variance / 100, color=GREEN, marker="^", label="mean squared error of 100 samples")
    axes.axhline(score[1], color="black", linestyle="--", label="score function through Gumbel-max: variance")
    axes.set(xlabel="temperature", ylabel="of the gradient, summed over three logits")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def main():
    """Parse the command line; compute; write figures and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=1_000_000)
    num_samples = parser.parse_args().num_samples
    plot.save(panels(min(num_samples, 100_000)), ROOT / "results" / "distributions.png")
    relaxed = np.array([bias_and_variance(ge.reparameterized, at_temperature(t), num_samples) for t in TEMPERATURES])
    score = bias_and_variance(ge.score_function, ge.GUMBEL_MAX, num_samples)
    plot.save(trade_off(relaxed, score), ROOT / "results" / "gumbel_softmax.png")
    lines = [
        f"Derivative of E[f(z)] with respect to the logits of a categorical z, {num_samples:,} samples.",
        f"`python results/distributions.py --num-samples {num_samples}`",
        f"on {machine()}.",
        "",
        "| estimator | temperature | squared bias | variance of one sample |",
        "|---|---|---|---|",
        f"| score function, Gumbel-max |  | {score[0]:.7f} | {score[1]:.5f} |",
    ]
    for temperature, (bias, variance) in zip(TEMPERATURES, relaxed, strict=True):
        lines.append(f"| pathwise, Gumbel-softmax | {temperature:.2f} | {bias:.7f} | {variance:.5f} |")
    (ROOT / "results" / "gumbel_softmax.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

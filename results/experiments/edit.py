from pathlib import Path
def edit(name, *pairs):
    p = Path(name); t = p.read_text()
    for old, new in pairs:
        assert t.count(old) == 1, (name, t.count(old), old)
        t = t.replace(old, new)
    p.write_text(t)

edit("estimators.py",
('''The estimators are those of `algorithms/gradient_estimators.py` with its defaults, f(x, theta) = x^2 theta and
x ~ N(theta, 1) at theta = 1, where the derivative is 4. The random numbers are from seed 0 of JAX's former generator,
with which 1,000 samples give the published table, as `--chapter-table` does.
''', '''The estimators are those of `algorithms/gradient_estimators.py` with its defaults: f(x, theta) = x^2 theta and
x ~ N(theta, 1) at theta = 1, where the derivative is 4. The random numbers come from seed 0 of JAX's former generator,
with which 1,000 samples reproduce the published table, as `--chapter-table` does.
'''),
('''import study
from matplotlib.cbook import boxplot_stats
from study import Experiment, verdict

from algorithms import gradient_estimators as ge

STYLES = {  # told apart by the colour-blind
    "naive": ("#0072B2", "o"),
    "score_function": ("#E69F00", "s"),
    "reparameterized": ("#009E73", "^"),
}
''', '''from experiments import drawing, study
from experiments.study import Criterion, Experiment
from matplotlib.cbook import boxplot_stats

from amortax.algorithms import gradient_estimators as ge

STYLES = {
    "naive": (drawing.BLUE, "o"),
    "score_function": (drawing.ORANGE, "s"),
    "reparameterized": (drawing.GREEN, "^"),
}
'''),
('''    """Statistics and quantiles of the trials of each estimator, `cell` being the numbers of samples and trials."""
''', '''    """Statistics and quantiles of each estimator over its trials; `cell` has the numbers of samples and trials."""
'''),
('''        figures = dict(zip(STATISTICS, ge.summarize(values, ge.true_derivative(config)), strict=True))
        figures |= {f"quantile {p:g}": np.quantile(values, p) for p in PROBABILITIES}
        for what, x in figures.items():  # eight digits: the published table has six decimals
''', '''        found = dict(zip(STATISTICS, ge.summarize(values, ge.true_derivative(config)), strict=True))
        found |= {f"quantile {p:g}": np.quantile(values, p) for p in PROBABILITIES}
        for what, x in found.items():  # eight digits: the published table has six decimals
'''),
('''def figures(rows, name, what):
    """Of an estimator: numbers of samples, and a figure for each."""
''', '''def statistic(rows, name, what):
    """A statistic of an estimator: `(numbers of samples, values)`."""
'''),
('''    """The rows with the published table's number of samples, or in a quick run those with the most."""
''', '''    """The rows with the published table's number of samples; in a quick run those with the most."""
'''),
('''    """Distribution of the estimates, and what makes their error up over the number of samples."""
    page, ((left, right),) = study.figure(11, 4.4, 1, 2)
''', '''    """Distribution of the estimates, and the parts of their error over the number of samples."""
    page, ((left, right),) = drawing.figure(11, 4.4, 1, 2)
'''),
('''quantiles = [figures(shown, name,''', '''quantiles = [statistic(shown, name,'''),
('''            samples, figure = figures(rows, name, what)
            dots = {} if what == "mse" else {"marker": marker, "markersize": 4}
            right.loglog(samples, figure**2 if what == "bias" else figure, color=color, **style, **dots)
''', '''            samples, x = statistic(rows, name, what)
            dots = {} if what == "mse" else {"marker": marker, "markersize": 4}
            right.loglog(samples, x**2 if what == "bias" else x, color=color, **style, **dots)
'''),
('''xlabel="samples of an estimate", ylabel="error of an estimate, squared"''', '''xlabel="samples per estimate", ylabel="squared error of an estimate"'''),
)
p = Path("estimators.py"); t = p.read_text()
i = t.index("def report(rows):")
t = t[:i] + '''def standard_errors_off(rows):
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
        title="The score-function and pathwise estimators are unbiased, the pathwise one has less variance",
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
        sources=("algorithms/gradient_estimators.py", "results/experiments/estimators.py"),
        sample="1,000 estimates each",
    )
}
'''
p.write_text(t)

edit("distributions.py",
('''"""What `algorithms/gradient_estimators.py` samples, and what Gumbel-softmax's temperature trades.

`distributions`: histograms of samples beside the densities; of Gumbel-softmax over three categories the samples
themselves. `gumbel_softmax`: of the derivative of E[f(z)] with respect to three logits, z one-hot and f(z) = q z with
q = (1, 0, 2), the squared bias and the variance of one sample's pathwise estimate through Gumbel-softmax over its
temperature, beside the score function through Gumbel-max, which has no bias. The true derivative is a sum over the
three values of z.
"""
''', '''"""Samples of `algorithms/gradient_estimators.py` against densities, and the bias and variance of Gumbel-softmax.

`distributions`: histograms of samples beside the densities; for Gumbel-softmax over three categories, the samples
themselves. `gumbel_softmax`: estimates of the derivative of E[f(z)] with respect to three logits, where z is one-hot
and f(z) = q z with q = (1, 0, 2). Compared are the squared bias and the variance of a pathwise estimate from one sample
of Gumbel-softmax, over its temperature, and those of the score function with Gumbel-max, which is unbiased. The true
derivative is a sum over the three values of z.
"""
'''),
('''import study
from jax import lax, random
from study import Experiment

from algorithms import gradient_estimators as ge

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"  # told apart by the colour-blind
LOGITS''', '''from experiments import drawing, study
from experiments.drawing import BLUE, GREEN, ORANGE
from experiments.study import Experiment
from jax import lax, random

from amortax.algorithms import gradient_estimators as ge

LOGITS'''),
('''    """Rows of the place `x`, `y` of a bin, or of a sample on the simplex, and both densities there.

    `density` is its mean over the bin, which is what the samples of a bin tell.
    """
''', '''    """Rows with the center `x`, `y` of a bin and both densities there, or with a sample on the simplex.

    `density` is the mean over the bin, which the samples in a bin estimate.
    """
'''),
('''

def column(rows, label, name):
    """A column of a label."""
    return np.array([row[name] for row in rows if row["label"] == label])
''', '''

def columns(rows, label, *names):
    """Columns of a label; entries may be empty."""
    chosen = [row for row in rows if row["label"] == label]
    return (np.array([row[name] for row in chosen]) for name in names)
'''),
('''    page, panels = study.figure(10, 2.9 * -(-len(labels) // 3), -(-len(labels) // 3), 3)
''', '''    page, panels = drawing.figure(10, 2.9 * -(-len(labels) // 3), -(-len(labels) // 3), 3)
'''),
('''        kind(axes, *(column(rows, label, name) for name in ("x", "y", "samples", "density")))
''', '''        kind(axes, *columns(rows, label, "x", "y", "samples", "density"))
'''),
('''    """Shares of the samples as bars, the density as a line."""
''', '''    """The histogram of the samples, the density as a line."""
'''),
('''    """Shares of the samples as shades, and lines of equal density."""
''', '''    """The histogram of the samples as shades, and lines of equal density."""
'''),
('''    """Samples over three categories, on the triangle that holds them."""
''', '''    """Samples over three categories, on the simplex as a triangle."""
'''),
('''        place = {"xytext": (0, -5 if i < 2 else 4), "textcoords": "offset points"}
        axes.annotate(f"π = {probabilities[i]:.2f}", corner, **place,''', '''        offset = {"xytext": (0, -5 if i < 2 else 4), "textcoords": "offset points"}
        axes.annotate(f"π = {probabilities[i]:.2f}", corner, **offset,'''),
('''    """A value for each category, which depends on theta through z alone."""
''', '''    """A value for each category, which depends on theta only through z."""
'''),
('''    """Squared bias and variance of one sample's estimate, each summed over the logits."""
''', '''    """Squared bias and variance of an estimate from one sample, each summed over the logits."""
'''),
('''    """Gumbel-softmax with the logits alone for parameters."""
''', '''    """Gumbel-softmax of fixed temperature, whose parameters are the logits alone."""
'''),
('''    """The row of a temperature and a number of samples; without a temperature that of the score function."""
''', '''    """The row of a temperature and a number of samples; without a temperature, that of the score function."""
'''),
('''    page, ((axes,),) = study.figure(7.5, 4.5)
''', '''    page, ((axes,),) = drawing.figure(7.5, 4.5)
'''),
)
p = Path("distributions.py"); t = p.read_text()
i = t.index("def report_panels(rows):"); j = t.index("# Gumbel-softmax: bias and variance")
t = t[:i] + '''def misplaced(rows):
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


''' + t[j:]
i = t.index("def report_trade_off(rows):")
t = t[:i] + '''def notes_on_trade_off(rows):
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


SOURCES = ("algorithms/gradient_estimators.py", "results/experiments/distributions.py")
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
'''
p.write_text(t)

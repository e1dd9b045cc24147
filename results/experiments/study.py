"""What an experiment is, the statistics of its rows, and the words that report them.

"Above" and "below" mean that the 95 % bootstrap intervals of the interquartile means do not overlap.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from amortax.common import plot

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "results"


class Criterion(NamedTuple):
    """What decides whether the claim in an experiment's title holds."""

    words: str  # completes "Criterion, "
    holds: Callable  # rows -> {case: bool}


class Experiment(NamedTuple):
    """Cells that are measured independently; from their rows follow a verdict, notes, a table and a figure."""

    title: str
    question: str  # one sentence
    cells: dict  # label: what to measure, plain data
    measure: Callable  # cell -> rows, dicts with the same keys
    criterion: Criterion | None = None  # None where nothing is claimed
    notes: str | Callable = ""  # text, or rows -> text
    table: Callable | None = None  # rows -> table in Markdown
    draw: Callable | None = None  # rows -> Figure, or the bytes of a GIF
    figure_type: str = "png"  # or "gif"
    quick: Callable | None = None  # cells -> the few small ones of `--quick`
    sources: tuple = ()  # files, relative to ROOT, that determine the numbers besides `measure` and a run's algorithm
    sample: str = ""  # sample sizes behind the numbers


# Words


def judge(experiment, rows):
    """`{case: bool}` of the experiment's criterion; None without one."""
    return experiment.criterion and experiment.criterion.holds(rows)


def verdict(answers):
    """The verdict on a claim that is `{case: whether it holds there}`."""
    yes, no = ([case for case, holds in answers.items() if bool(holds) is wanted] for wanted in (True, False))
    if yes and no:
        return f"Holds in part: yes for {', '.join(yes)}; no for {', '.join(no)}."
    return "Does not hold." if no else "Holds."


def report(experiment, rows):
    """Question, verdict with its criterion, notes and table, in Markdown."""
    parts = [experiment.question]
    if experiment.criterion:
        parts.append(f"**{verdict(judge(experiment, rows))}** Criterion, {experiment.criterion.words}")
    parts.append(experiment.notes(rows) if callable(experiment.notes) else experiment.notes)
    if experiment.table:
        parts.append(experiment.table(rows))
    return "\n\n".join(filter(None, parts))


def estimate(values, digits=1):
    """Interquartile mean and 95 % bootstrap interval as text."""
    low, high = plot.interval(values)
    return f"{plot.iqm(values):z,.{digits}f} ({low:z,.{digits}f} to {high:z,.{digits}f})"  # z: no -0.0


def table(header, lines):
    """A table in Markdown of a header and rows of cells."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(x) for x in row) + " |" for row in rows)


def return_table(rows, digits=1, first="variant", **columns):
    """Final return of each label: interquartile mean with its interval, and worst seed.

    Each of `columns` is a further column, by its name a function of the label that gives text.
    """
    header = [first, "final return", "worst seed", *(name.replace("_", " ") for name in columns)]
    lines = []
    for label in labels(rows):
        values = final(rows, label)
        cells = [label, estimate(values, digits), f"{values.min():z,.{digits}f}"]
        lines.append(cells + [column(label) for column in columns.values()])
    return table(header, lines)


def returns_sample(seeds=16, episodes="128 episodes"):
    """The sample sizes of returns."""
    return f"{seeds} seeds each; each return is the mean of {episodes}"


def short(x):
    """Six significant digits of a number; whole numbers without a point."""
    return x if isinstance(x, str) else int(x) if float(x).is_integer() else float(f"{x:.6g}")


# Rows: dicts with a `label`, read from a .csv file


def read(path):
    """The rows of a .csv file, as text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows):
    """Rows of text with numbers converted to floats."""

    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    return [{name: number(text) for name, text in row.items()} for row in rows]


def labels(rows):
    """The labels, in order."""
    return list(dict.fromkeys(row["label"] for row in rows))


def split(label):
    """`(variant, environment)` of a label `variant on environment`."""
    return label.rsplit(" on ", 1)


def envs(rows):
    """The environments of the labels, in order."""
    return list(dict.fromkeys(split(label)[1] for label in labels(rows)))


def variants(rows, env):
    """`{label: variant}` of an environment."""
    return {label: split(label)[0] for label in labels(rows) if split(label)[1] == env}


def column(rows, label, name):
    """A column of a label, without empty entries."""
    return np.array([row[name] for row in rows if row["label"] == label and row[name] != ""])


def returns(rows, label, name="return"):
    """`(progress [num_epochs], values [num_seeds, num_epochs])` of a label's seeds, without those that diverged."""
    seeds = {}
    for row in rows:
        if row["label"] == label:
            seeds.setdefault(row["seed"], []).append(row)
    kept = [seed for seed in seeds.values() if all(row["finite"] for row in seed)]
    return np.array([row["progress"] for row in kept[0]]), np.array([[row[name] for row in seed] for seed in kept])


def final(rows, label, name="return"):
    """The last values `[num_seeds]` of a label."""
    return returns(rows, label, name)[1][:, -1]


def trained_for(rows, label):
    """How many environment steps, or iterations, a label's runs took."""
    return returns(rows, label)[0][-1]


def finals(rows, env, name="return"):
    """`{variant: last values [num_seeds]}` of an environment."""
    return {variant: final(rows, label, name) for label, variant in variants(rows, env).items()}


def mean_over_training(rows, label):
    """The mean `[num_seeds]` of a label's returns over all evaluations."""
    return returns(rows, label)[1].mean(axis=1)


def is_below(a, b):
    """Whether `a [num_seeds]` is below `b [num_seeds]`."""
    return plot.interval(a)[1] < plot.interval(b)[0]

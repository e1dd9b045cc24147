"""The first figure of the README: the algorithm files, what each adds to its predecessor, and how it learns."""

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from amortax.algorithms import gradient_estimators
from amortax.common import plot
from experiments import drawing, study, training
from experiments.curves import DISCRETE, ONLINE, optimum, runs
from experiments.study import Experiment, short
from experiments.training import FITTED, Run

ENV = "Pendulum-v1"
PLACES = {  # file: row, column, what it adds
    "fqi": (0, 0, "a solver maximizes q\nover actions"),
    "fqi_amortized": (0, 1, "a policy regresses onto\nsome of the maximizers"),
    "nfqca": (0, 2, "the policy ascends q;\nno solver"),
    "ddpg": (0, 3, "online data, replay,\ntarget networks"),
    "td3": (0, 4, "two critics, smoothing,\na delayed actor"),
    "dqn": (1, 0, "all discrete actions;\nonline data, replay"),
    "soft_fqi": (1, 1, "a log-integral instead\nof the maximum"),
    "sac_value": (1, 3, "maximum entropy,\npathwise gradients"),
    "sac": (1, 4, "a learned\ntemperature"),
    "gradient_estimators": (2, 2, "derivatives of\nexpectations"),
    "reinforce": (2, 1, "score function\nof a policy"),
    "ppo": (2, 0, "several clipped steps\non the same transitions"),
    "svg": (2, 3, "gradients through\nthe dynamics"),
    "svg_model": (2, 4, "a learned model\nof the dynamics"),
    "shac": (1, 2, "short windows,\nthen a critic"),
}
ARROWS = (
    ("fqi", "fqi_amortized"), ("fqi_amortized", "nfqca"), ("nfqca", "ddpg"), ("ddpg", "td3"),
    ("fqi", "dqn"), ("fqi", "soft_fqi"), ("td3", "sac_value"), ("sac_value", "sac"),
    ("gradient_estimators", "reinforce"), ("reinforce", "ppo"),
    ("gradient_estimators", "svg"), ("svg", "svg_model"), ("svg", "shac"),
)  # fmt: skip
ELSEWHERE = {"dqn": "dqn on CartPole-v1", "reinforce": "reinforce on CartPole-v1"}  # not on Pendulum-v1
COLORS = plot.COLORS | {"gradient_estimators": "#000000"}


def estimates(num_trials):
    """Means of the three estimators over the number of samples, a row for each trial; the naive one is biased."""
    sizes = (10, 100, 1_000, 10_000)
    rows = []
    for size in sizes:
        config = gradient_estimators.Config(batch_size=size, num_trials=num_trials)
        values = jax.jit(gradient_estimators.train)(config, jax.random.key(0))
        for name, trials in values._asdict().items():
            trial = {"progress": size, "finite": 1}
            rows += [{"seed": f"{name} {i}", "return": short(x)} | trial for i, x in enumerate(trials)]
    return rows


def measure(cell):
    """Learning curves of a run, or the estimates of a number of trials."""
    return training.learning_curves(cell) if isinstance(cell, Run) else estimates(cell)


def draw(rows):
    """A small learning curve for each file, at its place in the lineage."""
    page = Figure(figsize=(13, 9), dpi=120)
    panels = page.subplots(3, 5, gridspec_kw={"wspace": 0.5, "hspace": 0.85})
    page.subplots_adjust(left=0.05, right=0.985, top=0.955, bottom=0.145)
    present, axes_of = study.labels(rows), {}
    for axes in panels.ravel():
        axes.set_axis_off()
    for name, (row, column, idea) in PLACES.items():
        axes = axes_of[name] = panels[row, column]
        axes.set_axis_on()
        axes.set_title(
            f"{name}.py",
            fontsize=13 if len(name) < 15 else 12,
            fontweight="bold",
            color=COLORS[name],
            family="monospace",
        )
        axes.set_xlabel(idea, fontsize=11)
        axes.tick_params(labelsize=8)
        if name == "gradient_estimators":
            draw_estimates(axes, rows)
        elif name in present:
            per = 1 if name in FITTED else 1e3
            drawing.draw_curve(axes, rows, name, name, per=per, color=COLORS[name], linewidth=2)
            on_pendulum = name not in ELSEWHERE
            axes.axhline(optimum(ENV) if on_pendulum else 500, color="black", linestyle="--", linewidth=1)
            axes.set_ylim((-1700, 0) if on_pendulum else (0, 540))
            axes.text(0.97, 0.05, "iterations" if per == 1 else "thousands of steps", transform=axes.transAxes,
                      ha="right", fontsize=9, color="0.35")  # fmt: skip
    for start, end in ARROWS:
        places = ends(start, end)
        arrow = {"arrowstyle": "-|>", "color": "0.4", "linewidth": 1.5, "mutation_scale": 14}
        page.add_artist(
            ConnectionPatch(*places, *["axes fraction"] * 2, axesA=axes_of[start], axesB=axes_of[end], **arrow)
        )
    legend = (
        "Greedy return on Pendulum-v1 (dqn and reinforce: CartPole-v1), 16 seeds: interquartile mean and 95 % interval;"
        " dashed: the optimum.\n"
        "gradient_estimators: three estimates of a derivative over the number of samples; dashed: the true one."
    )
    page.text(0.5, 0.015, legend, fontsize=10.5, ha="center", va="bottom", linespacing=1.4)
    return page


def draw_estimates(axes, rows):
    """Mean of each estimator over the number of samples."""
    chosen = [row for row in rows if row["label"] == "gradient_estimators"]
    sizes = sorted({row["progress"] for row in chosen})
    for name, style in zip(gradient_estimators.Estimates._fields, (":", "--", "-"), strict=True):
        values = [[r["return"] for r in chosen if r["seed"].startswith(name) and r["progress"] == n] for n in sizes]
        axes.plot(sizes, [np.mean(x) for x in values], color="black", linestyle=style)
        axes.fill_between(
            sizes, *np.transpose([np.quantile(x, (0.025, 0.975)) for x in values]), color="black", alpha=0.1
        )
    axes.axhline(4, color="black", linestyle="--", linewidth=1)
    axes.set(xscale="log", ylim=(0, 8))


def ends(start, end):
    """Start and end of an arrow in the coordinates of their panels: along a row or column, or from corner to corner."""
    (row, column), (end_row, end_column) = PLACES[start][:2], PLACES[end][:2]
    if row == end_row:
        return ((1.03, 0.5), (-0.3, 0.5)) if column < end_column else ((-0.16, 0.5), (1.03, 0.5))
    if column == end_column:
        return (0.5, -0.48), (0.5, 1.2)
    if row > end_row:
        return (-0.05, 1.1), (1.1, -0.35)
    return ((1.05, -0.35), (-0.1, 1.1)) if column < end_column else ((-0.1, -0.35), (1.1, 1.1))


EXPERIMENTS = {
    "lineage": Experiment(
        title="The lineage",
        cells={name: run for name, run in runs(ENV).items() if name in PLACES}
        | {name: (DISCRETE | ONLINE)[label] for name, label in ELSEWHERE.items()}
        | {"gradient_estimators": 16},
        measure=measure,
        question="What does each file add to its predecessor, and how does it learn?",
        draw=draw,
        quick=lambda cells: training.smaller(cells, "td3") | {"gradient_estimators": 2},
        sources=("algorithms/gradient_estimators.py",),
        sample=f"{study.returns_sample()}; 16 trials of the estimators",
    )
}

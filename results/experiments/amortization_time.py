"""How much time amortizing the maximisation saves: from a solver at every base point to none.

Timed are an iteration on 50,000 base points of Pendulum-v1, and its targets alone, with the defaults of each file but
for what is named, on one core; the levels take turns. Close other programs. What their returns come to is the
experiment `amortization`.
"""

import functools
import importlib
import statistics

import jax
import study
from study import Experiment

from common import devices, plot

ENV = "Pendulum-v1"
LEVELS = {  # level: algorithm and its fields
    "fqi": ("fqi", {}),
    **{f"exact {x:g}": ("fqi_amortized", {"exact_fraction": x}) for x in (1.0, 0.5, 0.1, 0.01, 0.0)},
    "nfqca": ("nfqca", {}),
    "soft_fqi": ("soft_fqi", {}),
    **{f"window {n}": ("fqi_amortized", {"exact_fraction": 0.1, "window": n}) for n in (0, 1, 16)},
}
PARTS = {"iteration": "o", "targets": "^"}  # and their markers
SMALL = {"num_base_points": 100, "hidden_sizes": (4,), "fit_steps": 1, "batch_size": 8}


def programs(algorithm, fields):
    """Of an iteration and of its targets: compiled calls."""
    module = importlib.import_module(f"algorithms.{algorithm}")
    config = module.Config(env=ENV, **fields)
    state = jax.jit(module.init)(config, jax.random.key(0))
    inputs = state.params, state.base_points, *([] if algorithm == "nfqca" else [state.key])
    compile_for = functools.partial(jax.jit, compiler_options=devices.cpu_compiler_options())
    whole = compile_for(functools.partial(module.iteration, config)).lower(state).compile()
    targets = compile_for(functools.partial(module.bellman_targets, config)).lower(*inputs).compile()
    return lambda: whole(state), lambda: targets(*inputs)


def measure(cell):
    """A row for each repeat of each level; `cell` has the levels, fields of all of them, and the number of repeats."""
    levels, fields, repeats = cell
    rows = []
    with study.one_thread():
        calls = {level: programs(algorithm, dict(fields) | own) for level, (algorithm, own) in levels.items()}
        for repeat in range(1 + repeats):  # the first warms up
            for level, pair in calls.items():
                spent = [study.short(study.seconds(call)) for call in pair]
                rows.append({"level": level, "repeat": repeat} | dict(zip(PARTS, spent, strict=True)))
    return [row for row in rows if row["repeat"]]


def column(rows, level, part):
    """Seconds of each repeat."""
    return [row[part] for row in rows if row["level"] == level]


def draw(rows):
    """Each repeat, and the medians, of an iteration and of its targets."""
    levels = list(dict.fromkeys(row["level"] for row in rows))
    page, ((axes,),) = study.figure(9, 4)
    for x, level in enumerate(levels):
        color = plot.COLOURS[LEVELS[level][0]]
        for shift, (part, marker) in zip((-0.15, 0.15), PARTS.items(), strict=True):
            times = [1000 * t for t in column(rows, level, part)]
            axes.plot([x + shift + 0.1] * len(times), times, ".", color="0.65", markersize=4)
            axes.plot(x + shift, statistics.median(times), marker, color=color, markersize=8)
    for part, marker in PARTS.items():
        axes.plot([], [], marker, color="0.3", label=f"{'a whole' if part == 'iteration' else 'its'} {part}")
    axes.set_xticks(range(len(levels)), [level.replace(" ", "\n") for level in levels])
    axes.set(xlim=(-0.5, len(levels) - 0.5), yscale="log", ylabel="time (ms, log scale)")
    axes.legend(title="medians; dots are repeats", fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    return page


def report(rows):
    """Medians, and how many times faster than fqi."""
    levels = dict.fromkeys(row["level"] for row in rows)
    times = {level: [statistics.median(column(rows, level, part)) for part in PARTS] for level in levels}
    gains = {level: [a / b for a, b in zip(times["fqi"], times[level], strict=True)] for level in levels}
    gain = {level: f"{level} {targets:.1f} and {whole:.1f}" for level, (whole, targets) in gains.items()}
    text = (
        "How many times as fast as those of fqi, which solves at every base point, are the targets, and a whole "
        f"iteration: {', '.join(gain[level] for level in ('fqi', 'exact 0.1', 'nfqca') if level in gain)}; the fits of "
        "critic and policy remain. Levels are named after the fraction of exact maximisers, or after the window of "
        "past iterations, 4 by default, at a fraction of 0.1; nfqca solves at no point."
    )
    cells = lambda level: [
        f"{1000 * t:,.1f} ms ({gain:.2f} x)" for t, gain in zip(times[level], gains[level], strict=True)
    ]
    lines = [[level, LEVELS[level][0], *cells(level)] for level in times]
    return "\n".join(
        [text, "", study.table(["level", "algorithm", *(f"{p} (x as fast as fqi)" for p in PARTS)], lines)]
    )


EXPERIMENTS = {
    "amortization_time": Experiment(
        title="A policy in the solver's stead saves time",
        cells={"50,000 base points": (LEVELS, {"num_base_points": 50_000}, 5)},
        measure=measure,
        report=report,
        draw=draw,
        quick=lambda _: {"100 base points": ({"fqi": LEVELS["fqi"]}, SMALL, 2)},
        sources=("amortization_time", "study"),
        sample="5 repeats on one core, the levels taking turns",
    )
}

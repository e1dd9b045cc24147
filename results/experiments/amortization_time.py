"""How much time amortizing the maximization saves: from a solver at every base point to none.

Timed are an iteration on 50,000 base points of Pendulum-v1, and its targets alone, with each file's defaults except for
the named fields, on one core; the measurements are interleaved. Close other programs. The experiment `amortization`
compares returns.
"""

import functools
import importlib
import statistics

import jax

from amortax.common import devices
from experiments import drawing, study, training
from experiments.study import Experiment

ENV = "Pendulum-v1"
LEVELS = {  # level: algorithm and its fields
    "fqi": ("fqi", {}),
    **{f"exact {x:g}": ("fqi_amortized", {"exact_fraction": x}) for x in (1.0, 0.5, 0.1, 0.01)},
    "nfqca": ("nfqca", {}),
    "soft_fqi": ("soft_fqi", {}),
    **{f"window {n}": ("fqi_amortized", {"exact_fraction": 0.1, "window": n}) for n in (0, 1, 16)},
}
PARTS = {"iteration": "o", "targets": "^"}  # and their markers
SMALL = {"num_base_points": 100, "hidden_sizes": (4,), "fit_steps": 1, "batch_size": 8}


def programs(algorithm, fields):
    """Compiled calls of an iteration and of its targets."""
    module = importlib.import_module(f"amortax.algorithms.{algorithm}")
    config = module.Config(env=ENV, **fields)
    state = jax.jit(module.init)(config, jax.random.key(0))
    inputs = state.params, state.base_points, *([] if algorithm == "nfqca" else [state.key])
    compile_for = functools.partial(jax.jit, compiler_options=devices.cpu_compiler_options())
    whole = compile_for(functools.partial(module.iteration, config)).lower(state).compile()
    targets = compile_for(functools.partial(module.td_target, config)).lower(*inputs).compile()
    return lambda: whole(state), lambda: targets(*inputs)


def measure(cell):
    """A row for each repeat of each level; `cell` has the levels, fields that they share, and the number of repeats."""
    levels, fields, repeats = cell
    rows = []
    with training.one_thread():
        calls = {level: programs(algorithm, dict(fields) | own) for level, (algorithm, own) in levels.items()}
        for repeat in range(1 + repeats):  # the first warms up
            for level, pair in calls.items():
                times = [study.short(training.seconds(call)) for call in pair]
                rows.append({"level": level, "repeat": repeat} | dict(zip(PARTS, times, strict=True)))
    return [row for row in rows if row["repeat"]]


def column(rows, level, part):
    """Seconds of each repeat."""
    return [row[part] for row in rows if row["level"] == level]


def draw(rows):
    """Repeats and medians of the times of an iteration and of its targets."""
    levels = list(dict.fromkeys(row["level"] for row in rows))
    page, ((axes,),) = drawing.figure(9, 4)
    for x, level in enumerate(levels):
        color = drawing.algorithm_color(LEVELS[level][0])
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


def medians(rows):
    """`{level: {part: median seconds}}`."""
    levels = dict.fromkeys(row["level"] for row in rows)
    return {level: {part: statistics.median(column(rows, level, part)) for part in PARTS} for level in levels}


def notes(rows):
    """Speedups over fqi."""
    times = medians(rows)
    gain = lambda level, part: times["fqi"][part] / times[level][part]
    shown = [level for level in ("exact 0.1", "nfqca") if level in times]
    gains = [f"{level} {gain(level, 'targets'):.1f} and {gain(level, 'iteration'):.1f}" for level in shown]
    text = "fqi solves for the maximizing action at every base point. "
    if shown:
        text += f"Speedups over fqi, of the targets and of a whole iteration: {', '.join(gains)}; "
        text += "the fits of critic and policy are not affected. "
    return text + (
        "`exact x` is fqi_amortized with a fraction x of exact maximizers, `window n` with a fraction of 0.1 and a "
        "window of n past iterations, where the default is 4; nfqca has no solver."
    )


def table(rows):
    """Times, and speedups over fqi."""
    times, lines = medians(rows), []
    for level in times:
        cells = [f"{1000 * times[level][p]:,.1f} ms ({times['fqi'][p] / times[level][p]:.2f} x)" for p in PARTS]
        lines.append([level, LEVELS[level][0], *cells])
    return study.table(["level", "algorithm", *(f"{part} (speedup over fqi)" for part in PARTS)], lines)


EXPERIMENTS = {
    "amortization_time": Experiment(
        title="Replacing the solver by a policy saves time",
        question="How much time does an iteration of fitted Q-iteration take with fewer exact maximizers?",
        cells={"50,000 base points": (LEVELS, {"num_base_points": 50_000}, 5)},
        measure=measure,
        notes=notes,
        table=table,
        draw=draw,
        quick=lambda _: {"100 base points": ({"fqi": LEVELS["fqi"]}, SMALL, 2)},
        sources=tuple(f"algorithms/{name}.py" for name in training.FITTED),
        sample="5 interleaved repeats on one core",
    )
}

"""Time and memory of SVG's gradient, over horizon and parameters.

The gradient of 16 rollouts through Pendulum-v1 is computed in forward mode (manual), in reverse mode (autodiff), and in
reverse mode with rematerialization (remat), which computes each step twice. Memory is what the compiled program
allocates besides its arguments and results. Times are medians of interleaved measurements on one core. Close other
programs.
"""

import dataclasses
import statistics

import jax
from jax.flatten_util import ravel_pytree

from amortax.algorithms import svg
from amortax.common import devices
from experiments import drawing, study, training
from experiments.study import Experiment

STYLES = {
    "manual": {"color": drawing.BLUE, "marker": "o"},
    "autodiff": {"color": drawing.ORANGE, "marker": "s"},
    "remat": {"color": drawing.GREEN, "marker": "^", "linestyle": "--"},
}
HIDDEN = ((), (8,), (16, 16), (32, 32), (64, 64))
HORIZONS = (10, 50, 200)
REPEATS = 5


def compile_gradients(hidden_sizes, horizon):
    """`(number of parameters, {kind: (call, temporary bytes)})`."""
    base = svg.Config(num_rollouts=16, hidden_sizes=hidden_sizes, horizon=horizon)
    inputs = jax.jit(lambda config, key: (svg.init(config, key).params.actor, *svg.sample_rollouts(config, key)))
    actor, *drawn = inputs(base, jax.random.key(0))
    calls = {}
    for kind in STYLES:
        arguments = actor, dataclasses.replace(base, gradient=kind), *drawn
        program = jax.jit(svg.policy_gradient, compiler_options=devices.cpu_compiler_options())
        compiled = program.lower(*arguments).compile()
        call = lambda compiled=compiled, arguments=arguments: jax.block_until_ready(compiled(*arguments))
        calls[kind] = call, compiled.memory_analysis().temp_size_in_bytes
    return len(ravel_pytree(actor)[0]), calls


def measure(cell):
    """A row for each kind of gradient; `cell` has the widths of the hidden layers, the horizon and the repeats."""
    hidden_sizes, horizon, repeats = cell
    with training.one_thread():
        size, calls = compile_gradients(hidden_sizes, horizon)
        times = {kind: [] for kind in calls}
        for _ in range(repeats):
            for kind, (call, _) in calls.items():
                call()  # warms the caches up
                times[kind].append(1000 * training.seconds(call))
    rows = []
    for kind, (_, size_in_bytes) in calls.items():
        found = {"milliseconds": statistics.median(times[kind]), "mebibytes": size_in_bytes / 2**20}
        found = {name: study.short(x) for name, x in found.items()}
        rows.append({"parameters": size, "horizon": horizon, "gradient": kind} | found)
    return rows


def cells(hidden, horizons, repeats):
    """`{label: arguments}`."""
    name = lambda widths: " x ".join(map(str, widths)) or "linear"
    return {f"{name(widths)}, {t} steps": (widths, t, repeats) for widths in hidden for t in horizons}


def draw(rows):
    """Time above, memory below, over the number of parameters; a column for each horizon."""
    horizons = sorted({row["horizon"] for row in rows})
    page, panels = drawing.figure(3.4 * max(2, len(horizons)), 6, 2, len(horizons), sharex=True, sharey="row")
    for column, horizon in zip(panels.T, horizons, strict=True):
        for axes, name in zip(column, ("milliseconds", "mebibytes"), strict=True):
            for kind, style in STYLES.items():
                chosen = [row for row in rows if (row["horizon"], row["gradient"]) == (horizon, kind)]
                axes.loglog([row["parameters"] for row in chosen], [row[name] for row in chosen], label=kind, **style)
            axes.grid(alpha=0.3)
        column[0].set_title(f"horizon of {horizon:.0f} steps")
        column[1].set_xlabel("parameters of the policy")
    panels[0][0].set_ylabel("time per gradient (ms)")
    panels[1][0].set_ylabel("memory (MiB)")
    panels[0][0].legend(fontsize="small")
    return page


def by_size(rows):
    """`{(parameters, horizon): {kind of gradient: row}}`."""
    sizes = {}
    for row in rows:
        sizes.setdefault((row["parameters"], row["horizon"]), {})[row["gradient"]] = row
    return sizes


def notes(rows):
    """Ratios at the largest size."""
    (parameters, horizon), last = list(by_size(rows).items())[-1]
    ratio = lambda name, a, b: last[a][name] / last[b][name]
    return (
        f"With {parameters:,.0f} parameters and {horizon:.0f} steps forward mode (manual) takes "
        f"{ratio('milliseconds', 'manual', 'autodiff'):,.1f} times as long as reverse mode (autodiff) and "
        f"{ratio('mebibytes', 'manual', 'autodiff'):,.1f} times the memory; rematerialization (remat) takes "
        f"{ratio('milliseconds', 'remat', 'autodiff'):,.2f} times as long and "
        f"{ratio('mebibytes', 'remat', 'autodiff'):,.2f} times the memory. In forward mode memory does not depend on "
        "the number of steps, but time and memory grow with the number of parameters; reverse mode is the opposite: "
        "memory grows with the horizon."
    )


def table(rows):
    """Times and memory."""
    lines = [
        [f"{parameters:,.0f}", f"{horizon:.0f}"]
        + [f"{x[kind]['milliseconds']:,.1f} ms" for kind in STYLES]
        + [f"{x[kind]['mebibytes']:,.2f} MiB" for kind in STYLES]
        for (parameters, horizon), x in by_size(rows).items()
    ]
    return study.table(["parameters", "horizon", *STYLES, *STYLES], lines)


EXPERIMENTS = {
    "svg_gradients": Experiment(
        title="SVG's gradients: time and memory",
        question="What do forward and reverse mode cost for SVG's gradient?",
        cells=cells(HIDDEN, HORIZONS, REPEATS),
        measure=measure,
        notes=notes,
        table=table,
        draw=draw,
        quick=lambda _: cells(((),), (2,), 1),
        sources=("algorithms/svg.py",),
        sample=f"times are medians of {REPEATS}, on one core",
    )
}

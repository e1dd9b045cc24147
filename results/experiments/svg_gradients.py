"""Time and memory of SVG's gradient, over horizon and parameters.

The gradient is that of 16 rollouts through Pendulum-v1, forward in time (manual), by backpropagation (autodiff), and by
backpropagation that computes each step twice (remat). Memory is what the compiled program allocates beside its
arguments and results. Times are medians, the three taking turns, on one core. Close other programs.
"""

import dataclasses
import statistics

import jax
import study
from jax.flatten_util import ravel_pytree
from study import Experiment

from algorithms import svg
from common import devices

KINDS = {"manual": {"gradient": "manual"}, "autodiff": {}, "remat": {"remat": True}}
STYLES = {  # told apart by the colour-blind
    "manual": {"color": "#0072B2", "marker": "o"},
    "autodiff": {"color": "#E69F00", "marker": "s"},
    "remat": {"color": "#009E73", "marker": "^", "linestyle": "--"},
}
HIDDEN = ((), (8,), (16, 16), (32, 32), (64, 64))
HORIZONS = (10, 50, 200)
REPEATS = 5


def compile_gradients(hidden_sizes, horizon):
    """`(number of parameters, {kind: (call, temporary bytes)})`."""
    base = svg.Config(num_rollouts=16, hidden_sizes=hidden_sizes, horizon=horizon)
    inputs = jax.jit(lambda config, key: (svg.init(config, key).params, *svg.draw(config, (), (), key)))
    params, *drawn = inputs(base, jax.random.key(0))
    calls = {}
    for kind, fields in KINDS.items():
        arguments = dataclasses.replace(base, **fields), params, *drawn
        program = jax.jit(svg.policy_gradient, compiler_options=devices.cpu_compiler_options())
        compiled = program.lower(*arguments).compile()
        call = lambda compiled=compiled, arguments=arguments: jax.block_until_ready(compiled(*arguments))
        calls[kind] = call, compiled.memory_analysis().temp_size_in_bytes
    return len(ravel_pytree(params.actor)[0]), calls


def measure(cell):
    """A row for each kind of gradient; `cell` has widths of the hidden layers, horizon and repeats."""
    hidden_sizes, horizon, repeats = cell
    with study.one_thread():
        size, calls = compile_gradients(hidden_sizes, horizon)
        spent = {kind: [] for kind in calls}
        for _ in range(repeats):
            for kind, (call, _) in calls.items():
                call()  # twice, since the one before leaves the caches cold
                spent[kind].append(1000 * study.seconds(call))
    rows = []
    for kind, (_, size_in_bytes) in calls.items():
        figures = {"milliseconds": statistics.median(spent[kind]), "mebibytes": size_in_bytes / 2**20}
        figures = {name: study.short(x) for name, x in figures.items()}
        rows.append({"parameters": size, "horizon": horizon, "gradient": kind} | figures)
    return rows


def cells(hidden, horizons, repeats):
    """`{label: arguments}`."""
    name = lambda widths: " x ".join(map(str, widths)) or "linear"
    return {f"{name(widths)}, {t} steps": (widths, t, repeats) for widths in hidden for t in horizons}


def draw(rows):
    """Time above, memory below, over the number of parameters; a column for each horizon."""
    horizons = sorted({row["horizon"] for row in rows})
    page, panels = study.figure(3.4 * max(2, len(horizons)), 6, 2, len(horizons), sharex=True, sharey="row")
    for column, horizon in zip(panels.T, horizons, strict=True):
        for axes, figure in zip(column, ("milliseconds", "mebibytes"), strict=True):
            for kind, style in STYLES.items():
                chosen = [row for row in rows if (row["horizon"], row["gradient"]) == (horizon, kind)]
                axes.loglog([row["parameters"] for row in chosen], [row[figure] for row in chosen], label=kind, **style)
            axes.grid(alpha=0.3)
        column[0].set_title(f"horizon of {horizon:.0f} steps")
        column[1].set_xlabel("parameters of the policy")
    panels[0][0].set_ylabel("time of a gradient (ms)")
    panels[1][0].set_ylabel("memory (MiB)")
    panels[0][0].legend(fontsize="small")
    return page


def report(rows):
    """Ratios at the largest size, and the table."""
    found = {}
    for row in rows:
        found.setdefault((row["parameters"], row["horizon"]), {})[row["gradient"]] = row
    (parameters, horizon), last = list(found.items())[-1]
    ratio = lambda column, a, b: last[a][column] / last[b][column]
    text = (
        f"With {parameters:,.0f} parameters and {horizon:.0f} steps the manual gradient takes "
        f"{ratio('milliseconds', 'manual', 'autodiff'):,.1f} times the time of autodiff and "
        f"{ratio('mebibytes', 'manual', 'autodiff'):,.1f} times its memory; remat takes "
        f"{ratio('milliseconds', 'remat', 'autodiff'):,.2f} times its time and "
        f"{ratio('mebibytes', 'remat', 'autodiff'):,.2f} times its memory. Carried forward, derivatives need as much "
        "memory for any number of steps, but more of it, and more time, the more parameters there are."
    )
    lines = [
        [f"{parameters:,.0f}", f"{horizon:.0f}"]
        + [f"{x[kind]['milliseconds']:,.1f} ms" for kind in KINDS]
        + [f"{x[kind]['mebibytes']:,.2f} MiB" for kind in KINDS]
        for (parameters, horizon), x in found.items()
    ]
    return "\n".join([text, "", study.table(["parameters", "horizon", *KINDS, *KINDS], lines)])


EXPERIMENTS = {
    "svg_gradients": Experiment(
        title="SVG's gradients: time and memory",
        cells=cells(HIDDEN, HORIZONS, REPEATS),
        measure=measure,
        report=report,
        draw=draw,
        quick=lambda _: cells(((),), (2,), 1),
        sources=("svg_gradients", "study"),
        sample=f"times are medians of {REPEATS}, on one core",
    )
}

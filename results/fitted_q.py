"""What amortizing the maximisation buys: from a solver at every base point to none; `fitted_q.md`, `fitted_q.png`.

    python results/fitted_q.py

Every level trains on the same 20,000 random base points of Pendulum-v1, those of its seed, with the defaults of its
file but for what is named. Times are those of one iteration on 50,000 base points on one core, the levels taking turns.
"""

import argparse
import functools
import importlib
import statistics
import subprocess
import sys
import time

import jax
from benchmark import ROOT, machine
from matplotlib.figure import Figure

from common import devices, plot, record

ENV = "Pendulum-v1"
OPTIMUM = -137.7  # what no policy exceeds on average, by dynamic programming on a fine grid
LEVELS = {  # label: algorithm and its fields
    "fqi": ("fqi", {}),
    "exact 1": ("fqi_amortized", {"exact_fraction": 1.0}),
    "exact 0.5": ("fqi_amortized", {"exact_fraction": 0.5}),
    "exact 0.1": ("fqi_amortized", {"exact_fraction": 0.1}),
    "exact 0.01": ("fqi_amortized", {"exact_fraction": 0.01}),
    "exact 0": ("fqi_amortized", {"exact_fraction": 0.0}),
    "nfqca": ("nfqca", {}),
    "soft_fqi": ("soft_fqi", {}),
    "window 0": ("fqi_amortized", {"exact_fraction": 0.1, "window": 0}),
    "window 1": ("fqi_amortized", {"exact_fraction": 0.1, "window": 1}),
    "window 16": ("fqi_amortized", {"exact_fraction": 0.1, "window": 16}),
}
PANELS = {  # what each panel of the figure compares; window 4 is the default
    "exact maximisers at a fraction of base points": [
        "fqi",
        *[f"exact {x}" for x in ("1", "0.5", "0.1", "0.01", "0")],
        "nfqca",
    ],
    "window of past iterations, exact 0.1": ["window 0", "window 1", "exact 0.1", "window 16"],
}


def train(label, seeds):
    """Final returns `[seeds]`; goes on where it was stopped."""
    algorithm, fields = LEVELS[label]
    group = record.group_folder(ROOT / "results" / "runs", algorithm, ENV, f"study-{label.replace(' ', '-')}")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    flags += ["--num-seeds", str(seeds), "--name", group.name, "--no-plot", *["--resume"] * group.exists()]
    subprocess.run([sys.executable, f"algorithms/{algorithm}.py", *flags], check=True, cwd=ROOT)
    return plot.read_group(group)[2][:, -1]


def measure(repeats):
    """Seconds of an iteration and of its targets on 50,000 base points, medians: `{label: (whole, targets)}`."""
    devices.set_up_backend()
    programs, seconds = {}, {label: ([], []) for label in LEVELS}
    for label, (algorithm, fields) in LEVELS.items():
        module = importlib.import_module(f"algorithms.{algorithm}")
        config = module.Config(env=ENV, num_base_points=50_000, **fields)
        state = jax.jit(module.init)(config, jax.random.key(0))
        key = [] if algorithm == "nfqca" else [state.key]
        compile_for = functools.partial(jax.jit, compiler_options=devices.cpu_compiler_options())
        whole = compile_for(functools.partial(module.iteration, config)).lower(state).compile()
        targets = compile_for(functools.partial(module.bellman_targets, config))
        targets = targets.lower(state.params, state.base_points, *key).compile()
        programs[label] = (whole, (state,)), (targets, (state.params, state.base_points, *key))
    for _ in range(1 + repeats):
        for label, pair in programs.items():
            for (program, args), times in zip(pair, seconds[label], strict=True):
                start = time.perf_counter()
                jax.block_until_ready(program(*args))
                times.append(time.perf_counter() - start)
    return {label: tuple(statistics.median(times[1:]) for times in pair) for label, pair in seconds.items()}


def draw(returns):
    """The figure: how far each level's returns end below the optimum."""
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    for axes, (title, labels) in zip(
        figure.subplots(1, 2, sharey=True, width_ratios=(7, 4)), PANELS.items(), strict=True
    ):
        for x, label in enumerate(labels):
            final = OPTIMUM - returns[label]
            low, high = plot.interval(final)
            axes.plot([x] * len(final), final, ".", color="0.6", label="seeds" if x == 0 else None)
            axes.plot([x, x], [low, high], color="#0072B2", linewidth=2, label="95 % interval" if x == 0 else None)
            axes.plot(x, plot.iqm(final), "o", color="#0072B2", label="interquartile mean" if x == 0 else None)
        named = [label.replace("exact 0.1", "window 4") if "window 0" in labels else label for label in labels]
        axes.set_xticks(range(len(labels)), [name.replace(" ", "\n") for name in named])
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.set_yscale("log")
    figure.axes[0].set_ylabel(f"return below the optimum, {OPTIMUM} (log scale)")
    figure.axes[0].legend(loc="upper left")
    return figure


def main():
    """Parse the command line; train and time; write figure and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="timed iterations of each level")
    arguments = parser.parse_args()
    seeds, repeats = arguments.num_seeds, arguments.repeats
    returns = {label: train(label, seeds) for label in LEVELS}
    seconds = measure(repeats)
    lines = [
        f"Fitted-Q on {ENV}, 20,000 random base points, {seeds} seeds: greedy return after 50 iterations;",
        f"and the time of an iteration and of its targets on 50,000 base points, one core, medians of {repeats}.",
        f"`python results/fitted_q.py --num-seeds {seeds} --repeats {repeats}`",
        f"on {machine()}.",
        "",
        "| algorithm | exact fraction | window | return | worst seed | iteration | targets |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, (algorithm, fields) in LEVELS.items():
        final = returns[label]
        low, high = plot.interval(final)
        exact = f"{fields['exact_fraction']:g}" if fields else ""
        window = fields.get("window", 4) if fields else ""
        times = [f"{1e3 * x:.0f} ms ({y / x:.2f} x)" for x, y in zip(seconds[label], seconds["fqi"], strict=True)]
        cells = f"{plot.iqm(final):.1f} ({low:.1f} to {high:.1f}) | {final.min():.1f} | {' | '.join(times)}"
        lines.append(f"| {algorithm} | {exact} | {window} | {cells} |")
        print(lines[-1], flush=True)
    plot.save(draw(returns), ROOT / "results" / "fitted_q.png")
    (ROOT / "results" / "fitted_q.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

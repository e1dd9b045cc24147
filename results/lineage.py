"""Train the four actor-critics on the continuous environments of gymnax; draw `lineage.png` and write `lineage.md`.

    python results/lineage.py                        all five environments
    python results/lineage.py --env Pendulum-v1      one, or several after each other

Every run is an ordinary one of the command line with the defaults of its file, below `results/runs/`. A figure shows
interquartile means over seeds with their 95 % bootstrap bands.
"""

import argparse
import math
import subprocess
import sys

from benchmark import ROOT, machine
from matplotlib.figure import Figure

from common import plot, record

RUNS = {  # total steps, steps per epoch, seeds
    "Pendulum-v1": (10_000, 1_000, 16),
    "MountainCarContinuous-v0": (33_000, 4_000, 16),
    "PointRobot-misc": (17_000, 2_000, 8),
    "Reacher-misc": (17_000, 2_000, 8),
    "Swimmer-misc": (17_000, 2_000, 8),
}
COLOURS = {"ddpg": "#0072B2", "td3": "#D55E00", "sac_value": "#009E73", "sac": "#CC79A7"}  # Okabe and Ito's


def train(algorithm, env):
    """The folder of the finished run; goes on where it was stopped."""
    steps, epoch, seeds = RUNS[env]
    group = record.group_folder(ROOT / "results" / "runs", algorithm, env, "lineage")
    flags = f"--env {env} --total-steps {steps} --steps-per-epoch {epoch} --num-seeds {seeds} --name {group.name}"
    flags += " --resume" * group.exists()
    subprocess.run([sys.executable, f"algorithms/{algorithm}.py", *flags.split()], check=True, cwd=ROOT)
    return group


def draw(groups):
    """The figure: a panel for each environment of `groups {env: {algorithm: folder}}`."""
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(4 * columns, 3.4 * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    for panel, (env, folders) in zip(panels, groups.items(), strict=False):
        for algorithm, group in folders.items():
            _, step, returns, _ = plot.read_group(group)
            low, high = plot.interval(returns)
            panel.plot(step / 1000, plot.iqm(returns), color=COLOURS[algorithm], label=algorithm)
            panel.fill_between(step / 1000, low, high, color=COLOURS[algorithm], alpha=0.2, linewidth=0)
        panel.set_title(f"{env}, {len(returns)} seeds")
        panel.set_xlabel("environment steps (thousands)")
        panel.set_ylabel("greedy return per episode")
        panel.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    return figure


def main():
    """Parse the command line; train; write figure and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", choices=RUNS, default=[*RUNS])
    envs = parser.parse_args().env
    lines = [
        "Greedy return at the end: interquartile mean over seeds, its 95 % bootstrap interval, and the worst seed.",
        "The bias is the critic's value of the greedy policy less what that earns, a mean over seeds.",
        "`python results/lineage.py`" if envs == [*RUNS] else f"`python results/lineage.py --env {' '.join(envs)}`",
        f"on {machine()}.",
        "",
        "| environment | algorithm | steps | seeds | return | worst seed | bias |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = {}
    for env in envs:
        steps, _, seeds = RUNS[env]
        groups[env] = {algorithm: train(algorithm, env) for algorithm in COLOURS}
        for algorithm, group in groups[env].items():
            *_, returns, _ = plot.read_group(group)
            final = returns[:, -1]
            low, high = plot.interval(final)
            rows = [record.read_metrics(record.seed_folder(group, seed)) for seed in range(seeds)]
            bias = sum(row["value_bias"][-1] for row in rows) / seeds
            figures = f"{plot.iqm(final):.1f} ({low:.1f} to {high:.1f}) | {final.min():.1f} | {bias:+.1f}"
            lines.append(f"| {env} | {algorithm} | {steps:,} | {seeds} | {figures} |")
            print(lines[-1], flush=True)
    plot.save(draw(groups), ROOT / "results" / "lineage.png")
    (ROOT / "results" / "lineage.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

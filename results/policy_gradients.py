"""Train SVG and REINFORCE, and hold them to the best linear-quadratic policies; write `policy_gradients.md` and `.png`.

    python results/policy_gradients.py

A run that was broken off goes on from where it was. Costs of linear-quadratic systems are discounted by 0.9, in ratio
to those of the Riccati gain from the same starts and with the same noise, as in `results/lqr.py`.
"""

import argparse
import math
import subprocess
import sys

import numpy as np
from benchmark import ROOT, machine
from lqr import GAMMA, compare
from matplotlib.figure import Figure

from common import lqr, plot, record

LEARNED = "--model learned --gamma 0.97 --num-rollouts 64"
RUNS = [  # algorithm, environment, name of the run, flags
    ("svg", "Pendulum-v1", "true", ""),
    ("svg", "Pendulum-v1", "learned", LEARNED),
    ("svg", "Pendulum-v1", "inferred", f"{LEARNED} --noise inferred"),
    ("svg", "Pendulum-v1", "true-reward", f"{LEARNED} --reward true"),
    ("svg", "MountainCarContinuous-v0", "true", ""),
    ("svg", "Reacher-misc", "true", ""),
    ("svg", "Swimmer-misc", "true", ""),
    ("reinforce", "CartPole-v1", "default", ""),
    ("reinforce", "Pendulum-v1", "default", ""),
]
LQR_FLAGS = {  # an episode of these systems has 20 steps
    "svg": f"--gamma {GAMMA} --horizon 20",
    "reinforce": f"--gamma {GAMMA}",
}


def train(algorithm, env, name, flags, seeds):
    """The folder of the finished run; goes on where it was stopped."""
    group = record.group_folder(ROOT / "results" / "runs", algorithm, env, name)
    command = (
        f"algorithms/{algorithm}.py --env {env} --name {name} --num-seeds {seeds} --num-eval-episodes 1024 {flags}"
    )
    command += " --resume" * group.exists()
    subprocess.run([sys.executable, *command.split()], check=True, cwd=ROOT)
    return group


def cost_ratios(group, seeds):
    """Cost over best cost `[seeds]` of the policies in `group`."""
    policies = [record.load_policy(record.seed_folder(group, seed)) for seed in range(seeds)]
    return np.array([compare(module, config, params, 0.0)[0] for module, config, params in policies])


def draw(groups):
    """The figure: a panel for each run."""
    columns = 3
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), dpi=130, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    for panel, (title, group) in zip(panels, groups.items(), strict=False):
        metrics = record.read_metrics(record.seed_folder(group, 0))
        _, _, returns, _ = plot.read_group(group)
        low, high = plot.interval(returns)
        panel.plot(metrics["step"] / 1000, plot.iqm(returns), color="#0072B2")
        panel.fill_between(metrics["step"] / 1000, low, high, color="#0072B2", alpha=0.25, linewidth=0)
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("environment steps (thousands)")
        panel.set_ylabel("greedy return per episode")
        panel.grid(alpha=0.3)
    return figure


def main():
    """Parse the command line; train; write figure and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=8)
    seeds = parser.parse_args().num_seeds
    lines = [
        f"Greedy return at the end, {seeds} seeds, 1,024 episodes each; then the cost of linear-quadratic systems.",
        f"`python results/policy_gradients.py --num-seeds {seeds}`",
        f"on {machine()}.",
        "",
        "| algorithm | environment | flags | environment steps | return | worst seed |",
        "|---|---|---|---|---|---|",
    ]
    groups = {}
    for algorithm, env, name, flags in RUNS:
        group = train(algorithm, env, name, flags, seeds)
        groups[f"{algorithm} on {env}" + f", {name}" * (algorithm == "svg")] = group
        final = plot.read_group(group)[2][:, -1]
        low, high = plot.interval(final)
        steps = record.read_metrics(record.seed_folder(group, 0))["step"][-1]
        shown = f"`{flags}`" if flags else ""
        figures = f"{steps:,.0f} | {plot.iqm(final):.1f} ({low:.1f} to {high:.1f}) | {final.min():.1f}"
        lines.append(f"| {algorithm} | {env} | {shown} | {figures} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "| algorithm | environment | flags | environment steps | cost / best | worst seed |",
        "|---|---|---|---|---|---|",
    ]
    for algorithm, flags in LQR_FLAGS.items():
        for env in lqr.ENVS:
            group = train(algorithm, env, "closed-form", flags, seeds)
            ratios = cost_ratios(group, seeds)
            low, high = plot.interval(ratios)
            steps = record.read_metrics(record.seed_folder(group, 0))["step"][-1]
            figures = f"{steps:,.0f} | {plot.iqm(ratios):.4f} ({low:.4f} to {high:.4f}) | {ratios.max():.4f}"
            lines.append(f"| {algorithm} | {env} | `{flags}` | {figures} |")
            print(lines[-1], flush=True)
    plot.save(draw(groups), ROOT / "results" / "policy_gradients.png")
    (ROOT / "results" / "policy_gradients.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Compare TD3's default networks with wider ones on the five continuous environments of gymnax; write `widths.md`.

    python results/widths.py

Every run is an ordinary one of the command line, below `results/runs/td3/`, named after its width. The returns
are interquartile means over seeds with their 95 % bootstrap intervals.
"""

import argparse
import subprocess
import sys

from benchmark import ROOT, machine

from common import cli, plot, record

WIDTHS = (64, 256)


def train(env, width, seeds, steps):
    """Final returns `[seeds]` of the command line with two hidden layers of `width`; goes on where it was stopped."""
    group = record.group_folder(ROOT / "results" / "runs", "td3", env, f"width-{width}")
    flags = f"--env {env} --hidden-sizes {width} {width} --num-seeds {seeds} --total-steps {steps} --name {group.name}"
    flags += " --steps-per-epoch 5000 --num-eval-episodes 64" + " --resume" * group.exists()
    subprocess.run([sys.executable, "algorithms/td3.py", *flags.split()], check=True, cwd=ROOT)
    rows = [record.read_metrics(record.seed_folder(group, seed)) for seed in range(seeds)]
    return [row["eval_return_mean"][-1] for row in rows]


def main():
    """Parse the command line; train; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=4)
    parser.add_argument("--total-steps", type=int, default=21_000)
    arguments = parser.parse_args()
    seeds, steps = arguments.num_seeds, arguments.total_steps
    lines = [
        f"TD3, greedy return after {steps:,} environment steps, {seeds} seeds.",
        f"`python results/widths.py --num-seeds {seeds} --total-steps {steps}`",
        f"on {machine()}.",
        "",
        "| environment | " + " | ".join(f"{width} x {width}" for width in WIDTHS) + " |",
        "|---" * (1 + len(WIDTHS)) + "|",
    ]
    for env in cli.CONTINUOUS_ENVS:
        cells = [env]
        for width in WIDTHS:
            returns = train(env, width, seeds, steps)
            low, high = plot.interval(returns)
            cells.append(f"{plot.iqm(returns):.1f} ({low:.1f} to {high:.1f})")
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    (ROOT / "results" / "widths.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

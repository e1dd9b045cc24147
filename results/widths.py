"""Compare TD3's default networks with wider ones on the five continuous environments of gymnax; write `widths.md`.

    python results/widths.py

Every run is an ordinary one of the command line, below `results/runs/td3/`, named after its width. The returns are interquartile means over seeds with their 95 % bootstrap intervals.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmark import ROOT, machine

from common import cli, plot, record

WIDTHS = (64, 256)


def train(env, width, seeds, steps):
    """`(returns [seeds], seconds)` of the command line with two hidden layers of `width`."""
    flags = f"--env {env} --hidden-sizes {width} {width} --num-seeds {seeds} --total-steps {steps} --name width-{width}"
    flags += " --steps-per-epoch 5000 --num-eval-episodes 64"
    start = time.perf_counter()
    command = [sys.executable, "algorithms/td3.py", *flags.split()]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    group = record.group_folder(Path(ROOT / "results" / "runs"), "td3", env, f"width-{width}")
    rows = [record.read_metrics(record.seed_folder(group, seed)) for seed in range(seeds)]
    return [row["eval_return_mean"][-1] for row in rows], seconds


def main():
    """Parse the command line; train; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=4)
    parser.add_argument("--total-steps", type=int, default=21_000)
    arguments = parser.parse_args()
    seeds, steps = arguments.num_seeds, arguments.total_steps
    lines = [
        f"TD3, greedy return after {steps:,} environment steps, {seeds} seeds, and wall time of all of them together.",
        f"`python results/widths.py --num-seeds {seeds} --total-steps {steps}`",
        f"on {machine()}.",
        "",
        "| environment | " + " | ".join(f"{width} x {width} | seconds" for width in WIDTHS) + " |",
        "|---" * (1 + 2 * len(WIDTHS)) + "|",
    ]
    for env in cli.CONTINUOUS_ENVS:
        cells = [env]
        for width in WIDTHS:
            returns, seconds = train(env, width, seeds, steps)
            low, high = plot.interval(returns)
            cells += [f"{plot.iqm(returns):.1f} ({low:.1f} to {high:.1f})", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    (ROOT / "results" / "widths.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

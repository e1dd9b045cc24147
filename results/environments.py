"""Compare two network sizes of TD3 on the five continuous gymnax environments; write `results/environments.md`.

    python results/environments.py
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from benchmark import machine

from common import cli, plot, record

ROOT = Path(__file__).resolve().parent.parent
NUM_SEEDS = 4
SIZES = ((64, 64), (256, 256))
FLAGS = ["--total-steps", "16000", "--steps-per-epoch", "3000", "--num-seeds", str(NUM_SEEDS)]


def train(env, sizes):
    """Run the command; return `(interquartile mean, low, high, wall seconds)` of the final greedy return."""
    name = f"environments-{'x'.join(map(str, sizes))}"
    start = time.perf_counter()
    command = [sys.executable, ROOT / "algorithms" / "td3.py", "--env", env, "--name", name, *FLAGS]
    subprocess.run([*command, "--hidden-sizes", *map(str, sizes)], check=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    group = record.group_folder(ROOT / "results" / "runs", "td3", env, name)
    finals = [record.read_metrics(record.seed_folder(group, i))["eval_return_mean"][-1] for i in range(NUM_SEEDS)]
    return plot.iqm(np.array(finals)), *plot.interval(np.array(finals)), seconds


def main():
    """Train everything and write the table."""
    heads = [f"{' x '.join(map(str, sizes))}" for sizes in SIZES]
    lines = [
        f"TD3's final greedy return after 16,000 steps: interquartile mean of {NUM_SEEDS} seeds, 95 % bootstrap interval,",
        "and the wall time of the whole command. `python results/environments.py`, which runs",
        f"`python algorithms/td3.py --env ENV {' '.join(FLAGS)} --hidden-sizes ...`,",
        f"on {machine()}.",
        "",
        f"| environment | {' | '.join(heads)} |",
        "|---|---|---|",
    ]
    for env in cli.CONTINUOUS_ENVS:
        results = [train(env, sizes) for sizes in SIZES]
        cells = [f"{mean:.1f} ({low:.1f} to {high:.1f}), {seconds:.0f} s" for mean, low, high, seconds in results]
        lines.append(f"| {env} | {' | '.join(cells)} |")
    (ROOT / "results" / "environments.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

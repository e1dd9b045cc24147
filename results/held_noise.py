"""What TD3 and SAC lack on MountainCarContinuous-v0: noise that lasts. Adds one line to each; writes `held_noise.md`.

    python results/held_noise.py

The line draws the exploration noise from a key that stays for 30 steps, so that a push lasts long enough to climb. The
noise, and it alone, is then the same in every seed. The changed files and their runs lie below `results/runs/`.
"""

import argparse
import subprocess
import sys

from benchmark import ROOT, machine

from common import plot, record

ENV = "MountainCarContinuous-v0"
LINE = "        key = random.fold_in(random.key(0), state.step // (30 * config.num_envs))\n"
BEFORE = {
    "td3": ("        action = actor(state.params.actor, obs)\n", "--exploration-noise 0.5"),
    "sac": ("        return sample(state.params.actor, obs, random.normal(", ""),
}


def train(algorithm, seeds, steps):
    """Final returns `[seeds]` of the algorithm with the line added; goes on where it was stopped."""
    before, flags = BEFORE[algorithm]
    source = (ROOT / "algorithms" / f"{algorithm}.py").read_text()
    if source.count(before) != 1:
        raise ValueError(f"{algorithm}.py: the place for the line is not there once")
    script = ROOT / "results" / "runs" / f"{algorithm}_held_noise.py"
    record.write_atomic(script, source.replace(before, LINE + before).encode())
    group = record.group_folder(ROOT / "results" / "runs", script.stem, ENV, "default")
    flags += f" --env {ENV} --num-seeds {seeds} --total-steps {steps} --steps-per-epoch 4000 --no-plot"
    flags += " --resume" * group.exists()
    subprocess.run([sys.executable, script, *flags.split()], check=True, cwd=ROOT)
    return plot.read_group(group)[2][:, -1]


def main():
    """Parse the command line; train; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=8)
    parser.add_argument("--total-steps", type=int, default=33_000)
    arguments = parser.parse_args()
    seeds, steps = arguments.num_seeds, arguments.total_steps
    lines = [
        f"{ENV} with exploration noise held for 30 steps: greedy return after {steps:,} steps, {seeds} seeds.",
        f"`python results/held_noise.py --num-seeds {seeds} --total-steps {steps}`",
        f"on {machine()}.",
        "",
        "| algorithm | flags | return | worst seed |",
        "|---|---|---|---|",
    ]
    for algorithm, (_, flags) in BEFORE.items():
        final = train(algorithm, seeds, steps)
        low, high = plot.interval(final)
        shown = f"`{flags}`" if flags else ""
        lines.append(f"| {algorithm} | {shown} | {plot.iqm(final):.1f} ({low:.1f} to {high:.1f}) | {final.min():.1f} |")
        print(lines[-1], flush=True)
    (ROOT / "results" / "held_noise.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

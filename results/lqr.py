"""Hold the actor-critics to the best policies of linear-quadratic regulation; write `lqr.md`.

    python results/lqr.py

Costs are discounted, over 2,048 episodes, in ratio to those of the Riccati gain from the same starts and with the same
noise. The mean action's error is its distance from -K s in ratio to -K s, root mean square over the starts; variances
are in ratio to the soft-optimal ones, a mean over the starts. A diagonal Gaussian comes closest to a full one when each
variance is the inverse of a diagonal element of the precision.
"""

import argparse
import subprocess
import sys

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from benchmark import ROOT, machine

from common import lqr, record

GAMMA = 0.9
OWN = {
    "ddpg": "--ou-theta 1 --ou-dt 1 --ou-sigma 0.2 --target-period 1 --tau 0.005 --learning-rate 5e-4",
    "td3": "--exploration-noise 0.2 --learning-rate 3e-4",
    "sac_value": "--alpha 0.2",
    "sac": "",
}
STEPS = {"LQR1-v0": 48_000, "LQR-v0": 96_000, "LQR4-v0": 96_000}  # of the environment, after the warm-up


def num_steps(algorithm, env):
    """Deterministic policies see less of the critic around their actions: in four dimensions they train for longer."""
    return STEPS[env] * (2 if is_harder(algorithm, env) else 1)


def is_harder(algorithm, env):
    """Whether the critic is twice as wide and trained for twice as long."""
    return env == "LQR4-v0" and algorithm in ("ddpg", "td3")


def train(algorithm, env, seeds):
    """`[(module, config, params, temperature)]` of the seeds; goes on where it was stopped."""
    group = record.group_folder(ROOT / "results" / "runs", algorithm, env, "closed-form")
    # one wide layer: its value has more, and smaller, kinks for the actor to stop at than two narrow ones
    width, steps = 1024 if is_harder(algorithm, env) else 512, num_steps(algorithm, env)
    flags = f"--gamma {GAMMA} --num-eval-episodes 64 --hidden-sizes {width} {OWN[algorithm]} --env {env}"
    flags += f" --num-seeds {seeds} --name {group.name} --no-plot"
    flags += f" --total-steps {steps + 1000} --steps-per-epoch {steps // 4}" + " --resume" * group.exists()
    subprocess.run([sys.executable, f"algorithms/{algorithm}.py", *flags.split()], check=True, cwd=ROOT)
    runs = []
    for seed in range(seeds):
        module, config, params = record.load_policy(record.seed_folder(group, seed))
        alpha = np.exp(params.log_alpha) if algorithm == "sac" else getattr(config, "alpha", 0.0)
        runs.append((module, config, params, float(alpha)))
    return runs


def compare(module, config, params, alpha):
    """`(cost ratio, error of the mean action, ratio of variances)`; the last is NaN for a deterministic policy."""
    system = gymnax.make(config.env)[1]
    best = lqr.solve(system, GAMMA, alpha)
    key, K = jax.random.key(1), jnp.asarray(best.K)
    policies = (lambda s: module.act(config, params, s)), (lambda s: -K @ s)
    ours, theirs = (jax.jit(lambda key, f=f: lqr.simulate(system, f, GAMMA, key, 2048).mean())(key) for f in policies)
    starts = jax.random.uniform(key, (1000, len(system.A)), minval=-1, maxval=1)
    action, target = jax.vmap(policies[0])(starts), -starts @ K.T
    error = jnp.sqrt(jnp.square(action - target).mean() / jnp.square(target).mean())
    if not alpha:
        return float(ours / theirs), float(error), float("nan")
    noise = jax.random.normal(key, (512, *action.shape))
    sampled = lqr.ACTION_BOUND * module.sample(params.actor, starts, noise)[0]
    precision = np.diag(np.linalg.inv(best.covariance))
    return float(ours / theirs), float(error), float((sampled.var(axis=0) * precision).mean())


def main():
    """Parse the command line; train; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=4)
    seeds = parser.parse_args().num_seeds
    lines = [
        f"Linear-quadratic systems at the end of training: means over {seeds} seeds, the worst in brackets.",
        f"`python results/lqr.py --num-seeds {seeds}`",
        f"on {machine()}.",
        "",
        "| algorithm | dimensions | steps | cost / best | error of the mean action | variance / soft-optimal |",
        "|---|---|---|---|---|---|",
    ]
    for env, dims in lqr.ENVS.items():
        for algorithm in OWN:
            figures = np.array([compare(*run) for run in train(algorithm, env, seeds)])
            worst = *figures[:, :2].max(axis=0), figures[np.abs(figures[:, 2] - 1).argmax(), 2]
            cells = [f"{mean:.3f} ({far:.3f})" for mean, far in zip(figures.mean(axis=0), worst, strict=True)]
            shown = " | ".join(cells).replace("nan (nan)", "")
            lines.append(f"| {algorithm} | {dims} | {num_steps(algorithm, env):,} | {shown} |")
            print(lines[-1], flush=True)
    (ROOT / "results" / "lqr.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

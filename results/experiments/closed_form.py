"""Validation against closed-form LQR solutions: costs, mean actions and variances of trained policies.

Costs are discounted, over 2,048 episodes, relative to those of the Riccati gain K from the same starts and with the
same noise. The error of the mean action is the root mean square distance from -K s over the starts, relative to that of
-K s. Variances are relative to the soft-optimal ones, averaged over the starts, for policies that maximize entropy; the
diagonal Gaussian closest to a full one has as variances the inverses of the diagonal of the precision matrix.
"""

import functools

import gymnax
import jax
import jax.numpy as jnp
import numpy as np

from amortax.common import lqr, policy, record
from experiments import drawing, study, training
from experiments.curves import ACTOR_CRITICS, LQR_FLAGS
from experiments.curves import LQR_GAMMA as GAMMA
from experiments.study import Criterion, Experiment, column
from experiments.training import Run

STEPS = {"LQR1-v0": 48_000, "LQR-v0": 96_000, "LQR4-v0": 96_000}  # of the environment, after the warm-up
LIMIT = 1.03  # of the cost relative to the optimum
QUICK = {"LQR1-v0": "sac", "LQR-v0": "svg", "LQR4-v0": "svg"}
MEASURES = ("cost_ratio", "action_error", "variance_ratio")


def actor_critic(algorithm, env):
    """The run of an algorithm with a replay buffer.

    Deterministic policies explore less of the critic around their actions: in four dimensions the critic is twice as
    wide and trained for twice as long. One wide layer has more, and smaller, kinks for the actor to stop at than two
    narrow ones.
    """
    factor = 2 if env == "LQR4-v0" and algorithm in ("ddpg", "td3") else 1
    steps = STEPS[env] * factor
    flags = f"--gamma {GAMMA} --num-eval-episodes 64 --hidden-sizes {512 * factor} {LQR_FLAGS.get(algorithm, '')}"
    return Run(algorithm, env, f"{flags} --total-steps {steps + 1000} --steps-per-epoch {steps // 4}", seeds=4)


def cells(env):
    """`{algorithm: Run}`."""
    return {algorithm: actor_critic(algorithm, env) for algorithm in ACTOR_CRITICS} | {
        "svg": Run("svg", env, f"--gamma {GAMMA} {LQR_FLAGS['svg']}", seeds=4),
        "reinforce": Run("reinforce", env, f"--gamma {GAMMA}", seeds=4),
    }


def evaluate(module, config, params, K):
    """Costs of a policy and of the gain `K`, error of its mean action, and variances `[1000, m]` at 1,000 states.

    A pure function; the variances are zero where a policy does not maximize entropy.
    """
    system, key = gymnax.make(config.env)[1], jax.random.key(1)
    policies = (lambda s: module.act(config, params, s)), (lambda s: -K @ s)
    costs = [lqr.simulate(system, policy, GAMMA, key, 2048).mean() for policy in policies]
    starts = jax.random.uniform(key, (1000, len(system.A)), minval=-1, maxval=1)
    action, target = jax.vmap(policies[0])(starts), -starts @ K.T
    error = jnp.sqrt(jnp.square(action - target).mean() / jnp.square(target).mean())
    if not hasattr(params, "log_alpha") and not hasattr(config, "alpha"):
        return *costs, error, jnp.zeros_like(action)
    noise = jax.random.normal(key, (512, *action.shape))
    return *costs, error, (lqr.ACTION_BOUND * module.sample_action(config, params.actor, starts, noise)[0]).var(axis=0)


def compare(evaluated, config, params, alpha):
    """`(cost ratio, error of the mean action, ratio of variances)`; the last is empty without a temperature.

    `evaluated(config, params, K)` is `evaluate` of a module.
    """
    optimal = lqr.solve(gymnax.make(config.env)[1], GAMMA, alpha)
    cost, optimal_cost, error, variances = map(np.asarray, evaluated(config, params, optimal.K))
    if not alpha:
        return cost / optimal_cost, error, ""
    precision = np.diag(np.linalg.inv(optimal.covariance))
    return cost / optimal_cost, error, (variances * precision).mean()


def measure(run):
    """A row for each seed, at the end of training."""
    group, rows, evaluated = training.train(run), [], None
    for seed in range(run.seeds):
        folder = record.seed_folder(group, seed)
        module, config, params = policy.load(folder)
        evaluated = evaluated or jax.jit(functools.partial(evaluate, module))  # one program for all seeds
        alpha = np.exp(params.log_alpha) if run.algorithm == "sac" else getattr(config, "alpha", 0.0)
        values = map(study.short, compare(evaluated, config, params, float(alpha)))
        steps = study.short(record.read_metrics(folder)["step"][-1])
        rows.append({"seed": seed, "steps": steps} | dict(zip(MEASURES, values, strict=True)))
    return rows


def holds(rows):
    """For each algorithm: the mean cost is within 3 % of the optimum."""
    return {label: column(rows, label, "cost_ratio").mean() <= LIMIT for label in study.labels(rows)}


def notes(rows):
    """The worst seed of all, and how to read the table."""
    costs = {label: column(rows, label, "cost_ratio") for label in study.labels(rows)}
    worst = max(costs, key=lambda label: costs[label].max())
    return (
        f"The worst seed of all, of {worst}, is {100 * (costs[worst].max() - 1):.1f} % above the optimum. The table "
        "shows means over the seeds, worst seeds in parentheses. Errors of the mean action that cost little can be "
        "large; the variance has an optimum only where the objective includes entropy."
    )


def table(rows):
    """Means and worst seeds of each algorithm."""
    lines = []
    for label in study.labels(rows):
        cells = [label, f"{column(rows, label, 'steps').max():,.0f}"]
        for name, optimum in zip(MEASURES, (0, 0, 1), strict=True):
            values = column(rows, label, name)
            worst = values[np.abs(values - optimum).argmax()] if len(values) else ""
            cells.append(f"{values.mean():.3f} ({worst:.3f})" if len(values) else "")
        lines.append(cells)
    header = ["algorithm", "environment steps", "cost / optimum", "error of the mean action", "variance / soft-optimal"]
    return study.table(header, lines)


def draw(rows):
    """How far each algorithm's cost is above the optimum: seeds and means."""
    labels = study.labels(rows)
    page, ((axes,),) = drawing.figure(7, 3.8)
    for x, label in enumerate(labels):
        excess = 100 * (column(rows, label, "cost_ratio") - 1)
        axes.plot(x + 0.18 + 0.12 * np.linspace(-1, 1, len(excess)), excess, ".", color="0.65")
        axes.plot(x - 0.12, excess.mean(), "o", color=drawing.algorithm_color(label), markersize=8)
    axes.plot([], [], "o", color="0.3", label="mean")
    axes.plot([], [], ".", color="0.65", label="seeds")
    axes.axhline(100 * (LIMIT - 1), color="black", linestyle="--", linewidth=1, label=f"{100 * (LIMIT - 1):.0f} %")
    axes.set_xticks(range(len(labels)), labels)
    axes.set(
        xlim=(-0.5, len(labels) - 0.5),
        ylabel="discounted cost above the optimum (%)",
        ylim=(min(0, axes.get_ylim()[0]), None),
    )
    axes.legend(fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    return page


def experiment(env, dims):
    """The algorithms on a system of `dims` state dimensions."""
    dimensions = f"{dims} state dimension{'s' * (dims > 1)}"
    return Experiment(
        title=f"Validation against the closed-form LQR solution: {dimensions}",
        question=f"Do the algorithms find the optimal linear policy of a system with {dimensions}?",
        cells=cells(env),
        measure=measure,
        criterion=Criterion(
            "for each algorithm: the discounted cost, averaged over its seeds, is at most 3 % above that of the "
            "closed-form optimal policy.",
            holds,
        ),
        notes=notes,
        table=table,
        draw=draw,
        quick=lambda cells: training.smaller(cells, QUICK[env]),
        sources=("common/lqr.py",),
        sample="4 seeds each; each cost is the mean of 2,048 episodes",
    )


EXPERIMENTS = {f"closed_form_{dims}": experiment(env, dims) for env, dims in lqr.ENVS.items()}

"""Does SAC's policy tend to the Boltzmann policy? On linear-quadratic systems that one is Gaussian, in closed form.

Before the first epoch and after each, the distance is KL(SAC's policy || soft-optimal policy of SAC's present
temperature), in nats, a mean over states of the cube that episodes start from, estimated from samples of SAC's policy.
"""

import importlib
from pathlib import Path
from typing import NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import study
from claims import algorithm_color, envs, on
from curves import LQR_GAMMA as GAMMA
from jax import random
from jax.scipy.stats import multivariate_normal
from study import Experiment, short

from common import devices, lqr, plot, run

ENVS = ("LQR1-v0", "LQR-v0")
NUM_STATES, NUM_SAMPLES = 512, 64


class Training(NamedTuple):
    """Seeds of SAC on a linear-quadratic system, looked at after each epoch."""

    algorithm: str
    env: str
    fields: tuple  # of its Config, (name, value)
    seeds: int


def kl_divergence(module, actor, best, alpha):
    """KL divergence in nats from the soft-optimal policy for temperature `alpha`, a mean over states of the starts.

    `best` solves the system for temperature 1; the covariance is proportional to the temperature.
    """
    K, covariance = jnp.asarray(best.K), jnp.asarray(best.covariance)
    key_state, key_noise = random.split(random.key(0))
    obs = random.uniform(key_state, (NUM_STATES, K.shape[1]), minval=-1, maxval=1)
    noise = random.normal(key_noise, (NUM_SAMPLES, NUM_STATES, len(K)))
    action, log_prob = module.sample(actor, obs, noise)  # in [-1, 1], and its density there
    log_prob -= len(K) * jnp.log(lqr.ACTION_BOUND)
    error = lqr.ACTION_BOUND * action + obs @ K.T
    return (log_prob - multivariate_normal.logpdf(error, jnp.zeros(len(K)), alpha * covariance)).mean()


def temperature(config, params):
    """What a nat of entropy is worth."""
    return jnp.exp(params.log_alpha) if hasattr(params, "log_alpha") else config.alpha


def distances(training):
    """A row for each seed, before the first epoch and after each.

    The programs are the runner's own, so that seed `i` is that of the command line.
    """
    module = importlib.import_module(f"algorithms.{training.algorithm}")
    config = module.Config(env=training.env, gamma=GAMMA, **dict(training.fields))
    best = lqr.solve(gymnax.make(training.env)[1], GAMMA, 1.0)
    distance = jax.jit(lambda p: kl_divergence(module, p.actor, best, temperature(config, p)))
    devices.set_up_backend(training.seeds, devices.largest_product(config))
    programs = run.compile_programs(config, module.init, module.epoch, training.seeds)
    slots = run.place(programs, [run.Run(config, seed, Path()) for seed in range(training.seeds)])
    states, rows = run.start(programs, slots), []
    for epoch in range(1 + (config.total_steps - config.learning_starts) // config.steps_per_epoch):
        if epoch:
            states, _ = run.advance(programs, slots, states)
        for slot, state in zip(slots, states, strict=True):
            params = jax.tree.map(lambda x: x[0], jax.device_get(state.params))  # a slot of a CPU holds one run
            row = {"seed": slot.places[0], "progress": config.learning_starts + epoch * config.steps_per_epoch}
            row |= {"finite": int(all(np.isfinite(x).all() for x in jax.tree.leaves(params)))}
            row |= {"kl": float(distance(params)), "temperature": float(temperature(config, params))}
            rows.append({name: short(x) for name, x in row.items()})
    return sorted(rows, key=lambda row: (row["seed"], row["progress"]))


def training(algorithm, env):
    """Both temperatures are of the order of a nat's worth of cost: one is given, the other learned."""
    fields = {"hidden_sizes": (512,), "total_steps": 25_000, "steps_per_epoch": 1_600, "num_eval_episodes": 1}
    if algorithm == "sac_value":
        fields["alpha"] = 0.2
    return Training(algorithm, env, tuple(fields.items()), seeds=8)


def smaller(cells):
    """One cell, with two seeds and hardly any steps."""
    label, cell = next(iter(cells.items()))
    small = {"hidden_sizes": (8,), "total_steps": 192, "learning_starts": 64, "steps_per_epoch": 64, "batch_size": 16}
    return {label: cell._replace(fields=tuple((dict(cell.fields) | small).items()), seeds=2)}


def draw(rows):
    """KL divergence over environment steps, a panel for each system."""
    page, panels = study.figure(9, 3.8, 1, len(envs(rows)), sharey=True)
    for axes, env in zip(panels[0], envs(rows), strict=True):
        for label, what in on(env, rows).items():
            study.draw_curve(axes, rows, label, what, "kl", per=1e3, color=algorithm_color(label))
        axes.set(title=env, xlabel="environment steps (thousands)", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0][0].set_ylabel("KL(policy || Boltzmann policy) in nats\n(log scale)")
    return page


def report(rows):
    """Does the divergence fall to a tenth, and to less than a tenth of a nat?"""
    held, lines = [], []
    for label in study.labels(rows):
        _, values = study.returns(rows, label, "kl")
        held.append(plot.interval(values[:, -1])[1] < min(0.1, 0.1 * plot.iqm(values[:, 0])))
        temperature = f"{np.median(study.final(rows, label, 'temperature')):.3f}"
        lines.append([label, *(study.estimate(values[:, i], 3) for i in (0, -1)), temperature])
    text = (
        f"{study.verdict(held)} Asked of each system: does the divergence fall to less than a tenth of "
        "what it is before the first update, and of a nat? The Boltzmann policy is that of the temperature which SAC "
        "has at the time: given for sac_value, learned by sac."
    )
    header = ["what", "KL before the first update (nats)", "KL at the end (nats)", "temperature at the end, median"]
    return "\n".join([text, "", study.table(header, lines)])


EXPERIMENTS = {
    "boltzmann": Experiment(
        title="SAC's policy tends to the Boltzmann policy",
        cells={f"{name} on {env}": training(name, env) for env in ENVS for name in ("sac_value", "sac")},
        measure=distances,
        report=report,
        draw=draw,
        quick=smaller,
        sources=("boltzmann",),
        sample="8 seeds of each, 512 states and 64 actions in each",
    )
}

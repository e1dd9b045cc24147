"""Distance of SAC's policy from the Boltzmann policy, a Gaussian in closed form on linear-quadratic systems.

The distance is KL(SAC's policy || soft-optimal policy of SAC's current temperature) in nats, before the first epoch and
after each: the mean over states from the distribution of starts, estimated from samples of SAC's policy.
"""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.scipy.stats import multivariate_normal

from amortax.common import lqr, plot
from experiments import drawing, study, training
from experiments.curves import LQR_GAMMA as GAMMA
from experiments.study import Criterion, Experiment, short
from experiments.training import Run

ENVS = ("LQR1-v0", "LQR-v0")
NUM_STATES, NUM_SAMPLES = 512, 64
FLAGS = f"--gamma {GAMMA} --hidden-sizes 512 --total-steps 25000 --steps-per-epoch 1600 --num-eval-episodes 1"
FLAGS += " --learning-rate 3e-4"
TEMPERATURE = {"sac_value": " --alpha 0.2", "sac": ""}  # of the same order; SAC learns its own


def kl_divergence(module, config, actor, optimal, alpha):
    """KL divergence in nats from the soft-optimal policy for temperature `alpha`, the mean over states of the starts.

    `optimal` solves the system for temperature 1; the covariance is proportional to the temperature.
    """
    K, covariance = jnp.asarray(optimal.K), jnp.asarray(optimal.covariance)
    key_state, key_noise = random.split(random.key(0))
    obs = random.uniform(key_state, (NUM_STATES, K.shape[1]), minval=-1, maxval=1)
    noise = random.normal(key_noise, (NUM_SAMPLES, NUM_STATES, len(K)))
    action, log_prob = module.sample_action(config, actor, obs, noise)  # in [-1, 1], and its density there
    log_prob -= len(K) * jnp.log(lqr.ACTION_BOUND)
    error = lqr.ACTION_BOUND * action + obs @ K.T
    return (log_prob - multivariate_normal.logpdf(error, jnp.zeros(len(K)), alpha * covariance)).mean()


def temperature(config, params):
    """The weight of the entropy, learned or given."""
    return jnp.exp(params.log_alpha) if hasattr(params, "log_alpha") else config.alpha


def measure(run):
    """A row for each seed before the first epoch and after each."""
    module, config = training.load(run)
    optimal = lqr.solve(gymnax.make(run.env)[1], GAMMA, 1.0)
    distance = jax.jit(lambda params: kl_divergence(module, config, params.actor, optimal, temperature(config, params)))
    rows = []
    for x in training.snapshots(module, config, run.seeds):
        row = {"seed": x.seed, "progress": x.step, "finite": int(training.is_finite(x.params))}
        row |= {"kl": float(distance(x.params)), "temperature": float(temperature(config, x.params))}
        rows.append({name: short(x) for name, x in row.items()})
    return sorted(rows, key=lambda row: row["seed"])


def holds(rows):
    """For each label: the final divergence is below 0.1 nats, and below a tenth of the first."""
    answers = {}
    for label in study.labels(rows):
        _, values = study.returns(rows, label, "kl")
        answers[label] = plot.interval(values[:, -1])[1] < min(0.1, 0.1 * plot.iqm(values[:, 0]))
    return answers


def table(rows):
    """Divergences before and after training, and temperatures."""
    lines = []
    for label in study.labels(rows):
        _, values = study.returns(rows, label, "kl")
        final_temperature = f"{np.median(study.final(rows, label, 'temperature')):.3f}"
        lines.append([label, *(study.estimate(values[:, i], 3) for i in (0, -1)), final_temperature])
    header = ["variant", "KL before the first update (nats)", "final KL (nats)", "final temperature, median"]
    return study.table(header, lines)


def draw(rows):
    """KL divergence over environment steps, a panel for each system."""
    envs = study.envs(rows)
    page, panels = drawing.figure(9, 3.8, 1, len(envs), sharey=True)
    for axes, env in zip(panels[0], envs, strict=True):
        for label, variant in study.variants(rows, env).items():
            drawing.draw_curve(axes, rows, label, variant, "kl", per=1e3, color=drawing.algorithm_color(label))
        axes.set(title=env, xlabel="environment steps (thousands)", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0][0].set_ylabel("KL(policy || Boltzmann policy) in nats\n(log scale)")
    return page


EXPERIMENTS = {
    "boltzmann": Experiment(
        title="SAC's policy converges to the Boltzmann policy",
        question="How close does SAC's policy come to the Boltzmann policy of its temperature?",
        cells={
            f"{algorithm} on {env}": Run(algorithm, env, FLAGS + flags, seeds=8)
            for env in ENVS
            for algorithm, flags in TEMPERATURE.items()
        },
        measure=measure,
        criterion=Criterion(
            "for each system and algorithm: the upper end of the final divergence's interval is less than 0.1 nats, "
            "and less than a tenth of the divergence before the first update.",
            holds,
        ),
        notes="The Boltzmann policy is that of SAC's temperature at the time: given for sac_value, learned by sac. The "
        "step size is 3e-4, since with the default of 1e-3 the policy keeps moving about the optimum; the figure shows "
        "where the divergence still falls at the end.",
        table=table,
        draw=draw,
        quick=lambda cells: training.smaller(cells, next(iter(cells))),
        sources=("common/lqr.py",),
        sample="8 seeds each; 512 states, and 64 actions in each",
    )
}

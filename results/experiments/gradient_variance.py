"""Variance of score-function and pathwise policy gradients, over horizon and dimension of linear-quadratic systems.

Each gradient is that of the discounted return of one rollout of the same Gaussian policy a = K s + std e, by three
estimators: the score function with rewards-to-go; the same with a baseline for each time, the mean of the other
rollouts' rewards-to-go; and the pathwise derivative. All have the same mean. The relative variance is the variance,
summed over the parameters, divided by the squared norm of the mean: the number of rollouts whose average has a standard
error as large as the gradient itself.
"""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np

from amortax.algorithms import svg
from amortax.common import lqr
from experiments import drawing, study
from experiments.study import Criterion, Experiment

HORIZONS = (1, 2, 5, 10, 20, 50, 100)
GAMMA, STD = 0.99, 0.3
STYLES = {
    "score function": (drawing.ORANGE, "s"),
    "score function with baseline": (drawing.BLUE, "^"),
    "pathwise": (drawing.GREEN, "o"),
}


def setting(env, horizon, num_rollouts):
    """`(config, the policy's parameters, first states, noise)` with half the optimal gain, as during learning."""
    system = gymnax.make(env)[1]
    gain = -0.5 * lqr.solve(system, GAMMA).K / lqr.ACTION_BOUND
    weights = jnp.concatenate([jnp.asarray(gain.T), jnp.zeros_like(gain.T)], axis=1)
    bias = jnp.concatenate([jnp.zeros(len(gain)), jnp.full(len(gain), jnp.log(STD / lqr.ACTION_BOUND))])
    config = svg.Config(env=env, num_rollouts=num_rollouts, horizon=horizon, gamma=GAMMA, hidden_sizes=())
    return config, [(weights, bias)], *svg.sample_rollouts(config, jax.random.key(0))


def score_function_parts(config, actor, start, noise):
    """Scores at each time of one rollout, a tree of `[horizon, ...]`, and discounted rewards-to-go `[horizon]`."""
    obs_dim = actor[0][0].shape[0]

    def log_prob(actor, obs, unsquashed):
        mean, std = svg.gaussian(config, actor, obs)
        return jax.scipy.stats.norm.logpdf(unsquashed, mean, std).sum()

    def step(carry, noise):
        s, discount = carry
        mean, std = svg.gaussian(config, actor, s[:obs_dim])
        unsquashed = mean + std * noise.policy
        score = jax.grad(log_prob)(actor, s[:obs_dim], unsquashed)
        s, reward, _ = svg.dynamics(config, s, jnp.tanh(unsquashed), noise.env)
        return (s, discount * config.gamma), (score, discount * reward)

    _, (scores, rewards) = jax.lax.scan(step, (start, 1.0), noise)
    return scores, jnp.cumsum(rewards[::-1])[::-1]


def relative_variances(env, horizon, num_rollouts):
    """For each estimator in `STYLES`: summed variance of a rollout's gradient over the squared norm of its mean."""
    config, actor, starts, noises = setting(env, horizon, num_rollouts)
    over_rollouts = (None, None, 0, 0)
    scores, to_go = jax.jit(jax.vmap(score_function_parts, in_axes=over_rollouts))(config, actor, starts, noises)
    others = (to_go.sum(axis=0) - to_go) / (num_rollouts - 1)  # including the rollout's own reward would add a bias
    weigh = lambda weights: jax.tree.map(lambda x: jnp.einsum("nt...,nt->n...", x, weights), scores)
    derivative = jax.vmap(jax.grad(svg.discounted_return), in_axes=over_rollouts)
    pathwise = jax.jit(derivative)(actor, config, starts, noises)
    flat = [
        np.concatenate([np.asarray(x, np.float64).reshape(num_rollouts, -1) for x in jax.tree.leaves(tree)], axis=1)
        for tree in (weigh(to_go), weigh(to_go - others), pathwise)
    ]
    mean = flat[-1].mean(axis=0)  # the least noisy estimate of the mean that all three share
    return [x.var(axis=0).sum() / np.square(mean).sum() for x in flat]


def measure(cell):
    """A row for each estimator; `cell` has environment, horizon and number of rollouts."""
    env, horizon, _ = cell
    setting = {"dimensions": lqr.ENVS[env], "horizon": horizon}
    found = zip(STYLES, relative_variances(*cell), strict=True)
    return [setting | {"estimator": name, "relative_variance": study.short(x)} for name, x in found]


def cells(envs, horizons, num_rollouts):
    """`{label: arguments of relative_variances}`."""
    return {f"{env}, {t} step{'s' * (t > 1)}": (env, t, num_rollouts) for env in envs for t in horizons}


def draw(rows):
    """A panel for each system: relative variance over the horizon."""
    sizes = sorted({row["dimensions"] for row in rows})
    page, panels = drawing.figure(10, 3.8, 1, len(sizes), sharey=True)
    for axes, dims in zip(panels[0], sizes, strict=True):
        for name, (color, marker) in STYLES.items():
            chosen = [row for row in rows if (row["dimensions"], row["estimator"]) == (dims, name)]
            values = [row["relative_variance"] for row in chosen]
            axes.loglog([row["horizon"] for row in chosen], values, color=color, marker=marker, label=name)
        axes.set(title=f"{dims:.0f} state dimension{'s' * (dims > 1)}", xlabel="horizon (steps)")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("variance of one rollout's gradient\n/ squared norm of its mean")
    panels[0][0].legend(fontsize="small")
    return page


def by_setting(rows):
    """`{(dimensions, horizon): {estimator: relative variance}}`."""
    settings = {}
    for row in rows:
        settings.setdefault((row["dimensions"], row["horizon"]), {})[row["estimator"]] = row["relative_variance"]
    return settings


def holds(rows):
    """For each setting: the pathwise gradient has the lowest variance."""
    return {
        f"{dims:.0f} dimension{'s' * (dims > 1)} and horizon {horizon:.0f}": min(found, key=found.get) == "pathwise"
        for (dims, horizon), found in by_setting(rows).items()
    }


def notes(rows):
    """How many rollouts the pathwise gradient saves."""
    gains = [found["score function with baseline"] / found["pathwise"] for found in by_setting(rows).values()]
    return (
        "The table shows the variance of one rollout's gradient relative to the squared norm of its mean. Compared "
        f"with the score function with baseline, the pathwise gradient needs {min(gains):,.1f} to {max(gains):,.1f} "
        "times fewer rollouts for the same error; in return, it needs differentiable dynamics."
    )


def table(rows):
    """Relative variances in every setting."""
    lines = [
        [f"{dims:.0f}", f"{horizon:.0f}", *(f"{found[name]:,.2f}" for name in STYLES)]
        for (dims, horizon), found in by_setting(rows).items()
    ]
    return study.table(["dimensions", "horizon", *STYLES], lines)


EXPERIMENTS = {
    "gradient_variance": Experiment(
        title="Pathwise gradients have less variance than score functions",
        question="How do the variances of pathwise and score-function policy gradients compare?",
        cells=cells(lqr.ENVS, HORIZONS, 20_000),
        measure=measure,
        criterion=Criterion(
            "for each dimension and horizon: the pathwise gradient has a lower variance than the score function with "
            "and without a baseline.",
            holds,
        ),
        notes=notes,
        table=table,
        draw=draw,
        quick=lambda _: cells(["LQR1-v0"], (2,), 100),
        sources=("algorithms/svg.py", "common/lqr.py"),
        sample="20,000 rollouts each",
    )
}

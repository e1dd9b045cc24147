"""How noisy are score-function and pathwise policy gradients? Over horizon and dimension, on linear-quadratic systems.

Each gradient is one rollout's, of the discounted return with respect to the same Gaussian policy a = K s + std e, by
three estimators: the score function with rewards to go; the same with a baseline for each time, the mean of the other
rollouts' rewards to go; and the derivative along the path. All have the same mean. What is drawn is the variance, a sum
over the parameters, in ratio to the squared length of the mean: the number of rollouts whose average is as long as its
own error.
"""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import study
from study import Experiment, verdict

from algorithms import svg
from common import lqr

HORIZONS = (1, 2, 5, 10, 20, 50, 100)
GAMMA, STD = 0.99, 0.3
STYLES = {  # told apart by the colour-blind
    "score function": ("#E69F00", "s"),
    "score function with baseline": ("#0072B2", "^"),
    "pathwise": ("#009E73", "o"),
}


def setting(env, horizon, num_rollouts):
    """`(config, params, first states, noise)`: half the best gain, as a policy on its way would have."""
    system = gymnax.make(env)[1]
    gain = -0.5 * lqr.solve(system, GAMMA).K / lqr.ACTION_BOUND
    weights = jnp.concatenate([jnp.asarray(gain.T), jnp.zeros_like(gain.T)], axis=1)
    bias = jnp.concatenate([jnp.zeros(len(gain)), jnp.full(len(gain), jnp.log(STD / lqr.ACTION_BOUND))])
    config = svg.Config(env=env, num_rollouts=num_rollouts, horizon=horizon, gamma=GAMMA, hidden_sizes=())
    return config, svg.Params([(weights, bias)], ()), *svg.draw(config, (), (), jax.random.key(0))


def score_function_parts(config, params, start, noise):
    """Of one rollout: scores at each time, a tree of `[horizon, ...]`, and discounted rewards to go `[horizon]`."""
    obs_dim = params.actor[0][0].shape[0]

    def log_prob(actor, obs, unsquashed):
        mean, std = svg.gaussian(actor, obs)
        return jax.scipy.stats.norm.logpdf(unsquashed, mean, std).sum()

    def step(carry, noise):
        s, discount = carry
        mean, std = svg.gaussian(params.actor, s[:obs_dim])
        unsquashed = mean + std * noise.policy
        score = jax.grad(log_prob)(params.actor, s[:obs_dim], unsquashed)
        s, reward, _ = svg.model_step(config, params.model, s, jnp.tanh(unsquashed), noise.model)
        return (s, discount * config.gamma), (score, discount * reward)

    _, (scores, rewards) = jax.lax.scan(step, (start, 1.0), noise)
    return scores, jnp.cumsum(rewards[::-1])[::-1]


def relative_variances(env, horizon, num_rollouts):
    """Of each estimator in `STYLES`: summed variance of a rollout's gradient over the squared length of its mean."""
    config, params, starts, noises = setting(env, horizon, num_rollouts)
    over_rollouts = (None, None, 0, 0)
    scores, to_go = jax.jit(jax.vmap(score_function_parts, in_axes=over_rollouts))(config, params, starts, noises)
    others = (to_go.sum(axis=0) - to_go) / (num_rollouts - 1)  # the rollout's own reward would bring a bias
    weigh = lambda weights: jax.tree.map(lambda x: jnp.einsum("nt...,nt->n...", x, weights), scores)
    derivative = jax.vmap(jax.grad(svg.discounted_return), in_axes=(None, None, None, 0, 0))
    pathwise = jax.jit(derivative)(params.actor, config, params.model, starts, noises)
    flat = [
        np.concatenate([np.asarray(x, np.float64).reshape(num_rollouts, -1) for x in jax.tree.leaves(tree)], axis=1)
        for tree in (weigh(to_go), weigh(to_go - others), pathwise)
    ]
    mean = flat[-1].mean(axis=0)  # the least noisy estimate of what all three have for a mean
    return [x.var(axis=0).sum() / np.square(mean).sum() for x in flat]


def measure(cell):
    """A row for each estimator; `cell` has environment, horizon and number of rollouts."""
    env, horizon, _ = cell
    place = {"dimensions": lqr.ENVS[env], "horizon": horizon}
    found = zip(STYLES, relative_variances(*cell), strict=True)
    return [place | {"estimator": name, "relative_variance": study.short(x)} for name, x in found]


def cells(envs, horizons, num_rollouts):
    """`{label: arguments of relative_variances}`."""
    return {f"{env}, {t} step{'s' * (t > 1)}": (env, t, num_rollouts) for env in envs for t in horizons}


def draw(rows):
    """A panel for each system: relative variance over the horizon."""
    sizes = sorted({row["dimensions"] for row in rows})
    page, panels = study.figure(10, 3.8, 1, len(sizes), sharey=True)
    for axes, dims in zip(panels[0], sizes, strict=True):
        for name, (color, marker) in STYLES.items():
            chosen = [row for row in rows if (row["dimensions"], row["estimator"]) == (dims, name)]
            values = [row["relative_variance"] for row in chosen]
            axes.loglog([row["horizon"] for row in chosen], values, color=color, marker=marker, label=name)
        axes.set(title=f"{dims:.0f} state dimension{'s' * (dims > 1)}", xlabel="horizon (steps)")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("variance of one rollout's gradient\n/ squared length of its mean")
    panels[0][0].legend(fontsize="small")
    return page


def report(rows):
    """Is the pathwise gradient the least noisy everywhere?"""
    systems = {}
    for row in rows:
        systems.setdefault((row["dimensions"], row["horizon"]), {})[row["estimator"]] = row["relative_variance"]
    held = [min(found, key=found.get) == "pathwise" for found in systems.values()]
    gains = [found["score function with baseline"] / found["pathwise"] for found in systems.values()]
    text = (
        f"{verdict(held)} The claim is that a reparameterised gradient is less noisy than a score function, with and "
        f"without a baseline: it is in {sum(held)} of {len(held)} settings. Against the score function with its "
        f"baseline the pathwise gradient needs from {min(gains):,.1f} to {max(gains):,.1f} times fewer rollouts for "
        "the same error; it asks for dynamics that can be differentiated."
    )
    lines = [
        [f"{dims:.0f}", f"{horizon:.0f}", *(f"{found[name]:,.2f}" for name in STYLES)]
        for (dims, horizon), found in systems.items()
    ]
    return "\n".join([text, "", study.table(["dimensions", "horizon", *STYLES], lines)])


EXPERIMENTS = {
    "gradient_variance": Experiment(
        title="Reparameterised gradients beat score functions: variance",
        cells=cells(lqr.ENVS, HORIZONS, 20_000),
        measure=measure,
        report=report,
        draw=draw,
        quick=lambda _: cells(["LQR1-v0"], (2,), 100),
        sources=("gradient_variance",),
        sample="20,000 rollouts of each",
    )
}

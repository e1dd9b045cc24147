"""How noisy are score-function and pathwise policy gradients? Over horizon and dimension, on linear-quadratic systems.

    python results/gradient_variance.py

Each gradient is one rollout's, of the discounted return with respect to the same Gaussian policy a = K s + std e, by
three estimators: the score function with rewards to go; the same with a baseline for each time, the mean of the other
rollouts' rewards to go; and the derivative along the path. All have the same mean. What is drawn is the variance, a sum
over the parameters, in ratio to the squared length of the mean: the number of rollouts whose average is as long as its
own error. Writes `gradient_variance.md` and `gradient_variance.png`.
"""

import argparse

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from benchmark import ROOT, machine
from matplotlib.figure import Figure

from algorithms import svg
from common import lqr, plot

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


def draw(table, num_rollouts):
    """The figure."""
    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(lqr.ENVS), sharey=True)
    for axes, (env, dims) in zip(panels, lqr.ENVS.items(), strict=True):
        for i, (name, (color, marker)) in enumerate(STYLES.items()):
            axes.loglog(HORIZONS, [table[env, t][i] for t in HORIZONS], color=color, marker=marker, label=name)
        axes.set_title(f"{dims} state dimension{'s' if dims > 1 else ''}")
        axes.set_xlabel("horizon (steps)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("variance of one rollout's gradient\n/ squared length of its mean")
    panels[0].legend(fontsize="small")
    figure.suptitle(f"Policy gradients on linear-quadratic systems, {num_rollouts:,} rollouts")
    plot.save(figure, ROOT / "results" / "gradient_variance.png")


def main():
    """Parse the command line; compute; write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rollouts", type=int, default=20_000)
    num_rollouts = parser.parse_args().num_rollouts
    table = {(env, t): relative_variances(env, t, num_rollouts) for env in lqr.ENVS for t in HORIZONS}
    lines = [
        "Variance of one rollout's policy gradient in ratio to the squared length of its mean, on linear-quadratic",
        f"systems, from {num_rollouts:,} rollouts.",
        f"`python results/gradient_variance.py --num-rollouts {num_rollouts}`",
        f"on {machine()}.",
        "",
        f"| dimensions | horizon | {' | '.join(STYLES)} |",
        "|---|---|---|---|---|",
    ]
    for (env, horizon), values in table.items():
        lines.append(f"| {lqr.ENVS[env]} | {horizon} | {' | '.join(f'{x:,.2f}' for x in values)} |")
    (ROOT / "results" / "gradient_variance.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(table, num_rollouts)


if __name__ == "__main__":
    main()

"""The bias of a critic's values: what it expects of the greedy policy minus what the policy earns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from experiments import training
from experiments.study import short


def greedy_value(module, num_critics, config, params, obs):
    """The critic's value of the greedy action, as the algorithm's targets use it: the minimum of `num_critics`."""
    action = module.greedy(config, params, obs)
    if hasattr(module, "twin_critics"):
        return module.twin_critics(config, params.critic, obs, action)[:num_critics].min(axis=0)
    return module.critic(config, params.critic, obs, action)


def value_bias(module, num_critics, config, params, key):
    """Value of an episode's first observation minus its discounted return, a mean over `num_eval_episodes` episodes.

    At a time limit the return is bootstrapped by the critic's value of the last observation.
    """
    env = module.make_env(config.env)

    def step(carry):
        env_state, obs, _, _, discounted, discount, key = carry
        key, key_step = random.split(key)
        action = module.greedy(config, params, obs)
        env_state, _, reward, next_obs, terminated, truncated = env.step(env_state, action, key_step)
        return env_state, next_obs, terminated, truncated, discounted + discount * reward, discount * config.gamma, key

    def episode(key):
        key, key_reset = random.split(key)
        env_state, first_obs = env.reset(key_reset)
        carry = env_state, first_obs, False, False, jnp.zeros(()), jnp.ones(()), key
        carry = lax.while_loop(lambda carry: ~(carry[2] | carry[3]), step, carry)
        _, last_obs, terminated, _, discounted, discount, _ = carry
        first, last = greedy_value(module, num_critics, config, params, jnp.stack([first_obs, last_obs]))
        return first - discounted - discount * jnp.where(terminated, 0, last)

    return jax.vmap(episode)(random.split(key, config.num_eval_episodes)).mean()


def measure(run):
    """A row for every seed and epoch of a run, like those of `training.learning_curves`, with the bias."""
    module, config = training.load(run)
    num_critics = 1 if run.change == "td3_one_critic" else 2
    bias = jax.jit(functools.partial(value_bias, module, num_critics, config))
    rows = []
    for snapshot in training.snapshots(module, config, run.seeds):
        if snapshot.metrics is None:  # nothing has been learned
            continue
        row = {"seed": snapshot.seed, "progress": snapshot.step}
        row["return"] = np.mean(snapshot.metrics.eval_returns, dtype=np.float64)
        row["value_bias"] = float(bias(snapshot.params, random.fold_in(random.key(snapshot.seed), snapshot.step)))
        rows.append({name: short(x) for name, x in row.items()} | {"finite": int(training.is_finite(snapshot.params))})
    return sorted(rows, key=lambda row: row["seed"])

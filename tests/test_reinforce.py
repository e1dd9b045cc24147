"""REINFORCE: advantages against a plain loop, gradients against NumPy and closed forms, and what it learns."""

import types

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from cases import (
    assert_close,
    fast_jit,
    finite_differences,
    np_mlp,
    random_layers,
    replace,
)
from jax import random

from amortax.algorithms import reinforce
from amortax.common import lqr

CONFIG = reinforce.Config(
    total_steps=128,
    steps_per_epoch=64,
    num_envs=4,
    num_steps=8,
    num_eval_episodes=2,
    critic_steps=2,
    batch_size=16,
    hidden_sizes=(8, 8),
)
BOX = replace(CONFIG, env="Pendulum-v1")


# Advantages


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_advantages_equal_a_double_loop(gae_lambda):
    """A sum over what follows a step in its episode, with the baseline after a time limit and nothing after an end."""
    config, rng = replace(CONFIG, gae_lambda=gae_lambda, gamma=0.9), np.random.default_rng(0)
    shape = (12, 5)
    reward, value, next_value = rng.normal(size=(3, *shape))
    terminated = rng.random(shape) < 0.15
    truncated = ~terminated & (rng.random(shape) < 0.15)
    assert terminated.any()
    assert truncated.any()
    ends = terminated, truncated | (terminated & (rng.random(shape) < 0.5))  # some at a time limit as well
    steps = types.SimpleNamespace(reward=jnp.asarray(reward), terminated=ends[0], truncated=ends[1])
    seen = np.where(terminated, np.nan, next_value)  # nothing after a termination may matter
    ours = reinforce.advantages(config, steps, jnp.asarray(value), jnp.asarray(seen))
    expected = np.zeros(shape)
    for env in range(shape[1]):
        for t in range(shape[0]):
            for k in range(t, shape[0]):
                after = 0 if terminated[k, env] else 0.9 * next_value[k, env]
                error = reward[k, env] + after - value[k, env]
                expected[t, env] += (0.9 * gae_lambda) ** (k - t) * error
                if terminated[k, env] or truncated[k, env]:
                    break
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_advantages_with_lambda_one_are_rewards_to_go():
    """Less the baseline at the step, and with the baseline beyond the last one, where values follow one another."""
    config, rng = replace(CONFIG, gae_lambda=1.0, gamma=0.9), np.random.default_rng(1)
    reward, values = rng.normal(size=(6, 1)), rng.normal(size=(7, 1))
    never = jnp.zeros((6, 1), bool)
    steps = types.SimpleNamespace(reward=jnp.asarray(reward), terminated=never, truncated=never)
    ours = reinforce.advantages(config, steps, jnp.asarray(values[:-1]), jnp.asarray(values[1:]))
    for t in range(6):
        to_go = sum(0.9 ** (k - t) * reward[k, 0] for k in range(t, 6)) + 0.9 ** (6 - t) * values[6, 0]
        np.testing.assert_allclose(ours[t, 0], to_go - values[t, 0], rtol=1e-4, atol=1e-6)


# Losses


def np_log_prob(config, actor, obs, action):
    x = np_mlp(actor.network, obs)
    if reinforce.make_env(config.env).discrete:
        return ((action + 1) / 2 * (x - scipy.special.logsumexp(x, axis=1, keepdims=True))).sum(axis=1)
    z = (action - x) / np.exp(actor.log_std)
    return (-0.5 * z**2 - actor.log_std - 0.5 * np.log(2 * np.pi)).sum(axis=1)


@pytest.mark.parametrize("config", [CONFIG, BOX], ids=["discrete", "box"])
def test_gradients_equal_finite_differences(config):
    rng = np.random.default_rng(2)
    actions = 2 if config is CONFIG else 1
    actor = reinforce.Actor(random_layers(rng, (3, 5), (5, actions)), np.full(actions, -0.7))
    critic = random_layers(rng, (3, 5), (5, 1))
    obs, advantage, target = rng.normal(size=(16, 3)), rng.normal(size=16), rng.normal(size=16)
    action = 2 * np.eye(2)[rng.integers(2, size=16)] - 1 if config is CONFIG else 1.5 * rng.normal(size=(16, 1))
    steps = types.SimpleNamespace(obs=jnp.asarray(obs), action=jnp.asarray(action))
    gradient = jax.jit(jax.grad(lambda actor: reinforce.actor_loss(actor, config, steps, advantage)[0]))(
        jax.tree.map(jnp.asarray, actor)
    )
    expected = finite_differences(lambda p: -(advantage * np_log_prob(config, p, obs, action)).mean(), actor)
    assert_close(gradient, jax.tree.map(jnp.asarray, expected), rtol=2e-3, atol=2e-5)
    gradient = jax.jit(jax.grad(reinforce.critic_loss))(jax.tree.map(jnp.asarray, critic), config, obs, target)
    expected = finite_differences(lambda p: np.mean((np_mlp(p, obs)[:, 0] - target) ** 2), critic)
    assert_close(gradient, jax.tree.map(jnp.asarray, expected), rtol=2e-3, atol=2e-5)


def test_entropy_is_that_of_the_policy():
    params = reinforce.Actor([(jnp.zeros((3, 2)), jnp.array([0.0, 1.0]))], jnp.log(jnp.array([0.5, 2.0])))
    obs = jnp.zeros((4, 3))
    steps = types.SimpleNamespace(obs=obs, action=jnp.ones((4, 2)) * jnp.array([1, -1]))
    p = 1 / (1 + np.e)
    expected = -p * np.log(p) - (1 - p) * np.log(1 - p)
    np.testing.assert_allclose(reinforce.actor_loss(params, CONFIG, steps, jnp.zeros(4))[1], expected, rtol=1e-5)
    box = reinforce.actor_loss(params, replace(BOX, env="Swimmer-misc"), steps, jnp.zeros(4))[1]
    np.testing.assert_allclose(box, np.log(2 * np.pi * np.e), rtol=1e-5)  # the deviations multiply to 1


def test_likelihood_ratio_gradient_is_that_of_the_expected_reward():
    """Reward -a^2 in a single step and a ~ N(m, sd^2): dJ/dm = -2 m and dJ/d(log sd) = -2 sd^2, for any baseline."""
    n, mean, std = 20_000, 0.3, 0.2
    config = replace(CONFIG, env="Bandit-test", num_envs=n, num_steps=1, hidden_sizes=())
    actor = reinforce.Actor([(jnp.zeros((1, 1)), jnp.array([mean]))], jnp.log(jnp.array([std])))
    params = reinforce.Params(actor, [(jnp.zeros((1, 1)), jnp.array([-0.1]))])
    env_state, obs = jax.vmap(reinforce.make_env("Bandit-test").reset)(random.split(random.key(1), n))
    keys = random.split(random.key(2), 1)
    *_, steps = reinforce.rollout(config, params, reinforce.explore, env_state, obs, keys)
    value, next_value = (reinforce.critic(CONFIG, params.critic, x) for x in (steps.obs, steps.next_obs))
    advantage = reinforce.advantages(config, steps, value, next_value)
    assert steps.terminated.all()
    one = lambda step, a: jax.grad(lambda p: -reinforce.actor_loss(p, config, step, a)[0])(actor)
    gradients = jax.vmap(one)(jax.tree.map(lambda x: x[0], steps), advantage[0])
    for values, expected in ((gradients.network[0][1], -2 * mean), (gradients.log_std, -2 * std**2)):
        assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(n)


# Acting


def test_continuous_actions_are_stored_before_they_are_clipped():
    config = replace(CONFIG, env="Table-test", num_envs=50, initial_std=3.0)
    state = jax.jit(lambda key: reinforce.init(config, key))(random.key(0))
    keys = random.split(random.key(1), 8)
    *_, steps = reinforce.rollout(config, state.params, reinforce.explore, state.env_state, state.obs, keys)
    assert np.abs(steps.action).max() > 3
    clipped = np.clip(steps.action, -1, 1)
    np.testing.assert_allclose(steps.reward, (1 + 2 * clipped[..., 0]) + (1.5 + clipped[..., 1]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(steps.truncated[4], np.ones(50))  # episodes of five steps
    assert steps.truncated.sum() == 50
    assert not steps.terminated.any()


@pytest.mark.quick
def test_discrete_actions_are_sampled_as_often_as_the_policy_says():
    actor = reinforce.Actor([(jnp.zeros((4, 2)), jnp.array([0.0, 1.0]))], jnp.zeros(2))
    params, obs = reinforce.Params(actor, [(jnp.zeros((4, 1)), jnp.zeros(1))]), jnp.zeros((10_000, 4))
    action = reinforce.explore(CONFIG, params, obs, random.key(0))
    np.testing.assert_array_equal(np.unique(action), [-1, 1])
    p = 1 / (1 + np.exp(-1))
    assert abs((action[:, 1] == 1).mean() - p) < 4 * np.sqrt(p * (1 - p) / 10_000)
    np.testing.assert_array_equal(reinforce.greedy(CONFIG, params, obs[:3]), [[-1, 1]] * 3)
    assert reinforce.act(CONFIG, params, obs[0]) == 1


def test_update_is_one_step_of_the_policy_then_some_of_the_baseline():
    """Equal to the losses' gradients applied one by one; the baseline of the advantages is the one before."""
    state = jax.jit(lambda key: reinforce.init(CONFIG, key))(random.key(0))
    keys = random.split(random.key(1), CONFIG.num_steps)
    *_, steps = reinforce.rollout(CONFIG, state.params, reinforce.explore, state.env_state, state.obs, keys)
    index = random.randint(random.key(2), (3, 16), 0, 32)
    params, opt_state, losses = jax.jit(lambda *x: reinforce.update(CONFIG, *x))(
        state.params, state.opt_state, steps, index
    )
    value, next_value = (reinforce.critic(CONFIG, state.params.critic, x) for x in (steps.obs, steps.next_obs))
    advantage = reinforce.advantages(CONFIG, steps, value, next_value)
    (loss, entropy), grads = jax.value_and_grad(reinforce.actor_loss, has_aux=True)(
        state.params.actor, CONFIG, steps, advantage
    )
    actor, _ = reinforce.apply_grads(CONFIG.actor_learning_rate, grads, state.params.actor, state.opt_state.actor)
    critic, adam, critic_losses = state.params.critic, state.opt_state.critic, []
    obs, target = steps.obs.reshape(32, -1), (advantage + value).ravel()
    for rows in index:
        critic_loss, grads = jax.value_and_grad(reinforce.critic_loss)(critic, CONFIG, obs[rows], target[rows])
        critic, adam = reinforce.apply_grads(CONFIG.critic_learning_rate, grads, critic, adam)
        critic_losses.append(critic_loss)
    assert_close(params, reinforce.Params(actor, critic), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses, [np.mean(critic_losses), value.mean(), loss, entropy], rtol=1e-4, atol=1e-6)
    assert (opt_state.actor[0].count, opt_state.critic[0].count) == (1, 3)


# Learning


def test_balances_the_pole():
    """With a reversed sign of the loss or the rewards, or values beyond the fall, it stays below 300."""
    config = reinforce.Config(total_steps=153_600)
    assert fast_jit(reinforce.train)(config, random.key(0))[1].eval_returns[-1].mean() >= 475


@pytest.mark.parametrize("env", ["LQR-v0"])
def test_comes_within_a_twentieth_of_the_best_linear_quadratic_cost(env):
    config = reinforce.Config(env=env, gamma=0.9, num_eval_episodes=1)
    state, _ = fast_jit(reinforce.train)(config, random.key(0))
    system = gymnax.make(env)[1]
    K = jnp.asarray(lqr.solve(system, 0.9).K)
    policies = (lambda s: reinforce.act(config, state.params, s)), (lambda s: -K @ s)
    ours, best = (lqr.simulate(system, policy, 0.9, random.key(1), 1024).mean() for policy in policies)
    assert 1 < ours / best < 1.05

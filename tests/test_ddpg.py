"""DDPG against hand-worked cases and the closed form of its noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CONFIGS,
    assert_close,
    assert_same,
    finite_differences,
    load_broken,
    np_adam,
    np_critic,
    np_mlp,
    random_adam,
    random_batch,
    random_layers,
    replace,
)
from jax import lax, random

from amortax.algorithms import ddpg

# The update against a case worked in NumPy, float64


def np_target(config, params, batch):
    next_q = np_critic(params.target_critic, batch.next_obs, np.tanh(np_mlp(params.target_actor, batch.next_obs)))
    return batch.reward + np.where(batch.terminated == 1, 0, config.gamma * next_q)


def np_critic_loss(layers, batch, target):
    return np.mean((np_critic(layers, batch.obs, batch.action) - target) ** 2)


def np_actor_loss(layers, critic, batch):
    return -np.mean(np_critic(critic, batch.obs, np.tanh(np_mlp(layers, batch.obs))))


def hand_case(tau=0.3):
    """Config, parameters, Adam's state and batch in float64; observations in R^3, actions in R^2."""
    rng = np.random.default_rng(0)
    config = ddpg.Config(learning_rate=0.01, gamma=0.9, tau=tau, target_period=3)
    actors = [random_layers(rng, (3, 5), (5, 4), (4, 2)) for _ in range(2)]
    critics = [random_layers(rng, (5, 5), (5, 4), (4, 1)) for _ in range(2)]
    params = ddpg.Params(actors[0], critics[0], actors[1], critics[1])
    opt_state = ddpg.OptState(random_adam(rng, config, params.actor), random_adam(rng, config, params.critic))
    return config, params, opt_state, random_batch(rng, ddpg.Transition)


def check_update(ddpg, tau=0.3, count=3):
    """One update of critic and actor and, for a `count` that 3 divides, of the targets: `Params`."""
    config, params, opt_state, batch = hand_case(tau)
    with jax.enable_x64(True):
        got, got_opt_state, losses = jax.jit(ddpg.update)(config, params, opt_state, batch, count)
    target = np_target(config, params, batch)
    gradient = finite_differences(lambda x: np_critic_loss(x, batch, target), params.critic)
    critic, critic_adam = np_adam(config, opt_state.critic[0], params.critic, gradient)
    gradient = finite_differences(lambda x: np_actor_loss(x, critic, batch), params.actor)
    actor, actor_adam = np_adam(config, opt_state.actor[0], params.actor, gradient)
    assert_close((got.actor, got.critic), (actor, critic), rtol=0, atol=1e-8)
    assert_close((got_opt_state.actor[0], got_opt_state.critic[0]), (actor_adam, critic_adam), rtol=0, atol=1e-6)
    np.testing.assert_allclose(losses[0], np_critic_loss(params.critic, batch, target), rtol=1e-9)
    np.testing.assert_allclose(losses[1], np_critic(params.critic, batch.obs, batch.action).mean(), rtol=1e-9)
    np.testing.assert_allclose(losses[2], np_actor_loss(params.actor, critic, batch), rtol=1e-6)
    moved = tau if count % 3 == 0 else 0
    for online, before, after in (
        (actor, params.target_actor, got.target_actor),
        (critic, params.target_critic, got.target_critic),
    ):
        assert_close(after, jax.tree.map(lambda x, y: moved * x + (1 - moved) * y, online, before), rtol=0, atol=1e-8)
    return got


@pytest.mark.quick
@pytest.mark.parametrize("count", [2, 3])
def test_update_equals_the_hand_worked_case(count):
    check_update(ddpg, count=count)


@pytest.mark.quick
def test_targets_are_hard_copies_by_default():
    assert ddpg.Config().tau == 1
    got = check_update(ddpg, tau=1.0)
    assert_same((got.target_actor, got.target_critic), (got.actor, got.critic))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("jnp.where(batch.terminated, 0, next_q)", "next_q"),
        ("return -critic(", "return critic("),
        ("next_action = actor(config, params.target_actor", "next_action = actor(config, params.actor"),
        ("critic(config, params.target_critic", "critic(config, params.critic"),
        ("old, config.tau)", "old, 1 - config.tau)"),
    ],
    ids=["no mask", "actor sign", "online actor", "online critic", "tau"],
)
def test_the_hand_worked_case_catches(tmp_path, old, new):
    broken = load_broken(ddpg, tmp_path, old, new)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_update(broken)


def test_updates_are_counted_over_an_epoch():
    """Four iterations of five updates: with a period of 20 the targets are copied after the last, and only there."""
    config = replace(CONFIGS["ddpg"], num_envs=5, target_period=20, env="ClockTerminated-test", num_eval_episodes=1)
    params = jax.jit(lambda key: ddpg.epoch(config, ddpg.init(config, key)))(random.key(0))[0].params
    assert_same((params.target_actor, params.target_critic), (params.actor, params.critic))


# Exploration


@pytest.mark.quick
@pytest.mark.parametrize(
    ("theta", "sigma", "mu", "dt"), [(0.15, 0.2, 0.0, 1.0), (0.15, 0.5, 0.0, 0.1), (2.0, 0.3, 0.4, 0.3)]
)
def test_noise_has_the_moments_of_the_discretized_process(theta, sigma, mu, dt):
    """n' = (1 - theta dt) n + theta dt mu + sigma sqrt(dt) N(0, 1) is an autoregressive process of order one."""
    config = ddpg.Config(ou_theta=theta, ou_sigma=sigma, ou_mu=mu, ou_dt=dt)
    keys = random.split(random.key(0), 20_000)

    def step(noise, key):
        noise = ddpg.ornstein_uhlenbeck(config, noise, key)
        return noise, noise

    # many processes that begin at their stationary distribution
    phi, variance = 1 - theta * dt, sigma**2 * dt / (1 - (1 - theta * dt) ** 2)
    start = mu + np.sqrt(variance) * random.normal(random.key(1), (100, 2))
    x = np.asarray(lax.scan(step, start, keys)[1], np.float64).reshape(len(keys), -1) - mu
    independent = x.size * (1 - phi) / (1 + phi)  # samples that would tell the mean as well as these correlated ones
    np.testing.assert_allclose(x.mean(), 0, atol=5 * np.sqrt(variance / independent))
    np.testing.assert_allclose(x.var(), variance, rtol=5 * np.sqrt(2 / independent))
    for lag in (1, 5, 20):
        correlation = np.mean(x[lag:] * x[:-lag]) / variance
        np.testing.assert_allclose(correlation, phi**lag, atol=5 * np.sqrt(2 / independent))
    # every environment and dimension has noise of its own: the mean of 200 processes has a 200th of the variance
    np.testing.assert_allclose(x.mean(axis=1).var(), variance / 200, rtol=5 * np.sqrt(2 * 200 / independent))


@pytest.mark.quick
def test_noise_starts_anew_with_its_episode():
    config = replace(CONFIGS["ddpg"], env="ClockTerminated-test", ou_mu=0.25, num_steps=2)
    state = jax.jit(ddpg.init)(config, random.key(0))
    np.testing.assert_array_equal(state.noise, np.full((4, 1), 0.25))
    # in two steps of each environment the second and the fourth end: one at the second, one at the first
    env_state = state.env_state.replace(time=jnp.array([0, 8, 5, 9]))

    def policy(config, params, obs, noise, key):
        return noise, noise + 1  # the action tells the noise that the policy was given

    keys = random.split(random.key(1), 2)
    *_, noise, transitions = ddpg.rollout(config, None, policy, env_state, state.obs, state.noise, keys)
    np.testing.assert_allclose(transitions.action[..., 0], [[0.25] * 4, [1.25, 1.25, 1.25, 0.25]])
    np.testing.assert_allclose(noise[:, 0], [2.25, 0.25, 2.25, 1.25])


@pytest.mark.quick
def test_exploration_adds_the_noise_to_the_actor_within_the_box():
    """The stored actions are the actor's plus a noise that drifts from one step to the next."""
    config = replace(CONFIGS["ddpg"], num_steps=4, buffer_size=80, ou_sigma=3.0)
    before = jax.jit(ddpg.init)(config, random.key(0))
    after = jax.jit(lambda state: ddpg.collect(config, state, ddpg.explore))(before)
    obs, action = after.buffer[64:80, :3], after.buffer[64:80, 3]
    noise = action - ddpg.greedy(config, before.params, obs)[:, 0]
    inside = np.abs(action) < 1
    assert 0 < inside.mean() < 1
    assert np.abs(action).max() <= 1
    last = inside.reshape(4, 4)[-1]
    np.testing.assert_allclose(noise.reshape(4, 4)[-1][last], np.ravel(after.noise)[last], atol=1e-5)

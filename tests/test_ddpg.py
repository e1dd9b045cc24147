"""DDPG against hand-worked cases, the closed form of its noise, and Pendulum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    SMALL,
    assert_close,
    assert_same,
    finite_differences,
    load_broken,
    np_adam,
    np_critic,
    np_mlp,
    nth,
    random_adam,
    random_batches,
    random_layers,
    replace,
)
from jax import lax, random

from algorithms import ddpg

# The update against a case worked in NumPy, float64


def np_critic_loss(layers, config, params, batch):
    next_q = np_critic(params.target_critic, batch.next_obs, np.tanh(np_mlp(params.target_actor, batch.next_obs)))
    target = batch.reward + np.where(batch.terminated == 1, 0, config.gamma * next_q)
    return np.mean((np_critic(layers, batch.obs, batch.action) - target) ** 2)


def np_actor_loss(layers, params, batch):
    return -np.mean(np_critic(params.critic, batch.obs, np.tanh(np_mlp(layers, batch.obs))))


def np_learn(config, params, adams, batch):
    """Critic, then actor: `(params, (actor's Adam, critic's Adam), (critic's loss, actor's loss))`."""
    actor_adam, critic_adam = adams
    critic_loss = np_critic_loss(params.critic, config, params, batch)
    gradient = finite_differences(lambda x: np_critic_loss(x, config, params, batch), params.critic)
    critic, critic_adam = np_adam(config, critic_adam, params.critic, gradient)
    params = params._replace(critic=critic)
    actor_loss = np_actor_loss(params.actor, params, batch)
    gradient = finite_differences(lambda x: np_actor_loss(x, params, batch), params.actor)
    actor, actor_adam = np_adam(config, actor_adam, params.actor, gradient)
    return params._replace(actor=actor), (actor_adam, critic_adam), (critic_loss, actor_loss)


def hand_case(num_batches, tau):
    """Config, parameters, Adam's state and batches in float64; observations in R^3, actions in R^2."""
    rng = np.random.default_rng(0)
    config = ddpg.Config(learning_rate=0.01, gamma=0.9, tau=tau, target_period=num_batches)
    actors = [random_layers(rng, (3, 5), (5, 4), (4, 2)) for _ in range(2)]
    critics = [random_layers(rng, (5, 5), (5, 4), (4, 1)) for _ in range(2)]
    params = ddpg.Params(actors[0], critics[0], actors[1], critics[1])
    opt_state = ddpg.OptState(random_adam(rng, config, params.actor), random_adam(rng, config, params.critic))
    return config, params, opt_state, random_batches(rng, ddpg.Transition, num_batches)


def test_losses_and_gradients_equal_the_hand_worked_case():
    config, params, _, batches = hand_case(1, 0.3)
    batch = nth(batches, 0)
    with jax.enable_x64(True):
        critic = jax.value_and_grad(ddpg.critic_loss)(params.critic, config, params, batch)
        actor = jax.value_and_grad(ddpg.actor_loss)(params.actor, params, batch)
    for (loss, gradient), expected, layers in (
        (critic, lambda x: np_critic_loss(x, config, params, batch), params.critic),
        (actor, lambda x: np_actor_loss(x, params, batch), params.actor),
    ):
        np.testing.assert_allclose(loss, expected(layers), rtol=1e-12)
        assert_close(gradient, finite_differences(expected, layers), rtol=1e-6, atol=1e-7)


def check_learn(ddpg, tau=0.3):
    """Three updates of critic and actor on three batches, then one of the targets."""
    config, params, opt_state, batches = hand_case(3, tau)
    with jax.enable_x64(True):
        got, got_opt_state, losses = ddpg.learn(config, params, opt_state, batches)
    adams = opt_state.actor[0], opt_state.critic[0]
    for i in range(3):
        params, adams, expected = np_learn(config, params, adams, nth(batches, i))
        np.testing.assert_allclose([x[i] for x in losses], expected, rtol=1e-6)
    assert_close((got.actor, got.critic), (params.actor, params.critic), rtol=0, atol=1e-8)
    assert_close((got_opt_state.actor[0], got_opt_state.critic[0]), adams, rtol=0, atol=1e-6)
    for online, before, after in (
        (params.actor, params.target_actor, got.target_actor),
        (params.critic, params.target_critic, got.target_critic),
    ):
        assert_close(after, jax.tree.map(lambda x, y: tau * x + (1 - tau) * y, online, before), rtol=0, atol=1e-8)
    return got


def test_learn_equals_the_hand_worked_case():
    check_learn(ddpg)


def test_targets_are_whole_copies_by_default():
    assert ddpg.Config().tau == 1
    got = check_learn(ddpg, tau=1.0)
    assert_same((got.target_actor, got.target_critic), (got.actor, got.critic))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(1 - batch.terminated) * ", ""),
        ("return -critic(", "return critic("),
        ("next_action = actor(params.target_actor", "next_action = actor(params.actor"),
        ("critic(params.target_critic", "critic(params.critic"),
        ("params.target_critic, config.tau", "params.target_critic, 1 - config.tau"),
    ],
    ids=["no mask", "actor sign", "online actor", "online critic", "tau"],
)
def test_the_hand_worked_case_catches(tmp_path, old, new):
    broken = load_broken(ddpg, tmp_path, old, new)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_learn(broken)


# Exploration


@pytest.mark.parametrize(
    ("theta", "sigma", "mu", "dt"), [(0.15, 0.2, 0.0, 1.0), (0.15, 0.5, 0.0, 0.1), (2.0, 0.3, 0.4, 0.3)]
)
def test_noise_has_the_moments_of_the_discretised_process(theta, sigma, mu, dt):
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
    independent = x.size * (1 - phi) / (1 + phi)  # draws that would tell the mean as well as these correlated ones
    np.testing.assert_allclose(x.mean(), 0, atol=5 * np.sqrt(variance / independent))
    np.testing.assert_allclose(x.var(), variance, rtol=5 * np.sqrt(2 / independent))
    for lag in (1, 5, 20):
        correlation = np.mean(x[lag:] * x[:-lag]) / variance
        np.testing.assert_allclose(correlation, phi**lag, atol=5 * np.sqrt(2 / independent))
    # every environment and dimension has noise of its own: the mean of 200 processes has a 200th of the variance
    np.testing.assert_allclose(x.mean(axis=1).var(), variance / 200, rtol=5 * np.sqrt(2 * 200 / independent))


def test_noise_starts_anew_with_its_episode():
    config = ddpg.Config(**SMALL, target_period=8, env="ClockTerminated-test", ou_mu=0.25)
    state = jax.eval_shape(ddpg.init, config, random.key(0))
    assert state.noise.shape == (4, 1)
    state = ddpg.init(config, random.key(0))
    np.testing.assert_array_equal(state.noise, 0.25)
    # in two steps of each environment the second and the fourth come to their ends: one at the first, one at the last
    state = state._replace(env_state=state.env_state.replace(time=jnp.array([0, 8, 5, 9])))
    seen = []

    def policy(obs, noise, key):
        jax.debug.callback(lambda noise: seen.append(np.ravel(noise)), noise, ordered=True)
        return jnp.zeros((4, 1)), noise + 1

    state = ddpg.collect(config, state, policy)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [[0.25] * 4, [1.25, 1.25, 1.25, 0.25]])
    np.testing.assert_allclose(state.noise[:, 0], [2.25, 0.25, 2.25, 1.25])


def test_exploration_adds_the_noise_to_the_actor_within_the_box():
    """The stored actions of an iteration are the actor's, moved by a noise that drifts from one step to the next."""
    config = replace(ddpg.Config(**SMALL), target_period=16, buffer_size=80, ou_sigma=3.0)
    before = jax.jit(ddpg.init)(config, random.key(0))
    after, _ = jax.jit(ddpg.iteration)(config, before)
    obs, action = after.buffer.rows[64:80, :3], after.buffer.rows[64:80, 3]
    noise = action - ddpg.actor(before.params.actor, obs)[:, 0]
    inside = np.abs(action) < 1
    assert 0 < inside.mean() < 1
    assert np.abs(action).max() <= 1
    last = noise.reshape(4, 4)[-1]
    held = inside.reshape(4, 4)[-1]
    np.testing.assert_allclose(last[held], np.ravel(after.noise)[held], atol=1e-5)

"""SVG with a learned model: the model's likelihood and noise, gradients through it, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import fast_jit, replace
from jax import random
from jax.flatten_util import ravel_pytree
from test_svg import flat, float64  # noqa: F401

from amortax.algorithms import svg_model

CONFIG = svg_model.Config(
    num_iterations=4,
    iterations_per_epoch=2,
    num_rollouts=4,
    horizon=5,
    num_eval_episodes=2,
    hidden_sizes=(8, 8),
    learning_starts=64,
    num_envs=4,
    buffer_size=72,
    batch_size=16,
    model_steps=2,
    noise="inferred",
)


# The model


def stored(config, state):
    """All transitions of the buffer."""
    _, unravel = ravel_pytree(svg_model.example(config))
    return jax.vmap(unravel)(state.buffer)


def initialized(config, seed=0):
    return jax.jit(lambda key: svg_model.init(config, key))(random.key(seed))


def trained_model(config, updates):
    """`(losses [updates], state)` of a model fitted to the warm-up alone."""
    state = initialized(config)

    def step(carry, rows):
        *carry, loss = svg_model.update_model(config, *carry, svg_model.read(config, state.buffer, rows))
        return tuple(carry), loss

    rows = svg_model.sample_rows(config, state.buffer, state.step, random.key(1), updates)
    carry = state.params.model, state.opt_state.model
    (model, _), losses = jax.jit(lambda: jax.lax.scan(step, carry, rows))()
    return np.asarray(losses), state._replace(params=state.params._replace(model=model))


def test_the_models_likelihood_rises_and_it_beats_a_linear_fit():
    config = replace(CONFIG, learning_starts=4000, num_envs=20, buffer_size=4000, batch_size=256, hidden_sizes=(64, 64))
    losses, state = trained_model(config, 3000)
    assert losses[-100:].mean() < losses[100:200].mean() - 2 < losses[0] - 2
    (obs, action, reward, next_obs, _), held_out = stored(config, state), stored(config, initialized(config, 7))
    x, y = (np.concatenate(z, axis=1) for z in ((obs, action, np.ones((4000, 1))), (next_obs, reward[:, None])))
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    target = np.concatenate([held_out.next_obs, held_out.reward[:, None]], axis=1)
    linear = np.concatenate([held_out.obs, held_out.action, np.ones((4000, 1))], axis=1) @ weights
    mean, _ = svg_model.predict(config, state.params.model, held_out.obs, held_out.action)
    scale = state.params.model.target_std
    ours, theirs = (np.square((target - p) / scale).mean() for p in (mean, linear))
    assert ours < theirs / 100


def test_the_model_finds_the_noise_of_a_linear_system():
    """A standard deviation of 0.1 of each coordinate; noise inferred from it is standard normal."""
    config = replace(CONFIG, env="LQR-v0", learning_starts=20_000, num_envs=20, buffer_size=20_000, batch_size=256)
    config = replace(config, hidden_sizes=(32,))
    _, state = trained_model(config, 3000)
    steps = stored(config, state)
    _, std = svg_model.predict(config, state.params.model, steps.obs, steps.action)
    np.testing.assert_allclose(std[:, :2].mean(axis=0), 0.1, rtol=0.1)
    noise = svg_model.infer_noise(config, state.params.model, steps)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.1)
    np.testing.assert_allclose(noise.std(axis=0), 1, rtol=0.1)


def test_model_loss_is_the_gaussian_likelihood():
    params = fitted(CONFIG).params
    config = replace(CONFIG, learning_starts=72)
    batch = stored(config, initialized(config, 3))
    mean, std = svg_model.predict(CONFIG, params.model, batch.obs, batch.action)
    target = np.concatenate([batch.next_obs, batch.reward[:, None]], axis=1)
    density = -0.5 * ((target - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    constant = np.log(params.model.target_std).sum() + 0.5 * 4 * np.log(2 * np.pi)
    loss = svg_model.model_loss(params.model.network, CONFIG, params.model, batch)
    np.testing.assert_allclose(loss, -density.sum(axis=1).mean() - constant, rtol=1e-4, atol=1e-4)


def test_inferred_noise_repeats_what_was_seen():
    state = initialized(CONFIG)
    steps = jax.tree.map(lambda x: x[:64], stored(CONFIG, state))
    noise = svg_model.infer_noise(CONFIG, state.params.model, steps)
    model = jax.vmap(svg_model.dynamics, in_axes=(None, None, 0, 0, 0))
    next_obs, _ = model(CONFIG, state.params.model, steps.obs, steps.action, noise)
    np.testing.assert_allclose(next_obs, steps.next_obs, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("added", [10, 18, 25])
def test_sequences_are_consecutive_steps_of_one_environment(added):
    """Also where the buffer has wrapped around; every sequence in it occurs."""
    config = replace(CONFIG, num_rollouts=500, env="ClockTruncated-test")
    buffer = jnp.zeros((72, 5))
    for t in range(added):
        columns = jnp.full((4, 1), float(t)), jnp.arange(4.0)[:, None], jnp.zeros(4), jnp.zeros((4, 1)), jnp.zeros(4)
        buffer = svg_model.store(buffer, 4 * t, svg_model.Transition(*(x[None] for x in columns)))
    steps = svg_model.sample_sequences(config, buffer, 4 * added, 5, random.key(0))
    time, env = np.asarray(steps.obs[..., 0]), np.asarray(steps.action[..., 0])
    np.testing.assert_array_equal(time - time[:, :1], np.broadcast_to(np.arange(5), (500, 5)))
    np.testing.assert_array_equal(env, np.broadcast_to(env[:, :1], (500, 5)))
    oldest = max(0, added - 18)
    assert {(t, e) for t, e in zip(time[:, 0], env[:, 0], strict=True)} == {
        (float(t), float(e)) for t in range(oldest, added - 4) for e in range(4)
    }


# The gradient


def fitted(config):
    """A state after some training of the model."""
    return jax.jit(lambda key: svg_model.fit_model(config, svg_model.init(config, key))[0])(random.key(0))


@pytest.mark.parametrize("noise", ["sampled", "inferred"])
def test_gradient_equals_finite_differences_through_the_whole_rollout(float64, noise):  # noqa: F811
    config = replace(CONFIG, noise=noise, horizon=12)
    state = fitted(config)
    starts, noises = svg_model.sample_rollouts(config, state.params.model, state.buffer, state.step, random.key(1))
    arguments = config, state.params.model, starts, noises
    w, unravel = ravel_pytree(state.params.actor)
    _, expected = jax.jit(svg_model.policy_gradient)(state.params.actor, *arguments)

    @jax.jit
    def objective(w):
        returns = jax.vmap(svg_model.discounted_return, in_axes=(None, None, None, 0, 0))
        return returns(unravel(w), *arguments).mean()

    for direction in np.random.default_rng(0).normal(size=(5, len(w))):
        eps = 1e-6
        difference = (objective(w + eps * direction) - objective(w - eps * direction)) / (2 * eps)
        np.testing.assert_allclose(flat(expected) @ direction, difference, rtol=1e-4)


@pytest.mark.quick
def test_a_horizon_beyond_the_warm_up_is_named():
    with pytest.raises(ValueError, match=r"^horizon=17: must be at most 16"):
        svg_model.init(replace(CONFIG, horizon=17), random.key(0))


@pytest.mark.quick
def test_steps_beyond_the_counter_are_named():
    """Four an iteration, and 64 of the warm-up."""
    config = replace(CONFIG, num_iterations=2**29 - 16)
    with pytest.raises(ValueError, match=f"^num_iterations={2**29 - 16}: must be less: {2**31} are too many to count"):
        svg_model.init(config, random.key(0))


# Learning


def test_swings_the_pendulum_up():
    sizes = {"num_rollouts": 32, "num_iterations": 300, "iterations_per_epoch": 300, "num_eval_episodes": 32}
    config = svg_model.Config(**sizes, gamma=0.97, learning_starts=3000)
    _, metrics = fast_jit(svg_model.train)(config, random.key(0))
    assert metrics.eval_returns.mean() > -300

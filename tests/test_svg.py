"""SVG: its gradients against each other, finite differences and closed forms; what it learns."""

import functools
import warnings

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Clock, assert_same, fast_jit, replace, slow
from jax import random
from jax.flatten_util import ravel_pytree

from amortax.algorithms import svg
from amortax.common import envs, lqr

CONFIG = svg.Config(
    num_iterations=4, iterations_per_epoch=2, num_rollouts=4, horizon=5, num_eval_episodes=2, hidden_sizes=(8, 8)
)


class Differentiable(Clock):
    """Clock with transition gradients."""

    _supports_transition_gradients = True


gymnax.register("ClockDifferentiable-test", functools.partial(Differentiable, 6, True))
gymnax.register("ClockLimited-test", functools.partial(Differentiable, 6, False))


@pytest.fixture
def float64():
    """Double precision; what was traced and cached in the other precision is forgotten."""
    for enabled in (True, False):
        jax.config.update("jax_enable_x64", enabled)
        jax.clear_caches()
        svg.make_env.cache_clear()
        svg.reward_gradient.cache_clear()
        if enabled:
            yield


def setting(config, seed=0):
    """`(the policy's parameters, first states, noise)` of one update."""

    @jax.jit
    def start(key):
        return svg.init(config, key).params.actor, *svg.sample_rollouts(config, random.key(seed + 1))

    return start(random.key(seed))


def gradient(config, actor_params, *rollouts):
    return jax.jit(svg.policy_gradient)(actor_params, config, *rollouts)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def relative(a, b):
    """Distance in ratio to b; zero where both are."""
    return np.linalg.norm(flat(a) - flat(b)) / max(np.linalg.norm(flat(b)), 1e-30)


# The gradient


def check_gradients_agree(config, tolerance):
    arguments = setting(config)
    value, expected = gradient(config, *arguments)
    for kind in ("manual", "remat"):
        other_value, other = gradient(replace(config, gradient=kind), *arguments)
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        assert relative(other, expected) <= tolerance, kind
    return np.linalg.norm(flat(expected))


@pytest.mark.parametrize(("env", "horizon"), [("LQR-v0", 10), ("Pendulum-v1", 200)])
def test_forward_and_backward_gradients_agree(env, horizon):
    check_gradients_agree(replace(CONFIG, env=env, horizon=horizon), 1e-5)


@pytest.mark.parametrize(
    ("env", "horizon"), [("LQR-v0", 200), ("Pendulum-v1", 200), pytest.param("Pendulum-v1", 50, marks=pytest.mark.slow)]
)
def test_forward_and_backward_gradients_agree_in_float64(float64, env, horizon):
    check_gradients_agree(replace(CONFIG, env=env, horizon=horizon), 1e-10)


@pytest.mark.parametrize("env", ["PointRobot-misc", "Reacher-misc", *slow("MountainCarContinuous-v0", "Swimmer-misc")])
def test_forward_and_backward_gradients_agree_on(env):
    norm = check_gradients_agree(replace(CONFIG, env=env, initial_std=1.0), 1e-5)
    assert (norm > 0) == (env != "PointRobot-misc")  # whose reward is a step, flat on either side


@pytest.mark.parametrize("env", ["Pendulum-v1", "LQR-v0"])
def test_gradient_equals_finite_differences_through_the_whole_rollout(float64, env):
    config = replace(CONFIG, env=env, horizon=12)
    actor_params, starts, noises = setting(config)
    w, unravel = ravel_pytree(actor_params)
    _, expected = gradient(config, actor_params, starts, noises)

    @jax.jit
    def objective(w):
        returns = jax.vmap(svg.discounted_return, in_axes=(None, None, 0, 0))
        return returns(unravel(w), config, starts, noises).mean()

    for direction in np.random.default_rng(0).normal(size=(5, len(w))):
        eps = 1e-6
        difference = (objective(w + eps * direction) - objective(w - eps * direction)) / (2 * eps)
        np.testing.assert_allclose(flat(expected) @ direction, difference, rtol=1e-4)


def expected_return(system, gain, std, gamma, horizon):
    """Discounted return of a = gain s + std e on a linear-quadratic system, by the covariance of s; float64."""
    A, B, Q, R, noise = (np.asarray(x, np.float64) for x in (system.A, system.B, system.Q, system.R, system.noise))
    covariance, total = np.eye(len(A)) / 3, 0.0  # uniform on [-1, 1]^n
    for t in range(horizon):
        action = gain @ covariance @ gain.T + std**2 * np.eye(len(R))
        total -= gamma**t * (np.trace(Q @ covariance) + np.trace(R @ action))
        closed = A + B @ gain
        covariance = closed @ covariance @ closed.T + std**2 * B @ B.T + noise @ noise.T
    return total


@pytest.mark.parametrize("kind", ["autodiff", "manual"])
def test_gradient_equals_the_analytic_one_of_linear_quadratic_regulation(kind):
    """Within four standard errors. Actions are small, so that the tanh around them is straight to 1e-4 of them."""
    n, horizon, gamma, std, bound = 4096, 20, 0.9, 0.01, lqr.ACTION_BOUND
    config = svg.Config(env="LQR-v0", gradient=kind, num_rollouts=n, horizon=horizon, gamma=gamma, hidden_sizes=())
    gain = np.array([[-0.01, 0.005]])
    weights = np.concatenate([gain.T, np.zeros((2, 1))], axis=1)
    actor_params = [(jnp.asarray(weights, jnp.float32), jnp.array([0.0, np.log(std)]))]
    starts, noises = svg.sample_rollouts(config, random.key(0))

    def one(start, noise):  # of a rollout alone, for the standard errors
        return svg.policy_gradient(actor_params, config, start[None], jax.tree.map(lambda x: x[None], noise))

    values, gradients = jax.jit(jax.vmap(one))(starts, noises)
    system = gymnax.make("LQR-v0")[1]
    objective = lambda w, log_std: expected_return(system, bound * w, bound * np.exp(log_std), gamma, horizon)
    eps = 1e-5
    (w, b), expected = gradients[0], []
    for i in range(2):
        shift = eps * np.eye(2)[i : i + 1]
        difference = objective(gain + shift, np.log(std)) - objective(gain - shift, np.log(std))
        expected.append((w[:, i, 0], difference / (2 * eps)))
    difference = objective(gain, np.log(std) + eps) - objective(gain, np.log(std) - eps)
    expected.append((b[:, 1], difference / (2 * eps)))
    expected.append((values, objective(gain, np.log(std))))
    for samples, truth in expected:
        samples = np.asarray(samples, np.float64)
        assert abs(samples.mean() - truth) < 4 * samples.std() / np.sqrt(n)
    assert abs(np.mean(w[:, 0, 0])) > 10 * np.std(w[:, 0, 0]) / np.sqrt(n)  # zero would not have passed


@pytest.mark.parametrize("kind", ["autodiff", "manual"])
@pytest.mark.parametrize(("env", "steps"), [("ClockDifferentiable-test", 6), ("ClockLimited-test", 10)])
def test_rewards_count_until_the_end_and_beyond_a_time_limit(kind, env, steps):
    config = replace(CONFIG, env=env, gradient=kind, horizon=10, gamma=0.9)
    np.testing.assert_allclose(gradient(config, *setting(config))[0], (1 - 0.9**steps) / (1 - 0.9), rtol=1e-5)


def test_the_dynamics_are_the_environments_step():
    for env_id in (*envs.CONTINUOUS_ENVS, "LQR-v0"):
        config = replace(CONFIG, env=env_id)
        env, env_params = gymnax.make(env_id)
        obs, env_state = env.reset(random.key(0), env_params)
        state, _ = svg.first_state(config, random.key(0))
        np.testing.assert_array_equal(state[: obs.size], obs.ravel())
        action = jnp.full(svg.make_env(env_id).action_dim, 0.3)
        for i in range(3):
            key = random.key(i)
            env_action = svg.make_env(env_id).rescale(action)
            # step_env takes the first of the two keys that step makes of its own
            state, ours, _ = svg.dynamics(config, state, action, random.split(key)[0])
            obs, env_state, reward, *_ = env.step(key, env_state, env_action, env_params)
            np.testing.assert_allclose(state[: obs.size], obs.ravel(), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(ours, reward, rtol=1e-5, atol=1e-6)


# Exploding gradients


def test_long_gradients_are_clipped_and_counted():
    state, (starts, noises) = jax.jit(svg.init)(CONFIG, random.key(0)), svg.sample_rollouts(CONFIG, random.key(1))
    _, grads = gradient(CONFIG, state.params.actor, starts, noises)
    norm = np.linalg.norm(flat(grads))
    for longest, clipped in ((norm / 3, 1), (norm * 3, 0)):
        config = replace(CONFIG, max_grad_norm=longest)
        _, after, (_, found, was_clipped) = jax.jit(svg.update)(config, state.params, state.opt_state, starts, noises)
        np.testing.assert_allclose(found, norm, rtol=1e-5)
        assert was_clipped == clipped
        # Adam's first moment is a tenth of the first gradient that it sees, which descends
        np.testing.assert_allclose(
            10 * flat(after.actor[0].mu), -flat(grads) * min(1, longest / norm), rtol=1e-4, atol=1e-6
        )


def test_gradients_that_are_not_finite_are_left_out_and_counted():
    state, (starts, noises) = jax.jit(svg.init)(CONFIG, random.key(0)), svg.sample_rollouts(CONFIG, random.key(1))
    starts = starts.at[0, 2].set(jnp.inf)
    after, opt_after, (_, norm, clipped) = jax.jit(svg.update)(CONFIG, state.params, state.opt_state, starts, noises)
    assert not np.isfinite(norm)
    assert clipped
    assert_same(after, state.params)
    np.testing.assert_array_equal(flat(opt_after.actor[0].mu), 0)


# Mistakes


def test_an_environment_without_transition_gradients_is_named():
    with pytest.raises(ValueError, match=r"^env=Table-test: must have transition gradients"):
        svg.init(replace(CONFIG, env="Table-test"), random.key(0))


@pytest.mark.quick
def test_steps_beyond_the_counter_are_named():
    config = replace(CONFIG, num_iterations=2**24, num_rollouts=128, horizon=1)
    with pytest.raises(ValueError, match=f"^num_iterations={2**24}: must be less: {2**31} are too many to count"):
        svg.init(config, random.key(0))


def test_a_reward_without_a_gradient_is_told_at_the_start():
    """A reward that is a step function of the state, whatever actions cost; a message at each init, and no other."""
    for env in (*envs.CONTINUOUS_ENVS, "LQR-v0"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            jax.eval_shape(lambda key, env=env: svg.init(replace(CONFIG, env=env), key), random.key(0))
        told = [str(warning.message) for warning in caught if warning.category is UserWarning]
        flat = env in ("MountainCarContinuous-v0", "PointRobot-misc")
        assert told == [f"the reward of {env} has no gradient by the state for svg to follow"] * flat


# Learning


def test_swings_the_pendulum_up():
    """Median of three seeds: with the gradient reversed, or none through the dynamics, each stays below -1,100."""
    sizes = {"num_rollouts": 32, "num_iterations": 300, "iterations_per_epoch": 300, "num_eval_episodes": 32}
    config = svg.Config(**sizes)
    returns = fast_jit(lambda keys: jax.lax.map(lambda key: svg.train(config, key)[1].eval_returns.mean(), keys))
    assert np.median(returns(jax.vmap(random.key)(np.arange(3)))) > -200

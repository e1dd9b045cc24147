"""The linear-quadratic environment against SciPy, simulation and quadrature."""

import functools

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax import lax, random

from amortax.common import lqr

GAMMA, ALPHA = 0.9, 0.3
DIMS = (1, 2, 4)
START = np.array([1.0, -1.0, 1.0, -1.0])


@functools.cache
def simulator(dims):
    """Compiled once for all policies `a = -K s + root N(0, 1)`: discounted returns `[4096]` from s = (1, -1, ...).

    Each step earns `bonus` besides; actions are not clipped to the box.
    """
    params, start = lqr.system(dims), jnp.asarray(START[:dims])

    def episode(K, root, bonus, key):
        def step(carry, key):
            s, total, discount = carry
            key_policy, key_noise = random.split(key)
            a = -K @ s + root @ random.normal(key_policy, root.shape[:1])
            total += discount * (bonus - s @ params.Q @ s - a @ params.R @ a)
            s = params.A @ s + params.B @ a + params.noise @ random.normal(key_noise, s.shape)
            return (s, total, discount * GAMMA), None

        return lax.scan(step, (start, 0.0, 1.0), random.split(key, 150))[0][1]

    keys = random.split(random.key(0), 4096)
    return jax.jit(lambda K, root, bonus: jax.vmap(episode, in_axes=(None, None, None, 0))(K, root, bonus, keys))


def simulate(dims, K, root=None, bonus=0.0):
    root = np.zeros((len(K), len(K))) if root is None else root
    return np.asarray(simulator(dims)(*(jnp.asarray(x, jnp.float32) for x in (K, root, bonus))))


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("gamma", [0.9, 0.99])
def test_riccati_equals_scipy(dims, gamma):
    params = lqr.system(dims)
    solution = lqr.solve(params, gamma)
    root = np.sqrt(gamma)
    P = scipy.linalg.solve_discrete_are(root * params.A, root * params.B, params.Q, params.R)
    np.testing.assert_allclose(solution.P, P, rtol=1e-9)
    assert np.abs(np.linalg.eigvals(params.A - params.B @ solution.K)).max() < 1


@pytest.mark.parametrize("dims", DIMS)
def test_value_equals_simulation_and_no_other_gain_is_better(dims):
    solution, start = lqr.solve(lqr.system(dims), GAMMA), START[:dims]
    returns = simulate(dims, solution.K)
    expected = -start @ solution.P @ start + solution.offset
    # the noise contributes little to the spread; six standard errors
    np.testing.assert_allclose(returns.mean(), expected, atol=6 * returns.std() / 64)
    for scale in (0.8, 1.2):
        worse = simulate(dims, scale * solution.K)
        assert (returns - worse).mean() > 6 * (returns - worse).std() / 64  # the same noise in both


@pytest.mark.parametrize("dims", DIMS)
def test_simulated_cost_equals_the_closed_form(dims):
    """Starts uniform in the cube have covariance I / 3, so the mean cost is trace(P) / 3 less the offset."""
    params = lqr.system(dims)
    solution = lqr.solve(params, GAMMA)
    K = jnp.asarray(solution.K)
    costs = np.asarray(jax.jit(lambda key: lqr.simulate(params, lambda s: -K @ s, GAMMA, key, 4096))(random.key(0)))
    expected = np.trace(solution.P) / 3 - solution.offset
    np.testing.assert_allclose(costs.mean(), expected, atol=6 * costs.std() / 64)


@pytest.mark.parametrize("dims", DIMS)
def test_soft_value_equals_simulation(dims):
    """Reward and entropy of the soft-optimal policy add up to the soft value; another covariance earns less."""
    params = lqr.system(dims)
    solution = lqr.solve(params, GAMMA, ALPHA)
    np.testing.assert_array_equal(solution.K, lqr.solve(params, GAMMA).K)
    start = START[:dims]

    def earned(scale):
        covariance = scale * solution.covariance
        entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
        return simulate(dims, solution.K, np.linalg.cholesky(covariance), ALPHA * entropy)

    returns = earned(1.0)
    expected = -start @ solution.P @ start + solution.offset
    np.testing.assert_allclose(returns.mean(), expected, atol=6 * returns.std() / 64)
    for scale in (0.3, 3.0):
        worse = earned(scale)
        assert returns.mean() - worse.mean() > 6 * (returns.std() + worse.std()) / 64


def test_soft_value_equals_quadrature():
    """One dimension: alpha log of the integral of exp(q / alpha) over actions gives the soft value back."""
    params, s = lqr.system(1), 0.7
    solution = lqr.solve(params, GAMMA, ALPHA)
    P, W = solution.P[0, 0], params.noise[0, 0] ** 2
    a = np.linspace(-20, 20, 400_001)
    next_s = params.A[0, 0] * s + params.B[0, 0] * a
    q = -(params.Q[0, 0] * s**2 + params.R[0, 0] * a**2) + GAMMA * (solution.offset - P * (next_s**2 + W))
    density = np.exp((q - q.max()) / ALPHA)
    value = q.max() + ALPHA * np.log(np.trapezoid(density, a))
    np.testing.assert_allclose(value, -P * s**2 + solution.offset, rtol=1e-9)
    mean = np.trapezoid(a * density, a) / np.trapezoid(density, a)
    np.testing.assert_allclose(mean, -solution.K[0, 0] * s, rtol=1e-9)
    variance = np.trapezoid((a - mean) ** 2 * density, a) / np.trapezoid(density, a)
    np.testing.assert_allclose(variance, solution.covariance[0, 0], rtol=1e-9)


def test_a_system_that_cannot_be_stabilized_is_refused():
    params = lqr.system(1).replace(A=np.array([[2.0]]), B=np.array([[0.0]]))
    with pytest.raises(RuntimeError, match="does not converge"), np.errstate(all="ignore"):
        lqr.solve(params, 0.9)


@pytest.mark.parametrize(("name", "dims"), lqr.ENVS.items())
def test_environment_steps_as_the_equations_say(name, dims):
    env, params = gymnax.make(name)
    obs, state = env.reset(random.key(0), params)
    assert obs.shape == (dims,)
    action = jnp.linspace(-1, 1, params.B.shape[1])
    still = params.replace(noise=jnp.zeros_like(params.noise))
    next_obs, _, reward, terminated, truncated, _ = env.step(random.key(1), state, action, still)
    np.testing.assert_allclose(next_obs, params.A @ obs + params.B @ action, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reward, -(obs @ obs + action @ action), rtol=1e-5)
    assert not terminated
    assert not truncated
    keys = random.split(random.key(2), 20_000)
    noisy = jax.vmap(lambda key: env.step(key, state, action, params)[0])(keys) - next_obs
    np.testing.assert_allclose(np.cov(noisy.T), 0.01 * np.eye(dims).squeeze(), atol=0.01 / 20)
    last = state.replace(time=params.max_steps_in_episode - 1)
    *_, terminated, truncated, _ = env.step(random.key(1), last, action, params)
    assert truncated
    assert not terminated


@pytest.mark.parametrize("name", lqr.ENVS)
def test_the_box_does_not_bind_the_best_policy(name):
    """From a thousand starts and through the noise the best action stays within the box."""
    env, params = gymnax.make(name)
    K = jnp.asarray(lqr.solve(params, 0.99).K)

    def episode(key):
        obs, state = env.reset(key, params)

        def step(carry, key):
            obs, state = carry
            action = -K @ obs
            obs, state, *_ = env.step(key, state, action, params)
            return (obs, state), jnp.abs(action).max()

        return lax.scan(step, (obs, state), random.split(key, 49))[1].max()

    largest = jax.jit(jax.vmap(episode))(random.split(random.key(0), 1000))
    assert largest.max() < 0.9 * lqr.ACTION_BOUND

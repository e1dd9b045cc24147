"""Exact maximizers against dense grids, brute force and hand-worked networks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import np_mlp, random_layers, relu
from jax import random

from amortax.algorithms import fqi
from amortax.common import milp


def network(seed, obs_dim, action_dim, *hidden):
    """Random layers `[(weights, biases), ...]` in float64 and an observation."""
    rng = np.random.default_rng(seed)
    sizes = (obs_dim + action_dim, *hidden, 1)
    return random_layers(rng, *itertools.pairwise(sizes)), rng.normal(size=obs_dim)


def values(layers, obs, actions):
    """Outputs `[n]` for `actions [n, action_dim]`."""
    return np_mlp(layers, np.concatenate([np.tile(obs, (len(actions), 1)), actions], axis=1), relu)[:, 0]


def check(layers, obs, grid, spacing, low=-1.0, high=1.0):
    """No point of the grid is better, none near it is much worse, and the proof is complete."""
    solution = milp.relu_network(layers, obs, low, high)
    assert (solution.action >= low).all()
    assert (solution.action <= high).all()
    np.testing.assert_allclose(solution.value, values(layers, obs, solution.action[None])[0], rtol=1e-9)
    best = values(layers, obs, grid).max()
    slope = np.prod([np.linalg.norm(w, 2) for w, _ in layers])  # a bound on the network's
    scale = 1 + abs(best)
    assert best - 1e-5 * scale <= solution.value <= best + slope * spacing
    assert solution.gap <= 1e-5 * scale
    assert solution.bound >= solution.value - 1e-6 * scale


@pytest.mark.parametrize("seed", range(5))
def test_one_action_equals_a_dense_grid(seed):
    layers, obs = network(seed, 3, 1, 16, 16)
    check(layers, obs, np.linspace(-1, 1, 20_001)[:, None], 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_two_actions_in_an_asymmetric_box_equal_a_dense_grid(seed):
    layers, obs = network(seed, 2, 2, 8, 8)
    low, high = np.array([-2.0, 0.5]), np.array([0.5, 3.0])
    axes = np.meshgrid(*(np.linspace(a, b, 401) for a, b in zip(low, high, strict=True)))
    check(layers, obs, np.stack(axes, axis=-1).reshape(-1, 2), 2.5 / 400, low, high)


def test_units_that_no_action_switches_need_no_binaries():
    """Far from its kinks a network is linear: the maximum is the corner that the signs of its slope say."""
    layers, obs = network(0, 3, 2, 8)
    (w, b), last = layers
    layers = [(w, b + 100 * np.where(np.arange(8) % 2, 1, -1)), last]  # always on, or always off
    slope = w[3:, 1::2] @ last[0][1::2, 0]
    solution = milp.relu_network(layers, obs)
    np.testing.assert_allclose(solution.action, np.sign(slope))
    assert solution.gap < 1e-9


def tent(peak):
    """q = 1 - |a - peak| whatever the observation, which is a number."""
    w = np.array([[0.0, 0.0], [1.0, -1.0]])
    return [(w, np.array([-peak, peak])), (np.array([[-1.0], [-1.0]]), np.array([1.0]))]


@pytest.mark.parametrize(("peak", "action", "value"), [(0.3, 0.3, 1.0), (-0.9, -0.9, 1.0), (1.5, 1.0, 0.5)])
def test_a_tent_has_its_maximum_at_its_peak_or_at_the_bound(peak, action, value):
    solution = milp.relu_network(tent(peak), np.zeros(1))
    np.testing.assert_allclose(solution.action, [action], atol=1e-6)
    np.testing.assert_allclose(solution.value, value, atol=1e-6)
    np.testing.assert_allclose(solution.bound, value, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_binary_choices_under_a_budget_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    weights, cost = rng.normal(size=12), rng.uniform(0.2, 1, size=12)
    choices = np.array(list(itertools.product([0, 1], repeat=12)))
    allowed = choices[choices @ cost <= 3]
    solution = milp.linear(weights, cost, 3)
    np.testing.assert_allclose(solution.value, (allowed @ weights).max(), rtol=1e-6)
    assert set(solution.action) <= {0, 1}
    assert cost @ solution.action <= 3 + 1e-9
    assert solution.gap < 1e-5


def test_whole_numbers_under_two_constraints_equal_brute_force():
    weights, matrix, upper = np.array([3.0, 2.0, -1.0]), np.array([[1, 1, 0], [2, -1, 1]]), np.array([5, 6])
    choices = np.array(list(itertools.product(range(-1, 5), repeat=3)))
    allowed = choices[(choices @ matrix.T <= upper).all(axis=1)]
    solution = milp.linear(weights, matrix, upper, low=-1, high=4)
    np.testing.assert_allclose(solution.value, (allowed @ weights).max())
    assert (matrix @ solution.action <= upper).all()


def test_constraints_that_nothing_satisfies_are_named():
    with pytest.raises(ValueError, match="no maximum"):
        milp.linear([1.0, 1.0], [[1.0, 1.0]], -1)


def test_a_time_limit_that_is_too_short_is_named():
    layers, obs = network(0, 3, 4, 32, 32)
    with pytest.raises(TimeoutError, match=r"time_limit=0\.05 s"):
        milp.relu_network(layers, obs, time_limit=0.05)


def test_it_is_a_maximizer_of_fitted_q():
    """Within a compiled program and batched over states: the very actions of each state alone."""
    config = fqi.Config(maximizer="milp", activation="relu", hidden_sizes=(8,))
    params = fqi.mlp_init(random.key(0), (4, 8, 1))
    obs = random.normal(random.key(1), (20, 3))
    actions = jax.jit(fqi.maximize)(config, params, obs, random.key(2))
    expected = [milp.relu_network(params, s).action for s in np.asarray(obs)]
    np.testing.assert_allclose(actions, expected, atol=1e-6)
    together = jax.vmap(fqi.maximize, in_axes=(None, None, 0, None))(
        config, params, obs.reshape(4, 5, 3), random.key(2)
    )
    np.testing.assert_array_equal(together.reshape(20, 1), actions)
    others = fqi.maximize(fqi.Config(activation="relu", num_candidates=16), params, obs, random.key(3))
    gap = fqi.critic(config, params, obs, actions) - fqi.critic(config, params, obs, others)
    assert gap.min() > -1e-5
    assert jnp.median(gap) < 1e-3

"""In place of the maximum over actions: solvers find known maxima, a policy ascends, integrals equal closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from cases import load_broken, np_critic
from jax import random

from amortax.algorithms import fqi, nfqca, soft_fqi


def bowl(env, center, sizes):
    """Weights of the quadratic q(s, a) = -sum_i sizes_i (a_i - center_i)^2, and the dimension of the observations."""
    obs_dim, action_dim = fqi.make_env(env).obs_dim, fqi.make_env(env).action_dim
    i, j = np.triu_indices(1 + obs_dim + action_dim)
    weights = np.zeros(len(i))
    for k, (c, size) in enumerate(zip(center, sizes, strict=True), start=1 + obs_dim):
        weights[(i == 0) & (j == 0)] -= size * c**2
        weights[(i == 0) & (j == k)] = 2 * size * c
        weights[(i == k) & (j == k)] = -size
    return jnp.asarray(weights, float), obs_dim


# Solvers

SOLVERS = {"gradient": (4, 10, 0.02), "lbfgs": (4, 10, 1e-3), "cem": (32, 10, 0.02), "grid": (101, 1, 0.01)}
BOWLS = {
    "Pendulum-v1": [([0.3], [1.0]), ([-1.7], [0.2])],  # the second maximum is at the bound
    # inside, one coordinate at its bound, a corner
    "Reacher-misc": [([0.4, -0.6], [1.0, 3.0]), ([2.0, 0.1], [1.0, 1.0]), ([-1.5, 3.0], [1.0, 0.5])],
}


def check_maxima(fqi, solver, env):
    candidates, steps, atol = SOLVERS[solver]
    config = fqi.Config(
        env=env, approximator="quadratic", maximizer=solver, num_candidates=candidates, maximizer_steps=steps
    )
    maximize = jax.jit(fqi.maximize)
    for center, sizes in BOWLS[env]:
        weights, obs_dim = bowl(env, center, sizes)
        obs = random.normal(random.key(0), (50, obs_dim))
        actions = maximize(config, weights, obs, random.key(1))
        assert np.abs(actions).max() <= 1
        np.testing.assert_allclose(actions, np.tile(np.clip(center, -1, 1), (50, 1)), atol=atol)


@pytest.mark.parametrize("env", BOWLS)
@pytest.mark.parametrize("solver", [pytest.param(x, marks=[pytest.mark.quick] * (x != "lbfgs")) for x in SOLVERS])
def test_maximizers_find_a_known_maximum(solver, env):
    check_maxima(fqi, solver, env)


@pytest.mark.parametrize(
    ("solver", "old", "new"),
    [
        ("gradient", "actions + size * direction", "actions - size * direction"),
        ("cem", "lax.top_k(jax.vmap(q)(actions)", "lax.top_k(-jax.vmap(q)(actions)"),
        ("grid", "jnp.argmax(jax.vmap(q)(actions))", "jnp.argmin(jax.vmap(q)(actions))"),
    ],
)
def test_the_known_maximum_catches(tmp_path, solver, old, new):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_maxima(load_broken(fqi, tmp_path, old, new), solver, "Pendulum-v1")


@pytest.mark.quick
@pytest.mark.parametrize("solver", ["gradient", "cem"])
def test_maximizers_of_a_network_come_close_to_the_best_of_a_grid(solver):
    """Mean gap within 1 % of the range of q, for the default sizes of the solver that is the default."""
    sizes = {"num_candidates": 32, "maximizer_steps": 5} if solver == "cem" else {}
    config = fqi.Config(maximizer=solver, hidden_sizes=(32, 32), **sizes)
    params = fqi.mlp_init(random.key(0), (4, 32, 32, 1))
    obs = random.normal(random.key(1), (200, 3))
    actions = jax.jit(fqi.maximize)(config, params, obs, random.key(2))
    layers = [tuple(map(np.asarray, layer)) for layer in params]
    grid = np.linspace(-1, 1, 501)[:, None]
    q = np.stack([np_critic(layers, np.tile(s, (501, 1)), grid) for s in np.asarray(obs)])
    gap = q.max(axis=1) - np_critic(layers, obs, actions)
    assert gap.mean() < 0.01 * (q.max() - q.min())
    assert gap.min() > -1e-3


@pytest.mark.quick
def test_exhaustive_finds_the_best_discrete_action():
    config = fqi.Config(env="Acrobot-v1", maximizer="exhaustive")
    params = fqi.mlp_init(random.key(0), (6 + 3, 16, 1))
    obs = random.normal(random.key(1), (100, 6))
    actions = jax.jit(fqi.maximize)(config, params, obs, random.key(2))
    codes = 2 * np.eye(3) - 1
    layers = [tuple(map(np.asarray, layer)) for layer in params]
    q = np.stack([np_critic(layers, obs, np.tile(code, (100, 1))) for code in codes], axis=1)
    np.testing.assert_array_equal(actions, codes[q.argmax(axis=1)])
    assert len(set(q.argmax(axis=1))) > 1


# A policy in the solver's place


def test_nfqca_ascends_the_value_of_its_actions():
    """The policy finds the maximum of a bowl, inside and at the bound."""
    config = nfqca.Config(approximator="quadratic", fit_steps=500, learning_rate=1e-2)

    @jax.jit
    def ascend(weights, obs):
        loss = lambda params, rows: nfqca.actor_loss(params, weights, config, rows)
        batch = nfqca.Transition(obs, obs[:, :1], obs[:, 0], obs, obs[:, 0])
        params = nfqca.fit(config, loss, nfqca.mlp_init(random.key(1), (3, 16, 1)), batch, random.key(2))
        return nfqca.actor(params, obs), loss(params, batch)

    for center, expected in ((0.3, 0.3), (-1.7, -1.0)):
        weights, _ = bowl("Pendulum-v1", [center], [1.0])
        actions, loss = ascend(weights, random.normal(random.key(0), (100, 3)))
        np.testing.assert_allclose(actions, np.full((100, 1), expected), atol=0.03)
        np.testing.assert_allclose(loss, (expected - center) ** 2, atol=0.05)


# Integrals


@pytest.mark.quick
def test_quadrature_of_a_quadratic_equals_its_closed_form():
    """beta log of the integral of exp(-(a - c)^2 / beta) over Pendulum's torques, [-2, 2], by the error function."""
    soft_value = jax.jit(soft_fqi.soft_value)
    for center, beta in ((0.3, 0.2), (-1.5, 0.5), (0.0, 5.0)):
        weights, obs_dim = bowl("Pendulum-v1", [center / 2], [4.0])  # (a - c)^2 of a torque a = 2 * action
        config = soft_fqi.Config(approximator="quadratic", beta=beta)
        value = soft_value(config, soft_fqi.Params(None, weights), jnp.zeros((1, obs_dim)), random.key(0))[0]
        ends = (np.array([-2, 2]) - center) / np.sqrt(beta)
        integral = np.sqrt(np.pi * beta) / 2 * np.diff(scipy.special.erf(ends))[0]
        np.testing.assert_allclose(value, beta * np.log(integral), atol=1e-4)


@pytest.mark.quick
def test_quadrature_of_a_network_equals_scipy():
    config = soft_fqi.Config(beta=0.5, num_nodes=64)
    params = soft_fqi.mlp_init(random.key(3), (4, 16, 1))
    layers = [tuple(np.float64(x) for x in layer) for layer in params]
    obs = np.array([[0.1, -0.9, 0.5], [1.0, 0.3, -2.0]])
    values = jax.jit(soft_fqi.soft_value)(config, soft_fqi.Params(None, params), jnp.asarray(obs), random.key(0))
    for s, value in zip(obs, values, strict=True):
        density = lambda torque, s=s: np.exp(np_critic(layers, s[None], np.array([[torque / 2]]))[0] / 0.5)
        integral, _ = scipy.integrate.quad(density, -2, 2, limit=200)
        np.testing.assert_allclose(value, 0.5 * np.log(integral), atol=1e-3)


@pytest.mark.quick
def test_quadrature_in_two_dimensions():
    """The integral over a box of two separate bowls is the product of the integrals of each."""
    weights, obs_dim = bowl("Reacher-misc", [0.2, -0.5], [1.0, 2.0])
    config, env = soft_fqi.Config(env="Reacher-misc", approximator="quadratic", beta=0.5), fqi.make_env("Reacher-misc")
    params = soft_fqi.Params(None, weights)
    value = jax.jit(soft_fqi.soft_value)(config, params, jnp.zeros((1, obs_dim)), random.key(0))[0]
    expected = 0.5 * np.log((env.rescale(jnp.ones(2)) - env.rescale(-jnp.ones(2))) / 2).sum()
    for center, size in ((0.2, 1.0), (-0.5, 2.0)):
        density = lambda a, center=center, size=size: np.exp(-size * (a - center) ** 2 / 0.5)
        expected += 0.5 * np.log(scipy.integrate.quad(density, -1, 1)[0])
    np.testing.assert_allclose(value, expected, atol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("integral", ["quadrature", "importance", "dual"])
def test_every_integral_is_exact_for_the_boltzmann_policy(monkeypatch, integral):
    """With q = beta log d + 3 the log-integral is 3; every sample of the dual and of importance sampling says so."""
    config = soft_fqi.Config(integral=integral, beta=0.7, num_samples=4, num_nodes=512)
    policy = soft_fqi.mlp_init(random.key(0), (3, 8, 2))

    def critic(config, params, obs, action):
        log_prob = soft_fqi.policy(policy, obs).log_prob(jnp.arctanh(action))
        log_prob -= jnp.log(1 - jnp.square(action)).sum(axis=-1)
        return config.beta * (log_prob - jnp.log(2.0)) + 3  # a torque is twice the action: half the density

    monkeypatch.setattr(soft_fqi, "critic", critic)
    obs = 0.3 * random.normal(random.key(1), (20, 3))
    soft_value = jax.jit(lambda obs: soft_fqi.soft_value(config, soft_fqi.Params(policy, None), obs, random.key(2)))
    np.testing.assert_allclose(soft_value(obs), np.full(20, 3), atol=5e-3)


@pytest.mark.quick
def test_the_dual_of_another_policy_is_less_and_importance_sampling_is_not():
    weights, obs_dim = bowl("Pendulum-v1", [0.3], [1.0])
    params = soft_fqi.Params([(jnp.zeros((obs_dim, 2)), jnp.array([0.0, -0.5]))], weights)
    value = {}
    for integral in ("quadrature", "importance", "dual"):
        config = soft_fqi.Config(approximator="quadratic", beta=0.3, integral=integral, num_samples=20_000)
        values = jax.jit(soft_fqi.soft_value)(config, params, jnp.zeros((1, obs_dim)), random.key(0))
        value[integral] = float(values[0])
    np.testing.assert_allclose(value["importance"], value["quadrature"], atol=0.01)
    # the difference is beta times the divergence of the policy from the Boltzmann policy, here by SciPy
    boltzmann = lambda a: -((a - 0.3) ** 2) / 0.3 - (value["quadrature"] / 0.3 - np.log(2))
    normal = lambda u: scipy.stats.norm(0, np.exp(-0.5)).logpdf(u)
    terms = lambda u: normal(u) - np.log(1 - np.tanh(u) ** 2) - boltzmann(np.tanh(u))
    divergence = scipy.integrate.quad(lambda u: np.exp(normal(u)) * terms(u), -6, 6)[0]
    assert divergence > 0.1
    np.testing.assert_allclose(value["dual"], value["quadrature"] - 0.3 * divergence, atol=0.01)

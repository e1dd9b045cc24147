"""In place of the maximum over actions: solvers find known maxima, a policy ascends, integrals equal closed forms."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from cases import np_critic
from jax import random

from amortax.algorithms import fqi, nfqca, soft_fqi


def bowl(center, sizes=1.0):
    """q(a) = -sum_i sizes_i (a_i - center_i)^2."""
    return lambda action: -(jnp.asarray(sizes) * jnp.square(action - jnp.asarray(center))).sum()


# Solvers: of a function of the action alone, without a configuration, a network or an environment

BOWLS = {  # center, sizes: inside, one coordinate at its bound, a corner
    "inside": ([0.4, -0.6], [1.0, 3.0]),
    "edge": ([2.0, 0.1], [1.0, 1.0]),
    "corner": ([-1.5, 3.0], [1.0, 0.5]),
    "one action": ([0.3], [0.2]),
    "one action at its bound": ([-1.7], [1.0]),
}
KEY = random.key(1)
SOLVERS = {  # (q, action_dim) -> action, and its precision
    "gradient": (lambda q, n: fqi.gradient_ascent(q, random.uniform(KEY, (4, n), minval=-1, maxval=1), 10), 0.02),
    "lbfgs": (lambda q, n: fqi.lbfgs(q, random.uniform(KEY, (4, n), minval=-1, maxval=1), 10), 1e-3),
    "cem": (lambda q, n: fqi.cross_entropy(q, KEY, n, 32, 10), 0.02),
    "grid": (lambda q, n: fqi.grid(q, n, 101), 0.01),
}


@pytest.mark.parametrize("center", BOWLS)
@pytest.mark.parametrize("solver", [pytest.param(x, marks=[pytest.mark.quick] * (x != "lbfgs")) for x in SOLVERS])
def test_solvers_find_a_known_maximum(solver, center):
    (middle, sizes), (solve, atol) = BOWLS[center], SOLVERS[solver]
    action = jax.jit(lambda sizes: solve(bowl(middle, sizes), len(middle)))(jnp.asarray(sizes))
    np.testing.assert_allclose(action, np.clip(middle, -1, 1), atol=atol)


@pytest.mark.quick
def test_the_best_of_a_list_and_of_a_grid():
    actions = jnp.array([[0.0, 1.0], [0.5, -0.5], [-1.0, 0.2]])
    np.testing.assert_array_equal(fqi.exhaustive(bowl([0.4, -0.4]), actions), [0.5, -0.5])
    np.testing.assert_array_equal(fqi.grid(bowl([0.4, -0.9]), 2, 5), [0.5, -1.0])  # its step is 0.5, bounds included


@pytest.mark.quick
def test_gradient_ascent_has_as_many_maxima_as_starts():
    """On two hills each start climbs its own, and the higher one wins."""
    q = lambda action: jnp.exp(-20 * jnp.square(action[0] - 0.6)) + 2 * jnp.exp(-20 * jnp.square(action[0] + 0.6))
    for starts, found in (([[0.3]], 0.6), ([[-0.3]], -0.6), ([[0.3], [-0.3]], -0.6)):
        np.testing.assert_allclose(fqi.gradient_ascent(q, jnp.array(starts), 20), [found], atol=0.03)


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.quick] * (x != "lbfgs")) for x in SOLVERS])
def test_maximize_is_the_solver_that_its_name_says(name):
    """The very actions of the solver of each state alone, from the same random candidates."""
    config = fqi.Config(maximizer=name, num_candidates=5, maximizer_steps=3)
    params, obs, key = fqi.mlp_init(random.key(0), (4, 8, 1)), random.normal(random.key(1), (6, 3)), random.key(2)
    starts = random.uniform(key, (5, 1), minval=-1, maxval=1)
    solve = {
        "gradient": lambda q: fqi.gradient_ascent(q, starts, 3),
        "lbfgs": lambda q: fqi.lbfgs(q, starts, 3),
        "cem": lambda q: fqi.cross_entropy(q, key, 1, 5, 3),
        "grid": lambda q: fqi.grid(q, 1, 5),
    }[name]
    expected = jax.jit(jax.vmap(lambda s: solve(lambda a: fqi.critic(config, params, s, a))))(obs)
    np.testing.assert_allclose(jax.jit(fqi.maximize)(config, params, obs, key), expected, atol=1e-3)


@pytest.mark.quick
@pytest.mark.parametrize("solver", ["gradient", "cem"])
def test_maximizers_of_a_network_come_close_to_the_best_of_a_grid(solver):
    """Mean gap within 1 % of the range of q, for the default sizes of the solver that is the default."""
    sizes = {"num_candidates": 32, "maximizer_steps": 5} if solver == "cem" else {}
    config = fqi.Config(maximizer=solver, **sizes)
    params = fqi.mlp_init(random.key(0), (4, 32, 32, 1))
    obs = random.normal(random.key(1), (200, 3))
    actions = jax.jit(fqi.maximize)(config, params, obs, random.key(2))
    grid = jnp.linspace(-1, 1, 501)[:, None]
    q = np.asarray(jax.vmap(lambda a: fqi.critic(config, params, obs, jnp.tile(a, (200, 1))))(grid))
    gap = q.max(axis=0) - fqi.critic(config, params, obs, actions)
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


# A solver of one's own


@pytest.fixture
def own_solver(monkeypatch, tmp_path):
    """A module in the current folder, as a user has it."""
    (tmp_path / "my_solvers.py").write_text(
        "import jax.numpy as jnp\n\n\n"
        "def both_ends(q, config, critic_params, obs, key):\n"
        "    low, high = -jnp.ones(1), jnp.ones(1)\n"
        "    return jnp.where(q(low) > q(high), low, high)\n\n\n"
        "def two_actions(q, config, critic_params, obs, key):\n"
        "    return jnp.zeros(2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_solvers", None)
    fqi.import_solver.cache_clear()


@pytest.mark.quick
@pytest.mark.usefixtures("own_solver")
def test_a_solver_of_ones_own_is_found_by_its_name():
    config = fqi.Config(maximizer="my_solvers:both_ends")
    params, obs = fqi.mlp_init(random.key(0), (4, 8, 1)), random.normal(random.key(1), (50, 3))
    actions = fqi.maximize(config, params, obs, random.key(2))
    low, high = (fqi.critic(config, params, obs, jnp.full((50, 1), bound)) for bound in (-1.0, 1.0))
    np.testing.assert_array_equal(actions[:, 0], np.where(low > high, -1, 1))
    assert len(set(np.asarray(actions[:, 0]))) == 2
    jax.eval_shape(lambda key: fqi.init(config, key), random.key(0))


@pytest.mark.quick
@pytest.mark.usefixtures("own_solver")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_solvers:no_such", "has no attribute 'no_such'"),
        ("no_such_module:solve", "No module named 'no_such_module'"),
        ("my_solvers:two_actions", "dot_general"),
        ("math:sqrt", "takes exactly one argument"),
        ("my_solvers", "must be gradient, .* or module:function"),
    ],
)
def test_a_solver_that_cannot_be_used_is_named(name, said):
    with pytest.raises(ValueError, match=f"^maximizer={name}: .*{said}"):
        jax.eval_shape(lambda key: fqi.init(fqi.Config(maximizer=name), key), random.key(0))


# A policy in the solver's place


def test_nfqca_ascends_the_value_of_its_actions(monkeypatch):
    """The policy finds the maximum of a bowl, inside and at the bound."""
    config = nfqca.Config(fit_steps=500, learning_rate=1e-2)
    monkeypatch.setattr(nfqca, "critic", lambda config, center, obs, action: -jnp.square(action[..., 0] - center))

    @jax.jit
    def ascend(center, obs):
        loss = lambda params, rows: nfqca.actor_loss(params, center, config, rows)
        batch = nfqca.Transition(obs, obs[:, :1], obs[:, 0], obs, obs[:, 0])
        params = nfqca.fit(config, loss, nfqca.mlp_init(random.key(1), (3, 16, 1)), batch, random.key(2))
        return nfqca.actor(config, params, obs), loss(params, batch)

    for center, expected in ((0.3, 0.3), (-1.7, -1.0)):
        actions, loss = ascend(center, random.normal(random.key(0), (100, 3)))
        np.testing.assert_allclose(actions, np.full((100, 1), expected), atol=0.03)
        np.testing.assert_allclose(loss, (expected - center) ** 2, atol=0.05)


# Integrals: of a function of the action alone, from actions and the logarithms of their weights


def nodes(env="Pendulum-v1", num_nodes=32):
    return soft_fqi.nodes(soft_fqi.Config(env=env, num_nodes=num_nodes))


@pytest.mark.quick
def test_quadrature_of_a_quadratic_equals_its_closed_form():
    """beta log of the integral of exp(-(a - c)^2 / beta) over Pendulum's torques, [-2, 2], by the error function."""
    for center, beta in ((0.3, 0.2), (-1.5, 0.5), (0.0, 5.0)):
        value = soft_fqi.quadrature(bowl([center / 2], 4.0), beta, *nodes())  # (a - c)^2 of a torque a = 2 * action
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
    value = soft_fqi.quadrature(bowl([0.2, -0.5], [1.0, 2.0]), 0.5, *nodes("Reacher-misc"))
    env = soft_fqi.make_env("Reacher-misc")
    expected = 0.5 * np.log((env.rescale(jnp.ones(2)) - env.rescale(-jnp.ones(2))) / 2).sum()
    for center, size in ((0.2, 1.0), (-0.5, 2.0)):
        density = lambda a, center=center, size=size: np.exp(-size * (a - center) ** 2 / 0.5)
        expected += 0.5 * np.log(scipy.integrate.quad(density, -1, 1)[0])
    np.testing.assert_allclose(value, expected, atol=1e-4)


@pytest.mark.quick
def test_quadrature_over_discrete_actions_is_a_sum():
    """q of a code is the weight of its 1: beta log sum exp(q / beta)."""
    values = jnp.array([0.3, -1.0, 0.8])
    soft = soft_fqi.quadrature(lambda code: values @ (code + 1) / 2, 0.5, *nodes("Acrobot-v1"))
    np.testing.assert_allclose(soft, 0.5 * scipy.special.logsumexp(values / 0.5), rtol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("integral", ["quadrature", "importance", "dual"])
def test_every_integral_is_exact_for_the_boltzmann_policy(monkeypatch, integral):
    """With q = beta log d + 3 the log-integral is 3; every sample of the dual and of importance sampling says so."""
    config = soft_fqi.Config(integral=integral, beta=0.7, num_samples=4, num_nodes=512)
    policy = soft_fqi.mlp_init(random.key(0), (3, 8, 2))

    def critic(config, params, obs, action):
        log_prob = soft_fqi.policy(config, policy, obs).log_prob(jnp.arctanh(action))
        log_prob -= jnp.log(1 - jnp.square(action)).sum(axis=-1)
        return config.beta * (log_prob - jnp.log(2.0)) + 3  # a torque is twice the action: half the density

    monkeypatch.setattr(soft_fqi, "critic", critic)
    obs = 0.3 * random.normal(random.key(1), (20, 3))
    soft_value = jax.jit(lambda obs: soft_fqi.soft_value(config, soft_fqi.Params(policy, None), obs, random.key(2)))
    np.testing.assert_allclose(soft_value(obs), np.full(20, 3), atol=5e-3)


@pytest.mark.quick
def test_the_dual_of_another_policy_is_less_and_importance_sampling_is_not():
    """The difference is beta times the divergence of the policy from the Boltzmann policy, here by SciPy."""
    config, beta, q = soft_fqi.Config(), 0.3, bowl([0.3])
    policy = [(jnp.zeros((3, 2)), jnp.array([0.0, -0.5]))]
    actions, log_prob = soft_fqi.sample_action(config, policy, jnp.zeros(3), random.normal(random.key(0), (20_000, 1)))
    log_weights = jnp.log(2.0) - log_prob  # a torque is twice the action: half the density
    exact = float(soft_fqi.quadrature(q, beta, *nodes()))
    np.testing.assert_allclose(soft_fqi.importance(q, beta, actions, log_weights), exact, atol=0.01)
    boltzmann = lambda a: -((a - 0.3) ** 2) / beta - (exact / beta - np.log(2))
    normal = lambda u: scipy.stats.norm(0, np.exp(-0.5)).logpdf(u)
    terms = lambda u: normal(u) - np.log(1 - np.tanh(u) ** 2) - boltzmann(np.tanh(u))
    divergence = scipy.integrate.quad(lambda u: np.exp(normal(u)) * terms(u), -6, 6)[0]
    assert divergence > 0.1
    np.testing.assert_allclose(soft_fqi.dual(q, beta, actions, log_weights), exact - beta * divergence, atol=0.01)

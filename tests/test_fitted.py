"""The fitted-Q family: exact value iteration, known maxima, closed forms of integrals, and Riccati's solution."""

import functools

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from cases import Clock, assert_close, assert_same, exact_jit, load_broken, np_critic, quick_jit, replace
from gymnax.environments import environment, spaces
from jax import random

from algorithms import fqi, fqi_amortized, nfqca, soft_fqi
from common import lqr

FAMILY = {"fqi": fqi, "fqi_amortized": fqi_amortized, "nfqca": nfqca, "soft_fqi": soft_fqi}
SMALL = {
    "num_base_points": 80,
    "num_iterations": 4,
    "iterations_per_epoch": 2,
    "num_envs": 4,
    "num_eval_episodes": 2,
    "hidden_sizes": (8, 8),
    "fit_steps": 3,
    "batch_size": 16,
}
CONFIGS = {name: module.Config(**SMALL) for name, module in FAMILY.items()}
every_file = pytest.mark.parametrize("name", FAMILY)


# Finite decision processes, which quadratic features of codes represent exactly

NUM_STATES, NUM_ACTIONS = 4, 3
NEXT = np.array([[1, 2, 0], [3, 0, 2], [2, 1, 3], [0, 3, 1]])
REWARD = np.array([[0.3, -1.0, 0.8], [1.0, 0.1, -0.4], [-0.7, 0.9, 0.2], [0.5, -0.2, 1.3]])
END = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]])  # the best-paid action ends the episode
CENTRE = np.array([0.5, -0.3, 1.5, -1.4])  # of the reward, where actions are continuous; two lie outside the box
GAMMA = 0.8


class Finite(Clock):
    """Starts anywhere, shows its state as a one-hot vector, and is cut after a few steps."""

    def observe_time(self, state):
        return jax.nn.one_hot(state.time % NUM_STATES, NUM_STATES)

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=10**6)

    def reset_env(self, key, params):
        state = environment.EnvState(time=random.randint(key, (), 0, NUM_STATES))
        return self.observe_time(state), state

    def step_env(self, key, state, action, params):
        s = state.time
        state = environment.EnvState(time=jnp.asarray(NEXT)[s, action])
        reward, end = jnp.asarray(REWARD)[s, action], jnp.asarray(END)[s, action] > 0
        return self.observe_time(state), state, reward, end, {}

    def action_space(self, params):
        return spaces.Discrete(NUM_ACTIONS)


class Cycle(Finite):
    """The state moves on whatever the action, whose distance from the state's centre costs; one in two units of it."""

    def step_env(self, key, state, action, params):
        s = state.time % NUM_STATES
        state = environment.EnvState(time=(s + 1) % NUM_STATES)
        reward = jnp.asarray(REWARD)[s, 0] - jnp.square(action[0] / 2 - jnp.asarray(CENTRE)[s])
        return self.observe_time(state), state, reward, jnp.array(False), {}

    def action_space(self, params):
        return spaces.Box(-2.0, 2.0, (1,))


gymnax.register("Finite-test", functools.partial(Finite, 0, True))
gymnax.register("Cycle-test", functools.partial(Cycle, 0, True))
EXACT = SMALL | {
    "approximator": "quadratic",
    "gamma": GAMMA,
    "num_base_points": 400,
    "num_iterations": 60,
    "iterations_per_epoch": 60,
    "num_eval_episodes": 1,
    "fit_steps": 60,
    "learning_rate": 1e-2,
    "ridge": 1e-7,
    "tolerance": 0.0,
}


def short(monkeypatch, module):
    """Nothing is evaluated: the episodes of these environments may be endless."""
    monkeypatch.setattr(module, "evaluate", lambda config, params, key: (jnp.zeros(1), jnp.zeros(())))


def trained(monkeypatch, name, **fields):
    module = FAMILY[name]
    short(monkeypatch, module)
    config = module.Config(**(EXACT | fields))
    state, _ = quick_jit(module.train)(config, random.key(0))
    return module, config, state


def value_iteration(backup):
    """Fixed point q `[states, actions]` of q = reward + gamma * (1 - end) * backup(q)[next]."""
    q = np.zeros((NUM_STATES, NUM_ACTIONS))
    for _ in range(300):
        q = REWARD + GAMMA * (1 - END) * backup(q)[NEXT]
    return q


def table(module, config, params):
    """The critic at all states and actions of the finite process."""
    codes = 2 * jnp.eye(NUM_ACTIONS) - 1
    q = lambda s, a: module.critic(config, params.critic, jax.nn.one_hot(s, NUM_STATES), codes[a])
    return np.array([[q(s, a) for a in range(NUM_ACTIONS)] for s in range(NUM_STATES)])


@pytest.mark.parametrize(
    ("name", "fields"),
    [("fqi", {}), ("fqi_amortized", {"exact_fraction": 1.0}), ("fqi_amortized", {"exact_fraction": 0.5})],
)
def test_equals_value_iteration_over_discrete_actions(monkeypatch, name, fields):
    module, config, state = trained(monkeypatch, name, env="Finite-test", maximizer="exhaustive", **fields)
    expected = value_iteration(lambda q: q.max(axis=1))
    np.testing.assert_allclose(table(module, config, state.params), expected, atol=2e-3)
    for s in range(NUM_STATES):
        assert module.act(config, state.params, jax.nn.one_hot(s, NUM_STATES)) == expected[s].argmax()


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_soft_equals_soft_value_iteration_over_discrete_actions(monkeypatch, beta):
    module, config, state = trained(monkeypatch, "soft_fqi", env="Finite-test", beta=beta)
    expected = value_iteration(lambda q: beta * scipy.special.logsumexp(q / beta, axis=1))
    np.testing.assert_allclose(table(module, config, state.params), expected, atol=2e-3)


def test_soft_tends_to_the_hard_maximum(monkeypatch):
    """Within beta * log(actions) / (1 - gamma), which vanishes with the temperature."""
    expected = value_iteration(lambda q: q.max(axis=1))
    for beta in (1.0, 0.1, 0.001):
        module, config, state = trained(monkeypatch, "soft_fqi", env="Finite-test", beta=beta)
        excess = table(module, config, state.params) - expected
        assert (excess > -2e-3).all()
        assert (excess < beta * np.log(NUM_ACTIONS) / (1 - GAMMA) + 2e-3).all()


def cycle_values(cost):
    """Value of each state of the cycle, whose best action costs `cost(centre)`, by the geometric sum of a lap."""
    gain = REWARD[:, 0] - np.array([cost(c) for c in CENTRE])
    laps = np.array([np.roll(gain, -s) @ GAMMA ** np.arange(NUM_STATES) for s in range(NUM_STATES)])
    return laps / (1 - GAMMA**NUM_STATES)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("fqi", {}),
        ("fqi", {"maximizer": "cem", "num_candidates": 32}),
        ("fqi", {"maximizer": "grid", "num_candidates": 41}),
        ("fqi_amortized", {"exact_fraction": 0.3}),
        ("nfqca", {}),
        ("soft_fqi", {"beta": 0.1}),
    ],
)
def test_equals_value_iteration_over_continuous_actions(monkeypatch, name, fields):
    """q(s, a) = reward - (a - centre)^2 + gamma * v(next), the best action being the centre or the bound near it."""
    module, config, state = trained(monkeypatch, name, env="Cycle-test", **fields)
    if name == "soft_fqi":
        # the integral runs over [-2, 2], the environment's units, in which the cost is that of half the action
        integral = lambda c: scipy.integrate.quad(lambda a: np.exp(-((a / 2 - c) ** 2) / 0.1), -2, 2, epsabs=1e-12)[0]
        values = cycle_values(lambda c: -0.1 * np.log(integral(c)))
    else:
        values = cycle_values(lambda c: max(0, abs(c) - 1) ** 2)
    actions = np.linspace(-1, 1, 5)
    for s in range(NUM_STATES):
        expected = REWARD[s, 0] - (actions - CENTRE[s]) ** 2 + GAMMA * values[(s + 1) % NUM_STATES]
        obs = jnp.tile(jax.nn.one_hot(s, NUM_STATES), (5, 1))
        q = module.critic(config, state.params.critic, obs, jnp.asarray(actions)[:, None])
        np.testing.assert_allclose(q, expected, atol=0.01)


# Targets


def example(name, **fields):
    """A module, a configuration of Pendulum-v1, its first state, and base points of which every third is terminal."""
    module, config = FAMILY[name], replace(CONFIGS[name], **fields)
    state = quick_jit(module.init)(config, random.key(0))
    batch = state.base_points._replace(terminated=(jnp.arange(80) % 3 == 0).astype(float))
    return module, config, state, batch


def bellman_targets(name, module, config, params, batch):
    """The targets alone, whatever else the function takes and gives."""
    args = (config, params, batch) if name == "nfqca" else (config, params, batch, random.key(1))
    targets = module.bellman_targets(*args)
    return targets[0] if name == "fqi_amortized" else targets


@every_file
def test_terminal_base_points_are_not_bootstrapped(name):
    module, config, state, batch = example(name)
    targets = bellman_targets(name, module, config, state.params, batch)
    endless = bellman_targets(name, module, config, state.params, batch._replace(terminated=jnp.zeros(80)))
    ended = np.asarray(batch.terminated) == 1
    np.testing.assert_array_equal(targets[ended], batch.reward[ended])
    np.testing.assert_allclose(targets[~ended], endless[~ended], rtol=1e-6)
    assert (endless != batch.reward)[ended].mean() > 0.7  # some units are dead, and their states worth nothing


def test_targets_are_those_of_the_best_action():
    """Against brute force over 20,001 actions."""
    module, config, state, batch = example("fqi", num_candidates=16, maximizer_steps=20, gamma=0.9)
    targets = module.bellman_targets(config, state.params, batch, random.key(1))
    actions = jnp.linspace(-1, 1, 20_001)[:, None]
    for i in range(10):
        q = module.critic(config, state.params.critic, jnp.tile(batch.next_obs[i], (20_001, 1)), actions)
        expected = batch.reward[i] + 0.9 * (1 - batch.terminated[i]) * q.max()
        np.testing.assert_allclose(targets[i], expected, atol=1e-3)


def test_amortized_targets_ask_the_solver_for_a_part_only():
    module, config, state, batch = example("fqi_amortized", exact_fraction=0.25)
    targets, exact = module.bellman_targets(config, state.params, batch, random.key(1))
    assert exact.shape == (20, 1)
    value = lambda obs, action: module.critic(config, state.params.critic, obs, action)
    actions = jnp.concatenate([exact, jnp.tanh(module.mlp(state.params.actor, batch.next_obs[20:]))])
    expected = batch.reward + config.gamma * (1 - batch.terminated) * value(batch.next_obs, actions)
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    policy = module.actor(config, state.params.actor, batch.next_obs[:20])
    assert (value(batch.next_obs[:20], exact) >= value(batch.next_obs[:20], policy) - 1e-6).all()


@pytest.mark.parametrize(("fraction", "num_exact"), [(0.0, 0), (0.01, 1), (0.5, 40), (1.0, 80)])
def test_any_fraction_trains(fraction, num_exact):
    module, config, state, _ = example("fqi_amortized", exact_fraction=fraction)
    assert state.window.actions.shape == (5, max(1, num_exact), 1)
    after, metrics = quick_jit(module.epoch)(config, state)
    assert np.isfinite(metrics.eval_returns).all()
    moved = any(
        (x != y).any() for x, y in zip(*map(jax.tree.leaves, (state.params.actor, after.params.actor)), strict=True)
    )
    assert moved == (fraction > 0)


# Maximisers


def bowl(env, centre, sizes):
    """Weights of the quadratic q(s, a) = -sum_i sizes_i (a_i - centre_i)^2."""
    config = fqi.Config(env=env, approximator="quadratic")
    env, env_params, low, _ = fqi.make_env(config)
    obs_dim = jax.eval_shape(lambda key: env.reset(key, env_params)[0], random.key(0)).size
    i, j = np.triu_indices(1 + obs_dim + len(low))
    weights = np.zeros(len(i))
    for k, (c, size) in enumerate(zip(centre, sizes, strict=True), start=1 + obs_dim):
        weights[(i == 0) & (j == 0)] -= size * c**2
        weights[(i == 0) & (j == k)] = 2 * size * c
        weights[(i == k) & (j == k)] = -size
    return jnp.asarray(weights, float), obs_dim


SOLVERS = [("gradient", 4, 10, 0.02), ("lbfgs", 4, 10, 1e-3), ("cem", 32, 10, 0.02), ("grid", 101, 1, 0.01)]


@pytest.mark.parametrize(("solver", "candidates", "steps", "atol"), SOLVERS)
@pytest.mark.parametrize(
    ("env", "centre", "sizes"),
    [
        ("Pendulum-v1", [0.3], [1.0]),
        ("Pendulum-v1", [-1.7], [0.2]),  # the maximum is at the bound
        ("Reacher-misc", [0.4, -0.6], [1.0, 3.0]),
        ("Reacher-misc", [2.0, 0.1], [1.0, 1.0]),  # one coordinate at its bound
        ("Reacher-misc", [-1.5, 3.0], [1.0, 0.5]),  # a corner
    ],
)
def test_maximisers_find_a_known_maximum(solver, candidates, steps, atol, env, centre, sizes):
    weights, obs_dim = bowl(env, centre, sizes)
    config = fqi.Config(
        env=env, approximator="quadratic", maximizer=solver, num_candidates=candidates, maximizer_steps=steps
    )
    obs = random.normal(random.key(0), (50, obs_dim))
    actions = quick_jit(fqi.maximize)(config, weights, obs, random.key(1))
    assert np.abs(actions).max() <= 1
    np.testing.assert_allclose(actions, np.tile(np.clip(centre, -1, 1), (50, 1)), atol=atol)


@pytest.mark.parametrize("solver", ["gradient", "cem"])
def test_maximisers_of_a_network_come_close_to_the_best_of_a_grid(solver):
    """Mean gap within 1 % of the range of q, for the default sizes of the solver that is the default."""
    sizes = {"num_candidates": 32, "maximizer_steps": 5} if solver == "cem" else {}
    config = fqi.Config(maximizer=solver, hidden_sizes=(32, 32), **sizes)
    params = fqi.mlp_init(random.key(0), (4, 32, 32, 1))
    obs = random.normal(random.key(1), (200, 3))
    actions = quick_jit(fqi.maximize)(config, params, obs, random.key(2))
    grid = jnp.linspace(-1, 1, 2001)[:, None]
    q = jax.vmap(lambda s: fqi.critic(config, params, jnp.tile(s, (2001, 1)), grid))(obs)
    gap = q.max(axis=1) - fqi.critic(config, params, obs, actions)
    assert gap.mean() < 0.01 * (q.max() - q.min())
    assert gap.min() > -1e-3


def test_exhaustive_finds_the_best_discrete_action():
    config = fqi.Config(env="Finite-test", maximizer="exhaustive", hidden_sizes=(16,))
    params = fqi.mlp_init(random.key(0), (NUM_STATES + NUM_ACTIONS, 16, 1))
    obs = random.normal(random.key(1), (100, NUM_STATES))
    actions = fqi.maximize(config, params, obs, random.key(2))
    codes = np.full((NUM_ACTIONS, NUM_ACTIONS), -1.0) + 2 * np.eye(NUM_ACTIONS)
    q = np.stack([fqi.critic(config, params, obs, jnp.tile(jnp.asarray(c), (100, 1))) for c in codes], axis=1)
    np.testing.assert_array_equal(actions, codes[q.argmax(axis=1)])
    assert len(np.unique(q.argmax(axis=1))) > 1


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ("CartPole-v1", "fqi"),
        ("Acrobot-v1", "fqi"),
        ("MountainCar-v0", "fqi"),
        ("CartPole-v1", "fqi_amortized"),
        ("CartPole-v1", "soft_fqi"),
    ],
)
def test_trains_with_discrete_actions(env, name):
    own = {} if name == "soft_fqi" else {"maximizer": "exhaustive"}
    config = replace(CONFIGS[name], env=env, num_eval_episodes=1, **own)
    state, metrics = quick_jit(FAMILY[name].train)(config, random.key(0))
    assert np.isfinite(metrics.eval_returns).all()
    codes = np.sort(np.asarray(state.base_points.action), axis=1)
    np.testing.assert_array_equal(codes, np.tile([-1.0] * (codes.shape[1] - 1) + [1.0], (80, 1)))


# Integrals


def test_quadrature_of_a_quadratic_equals_its_closed_form():
    """beta log of the integral of exp(-(a - c)^2 / beta) over Pendulum's torques, [-2, 2], by the error function."""
    for centre, beta in ((0.3, 0.2), (-1.5, 0.5), (0.0, 5.0)):
        weights, obs_dim = bowl("Pendulum-v1", [centre / 2], [4.0])  # (a - c)^2 of a torque a = 2 * action
        config = soft_fqi.Config(approximator="quadratic", beta=beta)
        params = soft_fqi.Params(None, weights)
        value = soft_fqi.soft_value(config, params, jnp.zeros((1, obs_dim)), random.key(0))[0]
        ends = (np.array([-2, 2]) - centre) / np.sqrt(beta)
        integral = np.sqrt(np.pi * beta) / 2 * np.diff(scipy.special.erf(ends))[0]
        np.testing.assert_allclose(value, beta * np.log(integral), atol=1e-4)


def test_quadrature_of_a_network_equals_scipy():
    config = soft_fqi.Config(beta=0.5, hidden_sizes=(16,), num_nodes=64)
    layers = [tuple(np.float64(x) for x in layer) for layer in soft_fqi.mlp_init(random.key(3), (4, 16, 1))]
    obs = np.array([[0.1, -0.9, 0.5], [1.0, 0.3, -2.0]])
    values = soft_fqi.soft_value(config, soft_fqi.Params(None, layers), jnp.asarray(obs), random.key(0))
    for s, value in zip(obs, values, strict=True):
        density = lambda torque, s=s: np.exp(np_critic(layers, s[None], np.array([[torque / 2]]))[0] / 0.5)
        integral, _ = scipy.integrate.quad(density, -2, 2, limit=200)
        np.testing.assert_allclose(value, 0.5 * np.log(integral), atol=1e-3)


def test_quadrature_in_two_dimensions():
    """The integral over a box of two separate bowls is the product of the integrals of each."""
    weights, obs_dim = bowl("Reacher-misc", [0.2, -0.5], [1.0, 2.0])
    config = soft_fqi.Config(env="Reacher-misc", approximator="quadratic", beta=0.5)
    value = soft_fqi.soft_value(config, soft_fqi.Params(None, weights), jnp.zeros((1, obs_dim)), random.key(0))[0]
    _, _, low, high = soft_fqi.make_env(config)
    expected = 0.5 * np.log((high - low) / 2).sum()
    for centre, size in ((0.2, 1.0), (-0.5, 2.0)):
        density = lambda a, centre=centre, size=size: np.exp(-size * (a - centre) ** 2 / 0.5)
        expected += 0.5 * np.log(scipy.integrate.quad(density, -1, 1)[0])
    np.testing.assert_allclose(value, expected, atol=1e-4)


def boltzmann_of_the_policy(monkeypatch, integral, constant, **fields):
    """Configuration and parameters for which the policy is the Boltzmann policy: q = beta log d + constant."""
    config = soft_fqi.Config(integral=integral, beta=0.7, **fields)
    policy = soft_fqi.mlp_init(random.key(0), (3, 8, 2))

    def critic(config, params, obs, action):
        gaussian = soft_fqi.policy(policy, obs)
        unsquashed = jnp.arctanh(action)
        log_prob = gaussian.log_prob(unsquashed) - jnp.log(1 - jnp.square(action)).sum(axis=-1)
        return config.beta * (log_prob - jnp.log(2.0)) + constant  # a torque is twice the action: half the density

    monkeypatch.setattr(soft_fqi, "critic", critic)
    return config, soft_fqi.Params(policy, None)


@pytest.mark.parametrize("integral", ["quadrature", "importance", "dual"])
def test_every_integral_is_exact_for_the_boltzmann_policy(monkeypatch, integral):
    """There the log-integral is the constant, and of the dual and of importance sampling every sample says so."""
    config, params = boltzmann_of_the_policy(monkeypatch, integral, 3.0, num_samples=4, num_nodes=512)
    values = soft_fqi.soft_value(config, params, 0.3 * random.normal(random.key(1), (20, 3)), random.key(2))
    np.testing.assert_allclose(values, 3, atol=5e-3)


def test_the_dual_of_another_policy_is_less_and_importance_sampling_is_not():
    weights, obs_dim = bowl("Pendulum-v1", [0.3], [1.0])
    policy = [(jnp.zeros((obs_dim, 2)), jnp.array([0.0, -0.5]))]
    params = soft_fqi.Params(policy, weights)
    value = {}
    for integral in ("quadrature", "importance", "dual"):
        config = soft_fqi.Config(approximator="quadratic", beta=0.3, integral=integral, num_samples=20_000)
        value[integral] = float(soft_fqi.soft_value(config, params, jnp.zeros((1, obs_dim)), random.key(0))[0])
    np.testing.assert_allclose(value["importance"], value["quadrature"], atol=0.01)
    # the difference is beta times the divergence of the policy from the Boltzmann policy, here by SciPy
    boltzmann = lambda a: -((a - 0.3) ** 2) / 0.3 - (value["quadrature"] / 0.3 - np.log(2))
    normal = lambda u: scipy.stats.norm(0, np.exp(-0.5)).logpdf(u)
    terms = lambda u: normal(u) - np.log(1 - np.tanh(u) ** 2) - boltzmann(np.tanh(u))
    divergence = scipy.integrate.quad(lambda u: np.exp(normal(u)) * terms(u), -6, 6)[0]
    assert divergence > 0.1
    np.testing.assert_allclose(value["dual"], value["quadrature"] - 0.3 * divergence, atol=0.01)


@pytest.mark.parametrize("integral", ["importance", "dual"])
def test_sampled_integrals_learn_what_quadrature_does(monkeypatch, integral):
    fields = {"env": "Cycle-test", "beta": 0.1}
    module, config, state = trained(monkeypatch, "soft_fqi", **fields)
    _, sampled_config, sampled = trained(monkeypatch, "soft_fqi", **fields, integral=integral, num_samples=128)
    obs, actions = jnp.eye(NUM_STATES), jnp.zeros((NUM_STATES, 1))
    expected = module.critic(config, state.params.critic, obs, actions)
    # squashed Gaussians are no Boltzmann policies at a bound: the dual falls short there
    np.testing.assert_allclose(module.critic(config, sampled.params.critic, obs, actions), expected, atol=0.15)
    greedy = module.actor(config, state.params, obs)
    np.testing.assert_allclose(module.actor(sampled_config, sampled.params, obs), greedy, atol=0.1)


# The window


def test_the_window_holds_the_last_iterations():
    """`window + 1` of them, each slot with the very actions that the solver gave in that iteration."""
    module, config, state, _ = example("fqi_amortized", exact_fraction=0.1, window=2)
    step = quick_jit(module.iteration)
    given = {}
    for n in range(7):
        _, key_max, *_ = random.split(state.key, 4)
        given[n] = module.bellman_targets(config, state.params, state.base_points, key_max)[1]
        state, _ = step(config, state)
        stamps = np.asarray(state.window.iteration)
        assert set(stamps) == set(range(max(0, n - 2), n + 1))
        for slot, stamp in enumerate(stamps):
            np.testing.assert_allclose(state.window.actions[slot], given[stamp], atol=1e-5)
    assert np.abs(given[6] - given[4]).max() > 1e-3  # the slots differ, so their order matters


def test_both_criteria_stop_the_amortized_iteration(monkeypatch):
    """`delta` is the larger of the change of q and of the policy's distance from the window, both by hand."""
    module, config, state, _ = example("fqi_amortized", exact_fraction=0.5, window=1)
    before = quick_jit(module.iteration)(config, state)[0]
    after, (_, error) = quick_jit(module.iteration)(config, before)
    batch = after.base_points
    q = [module.critic(config, s.params.critic, batch.obs, batch.action) for s in (before, after)]
    policy = jnp.tanh(module.mlp(after.params.actor, batch.next_obs[:40]))
    distance = np.mean([np.square(policy - actions).sum(axis=1).mean() for actions in after.window.actions])
    np.testing.assert_allclose(error, distance, rtol=1e-5)
    np.testing.assert_allclose(after.delta, max(np.square(q[1] - q[0]).mean(), distance), rtol=1e-4)


# Base points


def test_all_four_files_collect_the_same_base_points():
    states = [exact_jit(module.init)(CONFIGS[name], random.key(5)) for name, module in FAMILY.items()]
    for state in states[1:]:
        for x, y in zip(states[0].base_points, state.base_points, strict=True):
            np.testing.assert_array_equal(x, y)


def test_base_points_are_transitions_of_the_environment():
    """Each next observation follows from gymnax's own step, and the rows are in no order of time."""
    points = jax.jit(fqi.init)(CONFIGS["fqi"], random.key(0)).base_points
    env, env_params = gymnax.make("Pendulum-v1")
    theta = jnp.arctan2(points.obs[:, 1], points.obs[:, 0])
    _, states = jax.vmap(env.reset, in_axes=(0, None))(random.split(random.key(1), 80), env_params)
    states = states.replace(theta=theta, theta_dot=points.obs[:, 2], time=jnp.zeros(80, int))
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))
    next_obs, _, reward, *_ = step(random.split(random.key(2), 80), states, 2 * points.action, env_params)
    np.testing.assert_allclose(points.next_obs, next_obs, atol=1e-4)
    np.testing.assert_allclose(points.reward, reward, atol=1e-4)
    follows = np.abs(np.asarray(points.next_obs)[:-4] - np.asarray(points.obs)[4:]).max(axis=1) < 1e-6
    assert follows.mean() < 0.1
    assert np.abs(points.action).max() <= 1
    assert np.abs(points.action).max() > 0.9


def test_exploration_range_bounds_the_random_actions():
    for name, module in FAMILY.items():
        config = replace(CONFIGS[name], exploration_range=0.25)
        action = quick_jit(module.init)(config, random.key(0)).base_points.action
        assert 0.2 < np.abs(action).max() <= 0.25


def test_rounds_add_base_points_of_the_policy():
    """The first round stands in for the others until they come; what they bring is the policy's, with little noise."""
    config = replace(CONFIGS["nfqca"], rounds=2, num_iterations=4, iterations_per_epoch=1, exploration_noise=0.01)
    state = jax.jit(nfqca.init)(config, random.key(0))
    first = np.asarray(state.base_points.obs)
    np.testing.assert_array_equal(first[:40], first[40:])
    epoch = quick_jit(nfqca.epoch)
    steps = []
    for _ in range(4):
        policy = state.params.actor
        state, metrics = epoch(config, state)
        steps.append(int(metrics.step))
        if len(steps) == 3:
            collector = policy
    assert steps == [40, 40, 80, 80]
    np.testing.assert_array_equal(state.base_points.obs[:40], first[:40])
    assert (np.asarray(state.base_points.obs[40:]) != first[40:]).any()
    action = nfqca.actor(collector, state.base_points.obs[40:])
    assert np.abs(state.base_points.action[40:] - action).max() < 0.05


def write_file(path, module=fqi, **fields):
    points = quick_jit(module.init)(replace(CONFIGS["fqi"], **fields), random.key(0)).base_points
    np.savez(path, **{name: np.asarray(x) for name, x in points._asdict().items()})
    return points


def test_base_points_of_a_file_are_used_as_they_are(tmp_path):
    points = write_file(tmp_path / "points.npz")
    for name, module in FAMILY.items():
        state = quick_jit(module.init)(replace(CONFIGS[name], base_points=str(tmp_path / "points.npz")), random.key(9))
        assert_same(tuple(state.base_points), tuple(points))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a file of base points"),
        (b"obs,action\n1,2\n", "not a file of base points"),
        ({"weights": np.zeros(3)}, "not a file of base points"),
        ({"env": "Reacher-misc"}, "must hold shapes"),
        ({"rows": 0}, "must hold shapes"),
        ({"reward": np.nan}, "finite"),
        ({"action": 1.5}, r"\[-1, 1\]"),
    ],
)
def test_a_file_that_is_no_base_points_is_named(tmp_path, content, said):
    path = tmp_path / "points.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif "weights" in content:
        np.savez(path, **content)
    else:
        write_file(path, env=content.get("env", "Pendulum-v1"))
        arrays = dict(np.load(path))
        for field in ("reward", "action"):
            arrays[field][:1] = content.get(field, arrays[field][:1])
        np.savez(path, **{name: x[: content.get("rows", 80)] for name, x in arrays.items()})
    with pytest.raises(ValueError, match=rf"^base_points={path}: .*{said}"):
        jax.eval_shape(fqi.init, replace(CONFIGS["fqi"], base_points=str(path)), random.key(0))


# Fits


def test_quadratic_fit_recovers_a_quadratic():
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(500, 3)), rng.uniform(-1, 1, size=(500, 2))
    x = np.concatenate([np.ones((500, 1)), obs, action], axis=1)
    form = rng.normal(size=(6, 6))
    targets = np.einsum("ni,ij,nj->n", x, form, x)
    batch = fqi.Transition(*map(jnp.asarray, (obs, action, targets, obs, targets)))
    config = fqi.Config(approximator="quadratic", ridge=0.0)
    weights = fqi.fit_quadratic(config, batch, jnp.asarray(targets))
    np.testing.assert_allclose(fqi.critic(config, weights, batch.obs, batch.action), targets, atol=1e-3)
    features = np.asarray(fqi.quadratic_features(jnp.asarray(x[:, 1:])))
    np.testing.assert_allclose(weights, np.linalg.lstsq(features, targets)[0], atol=1e-3)


@every_file
def test_a_full_batch_is_gradient_descent_on_the_mean_of_all(name):
    """One Adam step by hand: its first step goes by the learning rate against the sign of the gradient."""
    module, config, state, batch = example(name, batch_size=80, fit_steps=1)
    targets = random.normal(random.key(2), (80,))
    args = config, state.params.critic, batch, targets
    fitted = module.fit_critic(*args, random.key(0))
    assert_same(fitted, module.fit_critic(*args, random.key(1)))  # nothing is drawn
    loss = lambda params: jnp.square(module.critic(config, params, batch.obs, batch.action) - targets).mean()
    grads = jax.grad(loss)(state.params.critic)
    step = lambda p, g: p - config.learning_rate * g / (jnp.abs(g) + 1e-8)
    assert_close(fitted, jax.tree.map(step, state.params.critic, grads), rtol=1e-4, atol=1e-6)


@every_file
def test_from_scratch_forgets_the_parameters(name):
    module, config, state, batch = example(name, from_scratch=True)
    targets = jnp.ones(80)
    other = jax.tree.map(lambda x: x + 1, state.params.critic)
    fits = [module.fit_critic(config, p, batch, targets, random.key(0)) for p in (state.params.critic, other)]
    assert_same(*fits)
    warm = replace(config, from_scratch=False)
    fits = [module.fit_critic(warm, p, batch, targets, random.key(0)) for p in (state.params.critic, other)]
    assert np.abs(fits[0][0][0] - fits[1][0][0]).max() > 0.5


def test_nfqca_ascends_the_value_of_its_actions():
    """The policy finds the maximum of a bowl, inside and at the bound."""
    for centre, expected in ((0.3, 0.3), (-1.7, -1.0)):
        weights, obs_dim = bowl("Pendulum-v1", [centre], [1.0])
        config = nfqca.Config(approximator="quadratic", fit_steps=500, learning_rate=1e-2)
        obs = random.normal(random.key(0), (100, obs_dim))
        start = nfqca.mlp_init(random.key(1), (obs_dim, 16, 1))
        params, loss = jax.jit(nfqca.fit_actor)(config, start, weights, obs, random.key(2))
        np.testing.assert_allclose(nfqca.actor(params, obs), expected, atol=0.03)
        np.testing.assert_allclose(loss, (expected - centre) ** 2, atol=0.05)


# Runs


@every_file
def test_train_equals_init_and_epochs(name):
    module, config = FAMILY[name], CONFIGS[name]
    state, metrics = exact_jit(module.init)(config, random.key(3)), []
    epoch = exact_jit(module.epoch)
    for _ in range(2):
        state, epoch_metrics = epoch(config, state)
        metrics.append(epoch_metrics)
    assert_same(
        (state, jax.tree.map(lambda *x: jnp.stack(x), *metrics)), exact_jit(module.train)(config, random.key(3))
    )
    assert metrics[-1].iteration == 4
    assert metrics[-1].step == 80


@every_file
def test_vmap_over_configs_and_seeds_equals_separate_runs(name):
    module = FAMILY[name]
    configs = [replace(CONFIGS[name], gamma=gamma) for gamma in (0.5, 0.99)]
    stacked = jax.tree.map(lambda *x: jnp.array(x), *configs)
    over_seeds = jax.vmap(module.train, in_axes=(None, 0))
    together = quick_jit(jax.vmap(over_seeds, in_axes=(0, None)))(stacked, jax.vmap(random.key)(jnp.arange(2)))
    for i, config in enumerate(configs):
        for seed in range(2):
            alone = quick_jit(module.train)(config, random.key(seed))
            run = jax.tree.map(lambda x, i=i, seed=seed: x[i, seed], together)
            assert_close(run[0].params.critic, alone[0].params.critic, rtol=1e-3, atol=1e-4)


@every_file
def test_stops_where_nothing_changes_any_more(monkeypatch, name):
    """With a contraction the change falls below any tolerance; the iterations stop there, and only there."""
    own = {"maximizer": "grid", "num_candidates": 21} if name == "fqi" else {}
    fields = {"env": "Cycle-test", "num_iterations": 200, "iterations_per_epoch": 50, **own}
    _, _, state = trained(monkeypatch, name, **fields, tolerance=1e-3)
    assert state.delta < 1e-3
    assert 3 < state.iteration < 60
    _, _, endless = trained(monkeypatch, name, **fields, tolerance=0.0)
    assert endless.iteration == 200


@pytest.mark.parametrize(("env", "name"), [("Table-test", "fqi"), *(("Swimmer-misc", name) for name in FAMILY)])
def test_trains_on(env, name):
    """Two actions in every file; `test_reproduce.py` has the other environments."""
    config = replace(CONFIGS[name], env=env, num_eval_episodes=1, **({"num_nodes": 8} if name == "soft_fqi" else {}))
    state, metrics = quick_jit(FAMILY[name].train)(config, random.key(0))
    assert metrics.eval_returns.shape == (2, 1)
    for x in jax.tree.leaves((metrics, state.params)):
        assert np.isfinite(x).all()


# Learning


LINEAR = {"approximator": "quadratic", "gamma": 0.9, "num_eval_episodes": 1, "ridge": 1e-8}
ENV = {dims: env for env, dims in lqr.ENVS.items()}


def write_noiseless(path, dims):
    """Base points without noise, which would blur the fit, where the best action is well within its bounds."""
    params, rng = lqr.system(dims), np.random.default_rng(dims)
    s, a = rng.uniform(-0.5, 0.5, size=(4000, dims)), rng.uniform(-0.2, 0.2, size=(4000, params.B.shape[1]))
    u = lqr.ACTION_BOUND * a
    reward = -np.einsum("ni,ij,nj->n", s, params.Q, s) - np.einsum("ni,ij,nj->n", u, params.R, u)
    np.savez(path, obs=s, action=a, reward=reward, next_obs=s @ params.A.T + u @ params.B.T, terminated=np.zeros(4000))


def riccati_of(weights, dims, params):
    """P and the offset of the value -(s^T P s) + offset that quadratic weights say, and the gain K."""
    n, m = params.B.shape
    form, (i, j) = np.zeros((1 + n + m, 1 + n + m)), np.triu_indices(1 + n + m)
    form[i, j] = np.asarray(weights, np.float64)
    form = (form + form.T) / 2
    units = np.diag([1.0] * n + [1 / lqr.ACTION_BOUND] * m)
    H = -units @ form[1:, 1:] @ units
    ss, sa, aa = H[:n, :n], H[:n, n:], H[n:, n:]
    return ss - sa @ np.linalg.solve(aa, sa.T), np.linalg.solve(aa, sa.T), form[0, 0]


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dims", [1, 2, 4])
@pytest.mark.parametrize("name", ["fqi", "soft_fqi"])
def test_recovers_the_riccati_matrix(tmp_path, name, dims):
    module, params, path = FAMILY[name], lqr.system(dims), tmp_path / "points.npz"
    params = params.replace(noise=0 * params.noise)
    write_noiseless(path, dims)
    own = {"beta": 0.2, "num_nodes": 24} if name == "soft_fqi" else {"maximizer_steps": 15}
    counts = {"num_iterations": 100, "iterations_per_epoch": 100}
    config = module.Config(env=ENV[dims], base_points=str(path), **(LINEAR | counts | own))
    state, _ = jax.jit(module.train)(config, random.key(0))
    solution = lqr.solve(params, 0.9, own.get("beta", 0.0))
    P, K, constant = riccati_of(state.params.critic, dims, params)
    assert relative(P, solution.P) < 1e-3
    assert relative(K, solution.K) < 3e-3
    # q's constant is the value's, one step on
    np.testing.assert_allclose(constant, 0.9 * solution.offset, atol=0.01)


@pytest.mark.parametrize("dims", [1, 4])
@pytest.mark.parametrize("name", ["fqi_amortized", "nfqca"])
def test_amortized_policies_come_close_to_the_best_linear_quadratic_cost(name, dims):
    module, params = FAMILY[name], lqr.system(dims)
    counts = {"num_iterations": 40, "iterations_per_epoch": 40, "fit_steps": 300}
    fields = LINEAR | counts | {"env": ENV[dims], "exploration_range": 0.3}
    config = module.Config(**fields)
    state, _ = jax.jit(module.train)(config, random.key(0))
    K = jnp.asarray(lqr.solve(params, 0.9).K)
    cost = lambda policy: jax.jit(lambda key: lqr.simulate(params, policy, 0.9, key).mean())(random.key(1))
    ratio = cost(lambda s: module.act(config, state.params, s)) / cost(lambda s: -K @ s)
    assert 1 < ratio < 1.05


QUICK = {"num_base_points": 10_000, "num_iterations": 20, "iterations_per_epoch": 20, "num_eval_episodes": 32}


def pendulum_return(module):
    config = module.Config(**QUICK, fit_steps=500)
    _, metrics = jax.jit(module.train)(config, random.key(0))
    return metrics.eval_returns[-1].mean()


@every_file
def test_learns_pendulum(name):
    assert pendulum_return(FAMILY[name]) > -300


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("fqi", "actions + size * direction", "actions - size * direction"),
        ("fqi_amortized", "batch.reward + config.gamma", "-batch.reward + config.gamma"),
        ("nfqca", "return -critic(", "return critic("),
        ("soft_fqi", "jax.nn.softmax(critic_at", "jax.nn.softmax(-critic_at"),
    ],
)
def test_a_broken_algorithm_does_not_learn_pendulum(tmp_path, name, old, new):
    assert not pendulum_return(load_broken(FAMILY[name], tmp_path, old, new)) > -600


# Mistakes


@pytest.mark.parametrize(
    ("name", "field", "changes"),
    [
        ("fqi", "num_base_points", {"num_base_points": 82}),
        ("fqi", "iterations_per_epoch", {"iterations_per_epoch": 3}),
        ("fqi", "maximizer", {"maximizer": "exhaustive"}),
        ("fqi", "maximizer", {"env": "CartPole-v1"}),
        ("fqi", "maximizer", {"maximizer": "milp"}),
        ("fqi", "num_candidates", {"maximizer": "grid", "num_candidates": 1000, "env": "Reacher-misc"}),
        ("fqi_amortized", "exact_fraction", {"exact_fraction": 1.5}),
        ("fqi_amortized", "exact_fraction", {"exact_fraction": -0.1}),
        ("nfqca", "env", {"env": "CartPole-v1"}),
        ("nfqca", "num_base_points", {"rounds": 3}),
        ("nfqca", "iterations_per_epoch", {"rounds": 4}),
        ("soft_fqi", "integral", {"env": "CartPole-v1", "integral": "dual"}),
        ("soft_fqi", "num_nodes", {"env": "Reacher-misc", "num_nodes": 1000}),
    ],
)
def test_a_mistake_names_its_field(name, field, changes):
    config = replace(CONFIGS[name], **changes)
    with pytest.raises(ValueError, match=f"^{field}={getattr(config, field)}: "):
        jax.eval_shape(FAMILY[name].init, config, random.key(0))


class Hexapod(Clock):
    """Six actions."""

    def action_space(self, params):
        return spaces.Box(-1.0, 1.0, (6,))


def test_a_grid_in_six_dimensions_is_refused():
    gymnax.register("Hexapod-test", functools.partial(Hexapod, 5, True))
    config = replace(CONFIGS["fqi"], env="Hexapod-test", maximizer="grid", num_candidates=8)
    with pytest.raises(ValueError, match=r"^num_candidates=8: .* 262144 actions"):
        jax.eval_shape(fqi.init, config, random.key(0))

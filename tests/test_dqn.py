"""DQN against hand-worked cases, fitted Q-iteration's target, and value iteration on random MDPs."""

import functools

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CONFIGS,
    Clock,
    assert_close,
    fast_jit,
    finite_differences,
    load_broken,
    np_adam,
    np_mlp,
    random_adam,
    random_layers,
    replace,
)
from flax import struct
from gymnax.environments import environment, spaces
from jax import lax, random

from amortax.algorithms import dqn, fqi

# Targets


def table_params(online, target):
    """A network without hidden layers whose values are those of a table `[states, actions]`, for one-hot states."""
    layers = lambda table: [(jnp.asarray(table, float), jnp.zeros(len(table[0])))]
    return dqn.Params(layers(online), layers(target))


def three_states():
    """From state 0 to 1, 2 and 1, the last of which terminates, with an observation that is NaN."""
    next_obs = jnp.eye(3)[jnp.array([1, 2, 1])].at[2].set(jnp.nan)
    action = jnp.array([[1.0, -1], [-1, 1], [1, -1]])
    return dqn.Transition(jnp.eye(3)[jnp.zeros(3, int)], action, jnp.array([1.0, 2, 3]), next_obs, jnp.array([0, 0, 1]))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("double", "expected"), [(False, [1 + 0.5 * 8, 2 + 0.5 * 9, 3]), (True, [1 + 0.5 * 4, 6.5, 3])]
)
def test_targets_by_hand_with_three_states(double, expected):
    """In state 1 the online network prefers action 0, worth 4 to the target network, whose own best is worth 8."""
    params = table_params([[0, 0], [3, 2], [5, 6]], [[0, 0], [4, 8], [7, 9]])
    config = dqn.Config(gamma=0.5, double=double)
    np.testing.assert_allclose(dqn.td_target(config, params, three_states()), expected)


@pytest.mark.quick
def test_the_target_is_that_of_exhaustive_fitted_q_iteration(monkeypatch):
    """Bitwise, on the same batch with the same Q-function; in fqi there is but one network."""
    monkeypatch.setattr(fqi, "critic", dqn.critic)
    config = dqn.Config(env="Acrobot-v1", gamma=0.9)
    layers = dqn.mlp_init(random.key(0), (6, 16, 16, 3))
    keys = random.split(random.key(1), 4)
    obs, next_obs = random.normal(keys[0], (2, 64, 6))
    action = dqn.warm_up(config, None, obs, keys[1])
    terminated = random.bernoulli(keys[2], 0.3, (64,))
    next_obs = jnp.where(terminated[:, None], jnp.nan, next_obs)
    batch = dqn.Transition(obs, action, random.normal(keys[3], (64,)), next_obs, terminated)
    fitted = fqi.Config(env="Acrobot-v1", gamma=0.9, maximizer="exhaustive")
    params = dqn.Params(layers, layers)
    assert len(np.unique(dqn.greedy(config, params, obs), axis=0)) > 1
    expected = fqi.td_target(fitted, fqi.Params(layers), batch, random.key(2))
    np.testing.assert_array_equal(dqn.td_target(config, params, batch), expected)
    np.testing.assert_array_equal(dqn.td_target(replace(config, double=False), params, batch), expected)


@pytest.mark.quick
def test_the_value_of_an_action_is_its_output():
    """Also where another action's value is infinite."""
    params = [(jnp.array([[1.0, jnp.inf, 3.0]]), jnp.zeros(3))]
    config = dqn.Config(env="Acrobot-v1")
    codes = dqn.encode(config, jnp.array([0, 2]))
    np.testing.assert_array_equal(codes, [[1, -1, -1], [-1, -1, 1]])
    np.testing.assert_array_equal(dqn.critic(config, params, jnp.ones((2, 1)), codes), [1, 3])
    assert dqn.act(config, dqn.Params(params, None), jnp.ones(1)) == 1


# The update against a case worked in NumPy, float64


def np_q(layers, obs, number):
    return np_mlp(layers, obs)[np.arange(len(obs)), number]


def np_target(config, params, obs, reward, terminated):
    chooser = params.critic if config.double else params.target_critic
    best = np_mlp(chooser, obs).argmax(axis=1)
    return reward + np.where(terminated == 1, 0, config.gamma * np_q(params.target_critic, obs, best))


def np_loss(config, error):
    huber = np.where(np.abs(error) < 1, 0.5 * error**2, np.abs(error) - 0.5)
    return (huber if config.loss == "huber" else error**2).mean()


def check_update(dqn, double=True, loss="huber", tau=0.3, count=3):
    """One update of the critic and, for a `count` that 3 divides, of the target."""
    rng = np.random.default_rng(0)
    config = dqn.Config("Acrobot-v1", double=double, loss=loss, learning_rate=0.01, gamma=0.9, tau=tau, target_period=3)
    params = dqn.Params(*(random_layers(rng, (6, 5), (5, 4), (4, 3)) for _ in range(2)))
    params = jax.tree.map(lambda x: x / 2, params)
    opt_state = dqn.OptState(random_adam(rng, config, params.critic))
    obs, next_obs, reward = rng.normal(size=(16, 6)), rng.normal(size=(16, 6)), rng.normal(size=16)
    number, terminated = rng.integers(3, size=16), (np.arange(16) % 4 == 0).astype(float)
    target = np_target(config, params, next_obs, reward, terminated)
    other = np_target(replace(config, double=not double), params, next_obs, reward, terminated)
    assert (target != other).any()
    errors = np.abs(np_q(params.critic, obs, number) - target)
    assert (errors < 1).any()
    assert (errors > 1).any()
    next_obs[terminated == 1] = np.nan
    batch = dqn.Transition(obs, 2 * np.eye(3)[number] - 1, reward, next_obs, terminated)
    with jax.enable_x64(True):
        got, got_opt_state, losses = jax.jit(dqn.update)(config, params, opt_state, batch, count)
    loss_of = lambda layers: np_loss(config, np_q(layers, obs, number) - target)
    critic, adam = np_adam(config, opt_state.critic[0], params.critic, finite_differences(loss_of, params.critic))
    assert_close(got.critic, critic, rtol=0, atol=1e-8)
    assert_close(got_opt_state.critic[0], adam, rtol=0, atol=1e-6)
    np.testing.assert_allclose(losses, [loss_of(params.critic), np_q(params.critic, obs, number).mean()], rtol=1e-9)
    moved = tau if count % 3 == 0 else 0
    expected = jax.tree.map(lambda x, y: moved * x + (1 - moved) * y, critic, params.target_critic)
    assert_close(got.target_critic, expected, rtol=0, atol=1e-8)


@pytest.mark.quick
@pytest.mark.parametrize(
    "case",
    [{}, {"double": False}, {"loss": "squared", "count": 2}, {"double": False, "loss": "squared", "tau": 1.0}],
    ids=["double", "plain", "squared", "copy"],
)
def test_update_equals_the_hand_worked_case(case):
    check_update(dqn, **case)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("jnp.where(batch.terminated, 0, next_q)", "next_q"),
        ("params.critic if config.double else params.target_critic", "params.critic"),
        ("critic(config, params.target_critic, batch.next_obs", "critic(config, params.critic, batch.next_obs"),
        ("jnp.argmax(q_values(config, critic_params", "jnp.argmin(q_values(config, critic_params"),
        ("params.target_critic, config.tau)", "params.target_critic, 1 - config.tau)"),
    ],
    ids=["no mask", "always double", "online value", "minimum", "tau"],
)
def test_the_hand_worked_case_catches(tmp_path, old, new):
    broken = load_broken(dqn, tmp_path, old, new)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_update(broken, double=False)


# Exploration


@pytest.mark.quick
def test_epsilon_falls_linearly_with_the_environment_steps():
    config = dqn.Config(epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=100.0)
    values = [float(dqn.epsilon_at(config, jnp.int32(step))) for step in (0, 25, 50, 100, 10_000)]
    np.testing.assert_allclose(values, [0.9, 0.7, 0.5, 0.1, 0.1], rtol=1e-5)


@pytest.mark.quick
def test_random_actions_are_as_many_as_epsilon_says():
    """A third of the random ones is the greedy one by chance."""
    config, obs = dqn.Config("Acrobot-v1"), jnp.ones((30_000, 1))
    params = dqn.Params([(jnp.array([[1.0, 3.0, 2.0]]), jnp.zeros(3))], None)
    for epsilon in (0.0, 0.3, 1.0):
        share = (dqn.explore(config, params, obs, random.key(0), epsilon) == 1).mean(axis=0)
        expected = np.array([epsilon / 3, 1 - 2 * epsilon / 3, epsilon / 3])
        np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / 30_000) * (epsilon > 0))


def test_collection_explores_by_the_schedule():
    """After `epsilon_steps` without noise, all stored actions are the greedy ones; before, hardly half of them."""
    config = replace(CONFIGS["dqn"], epsilon_end=0.0, epsilon_steps=1.0, num_steps=4, buffer_size=80)
    before = jax.jit(dqn.init)(config, random.key(0))
    greedy = lambda rows: np.asarray(dqn.greedy(config, before.params, rows[:, :4])) == rows[:, 4:6]
    after, _ = jax.jit(dqn.iteration)(config, before, 0)
    assert 0.2 < greedy(after.buffer[:64]).mean() < 0.8
    assert greedy(after.buffer[64:80]).all()
    config = replace(config, epsilon_end=1.0)
    after, _ = jax.jit(dqn.iteration)(config, before, 0)
    assert not greedy(after.buffer[64:80]).all()


# Value iteration on small random decision processes, whose states are one-hot vectors

STATES, ACTIONS, DISCOUNT = 6, 3, 0.8


def random_mdp(seed, deterministic):
    """Probabilities of the next state `[states, actions, states]`, rewards `[states, actions]`, ends `[states]`."""
    rng = np.random.default_rng(seed)
    probabilities, rewards = rng.dirichlet(np.full(STATES, 0.3), (STATES, ACTIONS)), rng.normal(size=(STATES, ACTIONS))
    if deterministic:
        probabilities = np.eye(STATES)[probabilities.argmax(axis=2)]
    return probabilities, rewards, np.arange(STATES) == 0  # to enter the first state is to terminate


def value_iteration(probabilities, rewards, ends):
    """Optimal action values `[states, actions]`."""
    q = np.zeros_like(rewards)
    for _ in range(300):
        q = rewards + DISCOUNT * probabilities @ np.where(ends, 0, q.max(axis=1))
    return q


@struct.dataclass
class Place(environment.EnvState):
    """A state of the process and the time."""

    place: jax.Array


class Mdp(Clock):
    """A random deterministic process that starts anywhere and is cut after a few steps."""

    def __init__(self, seed):
        super().__init__(5, False)
        self.next, self.rewards, self.ends = (jnp.asarray(x) for x in random_mdp(seed, deterministic=True))

    def observe(self, state):
        return jax.nn.one_hot(state.place, STATES), state

    def reset_env(self, key, params):
        return self.observe(Place(time=0, place=random.randint(key, (), 0, STATES)))

    def step_env(self, key, state, action, params):
        place = self.next[state.place, action].argmax()
        obs, new_state = self.observe(Place(time=state.time + 1, place=place))
        return obs, new_state, self.rewards[state.place, action], self.ends[place], {}

    def action_space(self, params):
        return spaces.Discrete(ACTIONS)


for seed in range(2):
    gymnax.register(f"Mdp{seed}-test", functools.partial(Mdp, seed))
TABULAR = {"hidden_sizes": (), "gamma": DISCOUNT}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_learns_the_values_of_value_iteration(seed, double):
    """A whole run; with the time limit as an end, or values beyond an end, it is off by a tenth and more."""
    config = dqn.Config(
        f"Mdp{seed}-test",
        **TABULAR,
        total_steps=5_000,
        steps_per_epoch=4_000,
        num_envs=4,
        utd_ratio=1.0,
        num_eval_episodes=1,
        double=double,
        target_period=20,
        tau=1.0,
        learning_rate=1e-2,
        epsilon_end=1.0,
    )
    state, _ = fast_jit(dqn.train)(config, random.key(0))
    expected = value_iteration(*random_mdp(seed, deterministic=True))
    np.testing.assert_allclose(dqn.q_values(config, state.params.critic, jnp.eye(STATES)), expected, atol=1e-3)
    policy = jax.vmap(lambda obs: dqn.act(config, state.params, obs))(jnp.eye(STATES))
    np.testing.assert_array_equal(policy, expected.argmax(axis=1))


@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_updates_find_the_values_of_a_random_process(loss):
    """Batches that hold all states and actions, with each next state as often as it is probable.

    Adam's steps shrink, since they keep their size where gradients vanish. Huber's loss would find medians instead of
    means where errors are larger than 1: rewards and values are a fifth of theirs.
    """
    probabilities, rewards, ends = random_mdp(0, deterministic=False)
    counts = np.round(40 * probabilities).astype(int)
    rewards = rewards / 5
    expected = value_iteration(counts / counts.sum(axis=2, keepdims=True), rewards, ends)
    s, a, next_s = (np.repeat(x.ravel(), counts.ravel()) for x in np.indices(counts.shape))
    config = dqn.Config("Acrobot-v1", **TABULAR, loss=loss, target_period=1, tau=0.2)
    eye = jnp.eye(STATES)
    batch = dqn.Transition(eye[s], dqn.encode(config, a), jnp.asarray(rewards[s, a]), eye[next_s], ends[next_s])
    layers = [(jnp.zeros((STATES, ACTIONS)), jnp.zeros(ACTIONS))]

    def step(carry, rate):
        *carry, _ = dqn.update(replace(config, learning_rate=rate), *carry, batch, 1)
        return tuple(carry), None

    start = dqn.Params(layers, layers), dqn.OptState(dqn.optimizer(config).init(layers))
    (params, _), _ = fast_jit(lambda *x: lax.scan(step, *x))(start, jnp.geomspace(3e-2, 1e-5, 2_000))
    np.testing.assert_allclose(dqn.q_values(config, params.critic, eye), expected, atol=1e-3)


@pytest.mark.slow
def test_balances_the_pole():
    """The mean of four seeds after 50,000 steps; random actions balance it for about 22 steps."""
    config = dqn.Config(num_eval_episodes=16, steps_per_epoch=49_000)
    train = jax.vmap(lambda key: dqn.train(config, key)[1].eval_returns.mean())
    assert fast_jit(train)(random.split(random.key(0), 4)).mean() >= 195

"""PPO: advantages by their definition, the clipped objective by hand, its first gradient, statistics, and learning."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from cases import (
    CONFIGS,
    assert_close,
    assert_same,
    fast_jit,
    finite_differences,
    load_broken,
    np_mlp,
    random_layers,
    replace,
)
from jax import random

from amortax.algorithms import ppo, reinforce

CONFIG = replace(CONFIGS["ppo"], num_steps=16, num_minibatches=4)
BOX = replace(CONFIG, env="Pendulum-v1")
both = pytest.mark.parametrize("config", [CONFIG, BOX], ids=["discrete", "box"])


@functools.cache
def start(config):
    return jax.jit(lambda key: ppo.init(config, key))(random.key(0))


@functools.cache
def rollout(config):
    """A state with statistics of 256 random observations, and the transitions of its policy."""
    state = start(config)
    stats = ppo.update_stats(state.params.obs_stats, 1 + 2 * random.normal(random.key(3), (256, state.obs.shape[1])))
    params = state.params._replace(obs_stats=stats)
    keys = random.split(random.key(1), config.num_steps)
    collect = jax.jit(lambda *x: ppo.rollout(config, params, ppo.explore, *x))
    return params, collect(state.env_state, state.obs, keys)[2]


# Advantages


def gae(config, reward, value, next_value, terminated, truncated):
    """Equation 16 as a sum over the errors that follow a step in its episode."""
    expected = np.zeros_like(reward)
    for t, env in np.ndindex(*reward.shape):
        for k in range(t, len(reward)):
            after = 0 if terminated[k, env] else config.gamma * next_value[k, env]
            error = reward[k, env] + after - value[k, env]
            expected[t, env] += (config.gamma * config.gae_lambda) ** (k - t) * error
            if terminated[k, env] or truncated[k, env]:
                break
    return expected


@pytest.mark.quick
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_advantages_equal_their_definition(gae_lambda):
    """With terminations, truncations and both at once; the value after a termination is NaN."""
    config, rng = replace(CONFIG, gae_lambda=gae_lambda, gamma=0.9), np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, 14, 6))
    terminated, truncated = rng.random((2, 14, 6)) < 0.2
    for combination in (terminated & truncated, terminated & ~truncated, ~terminated & truncated):
        assert combination.any()
    expected = gae(config, reward, value, next_value, terminated, truncated)
    steps = types.SimpleNamespace(reward=jnp.asarray(reward), terminated=terminated, truncated=truncated)
    seen = jnp.asarray(np.where(terminated, np.nan, next_value))
    np.testing.assert_allclose(ppo.advantages(config, steps, jnp.asarray(value), seen), expected, rtol=1e-4, atol=1e-5)
    if gae_lambda == 0:  # temporal differences
        np.testing.assert_allclose(expected, reward + 0.9 * np.where(terminated, 0, next_value) - value)


@pytest.mark.quick
@pytest.mark.parametrize(("env", "last"), [("ClockTruncated-test", 1 + 0.9 * 7), ("ClockTerminated-test", 1)])
def test_targets_go_on_after_a_time_limit_and_not_after_a_termination(env, last):
    """Reward 1 a step and a value of 7; Monte Carlo, so that a target sums the rewards to the end of its episode."""
    config = replace(CONFIG, env=env, gae_lambda=1.0, gamma=0.9, normalize_obs=False)
    params = ppo.init(config, random.key(0)).params
    params = params._replace(critic=[(jnp.zeros((1, 1)), jnp.full(1, 7.0))])
    env_state, obs = jax.vmap(ppo.make_env(env).reset)(random.split(random.key(0), 4))
    horizon = 50 if env == "ClockTruncated-test" else 10
    env_state = env_state.replace(time=jnp.full(4, horizon - 2))
    _, _, steps = ppo.rollout(config, params, ppo.explore, env_state, obs, random.split(random.key(1), 4))
    batch, value = ppo.make_batch(config, params, steps)
    assert value == 7
    expected = [1 + 0.9 * last, last, 1 + 0.9 * (1 + 0.9 * 7), 1 + 0.9 * 7]
    np.testing.assert_allclose(
        batch.target.reshape(4, 4), np.repeat(np.reshape(expected, (4, 1)), 4, axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(batch.advantage, batch.target - 7, rtol=1e-4, atol=1e-5)


# The clipped objective


@pytest.mark.quick
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 2.0])
@pytest.mark.parametrize("advantage", [-3.0, 3.0])
def test_the_clip_by_hand(ratio, advantage):
    """A ratio beyond the clip has no gradient where moving on would gain, and all of it where it would lose.

    One state, two actions with logits (x, 0), action 0: d log d / dx = 1 - d = 1 / 2 at x = 0.
    """
    config = replace(CONFIG, clip=0.2)
    actor = ppo.Actor([(jnp.zeros((1, 2)), jnp.zeros(2))], jnp.zeros(2))
    batch = ppo.Batch(jnp.ones((1, 1)), jnp.array([[1.0, -1]]), jnp.log(jnp.array([0.5 / ratio])), None, None)
    grads, (loss, entropy, kl, clip_fraction) = jax.grad(ppo.actor_loss, has_aux=True)(
        actor, config, batch, jnp.array([advantage])
    )
    gains = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    clipped = min(max(ratio, 0.8), 1.2) if gains else ratio
    np.testing.assert_allclose(loss, -clipped * advantage, rtol=1e-5)
    np.testing.assert_allclose(grads.network[0][1][0], 0 if gains else -ratio * advantage / 2, rtol=1e-5)
    np.testing.assert_allclose([entropy, kl], [np.log(2), ratio - 1 - np.log(ratio)], rtol=1e-4)
    assert clip_fraction == (ratio in (0.5, 2.0))


@both
def test_the_first_gradient_is_that_of_reinforce(config):
    """Before the policy has moved all ratios are 1: on a minibatch with the same advantages, to 1e-6."""
    params, steps = rollout(config)
    batch, _ = ppo.make_batch(config, params, steps)
    rows = random.permutation(random.key(5), len(batch.target))[:16]
    batch = jax.tree.map(lambda x: x[rows], batch)
    other = types.SimpleNamespace(obs=batch.obs, action=batch.action)
    config = replace(config, entropy_coef=0.0)
    ours, (loss, _, kl, clip_fraction) = jax.grad(ppo.actor_loss, has_aux=True)(
        params.actor, config, batch, batch.advantage
    )
    theirs, _ = jax.grad(reinforce.actor_loss, has_aux=True)(
        reinforce.Actor(*params.actor), reinforce.Config(config.env), other, batch.advantage
    )
    assert max(np.abs(x).max() for x in jax.tree.leaves(theirs)) > 1e-2
    assert_close(tuple(ours), tuple(theirs), rtol=0, atol=1e-6)
    np.testing.assert_allclose([loss, kl, clip_fraction], [-batch.advantage.mean(), 0, 0], rtol=1e-5, atol=1e-6)


# Log-probabilities and statistics


def np_log_prob(config, actor, obs, action):
    x = np_mlp(actor.network, obs)
    if config.env == "CartPole-v1":
        return scipy.special.log_softmax(x, axis=-1)[action > 0].reshape(action.shape[:-1])
    return scipy.stats.norm.logpdf(action, x, np.exp(actor.log_std)).sum(axis=-1)


@both
def test_log_probabilities_are_those_of_the_actions_taken(config):
    """By SciPy, with the statistics at the time of acting; continuous actions are those before clipping."""
    params, steps = rollout(replace(config, initial_std=2.0))
    batch, _ = ppo.make_batch(config, params, steps)
    mean, var = (np.float64(x) for x in params.obs_stats[1:])
    obs = np.clip((np.float64(steps.obs) - mean) / np.sqrt(var + 1e-8), -10, 10)
    expected = np_log_prob(config, jax.tree.map(np.float64, params.actor), obs, np.float64(steps.action))
    np.testing.assert_allclose(batch.log_prob, expected.ravel(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.obs, obs.reshape(len(batch.obs), -1), rtol=1e-4, atol=1e-5)
    assert config is CONFIG or np.abs(steps.action).max() > 1.5


@pytest.mark.quick
def test_running_statistics_equal_those_of_all_observations():
    """In NumPy, float64; batches of different sizes, far from zero; the first replaces what there was."""
    rng = np.random.default_rng(0)
    batches = [rng.normal([50, -1, 0], [1, 0.1, 30], size=(*shape, 3)) for shape in ((8, 4), (1, 2), (64, 8), (3, 1))]
    stats = ppo.ObsStats(jnp.zeros(()), jnp.zeros(3), jnp.ones(3))
    for i, batch in enumerate(batches):
        stats = ppo.update_stats(stats, jnp.asarray(batch))
        seen = np.concatenate([x.reshape(-1, 3) for x in batches[: i + 1]])
        assert stats.count == len(seen)
        np.testing.assert_allclose(stats.mean, seen.mean(axis=0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(stats.var, seen.var(axis=0), rtol=1e-3)
    np.testing.assert_allclose(
        ppo.normalize(stats, jnp.asarray(seen)), np.clip((seen - seen.mean(0)) / seen.std(0), -10, 10), atol=1e-3
    )
    assert ppo.normalize(None, batches[0]) is batches[0]


def test_statistics_are_those_of_all_iterations_and_reach_every_policy():
    """They grow after the updates of an iteration, belong to the parameters, and evaluation leaves them alone."""
    state, seen = start(CONFIG), []
    one = jax.jit(lambda state: ppo.iteration(CONFIG, state))
    for _ in range(2):
        _, key_rollout, _ = random.split(state.key, 3)
        keys = random.split(key_rollout, CONFIG.num_steps)
        steps = ppo.rollout(CONFIG, state.params, ppo.explore, state.env_state, state.obs, keys)[2]
        seen.append(np.float64(steps.obs).reshape(-1, 4))
        state, _ = one(state)
    stats, seen = state.params.obs_stats, np.concatenate(seen)
    np.testing.assert_allclose(stats.mean, seen.mean(axis=0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stats.var, seen.var(axis=0), rtol=1e-3)
    plain, raw = state.params._replace(obs_stats=None), 3 * random.normal(random.key(4), (50, 4))
    scaled = ppo.normalize(stats, raw)
    assert (ppo.greedy(CONFIG, plain, raw) != ppo.greedy(CONFIG, plain, scaled)).any()
    assert_same(ppo.greedy(CONFIG, state.params, raw), ppo.greedy(CONFIG, plain, scaled))
    args = random.key(0)
    assert_same(ppo.explore(CONFIG, state.params, raw, args), ppo.explore(CONFIG, plain, scaled, args))
    np.testing.assert_array_equal(
        jax.vmap(lambda x: ppo.act(CONFIG, state.params, x))(raw), ppo.greedy(CONFIG, plain, scaled).argmax(axis=1)
    )
    without = ppo.init(replace(CONFIG, normalize_obs=False), random.key(0)).params
    assert without.obs_stats is None


# Updates


def np_adam(gradient, adam, rate):
    """The step of Adam with an epsilon of 1e-5, after the gradient is clipped to norm 0.5."""
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda x: x * min(1, 0.5 / norm), gradient)
    t = int(adam.count) + 1
    mu = jax.tree.map(lambda m, g: (0.9 * m + 0.1 * g) / (1 - 0.9**t), adam.mu, gradient)
    nu = jax.tree.map(lambda n, g: (0.999 * n + 0.001 * g**2) / (1 - 0.999**t), adam.nu, gradient)
    return jax.tree.map(lambda m, n: -rate * m / (np.sqrt(n) + 1e-5), mu, nu), norm


def hand_case(ppo, env, scale):
    """Config, parameters, Adam's state after three of 1,600 updates, and a minibatch, in float64."""
    rng = np.random.default_rng(0)
    fields = {"actor_learning_rate": 1e-3, "critic_learning_rate": 3e-3, "learning_rate_decay": 0.8}
    fields |= {"entropy_coef": 0.1, "clip": 0.2, "max_grad_norm": 0.5, "update_epochs": 10}
    config = ppo.Config(
        env, total_steps=4000, num_envs=5, num_steps=20, steps_per_epoch=1000, num_minibatches=4, **fields
    )
    n = 2 if env == "CartPole-v1" else 1
    actor = ppo.Actor(random_layers(rng, (3, 5), (5, n)), np.full(n, -0.7))
    params = ppo.Params(actor, random_layers(rng, (3, 5), (5, 1)), None)
    adams = [
        optimizer_state(ppo, config, rate, tree, rng)
        for rate, tree in ((config.actor_learning_rate, actor), (config.critic_learning_rate, params.critic))
    ]
    obs, advantage = rng.normal(size=(32, 3)), 2 + rng.normal(size=32)
    action = 2 * np.eye(2)[rng.integers(2, size=32)] - 1 if n == 2 else 1.5 * rng.normal(size=(32, 1))
    log_prob = np_log_prob(config, actor, obs, action) + rng.normal(scale=0.3, size=32)
    target = scale * rng.normal(size=32)
    return config, params, ppo.OptState(*adams), ppo.Batch(obs, action, log_prob, advantage, target)


def optimizer_state(ppo, config, rate, params, rng):
    clip, (adam, schedule) = ppo.optimizer(config, rate).init(params)
    mu = jax.tree.map(lambda x: rng.normal(size=np.shape(x)), params)
    nu = jax.tree.map(lambda x: rng.uniform(0.1, 1, size=np.shape(x)), params)
    count = np.int32(3)
    return clip, (adam._replace(count=count, mu=mu, nu=nu), schedule._replace(count=count))


def np_entropy(config, actor, obs):
    if config.env == "CartPole-v1":
        log_p = scipy.special.log_softmax(np_mlp(actor.network, obs), axis=-1)
        return -(np.exp(log_p) * log_p).sum(axis=1).mean()
    return (actor.log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()


def check_update(ppo, env="CartPole-v1", scale=1.0):
    """One update of both networks against NumPy, by finite differences."""
    config, params, opt_state, batch = hand_case(ppo, env, scale)
    with jax.enable_x64(True):
        got, _, losses = jax.jit(ppo.update)(config, params, opt_state, batch)
    normalized = (batch.advantage - batch.advantage.mean()) / batch.advantage.std(ddof=1)

    def surrogate(actor):
        ratio = np.exp(np_log_prob(config, actor, batch.obs, batch.action) - batch.log_prob)
        return -np.minimum(ratio * normalized, np.clip(ratio, 0.8, 1.2) * normalized).mean()

    entropy = lambda actor: np_entropy(config, actor, batch.obs)
    value_loss = lambda critic: np.mean((np_mlp(critic, batch.obs)[:, 0] - batch.target) ** 2)
    actor_gradient = finite_differences(lambda x: surrogate(x) - 0.1 * entropy(x), params.actor)
    critic_gradient = finite_differences(value_loss, params.critic)
    left = 1 - 0.8 * 3 / 1600  # of the learning rates
    actor_step, _ = np_adam(actor_gradient, opt_state.actor[1][0], left * config.actor_learning_rate)
    critic_step, norm = np_adam(critic_gradient, opt_state.critic[1][0], left * config.critic_learning_rate)
    steps = jax.tree.map(lambda x, y: np.asarray(x) - y, got[:2], params[:2])
    assert_close(steps, (actor_step, critic_step), rtol=0, atol=1e-9)
    np.testing.assert_allclose(losses[:3], [value_loss(params.critic), surrogate(params.actor), entropy(params.actor)])
    return norm


@pytest.mark.quick
@pytest.mark.parametrize(("env", "scale"), [("CartPole-v1", 10.0), ("Pendulum-v1", 0.1)])
def test_update_equals_the_hand_worked_case(env, scale):
    assert check_update(ppo, env, scale) > 0.5  # clipped


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("loss = -jnp.minimum(", "loss = -jnp.maximum("),
        ("loss - config.entropy_coef * entropy", "loss + config.entropy_coef * entropy"),
        ("eps=1e-5", "eps=1e-8"),
        (".std(ddof=1)", ".std()"),
        ("optax.chain(optax.clip_by_global_norm(config.max_grad_norm), ", "optax.chain(optax.identity(), "),
        ("1 - config.learning_rate_decay * count", "1 - count"),
        ("log_ratio, entropy = log_prob - batch.log_prob", "log_ratio, entropy = batch.log_prob - log_prob"),
    ],
    ids=["minimum", "entropy", "epsilon", "deviation", "norm", "decay", "ratio"],
)
def test_the_hand_worked_case_catches(tmp_path, old, new):
    broken = load_broken(ppo, tmp_path, old, new)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_update(broken)


def test_every_pass_goes_through_all_transitions_once(monkeypatch):
    """In another order each time."""
    state = start(CONFIG)
    n = CONFIG.num_envs * CONFIG.num_steps

    def numbered(config, params, transitions):
        return ppo.Batch(*jnp.tile(jnp.arange(n, dtype=float), (5, 1))), 0.0

    def note(config, params, seen, batch):
        return params, jnp.concatenate([seen[1:], batch.target[None]]), (0.0,) * 5

    monkeypatch.setattr(ppo, "make_batch", numbered)
    monkeypatch.setattr(ppo, "update", note)
    state, _ = ppo.iteration(CONFIG, state._replace(opt_state=jnp.zeros((8, n // 4))))
    first, second = state.opt_state.reshape(2, n)
    for order in (first, second):
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
        assert (order != np.arange(n)).any()
    assert (first != second).any()


@pytest.mark.quick
def test_learning_rates_fall_to_their_share_over_the_run():
    """The steps of Adam under a constant gradient, at the start, half-way and before the last update."""
    config = replace(CONFIG, learning_rate_decay=1.0)
    total = 1 * 1 * 8  # epochs, iterations of each, updates of an iteration
    for decay, count in ((1.0, 0), (1.0, total // 2), (1.0, total - 1), (0.0, total - 1)):
        optimizer = ppo.optimizer(replace(config, learning_rate_decay=decay), 0.01)
        clip, (adam, schedule) = optimizer.init(jnp.ones(()))
        opt_state = clip, (adam, schedule._replace(count=jnp.int32(count)))
        step, _ = optimizer.update(jnp.full((), 0.3), opt_state)
        np.testing.assert_allclose(step, -0.01 * (1 - decay * count / total), rtol=1e-3)


# Learning


def test_balances_the_pole():
    """In 30,000 steps, a fifth of what REINFORCE takes."""
    config = ppo.Config(
        total_steps=30_000,
        steps_per_epoch=30_000,
        num_steps=128,
        num_minibatches=8,
        actor_learning_rate=1e-3,
        critic_learning_rate=3e-3,
        gamma=0.99,
        gae_lambda=0.95,
    )
    assert fast_jit(ppo.train)(config, random.key(0))[1].eval_returns[-1].mean() >= 475

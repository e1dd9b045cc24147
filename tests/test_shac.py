"""SHAC: its gradient against SVG's, closed forms and finite differences, its targets against their definition."""

import functools
import types

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Clock, assert_close, assert_same, fast_jit, replace
from flax import struct
from gymnax.environments import environment
from jax import random
from jax.flatten_util import ravel_pytree
from test_cli import fails

from amortax.algorithms import shac, svg
from amortax.common import lqr

CONFIG = shac.Config(
    total_steps=64,
    steps_per_epoch=32,
    num_envs=4,
    num_steps=5,
    num_eval_episodes=2,
    critic_steps=3,
    batch_size=8,
    hidden_sizes=(8, 8),
)


@struct.dataclass
class Position(environment.EnvState):
    """A point on a line."""

    position: jax.Array


class Drift(Clock):
    """A point that the action moves, with reward -position^2; ends at random, with a NaN, or after `horizon` steps."""

    _supports_transition_gradients = True

    def reset_env(self, key, params):
        state = Position(time=0, position=random.normal(key))
        return jnp.array([state.position]), state

    def step_env(self, key, state, action, params):
        key_end, key_noise = random.split(key)
        position = 0.9 * state.position + 0.5 * action[0] + 0.1 * random.normal(key_noise)
        terminated = jnp.array(self.terminates) & random.bernoulli(key_end, 0.3)
        obs = jnp.where(terminated, jnp.nan, jnp.array([position]))
        obs, state = self._apply_transition_gradient_policy(obs, Position(time=state.time + 1, position=position))
        return obs, state, -jnp.square(position), terminated, {}


class Drifting(Drift):
    """With terminations and a time limit."""

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=self.horizon)


gymnax.register("Drifting-test", functools.partial(Drifting, 4, True))
quiet = lqr.system(2).replace(noise=np.zeros((2, 2)), max_steps_in_episode=10**6)
gymnax.register("QuietLQR-test", functools.partial(lqr.LQR, quiet))


@pytest.fixture
def float64():
    """Double precision; what was traced and cached in the other precision is forgotten."""
    for enabled in (True, False):
        jax.config.update("jax_enable_x64", enabled)
        jax.clear_caches()
        for module in (shac, svg):
            module.make_env.cache_clear()
        svg.reward_gradient.cache_clear()
        if enabled:
            yield


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


@functools.partial(jax.jit, static_argnames="num_steps")
def window(config, key, num_steps):
    """Arguments of `discounted_return` for a window from the first states of episodes."""
    state = shac.init(config, key)
    return state.params, state.env_state, state.obs, random.split(random.fold_in(key, 1), num_steps)


def objective(config, params, *window):
    """`((objective, rollout), gradient)`."""
    return jax.value_and_grad(shac.discounted_return, has_aux=True)(params.actor, config, params, *window)


# The gradient


@pytest.mark.parametrize(("env", "horizon"), [("LQR-v0", 20), ("Pendulum-v1", 200)])
def test_a_window_of_an_episode_without_a_critic_has_the_gradient_of_svg(float64, env, horizon):
    """To rounding, from the same first states with the same noise; the last step is the time limit."""
    config, key = replace(CONFIG, env=env, gamma=0.95), random.key(0)
    params, env_state, obs, keys = window(config, key, horizon)
    params = params._replace(target_critic=zeros(params.target_critic))
    (total, (*_, transitions)), ours = jax.jit(objective)(config, params, env_state, obs, keys)
    assert transitions.truncated[-1].all()
    svg_config = svg.Config(env=env, gamma=0.95, num_rollouts=4, horizon=horizon, hidden_sizes=(8, 8))
    starts = jax.vmap(lambda *x: ravel_pytree(x)[0])(obs, env_state)
    keys_policy, keys_env = jnp.unstack(jax.vmap(random.split)(keys), axis=1)
    policy = jax.vmap(lambda key: random.normal(key, (4, 1)))(keys_policy)
    env = jax.vmap(lambda key: jax.vmap(lambda key: random.split(key)[0])(random.split(key, 4)))(keys_env)
    noise = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), svg.Noise(policy, env))
    expected, gradient = jax.jit(svg.policy_gradient)(params.actor, svg_config, starts, noise)
    np.testing.assert_allclose(total, expected, rtol=1e-12)
    assert np.linalg.norm(flat(gradient)) > 0.1
    np.testing.assert_allclose(flat(ours), flat(gradient), rtol=1e-10)


def test_every_window_has_the_analytic_gradient_of_linear_quadratic_regulation(float64, monkeypatch):
    """The policy's exact value is the critic, there is no noise, and states are so small that tanh is the identity.

    The discounted sum of the gradients of all windows of an episode is then that of its return, whatever their length.
    """
    gamma, bound, num_steps = 0.9, lqr.ACTION_BOUND, 120
    monkeypatch.setattr(shac, "LOG_STD_MIN", -50.0)
    monkeypatch.setattr(shac, "critic", lambda config, P, obs: -((obs @ P) * obs).sum(axis=-1))
    A, B, Q, R = (np.asarray(x, np.float64) for x in (quiet.A, quiet.B, quiet.Q, quiet.R))
    K = np.array([[-0.3, -0.2]])  # a = K s, not the optimal gain
    P, closed = np.zeros((2, 2)), A + B @ K
    for _ in range(2_000):
        P = Q + K.T @ R @ K + gamma * closed.T @ P @ closed
    config = replace(CONFIG, env="QuietLQR-test", gamma=gamma, hidden_sizes=())
    _, env_state, obs, _ = window(config, random.key(0), 1)
    obs = 1e-4 * obs
    env_state = env_state.replace(position=obs)
    weights = np.concatenate([K.T / bound, np.zeros((2, 1))], axis=1)
    params = shac.Params([(jnp.asarray(weights), jnp.array([0.0, -50.0]))], None, jnp.asarray(P))
    visited, s = np.zeros((2, 2)), np.asarray(obs, np.float64)
    for t in range(num_steps):
        visited += gamma**t * s.T @ s / len(s)
        s = s @ closed.T
    analytic = bound * (-2 * (R @ K + gamma * B.T @ P @ closed) @ visited).T
    gradient = jax.jit(objective)
    for h in (1, 4, 30, num_steps):
        total, (start, start_obs) = 0.0, (env_state, obs)
        for i in range(num_steps // h):
            keys = random.split(random.key(i), h)
            (_, (start, start_obs, _)), ((grads, _),) = gradient(config, params, start, start_obs, keys)
            total += gamma ** (i * h) * grads[:, :1]
        np.testing.assert_allclose(total, analytic, rtol=1e-5)


def test_gradient_across_the_ends_of_episodes_equals_finite_differences(float64):
    """Of a plain loop: each episode has a discount of its own, and a value at its time limit or the window's end."""
    config = replace(CONFIG, env="Drifting-test", num_envs=8, gamma=0.9)
    params, *start = window(config, random.key(3), 11)
    w, unravel = ravel_pytree(params.actor)
    rollout = jax.jit(lambda w: shac.rollout(config, params._replace(actor=unravel(w)), shac.explore, *start)[2])

    def expected(w):
        steps = jax.tree.map(np.asarray, rollout(w))
        value = np.asarray(shac.critic(config, params.target_critic, steps.next_obs))
        total = 0.0
        for i in range(8):
            discount = 1.0
            for t in range(11):
                total += discount * steps.reward[t, i]
                discount *= config.gamma
                if not steps.terminated[t, i] and (steps.truncated[t, i] or t == 10):
                    total += discount * value[t, i]
                if steps.terminated[t, i] or steps.truncated[t, i]:
                    discount = 1.0
        return total / 8

    (total, (*_, steps)), gradient = jax.jit(objective)(config, params, *start)
    ends = [(~steps.terminated & steps.truncated), (steps.terminated & ~steps.truncated)]
    assert all(end[:-1].any() for end in (*ends, steps.terminated & steps.truncated))
    assert np.isnan(steps.next_obs).any()
    np.testing.assert_allclose(total, expected(w), rtol=1e-10)
    for direction in np.random.default_rng(0).normal(size=(3, len(w))):
        eps = 1e-6
        difference = (expected(w + eps * direction) - expected(w - eps * direction)) / (2 * eps)
        np.testing.assert_allclose(flat(gradient) @ direction, difference, rtol=1e-5)


# The targets


@pytest.mark.quick
@pytest.mark.parametrize("td_lambda", [0.0, 0.7, 1.0])
def test_targets_equal_their_definition(td_lambda):
    """The average of n-step returns, n-th weight (1 - lambda) lambda^(n-1), the last one with all that remains."""
    rng, (length, num_envs), gamma = np.random.default_rng(0), (12, 6), 0.9
    reward, next_value = rng.normal(size=(2, length, num_envs))
    terminated = rng.random((length, num_envs)) < 0.15
    truncated = rng.random((length, num_envs)) < 0.15
    assert (terminated & truncated).any()
    seen = np.where(terminated, np.nan, next_value)  # nothing after a termination may matter
    steps = types.SimpleNamespace(reward=jnp.asarray(reward), terminated=terminated, truncated=truncated)
    ours = shac.td_targets(replace(CONFIG, gamma=gamma), steps, jnp.asarray(seen), td_lambda)
    for i in range(num_envs):
        for t in range(length):
            returns, total = [], 0.0
            for k in range(t, length):
                total += gamma ** (k - t) * reward[k, i]
                value = 0 if terminated[k, i] else next_value[k, i]
                returns.append(total + gamma ** (k - t + 1) * value)
                if terminated[k, i] or truncated[k, i]:
                    break
            weights = (1 - td_lambda) * td_lambda ** np.arange(len(returns))
            weights[-1] = td_lambda ** (len(returns) - 1)
            np.testing.assert_allclose(ours[t, i], weights @ returns, rtol=1e-4, atol=1e-5)


# The update


def test_update_is_one_step_of_the_policy_then_some_of_the_critic():
    """Equal to the gradients applied one by one; all targets come from the target critic before; windows continue."""
    config = replace(CONFIG, max_grad_norm=0.1, tau=0.3, td_lambda=0.8)
    params, env_state, obs, keys = window(config, random.key(0), config.num_steps)
    params = params._replace(target_critic=jax.tree.map(lambda x: x + 0.1, params.critic))
    opt_state = jax.jit(lambda key: shac.init(config, key).opt_state)(random.key(0))
    index = random.randint(random.key(2), (3, 8), 0, 20)
    update = jax.jit(functools.partial(shac.update, config))
    new, new_opt_state, *after, losses = update(params, opt_state, env_state, obs, keys, index)
    (total, (*rolled, steps)), grads = jax.jit(objective)(config, params, env_state, obs, keys)
    assert_close(after, rolled, rtol=1e-5, atol=1e-6)
    assert (after[0].time == config.num_steps).all()
    norm = np.linalg.norm(flat(grads))
    descent = jax.tree.map(lambda x: -x * 0.1 / norm, grads)
    actor, _ = shac.apply_grads(config.actor_learning_rate, descent, params.actor, opt_state.actor)
    target = shac.td_targets(config, steps, shac.critic(config, params.target_critic, steps.next_obs), 0.8).ravel()
    batch, critic, adam, critic_losses = steps.obs.reshape(20, -1), params.critic, opt_state.critic, []
    for rows in index:
        loss, grads = jax.value_and_grad(shac.critic_loss)(critic, config, batch[rows], target[rows])
        critic, adam = shac.apply_grads(config.critic_learning_rate, grads, critic, adam)
        critic_losses.append(loss)
    target_critic = jax.tree.map(lambda x, y: 0.3 * x + 0.7 * y, critic, params.target_critic)
    assert_close(new, shac.Params(actor, critic, target_critic), rtol=1e-4, atol=1e-6)
    # Adam's first moment is a tenth of the first gradient that it sees
    np.testing.assert_allclose(10 * flat(new_opt_state.actor[0].mu), flat(descent), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(losses, [np.mean(critic_losses), target.mean(), total, norm, 1], rtol=1e-4)


def test_gradients_that_are_not_finite_are_left_out_and_counted():
    params, env_state, obs, keys = window(CONFIG, random.key(0), 5)
    opt_state = jax.jit(lambda key: shac.init(CONFIG, key).opt_state)(random.key(0))
    env_state = env_state.replace(theta=env_state.theta.at[0].set(jnp.inf))
    update = jax.jit(functools.partial(shac.update, CONFIG))
    after, opt_after, *_, losses = update(params, opt_state, env_state, obs, keys, jnp.zeros((3, 8), int))
    assert not np.isfinite(losses[3])
    assert losses[4]
    assert_same(after.actor, params.actor)
    np.testing.assert_array_equal(flat(opt_after.actor[0].mu), 0)


# Mistakes


@pytest.mark.quick
@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--env Table-test", "--env Table-test: must have transition gradients"),
        ("--env CartPole-v1", "--env CartPole-v1: must have actions in a Box of floats with finite bounds"),
        ("--td-lambda 1.5", "--td-lambda 1.5: must be in [0, 1]"),
        ("--num-steps 0", "--num-steps 0: must be from 1 to 2147483647"),
    ],
)
def test_mistakes_get_one_line(monkeypatch, capsys, tmp_path, flags, error):
    assert fails(monkeypatch, capsys, tmp_path, *flags.split(), module=shac).startswith(f"error: {error}")
    assert list(tmp_path.iterdir()) == []


# Learning


def test_swings_the_pendulum_up():
    """The best possible is -137.

    Windows are so short that the swing needs the value after them: without its gradient it is below -900.
    """
    config = shac.Config(num_steps=8, total_steps=150_000, steps_per_epoch=150_000)
    _, metrics = fast_jit(shac.train)(config, random.key(0))
    assert metrics.eval_returns.mean() > -200

"""What the tests of several algorithms share: configurations, comparisons, environments, updates in NumPy."""

import functools
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from gymnax.environments import environment, spaces
from jax import random

from amortax.algorithms import (
    ddpg,
    dqn,
    fqi,
    fqi_amortized,
    nfqca,
    ppo,
    reinforce,
    sac,
    sac_value,
    shac,
    soft_fqi,
    svg,
    svg_model,
    td3,
)

# 16 updates an epoch, two epochs, and a buffer that wraps around; most tests share its compiled programs
SMALL = {
    "total_steps": 96,
    "learning_starts": 64,
    "steps_per_epoch": 16,
    "num_envs": 4,
    "num_eval_episodes": 2,
    "buffer_size": 72,
    "batch_size": 16,
    "hidden_sizes": (8, 8),
}
SMALL_FITTED = {
    "num_base_points": 80,
    "num_iterations": 4,
    "iterations_per_epoch": 2,
    "num_envs": 20,
    "num_eval_episodes": 2,
    "hidden_sizes": (8, 8),
    "fit_steps": 3,
    "batch_size": 16,
}
SMALL_SVG = {
    "num_iterations": 4,
    "iterations_per_epoch": 2,
    "num_rollouts": 3,
    "horizon": 4,
    "num_eval_episodes": 2,
    "hidden_sizes": (8, 8),
}
SMALL_SVG_MODEL = SMALL_SVG | {
    "learning_starts": 40,
    "num_envs": 4,
    "buffer_size": 44,
    "batch_size": 8,
    "model_steps": 2,
}
SMALL_REINFORCE = {
    "total_steps": 64,
    "steps_per_epoch": 32,
    "num_envs": 4,
    "num_steps": 4,
    "num_eval_episodes": 2,
    "critic_steps": 2,
    "batch_size": 8,
    "hidden_sizes": (8, 8),
}
SMALL_PPO = {
    "total_steps": 64,
    "steps_per_epoch": 32,
    "num_envs": 4,
    "num_steps": 4,
    "num_eval_episodes": 2,
    "update_epochs": 2,
    "num_minibatches": 2,
    "normalize_obs": True,
    "hidden_sizes": (8, 8),
}
ACTOR_CRITIC = {"ddpg": ddpg, "td3": td3, "sac_value": sac_value, "sac": sac}
FITTED = {"fqi": fqi, "fqi_amortized": fqi_amortized, "nfqca": nfqca, "soft_fqi": soft_fqi}
ALGORITHMS = ACTOR_CRITIC | FITTED | {"dqn": dqn, "reinforce": reinforce, "ppo": ppo}
ALGORITHMS |= {"svg": svg, "svg_model": svg_model, "shac": shac}
CONFIGS = {
    "ddpg": ddpg.Config(**SMALL, target_period=8),
    "td3": td3.Config(**SMALL),
    "sac_value": sac_value.Config(**SMALL),
    "sac": sac.Config(**SMALL),
    "fqi": fqi.Config(**SMALL_FITTED, maximizer_steps=2),
    "fqi_amortized": fqi_amortized.Config(**SMALL_FITTED, maximizer_steps=2),
    "nfqca": nfqca.Config(**SMALL_FITTED, rounds=2),
    "soft_fqi": soft_fqi.Config(**SMALL_FITTED, integral="importance", num_samples=4),
    "dqn": dqn.Config(**SMALL, num_steps=1, utd_ratio=1.0, target_period=8, epsilon_steps=80.0),
    "reinforce": reinforce.Config(**SMALL_REINFORCE),
    "ppo": ppo.Config(**SMALL_PPO),
    "svg": svg.Config(**SMALL_SVG),
    "svg_model": svg_model.Config(**SMALL_SVG_MODEL),
    "shac": shac.Config(**SMALL_REINFORCE),
}
# for what two programs must have bitwise the same: without fusions, XLA's sums depend on what stands around them
FUSIONS = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else {}
exact_jit = functools.partial(jax.jit, compiler_options=FUSIONS)
# for programs that learn, which run for longer than it takes to optimize them
OPTIMIZED = {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}
fast_jit = functools.partial(jax.jit, compiler_options=OPTIMIZED)


@functools.cache
def programs(name, jit=jax.jit):
    """`init`, `epoch` (the state is donated) and `train` of an algorithm, each jitted once for all tests."""
    module = ALGORITHMS[name]
    return SimpleNamespace(init=jit(module.init), epoch=jit(module.epoch, donate_argnums=1), train=jit(module.train))


def slow(*values):
    """Cases of one parameter, for the slow tests alone."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def replace(config, **fields):
    return type(config)(**{**vars(config), **fields})


def load_broken(module, tmp_path, old, new):
    """An algorithm with the one place where `old` stands in its source replaced by `new`."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} no longer stands exactly once in {module.__file__}"
    path = tmp_path / "broken.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("broken", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(tree):
    """Leaves as NumPy arrays, random keys by their data."""
    arrays = jax.tree.leaves(tree)
    return [np.asarray(random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in arrays]


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(leaves(tree), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(tree, other, **tolerance):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(leaves(tree), leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


# Environments with known answers


class Clock(environment.Environment):
    """Reward 1 at every step; observes time / horizon; at the horizon it ends by itself or by the time limit."""

    def __init__(self, horizon, terminates):
        self.horizon, self.terminates = horizon, terminates

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=10**6 if self.terminates else self.horizon)

    def observe_time(self, state):
        return jnp.array([state.time / self.horizon])

    def reset_env(self, key, params):
        state = environment.EnvState(time=0)
        return self.observe_time(state), state

    def step_env(self, key, state, action, params):
        state = environment.EnvState(time=state.time + 1)
        terminated = jnp.array(self.terminates) & (state.time >= self.horizon)
        return self.observe_time(state), state, jnp.array(1.0), terminated, {}

    def action_space(self, params):
        return spaces.Box(-1.0, 1.0, (1,))


class Table(Clock):
    """Whole numbers `[2, 3]` for observations, actions `[2, 1]` in an asymmetric box, and their sum for a reward."""

    def observe_time(self, state):
        return state.time + jnp.arange(6, dtype=jnp.int32).reshape(2, 3)

    def step_env(self, key, state, action, params):
        obs, state, _, terminated, info = super().step_env(key, state, action, params)
        return obs, state, action.sum(), terminated, info

    def action_space(self, params):
        return spaces.Box(jnp.array([[-1.0], [0.5]]), jnp.array([[3.0], [2.5]]), (2, 1))


class Walk(Clock):
    """Reward 1 a step for a random number of steps: the end comes by itself in one step of ten, else at the horizon."""

    def step_env(self, key, state, action, params):
        obs, state, _, _, info = super().step_env(key, state, action, params)
        return obs, state, 1.0 + action[0], random.bernoulli(key, 0.1), info


class Bandit(Clock):
    """One step an episode, and reward -a^2: the Boltzmann policy of a low temperature alpha is N(0, alpha / 2)."""

    def step_env(self, key, state, action, params):
        obs, state, _, terminated, info = super().step_env(key, state, action, params)
        return obs, state, -jnp.square(action).sum(), terminated, info


class Wrapped(Clock):
    """Observations are shifted by 100, as by a wrapper that does not know of their copy in `info`."""

    def reset(self, key, params=None):
        obs, state = super().reset(key, params)
        return obs + 100, state

    def step(self, key, state, action, params=None):
        obs, *rest = super().step(key, state, action, params)
        return obs + 100, *rest


@struct.dataclass
class StateWithNothing(environment.EnvState):
    """Arrays without elements, as physics engines have them."""

    nothing: jax.Array
    pairs: jax.Array


class Empty(Clock):
    """A state with arrays of no elements."""

    def reset_env(self, key, params):
        state = StateWithNothing(time=0, nothing=jnp.zeros(0), pairs=jnp.zeros((2, 0), jnp.int32))
        return self.observe_time(state), state

    def step_env(self, key, state, action, params):
        state = state.replace(time=state.time + 1)
        return self.observe_time(state), state, -jnp.square(action).sum(), jnp.array(False), {}


class Faulty(Clock):
    """At the horizon observation and reward become what they are given as; a termination if it `terminates`."""

    _supports_transition_gradients = True

    def __init__(self, horizon, terminates, obs=jnp.nan, reward=1.0):
        super().__init__(horizon, terminates)
        self.obs, self.reward = obs, reward

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=2 * self.horizon)

    def step_env(self, key, state, action, params):
        obs, state, reward, terminated, info = super().step_env(key, state, action, params)
        at_end = state.time >= self.horizon
        reward = jnp.where(at_end, self.reward, reward - jnp.square(obs - action).sum())
        return jnp.where(at_end, self.obs, obs), state, reward, terminated, info


class FaultyDiscrete(Faulty):
    """The same, with two actions."""

    def action_space(self, params):
        return spaces.Discrete(2)


class Unbounded(Clock):
    """Actions without bounds."""

    def action_space(self, params):
        return spaces.Box(-jnp.inf, jnp.inf, (1,))


for name, env_class, horizon, terminates in (
    ("ClockTruncated-test", Clock, 50, False),
    ("ClockTerminated-test", Clock, 10, True),
    ("Table-test", Table, 5, False),
    ("Walk-test", Walk, 12, False),
    ("Bandit-test", Bandit, 1, True),
    ("Wrapped-test", Wrapped, 5, False),
    ("Empty-test", Empty, 7, False),
    ("Unbounded-test", Unbounded, 5, False),
):
    gymnax.register(name, functools.partial(env_class, horizon, terminates))
gymnax.register("LastObsNaN-test", functools.partial(Faulty, 3, True))
gymnax.register("LastObsNaNDiscrete-test", functools.partial(FaultyDiscrete, 3, True))
gymnax.register("ObsNaN-test", functools.partial(Faulty, 3, False))
gymnax.register("RewardNaN-test", functools.partial(Faulty, 3, False, obs=1.0, reward=jnp.nan))


# Updates in NumPy, float64


def silu(x):
    return x / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def np_mlp(layers, x, activation=silu):
    for w, b in layers[:-1]:
        x = activation(x @ w + b)
    return x @ layers[-1][0] + layers[-1][1]


def np_critic(layers, obs, action, activation=silu):
    return np_mlp(layers, np.concatenate([obs, action], axis=1), activation)[:, 0]


def np_critics(critics, obs, action):
    return [np_critic([(w[i], b[i]) for w, b in critics], obs, action) for i in range(2)]


def finite_differences(loss, params, eps=1e-6):
    """Gradient of `loss(params)` by central differences."""
    params = jax.tree.map(np.array, params)
    gradient = jax.tree.map(np.zeros_like, params)
    for x, g in zip(jax.tree.leaves(params), jax.tree.leaves(gradient), strict=True):
        for i in np.ndindex(x.shape):
            x0 = x[i]
            x[i] = x0 + eps
            above = loss(params)
            x[i] = x0 - eps
            g[i] = (above - loss(params)) / (2 * eps)
            x[i] = x0
    return gradient


def np_adam(config, adam, params, gradient):
    """One step of Adam: `(params, adam)`."""
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, adam.mu, gradient)
    nu = jax.tree.map(lambda n, g: 0.999 * n + 0.001 * g**2, adam.nu, gradient)
    t = int(adam.count) + 1

    def step(p, m, n):
        return p - config.learning_rate * (m / (1 - 0.9**t)) / (np.sqrt(n / (1 - 0.999**t)) + 1e-8)

    return jax.tree.map(step, params, mu, nu), adam._replace(count=adam.count + 1, mu=mu, nu=nu)


def random_layers(rng, *shapes):
    """Weights of the given shapes and biases, float64; leading axes are those of an ensemble."""
    return [(rng.normal(size=s), 0.3 * rng.normal(size=(*s[:-2], s[-1]))) for s in shapes]


def random_adam(rng, config, params):
    """Adam's state after three steps, so that the size of the next gradient counts, and not its sign alone."""
    first, *rest = optax.adam(config.learning_rate).init(params)
    mu = jax.tree.map(lambda x: rng.normal(size=np.shape(x)), params)
    nu = jax.tree.map(lambda x: rng.uniform(0.1, 1, size=np.shape(x)), params)
    return (first._replace(count=np.int32(3), mu=mu, nu=nu), *rest)


def random_batch(rng, transition_class):
    """Eight transitions with observations in R^3 and actions in R^2; one of four terminates, its last observation NaN.

    A target that is right does not let it through.
    """
    terminated = (np.arange(8) % 4 == 0).astype(float)
    next_obs = np.where(terminated[:, None] == 1, np.nan, rng.normal(size=(8, 3)))
    return transition_class(
        obs=rng.normal(size=(8, 3)),
        action=rng.uniform(-1, 1, size=(8, 2)),
        reward=rng.normal(size=8),
        next_obs=next_obs,
        terminated=terminated,
    )

"""Fitted Q-iteration (FQI) with explicit optimization: a solver maximizes the Q-function over actions in each target.

A set of transitions, the base points, replaces the environment. Each iteration applies the Bellman optimality operator
to the Q-function at the base points, with `maximize` as the maximum, and fits a new Q-function to the result.

    take base points B = {(s, a, r, s', terminated)}, by default collected with uniformly random actions
    initialize critic q
    repeat until delta < tolerance or num_iterations iterations:
        every num_iterations / rounds iterations: add to B with a = maximize(q(s, .)) and exploration
        for each base point: y = r + gamma * (1 - terminated) * q(s', maximize(q(s', .)))
        q_new <- minimize mean (q_new(s, a) - y)^2 over B, from the parameters of q or from scratch
        delta <- mean (q_new(s, a~) - q(s, a~))^2 over the states of B with uniformly random actions a~
        q <- q_new
    act by maximize(q(s, .))

Sources: Ernst, Geurts, Wehenkel, "Tree-Based Batch Mode Reinforcement Learning" (JMLR 6, 2005), section 3.1;
Riedmiller, "Neural Fitted Q Iteration" (ECML 2005), section 3, also for the growing batch; Antos, Munos, Szepesvari,
"Fitted Q-iteration in continuous action-space MDPs" (NIPS 2007). For the maximizer `cem`: Rubinstein, Kroese, "The
Cross-Entropy Method" (2004).

Differences from the papers:
- Targets bootstrap through time limits, from the last observation before the reset.
- delta is a mean over random actions, since a sum over all actions is not defined where they are continuous.
- Actions are scaled to [-1, 1]; Discrete ones are coded as vectors of -1 with a 1 in the action's place.
"""

import dataclasses
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random

CHUNK = 1024  # states whose maximizers are computed at once, which bounds the memory
MAX_GRID = 100_000  # points of a grid over actions

Count = Annotated[int, "from 1 to 2147483647"]  # a plain int may be 0 or negative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields set shapes and loop lengths; the others can be traced, vmapped and swept.

    Base points are rounded up to whole steps of num_envs environments in each round, iterations to whole epochs.
    """

    env: str = jax.tree.static(default="Pendulum-v1")  # gymnax environment, bounded continuous or Discrete actions
    num_base_points: Count = jax.tree.static(default=20_000)  # transitions to collect, in all rounds
    rounds: Count = jax.tree.static(default=1)  # collections of base points: the first random, the others by the policy
    num_trials: Count = jax.tree.static(default=32)  # episodes after an epoch that choose the best policy of all rounds
    num_iterations: Count = jax.tree.static(default=50)  # fits of the critic, at most
    iterations_per_epoch: Count = jax.tree.static(default=10)  # fits between evaluations
    num_envs: Count = jax.tree.static(default=100)  # environments stepped in parallel
    num_eval_episodes: Count = jax.tree.static(default=128)  # greedy episodes per evaluation
    approximator: Literal["mlp", "quadratic"] = jax.tree.static(default="mlp")  # network, or quadratic in (s, a)
    hidden_sizes: tuple[Count, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    activation: Literal["relu", "silu", "elu", "tanh"] = jax.tree.static(default="silu")  # of the hidden layers
    fit_steps: Count = jax.tree.static(default=1_000)  # Adam steps per fit
    batch_size: Count = jax.tree.static(default=256)  # base points per Adam step, or all where there are no more
    from_scratch: bool = jax.tree.static(default=False)  # start each fit from new random weights
    # gradient, lbfgs, cem, grid or milp for a Box, exhaustive for Discrete actions, or your own solver module:function
    maximizer: str = jax.tree.static(default="gradient")
    num_candidates: Count = jax.tree.static(default=4)  # starting points, samples of cem, or grid points per dimension
    maximizer_steps: Count = jax.tree.static(default=10)  # iterations of gradient, lbfgs and cem
    exploration_range: Annotated[float, "in (0, 1]"] = 1.0  # random actions of base points lie in [-range, range]
    # after the first round: standard deviation of Gaussian exploration, or probability of a random Discrete action
    exploration_noise: Annotated[float, ">= 0"] = 0.3
    learning_rate: Annotated[float, "> 0"] = 1e-3  # Adam's step size
    gamma: Annotated[float, "in [0, 1]"] = 0.97  # discount per environment step
    ridge: Annotated[float, ">= 0"] = 1e-6  # penalty on the squared weights of the quadratic fit
    tolerance: Annotated[float, ">= 0"] = 1e-9  # stop when the critic's mean squared change is smaller


class Transition(NamedTuple):
    """One environment step, or a batch of them."""

    obs: jax.Array  # [..., obs_dim]
    action: jax.Array  # [..., action_dim], in [-1, 1]
    reward: jax.Array  # [...]
    next_obs: jax.Array  # [..., obs_dim], before any reset
    terminated: jax.Array  # [...], 0 at a time limit


class Params(NamedTuple):
    """Everything learned."""

    critic: Any


class State(NamedTuple):
    """Everything carried from one iteration to the next."""

    params: Params  # those of the best policy so far, if rounds > 1; within an epoch, those of the last iteration
    latest: Any  # those of the last iteration, if rounds > 1
    base_points: Transition  # leading axis [num_base_points], see `repeat`
    step: jax.Array  # [] int32, environment steps so far
    epoch: jax.Array  # [] int32, epochs so far
    iteration: jax.Array  # [] int32, iterations so far
    delta: jax.Array  # [], mean squared change of the critic in the last iteration
    score: jax.Array  # [], mean return of the best policy in its trials
    losses: Any  # (critic_loss, q_value) after the last iteration
    key: jax.Array  # [] random key of the training
    key_eval: jax.Array  # [] random key of the evaluations, so that their number does not change the training


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps so far
    eval_returns: jax.Array  # [num_eval_episodes], undiscounted, greedy policy
    critic_loss: jax.Array  # [], mean squared error to the targets of the last iteration
    q_value: jax.Array  # [], mean on the base points
    iteration: jax.Array  # [] int32, iterations so far
    delta: jax.Array  # [], mean squared change of the critic in the last iteration


# Networks


def mlp_init(key, sizes):
    """Layers `[(weights [n, m], biases [m]), ...]`, LeCun normal weights and zero biases."""
    keys = random.split(key, len(sizes) - 1)
    normal = jax.nn.initializers.lecun_normal()
    return [(normal(k, (n, m)), jnp.zeros(m)) for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def mlp(config, params, x):
    """Multilayer perceptron: `[..., n]` to `[..., m]`."""
    activation = getattr(jax.nn, config.activation)
    for w, b in params[:-1]:
        x = activation(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def quadratic_features(x):
    """All monomials of degree two or less: `[..., n]` to `[..., (n + 1) * (n + 2) / 2]`."""
    x = jnp.concatenate([jnp.ones((*x.shape[:-1], 1)), x], axis=-1)
    i, j = np.triu_indices(x.shape[-1])
    return x[..., i] * x[..., j]


def critic_init(config, key):
    """Random weights of the network, or zeros for the quadratic."""
    n = make_env(config.env).obs_dim + make_env(config.env).action_dim
    if config.approximator == "quadratic":
        return jnp.zeros((n + 1) * (n + 2) // 2)
    return mlp_init(key, (n, *config.hidden_sizes, 1))


def critic(config, params, obs, action):
    """Action value: `obs [..., obs_dim]`, `action [..., action_dim]` to `[...]`."""
    x = jnp.concatenate([obs, action], axis=-1)
    return quadratic_features(x) @ params if config.approximator == "quadratic" else mlp(config, params, x)[..., 0]


# Learning


def td_target(config, params, batch, key):
    """Bellman optimality operator `[batch]`: the value of the maximizer's next action."""
    next_action = maximize(config, params.critic, batch.next_obs, key)
    next_q = critic(config, params.critic, batch.next_obs, next_action)
    return batch.reward + config.gamma * jnp.where(batch.terminated, 0, next_q)


def maximize(config, critic_params, obs, key):
    """Actions `[..., action_dim]` of highest value at `obs [..., obs_dim]`; all states share the random candidates."""
    env, n, num_steps = make_env(config.env), config.num_candidates, config.maximizer_steps
    starts = random.uniform(key, (n, env.action_dim), minval=-1, maxval=1)

    def solve(obs):
        q = functools.partial(critic, config, critic_params, obs)
        match config.maximizer:
            case "gradient":
                return gradient_ascent(q, starts, num_steps)
            case "lbfgs":
                return lbfgs(q, starts, num_steps)
            case "cem":
                return cross_entropy(q, key, env.action_dim, n, num_steps)
            case "grid":
                return grid(q, env.action_dim, n)
            case "exhaustive":
                return exhaustive(q, 2 * jnp.eye(env.action_dim) - 1)
        return import_solver(config.maximizer)(q, config, critic_params, obs, key)

    actions = lax.map(solve, obs.reshape(-1, obs.shape[-1]), batch_size=CHUNK)
    return actions.reshape(*obs.shape[:-1], -1)


def gradient_ascent(q, starts, num_steps):
    """Maximize `q: action -> value` by projected gradient ascent from `starts [n, action_dim]` in shrinking steps."""

    def step(actions, size):
        direction = jax.vmap(jax.grad(q))(actions)
        direction /= jnp.linalg.norm(direction, axis=1, keepdims=True) + 1e-12
        return jnp.clip(actions + size * direction, -1, 1), None

    return exhaustive(q, lax.scan(step, starts, jnp.geomspace(0.5, 0.01, num_steps))[0])


def lbfgs(q, starts, num_steps):
    """Maximize `q` from `starts [n, action_dim]` by L-BFGS over angles, without bounds, whose sines are the actions."""
    # steps of 1, 1/2, 1/4 ...: under vmap, optax's default would copy the critic's weights for every start
    search = optax.scale_by_backtracking_linesearch(8, decrease_factor=0.5, increase_factor=jnp.inf)
    solver = optax.lbfgs(linesearch=search)
    loss = lambda u: -q(jnp.sin(u))

    def step(carry, _):
        u, opt_state = carry
        value, grad = jax.value_and_grad(loss)(u)
        updates, opt_state = solver.update(grad, opt_state, u, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(u, updates), opt_state), None

    def ascend(u):
        (u, _), _ = lax.scan(step, (u, solver.init(u)), length=num_steps)
        return jnp.sin(u)

    return exhaustive(q, jax.vmap(ascend)(jnp.arcsin(starts)))


def cross_entropy(q, key, action_dim, num_samples, num_steps):
    """Maximize `q` by a Gaussian that is fitted again and again to the best quarter of its samples."""

    def step(carry, key):
        mean, std, best = carry
        actions = jnp.clip(mean + std * random.normal(key, (num_samples, action_dim)), -1, 1)
        actions = jnp.concatenate([best[None], actions])
        elite = actions[lax.top_k(jax.vmap(q)(actions), max(2, num_samples // 4))[1]]
        return (elite.mean(axis=0), elite.std(axis=0), elite[0]), None

    zero = jnp.zeros(action_dim)
    return lax.scan(step, (zero, zero + 0.7, zero), random.split(key, num_steps))[0][2]


def grid(q, action_dim, num_points):
    """Maximize `q` over `num_points` evenly spaced points per dimension, bounds included."""
    axes = jnp.meshgrid(*[jnp.linspace(-1, 1, num_points)] * action_dim, indexing="ij")
    return exhaustive(q, jnp.stack(axes, axis=-1).reshape(-1, action_dim))


def exhaustive(q, actions):
    """Maximize `q` over `actions [n, action_dim]`."""
    return actions[jnp.argmax(jax.vmap(q)(actions))]


@functools.cache
def import_solver(name):
    """A solver `(q, config, critic_params, obs, key) -> action` by `module:function`, also from the current folder."""
    module, _, function = ("amortax.common.milp:maximize" if name == "milp" else name).partition(":")
    sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), function)


def critic_loss(critic_params, config, batch, target):
    """Mean squared error to `target [batch]`, and the mean value: `(loss, q_value)`."""
    q = critic(config, critic_params, batch.obs, batch.action)
    return jnp.square(q - target).mean(), q.mean()


def optimizer(config):
    """Adam; gradient clipping or a schedule, in updates of the parameters in question, goes here."""
    return optax.adam(config.learning_rate)


def apply_grads(config, grads, params, opt_state):
    """One step of the optimizer: `(params, opt_state)`."""
    updates, opt_state = optimizer(config).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def fit(config, loss, params, data, key):
    """New `params` after `fit_steps` steps on `loss(params, rows)`, each with `batch_size` random rows of `data`."""
    n = len(jax.tree.leaves(data)[0])

    def step(carry, key):
        params, opt_state = carry
        index = random.randint(key, (config.batch_size,), 0, n)
        rows = jax.tree.map(lambda x: x[index], data) if config.batch_size < n else data
        return apply_grads(config, jax.grad(loss)(params, rows), params, opt_state), None

    return lax.scan(step, (params, optimizer(config).init(params)), random.split(key, config.fit_steps))[0][0]


def fit_quadratic(config, batch, target):
    """Ridge regression of `target` on quadratic features scaled to mean square 1, in closed form."""
    x = quadratic_features(jnp.concatenate([batch.obs, batch.action], axis=1))
    scale = jnp.sqrt(jnp.square(x).mean(axis=0)) + 1e-6
    x = jnp.concatenate([x / scale, jnp.sqrt(len(x) * config.ridge) * jnp.eye(len(scale))])
    y = jnp.concatenate([target, jnp.zeros(len(scale))])
    return jnp.linalg.lstsq(x, y, rcond=1e-6)[0] / scale  # by SVD: float32 has too few digits for x.T @ x


def fit_critic(config, params, batch, target, key):
    """New parameters of the critic."""
    if config.approximator == "quadratic":
        return fit_quadratic(config, batch, target)
    key, key_init = random.split(key)
    params = critic_init(config, key_init) if config.from_scratch else params
    inputs = jnp.abs(jnp.concatenate([batch.obs, batch.action], axis=1)).max(axis=0)
    scale = jnp.where(inputs > 0, inputs, 1)  # of what the fitted network takes, in [-1, 1]
    loss = lambda params, rows: critic_loss(scale_inputs(params, 1 / scale), config, *rows)[0]
    return scale_inputs(fit(config, loss, scale_inputs(params, scale), (batch, target), key), 1 / scale)


def scale_inputs(layers, factors):
    """The layers of the network `x -> network(factors * x)`."""
    (w, b), *others = layers
    return [(w * factors[:, None], b), *others]


# Policies


def greedy(config, params, obs):
    """The maximizer's actions: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return maximize(config, params.critic, obs, random.key(0))


def explore(config, params, obs, key):
    """Greedy actions with Gaussian noise, or epsilon-greedy where they are Discrete."""
    action = greedy(config, params, obs)
    if make_env(config.env).discrete:
        key, key_random = random.split(key)
        is_random = random.bernoulli(key, config.exploration_noise, (*obs.shape[:-1], 1))
        return jnp.where(is_random, random_policy(config, params, obs, key_random), action)
    return project(config, action + config.exploration_noise * random.normal(key, action.shape))


def random_policy(config, params, obs, key):
    """Uniformly random actions within `exploration_range`."""
    shape, bound = (*obs.shape[:-1], make_env(config.env).action_dim), config.exploration_range
    return project(config, random.uniform(key, shape, minval=-bound, maxval=bound))


def project(config, action):
    """Project onto the action set: `[..., action_dim]` clipped to [-1, 1], or the code of the largest coordinate."""
    if make_env(config.env).discrete:
        return 2 * jax.nn.one_hot(jnp.argmax(action, axis=-1), action.shape[-1]) - 1
    return jnp.clip(action, -1, 1)


def act(config, params, obs):
    """Greedy action in the environment's units and shape, for one of its observations."""
    env = make_env(config.env)
    return env.rescale(greedy(config, params, env.flatten(obs)))


# Environment


class Env(NamedTuple):
    """An environment as pure functions, with observations `[obs_dim]` and actions `[action_dim]` in [-1, 1].

    Discrete actions are coded as vectors of -1 with a 1 in the action's place.
    Where an episode has ended, `step` gives as `obs` the first of a new one, and as `next_obs` its last.
    """

    obs_dim: int
    action_dim: int
    discrete: bool
    max_steps: int  # bound of evaluation episodes
    flatten: Callable  # observation of any shape and type -> the same as floats [obs_dim], one-hot if Discrete
    reset: Callable  # key -> (env_state, obs)
    step: Callable  # (env_state, action, key) -> (env_state, obs, reward, next_obs, terminated, truncated)
    rescale: Callable  # action -> the nearest admissible one in the environment's bounds and shape


@functools.cache
def make_env(name):
    """The gymnax environment `name`; ValueError unless its actions are discrete, or bounded and continuous."""
    with jax.ensure_compile_time_eval():
        env, env_params = gymnax.make(name)
        space = env.action_space(env_params)
        discrete = hasattr(space, "n")
        low, high = (np.full(space.shape, getattr(space, bound, np.nan), np.float32) for bound in ("low", "high"))
        max_steps = max(10_000, getattr(env_params, "max_steps_in_episode", 0))  # there may be no time limit
    fits = jnp.issubdtype(space.dtype, jnp.floating) and (np.abs([low, high]) < 1e38).all()  # finite also high - low
    if not discrete and not fits:
        raise ValueError(f"env={name}: must have Discrete actions or actions in a Box of floats with finite bounds")

    def flatten(obs):
        one_of_n = jnp.ndim(obs) == 0 and jnp.issubdtype(jnp.result_type(obs), jnp.integer)
        return jax.nn.one_hot(obs, env.observation_space(env_params).n) if one_of_n else jnp.ravel(obs).astype(float)

    def rescale(action):
        if discrete:
            return jnp.argmax(action)
        return low + (jnp.clip(action, -1, 1).reshape(low.shape) + 1) / 2 * (high - low)

    def reset(key):
        obs, env_state = env.reset(key, env_params)
        return env_state, flatten(obs)

    def step(env_state, action, key):
        obs, env_state, reward, terminated, truncated, info = env.step(key, env_state, rescale(action), env_params)
        # wrappers often transform `obs` alone, so the copy in `info` is read only where there is no other
        next_obs = jnp.where(terminated | truncated, flatten(info["final_observation"]), flatten(obs))
        return env_state, flatten(obs), reward, next_obs, terminated, truncated

    obs_dim, action_dim = jax.eval_shape(reset, random.key(0))[1].size, int(space.n) if discrete else low.size
    return Env(obs_dim, action_dim, discrete, max_steps, flatten, reset, step, rescale)


def rollout(config, params, policy, env_state, obs, keys):
    """Step all environments once per key: `(env_state, obs, Transition [len(keys), num_envs])`."""
    env_step = jax.vmap(make_env(config.env).step)

    def step(carry, key):
        env_state, obs = carry
        key_policy, key_env = random.split(key)
        action = policy(config, params, obs, key_policy)
        keys_env = random.split(key_env, len(obs))
        env_state, new_obs, reward, next_obs, terminated, _ = env_step(env_state, action, keys_env)
        return (env_state, new_obs), Transition(obs, action, reward, next_obs, terminated)

    (env_state, obs), transitions = lax.scan(step, (env_state, obs), keys)
    return env_state, obs, transitions


# Base points


def collect(config, params, policy, num_steps, key):
    """`num_steps` steps of new environments with `policy`, in random order: `Transition [num_steps * num_envs]`."""
    key_reset, key_rollout, key_order = random.split(key, 3)
    env_state, obs = jax.vmap(make_env(config.env).reset)(random.split(key_reset, config.num_envs))
    _, _, batch = rollout(config, params, policy, env_state, obs, random.split(key_rollout, num_steps))
    order = random.permutation(key_order, batch.reward.size)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[order], batch)


def prepare(base_points):
    """Base points as floats, with zeros for a last observation that is NaN."""
    # targets ignore it where the episode has terminated, but a policy may be fitted there
    ignored = (base_points.terminated > 0)[..., None] & ~jnp.isfinite(base_points.next_obs)
    base_points = base_points._replace(next_obs=jnp.where(ignored, 0, base_points.next_obs))
    return Transition(*(jnp.array(x, float) for x in base_points))  # copies, since the state may be donated


def repeat(base_points, num, capacity):
    """The first `num` base points, again and again up to `capacity`, in the place of those that are still to come."""
    return jax.tree.map(lambda x: x[jnp.arange(capacity) % num], base_points)


def steps_per_round(config):
    """The fewest steps of all environments that make a round of base points."""
    return math.ceil(config.num_base_points / (config.rounds * config.num_envs))


def add_round(config, state):
    """Collect one more round of base points with the exploring policy: `State`."""
    key, key_collect = random.split(state.key)
    new = prepare(collect(config, state.params, explore, steps_per_round(config), key_collect))
    insert = lambda old, new: lax.dynamic_update_slice_in_dim(old, new, state.step, axis=0)
    points, step = jax.tree.map(insert, state.base_points, new), state.step + len(new.reward)
    points = repeat(points, step, len(points.reward))
    return state._replace(base_points=points, step=step, delta=jnp.array(jnp.inf, float), key=key)


# Training


def iteration(config, state):
    """One fit of the critic to its own targets: `State`."""
    key, key_target, key_critic, key_delta = random.split(state.key, 4)
    batch, old = state.base_points, state.params
    target = td_target(config, old, batch, key_target)
    critic_params = fit_critic(config, old.critic, batch, target, key_critic)
    action = project(config, random.uniform(key_delta, batch.action.shape, minval=-1, maxval=1))
    q, q_new = (critic(config, params, batch.obs, action) for params in (old.critic, critic_params))
    losses = critic_loss(critic_params, config, batch, target)
    params, delta = Params(critic_params), jnp.square(q_new - q).mean()
    return state._replace(params=params, iteration=state.iteration + 1, delta=delta, losses=losses, key=key)


def evaluate(config, params, key):
    """Undiscounted returns `[num_eval_episodes]` of the greedy policy on new episodes."""
    env = make_env(config.env)

    def step(carry):
        env_state, obs, total, steps_left, key = carry
        key, key_step = random.split(key)
        env_state, obs, reward, _, terminated, truncated = env.step(env_state, greedy(config, params, obs), key_step)
        return env_state, obs, total + reward, jnp.where(terminated | truncated, 0, steps_left - 1), key

    def episode(key):
        key, key_reset = random.split(key)
        carry = (*env.reset(key_reset), jnp.zeros(()), env.max_steps, key)
        return lax.while_loop(lambda carry: carry[3] > 0, step, carry)[2]

    return jax.vmap(episode)(random.split(key, config.num_eval_episodes))


RULES = {
    "finite": np.isfinite,
    "> 0": lambda x: np.isfinite(x) & (x > 0),
    ">= 0": lambda x: np.isfinite(x) & (x >= 0),
    "in (0, 1]": lambda x: (x > 0) & (x <= 1),
    "in [0, 1]": lambda x: (x >= 0) & (x <= 1),
    "from 1 to 2147483647": lambda x: (x >= 1) & (x < 2**31),
}


def check(config, **counts):
    """ValueError `field=value: must be RULE` where a number breaks its field's rule; traced ones cannot be checked."""
    for name, count in counts.items():  # what fields amount to, rounded up: counters are int32
        if count >= 2**31:
            raise ValueError(f"{name}={getattr(config, name)}: must be less: {count} are too many to count")
    for field in dataclasses.fields(config):
        kind = get_args(field.type)[0] if get_origin(field.type) is tuple else field.type
        (rule,) = getattr(kind, "__metadata__", ["finite"])
        for x in jax.tree.leaves(getattr(config, field.name)):
            if isinstance(x, str):
                if get_origin(kind) is Literal and x not in get_args(kind):
                    raise ValueError(f"{field.name}={x}: must be one of {', '.join(get_args(kind))}")
            elif not isinstance(x, jax.core.Tracer) and not np.all(RULES[rule](x)):
                raise ValueError(f"{field.name}={x}: must be {rule}")


def check_choices(config):
    """ValueError where the maximizer does not fit the actions, the critic or the memory."""
    env, solver = make_env(config.env), config.maximizer
    fitting = ["exhaustive"] if env.discrete else ["gradient", "lbfgs", "cem", "grid", "milp"]
    if solver not in fitting and ":" not in solver:
        kind = "Discrete" if env.discrete else "a Box"
        choices = f"{', '.join(fitting)} or module:function"
        raise ValueError(f"maximizer={solver}: must be {choices}: the actions of {config.env} are {kind}")
    points = config.num_candidates**env.action_dim
    if solver == "grid" and points > MAX_GRID:
        raise ValueError(f"num_candidates={config.num_candidates}: must be less: a grid of {points} is too large")

    def value(key):
        params, obs = critic_init(config, key), jnp.zeros((1, env.obs_dim))
        return critic(config, params, obs, maximize(config, params, obs, key))

    try:
        jax.eval_shape(value, random.key(0))
    except Exception as error:  # a user's solver can be wrong in any way
        raise ValueError(f"maximizer={solver}: {error}") from error


def num_epochs(config):
    """The fewest epochs that make `num_iterations` iterations, as many in each round."""
    return config.rounds * math.ceil(config.num_iterations / (config.rounds * config.iterations_per_epoch))


def init(config, key, base_points=None):
    """Base points and a new critic; ValueError where `config` does not fit.

    `base_points` is a `Transition` with leading axis [n] and actions in [-1, 1]; None collects a first round at random.
    """
    check(config)
    num_points = config.rounds * steps_per_round(config) * config.num_envs
    iterations = num_epochs(config) * config.iterations_per_epoch
    check(config, num_base_points=num_points, num_iterations=iterations)
    check_choices(config)
    key, key_eval, _, key_critic, key_base_points = random.split(key, 5)
    if base_points is None:
        base_points = collect(config, None, random_policy, steps_per_round(config), key_base_points)
    num = len(base_points.reward)
    points = repeat(prepare(base_points), num, num + (config.rounds - 1) * steps_per_round(config) * config.num_envs)
    params, losses = Params(critic_init(config, key_critic)), tuple(jnp.zeros(2))
    latest = jax.tree.map(jnp.copy, params) if config.rounds > 1 else None
    infinity, counts = jnp.array(jnp.inf, float), (jnp.int32(num), jnp.int32(0), jnp.int32(0))
    lowest = jnp.array(jnp.finfo(jnp.float32).min, float)  # finite, as all of a state is
    return State(params, latest, points, *counts, infinity, lowest, losses, key, key_eval)


def keep_best(config, state, best):
    """Keep the parameters `best` unless the new policy earns as much in episodes of its own: `State`."""
    key, key_trials = random.split(state.key)
    score = evaluate(dataclasses.replace(config, num_eval_episodes=config.num_trials), state.params, key_trials).mean()
    params = jax.tree.map(lambda new, old: jnp.where(score >= state.score, new, old), state.params, best)
    return state._replace(params=params, latest=state.params, score=jnp.fmax(score, state.score), key=key)


def epoch(config, state):
    """`iterations_per_epoch` iterations, fewer if delta falls below `tolerance`, and evaluate: `(State, Metrics)`."""
    best = state.params
    if config.rounds > 1:
        due = (state.epoch > 0) & (state.epoch % (num_epochs(config) // config.rounds) == 0)
        state = lax.cond(due, functools.partial(add_round, config), lambda state: state, state)
        state = state._replace(params=state.latest)
    end = state.iteration + config.iterations_per_epoch
    unfinished = lambda state: (state.iteration < end) & (state.delta >= config.tolerance)
    state = lax.while_loop(unfinished, functools.partial(iteration, config), state)
    if config.rounds > 1:
        state = keep_best(config, state, best)
    returns = evaluate(config, state.params, random.fold_in(state.key_eval, state.iteration))
    metrics = Metrics(state.step, returns, *state.losses, state.iteration, state.delta)
    return state._replace(epoch=state.epoch + 1), metrics


def train(config, key, base_points=None):
    """A whole run, a pure function: `(State, Metrics)`, metrics with a leading axis `[num_epochs]`."""
    state = init(config, key, base_points)
    return lax.scan(lambda state, _: epoch(config, state), state, length=num_epochs(config))


if __name__ == "__main__":
    from amortax.common.run import main

    main(Config, init, epoch, num_epochs)

"""Fitted Q-iteration (FQI) with explicit optimization: each target maximises the Q-function over actions by a solver.

A fixed set of transitions, the base points, stands for the environment. Each iteration applies the Bellman optimality
operator to the current Q-function there, with `maximize` in place of the maximum, and fits a new one to the result.

    collect base points B = {(s, a, r, s', terminated)} with uniformly random actions
    initialise q
    repeat until delta < tolerance or num_iterations iterations:
        for each base point: y = r + gamma * (1 - terminated) * q(s', maximize(q(s', .)))
        q_new <- fit: minimise mean (q_new(s, a) - y)^2 over B, from the parameters of q or from scratch
        delta <- mean (q_new(s, a~) - q(s, a~))^2 over the states of B with uniformly random actions a~
        q <- q_new
    act by maximize(q(s, .))

Sources: Ernst, Geurts, Wehenkel, "Tree-Based Batch Mode Reinforcement Learning" (JMLR 6, 2005), section 3.1;
Riedmiller, "Neural Fitted Q Iteration" (ECML 2005); Antos, Munos, Szepesvari, "Fitted Q-iteration in continuous
action-space MDPs" (NIPS 2007). For the maximiser `cem`: Rubinstein, Kroese, "The Cross-Entropy Method" (2004).

Departures, each for a reason:
- A time limit is no termination: the target bootstraps through it from the last observation before the reset.
- delta averages over random actions, since a sum over all of them means nothing where they are continuous.
- Actions lie in [-1, 1]; those of a Discrete space are coded as vectors of -1 with a 1 in the action's place.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random

CHUNK = 1024  # states whose maximisers are sought at once: it bounds the memory
MAX_GRID = 100_000  # points of a grid over actions, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields shape the program; the others are leaves, free to be traced and vmapped."""

    env: str = jax.tree.static(default="Pendulum-v1")  # a registered gymnax environment, Box or Discrete actions
    num_base_points: int = jax.tree.static(default=20_000)  # transitions to collect where no file has them
    base_points: str = jax.tree.static(default="")  # .npz file to read base points from, or to write if it is absent
    num_iterations: int = jax.tree.static(default=50)  # fits of the Q-function, at most
    iterations_per_epoch: int = jax.tree.static(default=10)  # fits between two evaluations
    num_envs: int = jax.tree.static(default=100)  # environments that step together
    num_eval_episodes: int = jax.tree.static(default=128)  # greedy episodes of an evaluation
    approximator: Literal["mlp", "quadratic"] = jax.tree.static(default="mlp")  # network, or quadratic in (s, a)
    hidden_sizes: tuple[int, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    fit_steps: int = jax.tree.static(default=1_000)  # Adam steps of a fit
    batch_size: int = jax.tree.static(default=256)  # base points of an Adam step; all at once where they are no more
    from_scratch: bool = jax.tree.static(default=False)  # start each fit from new random weights
    # solver of the maximum over actions; exhaustive for Discrete ones, the others for a Box
    maximizer: Literal["gradient", "lbfgs", "cem", "grid", "exhaustive", "milp"] = jax.tree.static(default="gradient")
    num_candidates: int = jax.tree.static(default=4)  # starts, population of cem, or points of grid's dimension
    maximizer_steps: int = jax.tree.static(default=10)  # iterations of gradient, lbfgs and cem
    exploration_range: float = 1.0  # random actions of the base points lie in [-range, range], in (0, 1]
    learning_rate: float = 1e-3  # Adam's step size, > 0
    gamma: float = 0.97  # discount per environment step, in [0, 1]
    ridge: float = 1e-6  # penalty on the squared weights of the quadratic fit, >= 0
    tolerance: float = 1e-9  # stop when q changes by less than this, mean square, >= 0


class Transition(NamedTuple):
    """One step of an environment, or a batch of them."""

    obs: jax.Array  # [..., obs_dim]
    action: jax.Array  # [..., action_dim], in [-1, 1]
    reward: jax.Array  # [...]
    next_obs: jax.Array  # [..., obs_dim], before any reset
    terminated: jax.Array  # [...], 1 where the episode ended by itself, 0 elsewhere, also at a time limit


class Params(NamedTuple):
    """Everything learned."""

    critic: Any


class State(NamedTuple):
    """All that one iteration hands to the next."""

    params: Params
    base_points: Transition  # leading axis [num_base_points]
    iteration: jax.Array  # [] int32, iterations so far
    delta: jax.Array  # [], mean squared change of q in the last iteration
    key: jax.Array  # [] random key


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps so far
    eval_returns: jax.Array  # [num_eval_episodes], undiscounted, of the greedy policy
    value_bias: jax.Array  # [], what the critic expects of the greedy policy at evaluation minus what it gets
    iteration: jax.Array  # [] int32, iterations so far
    delta: jax.Array  # [], mean squared change of q in the last iteration
    critic_loss: jax.Array  # [], mean squared error on the targets of the last iteration


# Environment


def make_env(config):
    """Return `(env, env_params, low, high)`, the action bounds as `[action_dim]`; ValueError without finite bounds.

    The codes of n Discrete actions have the bounds -1 and 1 in n dimensions.
    """
    env, env_params = gymnax.make(config.env)
    with jax.ensure_compile_time_eval():
        space = env.action_space(env_params)
    if hasattr(space, "n"):
        return env, env_params, -np.ones(space.n), np.ones(space.n)
    if not (hasattr(space, "low") and np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ValueError(f"env={config.env}: its actions must be Discrete or a Box with finite bounds")
    low, high = (np.broadcast_to(np.asarray(x, float), space.shape).reshape(-1) for x in (space.low, space.high))
    return env, env_params, low, high


def is_discrete(config):
    """Whether actions are the codes of a Discrete space."""
    env, env_params, *_ = make_env(config)
    return hasattr(env.action_space(env_params), "n")


def flatten(obs):
    """Observations `[num_envs, ...]` of any shape and type as floats `[num_envs, obs_dim]`."""
    return obs.reshape(len(obs), -1).astype(float)


def scale_action(config, action):
    """Map `action [action_dim]` from [-1, 1] affinely to the environment's bounds, in the environment's shape."""
    env, env_params, low, high = make_env(config)
    if is_discrete(config):
        return jnp.argmax(action)
    return (low + (action + 1) / 2 * (high - low)).reshape(env.action_space(env_params).shape)


def project(config, action):
    """Nearest action that there is: `[..., action_dim]` clipped to [-1, 1], or the code of the largest coordinate."""
    if is_discrete(config):
        return 2 * jax.nn.one_hot(jnp.argmax(action, axis=-1), action.shape[-1]) - 1
    return jnp.clip(action, -1, 1)


def env_init(config, key):
    """Reset `num_envs` environments: `(env_state, obs [num_envs, obs_dim])`."""
    env, env_params, *_ = make_env(config)
    obs, env_state = jax.vmap(env.reset, in_axes=(0, None))(random.split(key, config.num_envs), env_params)
    return env_state, flatten(obs)


def env_step(config, env_state, obs, action, key):
    """Step every environment, resetting the ended: `(env_state, obs [num_envs, obs_dim], Transition, ended)`.

    `Transition` and `ended`, whether an episode is over for either reason, have a leading axis [num_envs].
    """
    env, env_params, *_ = make_env(config)
    keys = random.split(key, config.num_envs)
    env_action = jax.vmap(scale_action, in_axes=(None, 0))(config, action)
    next_obs, env_state, reward, terminated, truncated, info = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
        keys, env_state, env_action, env_params
    )
    # next_obs may already belong to a new episode
    final_obs = flatten(info["final_observation"])
    transition = Transition(obs, action, reward, final_obs, terminated)
    return env_state, flatten(next_obs), transition, terminated | truncated


# Networks


def mlp_init(key, sizes):
    """Layers `[(weights [n, m], biases [m]), ...]` for `sizes`, weights by LeCun's normal rule, biases zero."""
    keys = random.split(key, len(sizes) - 1)
    normal = jax.nn.initializers.lecun_normal()
    return [(normal(k, (n, m)), jnp.zeros(m)) for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def mlp(params, x):
    """Multilayer perceptron with ReLU: `[..., n]` to `[..., m]`."""
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def quadratic_features(x):
    """All monomials of degree two or less: `[..., n]` to `[..., (n + 1) * (n + 2) / 2]`."""
    x = jnp.concatenate([jnp.ones((*x.shape[:-1], 1)), x], axis=-1)
    i, j = np.triu_indices(x.shape[-1])
    return x[..., i] * x[..., j]


def critic_init(config, key, obs_dim, action_dim):
    """Random weights of the network, or zero ones of the quadratic."""
    if config.approximator == "quadratic":
        n = obs_dim + action_dim + 1
        return jnp.zeros(n * (n + 1) // 2)
    return mlp_init(key, (obs_dim + action_dim, *config.hidden_sizes, 1))


def critic(config, params, obs, action):
    """Action value: `obs [..., obs_dim]`, `action [..., action_dim]` to `[...]`."""
    x = jnp.concatenate([obs, action], axis=-1)
    if config.approximator == "quadratic":
        return quadratic_features(x) @ params
    return mlp(params, x)[..., 0]


def greedy_value(config, params, obs):
    """Value of the best action: `obs [n, obs_dim]` to `[n]`."""
    return critic(config, params.critic, obs, maximize(config, params.critic, obs, random.key(0)))


def act(config, params, obs):
    """Greedy action in the environment's units and shape for one observation of any shape."""
    return scale_action(config, maximize(config, params.critic, flatten(obs[None]), random.key(0))[0])


# Maximisers: for the `critic_params` and one observation `[obs_dim]`, an action `[action_dim]`


def random_actions(config, key):
    """Candidates `[num_candidates, action_dim]`, uniform in the box."""
    return random.uniform(key, (config.num_candidates, len(make_env(config)[2])), minval=-1, maxval=1)


def best(q, actions):
    """The action of highest value among `actions [n, action_dim]`."""
    return actions[jnp.argmax(jax.vmap(q)(actions))]


def maximize_gradient(config, critic_params, obs, key):
    """Projected gradient ascent from random starts, by steps of fixed lengths that shrink from 0.5 to 0.01."""
    q = functools.partial(critic, config, critic_params, obs)

    def step(actions, size):
        direction = jax.vmap(jax.grad(q))(actions)
        direction /= jnp.linalg.norm(direction, axis=1, keepdims=True) + 1e-12
        return jnp.clip(actions + size * direction, -1, 1), None

    sizes = jnp.geomspace(0.5, 0.01, config.maximizer_steps)
    return best(q, lax.scan(step, random_actions(config, key), sizes)[0])


def maximize_lbfgs(config, critic_params, obs, key):
    """L-BFGS from random starts, on angles u with a = sin(u): a box without bounds whose faces are within reach."""
    solver = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=8))
    loss = lambda u: -critic(config, critic_params, obs, jnp.sin(u))

    def step(carry, _):
        u, opt_state = carry
        value, grad = jax.value_and_grad(loss)(u)
        updates, opt_state = solver.update(grad, opt_state, u, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(u, updates), opt_state), None

    def ascend(u):
        (u, _), _ = lax.scan(step, (u, solver.init(u)), length=config.maximizer_steps)
        return jnp.sin(u)

    starts = jnp.arcsin(random_actions(config, key))
    return best(functools.partial(critic, config, critic_params, obs), jax.vmap(ascend)(starts))


def maximize_cem(config, critic_params, obs, key):
    """Cross-entropy method: a Gaussian fitted, time and again, to the best quarter of its samples; the best of all."""
    q = functools.partial(critic, config, critic_params, obs)

    def step(carry, key):
        mean, std, champion = carry
        actions = jnp.clip(mean + std * random.normal(key, (config.num_candidates, *mean.shape)), -1, 1)
        actions = jnp.concatenate([champion[None], actions])
        _, order = lax.top_k(jax.vmap(q)(actions), max(2, config.num_candidates // 4))
        elite = actions[order]
        return (elite.mean(axis=0), elite.std(axis=0), elite[0]), None

    zero = jnp.zeros(len(make_env(config)[2]))
    return lax.scan(step, (zero, zero + 0.7, zero), random.split(key, config.maximizer_steps))[0][2]


def maximize_grid(config, critic_params, obs, key):
    """The best of `num_candidates` evenly spaced points a dimension, the bounds among them."""
    axis = jnp.linspace(-1, 1, config.num_candidates)
    axes = jnp.meshgrid(*[axis] * len(make_env(config)[2]), indexing="ij")
    actions = jnp.stack(axes, axis=-1).reshape(-1, len(axes))
    return best(functools.partial(critic, config, critic_params, obs), actions)


def maximize_exhaustive(config, critic_params, obs, key):
    """The best of all Discrete actions."""
    codes = 2 * jnp.eye(len(make_env(config)[2])) - 1
    return best(functools.partial(critic, config, critic_params, obs), codes)


MAXIMIZERS = {
    "gradient": maximize_gradient,
    "lbfgs": maximize_lbfgs,
    "cem": maximize_cem,
    "grid": maximize_grid,
    "exhaustive": maximize_exhaustive,
}


def maximize(config, critic_params, obs, key):
    """Actions `[n, action_dim]` of highest value for `obs [n, obs_dim]`; all states share their random candidates."""
    solve = MAXIMIZERS[config.maximizer]
    return lax.map(lambda obs: solve(config, critic_params, obs, key), obs, batch_size=CHUNK)


# Base points


def rollout(config, key, num_steps, policy):
    """`Transition [num_steps]` from fresh environments with `policy(obs [num_envs, obs_dim], key) -> action`."""

    def step(carry, key):
        key_policy, key_env = random.split(key)
        env_state, obs = carry
        env_state, next_obs, transition, _ = env_step(config, env_state, obs, policy(obs, key_policy), key_env)
        return (env_state, next_obs), transition

    key, key_init = random.split(key)
    _, transitions = lax.scan(step, env_init(config, key_init), random.split(key, num_steps // config.num_envs))
    return jax.tree.map(lambda x: x.reshape(num_steps, *x.shape[2:]).astype(float), transitions)


def load_base_points(config):
    """Base points of a file with an array for each field of `Transition`; ValueError where they do not fit."""
    env, env_params, low, _ = make_env(config)
    obs_dim = jax.eval_shape(lambda key: env.reset(key, env_params)[0], random.key(0)).size
    try:
        with np.load(config.base_points, allow_pickle=False) as file:
            arrays = [file[field].astype(np.float32) for field in Transition._fields]
    except Exception as error:
        raise ValueError(f"base_points={config.base_points}: not a file of base points: {error}") from error
    n = arrays[0].shape[0] if arrays[0].ndim else 0
    expected = [(n, obs_dim), (n, len(low)), (n,), (n, obs_dim), (n,)]
    found = [x.shape for x in arrays]
    if found != expected or n == 0:
        raise ValueError(f"base_points={config.base_points}: must hold shapes {expected} for {config.env}, not {found}")
    if not all(np.isfinite(x).all() for x in arrays) or np.abs(arrays[1]).max() > 1:
        raise ValueError(f"base_points={config.base_points}: must hold finite numbers, and actions in [-1, 1]")
    return Transition(*map(jnp.asarray, arrays))


def collect_base_points(config, key):
    """Base points of the file, or of uniformly random actions, in random order: any first part is a fair sample."""
    if config.base_points:
        return load_base_points(config)
    _, _, low, _ = make_env(config)

    def explore(obs, key):
        actions = config.exploration_range * random.uniform(key, (len(obs), len(low)), minval=-1, maxval=1)
        return project(config, actions)

    key, key_order = random.split(key)
    base_points = rollout(config, key, config.num_base_points, explore)
    order = random.permutation(key_order, config.num_base_points)
    return jax.tree.map(lambda x: x[order], base_points)


# Losses


def bellman_targets(config, params, batch, key):
    """Bellman's optimality operator at each base point: `[num_base_points]`."""
    next_action = maximize(config, params.critic, batch.next_obs, key)
    next_value = critic(config, params.critic, batch.next_obs, next_action)
    return batch.reward + config.gamma * (1 - batch.terminated) * next_value


def critic_loss(critic_params, config, batch, targets):
    """Mean squared error on the targets."""
    return jnp.square(critic(config, critic_params, batch.obs, batch.action) - targets).mean()


# Training


def descend(config, loss, params, data, key):
    """`fit_steps` Adam steps on `loss(params, rows)`: new `params`.

    Each step draws `batch_size` rows of `data` anew, or takes all of them where there are no more than that.
    """
    n = len(jax.tree.leaves(data)[0])
    adam = optax.adam(config.learning_rate)

    def step(carry, key):
        params, opt_state = carry
        index = random.randint(key, (config.batch_size,), 0, n)
        rows = jax.tree.map(lambda x: x[index], data) if config.batch_size < n else data
        updates, opt_state = adam.update(jax.grad(loss)(params, rows), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = lax.scan(step, (params, adam.init(params)), random.split(key, config.fit_steps))
    return params


def fit_quadratic(config, batch, targets):
    """Ridge regression of the targets on quadratic features of mean square 1, in closed form."""
    x = quadratic_features(jnp.concatenate([batch.obs, batch.action], axis=1))
    scale = jnp.sqrt(jnp.square(x).mean(axis=0)) + 1e-6
    x /= scale
    gram = x.T @ x / len(x) + config.ridge * jnp.eye(x.shape[1])
    return jnp.linalg.solve(gram, x.T @ targets / len(x)) / scale


def fit_critic(config, params, batch, targets, key):
    """New parameters of the critic."""
    if config.approximator == "quadratic":
        return fit_quadratic(config, batch, targets)
    key, key_init = random.split(key)
    if config.from_scratch:
        params = critic_init(config, key_init, batch.obs.shape[1], batch.action.shape[1])
    return descend(config, lambda params, rows: critic_loss(params, config, *rows), params, (batch, targets), key)


def check(config):
    """Raise a ValueError `field=value: rule` where sizes and choices do not fit together."""
    discrete, solver = is_discrete(config), config.maximizer
    points = config.num_candidates ** len(make_env(config)[2])
    fits = "exhaustive" if discrete else ", ".join(name for name in MAXIMIZERS if name != "exhaustive")
    kind = "Discrete" if discrete else "a Box"
    rules = [
        ("num_base_points", config.num_base_points % config.num_envs == 0, f"a multiple of num_envs={config.num_envs}"),
        (
            "iterations_per_epoch",
            config.num_iterations % config.iterations_per_epoch == 0,
            f"a divisor of num_iterations={config.num_iterations}",
        ),
        ("maximizer", solver in MAXIMIZERS, f"one of {', '.join(MAXIMIZERS)}; milp comes with the command line"),
        ("maximizer", (solver == "exhaustive") == discrete, f"{fits}: the actions of {config.env} are {kind}"),
        ("maximizer", solver != "milp" or config.approximator == "mlp", "another: milp is for approximator=mlp"),
        ("num_candidates", solver != "grid" or points <= MAX_GRID, f"less: a grid of {points} actions is too large"),
    ]
    for name, kept, rule in rules:
        if not kept:
            raise ValueError(f"{name}={getattr(config, name)}: must be {rule}")


def iteration(config, state):
    """Targets, fit, and change of the Q-function: `(State, loss)`."""
    key, key_max, key_critic, key_delta = random.split(state.key, 4)
    batch, old = state.base_points, state.params
    targets = bellman_targets(config, old, batch, key_max)
    params = Params(fit_critic(config, old.critic, batch, targets, key_critic))
    action = project(config, random.uniform(key_delta, batch.action.shape, minval=-1, maxval=1))
    change = critic(config, params.critic, batch.obs, action) - critic(config, old.critic, batch.obs, action)
    state = State(params, batch, state.iteration + 1, jnp.square(change).mean(), key)
    return state, critic_loss(params.critic, config, batch, targets)


def evaluate(config, params, key):
    """Greedy policy on whole episodes in fresh environments: `(returns [num_eval_episodes], value_bias [])`.

    The returns are undiscounted. The bias is the critic's value of the first observation minus the discounted return
    from there, its part beyond a time limit filled in with the critic's value of the last observation; a mean.
    """
    env, env_params, *_ = make_env(config)

    def step(carry):
        obs, env_state, _, _, total, discounted, discount, key = carry
        key, key_step = random.split(key)
        action = act(config, params, obs)
        _, env_state, reward, terminated, truncated, info = env.step(key_step, env_state, action, env_params)
        totals = total + reward, discounted + discount * reward, discount * config.gamma
        return info["final_observation"], env_state, terminated, truncated, *totals, key

    def episode(key):
        key, key_reset = random.split(key)
        first_obs, env_state = env.reset(key_reset, env_params)
        carry = first_obs, env_state, False, False, jnp.zeros(()), jnp.zeros(()), jnp.ones(()), key
        carry = lax.while_loop(lambda carry: ~(carry[2] | carry[3]), step, carry)
        last_obs, _, terminated, _, total, discounted, discount, _ = carry
        first_value, last_value = greedy_value(config, params, flatten(jnp.stack([first_obs, last_obs])))
        return total, first_value - discounted - discount * (1 - terminated) * last_value

    returns, bias = jax.vmap(episode)(random.split(key, config.num_eval_episodes))
    return returns, bias.mean()


def init(config, key):
    """Base points and a new Q-function. ValueError where the configuration does not fit."""
    check(config)
    key, key_base_points, key_critic = random.split(key, 3)
    base_points = collect_base_points(config, key_base_points)
    critic_params = critic_init(config, key_critic, base_points.obs.shape[1], base_points.action.shape[1])
    return State(Params(critic_params), base_points, jnp.int32(0), jnp.array(jnp.inf), key)


def epoch(config, state):
    """`iterations_per_epoch` iterations, fewer if q stops changing, then a greedy evaluation: `(State, Metrics)`."""
    end = state.iteration + config.iterations_per_epoch

    def unfinished(carry):
        state, _ = carry
        return (state.iteration < end) & (state.delta >= config.tolerance)

    state, loss = lax.while_loop(unfinished, lambda carry: iteration(config, carry[0]), (state, jnp.zeros(())))
    key, key_eval = random.split(state.key)
    returns, value_bias = evaluate(config, state.params, key_eval)
    step = jnp.int32(len(state.base_points.reward))
    return state._replace(key=key), Metrics(step, returns, value_bias, state.iteration, state.delta, loss)


def train(config, key):
    """The whole run, a pure function: `(State, Metrics)`, every metric with a leading axis `[num_epochs]`."""
    num_epochs = config.num_iterations // config.iterations_per_epoch
    return lax.scan(lambda state, _: epoch(config, state), init(config, key), length=num_epochs)


if __name__ == "__main__":
    from common import milp
    from common.run import main

    MAXIMIZERS["milp"] = milp.maximize
    main(Config, init, epoch)

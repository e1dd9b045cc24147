"""Neural fitted Q-iteration with continuous actions (NFQCA): a policy that ascends the Q-function, and no solver.

Each iteration fits the Q-function to targets with the policy's own actions, then improves the policy by the gradient of
the new Q-function through its actions.

    collect base points B = {(s, a, r, s', terminated)} with uniformly random actions
    initialise q, policy d
    repeat until delta < tolerance or num_iterations iterations:
        every num_iterations / rounds iterations: add base points, collected with
            a = clip(d(s) + exploration_noise * N(0, 1), -1, 1)
        for each base point: y = r + gamma * (1 - terminated) * q(s', d(s'))
        q_new <- fit: minimise mean (q_new(s, a) - y)^2 over B, from the parameters of q or from scratch
        d     <- maximise mean q_new(s, d(s)) over B, from the parameters of d
        delta <- mean (q_new(s, a) - q(s, a))^2 over B
        q <- q_new
    act by d(s)

Sources: Hafner, Riedmiller, "Reinforcement learning in feedback control" (Machine Learning 84, 2011), section 3;
Riedmiller, "Neural Fitted Q Iteration" (ECML 2005), section 3, for the growing batch.

Departures, each for a reason:
- A time limit is no termination: the target bootstraps through it from the last observation before the reset.
- Adam on minibatches in place of Rprop on all base points; a `batch_size` of `num_base_points` gives the latter.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields shape the program; the others are leaves, free to be traced and vmapped."""

    env: str = jax.tree.static(default="Pendulum-v1")  # a registered gymnax environment with a Box of actions
    num_base_points: int = jax.tree.static(default=20_000)  # transitions to collect in all, where no file has them
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
    rounds: int = jax.tree.static(default=1)  # collections of base points: the first random, the others by the policy
    exploration_range: float = 1.0  # random actions of the base points lie in [-range, range], in (0, 1]
    learning_rate: float = 1e-3  # Adam's step size, > 0
    gamma: float = 0.97  # discount per environment step, in [0, 1]
    ridge: float = 1e-6  # penalty on the squared weights of the quadratic fit, >= 0
    exploration_noise: float = 0.3  # standard deviation of the Gaussian added to actions in [-1, 1], >= 0
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

    actor: Any
    critic: Any


class State(NamedTuple):
    """All that one iteration hands to the next."""

    params: Params
    base_points: Transition  # leading axis [num_base_points]
    step: jax.Array  # [] int32, environment steps so far
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
    actor_loss: jax.Array  # [], mean value of the policy's actions, negated, in the last iteration


# Environment


def make_env(config):
    """Return `(env, env_params, low, high)`, the action bounds as `[action_dim]`; ValueError without finite bounds."""
    env, env_params = gymnax.make(config.env)
    with jax.ensure_compile_time_eval():
        space = env.action_space(env_params)
    if not (hasattr(space, "low") and np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ValueError(f"env={config.env}: its actions must be a Box with finite bounds")
    low, high = (np.broadcast_to(np.asarray(x, float), space.shape).reshape(-1) for x in (space.low, space.high))
    return env, env_params, low, high


def flatten(obs):
    """Observations `[num_envs, ...]` of any shape and type as floats `[num_envs, obs_dim]`."""
    return obs.reshape(len(obs), -1).astype(float)


def scale_action(config, action):
    """Map `action [action_dim]` from [-1, 1] affinely to the environment's bounds, in the environment's shape."""
    env, env_params, low, high = make_env(config)
    return (low + (action + 1) / 2 * (high - low)).reshape(env.action_space(env_params).shape)


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


def actor(params, obs):
    """Deterministic policy: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return jnp.tanh(mlp(params, obs))


def critic(config, params, obs, action):
    """Action value: `obs [..., obs_dim]`, `action [..., action_dim]` to `[...]`."""
    x = jnp.concatenate([obs, action], axis=-1)
    if config.approximator == "quadratic":
        return quadratic_features(x) @ params
    return mlp(params, x)[..., 0]


def greedy_value(config, params, obs):
    """Value of the policy's action: `obs [n, obs_dim]` to `[n]`."""
    return critic(config, params.critic, obs, actor(params.actor, obs))


def act(config, params, obs):
    """Greedy action in the environment's units and shape for one observation of any shape."""
    return scale_action(config, actor(params.actor, flatten(obs[None])[0]))


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
    """Base points of the file, or of uniformly random actions; the first round's stand in for those still to come."""
    if config.base_points:
        return load_base_points(config)
    _, _, low, _ = make_env(config)

    def explore(obs, key):
        return config.exploration_range * random.uniform(key, (len(obs), len(low)), minval=-1, maxval=1)

    key, key_order = random.split(key)
    num_steps = config.num_base_points // config.rounds
    base_points = rollout(config, key, num_steps, explore)
    order = random.permutation(key_order, num_steps)
    return jax.tree.map(lambda x: jnp.concatenate([x[order]] * config.rounds), base_points)


# Losses


def bellman_targets(config, params, batch):
    """Operator at each base point, for the policy's actions: `[num_base_points]`."""
    next_value = critic(config, params.critic, batch.next_obs, actor(params.actor, batch.next_obs))
    return batch.reward + config.gamma * (1 - batch.terminated) * next_value


def critic_loss(critic_params, config, batch, targets):
    """Mean squared error on the targets."""
    return jnp.square(critic(config, critic_params, batch.obs, batch.action) - targets).mean()


def actor_loss(actor_params, config, critic_params, obs):
    """Mean value of the policy's actions, negated."""
    return -critic(config, critic_params, obs, actor(actor_params, obs)).mean()


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


def fit_actor(config, params, critic_params, obs, key):
    """New parameters of the policy and their loss, over `obs [num_base_points, obs_dim]`: `(params, loss)`."""
    params = descend(config, lambda params, obs: actor_loss(params, config, critic_params, obs), params, obs, key)
    return params, actor_loss(params, config, critic_params, obs)


def check(config):
    """Raise a ValueError `field=value: rule` where sizes and choices do not fit together."""
    multiple = config.num_envs * config.rounds
    rules = [
        (
            "num_base_points",
            config.num_base_points % multiple == 0,
            f"a multiple of {multiple}, num_envs={config.num_envs} times rounds={config.rounds}",
        ),
        (
            "iterations_per_epoch",
            config.num_iterations % (config.iterations_per_epoch * config.rounds) == 0,
            f"a divisor of {config.num_iterations / config.rounds:g}, the iterations of a round",
        ),
        ("rounds", config.rounds == 1 or not config.base_points, "1 with base points from a file"),
    ]
    for name, kept, rule in rules:
        if not kept:
            raise ValueError(f"{name}={getattr(config, name)}: must be {rule}")


def grow(config, state):
    """Collect one round's base points with the policy and noise."""

    def explore(obs, key):
        action = actor(state.params.actor, obs)
        return jnp.clip(action + config.exploration_noise * random.normal(key, action.shape), -1, 1)

    key, key_collect = random.split(state.key)
    steps = config.num_base_points // config.rounds
    new = rollout(config, key_collect, steps, explore)
    insert = lambda x, y: lax.dynamic_update_slice_in_dim(x, y, state.step, axis=0)
    base_points, delta = jax.tree.map(insert, state.base_points, new), jnp.array(jnp.inf)
    return state._replace(base_points=base_points, step=state.step + steps, delta=delta, key=key)


def iteration(config, state):
    """Targets, fit, and ascent of the policy: `(State, losses)`."""
    key, key_critic, key_actor = random.split(state.key, 3)
    batch, old = state.base_points, state.params
    targets = bellman_targets(config, old, batch)
    critic_params = fit_critic(config, old.critic, batch, targets, key_critic)
    actor_params, actor_loss = fit_actor(config, old.actor, critic_params, batch.obs, key_actor)
    change = critic(config, critic_params, *batch[:2]) - critic(config, old.critic, *batch[:2])
    params, delta = Params(actor_params, critic_params), jnp.square(change).mean()
    state = state._replace(params=params, iteration=state.iteration + 1, delta=delta, key=key)
    return state, (critic_loss(critic_params, config, batch, targets), actor_loss)


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
    """Base points, a new Q-function and policy. ValueError where the configuration does not fit."""
    check(config)
    key, key_base_points, key_critic, key_actor = random.split(key, 4)
    base_points = collect_base_points(config, key_base_points)
    obs_dim, action_dim = base_points.obs.shape[1], base_points.action.shape[1]
    critic_params = critic_init(config, key_critic, obs_dim, action_dim)
    actor_params = mlp_init(key_actor, (obs_dim, *config.hidden_sizes, action_dim))
    step = jnp.int32(len(base_points.reward) // config.rounds)
    return State(Params(actor_params, critic_params), base_points, step, jnp.int32(0), jnp.array(jnp.inf), key)


def epoch(config, state):
    """`iterations_per_epoch` iterations, fewer if q stops changing, then a greedy evaluation: `(State, Metrics)`."""
    if config.rounds > 1:
        due = (state.iteration > 0) & (state.iteration % (config.num_iterations // config.rounds) == 0)
        state = lax.cond(due, lambda state: grow(config, state), lambda state: state, state)
    end = state.iteration + config.iterations_per_epoch

    def unfinished(carry):
        state, _ = carry
        return (state.iteration < end) & (state.delta >= config.tolerance)

    none = jnp.zeros(()), jnp.zeros(())
    state, losses = lax.while_loop(unfinished, lambda carry: iteration(config, carry[0]), (state, none))
    key, key_eval = random.split(state.key)
    returns, value_bias = evaluate(config, state.params, key_eval)
    return state._replace(key=key), Metrics(state.step, returns, value_bias, state.iteration, state.delta, *losses)


def train(config, key):
    """The whole run, a pure function: `(State, Metrics)`, every metric with a leading axis `[num_epochs]`."""
    num_epochs = config.num_iterations // config.iterations_per_epoch
    return lax.scan(lambda state, _: epoch(config, state), init(config, key), length=num_epochs)


if __name__ == "__main__":
    from common.run import main

    main(Config, init, epoch)

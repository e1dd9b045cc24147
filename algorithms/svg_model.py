"""Stochastic value gradients through a learned model: SVG(infinity) where the environment is a black box.

Policy and model are functions of the state and of noise: for fixed noise the return of a rollout of the model is a
differentiable function of the policy's parameters w. Of the environment only transitions are used.

    initialize policy a = tanh(mean_w(s) + std_w(s) * e), model s' = mu(s, a) + sigma(s, a) * o and its reward r(s, a),
        and fill replay buffer R with learning_starts transitions of uniformly random actions
    repeat for num_iterations iterations:
        take a step in num_envs environments and store (s, a, r, s', terminated) in R
        model_steps Adam steps on mean -log N((s', r); mu(s, a), sigma(s, a)^2), each for a batch from R
        sample first states of rollouts from R, and standard normal noise e_t, o_t
            (or infer o_t = (s_{t+1} - mu(s_t, a_t)) / sigma(s_t, a_t) from sequences of steps in R)
        for each rollout: J = sum_t gamma^t r(s_t, a_t) over `horizon` steps, with a_t and s_{t+1} as above
        dJ/dw by backpropagation
        one Adam step of w on -mean dJ/dw, its norm clipped to max_grad_norm

Source: Heess et al., "Learning Continuous Control Policies by Stochastic Value Gradients" (NeurIPS 2015), section 4 and
Algorithm 1.

Differences from the paper:
- The model never terminates; rollouts end at the horizon without a value.
- tanh bounds the actions, since clipping has no gradient beyond the bounds.
- The policy's noise is never inferred, since the stored actions are those of older policies.
- Adam with gradient clipping replaces plain gradient ascent, whose step size depends on the scale of the rewards.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from jax.flatten_util import ravel_pytree

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # bounds of the log standard deviations of policy and model

Count = Annotated[int, "from 1 to 2147483647"]  # a plain int may be 0 or negative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields set shapes and loop lengths; the others can be traced, vmapped and swept.

    Counts of environment steps are rounded up to whole steps of num_envs environments, iterations to whole epochs.
    """

    env: str = jax.tree.static(default="Pendulum-v1")  # gymnax environment with bounded continuous actions
    noise: Literal["sampled", "inferred"] = jax.tree.static(default="sampled")  # of the model
    num_iterations: Count = jax.tree.static(default=1_600)  # updates of the policy
    iterations_per_epoch: Count = jax.tree.static(default=160)  # updates of the policy between evaluations
    num_rollouts: Count = jax.tree.static(default=128)  # rollouts per update
    horizon: Count = jax.tree.static(default=50)  # steps of a rollout
    num_eval_episodes: Count = jax.tree.static(default=128)  # greedy episodes per evaluation
    learning_starts: Count = jax.tree.static(default=1_000)  # environment steps of uniformly random warm-up
    num_envs: Count = jax.tree.static(default=20)  # environments stepped in parallel, once an iteration
    buffer_size: Count = jax.tree.static(default=100_000)  # transitions in the replay buffer
    batch_size: Count = jax.tree.static(default=256)  # transitions per update of the model
    model_steps: Count = jax.tree.static(default=8)  # updates of the model per update of the policy
    hidden_sizes: tuple[Count, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    activation: Literal["relu", "silu", "elu", "tanh"] = jax.tree.static(default="silu")  # of the hidden layers
    learning_rate: Annotated[float, "> 0"] = 2e-3  # Adam's step size for the policy
    model_learning_rate: Annotated[float, "> 0"] = 1e-3  # Adam's step size for the model
    gamma: Annotated[float, "in [0, 1]"] = 0.99  # discount per environment step
    initial_std: Annotated[float, "> 0"] = 0.3  # initial standard deviation of the policy before tanh
    max_grad_norm: Annotated[float, "> 0"] = 1.0  # norm to which longer gradients are clipped


class Transition(NamedTuple):
    """One environment step, or a batch of them."""

    obs: jax.Array  # [..., obs_dim]
    action: jax.Array  # [..., action_dim], in [-1, 1]
    reward: jax.Array  # [...]
    next_obs: jax.Array  # [..., obs_dim], before any reset
    terminated: jax.Array  # [...], 0 at a time limit


class Model(NamedTuple):
    """A Gaussian of the change of the observation and of the reward, normalized by statistics of the warm-up."""

    network: Any
    input_mean: jax.Array  # [obs_dim + action_dim]
    input_std: jax.Array  # [obs_dim + action_dim]
    target_mean: jax.Array  # [obs_dim + 1]
    target_std: jax.Array  # [obs_dim + 1]


class Params(NamedTuple):
    """Everything learned."""

    actor: Any
    model: Model


class OptState(NamedTuple):
    """Adam's state."""

    actor: Any
    model: Any


class Noise(NamedTuple):
    """The noise of rollouts, leading axes [num_rollouts, horizon]."""

    policy: jax.Array  # [..., action_dim], standard normal
    model: jax.Array  # [..., obs_dim], standard normal or inferred


class State(NamedTuple):
    """Everything carried from one iteration to the next."""

    params: Params
    opt_state: OptState
    buffer: jax.Array  # [capacity, 2 * obs_dim + action_dim + 2], packed transitions, see `store`
    env_state: Any  # leading axis [num_envs]
    obs: jax.Array  # [num_envs, obs_dim]
    step: jax.Array  # [] int32, environment steps so far
    iteration: jax.Array  # [] int32, updates of the policy so far
    key: jax.Array  # [] random key of the training
    key_eval: jax.Array  # [] random key of the evaluations, so that their number does not change the training


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps so far
    eval_returns: jax.Array  # [num_eval_episodes], undiscounted, greedy policy
    iteration: jax.Array  # [] int32, updates of the policy so far
    model_loss: jax.Array  # [], nats, negative log-likelihood of normalized transitions, mean over the epoch
    objective: jax.Array  # [], discounted return of the rollouts, mean over the epoch
    grad_norm: jax.Array  # [], norm of the objective's gradient before clipping, mean over the epoch
    clipped: jax.Array  # [], fraction of the epoch's gradients that were clipped or not finite


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


def gaussian(config, params, x):
    """Mean and standard deviation, each `[..., m]`, from a network with `2 * m` outputs."""
    mean, log_std = jnp.split(mlp(config, params, x), 2, axis=-1)
    return mean, jnp.exp(jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX))


def actor(config, params, obs):
    """Squashed mean of the policy: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return jnp.tanh(gaussian(config, params, obs)[0])


def sample_action(config, params, obs, noise):
    """Squashed `mean + std * noise`: `obs [..., obs_dim]`, `noise [..., action_dim]` to `[..., action_dim]`."""
    mean, std = gaussian(config, params, obs)
    return jnp.tanh(mean + std * noise)


def model_init(config, key, warm_up):
    """A random network, and the means and standard deviations of the warm-up, `Transition [n]`."""
    x = jnp.concatenate([warm_up.obs, warm_up.action], axis=-1)
    y = jnp.concatenate([warm_up.next_obs - warm_up.obs, warm_up.reward[:, None]], axis=-1)
    network = mlp_init(key, (x.shape[1], *config.hidden_sizes, 2 * y.shape[1]))
    x_std, y_std = (jnp.where(z.std(axis=0) > 0, z.std(axis=0), 1) for z in (x, y))
    return Model(network, x.mean(axis=0), x_std, y.mean(axis=0), y_std)


def predict(config, model, obs, action):
    """Mean and standard deviation, each `[..., obs_dim + 1]`, of the next observation and the reward."""
    x = (jnp.concatenate([obs, action], axis=-1) - model.input_mean) / model.input_std
    mean, std = gaussian(config, model.network, x)
    mean = model.target_mean + model.target_std * mean
    return mean.at[..., :-1].add(obs), model.target_std * std


def dynamics(config, model, obs, action, noise):
    """One step of the model with noise `[obs_dim]`: `(next_obs [obs_dim], reward)`."""
    mean, std = predict(config, model, obs, action)
    return mean[:-1] + std[:-1] * noise, mean[-1]


def infer_noise(config, model, batch):
    """The noise `[..., obs_dim]` with which the model reproduces `batch.next_obs`."""
    mean, std = predict(config, model, batch.obs, batch.action)
    return (batch.next_obs - mean[..., :-1]) / std[..., :-1]


# Learning


def discounted_return(actor_params, config, model, start, noise):
    """Objective of one rollout of the model from `start [obs_dim]`."""

    def step(carry, noise):
        s, discount, total = carry
        a = sample_action(config, actor_params, s, noise.policy)
        s, reward = dynamics(config, model, s, a, noise.model)
        total += discount * reward
        return (s, discount * config.gamma, total), None

    return lax.scan(step, (start, jnp.ones(()), jnp.zeros(())), noise)[0][2]


def policy_gradient(actor_params, config, model, starts, noises):
    """Objective and its gradient, means over rollouts from `starts [num_rollouts, obs_dim]`."""
    returns = jax.vmap(discounted_return, in_axes=(None, None, None, 0, 0))
    return jax.value_and_grad(lambda x: returns(x, config, model, starts, noises).mean())(actor_params)


def model_loss(network, config, model, batch):
    """Negative log-likelihood of the normalized `batch` up to a constant, mean over the batch."""
    mean, std = predict(config, model._replace(network=network), batch.obs, batch.action)
    target = jnp.concatenate([batch.next_obs, batch.reward[:, None]], axis=-1)
    log_density = -0.5 * jnp.square((target - mean) / std) - jnp.log(std / model.target_std)
    return -log_density.sum(axis=-1).mean()


def optimizer(learning_rate):
    """Adam; a schedule, in updates of the parameters in question, goes here."""
    return optax.adam(learning_rate)


def apply_grads(learning_rate, grads, params, opt_state):
    """One step of the optimizer: `(params, opt_state)`."""
    updates, opt_state = optimizer(learning_rate).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def update(config, params, opt_state, starts, noises):
    """One update of the policy, along the clipped gradient: `(params, opt_state, (objective, norm, clipped))`."""
    objective, grads = policy_gradient(params.actor, config, params.model, starts, noises)
    norm = optax.global_norm(grads)
    scale = jnp.where(jnp.isfinite(norm), jnp.minimum(1, config.max_grad_norm / norm), 0)
    descent = jax.tree.map(lambda x: jnp.where(jnp.isfinite(norm), -scale * x, 0), grads)  # 0 times NaN is NaN
    actor_params, actor_opt_state = apply_grads(config.learning_rate, descent, params.actor, opt_state.actor)
    return params._replace(actor=actor_params), opt_state._replace(actor=actor_opt_state), (objective, norm, scale < 1)


def update_model(config, model, opt_state, batch):
    """One update of the model from a batch: `(model, opt_state, loss)`."""
    loss, grads = jax.value_and_grad(model_loss)(model.network, config, model, batch)
    network, opt_state = apply_grads(config.model_learning_rate, grads, model.network, opt_state)
    return model._replace(network=network), opt_state, loss


# Policies


def greedy(config, params, obs):
    """The policy without noise: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return actor(config, params.actor, obs)


def explore(config, params, obs, key):
    """Actions sampled from the policy."""
    noise = random.normal(key, (*obs.shape[:-1], make_env(config.env).action_dim))
    return sample_action(config, params.actor, obs, noise)


def warm_up(config, params, obs, key):
    """Uniformly random actions."""
    return random.uniform(key, (*obs.shape[:-1], make_env(config.env).action_dim), minval=-1, maxval=1)


def act(config, params, obs):
    """Greedy action in the environment's units and shape, for one of its observations."""
    env = make_env(config.env)
    return env.rescale(greedy(config, params, env.flatten(obs)))


# Environment


class Env(NamedTuple):
    """An environment as pure functions, with observations `[obs_dim]` and actions `[action_dim]` in [-1, 1].

    Where an episode has ended, `step` gives as `obs` the first of a new one, and as `next_obs` its last.
    """

    obs_dim: int
    action_dim: int
    max_steps: int  # bound of evaluation episodes
    flatten: Callable  # observation of any shape and type -> the same as floats [obs_dim], one-hot if Discrete
    reset: Callable  # key -> (env_state, obs)
    step: Callable  # (env_state, action, key) -> (env_state, obs, reward, next_obs, terminated, truncated)
    rescale: Callable  # action -> the same in the environment's bounds and shape


@functools.cache
def make_env(name):
    """The gymnax environment `name`; ValueError unless its actions are bounded and continuous."""
    with jax.ensure_compile_time_eval():
        env, env_params = gymnax.make(name)
        space = env.action_space(env_params)
        low, high = (np.full(space.shape, getattr(space, bound, np.nan), np.float32) for bound in ("low", "high"))
        max_steps = max(10_000, getattr(env_params, "max_steps_in_episode", 0))  # there may be no time limit
    fits = jnp.issubdtype(space.dtype, jnp.floating) and (np.abs([low, high]) < 1e38).all()  # finite also high - low
    if not fits:
        raise ValueError(f"env={name}: must have actions in a Box of floats with finite bounds")

    def flatten(obs):
        one_of_n = jnp.ndim(obs) == 0 and jnp.issubdtype(jnp.result_type(obs), jnp.integer)
        return jax.nn.one_hot(obs, env.observation_space(env_params).n) if one_of_n else jnp.ravel(obs).astype(float)

    def rescale(action):
        return low + (action.reshape(low.shape) + 1) / 2 * (high - low)

    def reset(key):
        obs, env_state = env.reset(key, env_params)
        return env_state, flatten(obs)

    def step(env_state, action, key):
        obs, env_state, reward, terminated, truncated, info = env.step(key, env_state, rescale(action), env_params)
        # wrappers often transform `obs` alone, so the copy in `info` is read only where there is no other
        next_obs = jnp.where(terminated | truncated, flatten(info["final_observation"]), flatten(obs))
        return env_state, flatten(obs), reward, next_obs, terminated, truncated

    return Env(jax.eval_shape(reset, random.key(0))[1].size, low.size, max_steps, flatten, reset, step, rescale)


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


# Replay buffer


def example(config):
    """A transition of zeros, for the layout of a row."""
    env = make_env(config.env)
    return Transition(jnp.zeros(env.obs_dim), jnp.zeros(env.action_dim), 0.0, jnp.zeros(env.obs_dim), 0.0)


def store(buffer, step, transitions):
    """Write `transitions [num_steps, num_envs]` over the oldest rows, from row `step % capacity` on.

    Their number divides the capacity, so that no write wraps around. An environment's next step is `num_envs` rows on.
    The buffer is one array because XLA updates one in place inside a loop, and copies several.
    """
    rows = jax.vmap(jax.vmap(lambda transition: ravel_pytree(transition)[0]))(transitions)
    return lax.dynamic_update_slice_in_dim(buffer, rows.reshape(-1, buffer.shape[1]), step % len(buffer), axis=0)


def sample_rows(config, buffer, step, key, num_batches):
    """Rows `[num_batches, batch_size]`, drawn uniformly, with replacement, from the newest `min(step, capacity)`."""
    return random.randint(key, (num_batches, config.batch_size), 0, jnp.minimum(step, len(buffer)))


def read(config, buffer, rows):
    """The stored transitions: `rows [...]` to `Transition [...]`."""
    _, unravel = ravel_pytree(example(config))
    for _ in rows.shape:
        unravel = jax.vmap(unravel)
    return unravel(buffer.at[rows].get(mode="promise_in_bounds"))


def sample_sequences(config, buffer, step, length, key):
    """Draw sequences of consecutive steps of one environment each: `Transition [num_rollouts, length]`."""
    _, unravel = ravel_pytree(example(config))
    key_env, key_start = random.split(key)
    env = random.randint(key_env, (config.num_rollouts, 1), 0, config.num_envs)
    oldest = jnp.maximum(step - len(buffer), 0)
    start = random.randint(key_start, env.shape, 0, (step - oldest) // config.num_envs - length + 1)
    index = (oldest + config.num_envs * (start + jnp.arange(length)) + env) % len(buffer)
    return jax.vmap(jax.vmap(unravel))(buffer.at[index].get(mode="promise_in_bounds"))


# Training


def collect(config, state, policy):
    """One step of all environments with `policy`, stored: `State`."""
    key, key_rollout = random.split(state.key)
    env_state, obs, transitions = rollout(config, state.params, policy, state.env_state, state.obs, key_rollout[None])
    # the model learns from next observations; where the last one is NaN, from the one before
    unknown = transitions.terminated[..., None] & ~jnp.isfinite(transitions.next_obs)
    transitions = transitions._replace(next_obs=jnp.where(unknown, transitions.obs, transitions.next_obs))
    buffer, step = store(state.buffer, state.step, transitions), state.step + transitions.reward.size
    return state._replace(buffer=buffer, env_state=env_state, obs=obs, step=step, key=key)


def fit_model(config, state):
    """Collect, then update the model `model_steps` times: `(State, loss)`."""
    state = collect(config, state, explore)
    key, key_rows = random.split(state.key)

    rows = sample_rows(config, state.buffer, state.step, key_rows, config.model_steps)
    batches = read(config, state.buffer, rows)

    def step(carry, batch):
        *carry, loss = update_model(config, *carry, batch)
        return tuple(carry), loss

    (model, opt_state), losses = lax.scan(step, (state.params.model, state.opt_state.model), batches)
    params, opt_state = state.params._replace(model=model), state.opt_state._replace(model=opt_state)
    return state._replace(params=params, opt_state=opt_state, key=key), losses.mean()


def sample_rollouts(config, model, buffer, step, key):
    """First states `[num_rollouts, obs_dim]` and the `Noise` of an update's rollouts."""
    key_start, key_policy, key_model = random.split(key, 3)
    shape, inferred = (config.num_rollouts, config.horizon), config.noise == "inferred"
    batch = sample_sequences(config, buffer, step, config.horizon if inferred else 1, key_start)
    noise = random.normal(key_policy, (*shape, batch.action.shape[-1]))
    model_noise = random.normal(key_model, (*shape, batch.obs.shape[-1]))
    return batch.obs[:, 0], Noise(noise, infer_noise(config, model, batch) if inferred else model_noise)


def iteration(config, state):
    """Update the model, then the policy: `(State, losses)`."""
    state, loss = fit_model(config, state)
    key, key_rollouts = random.split(state.key)
    starts, noises = sample_rollouts(config, state.params.model, state.buffer, state.step, key_rollouts)
    params, opt_state, losses = update(config, state.params, state.opt_state, starts, noises)
    return state._replace(params=params, opt_state=opt_state, iteration=state.iteration + 1, key=key), (loss, *losses)


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


def num_epochs(config):
    """The fewest epochs that make `num_iterations` iterations."""
    return math.ceil(config.num_iterations / config.iterations_per_epoch)


def init(config, key):
    """Networks, and a buffer filled by the warm-up; ValueError where `config` does not fit."""
    check(config)
    stored = math.ceil(min(config.learning_starts, config.buffer_size) / config.num_envs)
    if config.noise == "inferred" and config.horizon > stored:
        raise ValueError(f"horizon={config.horizon}: must be at most {stored}, the warm-up's steps per environment")
    env = make_env(config.env)
    length = math.ceil(config.learning_starts / config.num_envs)
    steps = (length + num_epochs(config) * config.iterations_per_epoch) * config.num_envs
    check(config, num_iterations=steps, buffer_size=math.ceil(config.buffer_size / config.num_envs) * config.num_envs)
    key, key_eval, key_actor, key_model, key_env = random.split(key, 5)
    env_state, obs = jax.vmap(env.reset)(random.split(key_env, config.num_envs))
    *layers, (w, b) = mlp_init(key_actor, (env.obs_dim, *config.hidden_sizes, 2 * env.action_dim))
    actor_params = [*layers, (w, b.at[env.action_dim :].set(jnp.log(config.initial_std)))]
    row, unravel = ravel_pytree(example(config))
    buffer = jnp.zeros((math.ceil(config.buffer_size / config.num_envs) * config.num_envs, row.size))
    state = State(Params(actor_params, ()), None, buffer, env_state, obs, jnp.int32(0), jnp.int32(0), key, key_eval)
    state = lax.scan(lambda state, _: (collect(config, state, warm_up), None), state, length=length)[0]
    model = model_init(config, key_model, jax.vmap(unravel)(state.buffer[: length * config.num_envs]))
    actor_opt_state = optimizer(config.learning_rate).init(actor_params)
    opt_state = OptState(actor_opt_state, optimizer(config.model_learning_rate).init(model.network))
    return state._replace(params=Params(actor_params, model), opt_state=opt_state)


def epoch(config, state):
    """`iterations_per_epoch` iterations, then an evaluation: `(State, Metrics)`."""
    state, losses = lax.scan(lambda state, _: iteration(config, state), state, length=config.iterations_per_epoch)
    returns = evaluate(config, state.params, random.fold_in(state.key_eval, state.step))
    return state, Metrics(state.step, returns, state.iteration, *(x.mean() for x in losses))


def train(config, key):
    """A whole run, a pure function: `(State, Metrics)`, metrics with a leading axis `[num_epochs]`."""
    return lax.scan(lambda state, _: epoch(config, state), init(config, key), length=num_epochs(config))


if __name__ == "__main__":
    from amortax.common.run import main

    main(Config, init, epoch, num_epochs)

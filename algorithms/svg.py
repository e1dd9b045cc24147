"""Stochastic value gradients through whole rollouts, SVG(infinity): the pathwise derivative of the return.

Policy and dynamics are functions of the state and of noise: for fixed noise the return of a rollout is a differentiable
function of the policy's parameters w. Where the reward is a step function of the state, as at the goals of
MountainCarContinuous and PointRobot, its derivative is zero, the policy does not learn, and a warning says so.

    initialize policy a = tanh(mean_w(s) + std_w(s) * e)
    repeat for num_iterations iterations:
        sample first states of episodes, standard normal noise e_t of the policy, and the noise o_t of the environment
        for each rollout of `horizon` steps s_{t+1} = f(s_t, a_t, o_t), a_t as above: J = sum_t gamma^t r(s_t, a_t)
        dJ/dw by backpropagation (autodiff), or forward in time (manual), from ds_0/dw = 0 and dJ/dw = 0:
            da_t/dw     = da/ds ds_t/dw + da/dw
            dJ/dw      += gamma^t (dr/ds ds_t/dw + dr/da da_t/dw)
            ds_{t+1}/dw = ds'/ds ds_t/dw + ds'/da da_t/dw
        one Adam step of w on -mean dJ/dw, its norm clipped to max_grad_norm

Sources: Heess et al., "Learning Continuous Control Policies by Stochastic Value Gradients" (NeurIPS 2015), section 4
and Algorithm 1; Williams, Zipser (Neural Computation 1, 1989) for the recursion forward in time.

Differences from the paper:
- The dynamics are the environment's own; `svg_model.py` learns a model of them.
- Rollouts continue past time limits and end at the horizon without a value.
- tanh bounds the actions, since clipping has no gradient beyond the bounds.
- Adam with gradient clipping replaces plain gradient ascent, whose step size depends on the scale of the rewards.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from jax.flatten_util import ravel_pytree

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # bounds of the policy's log standard deviation

Count = Annotated[int, "from 1 to 2147483647"]  # a plain int may be 0 or negative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields set shapes and loop lengths; the others can be traced, vmapped and swept.

    Iterations are rounded up to whole epochs.
    """

    env: str = jax.tree.static(default="Pendulum-v1")  # gymnax environment with bounded continuous actions
    # remat: autodiff that recomputes the steps, which saves memory; manual: forward in time, for small networks
    gradient: Literal["autodiff", "remat", "manual"] = jax.tree.static(default="autodiff")
    num_iterations: Count = jax.tree.static(default=1_600)  # updates of the policy
    iterations_per_epoch: Count = jax.tree.static(default=160)  # updates of the policy between evaluations
    num_rollouts: Count = jax.tree.static(default=128)  # rollouts per update
    horizon: Count = jax.tree.static(default=50)  # steps of a rollout
    num_eval_episodes: Count = jax.tree.static(default=128)  # greedy episodes per evaluation
    hidden_sizes: tuple[Count, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    activation: Literal["relu", "silu", "elu", "tanh"] = jax.tree.static(default="silu")  # of the hidden layers
    learning_rate: Annotated[float, "> 0"] = 2e-3  # Adam's step size
    gamma: Annotated[float, "in [0, 1]"] = 0.99  # discount per environment step
    initial_std: Annotated[float, "> 0"] = 0.3  # initial standard deviation of the policy before tanh
    max_grad_norm: Annotated[float, "> 0"] = 1.0  # norm to which longer gradients are clipped


class Params(NamedTuple):
    """Everything learned."""

    actor: Any


class OptState(NamedTuple):
    """Adam's state."""

    actor: Any


class Noise(NamedTuple):
    """The noise of rollouts, leading axes [num_rollouts, horizon]."""

    policy: jax.Array  # [..., action_dim], standard normal
    env: jax.Array  # [...], random keys


class State(NamedTuple):
    """Everything carried from one iteration to the next."""

    params: Params
    opt_state: OptState
    step: jax.Array  # [] int32, environment steps of all rollouts so far
    iteration: jax.Array  # [] int32, updates of the policy so far
    key: jax.Array  # [] random key of the training
    key_eval: jax.Array  # [] random key of the evaluations, so that their number does not change the training


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps of all rollouts so far
    eval_returns: jax.Array  # [num_eval_episodes], undiscounted, greedy policy
    iteration: jax.Array  # [] int32, updates of the policy so far
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


# Learning


def discounted_return(actor_params, config, start, noise):
    """Objective of one rollout from `start [n]`."""
    obs_dim = actor_params[0][0].shape[0]

    def step(carry, noise):
        s, discount, total = carry
        a = sample_action(config, actor_params, s[:obs_dim], noise.policy)
        s, reward, terminated = dynamics(config, s, a, noise.env)
        total += discount * reward
        discount *= config.gamma * (1 - terminated)
        return (s, discount, total), None

    step = jax.checkpoint(step) if config.gradient == "remat" else step
    return lax.scan(step, (start, jnp.ones(()), jnp.zeros(())), noise)[0][2]


def manual_gradient(actor_params, config, start, noise):
    """Objective of one rollout and its gradient, forward in time: memory grows with the parameters, not the horizon."""
    w, unravel = ravel_pytree(actor_params)
    obs_dim = actor_params[0][0].shape[0]

    def step(carry, noise):
        s, s_w, discount, total, total_w = carry
        policy = lambda s, w: sample_action(config, unravel(w), s[:obs_dim], noise.policy)
        model = lambda s, a: dynamics(config, s, a, noise.env)
        a = policy(s, w)
        a_s, a_w = jax.jacfwd(policy, (0, 1))(s, w)
        a_w += a_s @ s_w
        (next_s_s, next_s_a), (r_s, r_a) = jax.jacfwd(lambda s, a: model(s, a)[:2], (0, 1))(s, a)
        total_w += discount * (r_s @ s_w + r_a @ a_w)
        s_w = next_s_s @ s_w + next_s_a @ a_w
        s, reward, terminated = model(s, a)
        total += discount * reward
        discount *= config.gamma * (1 - terminated)
        return (s, s_w, discount, total, total_w), None

    carry = start, jnp.zeros((len(start), len(w))), jnp.ones(()), jnp.zeros(()), jnp.zeros(len(w))
    *_, total, total_w = lax.scan(step, carry, noise)[0]
    return total, unravel(total_w)


def policy_gradient(actor_params, config, starts, noises):
    """Objective and its gradient, means over rollouts from `starts [num_rollouts, n]`."""
    if config.gradient == "manual":
        rollouts = jax.vmap(manual_gradient, in_axes=(None, None, 0, 0))(actor_params, config, starts, noises)
        return jax.tree.map(lambda x: x.mean(axis=0), rollouts)
    returns = jax.vmap(discounted_return, in_axes=(None, None, 0, 0))
    return jax.value_and_grad(lambda x: returns(x, config, starts, noises).mean())(actor_params)


def optimizer(config):
    """Adam; a schedule, in updates of the parameters in question, goes here."""
    return optax.adam(config.learning_rate)


def apply_grads(config, grads, params, opt_state):
    """One step of the optimizer: `(params, opt_state)`."""
    updates, opt_state = optimizer(config).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def update(config, params, opt_state, starts, noises):
    """One update of the policy, along the clipped gradient: `(params, opt_state, (objective, norm, clipped))`."""
    objective, grads = policy_gradient(params.actor, config, starts, noises)
    norm = optax.global_norm(grads)
    scale = jnp.where(jnp.isfinite(norm), jnp.minimum(1, config.max_grad_norm / norm), 0)
    descent = jax.tree.map(lambda x: jnp.where(jnp.isfinite(norm), -scale * x, 0), grads)  # 0 times NaN is NaN
    actor_params, actor_opt_state = apply_grads(config, descent, params.actor, opt_state.actor)
    return Params(actor_params), OptState(actor_opt_state), (objective, norm, scale < 1)


# Policies


def greedy(config, params, obs):
    """The policy without noise: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return actor(config, params.actor, obs)


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


def first_state(config, key):
    """A first state: observation and environment state in one vector, and the function that unpacks it."""
    env, env_params = gymnax.make(config.env)
    return ravel_pytree(env.reset(key, env_params))


def dynamics(config, state, action, key):
    """The environment's step from a state `[n]`, without a reset at its end: `(next_state [n], reward, terminated)`.

    A step that terminates leaves the state as it is: the last observation may be NaN, and 0 times NaN is NaN. Without
    `with_transition_gradients` gymnax stops the gradient of a step.
    """
    env, env_params = gymnax.make(config.env)
    _, env_state = first_state(config, key)[1](state)  # only the shapes of the reset are used
    action = make_env(config.env).rescale(action)
    obs, env_state, reward, terminated, _ = env.with_transition_gradients().step_env(key, env_state, action, env_params)
    return jnp.where(terminated, state, ravel_pytree((obs, env_state))[0]), reward, terminated


@functools.cache
def reward_gradient(name):
    """The largest derivative of the reward by the state in 32 steps of 32 rollouts of the environment `name`."""
    config = Config(env=name)

    def step(state, key):
        key_action, key_env = random.split(key)
        action = random.uniform(key_action, make_env(name).action_dim, minval=-1, maxval=1)
        derivative = jax.grad(lambda state: dynamics(config, state, action, key_env)[1])(state)
        return dynamics(config, state, action, key_env)[0], jnp.abs(derivative).max()

    def largest(key):
        return lax.scan(step, first_state(config, key)[0], random.split(key, 32))[1].max()

    with jax.ensure_compile_time_eval():
        return float(jax.jit(jax.vmap(largest))(random.split(random.key(0), 32)).max())


# Training


def sample_rollouts(config, key):
    """First states `[num_rollouts, n]` and the `Noise` of an update's rollouts."""
    key_start, key_policy, key_env = random.split(key, 3)
    shape = (config.num_rollouts, config.horizon)
    starts = jax.vmap(lambda key: first_state(config, key)[0])(random.split(key_start, config.num_rollouts))
    noise = random.normal(key_policy, (*shape, make_env(config.env).action_dim))
    return starts, Noise(noise, random.split(key_env, shape))


def iteration(config, state):
    """Sample rollouts and update the policy: `(State, losses)`."""
    key, key_rollouts = random.split(state.key)
    starts, noises = sample_rollouts(config, key_rollouts)
    params, opt_state, losses = update(config, state.params, state.opt_state, starts, noises)
    step, number = state.step + config.num_rollouts * config.horizon, state.iteration + 1
    return State(params, opt_state, step, number, key, state.key_eval), losses


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
    """A new policy; ValueError where `config` does not fit, and a warning where there is no gradient to follow."""
    check(config)
    env = make_env(config.env)
    if not gymnax.make(config.env)[0].supports_transition_gradients:
        raise ValueError(f"env={config.env}: must have transition gradients")
    steps = num_epochs(config) * config.iterations_per_epoch * config.num_rollouts * config.horizon
    check(config, num_iterations=steps)
    if reward_gradient(config.env) == 0:
        warnings.warn(f"the reward of {config.env} has no gradient by the state for svg to follow", stacklevel=1)
    key, key_eval, key_actor = random.split(key, 3)
    *layers, (w, b) = mlp_init(key_actor, (env.obs_dim, *config.hidden_sizes, 2 * env.action_dim))
    actor_params = [*layers, (w, b.at[env.action_dim :].set(jnp.log(config.initial_std)))]
    opt_state = OptState(optimizer(config).init(actor_params))
    return State(Params(actor_params), opt_state, jnp.int32(0), jnp.int32(0), key, key_eval)


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

"""Soft Actor-Critic (SAC) with a value network, as it was first published.

The policy is trained towards the Boltzmann policy of the smaller of two critics, by reparameterized gradients; a value
network replaces the expectation over actions in the critics' targets. The policy is `d` below, `pi` in most papers.

    initialize critics q1, q2, value v, policy d, target v' as a copy of v, and an empty replay buffer R
    fill R with learning_starts transitions of uniformly random actions
    repeat until total_steps environment steps:
        take num_steps steps in num_envs environments with a ~ d(. | s), and store (s, a, r, s', terminated) in R
        repeat utd_ratio times for each of these steps:
            sample a batch from R
            b = tanh(mean(s) + std(s) * N(0, 1))
            one Adam step of v on mean (v(s) - (min(q1(s, b), q2(s, b)) - alpha * log d(b | s)))^2
            y = r + gamma * (1 - terminated) * v'(s')
            one Adam step on mean (q1(s, a) - y)^2 + mean (q2(s, a) - y)^2
            b = tanh(mean(s) + std(s) * N(0, 1))
            one Adam step of d on mean (alpha * log d(b | s) - min(q1(s, b), q2(s, b)))
            v' <- tau * v + (1 - tau) * v'

Source: Haarnoja et al., "Soft Actor-Critic: Off-Policy Maximum Entropy Deep Reinforcement Learning with a Stochastic
Actor" (ICML 2018), Algorithm 1 and appendix C.

Differences from the paper:
- Targets bootstrap through time limits, from the last observation before the reset.
- Environments step in parallel, num_envs at a time; the updates for their steps follow.
- The action in the value's target is sampled at s, as in the paper, and not at s' as in some accounts of it.
- Smaller networks and faster targets, for Pendulum-v1. Densities and entropies are those of actions in [-1, 1].
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import distrax
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from jax.flatten_util import ravel_pytree

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0  # bounds of the policy's log standard deviation

Count = Annotated[int, "from 1 to 2147483647"]  # a plain int may be 0 or negative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields set shapes and loop lengths; the others can be traced, vmapped and swept.

    Counts of environment steps are rounded up to whole iterations of num_envs * num_steps.
    """

    env: str = jax.tree.static(default="Pendulum-v1")  # gymnax environment with bounded continuous actions
    total_steps: Count = jax.tree.static(default=10_000)  # environment steps, warm-up included
    learning_starts: Count = jax.tree.static(default=1_000)  # environment steps of uniformly random warm-up
    steps_per_epoch: Count = jax.tree.static(default=1_000)  # environment steps between evaluations
    num_envs: Count = jax.tree.static(default=8)  # environments stepped in parallel
    num_steps: Count = jax.tree.static(default=1)  # steps of each environment per iteration
    utd_ratio: Annotated[float, "> 0"] = jax.tree.static(default=1.0)  # updates per environment step
    num_eval_episodes: Count = jax.tree.static(default=128)  # greedy episodes per evaluation
    buffer_size: Count = jax.tree.static(default=100_000)  # transitions in the replay buffer
    batch_size: Count = jax.tree.static(default=256)  # transitions per update
    hidden_sizes: tuple[Count, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    activation: Literal["relu", "silu", "elu", "tanh"] = jax.tree.static(default="silu")  # of the hidden layers
    learning_rate: Annotated[float, "> 0"] = 1e-3  # Adam's step size for everything learned
    gamma: Annotated[float, "in [0, 1]"] = 0.99  # discount per environment step
    tau: Annotated[float, "in [0, 1]"] = 0.02  # step of the target towards the value network
    alpha: Annotated[float, "> 0"] = 0.1  # temperature, reward per nat


class Transition(NamedTuple):
    """One environment step, or a batch of them."""

    obs: jax.Array  # [..., obs_dim]
    action: jax.Array  # [..., action_dim], in [-1, 1]
    reward: jax.Array  # [...]
    next_obs: jax.Array  # [..., obs_dim], before any reset
    terminated: jax.Array  # [...], 0 at a time limit


class Params(NamedTuple):
    """Everything learned. The critics' leaves have a leading axis [2]."""

    actor: Any
    critic: Any
    value: Any
    target_value: Any


class OptState(NamedTuple):
    """Adam's state."""

    actor: Any
    critic: Any
    value: Any


class State(NamedTuple):
    """Everything carried from one iteration to the next."""

    params: Params
    opt_state: OptState
    buffer: jax.Array  # [capacity, 2 * obs_dim + action_dim + 2], packed transitions, see `store`
    env_state: Any  # leading axis [num_envs]
    obs: jax.Array  # [num_envs, obs_dim]
    step: jax.Array  # [] int32, environment steps so far
    key: jax.Array  # [] random key of the training
    key_eval: jax.Array  # [] random key of the evaluations, so that their number does not change the training


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps so far
    eval_returns: jax.Array  # [num_eval_episodes], undiscounted, greedy policy
    critic_loss: jax.Array  # [], summed over both critics, mean over the epoch
    q_value: jax.Array  # [], mean of both critics on the batches of the epoch
    actor_loss: jax.Array  # [], mean over the epoch
    entropy: jax.Array  # [], nats, of the policy on actions in [-1, 1], mean over the epoch
    value_loss: jax.Array  # [], mean over the epoch


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


def policy(config, params, obs):
    """Gaussian before squashing: `obs [..., obs_dim]` to a distribution over `[..., action_dim]`."""
    mean, log_std = jnp.split(mlp(config, params, obs), 2, axis=-1)
    return distrax.MultivariateNormalDiag(mean, jnp.exp(jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)))


def sample_action(config, params, obs, noise):
    """Squashed `mean + std * noise` and its log-density: `noise [..., action_dim]` to `([..., action_dim], [...])`.

    Computed from the action before squashing, since the inverse of tanh loses all digits where |action| nears 1.
    """
    gaussian = policy(config, params, obs)
    unsquashed = gaussian.mean() + gaussian.stddev() * noise
    action, log_det = distrax.Block(distrax.Tanh(), ndims=1).forward_and_log_det(unsquashed)
    return action, gaussian.log_prob(unsquashed) - log_det


def actor(config, params, obs):
    """Squashed mean of the policy: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return jnp.tanh(policy(config, params, obs).mean())


def critic(config, params, obs, action):
    """Action value: `obs [..., obs_dim]`, `action [..., action_dim]` to `[...]`."""
    return mlp(config, params, jnp.concatenate([obs, action], axis=-1))[..., 0]


def twin_critics(config, params, obs, action):
    """Both critics: `[2, ...]`."""
    return jax.vmap(critic, in_axes=(None, 0, None, None))(config, params, obs, action)


def value(config, params, obs):
    """State value: `obs [..., obs_dim]` to `[...]`."""
    return mlp(config, params, obs)[..., 0]


# Learning


def soft_value(config, params, batch, noise):
    """Target `[batch]` of the value network, with standard normal `noise [batch, action_dim]`."""
    action, log_prob = sample_action(config, params.actor, batch.obs, noise)
    return twin_critics(config, params.critic, batch.obs, action).min(axis=0) - config.alpha * log_prob


def value_loss(value_params, config, batch, target):
    """Mean squared error to `target [batch]`."""
    return jnp.square(value(config, value_params, batch.obs) - target).mean()


def td_target(config, params, batch):
    """Target `[batch]` of the critics, from the target value network."""
    next_value = value(config, params.target_value, batch.next_obs)
    return batch.reward + config.gamma * jnp.where(batch.terminated, 0, next_value)


def critic_loss(critic_params, config, batch, target):
    """Mean squared error to `target [batch]`, and mean value: `(loss, q_value)`."""
    q = twin_critics(config, critic_params, batch.obs, batch.action)
    return jnp.square(q - target).mean(axis=1).sum(), q.mean()  # the sum is over both critics


def actor_loss(actor_params, critic_params, config, batch, noise):
    """KL divergence from the Boltzmann policy up to a constant, and the policy's entropy: `(loss, entropy)`."""
    action, log_prob = sample_action(config, actor_params, batch.obs, noise)
    q = twin_critics(config, critic_params, batch.obs, action).min(axis=0)
    return (config.alpha * log_prob - q).mean(), -log_prob.mean()


def optimizer(config):
    """Adam; gradient clipping or a schedule, in updates of the parameters in question, goes here."""
    return optax.adam(config.learning_rate)


def apply_grads(config, grads, params, opt_state):
    """One step of the optimizer: `(params, opt_state)`."""
    updates, opt_state = optimizer(config).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def update(config, params, opt_state, batch, noise):
    """One update from a batch, with standard normal `noise [2, batch, action_dim]`: `(params, opt_state, losses)`."""
    target = soft_value(config, params, batch, noise[0])
    loss, grads = jax.value_and_grad(value_loss)(params.value, config, batch, target)
    value_params, value_opt_state = apply_grads(config, grads, params.value, opt_state.value)
    target = td_target(config, params, batch)
    critic_losses, grads = jax.value_and_grad(critic_loss, has_aux=True)(params.critic, config, batch, target)
    critic_params, critic_opt_state = apply_grads(config, grads, params.critic, opt_state.critic)
    actor_grad = jax.value_and_grad(actor_loss, has_aux=True)
    actor_losses, grads = actor_grad(params.actor, critic_params, config, batch, noise[1])
    actor_params, actor_opt_state = apply_grads(config, grads, params.actor, opt_state.actor)
    target_value = optax.incremental_update(value_params, params.target_value, config.tau)
    params = Params(actor_params, critic_params, value_params, target_value)
    opt_state = OptState(actor_opt_state, critic_opt_state, value_opt_state)
    return params, opt_state, (*critic_losses, *actor_losses, loss)


# Policies


def greedy(config, params, obs):
    """The policy without noise: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return actor(config, params.actor, obs)


def explore(config, params, obs, key):
    """Actions sampled from the policy."""
    noise = random.normal(key, (*obs.shape[:-1], make_env(config.env).action_dim))
    return sample_action(config, params.actor, obs, noise)[0]


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


# Training


def collect(config, state, policy):
    """`num_steps` steps of all environments with `policy`, stored: `State`."""
    key, key_rollout = random.split(state.key)
    keys = random.split(key_rollout, config.num_steps)
    env_state, obs, transitions = rollout(config, state.params, policy, state.env_state, state.obs, keys)
    buffer, step = store(state.buffer, state.step, transitions), state.step + transitions.reward.size
    return state._replace(buffer=buffer, env_state=env_state, obs=obs, step=step, key=key)


def iteration(config, state):
    """Collect, then make the updates that these steps ask for: `(State, losses)`."""
    state = collect(config, state, explore)
    key, key_rows, key_noise = random.split(state.key, 3)
    num_updates = round(config.utd_ratio * config.num_envs * config.num_steps)
    rows = sample_rows(config, state.buffer, state.step, key_rows, num_updates)
    batches = read(config, state.buffer, rows)
    noise = random.normal(key_noise, (num_updates, 2, config.batch_size, make_env(config.env).action_dim))

    def step(carry, xs):
        *carry, losses = update(config, *carry, *xs)
        return tuple(carry), losses

    (params, opt_state), losses = lax.scan(step, (state.params, state.opt_state), (batches, noise))
    return state._replace(params=params, opt_state=opt_state, key=key), losses


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


def num_iterations(config, steps):
    """The fewest iterations that take `steps` environment steps."""
    return math.ceil(steps / (config.num_envs * config.num_steps))


def num_epochs(config):
    """The fewest epochs after the warm-up that reach `total_steps`, at least one."""
    total, warm_up = num_iterations(config, config.total_steps), num_iterations(config, config.learning_starts)
    return max(1, math.ceil((total - warm_up) / num_iterations(config, config.steps_per_epoch)))


def init(config, key):
    """Networks, targets, and a buffer filled by the warm-up; ValueError where `config` does not fit."""
    check(config)
    per_iteration, length = config.num_envs * config.num_steps, num_iterations(config, config.learning_starts)
    updates, per_epoch = config.utd_ratio * per_iteration, num_iterations(config, config.steps_per_epoch)
    if not math.isclose(updates, max(1, round(updates))):
        raise ValueError(f"utd_ratio={config.utd_ratio}: must make whole updates per iteration, not {updates}")
    capacity = num_iterations(config, config.buffer_size) * per_iteration
    steps = (length + num_epochs(config) * per_epoch) * per_iteration
    check(config, total_steps=steps, buffer_size=capacity, utd_ratio=round(updates) * per_epoch)
    env = make_env(config.env)
    key, key_eval, key_actor, key_critic, key_value, key_env = random.split(key, 6)
    env_state, obs = jax.vmap(env.reset)(random.split(key_env, config.num_envs))
    actor_params = mlp_init(key_actor, (env.obs_dim, *config.hidden_sizes, 2 * env.action_dim))
    critic_sizes = (env.obs_dim + env.action_dim, *config.hidden_sizes, 1)
    critic_params = jax.vmap(lambda key: mlp_init(key, critic_sizes))(random.split(key_critic))
    value_params = mlp_init(key_value, (env.obs_dim, *config.hidden_sizes, 1))
    target_value = jax.tree.map(jnp.copy, value_params)  # a copy, since the state may be donated
    params = Params(actor_params, critic_params, value_params, target_value)
    opt_state = OptState(*(optimizer(config).init(x) for x in (actor_params, critic_params, value_params)))
    buffer = jnp.zeros((capacity, ravel_pytree(example(config))[0].size))
    state = State(params, opt_state, buffer, env_state, obs, jnp.int32(0), key, key_eval)
    return lax.scan(lambda state, _: (collect(config, state, warm_up), None), state, length=length)[0]


def epoch(config, state):
    """`steps_per_epoch` environment steps with their updates, then an evaluation: `(State, Metrics)`."""
    length = num_iterations(config, config.steps_per_epoch)
    state, losses = lax.scan(lambda state, _: iteration(config, state), state, length=length)
    returns = evaluate(config, state.params, random.fold_in(state.key_eval, state.step))
    return state, Metrics(state.step, returns, *(x.mean() for x in losses))


def train(config, key):
    """A whole run, a pure function: `(State, Metrics)`, metrics with a leading axis `[num_epochs]`."""
    return lax.scan(lambda state, _: epoch(config, state), init(config, key), length=num_epochs(config))


if __name__ == "__main__":
    from amortax.common.run import main

    main(Config, init, epoch, num_epochs)

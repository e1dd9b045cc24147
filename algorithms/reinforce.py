"""REINFORCE with a value baseline: the score-function policy gradient, which treats the environment as a black box.

The log-probability of each action is weighted by its advantage, and a value network regresses onto the rewards to go;
as a baseline it changes the gradient's variance, not its mean. The policy is `d` below, `pi` in most papers.

    initialize policy d and baseline v
    repeat until total_steps environment steps:
        take num_steps steps in num_envs environments with a ~ d(. | s), and keep (s, a, r, s', terminated, truncated)
        delta_t = r_t + gamma * (1 - terminated_t) * v(s'_t) - v(s_t)
        A_t     = delta_t + gamma * gae_lambda * (1 - terminated_t) * (1 - truncated_t) * A_{t+1}, backward in time
        R_t     = A_t + v(s_t), for gae_lambda = 1 the discounted rewards to go
        one Adam step of d on -mean (A_t * log d(a_t | s_t))
        critic_steps Adam steps of v on mean (v(s_t) - R_t)^2, each for a batch of these steps

Sources: Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning" (Machine
Learning 8, 1992), section 5; Sutton et al. (NeurIPS 1999), theorem 1; Schulman et al., "High-Dimensional Continuous
Control Using Generalized Advantage Estimation" (ICLR 2016), equation 16.

Differences from the papers:
- The baseline's value replaces the rewards after a time limit and after the last step of an iteration.
- The factor gamma^t of the discounted objective's gradient is omitted, as usual: late states count as much as early.
- Continuous actions are Gaussian, and the environment clips them: the density is that of the action before clipping.
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

Count = Annotated[int, "from 1 to 2147483647"]  # a plain int may be 0 or negative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields set shapes and loop lengths; the others can be traced, vmapped and swept.

    Counts of environment steps are rounded up to whole iterations of num_envs * num_steps.
    """

    env: str = jax.tree.static(default="CartPole-v1")  # gymnax environment, bounded continuous or Discrete actions
    total_steps: Count = jax.tree.static(default=512_000)  # environment steps
    steps_per_epoch: Count = jax.tree.static(default=51_200)  # environment steps between evaluations
    num_envs: Count = jax.tree.static(default=32)  # environments stepped in parallel
    num_steps: Count = jax.tree.static(default=32)  # steps of each environment per iteration
    num_eval_episodes: Count = jax.tree.static(default=128)  # greedy episodes per evaluation
    critic_steps: Count = jax.tree.static(default=8)  # updates of the baseline per update of the policy
    batch_size: Count = jax.tree.static(default=256)  # transitions per update of the baseline
    hidden_sizes: tuple[Count, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    activation: Literal["relu", "silu", "elu", "tanh"] = jax.tree.static(default="silu")  # of the hidden layers
    actor_learning_rate: Annotated[float, "> 0"] = 1e-3  # Adam's step size for the policy
    critic_learning_rate: Annotated[float, "> 0"] = 3e-3  # Adam's step size for the baseline
    gamma: Annotated[float, "in [0, 1]"] = 0.97  # discount per environment step
    gae_lambda: Annotated[float, "in [0, 1]"] = 0.9  # decay of generalized advantage estimation, 1 is Monte Carlo
    initial_std: Annotated[float, "> 0"] = 0.5  # initial standard deviation of continuous actions in [-1, 1]


class Transition(NamedTuple):
    """One environment step, or a batch of them."""

    obs: jax.Array  # [..., obs_dim]
    action: jax.Array  # [..., action_dim], continuous ones before clipping to [-1, 1]
    reward: jax.Array  # [...]
    next_obs: jax.Array  # [..., obs_dim], before any reset
    terminated: jax.Array  # [...], 0 at a time limit
    truncated: jax.Array  # [...], 1 at a time limit


class Actor(NamedTuple):
    """Parameters of the policy."""

    network: Any  # logits of Discrete actions, the mean of continuous ones
    log_std: jax.Array  # [action_dim], log standard deviation, unused for Discrete actions


class Params(NamedTuple):
    """Everything learned."""

    actor: Actor
    critic: Any


class OptState(NamedTuple):
    """Adam's state."""

    actor: Any
    critic: Any


class State(NamedTuple):
    """Everything carried from one iteration to the next."""

    params: Params
    opt_state: OptState
    env_state: Any  # leading axis [num_envs]
    obs: jax.Array  # [num_envs, obs_dim]
    step: jax.Array  # [] int32, environment steps so far
    key: jax.Array  # [] random key of the training
    key_eval: jax.Array  # [] random key of the evaluations, so that their number does not change the training


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps so far
    eval_returns: jax.Array  # [num_eval_episodes], undiscounted, greedy policy
    critic_loss: jax.Array  # [], mean over the epoch
    value: jax.Array  # [], mean of the baseline on the steps of the epoch
    actor_loss: jax.Array  # [], mean over the epoch
    entropy: jax.Array  # [], nats, of the policy, continuous actions before clipping, mean over the epoch


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
    """Distribution over one-hot vectors or unclipped actions `[..., action_dim]`, for `obs [..., obs_dim]`."""
    x = mlp(config, params.network, obs)
    if make_env(config.env).discrete:
        return distrax.OneHotCategorical(x)
    return distrax.MultivariateNormalDiag(x, jnp.broadcast_to(jnp.exp(params.log_std), x.shape))


def critic(config, params, obs):
    """Baseline: `obs [..., obs_dim]` to the value of the policy `[...]`."""
    return mlp(config, params, obs)[..., 0]


# Learning


def advantages(config, transitions, value, next_value):
    """Generalized advantage estimates (eq. 16) `[num_steps, num_envs]`.

    `value` and `next_value` are those of the baseline before and after each step.
    """
    delta = transitions.reward + config.gamma * jnp.where(transitions.terminated, 0, next_value) - value
    ended = transitions.terminated | transitions.truncated

    def step(next_advantage, xs):
        delta, ended = xs
        advantage = delta + config.gamma * config.gae_lambda * jnp.where(ended, 0, next_advantage)
        return advantage, advantage

    return lax.scan(step, jnp.zeros_like(delta[0]), (delta, ended), reverse=True)[1]


def critic_loss(critic_params, config, obs, target):
    """Mean squared error to `target [batch]`."""
    return jnp.square(critic(config, critic_params, obs) - target).mean()


def actor_loss(actor_params, config, transitions, advantage):
    """Score-function loss, whose gradient is minus the policy gradient, and the mean entropy: `(loss, entropy)`."""
    distribution, action = policy(config, actor_params, transitions.obs), transitions.action
    log_prob = distribution.log_prob((action + 1) / 2 if make_env(config.env).discrete else action)
    return -(advantage * log_prob).mean(), distribution.entropy().mean()


def optimizer(learning_rate):
    """Adam; gradient clipping or a schedule, in updates of the parameters in question, goes here."""
    return optax.adam(learning_rate)


def apply_grads(learning_rate, grads, params, opt_state):
    """One step of the optimizer: `(params, opt_state)`."""
    updates, opt_state = optimizer(learning_rate).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def update(config, params, opt_state, transitions, index):
    """One update of the policy, then `critic_steps` of the baseline: `(params, opt_state, losses)`.

    A row of `index [critic_steps, batch_size]` is a batch of the flattened `transitions [num_steps, num_envs]`.
    """
    value, next_value = (
        critic(config, params.critic, transitions.obs),
        critic(config, params.critic, transitions.next_obs),
    )
    advantage = advantages(config, transitions, value, next_value)
    actor_losses, grads = jax.value_and_grad(actor_loss, has_aux=True)(params.actor, config, transitions, advantage)
    actor_params, actor_opt_state = apply_grads(config.actor_learning_rate, grads, params.actor, opt_state.actor)
    obs, target = transitions.obs.reshape(value.size, -1), (advantage + value).ravel()

    def step(carry, rows):
        loss, grads = jax.value_and_grad(critic_loss)(carry[0], config, obs[rows], target[rows])
        return apply_grads(config.critic_learning_rate, grads, *carry), loss

    (critic_params, critic_opt_state), losses = lax.scan(step, (params.critic, opt_state.critic), index)
    opt_state = OptState(actor_opt_state, critic_opt_state)
    return Params(actor_params, critic_params), opt_state, (losses.mean(), value.mean(), *actor_losses)


# Policies


def greedy(config, params, obs):
    """The policy's mode: `obs [..., obs_dim]` to actions `[..., action_dim]`."""
    return encode(config, policy(config, params.actor, obs).mode())


def explore(config, params, obs, key):
    """Actions sampled from the policy."""
    return encode(config, policy(config, params.actor, obs).sample(seed=key))


def encode(config, action):
    """One-hot Discrete actions as vectors of -1 and 1, continuous ones as they are."""
    return 2.0 * action - 1 if make_env(config.env).discrete else action


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
        env_state, new_obs, reward, next_obs, terminated, truncated = env_step(env_state, action, keys_env)
        return (env_state, new_obs), Transition(obs, action, reward, next_obs, terminated, truncated)

    (env_state, obs), transitions = lax.scan(step, (env_state, obs), keys)
    return env_state, obs, transitions


# Training


def iteration(config, state):
    """`num_steps` steps of all environments, then the updates of policy and baseline from them: `(State, losses)`."""
    key, key_rollout, key_index = random.split(state.key, 3)
    keys = random.split(key_rollout, config.num_steps)
    env_state, obs, transitions = rollout(config, state.params, explore, state.env_state, state.obs, keys)
    step = state.step + transitions.reward.size
    index = random.randint(key_index, (config.critic_steps, config.batch_size), 0, transitions.reward.size)
    params, opt_state, losses = update(config, state.params, state.opt_state, transitions, index)
    return State(params, opt_state, env_state, obs, step, key, state.key_eval), losses


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
    """The fewest epochs that reach `total_steps`."""
    return math.ceil(num_iterations(config, config.total_steps) / num_iterations(config, config.steps_per_epoch))


def init(config, key):
    """Networks and environments; ValueError where `config` does not fit."""
    check(config)
    iterations = num_epochs(config) * num_iterations(config, config.steps_per_epoch)
    check(config, total_steps=iterations * config.num_envs * config.num_steps)
    env = make_env(config.env)
    key, key_eval, key_actor, key_critic, key_env = random.split(key, 5)
    env_state, obs = jax.vmap(env.reset)(random.split(key_env, config.num_envs))
    # gymnax's Python numbers are weakly typed, which would compile `epoch` twice
    env_state = jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), env_state)
    network = mlp_init(key_actor, (env.obs_dim, *config.hidden_sizes, env.action_dim))
    actor_params = Actor(network, jnp.full(env.action_dim, jnp.log(config.initial_std), float))
    critic_params = mlp_init(key_critic, (env.obs_dim, *config.hidden_sizes, 1))
    actor_opt_state = optimizer(config.actor_learning_rate).init(actor_params)
    critic_opt_state = optimizer(config.critic_learning_rate).init(critic_params)
    params, opt_state = Params(actor_params, critic_params), OptState(actor_opt_state, critic_opt_state)
    return State(params, opt_state, env_state, obs, jnp.int32(0), key, key_eval)


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

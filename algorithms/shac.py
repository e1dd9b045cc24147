"""Short-horizon actor-critic (SHAC): the pathwise derivative of short windows, with a critic for what comes after them.

Gradients stay short and smooth however long episodes are, and an update needs the steps of a window, not of a rollout.

    initialize policy a = tanh(mean_w(s) + std_w(s) * e), critic v, target critic v' as its copy, and environments
    repeat until total_steps environment steps:
        continue num_envs environments for a window of h = num_steps steps s_{t+1} = f(s_t, a_t, o_t), a_t as above,
            with standard normal noise e_t of the policy and the noise o_t of the environment
        for each window: J = sum_{t<h} gamma^t r(s_t, a_t) + gamma^h v'(s_h); an episode that ends in it has its own
            sum, with v' of its last state at a time limit and without v' at a termination
        one Adam step of w on -mean dJ/dw, by backpropagation, its norm clipped to max_grad_norm
        R_t = r_t + gamma * (1 - terminated_t) * ((1 - td_lambda) * v'(s_{t+1}) + td_lambda * R_{t+1}), backward in
            time, with v'(s_{t+1}) for R_{t+1} at the end of the episode or window
        critic_steps Adam steps of v on mean (v(s_t) - R_t)^2, each for a batch of these steps
        v' <- tau * v + (1 - tau) * v'

Sources: Xu et al., "Accelerated Policy Learning with Parallel Differentiable Simulation" (ICLR 2022), Algorithm 1;
Heess et al., "Learning Continuous Control Policies by Stochastic Value Gradients" (NeurIPS 2015), for one step SVG(1).

Differences from the paper:
- The objective is not divided by h, so that without a critic it is that of `svg.py`.
- Constant learning rates, and Adam with its usual betas, not 0.7 and 0.95; no normalization of observations.
- Batches of the critic are drawn with replacement.
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

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # bounds of the policy's log standard deviation

Count = Annotated[int, "from 1 to 2147483647"]  # a plain int may be 0 or negative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields set shapes and loop lengths; the others can be traced, vmapped and swept.

    Counts of environment steps are rounded up to whole iterations of num_envs * num_steps.
    """

    env: str = jax.tree.static(default="Pendulum-v1")  # gymnax environment with bounded continuous actions
    total_steps: Count = jax.tree.static(default=614_400)  # environment steps
    steps_per_epoch: Count = jax.tree.static(default=61_440)  # environment steps between evaluations
    num_envs: Count = jax.tree.static(default=32)  # environments stepped in parallel
    num_steps: Count = jax.tree.static(default=32)  # steps of each environment per iteration, the length of a window
    num_eval_episodes: Count = jax.tree.static(default=128)  # greedy episodes per evaluation
    critic_steps: Count = jax.tree.static(default=16)  # updates of the critic per update of the policy
    batch_size: Count = jax.tree.static(default=256)  # transitions per update of the critic
    hidden_sizes: tuple[Count, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    activation: Literal["relu", "silu", "elu", "tanh"] = jax.tree.static(default="silu")  # of the hidden layers
    actor_learning_rate: Annotated[float, "> 0"] = 2e-3  # Adam's step size for the policy
    critic_learning_rate: Annotated[float, "> 0"] = 2e-3  # Adam's step size for the critic
    gamma: Annotated[float, "in [0, 1]"] = 0.97  # discount per environment step
    td_lambda: Annotated[float, "in [0, 1]"] = 0.95  # decay of the critic's targets, 0 is one step, 1 the whole window
    tau: Annotated[float, "in [0, 1]"] = 0.2  # step of the target critic towards the critic, once per iteration
    initial_std: Annotated[float, "> 0"] = 0.3  # initial standard deviation of the policy before tanh
    max_grad_norm: Annotated[float, "> 0"] = 1.0  # norm to which longer gradients of the policy are clipped


class Transition(NamedTuple):
    """One environment step, or a batch of them."""

    obs: jax.Array  # [..., obs_dim]
    action: jax.Array  # [..., action_dim], in [-1, 1]
    reward: jax.Array  # [...]
    next_obs: jax.Array  # [..., obs_dim], before any reset
    terminated: jax.Array  # [...], 0 at a time limit
    truncated: jax.Array  # [...], 1 at a time limit


class Params(NamedTuple):
    """Everything learned."""

    actor: Any
    critic: Any
    target_critic: Any


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
    value: jax.Array  # [], mean of the critic's targets, mean over the epoch
    objective: jax.Array  # [], discounted return of the windows with the value at their end, mean over the epoch
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


def critic(config, params, obs):
    """Value of the policy: `obs [..., obs_dim]` to `[...]`."""
    return mlp(config, params, obs)[..., 0]


# Learning


def td_targets(config, transitions, next_value, td_lambda):
    """TD(lambda) targets `[num_steps, num_envs]`; `next_value` is the value after each step."""

    def step(next_target, xs):
        reward, next_value, terminated, ended = xs
        after = jnp.where(ended, next_value, (1 - td_lambda) * next_value + td_lambda * next_target)
        target = reward + config.gamma * jnp.where(terminated, 0, after)
        return target, target

    ended = transitions.terminated | transitions.truncated
    xs = transitions.reward, next_value, transitions.terminated, ended
    return lax.scan(step, next_value[-1], xs, reverse=True)[1]


def discounted_return(actor_params, config, params, env_state, obs, keys):
    """Objective of a window from `obs [num_envs, obs_dim]`, mean over environments: `(objective, its rollout)`.

    The return of an episode that starts within the window is added to that of the one before.
    """
    after = rollout(config, params._replace(actor=actor_params), explore, env_state, obs, keys)
    transitions = after[2]
    ended = transitions.terminated | transitions.truncated
    # a NaN in the last observation would reach the gradient through a value that is left out: 0 times NaN is NaN
    end = jnp.where(transitions.terminated[..., None], transitions.obs, transitions.next_obs)
    returns = td_targets(config, transitions, critic(config, params.target_critic, end), 1.0)
    first = jnp.ones_like(ended).at[1:].set(ended[:-1])
    return jnp.where(first, returns, 0).sum(axis=0).mean(), after


def critic_loss(critic_params, config, obs, target):
    """Mean squared error to `target [batch]`."""
    return jnp.square(critic(config, critic_params, obs) - target).mean()


def optimizer(learning_rate):
    """Adam; a schedule, in updates of the parameters in question, goes here."""
    return optax.adam(learning_rate)


def apply_grads(learning_rate, grads, params, opt_state):
    """One step of the optimizer: `(params, opt_state)`."""
    updates, opt_state = optimizer(learning_rate).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def update(config, params, opt_state, env_state, obs, keys, index):
    """One update of the policy, along the clipped gradient, then `critic_steps` of the critic from the same window.

    A row of `index [critic_steps, batch_size]` is a batch of the flattened window. Gives `(params, opt_state,
    env_state, obs, losses)`.
    """
    objective = jax.value_and_grad(discounted_return, has_aux=True)
    (total, (env_state, obs, transitions)), grads = objective(params.actor, config, params, env_state, obs, keys)
    norm = optax.global_norm(grads)
    scale = jnp.where(jnp.isfinite(norm), jnp.minimum(1, config.max_grad_norm / norm), 0)
    descent = jax.tree.map(lambda x: jnp.where(jnp.isfinite(norm), -scale * x, 0), grads)  # 0 times NaN is NaN
    actor_params, actor_opt_state = apply_grads(config.actor_learning_rate, descent, params.actor, opt_state.actor)
    next_value = critic(config, params.target_critic, transitions.next_obs)
    target = td_targets(config, transitions, next_value, config.td_lambda).ravel()
    batch = transitions.obs.reshape(target.size, -1)

    def step(carry, rows):
        loss, grads = jax.value_and_grad(critic_loss)(carry[0], config, batch[rows], target[rows])
        return apply_grads(config.critic_learning_rate, grads, *carry), loss

    (critic_params, critic_opt_state), losses = lax.scan(step, (params.critic, opt_state.critic), index)
    target_critic = optax.incremental_update(critic_params, params.target_critic, config.tau)
    params, opt_state = Params(actor_params, critic_params, target_critic), OptState(actor_opt_state, critic_opt_state)
    return params, opt_state, env_state, obs, (losses.mean(), target.mean(), total, norm, scale < 1)


# Policies


def greedy(config, params, obs):
    """The policy without noise: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return actor(config, params.actor, obs)


def explore(config, params, obs, key):
    """Actions sampled from the policy, differentiable by its parameters and the observation."""
    noise = random.normal(key, (*obs.shape[:-1], make_env(config.env).action_dim))
    return sample_action(config, params.actor, obs, noise)


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
    """The gymnax environment `name`; ValueError unless actions are bounded and continuous, and steps differentiable.

    Without `with_transition_gradients` gymnax stops the gradient of a step.
    """
    with jax.ensure_compile_time_eval():
        env, env_params = gymnax.make(name)
        space = env.action_space(env_params)
        low, high = (np.full(space.shape, getattr(space, bound, np.nan), np.float32) for bound in ("low", "high"))
        max_steps = max(10_000, getattr(env_params, "max_steps_in_episode", 0))  # there may be no time limit
    fits = jnp.issubdtype(space.dtype, jnp.floating) and (np.abs([low, high]) < 1e38).all()  # finite also high - low
    if not fits:
        raise ValueError(f"env={name}: must have actions in a Box of floats with finite bounds")
    if not env.supports_transition_gradients:
        raise ValueError(f"env={name}: must have transition gradients")
    env = env.with_transition_gradients()

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
        env_state, new_obs, reward, next_obs, terminated, truncated = env_step(env_state, action, keys_env)
        return (env_state, new_obs), Transition(obs, action, reward, next_obs, terminated, truncated)

    (env_state, obs), transitions = lax.scan(step, (env_state, obs), keys)
    return env_state, obs, transitions


# Training


def iteration(config, state):
    """Continue all environments for `num_steps` steps, then update policy and critic from them: `(State, losses)`."""
    key, key_rollout, key_index = random.split(state.key, 3)
    keys, num_rows = random.split(key_rollout, config.num_steps), config.num_envs * config.num_steps
    index = random.randint(key_index, (config.critic_steps, config.batch_size), 0, num_rows)
    *carry, losses = update(config, state.params, state.opt_state, state.env_state, state.obs, keys, index)
    return State(*carry, state.step + num_rows, key, state.key_eval), losses


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
    *layers, (w, b) = mlp_init(key_actor, (env.obs_dim, *config.hidden_sizes, 2 * env.action_dim))
    actor_params = [*layers, (w, b.at[env.action_dim :].set(jnp.log(config.initial_std)))]
    critic_params = mlp_init(key_critic, (env.obs_dim, *config.hidden_sizes, 1))
    target_critic = jax.tree.map(jnp.copy, critic_params)  # a copy, since the state may be donated
    actor_opt_state = optimizer(config.actor_learning_rate).init(actor_params)
    critic_opt_state = optimizer(config.critic_learning_rate).init(critic_params)
    params, opt_state = Params(actor_params, critic_params, target_critic), OptState(actor_opt_state, critic_opt_state)
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

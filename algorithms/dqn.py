"""Deep Q-Network (DQN): Q-learning with discrete actions, whose maximum is taken over all values of a network.

DQN is fitted Q-iteration that stays online: each update is one gradient step of the fit, on a batch from a replay
buffer, and the target network is the Q-function of the previous iteration, replaced now and then or bit by bit.
Double Q-learning chooses the next action by the online network and takes its value from the target network.

    initialize critic q, target q' as a copy, and an empty replay buffer R
    fill R with learning_starts transitions of uniformly random actions
    repeat until total_steps environment steps:
        take num_steps steps in num_envs environments, with probability epsilon at random, else with
            a = argmax q(s, .), and store (s, a, r, s', terminated) in R
        repeat utd_ratio times for each of these steps:
            sample a batch from R
            a' = argmax q(s', .) if double, else argmax q'(s', .)
            y  = r + gamma * (1 - terminated) * q'(s', a')
            one Adam step on mean loss(q(s, a) - y)
            every target_period-th time:
                target <- tau * online network + (1 - tau) * target

Sources: Mnih et al., "Human-level control through deep reinforcement learning" (Nature 518, 2015), Algorithm 1; van
Hasselt, Guez, Silver, "Deep Reinforcement Learning with Double Q-learning" (AAAI 2016), equation 4.

Conventions: the loss is averaged over the batch, x^2 / 2 for |x| < 1 and |x| - 1/2 beyond (huber), or x^2 (squared).
Adam's epsilon is 1e-8, and gradients are not clipped.

Differences from the papers:
- Targets bootstrap through time limits, from the last observation before the reset.
- Environments step in parallel, num_envs at a time; the updates for their steps follow.
- Multilayer perceptrons on flattened observations, trained by Adam instead of RMSProp.
- The target moves a little at every update; --target-period 200 --tau 1 copies it, as the papers do.
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

Count = Annotated[int, "from 1 to 2147483647"]  # a plain int may be 0 or negative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields set shapes and loop lengths; the others can be traced, vmapped and swept.

    Counts of environment steps are rounded up to whole iterations of num_envs * num_steps.
    """

    env: str = jax.tree.static(default="CartPole-v1")  # gymnax environment with Discrete actions
    total_steps: Count = jax.tree.static(default=50_000)  # environment steps, warm-up included
    learning_starts: Count = jax.tree.static(default=1_000)  # environment steps of uniformly random warm-up
    steps_per_epoch: Count = jax.tree.static(default=5_000)  # environment steps between evaluations
    num_envs: Count = jax.tree.static(default=4)  # environments stepped in parallel
    num_steps: Count = jax.tree.static(default=2)  # steps of each environment per iteration
    utd_ratio: Annotated[float, "> 0"] = jax.tree.static(default=0.5)  # updates per environment step
    num_eval_episodes: Count = jax.tree.static(default=128)  # greedy episodes per evaluation
    buffer_size: Count = jax.tree.static(default=100_000)  # transitions in the replay buffer
    batch_size: Count = jax.tree.static(default=128)  # transitions per update
    hidden_sizes: tuple[Count, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    activation: Literal["relu", "silu", "elu", "tanh"] = jax.tree.static(default="silu")  # of the hidden layers
    double: bool = jax.tree.static(default=True)  # choose the next action by the online network
    loss: Literal["huber", "squared"] = jax.tree.static(default="huber")  # of the temporal-difference errors
    target_period: Count = jax.tree.static(default=1)  # updates per update of the target
    learning_rate: Annotated[float, "> 0"] = 1e-3  # Adam's step size
    gamma: Annotated[float, "in [0, 1]"] = 0.99  # discount per environment step
    tau: Annotated[float, "in [0, 1]"] = 0.005  # step of the target towards the online network
    epsilon_start: Annotated[float, "in [0, 1]"] = 1.0  # probability of a random action at the first step
    epsilon_end: Annotated[float, "in [0, 1]"] = 0.05  # the same after epsilon_steps
    epsilon_steps: Annotated[float, "> 0"] = 10_000.0  # environment steps of the linear decay, warm-up included


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
    target_critic: Any


class OptState(NamedTuple):
    """Adam's state."""

    critic: Any


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
    critic_loss: jax.Array  # [], mean over the epoch
    q_value: jax.Array  # [], mean on the batches of the epoch


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


def q_values(config, params, obs):
    """Values of all actions: `obs [..., obs_dim]` to `[..., action_dim]`."""
    return mlp(config, params, obs)


def critic(config, params, obs, action):
    """Action value: `obs [..., obs_dim]`, `action [..., action_dim]` to `[...]`."""
    return jnp.where(action > 0, q_values(config, params, obs), 0).sum(axis=-1)


# Learning


def td_target(config, params, batch):
    """Value `[batch]` of the best next action according to the online or the target network."""
    next_action = maximize(config, params.critic if config.double else params.target_critic, batch.next_obs)
    next_q = critic(config, params.target_critic, batch.next_obs, next_action)
    return batch.reward + config.gamma * jnp.where(batch.terminated, 0, next_q)


def maximize(config, critic_params, obs):
    """Actions `[..., action_dim]` of highest value at `obs [..., obs_dim]`."""
    return encode(config, jnp.argmax(q_values(config, critic_params, obs), axis=-1))


def critic_loss(critic_params, config, batch, target):
    """Mean loss of the error to `target [batch]`, and mean value: `(loss, q_value)`."""
    q = critic(config, critic_params, batch.obs, batch.action)
    error = optax.huber_loss(q, target) if config.loss == "huber" else jnp.square(q - target)
    return error.mean(), q.mean()


def optimizer(config):
    """Adam; gradient clipping or a schedule, in updates of the parameters in question, goes here."""
    return optax.adam(config.learning_rate)


def apply_grads(config, grads, params, opt_state):
    """One step of the optimizer: `(params, opt_state)`."""
    updates, opt_state = optimizer(config).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def update(config, params, opt_state, batch, count):
    """One update, the `count`-th, from a batch: `(params, opt_state, losses)`."""
    target = td_target(config, params, batch)
    critic_losses, grads = jax.value_and_grad(critic_loss, has_aux=True)(params.critic, config, batch, target)
    critic_params, critic_opt_state = apply_grads(config, grads, params.critic, opt_state.critic)
    new = optax.incremental_update(critic_params, params.target_critic, config.tau)
    target_critic = optax.periodic_update(new, params.target_critic, count, config.target_period)
    return Params(critic_params, target_critic), OptState(critic_opt_state), critic_losses


# Policies


def greedy(config, params, obs):
    """Actions of highest value: `obs [..., obs_dim]` to actions `[..., action_dim]`."""
    return maximize(config, params.critic, obs)


def explore(config, params, obs, key, epsilon):
    """Greedy actions, each replaced by a uniformly random one with probability `epsilon`."""
    key, key_random = random.split(key)
    is_random = random.bernoulli(key, epsilon, (*obs.shape[:-1], 1))
    return jnp.where(is_random, warm_up(config, params, obs, key_random), greedy(config, params, obs))


def warm_up(config, params, obs, key):
    """Uniformly random actions."""
    return encode(config, random.randint(key, obs.shape[:-1], 0, make_env(config.env).action_dim))


def epsilon_at(config, step):
    """Probability of a random action after `step` environment steps."""
    share = jnp.minimum(step / config.epsilon_steps, 1)
    return config.epsilon_start + share * (config.epsilon_end - config.epsilon_start)


def encode(config, number):
    """Actions by number `[...]` as vectors `[..., action_dim]` of -1 with a 1 in the action's place."""
    return 2 * jax.nn.one_hot(number, make_env(config.env).action_dim) - 1


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
    max_steps: int  # bound of evaluation episodes
    flatten: Callable  # observation of any shape and type -> the same as floats [obs_dim], one-hot if Discrete
    reset: Callable  # key -> (env_state, obs)
    step: Callable  # (env_state, action, key) -> (env_state, obs, reward, next_obs, terminated, truncated)
    rescale: Callable  # action -> its number


@functools.cache
def make_env(name):
    """The gymnax environment `name`; ValueError unless its actions are discrete."""
    with jax.ensure_compile_time_eval():
        env, env_params = gymnax.make(name)
        space = env.action_space(env_params)
        max_steps = max(10_000, getattr(env_params, "max_steps_in_episode", 0))  # there may be no time limit
    if not hasattr(space, "n"):
        raise ValueError(f"env={name}: must have Discrete actions")

    def flatten(obs):
        one_of_n = jnp.ndim(obs) == 0 and jnp.issubdtype(jnp.result_type(obs), jnp.integer)
        return jax.nn.one_hot(obs, env.observation_space(env_params).n) if one_of_n else jnp.ravel(obs).astype(float)

    def rescale(action):
        return jnp.argmax(action)

    def reset(key):
        obs, env_state = env.reset(key, env_params)
        return env_state, flatten(obs)

    def step(env_state, action, key):
        obs, env_state, reward, terminated, truncated, info = env.step(key, env_state, rescale(action), env_params)
        # wrappers often transform `obs` alone, so the copy in `info` is read only where there is no other
        next_obs = jnp.where(terminated | truncated, flatten(info["final_observation"]), flatten(obs))
        return env_state, flatten(obs), reward, next_obs, terminated, truncated

    return Env(jax.eval_shape(reset, random.key(0))[1].size, int(space.n), max_steps, flatten, reset, step, rescale)


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


def iteration(config, state, number):
    """Collect, then make the updates that these steps ask for: `(State, losses)`; `number` counts from 0 each epoch."""
    state = collect(config, state, functools.partial(explore, epsilon=epsilon_at(config, state.step)))
    key, key_rows = random.split(state.key)
    num_updates = round(config.utd_ratio * config.num_envs * config.num_steps)
    rows = sample_rows(config, state.buffer, state.step, key_rows, num_updates)
    batches = read(config, state.buffer, rows)
    counts = number * num_updates + 1 + jnp.arange(num_updates)

    def step(carry, xs):
        *carry, losses = update(config, *carry, *xs)
        return tuple(carry), losses

    (params, opt_state), losses = lax.scan(step, (state.params, state.opt_state), (batches, counts))
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
    """Networks and a buffer filled by the warm-up; ValueError where `config` does not fit."""
    check(config)
    per_iteration, length = config.num_envs * config.num_steps, num_iterations(config, config.learning_starts)
    updates, per_epoch = config.utd_ratio * per_iteration, num_iterations(config, config.steps_per_epoch)
    if not math.isclose(updates, max(1, round(updates))):
        raise ValueError(f"utd_ratio={config.utd_ratio}: must make whole updates per iteration, not {updates}")
    capacity = num_iterations(config, config.buffer_size) * per_iteration
    steps = (length + num_epochs(config) * per_epoch) * per_iteration
    check(config, total_steps=steps, buffer_size=capacity, utd_ratio=round(updates) * per_epoch)
    env = make_env(config.env)
    key, key_eval, _, key_critic, key_env = random.split(key, 5)
    env_state, obs = jax.vmap(env.reset)(random.split(key_env, config.num_envs))
    critic_params = mlp_init(key_critic, (env.obs_dim, *config.hidden_sizes, env.action_dim))
    params = Params(critic_params, jax.tree.map(jnp.copy, critic_params))  # a copy, since the state may be donated
    opt_state = OptState(optimizer(config).init(critic_params))
    buffer = jnp.zeros((capacity, ravel_pytree(example(config))[0].size))
    state = State(params, opt_state, buffer, env_state, obs, jnp.int32(0), key, key_eval)
    return lax.scan(lambda state, _: (collect(config, state, warm_up), None), state, length=length)[0]


def epoch(config, state):
    """`steps_per_epoch` environment steps with their updates, then an evaluation: `(State, Metrics)`."""
    numbers = jnp.arange(num_iterations(config, config.steps_per_epoch))
    state, losses = lax.scan(functools.partial(iteration, config), state, numbers)
    returns = evaluate(config, state.params, random.fold_in(state.key_eval, state.step))
    return state, Metrics(state.step, returns, *(x.mean() for x in losses))


def train(config, key):
    """A whole run, a pure function: `(State, Metrics)`, metrics with a leading axis `[num_epochs]`."""
    return lax.scan(lambda state, _: epoch(config, state), init(config, key), length=num_epochs(config))


if __name__ == "__main__":
    from amortax.common.run import main

    main(Config, init, epoch, num_epochs)

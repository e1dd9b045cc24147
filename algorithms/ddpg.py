"""Deep Deterministic Policy Gradient (DDPG): Q-learning with the maximisation over actions left to a network.

A critic is trained on the value of the next action that a target actor takes, the actor climbs the critic's value of
its own actions, and noise that drifts rather than jumps explores.

    initialise critic q, actor d, targets q', d' as copies, an empty replay buffer R, noise n = ou_mu
    fill R with learning_starts transitions of uniformly random actions
    repeat until total_steps environment steps:
        in num_envs environments, each with a noise of its own:
            n <- n + ou_theta * (ou_mu - n) * ou_dt + ou_sigma * sqrt(ou_dt) * N(0, 1)
            take a = clip(d(s) + n, -1, 1) and store (s, a, r, s', terminated) in R
            where the episode has ended: n <- ou_mu
        once for each environment step:
            draw a batch from R
            y = r + gamma * (1 - terminated) * q'(s', d'(s'))
            one Adam step on mean (q(s, a) - y)^2
            one Adam step on -mean q(s, d(s))
            every target_period-th time:
                every target <- tau * its online network + (1 - tau) * target

Sources: Lillicrap et al., "Continuous control with deep reinforcement learning" (ICLR 2016), Algorithm 1; Silver et
al., "Deterministic policy gradient algorithms" (ICML 2014), equation 9; Uhlenbeck and Ornstein, "On the theory of the
Brownian motion" (Physical Review, 1930).

Departures, each for a reason:
- A time limit is no termination: the target bootstraps through it from the last observation before the reset.
- Targets are copied whole (tau 1) every target_period updates; --tau 0.02 --target-period 1 gives the soft targets of
  Lillicrap et al.
- Environments step together, `num_envs` at a time; the updates they are owed follow at once, one per environment step.
- The noise is slower and wider than the paper's (theta 0.15, sigma 0.2, dt 1): it pushes one way for dozens of steps,
  which MountainCarContinuous-v0 asks for. It is in the unit of actions scaled to [-1, 1].
- Networks are small (64 x 64), without batch normalisation or weight decay.
"""

import dataclasses
import math
from typing import Any, NamedTuple

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
    total_steps: int = jax.tree.static(default=10_000)  # environment steps in all, the warm-up included
    learning_starts: int = jax.tree.static(default=1_000)  # environment steps of uniformly random warm-up
    steps_per_epoch: int = jax.tree.static(default=1_000)  # environment steps between two evaluations
    num_envs: int = jax.tree.static(default=8)  # environments that step together
    num_eval_episodes: int = jax.tree.static(default=128)  # greedy episodes of an evaluation
    buffer_size: int = jax.tree.static(default=100_000)  # transitions the replay buffer holds
    batch_size: int = jax.tree.static(default=256)  # transitions of an update
    hidden_sizes: tuple[int, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    target_period: int = jax.tree.static(default=40)  # updates between two of the targets
    learning_rate: float = 1e-3  # Adam's step size for actor and critics, > 0
    gamma: float = 0.99  # discount per environment step, in [0, 1]
    tau: float = 1.0  # fraction by which targets move towards their networks, in [0, 1]
    ou_theta: float = 0.15  # rate at which the noise returns to its mean, per unit of time, >= 0
    ou_sigma: float = 0.5  # standard deviation of the noise's diffusion in a unit of time, >= 0
    ou_mu: float = 0.0  # mean of the noise
    ou_dt: float = 0.1  # time from one step to the next, > 0


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
    target_actor: Any
    target_critic: Any


class OptState(NamedTuple):
    """Adam's moments."""

    actor: Any
    critic: Any


class Buffer(NamedTuple):
    """Ring of packed transitions: one array is written by one slice update, in place, and read by one gather."""

    rows: jax.Array  # [buffer_size, 2 * obs_dim + action_dim + 2]
    position: jax.Array  # [] int32, where the next row goes
    size: jax.Array  # [] int32, rows filled


class State(NamedTuple):
    """All that training carries from one environment step to the next."""

    params: Params
    opt_state: OptState
    buffer: Buffer
    env_state: Any  # gymnax states, leading axis [num_envs]
    obs: jax.Array  # [num_envs, obs_dim]
    noise: jax.Array  # [num_envs, action_dim], the Ornstein-Uhlenbeck processes
    step: jax.Array  # [] int32, environment steps so far
    key: jax.Array  # [] random key


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps so far
    eval_returns: jax.Array  # [num_eval_episodes], undiscounted, of the greedy policy
    value_bias: jax.Array  # [], what the critic expects of the greedy policy at evaluation minus what it gets
    critic_loss: jax.Array  # [], mean over the epoch
    actor_loss: jax.Array  # [], mean over the epoch


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


def actor(params, obs):
    """Deterministic policy: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return jnp.tanh(mlp(params, obs))


def critic(params, obs, action):
    """Action value: `obs [..., obs_dim]`, `action [..., action_dim]` to `[...]`."""
    return mlp(params, jnp.concatenate([obs, action], axis=-1))[..., 0]


def greedy_value(config, params, obs):
    """What the critic expects of the greedy policy: `obs [..., obs_dim]` to `[...]`."""
    return critic(params.critic, obs, actor(params.actor, obs))


def act(config, params, obs):
    """Greedy action in the environment's units and shape for one observation of any shape."""
    return scale_action(config, actor(params.actor, flatten(obs[None])[0]))


# Replay buffer


def buffer_init(capacity, width):
    """Empty ring of `capacity` rows."""
    return Buffer(jnp.zeros((capacity, width)), jnp.int32(0), jnp.int32(0))


def buffer_add(buffer, transition):
    """Store `transition [n]` over the oldest rows; `n` must divide the capacity, so that no write wraps around."""
    columns = [x if x.ndim > 1 else x[:, None] for x in transition]
    rows = jnp.concatenate(columns, axis=1, dtype=buffer.rows.dtype)
    capacity, n = len(buffer.rows), len(rows)
    return Buffer(
        lax.dynamic_update_slice_in_dim(buffer.rows, rows, buffer.position, axis=0),
        (buffer.position + n) % capacity,
        jnp.minimum(buffer.size + n, capacity),
    )


def unpack(rows, action_dim):
    """Rows `[..., 2 * obs_dim + action_dim + 2]` as `Transition [...]`."""
    obs_dim = (rows.shape[-1] - action_dim - 2) // 2
    ends = (obs_dim, obs_dim + action_dim, obs_dim + action_dim + 1, rows.shape[-1] - 1)
    obs, action, reward, next_obs, terminated = jnp.split(rows, ends, axis=-1)
    return Transition(obs, action, reward[..., 0], next_obs, terminated[..., 0])


def buffer_sample(buffer, key, shape, action_dim):
    """Draw `Transition [*shape]` uniformly, with replacement, from the filled rows."""
    index = random.randint(key, shape, 0, buffer.size)
    return unpack(buffer.rows.at[index].get(mode="promise_in_bounds"), action_dim)


# Losses


def critic_loss(critic_params, config, params, batch):
    """Squared error of the critic to its target (Lillicrap et al., eq. 4 and 5)."""
    next_action = actor(params.target_actor, batch.next_obs)
    next_q = critic(params.target_critic, batch.next_obs, next_action)
    target = batch.reward + config.gamma * (1 - batch.terminated) * next_q
    q = critic(critic_params, batch.obs, batch.action)
    return jnp.square(q - target).mean()


def actor_loss(actor_params, params, batch):
    """Minus the critic's value of the actor's own actions (deterministic policy gradient, eq. 6)."""
    return -critic(params.critic, batch.obs, actor(actor_params, batch.obs)).mean()


# Training


def steps_per_iteration(config):
    """Environment steps between returns to learning: the fewest that make whole steps of all environments and whole
    periods of the targets."""
    return math.lcm(config.num_envs, config.target_period)


def check(config):
    """Raise a ValueError `field=value: rule` where sizes and counts do not fit together."""
    starts, steps = config.learning_starts, steps_per_iteration(config)
    stored = min(starts, config.buffer_size)
    lcm = f"a multiple of {steps}, the least common multiple of num_envs={config.num_envs} and target_period"
    whole = f"learning_starts={starts} plus a multiple of steps_per_epoch={config.steps_per_epoch}"
    rules = [
        ("learning_starts", starts % steps == 0, lcm),
        ("steps_per_epoch", config.steps_per_epoch % steps == 0, lcm),
        ("buffer_size", config.buffer_size % steps == 0, lcm),
        ("batch_size", config.batch_size <= stored, f"at most {stored}, what the warm-up stores"),
        ("learning_starts", starts < config.total_steps, f"less than total_steps={config.total_steps}"),
        ("total_steps", (config.total_steps - starts) % config.steps_per_epoch == 0, whole),
    ]
    for name, kept, rule in rules:
        if not kept:
            raise ValueError(f"{name}={getattr(config, name)}: must be {rule}")


def collect(config, state, policy):
    """One iteration's environment steps with `policy(obs, noise, key) -> (action, noise)`, stored in the buffer."""

    def step(carry, key):
        key_policy, key_env = random.split(key)
        env_state, obs, noise = carry
        action, noise = policy(obs, noise, key_policy)
        env_state, next_obs, transition, ended = env_step(config, env_state, obs, action, key_env)
        return (env_state, next_obs, jnp.where(ended[:, None], config.ou_mu, noise)), transition

    steps = steps_per_iteration(config)
    key, key_steps = random.split(state.key)
    keys = random.split(key_steps, steps // config.num_envs)
    (env_state, obs, noise), transitions = lax.scan(step, (state.env_state, state.obs, state.noise), keys)
    transitions = jax.tree.map(lambda x: x.reshape(steps, *x.shape[2:]), transitions)
    buffer = buffer_add(state.buffer, transitions)
    step = state.step + steps
    return state._replace(buffer=buffer, env_state=env_state, obs=obs, noise=noise, step=step, key=key)


def update_critic(config, params, opt_state, batch):
    """One Adam step of the critic: `(params, opt_state, loss)`."""
    loss, grads = jax.value_and_grad(critic_loss)(params.critic, config, params, batch)
    updates, adam = optax.adam(config.learning_rate).update(grads, opt_state.critic)
    params = params._replace(critic=optax.apply_updates(params.critic, updates))
    return params, opt_state._replace(critic=adam), loss


def update_actor(config, params, opt_state, batch):
    """One Adam step of the actor: `(params, opt_state, loss)`."""
    loss, grads = jax.value_and_grad(actor_loss)(params.actor, params, batch)
    updates, adam = optax.adam(config.learning_rate).update(grads, opt_state.actor)
    params = params._replace(actor=optax.apply_updates(params.actor, updates))
    return params, opt_state._replace(actor=adam), loss


def update_targets(config, params):
    """Move every target towards its online network."""
    return params._replace(
        target_actor=optax.incremental_update(params.actor, params.target_actor, config.tau),
        target_critic=optax.incremental_update(params.critic, params.target_critic, config.tau),
    )


def learn(config, params, opt_state, batches):
    """An update of critic and actor on each of `batches [target_period, batch]`, then one of the targets."""

    def step(carry, batch):
        params, opt_state, critic_loss = update_critic(config, *carry, batch)
        params, opt_state, actor_loss = update_actor(config, params, opt_state, batch)
        return (params, opt_state), (critic_loss, actor_loss)

    (params, opt_state), losses = lax.scan(step, (params, opt_state), batches)
    return update_targets(config, params), opt_state, losses


def ornstein_uhlenbeck(config, noise, key):
    """The noise of the next step, by the method of Euler and Maruyama."""
    diffusion = config.ou_sigma * jnp.sqrt(config.ou_dt) * random.normal(key, noise.shape)
    return noise + config.ou_theta * (config.ou_mu - noise) * config.ou_dt + diffusion


def iteration(config, state):
    """Collect with exploration noise, then make one update for each environment step: `(State, losses)`."""

    def explore(obs, noise, key):
        noise = ornstein_uhlenbeck(config, noise, key)
        return jnp.clip(actor(state.params.actor, obs) + noise, -1, 1), noise

    def step(carry, batches):
        *carry, losses = learn(config, *carry, batches)
        return tuple(carry), losses

    state = collect(config, state, explore)
    key, key_batch = random.split(state.key)
    _, _, low, _ = make_env(config)
    shape = (steps_per_iteration(config) // config.target_period, config.target_period, config.batch_size)
    batches = buffer_sample(state.buffer, key_batch, shape, len(low))
    (params, opt_state), losses = lax.scan(step, (state.params, state.opt_state), batches)
    return state._replace(params=params, opt_state=opt_state, key=key), losses


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
    """Networks, targets, and a buffer filled by the warm-up. ValueError where the configuration does not fit."""
    check(config)
    key, key_actor, key_critic, key_env = random.split(key, 4)
    _, _, low, _ = make_env(config)
    env_state, obs = env_init(config, key_env)
    obs_dim, action_dim = obs.shape[1], len(low)
    actor_params = mlp_init(key_actor, (obs_dim, *config.hidden_sizes, action_dim))
    critic_sizes = (obs_dim + action_dim, *config.hidden_sizes, 1)
    critic_params = mlp_init(key_critic, critic_sizes)
    params = Params(actor_params, critic_params, *jax.tree.map(jnp.copy, (actor_params, critic_params)))
    adam = optax.adam(config.learning_rate)
    opt_state = OptState(adam.init(actor_params), adam.init(critic_params))
    buffer = buffer_init(config.buffer_size, 2 * obs_dim + action_dim + 2)
    noise = jnp.full((config.num_envs, action_dim), config.ou_mu, float)
    state = State(params, opt_state, buffer, env_state, obs, noise, jnp.int32(0), key)

    def explore(obs, noise, key):
        return random.uniform(key, noise.shape, minval=-1, maxval=1), noise

    iterations = config.learning_starts // steps_per_iteration(config)
    return lax.scan(lambda state, _: (collect(config, state, explore), None), state, length=iterations)[0]


def epoch(config, state):
    """`steps_per_epoch` environment steps with their updates, then a greedy evaluation: `(State, Metrics)`."""
    iterations = config.steps_per_epoch // steps_per_iteration(config)
    state, figures = lax.scan(lambda state, _: iteration(config, state), state, length=iterations)
    key, key_eval = random.split(state.key)
    returns, value_bias = evaluate(config, state.params, key_eval)
    return state._replace(key=key), Metrics(state.step, returns, value_bias, *(x.mean() for x in figures))


def train(config, key):
    """The whole run, a pure function: `(State, Metrics)`, every metric with a leading axis `[num_epochs]`."""
    num_epochs = (config.total_steps - config.learning_starts) // config.steps_per_epoch
    return lax.scan(lambda state, _: epoch(config, state), init(config, key), length=num_epochs)


if __name__ == "__main__":
    from common.run import main

    main(Config, init, epoch)

"""Soft Actor-Critic (SAC) with twin target critics and an automatic temperature, as it is used now.

The policy is rewarded for its entropy: it is drawn to the Boltzmann policy of the smaller of two critics, by a gradient
through its own samples, while the temperature holds its mean entropy at a target.

    initialise critics q1, q2, policy d, temperature alpha, targets q1', q2' as copies, an empty replay buffer R
    fill R with learning_starts transitions of uniformly random actions
    repeat until total_steps environment steps:
        in num_envs environments: take a ~ d(. | s) and store (s, a, r, s', terminated) in R
        once for each environment step:
            draw a batch from R
            a' ~ d(. | s')
            y  = r + gamma * (1 - terminated) * (min(q1'(s', a'), q2'(s', a')) - alpha * log d(a' | s'))
            one Adam step on mean (q1(s, a) - y)^2 + mean (q2(s, a) - y)^2
            a~ = tanh(mean(s) + std(s) * N(0, 1))
            one Adam step of d on mean (alpha * log d(a~ | s) - min(q1(s, a~), q2(s, a~)))
            one Adam step of log alpha on -alpha * mean (log d(a~ | s) + target_entropy * action_dim)
            every target <- tau * its online network + (1 - tau) * target

Sources: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications" (arXiv 1812.05905, 2018), Algorithm 1 and
equations 5-9, 17, 18; appendix C of Haarnoja et al. (ICML 2018) for the density of squashed actions.

Departures, each for a reason:
- A time limit is no termination: the target bootstraps through it from the last observation before the reset.
- Environments step together, `num_envs` at a time; the updates they are owed follow at once, one per environment step.
- Networks are small (64 x 64). Densities, and with them entropies, are those of actions scaled to [-1, 1]: in the
  environment's units every log-density is less by the sum of log((high - low) / 2), which moves no optimum.
"""

import dataclasses
from typing import Any, NamedTuple

import distrax
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0  # bounds of the policy's log standard deviation


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
    learning_rate: float = 1e-3  # Adam's step size for everything learned, > 0
    gamma: float = 0.99  # discount per environment step, in [0, 1]
    tau: float = 0.02  # fraction by which targets move towards their networks, in [0, 1]
    initial_alpha: float = 1.0  # temperature at the start, > 0, in units of reward per nat
    target_entropy: float = -1.0  # of the policy, in nats for each dimension of the action scaled to [-1, 1]


class Transition(NamedTuple):
    """One step of an environment, or a batch of them."""

    obs: jax.Array  # [..., obs_dim]
    action: jax.Array  # [..., action_dim], in [-1, 1]
    reward: jax.Array  # [...]
    next_obs: jax.Array  # [..., obs_dim], before any reset
    terminated: jax.Array  # [...], 1 where the episode ended by itself, 0 elsewhere, also at a time limit


class Params(NamedTuple):
    """Everything learned. The critics' leaves have a leading axis [2]."""

    actor: Any
    critic: Any
    target_critic: Any
    log_alpha: jax.Array  # [], logarithm of the temperature


class OptState(NamedTuple):
    """Adam's moments."""

    actor: Any
    critic: Any
    log_alpha: Any


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
    step: jax.Array  # [] int32, environment steps so far
    key: jax.Array  # [] random key


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps so far
    eval_returns: jax.Array  # [num_eval_episodes], undiscounted, of the greedy policy
    value_bias: jax.Array  # [], what the critic expects of the greedy policy at evaluation minus what it gets
    critic_loss: jax.Array  # [], sum over both critics, mean over the epoch
    actor_loss: jax.Array  # [], mean over the epoch
    entropy: jax.Array  # [], nats, of the policy on actions in [-1, 1], mean over the epoch
    alpha: jax.Array  # [], temperature, mean over the epoch


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


def policy(params, obs):
    """Gaussian of actions before they are squashed: `obs [..., obs_dim]` to a distribution over `[..., action_dim]`."""
    mean, log_std = jnp.split(mlp(params, obs), 2, axis=-1)
    return distrax.MultivariateNormalDiag(mean, jnp.exp(jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)))


def sample(params, obs, noise):
    """Squashed `mean + std * noise` and its log-density: `noise [..., action_dim]` to `([..., action_dim], [...])`.

    The density is that of the action before squashing: the inverse of tanh loses all digits where |action| nears 1.
    """
    gaussian = policy(params, obs)
    unsquashed = gaussian.mean() + gaussian.stddev() * noise
    action, log_det = distrax.Block(distrax.Tanh(), ndims=1).forward_and_log_det(unsquashed)
    return action, gaussian.log_prob(unsquashed) - log_det


def actor(params, obs):
    """Greedy policy, the squashed mean: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return jnp.tanh(policy(params, obs).mean())


def critic(params, obs, action):
    """Action value: `obs [..., obs_dim]`, `action [..., action_dim]` to `[...]`."""
    return mlp(params, jnp.concatenate([obs, action], axis=-1))[..., 0]


def twin_critics(params, obs, action):
    """Both critics at once: `[2, ...]`."""
    return jax.vmap(critic, in_axes=(0, None, None))(params, obs, action)


def greedy_value(config, params, obs):
    """What the critics expect of the greedy policy: `obs [..., obs_dim]` to `[...]`."""
    return twin_critics(params.critic, obs, actor(params.actor, obs)).min(axis=0)


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


def critic_loss(critic_params, config, params, batch, noise):
    """Squared error of both critics to one soft target, with `noise [batch, action_dim]` standard normal (eq. 5)."""
    next_action, next_log_prob = sample(params.actor, batch.next_obs, noise)
    next_q = twin_critics(params.target_critic, batch.next_obs, next_action).min(axis=0)
    next_value = next_q - jnp.exp(params.log_alpha) * next_log_prob
    target = batch.reward + config.gamma * (1 - batch.terminated) * next_value
    q = twin_critics(critic_params, batch.obs, batch.action)
    return jnp.square(q - target).mean(axis=1).sum()


def actor_loss(actor_params, params, batch, noise):
    """Divergence from the Boltzmann policy, up to a constant (eq. 9), and the policy's entropy: `(loss, entropy)`."""
    action, log_prob = sample(actor_params, batch.obs, noise)
    q = twin_critics(params.critic, batch.obs, action).min(axis=0)
    return (jnp.exp(params.log_alpha) * log_prob - q).mean(), -log_prob.mean()


def alpha_loss(log_alpha, config, entropy, action_dim):
    """Temperature times the entropy in excess of its target (eq. 18)."""
    return jnp.exp(log_alpha) * (entropy - config.target_entropy * action_dim)


# Training


def steps_per_iteration(config):
    """Environment steps between returns to learning: one of each environment."""
    return config.num_envs


def check(config):
    """Raise a ValueError `field=value: rule` where sizes and counts do not fit together."""
    starts, steps = config.learning_starts, steps_per_iteration(config)
    stored = min(starts, config.buffer_size)
    multiple = f"a multiple of num_envs={steps}"
    whole = f"learning_starts={starts} plus a multiple of steps_per_epoch={config.steps_per_epoch}"
    rules = [
        ("learning_starts", starts % steps == 0, multiple),
        ("steps_per_epoch", config.steps_per_epoch % steps == 0, multiple),
        ("buffer_size", config.buffer_size % steps == 0, multiple),
        ("batch_size", config.batch_size <= stored, f"at most {stored}, what the warm-up stores"),
        ("learning_starts", starts < config.total_steps, f"less than total_steps={config.total_steps}"),
        ("total_steps", (config.total_steps - starts) % config.steps_per_epoch == 0, whole),
    ]
    for name, kept, rule in rules:
        if not kept:
            raise ValueError(f"{name}={getattr(config, name)}: must be {rule}")


def collect(config, state, policy):
    """One iteration's environment steps with `policy(obs [num_envs, obs_dim], key) -> action`, stored in the buffer."""

    def step(carry, key):
        key_policy, key_env = random.split(key)
        env_state, obs = carry
        env_state, next_obs, transition, _ = env_step(config, env_state, obs, policy(obs, key_policy), key_env)
        return (env_state, next_obs), transition

    steps = steps_per_iteration(config)
    key, key_steps = random.split(state.key)
    keys = random.split(key_steps, steps // config.num_envs)
    (env_state, obs), transitions = lax.scan(step, (state.env_state, state.obs), keys)
    transitions = jax.tree.map(lambda x: x.reshape(steps, *x.shape[2:]), transitions)
    buffer = buffer_add(state.buffer, transitions)
    return state._replace(buffer=buffer, env_state=env_state, obs=obs, step=state.step + steps, key=key)


def update_critic(config, params, opt_state, batch, noise):
    """One Adam step of both critics: `(params, opt_state, loss)`."""
    loss, grads = jax.value_and_grad(critic_loss)(params.critic, config, params, batch, noise)
    updates, adam = optax.adam(config.learning_rate).update(grads, opt_state.critic)
    params = params._replace(critic=optax.apply_updates(params.critic, updates))
    return params, opt_state._replace(critic=adam), loss


def update_actor(config, params, opt_state, batch, noise):
    """One Adam step of the actor: `(params, opt_state, (loss, entropy))`."""
    figures, grads = jax.value_and_grad(actor_loss, has_aux=True)(params.actor, params, batch, noise)
    updates, adam = optax.adam(config.learning_rate).update(grads, opt_state.actor)
    params = params._replace(actor=optax.apply_updates(params.actor, updates))
    return params, opt_state._replace(actor=adam), figures


def update_alpha(config, params, opt_state, entropy, action_dim):
    """One Adam step of the temperature: `(params, opt_state)`."""
    grad = jax.grad(alpha_loss)(params.log_alpha, config, entropy, action_dim)
    update, adam = optax.adam(config.learning_rate).update(grad, opt_state.log_alpha)
    return params._replace(log_alpha=params.log_alpha + update), opt_state._replace(log_alpha=adam)


def update_targets(config, params):
    """Move every target towards its online network."""
    target_critic = optax.incremental_update(params.critic, params.target_critic, config.tau)
    return params._replace(target_critic=target_critic)


def learn(config, params, opt_state, batch, noise):
    """Update critics, actor, temperature and targets on one batch, with `noise [2, batch, action_dim]`."""
    params, opt_state, critic_loss = update_critic(config, params, opt_state, batch, noise[0])
    params, opt_state, (actor_loss, entropy) = update_actor(config, params, opt_state, batch, noise[1])
    params, opt_state = update_alpha(config, params, opt_state, entropy, noise.shape[-1])
    figures = critic_loss, actor_loss, entropy, jnp.exp(params.log_alpha)
    return update_targets(config, params), opt_state, figures


def iteration(config, state):
    """Collect from the policy, then make one update for each environment step: `(State, figures)`."""
    _, _, low, _ = make_env(config)

    def explore(obs, key):
        return sample(state.params.actor, obs, random.normal(key, (len(obs), len(low))))[0]

    def step(carry, batch_and_noise):
        *carry, figures = learn(config, *carry, *batch_and_noise)
        return tuple(carry), figures

    state = collect(config, state, explore)
    key, key_batch, key_noise = random.split(state.key, 3)
    shape = (steps_per_iteration(config), config.batch_size)
    batches = buffer_sample(state.buffer, key_batch, shape, len(low))
    noise = random.normal(key_noise, (len(batches.reward), 2, config.batch_size, len(low)))
    (params, opt_state), figures = lax.scan(step, (state.params, state.opt_state), (batches, noise))
    return state._replace(params=params, opt_state=opt_state, key=key), figures


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
    actor_params = mlp_init(key_actor, (obs_dim, *config.hidden_sizes, 2 * action_dim))
    critic_sizes = (obs_dim + action_dim, *config.hidden_sizes, 1)
    critic_params = jax.vmap(lambda k: mlp_init(k, critic_sizes))(random.split(key_critic))
    log_alpha = jnp.log(jnp.asarray(config.initial_alpha, float))
    params = Params(actor_params, critic_params, jax.tree.map(jnp.copy, critic_params), log_alpha)
    adam = optax.adam(config.learning_rate)
    opt_state = OptState(adam.init(actor_params), adam.init(critic_params), adam.init(log_alpha))
    buffer = buffer_init(config.buffer_size, 2 * obs_dim + action_dim + 2)
    state = State(params, opt_state, buffer, env_state, obs, jnp.int32(0), key)

    def explore(obs, key):
        return random.uniform(key, (config.num_envs, action_dim), minval=-1, maxval=1)

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

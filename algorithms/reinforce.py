"""REINFORCE with a value baseline: the likelihood ratio applied to a policy, nothing known of the environment.

The score function of each action is weighed by how much better than expected things went afterwards. What is expected,
the baseline, is a value network fitted to the rewards to go; it changes the gradient's variance, not its mean.

    initialise policy d, baseline v
    repeat until total_steps environment steps:
        in num_envs environments, for num_steps steps: take a ~ d(. | s), note (s, a, r, s', terminated, ended)
        delta_t = r_t + gamma * (1 - terminated_t) * v(s'_t) - v(s_t)
        A_t     = delta_t + gamma * gae_lambda * (1 - ended_t) * A_{t+1}, from the last step back, A = 0 after it
        R_t     = A_t + v(s_t), for gae_lambda = 1 the discounted rewards to go
        one Adam step of d on -mean (A_t * log d(a_t | s_t))
        critic_steps Adam steps of v on batches' mean (v(s_t) - R_t)^2

Sources: Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning" (Machine
Learning 8, 1992), section 5; Sutton et al. (NeurIPS 1999), theorem 1; Schulman et al., "High-Dimensional Continuous
Control Using Generalized Advantage Estimation" (ICLR 2016), equation 16.

Departures, each for a reason:
- A time limit is no termination: the rewards beyond it, and beyond the last step noted, are taken from the baseline.
- The factor gamma^t of the discounted objective's gradient is left out, as is usual: late states count as early ones.
- Continuous actions are Gaussian and clipped by the environment's step, discrete ones categorical; the density is that
  of the action before it is clipped.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields shape the program; the others are leaves, free to be traced and vmapped."""

    env: str = jax.tree.static(default="CartPole-v1")  # a gymnax environment with Discrete or a Box of actions
    total_steps: int = jax.tree.static(default=512_000)  # environment steps in all
    steps_per_epoch: int = jax.tree.static(default=51_200)  # environment steps between two evaluations
    num_envs: int = jax.tree.static(default=32)  # environments that step together
    num_steps: int = jax.tree.static(default=32)  # steps of each environment between two updates of the policy
    num_eval_episodes: int = jax.tree.static(default=128)  # greedy episodes of an evaluation
    critic_steps: int = jax.tree.static(default=8)  # Adam steps of the baseline for each of the policy
    batch_size: int = jax.tree.static(default=256)  # transitions of an update of the baseline
    hidden_sizes: tuple[int, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    actor_learning_rate: float = 3e-3  # Adam's step size for the policy, > 0
    critic_learning_rate: float = 3e-3  # Adam's step size for the baseline, > 0
    gamma: float = 0.99  # discount per environment step, in [0, 1]
    gae_lambda: float = 1.0  # weight of rewards to go against the baseline's view of them, in [0, 1]
    initial_std: float = 0.5  # standard deviation of continuous actions in [-1, 1] at the start, > 0


class Transition(NamedTuple):
    """One step of an environment, or a batch of them."""

    obs: jax.Array  # [..., obs_dim]
    action: jax.Array  # [..., action_dim], in [-1, 1]
    reward: jax.Array  # [...]
    next_obs: jax.Array  # [..., obs_dim], before any reset
    terminated: jax.Array  # [...], 1 where the episode ended by itself, 0 elsewhere, also at a time limit


class Actor(NamedTuple):
    """Parameters of the policy."""

    network: Any  # gives logits of discrete actions, the mean of continuous ones
    log_std: jax.Array  # [action_dim], logarithm of the standard deviation; discrete actions leave it alone


class Params(NamedTuple):
    """Everything learned."""

    actor: Actor
    critic: Any


class OptState(NamedTuple):
    """Adam's moments."""

    actor: Any
    critic: Any


class State(NamedTuple):
    """All that training carries from one update of the policy to the next."""

    params: Params
    opt_state: OptState
    env_state: Any  # gymnax states, leading axis [num_envs]
    obs: jax.Array  # [num_envs, obs_dim]
    step: jax.Array  # [] int32, environment steps so far
    key: jax.Array  # [] random key


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps so far
    eval_returns: jax.Array  # [num_eval_episodes], undiscounted, of the greedy policy
    value_bias: jax.Array  # [], what the baseline expects of the policy minus what the greedy one gets at evaluation
    critic_loss: jax.Array  # [], mean over the epoch
    actor_loss: jax.Array  # [], mean over the epoch
    entropy: jax.Array  # [], nats, of the policy on actions in [-1, 1] or on discrete ones, mean over the epoch


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


def policy(config, params, obs):
    """Distribution of a Gaussian `[..., action_dim]`, or of a one-hot one, for `obs [..., obs_dim]`."""
    x = mlp(params.network, obs)
    if is_discrete(config):
        return distrax.OneHotCategorical(x)
    return distrax.MultivariateNormalDiag(x, jnp.broadcast_to(jnp.exp(params.log_std), x.shape))


def sample(config, params, obs, key):
    """Draw from the policy, `[..., action_dim]`: codes of discrete actions, continuous ones before they are clipped."""
    x = policy(config, params, obs).sample(seed=key)
    return 2.0 * x - 1 if is_discrete(config) else x


def log_prob(config, params, obs, action):
    """Log-probability or log-density `[...]` of what `sample` draws."""
    return policy(config, params, obs).log_prob((action + 1) / 2 if is_discrete(config) else action)


def actor(config, params, obs):
    """Greedy policy, the mode: `obs [..., obs_dim]` to actions `[..., action_dim]` that there are."""
    return project(config, mlp(params.network, obs))


def critic(params, obs):
    """Baseline: `obs [..., obs_dim]` to the policy's value `[...]`."""
    return mlp(params, obs)[..., 0]


def greedy_value(config, params, obs):
    """What the baseline expects from `obs [..., obs_dim]` on: `[...]`."""
    return critic(params.critic, obs)


def act(config, params, obs):
    """Greedy action in the environment's units and shape for one observation of any shape."""
    return scale_action(config, actor(config, params.actor, flatten(obs[None])[0]))


# Advantages and losses


def advantages(config, transitions, ended, value, next_value):
    """Generalized advantage estimates (eq. 16): all arrays, and those of `transitions`, are `[num_steps, num_envs]`.

    `value` and `next_value` are the baseline at the observation before and after each step.
    """
    delta = transitions.reward + config.gamma * (1 - transitions.terminated) * next_value - value

    def step(advantage, delta_and_ended):
        delta, ended = delta_and_ended
        advantage = delta + config.gamma * config.gae_lambda * (1 - ended) * advantage
        return advantage, advantage

    return lax.scan(step, jnp.zeros_like(delta[0]), (delta, ended), reverse=True)[1]


def critic_loss(critic_params, obs, target):
    """Mean squared error of the baseline."""
    return jnp.square(critic(critic_params, obs) - target).mean()


def actor_loss(actor_params, config, transitions, advantage):
    """Its gradient is the likelihood-ratio estimate of the policy's, negated; also the entropy: `(loss, entropy)`."""
    weighted = advantage * log_prob(config, actor_params, transitions.obs, transitions.action)
    return -weighted.mean(), policy(config, actor_params, transitions.obs).entropy().mean()


# Training


def steps_per_iteration(config):
    """Environment steps between two updates of the policy."""
    return config.num_envs * config.num_steps


def check(config):
    """Raise a ValueError `field=value: rule` where sizes and counts do not fit together."""
    steps = steps_per_iteration(config)
    rules = [
        ("steps_per_epoch", config.steps_per_epoch % steps == 0, f"a multiple of num_envs * num_steps = {steps}"),
        ("total_steps", config.total_steps % config.steps_per_epoch == 0, "a multiple of steps_per_epoch"),
    ]
    for name, kept, rule in rules:
        if not kept:
            raise ValueError(f"{name}={getattr(config, name)}: must be {rule}")


def collect(config, state):
    """Act for `num_steps` steps: `(State, Transition, ended)`, the latter two `[num_steps, num_envs, ...]`."""

    def step(carry, key):
        key_policy, key_env = random.split(key)
        env_state, obs = carry
        action = sample(config, state.params.actor, obs, key_policy)
        env_state, next_obs, transition, ended = env_step(config, env_state, obs, project(config, action), key_env)
        return (env_state, next_obs), (transition._replace(action=action), ended)

    key, key_steps = random.split(state.key)
    keys = random.split(key_steps, config.num_steps)
    (env_state, obs), (transitions, ended) = lax.scan(step, (state.env_state, state.obs), keys)
    steps = state.step + steps_per_iteration(config)
    return state._replace(env_state=env_state, obs=obs, step=steps, key=key), transitions, ended


def update_critic(config, params, opt_state, obs, target):
    """One Adam step of the baseline: `(params, opt_state, loss)`."""
    loss, grads = jax.value_and_grad(critic_loss)(params.critic, obs, target)
    updates, adam = optax.adam(config.critic_learning_rate).update(grads, opt_state.critic)
    params = params._replace(critic=optax.apply_updates(params.critic, updates))
    return params, opt_state._replace(critic=adam), loss


def update_actor(config, params, opt_state, transitions, advantage):
    """One Adam step of the policy: `(params, opt_state, (loss, entropy))`."""
    figures, grads = jax.value_and_grad(actor_loss, has_aux=True)(params.actor, config, transitions, advantage)
    updates, adam = optax.adam(config.actor_learning_rate).update(grads, opt_state.actor)
    params = params._replace(actor=optax.apply_updates(params.actor, updates))
    return params, opt_state._replace(actor=adam), figures


def iteration(config, state):
    """Collect from the policy, update it once, then fit the baseline: `(State, figures)`."""
    state, transitions, ended = collect(config, state)
    value, next_value = (critic(state.params.critic, obs) for obs in (transitions.obs, transitions.next_obs))
    advantage = advantages(config, transitions, ended, value, next_value)
    params, opt_state, figures = update_actor(config, state.params, state.opt_state, transitions, advantage)
    obs, target = (x.reshape(steps_per_iteration(config), *x.shape[2:]) for x in (transitions.obs, advantage + value))

    def step(carry, index):
        *carry, loss = update_critic(config, *carry, obs[index], target[index])
        return tuple(carry), loss

    key, key_batch = random.split(state.key)
    index = random.randint(key_batch, (config.critic_steps, config.batch_size), 0, len(target))
    (params, opt_state), losses = lax.scan(step, (params, opt_state), index)
    return state._replace(params=params, opt_state=opt_state, key=key), (losses.mean(), *figures)


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
    """Networks and environments. ValueError where the configuration does not fit."""
    check(config)
    key, key_actor, key_critic, key_env = random.split(key, 4)
    _, _, low, _ = make_env(config)
    env_state, obs = env_init(config, key_env)
    obs_dim, action_dim = obs.shape[1], len(low)
    network = mlp_init(key_actor, (obs_dim, *config.hidden_sizes, action_dim))
    log_std = jnp.full(action_dim, jnp.log(config.initial_std), float)
    params = Params(Actor(network, log_std), mlp_init(key_critic, (obs_dim, *config.hidden_sizes, 1)))
    opt_state = OptState(
        optax.adam(config.actor_learning_rate).init(params.actor),
        optax.adam(config.critic_learning_rate).init(params.critic),
    )
    return State(params, opt_state, env_state, obs, jnp.int32(0), key)


def epoch(config, state):
    """`steps_per_epoch` environment steps with their updates, then a greedy evaluation: `(State, Metrics)`."""
    iterations = config.steps_per_epoch // steps_per_iteration(config)
    state, figures = lax.scan(lambda state, _: iteration(config, state), state, length=iterations)
    key, key_eval = random.split(state.key)
    returns, value_bias = evaluate(config, state.params, key_eval)
    return state._replace(key=key), Metrics(state.step, returns, value_bias, *(x.mean() for x in figures))


def train(config, key):
    """The whole run, a pure function: `(State, Metrics)`, every metric with a leading axis `[num_epochs]`."""
    num_epochs = config.total_steps // config.steps_per_epoch
    return lax.scan(lambda state, _: epoch(config, state), init(config, key), length=num_epochs)


if __name__ == "__main__":
    from common.run import main

    main(Config, init, epoch)

"""Stochastic value gradients through whole rollouts, SVG(infinity): the pathwise derivative of the return.

Policy and dynamics, the environment's or a learned model's, are functions of the state and of noise: for fixed noise
the return of a rollout is a differentiable function of the policy's parameters w. Where the reward is a step function,
as at the goals of MountainCarContinuous and PointRobot, its derivative is zero and the policy does not learn.

    initialize policy a = tanh(mean_w(s) + std_w(s) * e); with a learned model s' = mu(s, a) + sigma(s, a) * o, and fill
        replay buffer R with learning_starts transitions of uniformly random actions
    repeat for num_iterations iterations:
        with a learned model: take a step in num_envs environments and store (s, a, r, s', terminated) in R, then
            model_steps Adam steps on mean -log N((s', r); mu(s, a), sigma(s, a)^2), each for a batch from R
        sample first states of rollouts, of episodes or with a learned model from R, and standard normal noise e_t, o_t
            (or infer o_t = (s_{t+1} - mu(s_t, a_t)) / sigma(s_t, a_t) of a learned model from sequences of steps in R)
        for each rollout: J = sum_t gamma^t r(s_t, a_t) over `horizon` steps, with a_t and s_{t+1} as above
        dJ/dw by backpropagation (autodiff), or forward in time (manual), from ds_0/dw = 0 and dJ/dw = 0:
            da_t/dw     = da/ds ds_t/dw + da/dw
            dJ/dw      += gamma^t (dr/ds ds_t/dw + dr/da da_t/dw)
            ds_{t+1}/dw = ds'/ds ds_t/dw + ds'/da da_t/dw
        one Adam step of w on -mean dJ/dw, its norm clipped to max_grad_norm

Sources: Heess et al., "Learning Continuous Control Policies by Stochastic Value Gradients" (NeurIPS 2015), section 4
and Algorithm 1; Williams, Zipser (Neural Computation 1, 1989) for the recursion forward in time.

Differences from the paper:
- Rollouts continue past time limits (a learned model never terminates) and end at the horizon without a value.
- tanh bounds the actions, since clipping has no gradient beyond the bounds.
- The policy's noise is never inferred, since the stored actions are those of older policies.
- Adam with gradient clipping replaces plain gradient ascent, whose step size depends on the scale of the rewards.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from jax.flatten_util import ravel_pytree

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # bounds of the log standard deviations of policy and model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields set shapes and loop lengths; the others can be traced, vmapped and swept.

    Counts of environment steps are rounded up to whole steps of num_envs environments, iterations to whole epochs.
    """

    env: str = jax.tree.static(default="Pendulum-v1")  # gymnax environment with bounded continuous actions
    gradient: Literal["autodiff", "manual"] = jax.tree.static(default="autodiff")  # manual: for small networks
    model: Literal["true", "learned"] = jax.tree.static(default="true")  # the environment's dynamics, or a network
    noise: Literal["sampled", "inferred"] = jax.tree.static(default="sampled")  # of a learned model
    reward: Literal["true", "learned"] = jax.tree.static(default="learned")  # of a learned model
    remat: bool = jax.tree.static(default=False)  # recompute steps in the backward pass, which saves memory
    num_iterations: int = jax.tree.static(default=1_600)  # updates of the policy
    iterations_per_epoch: int = jax.tree.static(default=160)  # updates of the policy between evaluations
    num_rollouts: int = jax.tree.static(default=128)  # rollouts per update
    horizon: int = jax.tree.static(default=50)  # steps of a rollout
    num_eval_episodes: int = jax.tree.static(default=128)  # greedy episodes per evaluation
    learning_starts: int = jax.tree.static(default=1_000)  # environment steps of uniformly random warm-up for a model
    num_envs: int = jax.tree.static(default=20)  # environments stepped in parallel, once an iteration
    buffer_size: int = jax.tree.static(default=100_000)  # transitions in the replay buffer
    batch_size: int = jax.tree.static(default=256)  # transitions per update of the model
    model_steps: int = jax.tree.static(default=8)  # updates of the model per update of the policy
    hidden_sizes: tuple[int, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
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
    model: Any  # a Model, or () for the true one


class OptState(NamedTuple):
    """Adam's state."""

    actor: Any
    model: Any


class Noise(NamedTuple):
    """The noise of rollouts, leading axes [num_rollouts, horizon]."""

    policy: jax.Array  # [..., action_dim], standard normal
    model: jax.Array  # [..., obs_dim], standard normal or inferred; for the true model [...], random keys


class State(NamedTuple):
    """Everything carried from one iteration to the next. With the true model buffer, env_state and obs are ()."""

    params: Params
    opt_state: OptState
    buffer: Any  # [capacity, 2 * obs_dim + action_dim + 2], packed transitions, see `store`
    env_state: Any  # leading axis [num_envs]
    obs: Any  # [num_envs, obs_dim]
    step: jax.Array  # [] int32, environment steps so far, those of rollouts through the true model included
    iteration: jax.Array  # [] int32, updates of the policy so far
    key: jax.Array  # [] random key of the training
    key_eval: jax.Array  # [] random key of the evaluations, so that their number does not change the training


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps so far, those of rollouts through the true model included
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


def mlp(params, x):
    """Multilayer perceptron with ReLU: `[..., n]` to `[..., m]`."""
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def gaussian(params, x):
    """Mean and standard deviation, each `[..., m]`, from a network with `2 * m` outputs."""
    mean, log_std = jnp.split(mlp(params, x), 2, axis=-1)
    return mean, jnp.exp(jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX))


def actor(params, obs):
    """Squashed mean of the policy: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return jnp.tanh(gaussian(params, obs)[0])


def sample_action(params, obs, noise):
    """Squashed `mean + std * noise`: `obs [..., obs_dim]`, `noise [..., action_dim]` to `[..., action_dim]`."""
    mean, std = gaussian(params, obs)
    return jnp.tanh(mean + std * noise)


# Learning


def discounted_return(actor_params, config, model, start, noise):
    """Objective of one rollout from `start [n]`."""
    obs_dim = actor_params[0][0].shape[0]

    def step(carry, noise):
        s, discount, total = carry
        a = sample_action(actor_params, s[:obs_dim], noise.policy)
        s, reward, terminated = model_step(config, model, s, a, noise.model)
        total += discount * reward
        discount *= config.gamma * (1 - terminated)
        return (s, discount, total), None

    step = jax.checkpoint(step) if config.remat else step
    return lax.scan(step, (start, jnp.ones(()), jnp.zeros(())), noise)[0][2]


def manual_gradient(config, params, start, noise):
    """Objective of one rollout and its gradient, forward in time: memory grows with the parameters, not the horizon."""
    w, unravel = ravel_pytree(params.actor)
    obs_dim = params.actor[0][0].shape[0]

    def step(carry, noise):
        s, s_w, discount, total, total_w = carry
        policy = lambda s, w: sample_action(unravel(w), s[:obs_dim], noise.policy)
        model = lambda s, a: model_step(config, params.model, s, a, noise.model)
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


def policy_gradient(config, params, starts, noises):
    """Objective and its gradient, means over rollouts from `starts [num_rollouts, n]`."""
    if config.gradient == "manual":
        rollouts = jax.vmap(manual_gradient, in_axes=(None, None, 0, 0))(config, params, starts, noises)
        return jax.tree.map(lambda x: x.mean(axis=0), rollouts)

    def objective(actor_params):
        returns = jax.vmap(discounted_return, in_axes=(None, None, None, 0, 0))
        return returns(actor_params, config, params.model, starts, noises).mean()

    return jax.value_and_grad(objective)(params.actor)


def model_loss(network, model, batch):
    """Negative log-likelihood of the normalized `batch` up to a constant, mean over the batch."""
    mean, std = predict(model._replace(network=network), batch.obs, batch.action)
    target = jnp.concatenate([batch.next_obs, batch.reward[:, None]], axis=-1)
    log_density = -0.5 * jnp.square((target - mean) / std) - jnp.log(std / model.target_std)
    return -log_density.sum(axis=-1).mean()


def optimizer(learning_rate):
    """Adam; a schedule goes here."""
    return optax.adam(learning_rate)


def apply_grads(learning_rate, grads, params, opt_state):
    """One step of the optimizer: `(params, opt_state)`."""
    updates, opt_state = optimizer(learning_rate).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def update(config, params, opt_state, starts, noises):
    """One update of the policy, along the clipped gradient: `(params, opt_state, (objective, norm, clipped))`."""
    objective, grads = policy_gradient(config, params, starts, noises)
    norm = optax.global_norm(grads)
    scale = jnp.where(jnp.isfinite(norm), jnp.minimum(1, config.max_grad_norm / norm), 0)
    descent = jax.tree.map(lambda x: jnp.where(jnp.isfinite(norm), -scale * x, 0), grads)  # 0 times NaN is NaN
    actor_params, actor_opt_state = apply_grads(config.learning_rate, descent, params.actor, opt_state.actor)
    return params._replace(actor=actor_params), opt_state._replace(actor=actor_opt_state), (objective, norm, scale < 1)


def update_model(config, model, opt_state, batch):
    """One update of the learned model from a batch: `(model, opt_state, loss)`."""
    loss, grads = jax.value_and_grad(model_loss)(model.network, model, batch)
    network, opt_state = apply_grads(config.model_learning_rate, grads, model.network, opt_state)
    return model._replace(network=network), opt_state, loss


# Policies


def greedy(config, params, obs):
    """The policy without noise: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return actor(params.actor, obs)


def explore(config, params, obs, key):
    """Actions sampled from the policy."""
    noise = random.normal(key, (*obs.shape[:-1], make_env(config.env).action_dim))
    return sample_action(params.actor, obs, noise)


def warm_up(config, params, obs, key):
    """Uniformly random actions."""
    return random.uniform(key, (*obs.shape[:-1], make_env(config.env).action_dim), minval=-1, maxval=1)


def act(config, params, obs):
    """Greedy action in the environment's units and shape, for one observation of any shape."""
    return make_env(config.env).rescale(greedy(config, params, flatten(obs)))


# Environment


class Env(NamedTuple):
    """An environment as pure functions, with observations `[obs_dim]` and actions `[action_dim]` in [-1, 1].

    Where an episode has ended, `step` gives as `obs` the first of a new one, and as `next_obs` its last.
    """

    obs_dim: int
    action_dim: int
    reset: Callable  # key -> (env_state, obs)
    step: Callable  # (env_state, action, key) -> (env_state, obs, reward, next_obs, terminated, truncated)
    rescale: Callable  # action -> the same in the environment's bounds and shape


def flatten(obs):
    """One observation, of any shape and type, as floats `[obs_dim]`."""
    return jnp.ravel(obs).astype(float)


@functools.cache
def make_env(name):
    """The gymnax environment `name`; ValueError unless its actions are bounded and continuous."""
    with jax.ensure_compile_time_eval():
        env, env_params = gymnax.make(name)
        space = env.action_space(env_params)
        low, high = (np.broadcast_to(getattr(space, bound, np.nan), space.shape) for bound in ("low", "high"))
    if not np.isfinite([low, high]).all():
        raise ValueError(f"env={name}: must have actions in a Box with finite bounds")

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

    return Env(jax.eval_shape(reset, random.key(0))[1].size, low.size, reset, step, rescale)


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


# Models: one step from a state `[n]`, which begins with the observation, by an action `[action_dim]` in [-1, 1]


def model_step(config, model, state, action, noise):
    """One step of the model that `config.model` names: `(next_state [n], reward, terminated)`."""
    if config.model == "true":
        return true_model(config, state, action, noise)
    mean, std = predict(model, state, action)
    reward = mean[-1] if config.reward == "learned" else true_reward(config, state, action)
    return mean[:-1] + std[:-1] * noise, reward, 0.0


def true_start(config, key):
    """A first state: observation and environment state in one vector, and the function that unpacks it."""
    env, env_params = gymnax.make(config.env)
    return ravel_pytree(env.reset(key, env_params))


def true_model(config, state, action, key):
    """The environment's step, without a reset at its end: `(next_state [n], reward, terminated)`."""
    env, env_params = gymnax.make(config.env)
    _, env_state = true_start(config, key)[1](state)  # only the shapes of the reset are used
    action = make_env(config.env).rescale(action)
    obs, env_state, reward, terminated, _ = env.with_transition_gradients().step_env(key, env_state, action, env_params)
    return ravel_pytree((obs, env_state))[0], reward, terminated


def model_init(config, key, warm_up):
    """A random network, and the means and standard deviations of the warm-up, `Transition [n]`."""
    x = jnp.concatenate([warm_up.obs, warm_up.action], axis=-1)
    y = jnp.concatenate([warm_up.next_obs - warm_up.obs, warm_up.reward[:, None]], axis=-1)
    network = mlp_init(key, (x.shape[1], *config.hidden_sizes, 2 * y.shape[1]))
    x_std, y_std = (jnp.where(z.std(axis=0) > 0, z.std(axis=0), 1) for z in (x, y))
    return Model(network, x.mean(axis=0), x_std, y.mean(axis=0), y_std)


def predict(model, obs, action):
    """Mean and standard deviation, each `[..., obs_dim + 1]`, of the next observation and the reward."""
    x = (jnp.concatenate([obs, action], axis=-1) - model.input_mean) / model.input_std
    mean, std = gaussian(model.network, x)
    mean = model.target_mean + model.target_std * mean
    return mean.at[..., :-1].add(obs), model.target_std * std


def infer_noise(model, batch):
    """The noise `[..., obs_dim]` with which the learned model reproduces `batch.next_obs`."""
    mean, std = predict(model, batch.obs, batch.action)
    return (batch.next_obs - mean[..., :-1]) / std[..., :-1]


def true_reward(config, obs, action):
    """The environment's reward, where `STATES` has the state of the observation."""
    env, env_params = gymnax.make(config.env)
    env_state = env.reset(random.key(0), env_params)[1].replace(**STATES[config.env](obs))
    return env.step_env(random.key(0), env_state, make_env(config.env).rescale(action), env_params)[2]


STATES = {  # environment -> function from `obs [obs_dim]` to the fields of the environment's state that it shows
    **dict.fromkeys(("LQR1-v0", "LQR-v0", "LQR4-v0"), lambda obs: {"position": obs}),
    "MountainCarContinuous-v0": lambda obs: {"position": obs[0], "velocity": obs[1]},
    "Pendulum-v1": lambda obs: {"theta": jnp.arctan2(obs[1], obs[0]), "theta_dot": obs[2]},
    "Reacher-misc": lambda obs: {"angles": jnp.arctan2(obs[2:4], obs[:2]), "angle_vels": obs[4:6], "goal_xy": obs[6:8]},
    "Swimmer-misc": lambda obs: (
        {"urchin_xys": obs[:-6].reshape(-1, 2), "xy": obs[-6:-4], "xy_vel": obs[-4:-2], "goal_xy": obs[-2:]}
    ),
}


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
    """The stored transitions: `rows [n]` to `Transition [n]`."""
    _, unravel = ravel_pytree(example(config))
    return jax.vmap(unravel)(buffer.at[rows].get(mode="promise_in_bounds"))


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
    buffer, step = store(state.buffer, state.step, transitions), state.step + transitions.reward.size
    return state._replace(buffer=buffer, env_state=env_state, obs=obs, step=step, key=key)


def fit_model(config, state):
    """Collect, then update the learned model `model_steps` times: `(State, loss)`."""
    state = collect(config, state, explore)
    key, key_rows = random.split(state.key)

    def step(carry, rows):
        *carry, loss = update_model(config, *carry, read(config, state.buffer, rows))
        return tuple(carry), loss

    rows = sample_rows(config, state.buffer, state.step, key_rows, config.model_steps)
    (model, opt_state), losses = lax.scan(step, (state.params.model, state.opt_state.model), rows)
    params, opt_state = state.params._replace(model=model), state.opt_state._replace(model=opt_state)
    return state._replace(params=params, opt_state=opt_state, key=key), losses.mean()


def sample_rollouts(config, model, buffer, step, key):
    """First states `[num_rollouts, n]` and the `Noise` of an update's rollouts."""
    key_start, key_policy, key_model = random.split(key, 3)
    shape = (config.num_rollouts, config.horizon)
    policy_noise = random.normal(key_policy, (*shape, make_env(config.env).action_dim))
    if config.model == "true":
        starts = jax.vmap(lambda key: true_start(config, key)[0])(random.split(key_start, config.num_rollouts))
        return starts, Noise(policy_noise, random.split(key_model, shape))
    inferred = config.noise == "inferred"
    batch = sample_sequences(config, buffer, step, config.horizon if inferred else 1, key_start)
    noise = infer_noise(model, batch) if inferred else random.normal(key_model, (*shape, batch.obs.shape[-1]))
    return batch.obs[:, 0], Noise(policy_noise, noise)


def iteration(config, state):
    """Update a learned model, then the policy: `(State, losses)`."""
    if config.model == "learned":
        state, loss = fit_model(config, state)
    else:
        state = state._replace(step=state.step + config.num_rollouts * config.horizon)
        loss = jnp.zeros(())
    key, key_rollouts = random.split(state.key)
    starts, noises = sample_rollouts(config, state.params.model, state.buffer, state.step, key_rollouts)
    params, opt_state, losses = update(config, state.params, state.opt_state, starts, noises)
    return state._replace(params=params, opt_state=opt_state, iteration=state.iteration + 1, key=key), (loss, *losses)


def evaluate(config, params, key):
    """Undiscounted returns `[num_eval_episodes]` of the greedy policy on new episodes."""
    env = make_env(config.env)

    def step(carry):
        env_state, obs, total, _, key = carry
        key, key_step = random.split(key)
        env_state, obs, reward, _, terminated, truncated = env.step(env_state, greedy(config, params, obs), key_step)
        return env_state, obs, total + reward, terminated | truncated, key

    def episode(key):
        key, key_reset = random.split(key)
        carry = (*env.reset(key_reset), jnp.zeros(()), False, key)
        return lax.while_loop(lambda carry: ~carry[3], step, carry)[2]

    return jax.vmap(episode)(random.split(key, config.num_eval_episodes))


RULES = {
    "finite": np.isfinite,
    "> 0": lambda x: np.isfinite(x) & (x > 0),
    ">= 0": lambda x: np.isfinite(x) & (x >= 0),
    "in [0, 1]": lambda x: (x >= 0) & (x <= 1),
    "from 1 to 2147483647": lambda x: (x >= 1) & (x < 2**31),
}


def check(config):
    """ValueError `field=value: must be RULE` where a number breaks its field's rule; traced ones cannot be checked."""
    for field in dataclasses.fields(config):
        count = field.type in (int, tuple[int, ...])
        (rule,) = getattr(field.type, "__metadata__", ["from 1 to 2147483647" if count else "finite"])
        for x in jax.tree.leaves(getattr(config, field.name)):
            if not isinstance(x, str | jax.core.Tracer) and not np.all(RULES[rule](x)):
                raise ValueError(f"{field.name}={x}: must be {rule}")


def check_choices(config):
    """ValueError where choices do not fit the environment, each other or the warm-up."""
    if config.model == "true" and not gymnax.make(config.env)[0].supports_transition_gradients:
        raise ValueError(f"env={config.env}: must have transition gradients for model=true, unlike for model=learned")
    if config.model == "true" and config.noise == "inferred":
        raise ValueError("noise=inferred: must be sampled for model=true")
    if config.model == "learned" and config.reward == "true" and config.env not in STATES:
        raise ValueError(f"reward=true: must be learned, since STATES lacks {config.env}")
    stored = math.ceil(min(config.learning_starts, config.buffer_size) / config.num_envs)
    if config.noise == "inferred" and config.horizon > stored:
        raise ValueError(f"horizon={config.horizon}: must be at most {stored}, the warm-up's steps per environment")


def num_epochs(config):
    """The fewest epochs that make `num_iterations` iterations."""
    return math.ceil(config.num_iterations / config.iterations_per_epoch)


def init(config, key):
    """Networks and, for a learned model, a buffer filled by the warm-up; ValueError where `config` does not fit."""
    check(config)
    env = make_env(config.env)
    check_choices(config)
    key, key_eval, key_actor, key_model, key_env = random.split(key, 5)
    *layers, (w, b) = mlp_init(key_actor, (env.obs_dim, *config.hidden_sizes, 2 * env.action_dim))
    actor_params = [*layers, (w, b.at[env.action_dim :].set(jnp.log(config.initial_std)))]
    params, opt_state = Params(actor_params, ()), OptState(optimizer(config.learning_rate).init(actor_params), ())
    state = State(params, opt_state, (), (), (), jnp.int32(0), jnp.int32(0), key, key_eval)
    if config.model == "true":
        return state
    env_state, obs = jax.vmap(env.reset)(random.split(key_env, config.num_envs))
    row, unravel = ravel_pytree(example(config))
    buffer = jnp.zeros((math.ceil(config.buffer_size / config.num_envs) * config.num_envs, row.size))
    state = state._replace(buffer=buffer, env_state=env_state, obs=obs)
    length = math.ceil(config.learning_starts / config.num_envs)
    state = lax.scan(lambda state, _: (collect(config, state, warm_up), None), state, length=length)[0]
    model = model_init(config, key_model, jax.vmap(unravel)(state.buffer[: length * config.num_envs]))
    opt_state = opt_state._replace(model=optimizer(config.model_learning_rate).init(model.network))
    return state._replace(params=params._replace(model=model), opt_state=opt_state)


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

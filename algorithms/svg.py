"""Stochastic value gradients over whole rollouts, SVG(infinity): ascend the return's derivative through the dynamics.

Policy and dynamics are functions of the state and of noise. With the noise drawn once, the return of a rollout is a
function of the policy's parameters w, which the chain rule differentiates; the dynamics are the environment's own, or a
network's that is fitted to what has been seen.

    initialise policy a = tanh(mean_w(s) + std_w(s) e), and with a learned model s' = mu(s, a) + sigma(s, a) o
    repeat for num_iterations iterations:
        with a learned model: act in num_envs environments, store (s, a, r, s', terminated) in R, and make model_steps
            Adam steps on batches from R, descending mean of -log N(s', r; mu(s, a), sigma(s, a)^2)
        draw N first states, of episodes or with a learned model from R, and noises e_0, o_0, ..., e_{T-1}, o_{T-1};
            or infer o_t = (s'_t - mu(s_t, a_t)) / sigma(s_t, a_t) of a learned model from N stretches of T steps in R
        for each: J = sum_t gamma^t r(s_t, a_t) with a_t and s_{t+1} as above
        dJ/dw, by backpropagation (autodiff), or forward in time (manual), from ds_0/dw = 0, dJ/dw = 0:
            da_t/dw     = da/ds ds_t/dw + da/dw
            dJ/dw      += gamma^t (dr/ds ds_t/dw + dr/da da_t/dw)
            ds_{t+1}/dw = ds'/ds ds_t/dw + ds'/da da_t/dw
        one Adam step of w along the mean of dJ/dw, its norm clipped to max_grad_norm

Sources: Heess et al., "Learning Continuous Control Policies by Stochastic Value Gradients" (NeurIPS 2015), section 4
and Algorithm 1; Williams, Zipser (Neural Computation 1, 1989) for the recursion forward in time.

Departures, each for a reason:
- A time limit is no termination: rollouts through the true model go on beyond it. A learned model knows no end at all.
- Rollouts end after `horizon` steps with no value of what comes after; gamma makes that little.
- The bounds of actions are kept by tanh, which has a derivative everywhere; a clip would have none beyond them.
- The policy's noise is never inferred: the stored actions are older policies', whose returns are not to be ascended.
- Adam in place of plain ascent, whose step would have to follow the size of the rewards.

What to look out for: where the reward is a step, as at the goals of MountainCarContinuous and PointRobot, its
derivative is zero on either side, and nothing leads there.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

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
    """Hyperparameters. Static fields shape the program; the others are leaves, free to be traced and vmapped."""

    env: str = jax.tree.static(default="Pendulum-v1")  # a registered gymnax environment with a Box of actions
    gradient: Literal["autodiff", "manual"] = jax.tree.static(default="autodiff")  # manual: for small networks
    model: Literal["true", "learned"] = jax.tree.static(default="true")  # the environment's dynamics, or a network
    noise: Literal["sampled", "inferred"] = jax.tree.static(default="sampled")  # of a learned model
    reward: Literal["true", "learned"] = jax.tree.static(default="learned")  # of a learned model
    remat: bool = jax.tree.static(default=False)  # recompute steps going backward, for less memory
    num_iterations: int = jax.tree.static(default=1_600)  # updates of the policy
    iterations_per_epoch: int = jax.tree.static(default=160)  # updates of the policy between two evaluations
    num_rollouts: int = jax.tree.static(default=128)  # rollouts of an update
    horizon: int = jax.tree.static(default=50)  # steps of a rollout
    num_eval_episodes: int = jax.tree.static(default=128)  # greedy episodes of an evaluation
    learning_starts: int = jax.tree.static(default=1_000)  # uniformly random steps before a model is learned
    num_envs: int = jax.tree.static(default=20)  # environments that step together, once an iteration
    buffer_size: int = jax.tree.static(default=100_000)  # transitions the replay buffer holds
    batch_size: int = jax.tree.static(default=256)  # transitions of an update of the model
    model_steps: int = jax.tree.static(default=8)  # updates of the model for each of the policy
    hidden_sizes: tuple[int, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    learning_rate: float = 2e-3  # Adam's step size for the policy, > 0
    model_learning_rate: float = 1e-3  # Adam's step size for the model, > 0
    gamma: float = 0.99  # discount per environment step, in [0, 1]
    initial_std: float = 0.3  # of the policy before tanh, at the start, > 0
    max_grad_norm: float = 1.0  # longest gradient that an update follows, > 0


class Transition(NamedTuple):
    """One step of an environment, or a batch of them."""

    obs: jax.Array  # [..., obs_dim]
    action: jax.Array  # [..., action_dim], in [-1, 1]
    reward: jax.Array  # [...]
    next_obs: jax.Array  # [..., obs_dim], before any reset
    terminated: jax.Array  # [...], 1 where the episode ended by itself, 0 elsewhere, also at a time limit


class Model(NamedTuple):
    """A Gaussian of the change of the observation and of the reward, in units of what the warm-up has seen."""

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
    """Adam's moments."""

    actor: Any
    model: Any


class Buffer(NamedTuple):
    """Ring of packed transitions: one array is written by one slice update, in place, and read by one gather."""

    rows: jax.Array  # [buffer_size, 2 * obs_dim + action_dim + 2]
    position: jax.Array  # [] int32, where the next row goes
    size: jax.Array  # [] int32, rows filled


class Noise(NamedTuple):
    """What a rollout takes from outside; leaves have leading axes [num_rollouts, horizon]."""

    policy: jax.Array  # [..., action_dim], standard normal
    model: jax.Array  # [..., obs_dim], standard normal or inferred; for the true model [...], random keys


class State(NamedTuple):
    """All that training carries from one update of the policy to the next; with the true model some are ()."""

    params: Params
    opt_state: OptState
    buffer: Any  # Buffer
    env_state: Any  # gymnax states, leading axis [num_envs]
    obs: Any  # [num_envs, obs_dim]
    step: jax.Array  # [] int32, environment steps so far, those of rollouts through the true model included
    iteration: jax.Array  # [] int32, updates of the policy so far
    key: jax.Array  # [] random key


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps so far, those of rollouts through the true model included
    eval_returns: jax.Array  # [num_eval_episodes], undiscounted, of the greedy policy
    iteration: jax.Array  # [] int32, updates of the policy so far
    model_loss: jax.Array  # [], nats, -log-likelihood of a transition in the model's units, mean over the epoch
    objective: jax.Array  # [], discounted return of the rollouts, mean over the epoch
    grad_norm: jax.Array  # [], of the objective's gradient before it is clipped, mean over the epoch
    clipped: jax.Array  # [], fraction of the epoch's gradients that were too long or not finite


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


def gaussian(params, x):
    """Mean and standard deviation, each `[..., m]`, from a network with `2 * m` outputs."""
    mean, log_std = jnp.split(mlp(params, x), 2, axis=-1)
    return mean, jnp.exp(jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX))


def sample(params, obs, noise):
    """Squashed `mean + std * noise`: `obs [..., obs_dim]`, `noise [..., action_dim]` to `[..., action_dim]`."""
    mean, std = gaussian(params, obs)
    return jnp.tanh(mean + std * noise)


def actor(params, obs):
    """Greedy policy, the squashed mean: `obs [..., obs_dim]` to actions `[..., action_dim]` in [-1, 1]."""
    return jnp.tanh(gaussian(params, obs)[0])


def act(config, params, obs):
    """Greedy action in the environment's units and shape for one observation of any shape."""
    return scale_action(config, actor(params.actor, flatten(obs[None])[0]))


# Models: of one state `[n]`, which begins with the observation, and one action `[action_dim]` in [-1, 1]


def true_start(config, key):
    """A first state: observation and state of the environment in one vector, and the function that takes it apart."""
    env, env_params, *_ = make_env(config)
    return ravel_pytree(env.reset(key, env_params))


def true_model(config, state, action, key):
    """The environment's step, with no reset at its end: `(next_state [n], reward, terminated)`."""
    env, env_params, *_ = make_env(config)
    _, env_state = true_start(config, key)[1](state)  # of which the shapes are needed, no more is computed
    action = scale_action(config, action)
    obs, env_state, reward, terminated, _ = env.with_transition_gradients().step_env(key, env_state, action, env_params)
    return ravel_pytree((obs, env_state))[0], reward, terminated


def model_init(config, key, warm_up):
    """A random network, and means and deviations of what the warm-up, `Transition [n]`, has seen."""
    x = jnp.concatenate([warm_up.obs, warm_up.action], axis=-1)
    y = jnp.concatenate([warm_up.next_obs - warm_up.obs, warm_up.reward[:, None]], axis=-1)
    network = mlp_init(key, (x.shape[1], *config.hidden_sizes, 2 * y.shape[1]))
    x_std, y_std = (jnp.where(z.std(axis=0) > 0, z.std(axis=0), 1) for z in (x, y))
    return Model(network, x.mean(axis=0), x_std, y.mean(axis=0), y_std)


def prediction(model, obs, action):
    """Mean and standard deviation, each `[..., obs_dim + 1]`, of the next observation and the reward."""
    x = (jnp.concatenate([obs, action], axis=-1) - model.input_mean) / model.input_std
    mean, std = gaussian(model.network, x)
    mean = model.target_mean + model.target_std * mean
    return mean.at[..., :-1].add(obs), model.target_std * std


def learned_model(config, model, state, action, noise):
    """The network's step: `(next_state [n], reward, terminated)`, where `noise [n]` is standard normal."""
    mean, std = prediction(model, state, action)
    reward = mean[-1] if config.reward == "learned" else true_reward(config, state, action)
    return mean[:-1] + std[:-1] * noise, reward, 0.0


def true_reward(config, obs, action):
    """The environment's reward; its state is what the observation shows."""
    env, env_params, *_ = make_env(config)
    _, env_state = env.reset(random.key(0), env_params)
    env_state = env_state.replace(**shown_state(config, obs))
    return env.step_env(random.key(0), env_state, scale_action(config, action), env_params)[2]


def shown_state(config, obs):
    """Fields of the environment's state from `obs [obs_dim]`; ValueError where it does not show them."""
    if config.env == "Pendulum-v1":
        return {"theta": jnp.arctan2(obs[1], obs[0]), "theta_dot": obs[2]}
    if config.env == "MountainCarContinuous-v0":
        return {"position": obs[0], "velocity": obs[1]}
    if config.env == "Reacher-misc":
        return {"angles": jnp.arctan2(obs[2:4], obs[:2]), "angle_vels": obs[4:6], "goal_xy": obs[6:8]}
    if config.env == "Swimmer-misc":
        xy = obs.reshape(-1, 2)
        return {"urchin_xys": xy[:-3], "xy": xy[-3], "xy_vel": xy[-2], "goal_xy": xy[-1]}
    if config.env.startswith("LQR"):
        return {"position": obs}
    raise ValueError(f"reward=true: must be learned, for shown_state does not know the observations of {config.env}")


def model_step(config, model, state, action, noise):
    """One step of the model that `config.model` names: `(next_state [n], reward, terminated)`."""
    if config.model == "true":
        return true_model(config, state, action, noise)
    return learned_model(config, model, state, action, noise)


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


def buffer_stretches(config, buffer, key, action_dim):
    """Draw stretches of consecutive steps of one environment each: `Transition [num_rollouts, horizon]`."""
    key_env, key_time = random.split(key)
    shape = (config.num_rollouts, 1)
    env = random.randint(key_env, shape, 0, config.num_envs)
    time = random.randint(key_time, shape, 0, buffer.size // config.num_envs - config.horizon + 1)
    oldest = buffer.position - buffer.size
    index = (oldest + config.num_envs * (time + jnp.arange(config.horizon)) + env) % len(buffer.rows)
    return unpack(buffer.rows.at[index].get(mode="promise_in_bounds"), action_dim)


# Gradient and losses


def discounted_return(actor_params, config, model, start, noise):
    """Objective of one rollout from `start [n]`."""
    obs_dim = actor_params[0][0].shape[0]

    def step(carry, noise):
        s, discount, total = carry
        a = sample(actor_params, s[:obs_dim], noise.policy)
        s, reward, terminated = model_step(config, model, s, a, noise.model)
        total += discount * reward
        discount *= config.gamma * (1 - terminated)
        return (s, discount, total), None

    step = jax.checkpoint(step) if config.remat else step
    return lax.scan(step, (start, jnp.ones(()), jnp.zeros(())), noise)[0][2]


def manual_gradient(config, params, start, noise):
    """Objective of one rollout and its gradient, forward in time.

    Memory does not grow with the horizon; time, and memory, grow with the number of parameters.
    """
    w, unravel = ravel_pytree(params.actor)
    obs_dim = params.actor[0][0].shape[0]

    def step(carry, noise):
        s, s_w, discount, total, total_w = carry
        policy = lambda s, w: sample(unravel(w), s[:obs_dim], noise.policy)
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
    """Objective and its gradient, means over rollouts: `starts [num_rollouts, n]`, as is the first axis of `noises`."""
    if config.gradient == "manual":
        rollouts = jax.vmap(manual_gradient, in_axes=(None, None, 0, 0))(config, params, starts, noises)
        return jax.tree.map(lambda x: x.mean(axis=0), rollouts)

    def objective(actor_params):
        returns = jax.vmap(discounted_return, in_axes=(None, None, None, 0, 0))
        return returns(actor_params, config, params.model, starts, noises).mean()

    return jax.value_and_grad(objective)(params.actor)


def model_loss(network, model, batch):
    """Negative log-likelihood of `batch` in the model's units, but for a constant; mean over the batch."""
    mean, std = prediction(model._replace(network=network), batch.obs, batch.action)
    target = jnp.concatenate([batch.next_obs, batch.reward[:, None]], axis=-1)
    log_density = -0.5 * jnp.square((target - mean) / std) - jnp.log(std / model.target_std)
    return -log_density.sum(axis=-1).mean()


# Training


def steps_per_iteration(config):
    """Environment steps between returns to learning: one of each environment."""
    return config.num_envs


def check(config):
    """Raise a ValueError `field=value: rule` where sizes, counts and choices do not fit together."""
    env, *_ = make_env(config)
    stored = min(config.learning_starts, config.buffer_size)
    multiple = f"a multiple of num_envs={config.num_envs}"
    epochs = f"a multiple of iterations_per_epoch={config.iterations_per_epoch}"
    recent = f"at most {stored // config.num_envs}, the steps of an environment that the warm-up stores"
    differentiable = "an environment with transition gradients, or its model learned with model=learned"
    learned, inferred = config.model == "learned", config.noise == "inferred"
    rules = [
        ("env", learned or env.supports_transition_gradients, differentiable),
        ("noise", learned or not inferred, "sampled where model=true"),
        ("num_iterations", config.num_iterations % config.iterations_per_epoch == 0, epochs),
        ("learning_starts", not learned or config.learning_starts % config.num_envs == 0, multiple),
        ("buffer_size", not learned or config.buffer_size % config.num_envs == 0, multiple),
        ("batch_size", not learned or config.batch_size <= stored, f"at most {stored}, what the warm-up stores"),
        ("horizon", not inferred or config.horizon * config.num_envs <= stored, recent),
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


def infer(model, steps):
    """Noise with which the model's step from `steps.obs` by `steps.action` leads to `steps.next_obs`."""
    mean, std = prediction(model, steps.obs, steps.action)
    return (steps.next_obs - mean[..., :-1]) / std[..., :-1]


def draw(config, model, buffer, key):
    """First states `[num_rollouts, n]` and the `Noise` of an update's rollouts."""
    _, _, low, _ = make_env(config)
    key_start, key_policy, key_model = random.split(key, 3)
    shape = (config.num_rollouts, config.horizon)
    policy_noise = random.normal(key_policy, (*shape, len(low)))
    if config.model == "true":
        starts = jax.vmap(lambda key: true_start(config, key)[0])(random.split(key_start, config.num_rollouts))
        return starts, Noise(policy_noise, random.split(key_model, shape))
    if config.noise == "inferred":
        steps = buffer_stretches(config, buffer, key_start, len(low))
        return steps.obs[:, 0], Noise(policy_noise, infer(model, steps))
    starts = buffer_sample(buffer, key_start, shape[:1], len(low)).obs
    return starts, Noise(policy_noise, random.normal(key_model, (*shape, starts.shape[1])))


def update_model(config, params, opt_state, batch):
    """One Adam step of the model: `(params, opt_state, loss)`."""
    loss, grads = jax.value_and_grad(model_loss)(params.model.network, params.model, batch)
    updates, adam = optax.adam(config.model_learning_rate).update(grads, opt_state.model)
    model = params.model._replace(network=optax.apply_updates(params.model.network, updates))
    return params._replace(model=model), opt_state._replace(model=adam), loss


def update_actor(config, params, opt_state, starts, noises):
    """One Adam step of the policy along the clipped gradient: `(params, opt_state, (objective, norm, clipped))`."""
    value, grads = policy_gradient(config, params, starts, noises)
    norm = optax.global_norm(grads)
    # a gradient that is not finite says nothing: it is counted, and zero takes its place
    scale = jnp.where(jnp.isfinite(norm), jnp.minimum(1, config.max_grad_norm / norm), 0)
    descent = jax.tree.map(lambda x: jnp.where(jnp.isfinite(norm), -scale * x, 0), grads)
    updates, adam = optax.adam(config.learning_rate).update(descent, opt_state.actor)
    params = params._replace(actor=optax.apply_updates(params.actor, updates))
    return params, opt_state._replace(actor=adam), (value, norm, (scale < 1).astype(float))


def fit_model(config, state):
    """Collect from the policy, then `model_steps` updates of the model on the replay buffer: `(State, loss)`."""
    _, _, low, _ = make_env(config)

    def explore(obs, key):
        return sample(state.params.actor, obs, random.normal(key, (len(obs), len(low))))

    def step(carry, batch):
        *carry, loss = update_model(config, *carry, batch)
        return tuple(carry), loss

    state = collect(config, state, explore)
    key, key_batch = random.split(state.key)
    batches = buffer_sample(state.buffer, key_batch, (config.model_steps, config.batch_size), len(low))
    (params, opt_state), losses = lax.scan(step, (state.params, state.opt_state), batches)
    return state._replace(params=params, opt_state=opt_state, key=key), losses.mean()


def iteration(config, state):
    """One update of the policy, and of a learned model before it: `(State, figures)`."""
    if config.model == "learned":
        state, loss = fit_model(config, state)
    else:
        state = state._replace(step=state.step + config.num_rollouts * config.horizon)
        loss = jnp.zeros(())
    key, key_draw = random.split(state.key)
    starts, noises = draw(config, state.params.model, state.buffer, key_draw)
    params, opt_state, figures = update_actor(config, state.params, state.opt_state, starts, noises)
    state = state._replace(params=params, opt_state=opt_state, iteration=state.iteration + 1, key=key)
    return state, (loss, *figures)


def evaluate(config, params, key):
    """Undiscounted returns `[num_eval_episodes]` of the greedy policy on whole episodes in fresh environments."""
    env, env_params, *_ = make_env(config)

    def step(carry):
        obs, env_state, _, total, key = carry
        key, key_step = random.split(key)
        action = act(config, params, obs)
        obs, env_state, reward, terminated, truncated, _ = env.step(key_step, env_state, action, env_params)
        return obs, env_state, terminated | truncated, total + reward, key

    def episode(key):
        key, key_reset = random.split(key)
        carry = *env.reset(key_reset, env_params), False, jnp.zeros(()), key
        return lax.while_loop(lambda carry: ~carry[2], step, carry)[3]

    return jax.vmap(episode)(random.split(key, config.num_eval_episodes))


def init(config, key):
    """Networks, and a buffer filled by the warm-up for a learned model. ValueError where the sizes do not fit."""
    check(config)
    key, key_actor, key_model, key_env = random.split(key, 4)
    _, _, low, _ = make_env(config)
    env_state, obs = env_init(config, key_env)
    obs_dim, action_dim = obs.shape[1], len(low)
    actor_params = mlp_init(key_actor, (obs_dim, *config.hidden_sizes, 2 * action_dim))
    w, b = actor_params[-1]
    actor_params[-1] = w, b.at[action_dim:].set(jnp.log(config.initial_std))
    actor_adam = optax.adam(config.learning_rate).init(actor_params)
    zero = jnp.int32(0)
    if config.model == "true":
        return State(Params(actor_params, ()), OptState(actor_adam, ()), (), (), (), zero, zero, key)

    def explore(obs, key):
        return random.uniform(key, (config.num_envs, action_dim), minval=-1, maxval=1)

    if config.reward == "true":
        shown_state(config, obs[0])  # raises where it cannot
    buffer = buffer_init(config.buffer_size, 2 * obs_dim + action_dim + 2)
    state = State(Params(actor_params, ()), OptState(actor_adam, ()), buffer, env_state, obs, zero, zero, key)
    iterations = config.learning_starts // steps_per_iteration(config)
    state = lax.scan(lambda state, _: (collect(config, state, explore), None), state, length=iterations)[0]
    model = model_init(config, key_model, unpack(state.buffer.rows[: config.learning_starts], action_dim))
    model_adam = optax.adam(config.model_learning_rate).init(model.network)
    return state._replace(params=Params(actor_params, model), opt_state=OptState(actor_adam, model_adam))


def epoch(config, state):
    """`iterations_per_epoch` updates of the policy, then a greedy evaluation: `(State, Metrics)`."""
    state, figures = lax.scan(lambda state, _: iteration(config, state), state, length=config.iterations_per_epoch)
    key, key_eval = random.split(state.key)
    returns = evaluate(config, state.params, key_eval)
    means = (x.mean() for x in figures)
    return state._replace(key=key), Metrics(state.step, returns, state.iteration, *means)


def train(config, key):
    """The whole run, a pure function: `(State, Metrics)`, every metric with a leading axis `[num_epochs]`."""
    num_epochs = config.num_iterations // config.iterations_per_epoch
    return lax.scan(lambda state, _: epoch(config, state), init(config, key), length=num_epochs)


if __name__ == "__main__":
    from common.run import main

    main(Config, init, epoch)

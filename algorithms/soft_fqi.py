"""Soft fitted Q-iteration: FQI with the smooth Bellman operator, a log-integral over actions in place of the maximum.

The log-integral beta * log of the integral of exp(q(s, a) / beta) over a is the value of the Boltzmann policy with an
entropy bonus of beta per nat; it becomes the maximum as beta goes to 0. It is computed by quadrature, or from samples
of a policy `d` (`pi` in most papers), fitted to the Boltzmann policy, by importance sampling or in its dual form.

    take base points B = {(s, a, r, s', terminated)}, by default collected with uniformly random actions
    initialize critic q, actor d
    repeat until delta < tolerance or num_iterations iterations:
        for each base point: y = r + gamma * (1 - terminated) * v(s'), where v(s') is, by the choice of `integral`,
            quadrature:  beta * log sum_i w_i exp(q(s', a_i) / beta) with the nodes a_i and weights w_i
            importance:  beta * log mean_i exp(q(s', a_i) / beta) / d(a_i | s') with a_i ~ d(. | s')
            dual:        mean_i (q(s', a_i) - beta * log d(a_i | s')) with a_i ~ d(. | s')
        q_new <- minimize mean (q_new(s, a) - y)^2 over B, from the parameters of q or from scratch
        unless by quadrature: d <- minimize mean (beta * log d(a~ | s') - q_new(s', a~)), a~ = tanh(mean + std * noise)
        delta <- mean (q_new(s, a~) - q(s, a~))^2 over the states of B with uniformly random actions a~
        q <- q_new
    act by the mean of the Boltzmann policy, or by d's squashed mean

Sources: Haarnoja et al., "Reinforcement Learning with Deep Energy-Based Policies" (ICML 2017), equations 4-6 and 10;
Haarnoja et al., "Soft Actor-Critic" (ICML 2018), equations 3 and 10, for the dual form and the fit of the policy.

Differences from the papers:
- Targets bootstrap through time limits, from the last observation before the reset.
- The integral runs over actions in the environment's units, so that its value does not depend on ours, [-1, 1].
- delta is a mean over random actions, since a sum over all actions is not defined where they are continuous.
- Discrete actions are coded as vectors of -1 with a 1 in the action's place; their integral is a sum.
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

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0  # bounds of the policy's log standard deviation
CHUNK = 1024  # states whose values are computed at once, which bounds the memory
MAX_NODES = 100_000  # of a quadrature over actions

Count = Annotated[int, "from 1 to 2147483647"]  # a plain int may be 0 or negative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields set shapes and loop lengths; the others can be traced, vmapped and swept.

    Base points are rounded up to whole steps of num_envs environments, iterations to whole epochs.
    """

    env: str = jax.tree.static(default="Pendulum-v1")  # gymnax environment, bounded continuous or Discrete actions
    num_base_points: Count = jax.tree.static(default=20_000)  # transitions to collect
    num_iterations: Count = jax.tree.static(default=50)  # fits of the critic, at most
    iterations_per_epoch: Count = jax.tree.static(default=10)  # fits between evaluations
    num_envs: Count = jax.tree.static(default=100)  # environments stepped in parallel
    num_eval_episodes: Count = jax.tree.static(default=128)  # greedy episodes per evaluation
    approximator: Literal["mlp", "quadratic"] = jax.tree.static(default="mlp")  # network, or quadratic in (s, a)
    hidden_sizes: tuple[Count, ...] = jax.tree.static(default=(64, 64))  # widths of the hidden layers
    activation: Literal["relu", "silu", "elu", "tanh"] = jax.tree.static(default="silu")  # of the hidden layers
    fit_steps: Count = jax.tree.static(default=1_000)  # Adam steps per fit
    batch_size: Count = jax.tree.static(default=256)  # base points per Adam step, or all where there are no more
    from_scratch: bool = jax.tree.static(default=False)  # start each fit from new random weights
    integral: Literal["quadrature", "importance", "dual"] = jax.tree.static(default="quadrature")  # see above
    num_nodes: Count = jax.tree.static(default=32)  # of the quadrature, per dimension of the action
    num_samples: Count = jax.tree.static(default=32)  # actions of the policy per value, unless by quadrature
    exploration_range: Annotated[float, "in (0, 1]"] = 1.0  # random actions of base points lie in [-range, range]
    learning_rate: Annotated[float, "> 0"] = 1e-3  # Adam's step size
    gamma: Annotated[float, "in [0, 1]"] = 0.97  # discount per environment step
    ridge: Annotated[float, ">= 0"] = 1e-6  # penalty on the squared weights of the quadratic fit
    beta: Annotated[float, "> 0"] = 0.1  # temperature: reward per nat of entropy
    tolerance: Annotated[float, ">= 0"] = 1e-9  # stop when the critic's mean squared change is smaller


class Transition(NamedTuple):
    """One environment step, or a batch of them."""

    obs: jax.Array  # [..., obs_dim]
    action: jax.Array  # [..., action_dim], in [-1, 1]
    reward: jax.Array  # [...]
    next_obs: jax.Array  # [..., obs_dim], before any reset
    terminated: jax.Array  # [...], 0 at a time limit


class Params(NamedTuple):
    """Everything learned."""

    actor: Any
    critic: Any


class State(NamedTuple):
    """Everything carried from one iteration to the next."""

    params: Params
    base_points: Transition  # leading axis [num_base_points]
    step: jax.Array  # [] int32, environment steps so far
    iteration: jax.Array  # [] int32, iterations so far
    delta: jax.Array  # [], mean squared change of the critic in the last iteration
    losses: Any  # (critic_loss, q_value, actor_loss) after the last iteration
    key: jax.Array  # [] random key of the training
    key_eval: jax.Array  # [] random key of the evaluations, so that their number does not change the training


class Metrics(NamedTuple):
    """What an epoch reports."""

    step: jax.Array  # [] int32, environment steps so far
    eval_returns: jax.Array  # [num_eval_episodes], undiscounted, greedy policy
    critic_loss: jax.Array  # [], mean squared error to the targets of the last iteration
    q_value: jax.Array  # [], mean on the base points
    actor_loss: jax.Array  # [], KL divergence from the Boltzmann policy, up to a constant; 0 by quadrature
    iteration: jax.Array  # [] int32, iterations so far
    delta: jax.Array  # [], mean squared change of the critic in the last iteration


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


def quadratic_features(x):
    """All monomials of degree two or less: `[..., n]` to `[..., (n + 1) * (n + 2) / 2]`."""
    x = jnp.concatenate([jnp.ones((*x.shape[:-1], 1)), x], axis=-1)
    i, j = np.triu_indices(x.shape[-1])
    return x[..., i] * x[..., j]


def actor_init(config, key):
    """Random weights of the policy."""
    env = make_env(config.env)
    return mlp_init(key, (env.obs_dim, *config.hidden_sizes, 2 * env.action_dim))


def critic_init(config, key):
    """Random weights of the network, or zeros for the quadratic."""
    n = make_env(config.env).obs_dim + make_env(config.env).action_dim
    if config.approximator == "quadratic":
        return jnp.zeros((n + 1) * (n + 2) // 2)
    return mlp_init(key, (n, *config.hidden_sizes, 1))


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
    x = jnp.concatenate([obs, action], axis=-1)
    return quadratic_features(x) @ params if config.approximator == "quadratic" else mlp(config, params, x)[..., 0]


# Learning


def td_target(config, params, batch, key):
    """Smooth Bellman operator `[batch]`: the soft value of the next observation."""
    next_value = soft_value(config, params, batch.next_obs, key)
    return batch.reward + config.gamma * jnp.where(batch.terminated, 0, next_value)


def soft_value(config, params, obs, key):
    """Soft values `[n]` of `obs [n, obs_dim]` by `config.integral`."""

    def value(inputs):
        obs, key = inputs
        q = functools.partial(critic, config, params.critic, obs)
        if config.integral == "quadrature":
            return quadrature(q, config.beta, *nodes(config))
        noise = random.normal(key, (config.num_samples, make_env(config.env).action_dim))
        actions, log_prob = sample_action(config, params.actor, obs, noise)
        estimate = importance if config.integral == "importance" else dual
        return estimate(q, config.beta, actions, log_scale(config) - log_prob)

    return lax.map(value, (obs, random.split(key, len(obs))), batch_size=CHUNK)


def quadrature(q, beta, actions, log_weights):
    """Log-integral of exp(q / beta), times beta, by nodes `actions [n, action_dim]` and their `log_weights [n]`."""
    return beta * jax.nn.logsumexp(jax.vmap(q)(actions) / beta + log_weights)


def importance(q, beta, actions, log_weights):
    """The same from samples, whose weights are 1 / density: unbiased inside the logarithm."""
    return beta * (jax.nn.logsumexp(jax.vmap(q)(actions) / beta + log_weights) - jnp.log(len(actions)))


def dual(q, beta, actions, log_weights):
    """Mean value of samples plus beta times their entropy: a lower bound, exact for the Boltzmann policy."""
    return (jax.vmap(q)(actions) + beta * log_weights).mean()


def nodes(config):
    """Gauss-Legendre nodes `[n, action_dim]` and log-weights `[n]` over the box, or all Discrete actions."""
    env = make_env(config.env)
    if env.discrete:
        return 2 * jnp.eye(env.action_dim) - 1, jnp.zeros(env.action_dim)
    points, weights = np.polynomial.legendre.leggauss(config.num_nodes)
    grid, log_grid = (np.meshgrid(*[x] * env.action_dim, indexing="ij") for x in (points, np.log(weights)))
    actions, log_weights = (np.stack(x, axis=-1).reshape(-1, env.action_dim) for x in (grid, log_grid))
    return jnp.asarray(actions, float), jnp.asarray(log_weights.sum(axis=1), float) + log_scale(config)


def log_scale(config):
    """Logarithm of the volume in the environment's units of a unit of volume in [-1, 1]."""
    env = make_env(config.env)
    low, high = env.rescale(-jnp.ones(env.action_dim)), env.rescale(jnp.ones(env.action_dim))
    return jnp.log((high - low) / 2).sum()


def critic_loss(critic_params, config, batch, target):
    """Mean squared error to `target [batch]`, and the mean value: `(loss, q_value)`."""
    q = critic(config, critic_params, batch.obs, batch.action)
    return jnp.square(q - target).mean(), q.mean()


def actor_loss(actor_params, critic_params, config, batch, noise):
    """KL divergence from the Boltzmann policy, up to a constant, with standard normal `noise [batch, action_dim]`."""
    action, log_prob = sample_action(config, actor_params, batch.next_obs, noise)
    return (config.beta * log_prob - critic(config, critic_params, batch.next_obs, action)).mean()


def optimizer(config):
    """Adam; gradient clipping or a schedule, in updates of the parameters in question, goes here."""
    return optax.adam(config.learning_rate)


def apply_grads(config, grads, params, opt_state):
    """One step of the optimizer: `(params, opt_state)`."""
    updates, opt_state = optimizer(config).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def fit(config, loss, params, data, key):
    """New `params` after `fit_steps` steps on `loss(params, rows)`, each with `batch_size` random rows of `data`."""
    n = len(jax.tree.leaves(data)[0])

    def step(carry, key):
        params, opt_state = carry
        index = random.randint(key, (config.batch_size,), 0, n)
        rows = jax.tree.map(lambda x: x[index], data) if config.batch_size < n else data
        return apply_grads(config, jax.grad(loss)(params, rows), params, opt_state), None

    return lax.scan(step, (params, optimizer(config).init(params)), random.split(key, config.fit_steps))[0][0]


def fit_quadratic(config, batch, target):
    """Ridge regression of `target` on quadratic features scaled to mean square 1, in closed form."""
    x = quadratic_features(jnp.concatenate([batch.obs, batch.action], axis=1))
    scale = jnp.sqrt(jnp.square(x).mean(axis=0)) + 1e-6
    x = jnp.concatenate([x / scale, jnp.sqrt(len(x) * config.ridge) * jnp.eye(len(scale))])
    y = jnp.concatenate([target, jnp.zeros(len(scale))])
    return jnp.linalg.lstsq(x, y, rcond=1e-6)[0] / scale  # by SVD: float32 has too few digits for x.T @ x


def fit_critic(config, params, batch, target, key):
    """New parameters of the critic."""
    if config.approximator == "quadratic":
        return fit_quadratic(config, batch, target)
    key, key_init = random.split(key)
    params = critic_init(config, key_init) if config.from_scratch else params
    inputs = jnp.abs(jnp.concatenate([batch.obs, batch.action], axis=1)).max(axis=0)
    scale = jnp.where(inputs > 0, inputs, 1)  # of what the fitted network takes, in [-1, 1]
    loss = lambda params, rows: critic_loss(scale_inputs(params, 1 / scale), config, *rows)[0]
    return scale_inputs(fit(config, loss, scale_inputs(params, scale), (batch, target), key), 1 / scale)


def scale_inputs(layers, factors):
    """The layers of the network `x -> network(factors * x)`."""
    (w, b), *others = layers
    return [(w * factors[:, None], b), *others]


def fit_actor(config, params, critic_params, batch, key):
    """New parameters of the actor and their loss: `(params, loss)`; the noise of a base point is drawn once."""
    key, key_noise = random.split(key)
    rows = batch, random.normal(key_noise, batch.action.shape)
    loss = lambda params, rows: actor_loss(params, critic_params, config, *rows)
    params = fit(config, loss, params, rows, key)
    return params, loss(params, rows)


# Policies


def greedy(config, params, obs):
    """Mean of the Boltzmann policy by quadrature, or of the policy, squashed: `obs [..., obs_dim]` to actions."""
    if config.integral != "quadrature":
        return actor(config, params.actor, obs)
    actions, log_weights = nodes(config)

    def boltzmann_mean(obs):
        q = jax.vmap(functools.partial(critic, config, params.critic, obs))(actions)
        return jax.nn.softmax(q / config.beta + log_weights) @ actions

    return project(config, jnp.vectorize(boltzmann_mean, signature="(i)->(j)")(obs))


def random_policy(config, params, obs, key):
    """Uniformly random actions within `exploration_range`."""
    shape, bound = (*obs.shape[:-1], make_env(config.env).action_dim), config.exploration_range
    return project(config, random.uniform(key, shape, minval=-bound, maxval=bound))


def project(config, action):
    """Project onto the action set: `[..., action_dim]` clipped to [-1, 1], or the code of the largest coordinate."""
    if make_env(config.env).discrete:
        return 2 * jax.nn.one_hot(jnp.argmax(action, axis=-1), action.shape[-1]) - 1
    return jnp.clip(action, -1, 1)


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
        env_state, new_obs, reward, next_obs, terminated, _ = env_step(env_state, action, keys_env)
        return (env_state, new_obs), Transition(obs, action, reward, next_obs, terminated)

    (env_state, obs), transitions = lax.scan(step, (env_state, obs), keys)
    return env_state, obs, transitions


# Base points


def collect(config, params, policy, num_steps, key):
    """`num_steps` steps of new environments with `policy`, in random order: `Transition [num_steps * num_envs]`."""
    key_reset, key_rollout, key_order = random.split(key, 3)
    env_state, obs = jax.vmap(make_env(config.env).reset)(random.split(key_reset, config.num_envs))
    _, _, batch = rollout(config, params, policy, env_state, obs, random.split(key_rollout, num_steps))
    order = random.permutation(key_order, batch.reward.size)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[order], batch)


def prepare(base_points):
    """Base points as floats, with zeros for a last observation that is NaN."""
    # targets ignore it where the episode has terminated, but a policy may be fitted there
    ignored = (base_points.terminated > 0)[..., None] & ~jnp.isfinite(base_points.next_obs)
    base_points = base_points._replace(next_obs=jnp.where(ignored, 0, base_points.next_obs))
    return Transition(*(jnp.array(x, float) for x in base_points))  # copies, since the state may be donated


# Training


def iteration(config, state):
    """One fit of the critic to its own targets, and one of the actor to the critic: `State`."""
    key, key_target, key_critic, key_actor, key_delta = random.split(state.key, 5)
    batch, old = state.base_points, state.params
    target = td_target(config, old, batch, key_target)
    critic_params = fit_critic(config, old.critic, batch, target, key_critic)
    actor_params, loss = old.actor, jnp.zeros(())
    if config.integral != "quadrature":
        actor_params, loss = fit_actor(config, old.actor, critic_params, batch, key_actor)
    action = project(config, random.uniform(key_delta, batch.action.shape, minval=-1, maxval=1))
    q, q_new = (critic(config, params, batch.obs, action) for params in (old.critic, critic_params))
    losses = (*critic_loss(critic_params, config, batch, target), loss)
    params, delta = Params(actor_params, critic_params), jnp.square(q_new - q).mean()
    return state._replace(params=params, iteration=state.iteration + 1, delta=delta, losses=losses, key=key)


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
    "in (0, 1]": lambda x: (x > 0) & (x <= 1),
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


def check_choices(config):
    """ValueError where the integral does not fit the actions or the memory."""
    env, quadrature = make_env(config.env), config.integral == "quadrature"
    if env.discrete and not quadrature:
        raise ValueError(f"integral={config.integral}: must be quadrature: the actions of {config.env} are Discrete")
    n = config.num_nodes**env.action_dim
    if quadrature and not env.discrete and n > MAX_NODES:
        raise ValueError(f"num_nodes={config.num_nodes}: must be less: a quadrature of {n} nodes is too large")


def num_epochs(config):
    """The fewest epochs that make `num_iterations` iterations."""
    return math.ceil(config.num_iterations / config.iterations_per_epoch)


def init(config, key, base_points=None):
    """Base points and new networks; ValueError where `config` does not fit.

    `base_points` is a `Transition` with leading axis [n] and actions in [-1, 1]; None collects them at random.
    """
    check(config)
    num_points = math.ceil(config.num_base_points / config.num_envs) * config.num_envs
    iterations = num_epochs(config) * config.iterations_per_epoch
    check(config, num_base_points=num_points, num_iterations=iterations)
    check_choices(config)
    key, key_eval, key_actor, key_critic, key_base_points = random.split(key, 5)
    if base_points is None:
        num_steps = math.ceil(config.num_base_points / config.num_envs)
        base_points = collect(config, None, random_policy, num_steps, key_base_points)
    params, losses = Params(actor_init(config, key_actor), critic_init(config, key_critic)), tuple(jnp.zeros(3))
    step, delta = jnp.int32(len(base_points.reward)), jnp.array(jnp.inf, float)
    return State(params, prepare(base_points), step, jnp.int32(0), delta, losses, key, key_eval)


def epoch(config, state):
    """`iterations_per_epoch` iterations, fewer if delta falls below `tolerance`, and evaluate: `(State, Metrics)`."""
    end = state.iteration + config.iterations_per_epoch
    unfinished = lambda state: (state.iteration < end) & (state.delta >= config.tolerance)
    state = lax.while_loop(unfinished, functools.partial(iteration, config), state)
    returns = evaluate(config, state.params, random.fold_in(state.key_eval, state.iteration))
    return state, Metrics(state.step, returns, *state.losses, state.iteration, state.delta)


def train(config, key, base_points=None):
    """A whole run, a pure function: `(State, Metrics)`, metrics with a leading axis `[num_epochs]`."""
    state = init(config, key, base_points)
    return lax.scan(lambda state, _: epoch(config, state), state, length=num_epochs(config))


if __name__ == "__main__":
    from amortax.common.run import main

    main(Config, init, epoch, num_epochs)

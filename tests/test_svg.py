"""SVG: its two gradients against each other, finite differences and closed forms; the learned model; what it learns."""

import functools

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Clock, assert_same, fast_jit, replace
from jax import random
from jax.flatten_util import ravel_pytree

from amortax.algorithms import svg
from amortax.common import envs, lqr

TRUE = svg.Config(
    num_iterations=4, iterations_per_epoch=2, num_rollouts=4, horizon=5, num_eval_episodes=2, hidden_sizes=(8, 8)
)
LEARNED = replace(
    TRUE,
    model="learned",
    learning_starts=64,
    num_envs=4,
    buffer_size=72,
    batch_size=16,
    model_steps=2,
    noise="inferred",
)


class Differentiable(Clock):
    """Clock with transition gradients."""

    _supports_transition_gradients = True


gymnax.register("ClockDifferentiable-test", functools.partial(Differentiable, 6, True))
gymnax.register("ClockLimited-test", functools.partial(Differentiable, 6, False))


@pytest.fixture
def float64():
    """Double precision; what was traced and cached in the other precision is forgotten."""
    for enabled in (True, False):
        jax.config.update("jax_enable_x64", enabled)
        jax.clear_caches()
        svg.make_env.cache_clear()
        if enabled:
            yield


def setting(config, seed=0):
    """`(parameters, first states, noise)` of one update; those of a learned model after some training of it."""

    @jax.jit
    def start(key):
        state = svg.init(config, key)
        if config.model == "learned":
            state, _ = svg.fit_model(config, state)
        rollouts = svg.sample_rollouts(config, state.params.model, state.buffer, state.step, random.key(seed + 1))
        return state.params, *rollouts

    return start(random.key(seed))


def gradient(config, *arguments):
    return jax.jit(svg.policy_gradient)(config, *arguments)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def relative(a, b):
    """Distance in ratio to b; zero where both are."""
    return np.linalg.norm(flat(a) - flat(b)) / max(np.linalg.norm(flat(b)), 1e-30)


# The gradient


def check_gradients_agree(config, tolerance):
    arguments = setting(config)
    value, expected = gradient(config, *arguments)
    for changes in ({"gradient": "manual"}, {"remat": True}):
        other_value, other = gradient(replace(config, **changes), *arguments)
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        assert relative(other, expected) <= tolerance, changes
    return np.linalg.norm(flat(expected))


@pytest.mark.parametrize(("env", "horizon"), [("LQR-v0", 10), ("Pendulum-v1", 200)])
def test_forward_and_backward_gradients_agree(env, horizon):
    check_gradients_agree(replace(TRUE, env=env, horizon=horizon), 1e-5)


@pytest.mark.parametrize(("env", "horizon"), [("LQR-v0", 200), ("Pendulum-v1", 50), ("Pendulum-v1", 200)])
def test_forward_and_backward_gradients_agree_in_float64(float64, env, horizon):
    check_gradients_agree(replace(TRUE, env=env, horizon=horizon), 1e-10)


@pytest.mark.parametrize("env", ["MountainCarContinuous-v0", "PointRobot-misc", "Reacher-misc", "Swimmer-misc"])
def test_forward_and_backward_gradients_agree_on(env):
    norm = check_gradients_agree(replace(TRUE, env=env, initial_std=1.0), 1e-5)
    assert (norm > 0) == (env != "PointRobot-misc")  # whose reward is a step, flat on either side


@pytest.mark.parametrize(("noise", "reward"), [("sampled", "true"), ("inferred", "learned")])
def test_forward_and_backward_gradients_agree_through_a_learned_model(noise, reward):
    check_gradients_agree(replace(LEARNED, noise=noise, reward=reward), 1e-5)


@pytest.mark.parametrize(
    "config", [TRUE, replace(TRUE, env="LQR-v0"), LEARNED, replace(LEARNED, reward="true")], ids=range(4)
)
def test_gradient_equals_finite_differences_through_the_whole_rollout(float64, config):
    params, starts, noises = setting(replace(config, horizon=12))
    w, unravel = ravel_pytree(params.actor)
    w += 0.1 * random.normal(random.key(2), w.shape)  # with biases of zero a unit may be at the kink of ReLU
    params = params._replace(actor=unravel(w))
    _, expected = gradient(config, params, starts, noises)

    @jax.jit
    def objective(w):
        returns = jax.vmap(svg.discounted_return, in_axes=(None, None, None, 0, 0))
        return returns(unravel(w), config, params.model, starts, noises).mean()

    for direction in np.random.default_rng(0).normal(size=(5, len(w))):
        eps = 1e-6
        difference = (objective(w + eps * direction) - objective(w - eps * direction)) / (2 * eps)
        np.testing.assert_allclose(flat(expected) @ direction, difference, rtol=1e-4)


def expected_return(system, gain, std, gamma, horizon):
    """Discounted return of a = gain s + std e on a linear-quadratic system, by the covariance of s; float64."""
    A, B, Q, R, noise = (np.asarray(x, np.float64) for x in (system.A, system.B, system.Q, system.R, system.noise))
    covariance, total = np.eye(len(A)) / 3, 0.0  # uniform on [-1, 1]^n
    for t in range(horizon):
        action = gain @ covariance @ gain.T + std**2 * np.eye(len(R))
        total -= gamma**t * (np.trace(Q @ covariance) + np.trace(R @ action))
        closed = A + B @ gain
        covariance = closed @ covariance @ closed.T + std**2 * B @ B.T + noise @ noise.T
    return total


@pytest.mark.parametrize("kind", ["autodiff", "manual"])
def test_gradient_equals_the_analytic_one_of_linear_quadratic_regulation(kind):
    """Within four standard errors. Actions are small, so that the tanh around them is straight to 1e-4 of them."""
    n, horizon, gamma, std, bound = 4096, 20, 0.9, 0.01, lqr.ACTION_BOUND
    config = svg.Config(env="LQR-v0", gradient=kind, num_rollouts=n, horizon=horizon, gamma=gamma, hidden_sizes=())
    gain = np.array([[-0.01, 0.005]])
    weights = np.concatenate([gain.T, np.zeros((2, 1))], axis=1)
    params = svg.Params([(jnp.asarray(weights, jnp.float32), jnp.array([0.0, np.log(std)]))], ())
    starts, noises = svg.sample_rollouts(config, (), (), 0, random.key(0))

    def one(start, noise):  # of a rollout alone, for the standard errors
        return svg.policy_gradient(config, params, start[None], jax.tree.map(lambda x: x[None], noise))

    values, gradients = jax.jit(jax.vmap(one))(starts, noises)
    system = gymnax.make("LQR-v0")[1]
    objective = lambda w, log_std: expected_return(system, bound * w, bound * np.exp(log_std), gamma, horizon)
    eps = 1e-5
    (w, b), expected = gradients[0], []
    for i in range(2):
        shift = eps * np.eye(2)[i : i + 1]
        difference = objective(gain + shift, np.log(std)) - objective(gain - shift, np.log(std))
        expected.append((w[:, i, 0], difference / (2 * eps)))
    difference = objective(gain, np.log(std) + eps) - objective(gain, np.log(std) - eps)
    expected.append((b[:, 1], difference / (2 * eps)))
    expected.append((values, objective(gain, np.log(std))))
    for samples, truth in expected:
        samples = np.asarray(samples, np.float64)
        assert abs(samples.mean() - truth) < 4 * samples.std() / np.sqrt(n)
    assert abs(np.mean(w[:, 0, 0])) > 10 * np.std(w[:, 0, 0]) / np.sqrt(n)  # zero would not have passed


@pytest.mark.parametrize("kind", ["autodiff", "manual"])
@pytest.mark.parametrize(("env", "steps"), [("ClockDifferentiable-test", 6), ("ClockLimited-test", 10)])
def test_rewards_count_until_the_end_and_beyond_a_time_limit(kind, env, steps):
    config = replace(TRUE, env=env, gradient=kind, horizon=10, gamma=0.9)
    np.testing.assert_allclose(gradient(config, *setting(config))[0], (1 - 0.9**steps) / (1 - 0.9), rtol=1e-5)


def test_the_true_model_is_the_environments_step():
    for env_id in (*envs.CONTINUOUS_ENVS, "LQR-v0"):
        config = replace(TRUE, env=env_id)
        env, env_params = gymnax.make(env_id)
        obs, env_state = env.reset(random.key(0), env_params)
        state, _ = svg.true_start(config, random.key(0))
        np.testing.assert_array_equal(state[: obs.size], obs.ravel())
        action = jnp.full(svg.make_env(env_id).action_dim, 0.3)
        for i in range(3):
            key = random.key(i)
            env_action = svg.make_env(env_id).rescale(action)
            # step_env takes the first of the two keys that step makes of its own
            state, ours, _ = svg.true_model(config, state, action, random.split(key)[0])
            obs, env_state, reward, *_ = env.step(key, env_state, env_action, env_params)
            np.testing.assert_allclose(state[: obs.size], obs.ravel(), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(ours, reward, rtol=1e-5, atol=1e-6)


# Exploding gradients


def test_long_gradients_are_clipped_and_counted():
    params, starts, noises = setting(TRUE)
    opt_state = jax.jit(lambda key: svg.init(TRUE, key))(random.key(0)).opt_state
    _, grads = gradient(TRUE, params, starts, noises)
    norm = np.linalg.norm(flat(grads))
    for longest, clipped in ((norm / 3, 1), (norm * 3, 0)):
        config = replace(TRUE, max_grad_norm=longest)
        _, after, (_, found, was_clipped) = jax.jit(svg.update)(config, params, opt_state, starts, noises)
        np.testing.assert_allclose(found, norm, rtol=1e-5)
        assert was_clipped == clipped
        # Adam's first moment is a tenth of the first gradient that it sees, which descends
        np.testing.assert_allclose(
            10 * flat(after.actor[0].mu), -flat(grads) * min(1, longest / norm), rtol=1e-4, atol=1e-6
        )


def test_gradients_that_are_not_finite_are_left_out_and_counted():
    params, starts, noises = setting(TRUE)
    opt_state = jax.jit(lambda key: svg.init(TRUE, key))(random.key(0)).opt_state
    starts = starts.at[0, 2].set(jnp.inf)
    after, opt_after, (_, norm, clipped) = jax.jit(svg.update)(TRUE, params, opt_state, starts, noises)
    assert not np.isfinite(norm)
    assert clipped
    assert_same(after, params)
    np.testing.assert_array_equal(flat(opt_after.actor[0].mu), 0)


# The learned model


def stored(config, state):
    """All transitions of the buffer."""
    _, unravel = ravel_pytree(svg.example(config))
    return jax.vmap(unravel)(state.buffer)


def initialized(config, seed=0):
    return jax.jit(lambda key: svg.init(config, key))(random.key(seed))


def trained_model(config, updates):
    """`(losses [updates], state)` of a model fitted to the warm-up alone."""
    state = initialized(config)

    def step(carry, rows):
        *carry, loss = svg.update_model(config, *carry, svg.read(config, state.buffer, rows))
        return tuple(carry), loss

    rows = svg.sample_rows(config, state.buffer, state.step, random.key(1), updates)
    carry = state.params.model, state.opt_state.model
    (model, _), losses = jax.jit(lambda: jax.lax.scan(step, carry, rows))()
    return np.asarray(losses), state._replace(params=state.params._replace(model=model))


def test_the_models_likelihood_rises_and_it_beats_a_linear_fit():
    config = replace(
        LEARNED, learning_starts=4000, num_envs=20, buffer_size=4000, batch_size=256, hidden_sizes=(64, 64)
    )
    losses, state = trained_model(config, 3000)
    assert losses[-100:].mean() < losses[100:200].mean() - 2 < losses[0] - 2
    (obs, action, reward, next_obs, _), held_out = stored(config, state), stored(config, initialized(config, 7))
    x, y = (np.concatenate(z, axis=1) for z in ((obs, action, np.ones((4000, 1))), (next_obs, reward[:, None])))
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    target = np.concatenate([held_out.next_obs, held_out.reward[:, None]], axis=1)
    linear = np.concatenate([held_out.obs, held_out.action, np.ones((4000, 1))], axis=1) @ weights
    mean, _ = svg.predict(state.params.model, held_out.obs, held_out.action)
    scale = state.params.model.target_std
    ours, theirs = (np.square((target - p) / scale).mean() for p in (mean, linear))
    assert ours < theirs / 100


def test_the_model_finds_the_noise_of_a_linear_system():
    """A standard deviation of 0.1 of each coordinate; noise inferred from it is standard normal."""
    config = replace(LEARNED, env="LQR-v0", learning_starts=20_000, num_envs=20, buffer_size=20_000, batch_size=256)
    config = replace(config, hidden_sizes=(32,))
    _, state = trained_model(config, 3000)
    steps = stored(config, state)
    _, std = svg.predict(state.params.model, steps.obs, steps.action)
    np.testing.assert_allclose(std[:, :2].mean(axis=0), 0.1, rtol=0.1)
    noise = svg.infer_noise(state.params.model, steps)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.1)
    np.testing.assert_allclose(noise.std(axis=0), 1, rtol=0.1)


def test_model_loss_is_the_gaussian_likelihood():
    params, *_ = setting(LEARNED)
    config = replace(LEARNED, learning_starts=72)
    batch = stored(config, initialized(config, 3))
    mean, std = svg.predict(params.model, batch.obs, batch.action)
    target = np.concatenate([batch.next_obs, batch.reward[:, None]], axis=1)
    density = -0.5 * ((target - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    constant = np.log(params.model.target_std).sum() + 0.5 * 4 * np.log(2 * np.pi)
    loss = svg.model_loss(params.model.network, params.model, batch)
    np.testing.assert_allclose(loss, -density.sum(axis=1).mean() - constant, rtol=1e-4, atol=1e-4)


def test_inferred_noise_repeats_what_was_seen():
    state = initialized(LEARNED)
    steps = jax.tree.map(lambda x: x[:64], stored(LEARNED, state))
    noise = svg.infer_noise(state.params.model, steps)
    model = jax.vmap(svg.model_step, in_axes=(None, None, 0, 0, 0))
    next_obs, _, terminated = model(LEARNED, state.params.model, steps.obs, steps.action, noise)
    np.testing.assert_allclose(next_obs, steps.next_obs, rtol=1e-4, atol=1e-4)
    assert (np.asarray(terminated) == 0).all()


@pytest.mark.quick
@pytest.mark.parametrize("added", [10, 18, 25])
def test_sequences_are_consecutive_steps_of_one_environment(added):
    """Also where the buffer has wrapped around; every sequence in it occurs."""
    config = replace(LEARNED, num_rollouts=500, env="ClockTruncated-test")
    buffer = jnp.zeros((72, 5))
    for t in range(added):
        columns = jnp.full((4, 1), float(t)), jnp.arange(4.0)[:, None], jnp.zeros(4), jnp.zeros((4, 1)), jnp.zeros(4)
        buffer = svg.store(buffer, 4 * t, svg.Transition(*(x[None] for x in columns)))
    steps = svg.sample_sequences(config, buffer, 4 * added, 5, random.key(0))
    time, env = np.asarray(steps.obs[..., 0]), np.asarray(steps.action[..., 0])
    np.testing.assert_array_equal(time - time[:, :1], np.broadcast_to(np.arange(5), (500, 5)))
    np.testing.assert_array_equal(env, np.broadcast_to(env[:, :1], (500, 5)))
    oldest = max(0, added - 18)
    assert {(t, e) for t, e in zip(time[:, 0], env[:, 0], strict=True)} == {
        (float(t), float(e)) for t in range(oldest, added - 4) for e in range(4)
    }


@pytest.mark.parametrize(
    "env_id", ["Pendulum-v1", "MountainCarContinuous-v0", "Reacher-misc", "Swimmer-misc", "LQR-v0"]
)
def test_the_true_reward_of_an_observation_is_the_environments(env_id):
    config = replace(LEARNED, env=env_id)
    env, env_params = gymnax.make(env_id)
    wrapped = svg.make_env(env_id)
    for i in range(5):
        obs, env_state = env.reset(random.key(i), env_params)
        action = random.uniform(random.key(i), (wrapped.action_dim,), minval=-1, maxval=1)
        reward = env.step(random.key(i), env_state, wrapped.rescale(action), env_params)[2]
        np.testing.assert_allclose(svg.true_reward(config, obs.ravel(), action), reward, rtol=1e-4, atol=1e-5)


# What a run is


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("env", {"env": "Table-test"}),  # a model of it has to be learned
        ("noise", {"noise": "inferred"}),
        ("horizon", {"model": "learned", "noise": "inferred", "horizon": 51}),
        ("reward", {"model": "learned", "reward": "true", "env": "PointRobot-misc"}),
    ],
)
def test_a_mistake_names_its_field(field, changes):
    config = replace(TRUE, **{"num_envs": 20, "learning_starts": 1000, **changes})
    with pytest.raises(ValueError, match=f"^{field}={getattr(config, field)}: "):
        svg.init(config, random.key(0))


# Learning


def pendulum_return(**changes):
    """Median of three seeds: with the gradient reversed, or none through the dynamics, every seed stays below -600."""
    sizes = {"num_rollouts": 32, "num_iterations": 300, "iterations_per_epoch": 300, "num_eval_episodes": 32}
    config = svg.Config(**sizes, **changes)
    returns = fast_jit(lambda keys: jax.lax.map(lambda key: svg.train(config, key)[1].eval_returns.mean(), keys))
    return np.median(returns(jax.vmap(random.key)(np.arange(3))))


def test_swings_the_pendulum_up():
    assert pendulum_return() > -200


def test_swings_the_pendulum_up_with_a_learned_model():
    assert pendulum_return(model="learned", gamma=0.97, learning_starts=3000) > -300

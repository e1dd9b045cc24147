"""SVG: its two gradients against each other, finite differences and closed forms; the learned model; what it learns."""

import functools

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Clock, assert_close, assert_same, exact_jit, load_broken, quick_jit, replace
from jax import random
from jax.flatten_util import ravel_pytree

from algorithms import svg
from common import cli, lqr

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
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def setting(config, seed=0):
    """`(parameters, first states, noise)` of one update; those of a learned model after some training of it."""
    state = quick_jit(svg.init)(config, random.key(seed))
    if config.model == "learned":
        state, _ = quick_jit(svg.fit_model)(config, state)
    return state.params, *svg.draw(config, state.params.model, state.buffer, random.key(seed + 1))


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


@pytest.mark.parametrize("horizon", [10, 50, 200])
@pytest.mark.parametrize("env", ["LQR-v0", "Pendulum-v1"])
def test_forward_and_backward_gradients_agree(env, horizon):
    check_gradients_agree(replace(TRUE, env=env, horizon=horizon), 1e-5)


@pytest.mark.parametrize("horizon", [10, 50, 200])
@pytest.mark.parametrize("env", ["LQR-v0", "Pendulum-v1"])
def test_forward_and_backward_gradients_agree_in_float64(float64, env, horizon):
    check_gradients_agree(replace(TRUE, env=env, horizon=horizon), 1e-10)


@pytest.mark.parametrize("env", ["MountainCarContinuous-v0", "PointRobot-misc", "Reacher-misc", "Swimmer-misc"])
def test_forward_and_backward_gradients_agree_on(env):
    norm = check_gradients_agree(replace(TRUE, env=env, initial_std=1.0), 1e-5)
    assert (norm > 0) == (env != "PointRobot-misc")  # whose reward is a step, flat on either side


@pytest.mark.parametrize("reward", ["learned", "true"])
@pytest.mark.parametrize("noise", ["sampled", "inferred"])
def test_forward_and_backward_gradients_agree_through_a_learned_model(noise, reward):
    check_gradients_agree(replace(LEARNED, noise=noise, reward=reward), 1e-5)


@pytest.mark.parametrize(
    "config", [TRUE, replace(TRUE, env="LQR-v0"), LEARNED, replace(LEARNED, reward="true")], ids=range(4)
)
def test_gradient_equals_finite_differences_through_the_whole_rollout(float64, config):
    params, starts, noises = setting(replace(config, horizon=12))
    _, expected = gradient(config, params, starts, noises)
    w, unravel = ravel_pytree(params.actor)

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
    starts, noises = svg.draw(config, (), (), random.key(0))

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
    for env_id in (*cli.CONTINUOUS_ENVS, "LQR-v0"):
        config = replace(TRUE, env=env_id)
        env, env_params, *_ = svg.make_env(config)
        obs, env_state = env.reset(random.key(0), env_params)
        state, _ = svg.true_start(config, random.key(0))
        np.testing.assert_array_equal(state[: obs.size], obs.ravel())
        action = jnp.full(len(svg.make_env(config)[2]), 0.3)
        for i in range(3):
            key = random.key(i)
            env_action = svg.scale_action(config, action)
            # step_env takes the first of the two keys that step makes of its own
            state, ours, _ = svg.true_model(config, state, action, random.split(key)[0])
            obs, env_state, reward, *_ = env.step(key, env_state, env_action, env_params)
            np.testing.assert_allclose(state[: obs.size], obs.ravel(), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(ours, reward, rtol=1e-5, atol=1e-6)


# Exploding gradients


def test_long_gradients_are_clipped_and_counted():
    params, starts, noises = setting(TRUE)
    opt_state = svg.init(TRUE, random.key(0)).opt_state
    _, grads = gradient(TRUE, params, starts, noises)
    norm = np.linalg.norm(flat(grads))
    for longest, clipped in ((norm / 3, 1), (norm * 3, 0)):
        config = replace(TRUE, max_grad_norm=longest)
        _, after, figures = jax.jit(svg.update_actor)(config, params, opt_state, starts, noises)
        np.testing.assert_allclose(figures[1], norm, rtol=1e-5)
        assert figures[2] == clipped
        # Adam's first moment is a tenth of the first gradient that it sees, which descends
        np.testing.assert_allclose(
            10 * flat(after.actor[0].mu), -flat(grads) * min(1, longest / norm), rtol=1e-4, atol=1e-6
        )


def test_gradients_that_are_not_finite_are_left_out_and_counted():
    params, starts, noises = setting(TRUE)
    opt_state = svg.init(TRUE, random.key(0)).opt_state
    after, opt_after, figures = jax.jit(svg.update_actor)(TRUE, params, opt_state, starts.at[0, 2].set(jnp.inf), noises)
    assert not np.isfinite(figures[1])
    assert figures[2] == 1
    assert_same(after, params)
    np.testing.assert_array_equal(flat(opt_after.actor[0].mu), 0)


# The learned model


def trained_model(config, updates):
    """`(losses [updates], state)` of a model fitted to the warm-up alone."""
    state = jax.jit(svg.init)(config, random.key(0))
    keys = random.split(random.key(1), updates)

    def step(carry, key):
        batch = svg.buffer_sample(state.buffer, key, (config.batch_size,), 1)
        *carry, loss = svg.update_model(config, *carry, batch)
        return tuple(carry), loss

    (params, _), losses = jax.jit(lambda: jax.lax.scan(step, (state.params, state.opt_state), keys))()
    return np.asarray(losses), state._replace(params=params)


def test_the_models_likelihood_rises_and_it_beats_a_linear_fit():
    config = replace(
        LEARNED, learning_starts=4000, num_envs=20, buffer_size=4000, batch_size=256, hidden_sizes=(64, 64)
    )
    losses, state = trained_model(config, 3000)
    assert losses[-100:].mean() < losses[100:200].mean() - 2 < losses[0] - 2
    unseen = jax.jit(svg.init)(config, random.key(7)).buffer.rows
    (obs, action, reward, next_obs, _), held_out = (svg.unpack(rows, 1) for rows in (state.buffer.rows, unseen))
    x, y = (np.concatenate(z, axis=1) for z in ((obs, action, np.ones((4000, 1))), (next_obs, reward[:, None])))
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    target = np.concatenate([held_out.next_obs, held_out.reward[:, None]], axis=1)
    linear = np.concatenate([held_out.obs, held_out.action, np.ones((4000, 1))], axis=1) @ weights
    mean, _ = svg.prediction(state.params.model, held_out.obs, held_out.action)
    scale = state.params.model.target_std
    ours, theirs = (np.square((target - p) / scale).mean() for p in (mean, linear))
    assert ours < theirs / 100


def test_the_model_finds_the_noise_of_a_linear_system():
    """A standard deviation of 0.1 of each coordinate; noise inferred from it is standard normal."""
    config = replace(LEARNED, env="LQR-v0", learning_starts=20_000, num_envs=20, buffer_size=20_000, batch_size=256)
    config = replace(config, hidden_sizes=(32,))
    _, state = trained_model(config, 3000)
    steps = svg.unpack(state.buffer.rows, 1)
    _, std = svg.prediction(state.params.model, steps.obs, steps.action)
    np.testing.assert_allclose(std[:, :2].mean(axis=0), 0.1, rtol=0.1)
    noise = svg.infer(state.params.model, steps)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.1)
    np.testing.assert_allclose(noise.std(axis=0), 1, rtol=0.1)


def test_model_loss_is_the_gaussian_likelihood():
    params, *_ = setting(LEARNED)
    batch = svg.unpack(svg.init(LEARNED, random.key(3)).buffer.rows, 1)
    mean, std = svg.prediction(params.model, batch.obs, batch.action)
    target = np.concatenate([batch.next_obs, batch.reward[:, None]], axis=1)
    density = -0.5 * ((target - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    constant = np.log(params.model.target_std).sum() + 0.5 * 4 * np.log(2 * np.pi)
    loss = svg.model_loss(params.model.network, params.model, batch)
    np.testing.assert_allclose(loss, -density.sum(axis=1).mean() - constant, rtol=1e-4, atol=1e-4)


def test_inferred_noise_repeats_what_was_seen():
    state = quick_jit(svg.init)(LEARNED, random.key(0))
    steps = svg.unpack(state.buffer.rows[:64], 1)
    noise = svg.infer(state.params.model, steps)
    model = jax.vmap(svg.learned_model, in_axes=(None, None, 0, 0, 0))
    next_obs, _, terminated = model(LEARNED, state.params.model, steps.obs, steps.action, noise)
    np.testing.assert_allclose(next_obs, steps.next_obs, rtol=1e-4, atol=1e-4)
    assert (np.asarray(terminated) == 0).all()


@pytest.mark.parametrize("added", [10, 18, 25])
def test_stretches_are_consecutive_steps_of_one_environment(added):
    """Also where the ring has wrapped around; each stretch that there is comes up."""
    config = replace(LEARNED, num_rollouts=500, horizon=5)
    buffer = svg.buffer_init(72, 4)
    for t in range(added):
        columns = jnp.full((4, 1), float(t)), jnp.arange(4.0)[:, None], jnp.zeros(4), jnp.zeros((4, 1)), jnp.zeros(4)
        buffer = svg.buffer_add(
            buffer._replace(rows=jnp.zeros((72, 5))) if t == 0 else buffer, svg.Transition(*columns)
        )
    steps = svg.buffer_stretches(config, buffer, random.key(0), 1)
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
    env, env_params, low, _ = svg.make_env(config)
    for i in range(5):
        obs, env_state = env.reset(random.key(i), env_params)
        action = random.uniform(random.key(i), low.shape, minval=-1, maxval=1)
        reward = env.step(random.key(i), env_state, svg.scale_action(config, action), env_params)[2]
        np.testing.assert_allclose(svg.true_reward(config, obs.ravel(), action), reward, rtol=1e-4, atol=1e-5)


# What a run is


@pytest.mark.parametrize("config", [TRUE, LEARNED], ids=["true", "learned"])
def test_train_equals_init_and_epochs_alone_and_among_others(config):
    """Bitwise."""
    init, epoch = exact_jit(svg.init), exact_jit(svg.epoch, donate_argnums=1)
    state, metrics = init(config, random.key(1)), []
    for _ in range(2):
        state, epoch_metrics = epoch(config, state)
        metrics.append(epoch_metrics)
    run = state, jax.tree.map(lambda *x: jnp.stack(x), *metrics)
    assert run[1].iteration.tolist() == [2, 4]
    assert run[1].step.tolist() == ([40, 80] if config is TRUE else [72, 80])
    keys = jax.vmap(random.key)(jnp.arange(2))
    runs = exact_jit(lambda keys: jax.lax.map(lambda key: svg.train(config, key), keys))(keys)
    assert_same(run, jax.tree.map(lambda x: x[1], runs))


def test_vmap_over_configs_equals_separate_runs():
    configs = [replace(LEARNED, learning_rate=rate, gamma=gamma) for rate, gamma in ((1e-3, 0.9), (1e-2, 0.99))]
    stacked = jax.tree.map(lambda *x: jnp.array(x), *configs)
    train = quick_jit(svg.train)
    together = quick_jit(jax.vmap(svg.train, in_axes=(0, None)))(stacked, random.key(0))
    alone = [train(config, random.key(0)) for config in configs]
    for i in range(2):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together[0].params), alone[i][0].params, rtol=1e-3, atol=1e-4)
    assert relative(alone[0][0].params.actor, alone[1][0].params.actor) > 1e-2


def test_greedy_actions_stay_in_the_box_and_in_its_shape():
    config = replace(TRUE, env="Table-test")
    params = svg.Params(svg.mlp_init(random.key(2), (6, 32, 4)), ())
    obs = random.randint(random.key(1), (500, 2, 3), -1000, 1000)
    action = np.asarray(jax.vmap(svg.act, in_axes=(None, None, 0))(config, params, obs))
    low, high = np.array([[-1], [0.5]]), np.array([[3], [2.5]])
    assert action.shape == (500, 2, 1)
    np.testing.assert_allclose(action.min(0), low, atol=1e-3)
    np.testing.assert_allclose(action.max(0), high, atol=1e-3)


def test_evaluation_is_whole_greedy_episodes():
    config = replace(TRUE, env="Walk-test", num_eval_episodes=8)
    params = svg.Params(svg.mlp_init(random.key(2), (1, 8, 2)), ())
    returns = jax.jit(svg.evaluate)(config, params, random.key(1))
    env, env_params = gymnax.make("Walk-test")
    for key, ours in zip(random.split(random.key(1), 8), returns, strict=True):
        key, key_reset = random.split(key)
        obs, env_state = env.reset(key_reset, env_params)
        total, done = 0.0, False
        while not done:
            key, key_step = random.split(key)
            step = env.step(key_step, env_state, svg.act(config, params, obs), env_params)
            obs, env_state, total, done = step[0], step[1], total + float(step[2]), bool(step[3] | step[4])
        np.testing.assert_allclose(ours, total, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("env", {"env": "CartPole-v1"}),
        ("env", {"env": "Table-test"}),  # a model of it has to be learned
        ("noise", {"noise": "inferred"}),
        ("num_iterations", {"num_iterations": 5}),
        ("learning_starts", {"model": "learned", "learning_starts": 1001}),
        ("buffer_size", {"model": "learned", "buffer_size": 1001}),
        ("batch_size", {"model": "learned", "batch_size": 1001}),
        ("horizon", {"model": "learned", "noise": "inferred", "horizon": 51}),
        ("reward", {"model": "learned", "reward": "true", "env": "PointRobot-misc"}),
    ],
)
def test_a_mistake_names_its_field(field, changes):
    config = replace(TRUE, **{"num_envs": 20, "learning_starts": 1000, **changes})
    with pytest.raises(ValueError, match=f"^{field}={getattr(config, field)}: "):
        jax.eval_shape(svg.init, config, random.key(0))


# Learning


def pendulum_return(module, **changes):
    config = module.Config(**{"num_rollouts": 32, "num_iterations": 300, "iterations_per_epoch": 300, **changes})
    return float(jax.jit(module.train)(config, random.key(0))[1].eval_returns[-1].mean())


def test_swings_the_pendulum_up():
    assert pendulum_return(svg) > -200


def test_swings_the_pendulum_up_with_a_learned_model():
    assert pendulum_return(svg, model="learned", gamma=0.97, learning_starts=3000) > -300


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("-scale * x", "scale * x"),
        ("env.with_transition_gradients()", "env"),  # no derivative through the dynamics
    ],
)
def test_a_broken_algorithm_does_not(tmp_path, old, new):
    assert pendulum_return(load_broken(svg, tmp_path, old, new)) < -600

"""Both files of Soft Actor-Critic against hand-worked cases, quadrature, SciPy and the Boltzmann policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from cases import (
    assert_close,
    fast_jit,
    finite_differences,
    load_broken,
    np_adam,
    np_critics,
    np_mlp,
    random_adam,
    random_batch,
    random_layers,
)
from jax import lax, random

from amortax.algorithms import sac, sac_value

CONFIG = sac.Config()
both = pytest.mark.parametrize("module", [sac_value, sac], ids=["sac_value", "sac"])

# The density of squashed actions, the same code in both files


def constant_policy(mean, std):
    """Parameters of a policy that is the same everywhere, for observations in R^1."""
    mean, std = np.atleast_1d(mean), np.atleast_1d(std)
    return [(np.zeros((1, 2 * len(mean))), np.concatenate([mean, np.log(std)]))]


@pytest.mark.quick
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.2), (-2.0, 1.5), (3.0, 0.5), (0.1, 2.5)])
def test_density_integrates_to_one(mean, std):
    """Over actions in (-1, 1), by the trapezoidal rule on a grid that is fine where the density is high."""
    unsquashed = np.linspace(mean - 12 * std, mean + 12 * std, 200_001)
    noise = (unsquashed - mean) / std
    with jax.enable_x64(True):
        obs = np.zeros((len(noise), 1))
        action, log_prob = map(np.asarray, sac.sample_action(CONFIG, constant_policy(mean, std), obs, noise[:, None]))
    inside = np.abs(action[:, 0]) < 1  # beyond, float64 has no room left between the action and the bound
    np.testing.assert_allclose(np.trapezoid(np.exp(log_prob[inside]), action[inside, 0]), 1, atol=1e-6)


@pytest.mark.quick
def test_density_equals_the_change_of_variables():
    """Against SciPy's normal density and the logarithm of 1 - a^2, in two dimensions."""
    mean, std = np.array([0.3, -0.8]), np.array([0.7, 0.4])
    noise = np.random.default_rng(0).normal(size=(1000, 2))
    with jax.enable_x64(True):
        action, log_prob = map(
            np.asarray, sac.sample_action(CONFIG, constant_policy(mean, std), np.zeros((1000, 1)), noise)
        )
    np.testing.assert_allclose(action, np.tanh(mean + std * noise), rtol=1e-12)
    normal = scipy.stats.norm(mean, std).logpdf(np.arctanh(action)).sum(axis=1)
    np.testing.assert_allclose(log_prob, normal - np.log1p(-(action**2)).sum(axis=1), rtol=1e-8)


@pytest.mark.quick
def test_density_is_exact_where_the_action_meets_its_bound():
    """In float32, where 1 - a^2 is 0: log(1 - tanh(u)^2) = log 4 - 2 |u| - 2 log(1 + exp(-2 |u|)); its gradient too."""
    noise = jnp.array([-60.0, -20, -9, -1, 0, 1, 9, 20, 60])[:, None]
    policy = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), constant_policy(0.5, 1.0))
    action, log_prob = sac.sample_action(CONFIG, policy, jnp.zeros((9, 1)), noise)
    assert np.abs(action).max() == 1
    u = 0.5 + np.asarray(noise[:, 0], np.float64)
    log_det = np.log(4) - 2 * np.abs(u) - 2 * np.log1p(np.exp(-2 * np.abs(u)))
    np.testing.assert_allclose(log_prob, scipy.stats.norm(0.5, 1).logpdf(u) - log_det, rtol=1e-5)
    # with the noise given, the normal part does not move with the mean; the rest by 2 tanh(u)
    gradient = jax.vmap(
        lambda e: jax.grad(lambda p: sac.sample_action(CONFIG, p, jnp.zeros(1), e)[1])(policy)[0][1][0]
    )(noise)
    np.testing.assert_allclose(gradient, 2 * np.tanh(u), rtol=1e-5, atol=1e-6)


@pytest.mark.quick
def test_greedy_action_is_the_squashed_mean():
    policy = constant_policy([0.3, -2.0], [1.0, 5.0])
    np.testing.assert_allclose(
        sac.actor(CONFIG, policy, np.zeros((4, 1))), np.tile(np.tanh([0.3, -2.0]), (4, 1)), rtol=1e-6
    )


@pytest.mark.quick
def test_deviation_is_bounded():
    log_std = np.array([-50.0, -10, 0, 2, 50])
    policy = [(np.zeros((1, 10)), np.concatenate([np.zeros(5), log_std]))]
    np.testing.assert_allclose(
        sac.policy(CONFIG, policy, np.zeros(1)).stddev(), np.exp(np.clip(log_std, -10, 2)), rtol=1e-6
    )


# The updates against a case worked in NumPy, float64


def np_sample(layers, obs, noise):
    mean, log_std = np.split(np_mlp(layers, obs), 2, axis=1)
    std = np.exp(np.minimum(np.maximum(log_std, -10), 2))
    unsquashed = mean + std * noise
    log_det = np.log(4) - 2 * np.abs(unsquashed) - 2 * np.log1p(np.exp(-2 * np.abs(unsquashed)))
    log_prob = -0.5 * noise**2 - np.log(std) - 0.5 * np.log(2 * np.pi) - log_det
    return np.tanh(unsquashed), log_prob.sum(axis=1)


def np_soft_value(actor, critics, alpha, obs, noise):
    action, log_prob = np_sample(actor, obs, noise)
    return np.minimum(*np_critics(critics, obs, action)) - alpha * log_prob


def np_critic_loss(critics, config, batch, next_value):
    target = batch.reward + np.where(batch.terminated == 1, 0, config.gamma * next_value)
    q1, q2 = np_critics(critics, batch.obs, batch.action)
    return np.mean((q1 - target) ** 2) + np.mean((q2 - target) ** 2)


def np_value_loss(layers, target, batch):
    return np.mean((np_mlp(layers, batch.obs)[:, 0] - target) ** 2)


def np_step(config, adam, params, loss):
    """One step of Adam down the gradient of `loss`: `(params, adam, loss)`."""
    return *np_adam(config, adam, params, finite_differences(loss, params)), loss(params)


def hand_case(module):
    """Config, parameters, Adam's state, batch and noise in float64; observations in R^3, actions in R^2."""
    rng = np.random.default_rng(0)
    has_value = "value" in module.Params._fields
    own = {"alpha": 0.3} if has_value else {"target_entropy": -0.7}
    config = module.Config(learning_rate=0.01, gamma=0.9, tau=0.3, **own)
    actor = random_layers(rng, (3, 5), (5, 4), (4, 4))
    actor[-1] = actor[-1][0] / 2, actor[-1][1] + [0, 0, 1.8, 1.8]  # log deviations on both sides of their upper bound
    critics = [random_layers(rng, (2, 5, 5), (2, 5, 4), (2, 4, 1)) for _ in range(2)]
    values = [random_layers(rng, (3, 5), (5, 4), (4, 1)) for _ in range(2)]
    rest = (critics[0], *values) if has_value else (*critics, np.float64(-1.2))
    params = module.Params(actor, *rest)
    learned = module.OptState._fields
    opt_state = module.OptState(*(random_adam(rng, config, getattr(params, name)) for name in learned))
    batch = random_batch(rng, module.Transition)
    return config, params, opt_state, batch, rng.normal(size=(2, 8, 2))


def np_update(config, params, opt_state, batch, noise):
    """All updates of modern SAC in their order: `(params, Adam's states, losses)`."""
    adams = [getattr(opt_state, name)[0] for name in ("critic", "actor", "log_alpha")]
    alpha = np.exp(params.log_alpha)
    next_value = np_soft_value(params.actor, params.target_critic, alpha, batch.next_obs, noise[0])
    critic, adams[0], critic_loss = np_step(
        config, adams[0], params.critic, lambda x: np_critic_loss(x, config, batch, next_value)
    )
    entropy = -np_sample(params.actor, batch.obs, noise[1])[1].mean()
    actor, adams[1], actor_loss = np_step(
        config, adams[1], params.actor, lambda x: -np_soft_value(x, critic, alpha, batch.obs, noise[1]).mean()
    )
    # d/d log alpha of alpha (entropy - target), where the target is for each of the two dimensions
    log_alpha, adams[2] = np_adam(config, adams[2], params.log_alpha, alpha * (entropy + 2 * 0.7))
    target_critic = jax.tree.map(lambda x, y: 0.3 * x + 0.7 * y, critic, params.target_critic)
    q_value = np.mean(np_critics(params.critic, batch.obs, batch.action))
    losses = critic_loss, q_value, actor_loss, entropy, np.exp(log_alpha)
    return sac.Params(actor, critic, target_critic, log_alpha), adams, losses


def np_update_value(config, params, opt_state, batch, noise):
    """All updates of SAC with a value network in their order: `(params, Adam's states, losses)`."""
    adams = [getattr(opt_state, name)[0] for name in ("critic", "actor", "value")]
    target = np_soft_value(params.actor, params.critic, 0.3, batch.obs, noise[0])
    value, adams[2], value_loss = np_step(config, adams[2], params.value, lambda x: np_value_loss(x, target, batch))
    next_value = np_mlp(params.target_value, batch.next_obs)[:, 0]
    critic, adams[0], critic_loss = np_step(
        config, adams[0], params.critic, lambda x: np_critic_loss(x, config, batch, next_value)
    )
    entropy = -np_sample(params.actor, batch.obs, noise[1])[1].mean()
    actor, adams[1], actor_loss = np_step(
        config, adams[1], params.actor, lambda x: -np_soft_value(x, critic, 0.3, batch.obs, noise[1]).mean()
    )
    target_value = jax.tree.map(lambda x, y: 0.3 * x + 0.7 * y, value, params.target_value)
    q_value = np.mean(np_critics(params.critic, batch.obs, batch.action))
    losses = critic_loss, q_value, actor_loss, entropy, value_loss
    return sac_value.Params(actor, critic, value, target_value), adams, losses


def check_update(module):
    config, params, opt_state, batch, noise = hand_case(module)
    with jax.enable_x64(True):
        got, got_opt_state, losses = jax.jit(module.update)(config, params, opt_state, batch, noise)
    has_value = "value" in params._fields
    worked = np_update_value if has_value else np_update
    expected, adams, expected_losses = worked(config, params, opt_state, batch, noise)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    assert_close(tuple(got), tuple(expected), rtol=0, atol=1e-8)
    third = "value" if has_value else "log_alpha"
    got_adams = [getattr(got_opt_state, name)[0] for name in ("critic", "actor", third)]
    assert_close(got_adams, adams, rtol=0, atol=1e-6)


@pytest.mark.quick
@both
def test_the_hand_worked_case_leaves_nothing_out(module):
    """Either critic is the smaller one, log deviations lie on both sides of a bound, some transitions terminate."""
    _, params, _, batch, noise = hand_case(module)
    q1, q2 = np_critics(params.critic, batch.obs, np_sample(params.actor, batch.obs, noise[0])[0])
    log_std = np_mlp(params.actor, batch.obs)[:, 2:]
    for mixed in (q1 < q2, log_std > 2, batch.terminated == 1):
        assert 0 < np.mean(mixed) < 1


@pytest.mark.quick
@both
def test_update_equals_the_hand_worked_case(module):
    check_update(module)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (sac, "jnp.where(batch.terminated, 0, next_value)", "next_value"),
        (sac, "next_q - jnp.exp", "next_q + jnp.exp"),
        (sac, "* log_prob - q).mean()", "* log_prob + q).mean()"),
        (sac, "params.target_critic, batch.next_obs", "params.critic, batch.next_obs"),
        (sac, "config.target_entropy * batch.action.shape[-1]", "config.target_entropy"),
        (sac, "(entropy - target", "(-entropy - target"),
        (sac_value, "jnp.where(batch.terminated, 0, next_value)", "next_value"),
        (sac_value, "- config.alpha * log_prob", "+ config.alpha * log_prob"),
        (sac_value, "params.target_value, batch.next_obs)", "params.value, batch.next_obs)"),
        (sac_value, "params.target_value, batch.next_obs)", "params.target_value, batch.obs)"),
        (sac_value, "* log_prob - q).mean()", "* log_prob + q).mean()"),
    ],
)
def test_the_hand_worked_case_catches(tmp_path, module, old, new):
    broken = load_broken(module, tmp_path, old, new)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_update(broken)


# The temperature


def test_temperature_drives_the_entropy_to_its_target():
    """Where every episode is one step that earns -a^2, from above and below, for three targets.

    The Boltzmann policy of -a^2 is N(0, alpha / 2), whose entropy is log(pi e alpha) / 2, but for the squashing.
    """
    target, initial = np.array([-1.0, -1.0, -0.5], np.float32), np.array([1.0, 1e-3, 0.3], np.float32)
    config = sac.Config(
        env="Bandit-test",
        total_steps=7600,
        learning_starts=400,
        steps_per_epoch=1200,
        num_eval_episodes=1,
        hidden_sizes=(16, 16),
        buffer_size=8000,
        batch_size=64,
        learning_rate=1e-2,
    )

    def run(entropy_and_alpha):
        target_entropy, initial_alpha = entropy_and_alpha
        own = dataclasses.replace(config, target_entropy=target_entropy, initial_alpha=initial_alpha)
        state, metrics = sac.train(own, random.key(0))
        policy = sac.policy(own, state.params.actor, jnp.zeros(1))
        return policy.mean(), policy.stddev(), metrics.entropy[-1], metrics.alpha[-1]

    mean, std, entropy, learned = fast_jit(lambda x: lax.map(run, x))((target, initial))
    np.testing.assert_allclose(entropy, target, atol=0.03)
    alpha = np.exp(2 * target) / (np.pi * np.e)
    np.testing.assert_allclose(learned, alpha, rtol=0.08)
    np.testing.assert_allclose(std[:, 0], np.sqrt(alpha / 2), rtol=0.1)
    np.testing.assert_allclose(mean, 0, atol=0.05)

"""What every algorithm's file promises: its interface, purity, bootstrapping, evaluation, and to need no other file."""

import ast
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import QUICK_FLAGS, SMALL, assert_close, assert_same, exact_jit, leaves, load_broken, quick_jit, replace
from jax import lax, random

from algorithms import (
    ddpg,
    fqi,
    fqi_amortized,
    gradient_estimators,
    nfqca,
    reinforce,
    sac,
    sac_value,
    soft_fqi,
    svg,
    td3,
)
from common import lqr

ALGORITHMS = {"ddpg": ddpg, "td3": td3, "sac_value": sac_value, "sac": sac}
CONFIGS = {
    "ddpg": ddpg.Config(**SMALL, target_period=8),
    "td3": td3.Config(**SMALL),
    "sac_value": sac_value.Config(**SMALL),
    "sac": sac.Config(**SMALL),
}
FITTED = {"fqi": fqi, "fqi_amortized": fqi_amortized, "nfqca": nfqca, "soft_fqi": soft_fqi}
GRADIENT = {"reinforce": reinforce, "svg": svg}
FILES = ALGORITHMS | FITTED | GRADIENT
INIT = {name: exact_jit(module.init) for name, module in ALGORITHMS.items()}
EPOCH = {name: exact_jit(module.epoch, donate_argnums=1) for name, module in ALGORITHMS.items()}
TRAIN = {name: exact_jit(module.train) for name, module in ALGORITHMS.items()}
every_file = pytest.mark.parametrize("name", FILES)
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def source(name):
    return Path((FILES | {"gradient_estimators": gradient_estimators})[name].__file__)


# Bootstrapping


def clock_values(module, env, times):
    """Trained value at the given times, where no action matters and entropy is worth next to nothing."""
    own = {
        "target_period": 20,
        "tau": 1.0 if hasattr(module.Config, "target_period") else 0.05,
        "alpha": 1e-4,
        "initial_alpha": 1e-4,
    }
    config = module.Config(
        env=env,
        total_steps=4400,
        learning_starts=400,
        steps_per_epoch=4000,
        num_envs=4,
        num_eval_episodes=1,
        buffer_size=4400,
        batch_size=256,
        hidden_sizes=(32, 32),
        learning_rate=2e-3,
        gamma=0.9,
        **{field: value for field, value in own.items() if hasattr(module.Config, field)},
    )
    state, _ = quick_jit(module.train)(config, random.key(0))
    return module.greedy_value(config, state.params, jnp.asarray(times)[:, None])


@every_algorithm
def test_value_does_not_stop_at_a_time_limit(name):
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10 at any time before the limit of 50 steps."""
    values = clock_values(ALGORITHMS[name], "ClockTruncated-test", np.arange(50) / 50)
    np.testing.assert_allclose(values, 10, rtol=0.03)  # 8.5 if the limit counted as the end


def check_value_stops_at_the_end(module):
    times = np.arange(10)
    values = clock_values(module, "ClockTerminated-test", times / 10)
    expected = (1 - 0.9 ** (10 - times)) / (1 - 0.9)  # from 6.5 at the start to 1 before the last step
    np.testing.assert_allclose(values, expected, rtol=0.05)


@every_algorithm
def test_value_stops_where_the_episode_ends_by_itself(name):
    check_value_stops_at_the_end(ALGORITHMS[name])


def test_value_would_not_stop_without_the_mask(tmp_path):
    broken = load_broken(td3, tmp_path, "(1 - batch.terminated) * ", "")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_value_stops_at_the_end(broken)


# Environments


@pytest.mark.parametrize(
    ("env", "horizon", "terminated"), [("ClockTruncated-test", 50, 0), ("ClockTerminated-test", 10, 1)]
)
def test_transition_keeps_the_last_observation_of_an_episode(env, horizon, terminated):
    """At the end the next observation is the final one, while the environment itself starts anew."""
    config = replace(CONFIGS["td3"], env=env)
    env_state, obs = td3.env_init(config, random.key(0))
    env_state = env_state.replace(time=jnp.array([0, 1, horizon - 2, horizon - 1]))
    _, next_obs, transition, ended = td3.env_step(config, env_state, obs, jnp.zeros((4, 1)), random.key(1))
    time = np.array([1, 2, horizon - 1, horizon])
    np.testing.assert_allclose(transition.next_obs[:, 0] * horizon, time, rtol=1e-6)
    np.testing.assert_allclose(next_obs[:, 0] * horizon, [1, 2, horizon - 1, 0], rtol=1e-6)
    np.testing.assert_array_equal(transition.terminated, [0, 0, 0, terminated])
    np.testing.assert_array_equal(ended, [0, 0, 0, 1])
    np.testing.assert_array_equal(transition.obs, obs)


def test_actions_map_affinely_to_an_asymmetric_box():
    config = replace(CONFIGS["td3"], env="Table-test")
    for action, expected in (
        ([-1, -1], [[-1], [0.5]]),
        ([0, 0], [[1], [1.5]]),
        ([1, 1], [[3], [2.5]]),
        ([0.5, -0.5], [[2], [1]]),
    ):
        np.testing.assert_allclose(td3.scale_action(config, jnp.array(action)), expected, rtol=1e-6)


def test_env_step_takes_scaled_actions_and_gives_unscaled_ones():
    config = replace(CONFIGS["td3"], env="Table-test", num_envs=3)
    env_state, obs = td3.env_init(config, random.key(0))
    np.testing.assert_array_equal(obs, np.tile(np.arange(6.0), (3, 1)))
    action = jnp.array([[-1.0, -1], [0, 0], [1, 1]])
    _, next_obs, transition, _ = td3.env_step(config, env_state, obs, action, random.key(1))
    np.testing.assert_allclose(transition.reward, [-0.5, 2.5, 5.5], rtol=1e-6)
    np.testing.assert_array_equal(transition.action, action)
    np.testing.assert_array_equal(next_obs, np.tile(np.arange(1.0, 7), (3, 1)))
    assert obs.dtype == next_obs.dtype == transition.next_obs.dtype == jnp.float32


@every_algorithm
def test_act_stays_in_the_box_and_in_its_shape(name):
    module, config = ALGORITHMS[name], replace(CONFIGS[name], env="Table-test")
    params = jax.eval_shape(module.init, config, random.key(0)).params
    outputs = params.actor[-1][1].shape[0]  # twice as many as actions where the policy is stochastic
    params = params._replace(actor=module.mlp_init(random.key(2), (6, 32, 32, outputs)))
    obs = random.randint(random.key(1), (500, 2, 3), -1000, 1000)
    action = np.asarray(jax.vmap(module.act, in_axes=(None, None, 0))(config, params, obs))
    low, high = np.array([[-1], [0.5]]), np.array([[3], [2.5]])
    assert action.shape == (500, 2, 1)
    assert (low <= action).all()
    assert (action <= high).all()
    np.testing.assert_allclose(action.min(0), low, atol=1e-3)
    np.testing.assert_allclose(action.max(0), high, atol=1e-3)


def check_run(config, state, metrics):
    assert metrics.eval_returns.shape == (2, config.num_eval_episodes)
    assert metrics.critic_loss.shape == metrics.actor_loss.shape == metrics.step.shape == (2,)
    assert metrics.step.tolist() == [80, 96]
    assert state.step == 96
    for x in leaves((metrics, state)):
        assert np.isfinite(x).all()
    assert (state.buffer.position, state.buffer.size) == (96 % 72, 72)


@every_algorithm
def test_trains_on_pendulum(name):
    check_run(CONFIGS[name], *TRAIN[name](CONFIGS[name], random.key(0)))


@pytest.mark.parametrize(("env", "name"), [("Table-test", "td3"), *(("Swimmer-misc", name) for name in ALGORITHMS)])
def test_trains_on(env, name):
    """Two actions in every file; `test_reproduce.py` has the other environments."""
    config = replace(CONFIGS[name], env=env, num_eval_episodes=1)
    check_run(config, *quick_jit(ALGORITHMS[name].train)(config, random.key(0)))


# What a run is: a pure function of its key and configuration


@every_algorithm
def test_train_equals_init_and_epochs(name):
    """Bitwise, with `init` and `epoch` compiled apart and the state donated."""
    config = CONFIGS[name]
    state, metrics = INIT[name](config, random.key(3)), []
    for _ in range(2):
        state, epoch_metrics = EPOCH[name](config, state)
        metrics.append(epoch_metrics)
    assert_same((state, jax.tree.map(lambda *x: jnp.stack(x), *metrics)), TRAIN[name](config, random.key(3)))


@pytest.mark.parametrize("name", ["td3", "sac"])
def test_one_seed_of_many_equals_that_seed_alone(name):
    """Bitwise, where the seeds run one after the other in one program."""
    keys, train = jax.vmap(random.key)(jnp.arange(3)), ALGORITHMS[name].train
    runs = exact_jit(lambda config, keys: lax.map(lambda key: train(config, key), keys))(CONFIGS[name], keys)
    for i in range(3):
        assert_same(jax.tree.map(lambda x, i=i: x[i], runs), TRAIN[name](CONFIGS[name], random.key(i)))


@every_algorithm
def test_vmap_over_configs_and_seeds_equals_separate_runs(name):
    """Up to float reassociation, which the few updates of these runs do not amplify."""
    values = ((3e-4, 0.99), (3e-3, 0.0), (3e-3, 0.99))
    configs = [replace(CONFIGS[name], learning_rate=rate, gamma=gamma) for rate, gamma in values]
    stacked = jax.tree.map(lambda *x: jnp.array(x), *configs)
    assert stacked.learning_rate.shape == stacked.gamma.shape == (3,)
    over_seeds = jax.vmap(ALGORITHMS[name].train, in_axes=(None, 0))
    together = quick_jit(jax.vmap(over_seeds, in_axes=(0, None)))(stacked, jax.vmap(random.key)(jnp.arange(2)))
    alone = [[TRAIN[name](config, random.key(seed)) for seed in range(2)] for config in configs]
    for i in range(3):
        for seed in range(2):
            run = jax.tree.map(lambda x, i=i, seed=seed: x[i, seed], together)
            assert_close(run, alone[i][seed], rtol=1e-4, atol=1e-5)
    # the runs are not one: their critics differ by far more than the tolerance
    critics = [np.concatenate([x.ravel() for x in leaves(state.params.critic)]) for runs in alone for state, _ in runs]
    for i in range(6):
        for j in range(i):
            assert np.abs(critics[i] - critics[j]).max() > 1e-3


# Learning


def cost_ratio(module):
    """Cost over that of the best gain after 6,000 steps of linear-quadratic regulation in one dimension."""
    own = {"ou_theta": 1.0, "ou_dt": 1.0, "ou_sigma": 0.2, "exploration_noise": 0.2, "alpha": 0.1}
    own = {field: value for field, value in own.items() if hasattr(module.Config, field)}
    config = module.Config(
        env="LQR1-v0",
        total_steps=7000,
        steps_per_epoch=6000,
        num_eval_episodes=1,
        gamma=0.9,
        hidden_sizes=(256,),
        **own,
    )
    state, _ = jax.jit(module.train)(config, random.key(0))
    params = lqr.system(1)
    K = jnp.asarray(lqr.solve(params, 0.9).K)

    def cost(policy):
        return jax.jit(lambda key: lqr.simulate(params, policy, 0.9, key).mean())(random.key(1))

    return cost(lambda s: module.act(config, state.params, s)) / cost(lambda s: -K @ s)


@every_algorithm
def test_comes_close_to_the_best_linear_quadratic_cost(name):
    assert 1 < cost_ratio(ALGORITHMS[name]) < 1.1


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("ddpg", "return -critic(", "return critic("),
        ("sac", "next_q - jnp.exp", "-next_q - jnp.exp"),
        ("sac_value", "- config.alpha * log_prob", "- 100 * config.alpha * log_prob"),
    ],
)
def test_a_broken_algorithm_does_not_come_close(tmp_path, name, old, new):
    assert not cost_ratio(load_broken(ALGORITHMS[name], tmp_path, old, new)) < 1.1


# Evaluation


@every_algorithm
def test_evaluation_is_whole_greedy_episodes(name):
    """Equal to a plain loop over `env.step` with the same keys; episodes end at different times, in both ways."""
    module, config = ALGORITHMS[name], replace(CONFIGS[name], env="Walk-test", num_eval_episodes=8, gamma=0.9)
    params = jax.jit(module.init)(config, random.key(0)).params
    returns, value_bias = jax.jit(module.evaluate)(config, params, random.key(1))
    env, env_params = gymnax.make("Walk-test")
    act, expected, bias, ends = jax.jit(module.act), [], [], []
    for key in random.split(random.key(1), 8):
        key, key_reset = random.split(key)
        obs, env_state = env.reset(key_reset, env_params)
        first_obs, rewards, done = obs, [], False
        while not done:
            key, key_step = random.split(key)
            action = act(config, params, obs)
            obs, env_state, reward, terminated, truncated, info = env.step(key_step, env_state, action, env_params)
            rewards.append(float(reward))
            done = bool(terminated | truncated)
        expected.append(sum(rewards))
        ends.append((len(rewards), bool(terminated)))
        value = module.greedy_value(config, params, first_obs)
        after = 0 if terminated else module.greedy_value(config, params, info["final_observation"])
        bias.append(value - sum(0.9**t * reward for t, reward in enumerate(rewards)) - 0.9 ** len(rewards) * after)
    np.testing.assert_allclose(returns, expected, rtol=1e-5)
    np.testing.assert_allclose(value_bias, np.mean(bias), rtol=1e-4)
    assert {end for _, end in ends} == {True, False}
    assert len({length for length, _ in ends}) >= 3


@every_algorithm
@pytest.mark.parametrize(
    ("env", "horizon", "terminates"), [("ClockTruncated-test", 50, False), ("ClockTerminated-test", 10, True)]
)
def test_value_bias_of_a_constant_critic(name, env, horizon, terminates):
    """A critic that says 7 everywhere, where each step earns 1: its error in closed form."""
    module, config = ALGORITHMS[name], replace(CONFIGS[name], env=env, gamma=0.9)
    params = jax.jit(module.init)(config, random.key(0)).params
    *hidden, (w, b) = params.critic
    params = params._replace(critic=[*hidden, (jnp.zeros_like(w), jnp.full_like(b, 7))])
    _, value_bias = jax.jit(module.evaluate)(config, params, random.key(1))
    earned = (1 - 0.9**horizon) / (1 - 0.9)
    np.testing.assert_allclose(value_bias, 7 - earned - (0 if terminates else 7 * 0.9**horizon), rtol=1e-5)


@every_algorithm
def test_evaluation_does_not_touch_training(name):
    """However many its episodes, the state that an epoch leaves is bitwise the same."""
    config, other = CONFIGS[name], replace(CONFIGS[name], num_eval_episodes=3)
    state, metrics = EPOCH[name](config, INIT[name](config, random.key(4)))
    other_state, other_metrics = EPOCH[name](other, INIT[name](other, random.key(4)))
    assert metrics.eval_returns.shape != other_metrics.eval_returns.shape
    assert_same(state, other_state)


# Files that need no other, and say the same where they mean the same


@every_file
def test_the_file_alone_trains_in_an_empty_folder(name, tmp_path):
    shutil.copy(source(name), tmp_path)
    small = {"num_base_points": 200, "num_iterations": 2, "iterations_per_epoch": 1, "fit_steps": 2}
    small |= {"steps_per_epoch": 1024, "total_steps": 2048, "num_rollouts": 2, "num_eval_episodes": 2}
    fields = {field: value for field, value in small.items() if hasattr(FILES[name].Config, field)}
    config = CONFIGS[name] if name in CONFIGS else FILES[name].Config(**fields)
    program = f"""
import sys
sys.modules["algorithms"] = sys.modules["common"] = None  # an import of either fails, installed or not
sys.path.insert(0, ".")
import jax, {name}
config = {name}.{config}
state, metrics = jax.jit({name}.train)(config, jax.random.key(0))
assert jax.numpy.isfinite(metrics.eval_returns).all()
print({name}.__file__, metrics.step.tolist())
"""
    command = [sys.executable, "-I", "-c", program]
    env = os.environ | {"XLA_FLAGS": QUICK_FLAGS}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    steps = {"reinforce": [1024, 2048], "svg": [100, 200]}.get(name, [80, 96] if name in CONFIGS else [200, 200])
    assert done.stdout.split(maxsplit=1) == [str(tmp_path / f"{name}.py"), f"{steps}\n"]


@pytest.mark.parametrize("name", [*FILES, "gradient_estimators"])
def test_imports_only_what_a_single_file_may(name):
    *body, last = ast.parse(source(name).read_text()).body
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    allowed = {*sys.stdlib_module_names, "jax", "optax", "gymnax", "distrax", "numpy"}
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        assert {name.split(".")[0] for name in names} <= allowed, ast.unparse(node)


EVERYWHERE = "Transition flatten env_init env_step mlp_init mlp"
BUFFER = "Buffer make_env scale_action act buffer_init buffer_add unpack buffer_sample"
BATCH = """rollout load_base_points quadratic_features critic_init critic critic_loss descend fit_quadratic fit_critic
    train"""
SHARED = [  # names of definitions, and the files in which they stand word for word
    (EVERYWHERE, tuple(FILES)),
    ("evaluate", tuple(name for name in FILES if name != "svg")),  # which knows no values
    (BUFFER, (*ALGORITHMS, "svg")),
    ("critic epoch train", tuple(ALGORITHMS)),
    ("epoch", (*ALGORITHMS, "reinforce")),
    (BATCH, tuple(FITTED)),
    ("make_env is_discrete scale_action project", ("fqi", "fqi_amortized", "soft_fqi", "reinforce")),
    ("collect_base_points", ("fqi", "fqi_amortized", "soft_fqi")),
    ("act", ("fqi_amortized", "reinforce")),
    ("random_actions best maximize_gradient maximize_lbfgs maximize_cem maximize_grid", ("fqi", "fqi_amortized")),
    ("maximize_exhaustive maximize", ("fqi", "fqi_amortized")),
    ("make_env scale_action actor", ("nfqca", "td3")),
    ("policy sample", ("soft_fqi", "sac_value")),
    ("OptState actor update_actor update_targets", ("ddpg", "td3")),
    ("State twin_critics greedy_value collect", ("td3", "sac_value", "sac")),
    ("policy sample actor steps_per_iteration check iteration", ("sac_value", "sac")),
    ("steps_per_iteration collect", ("sac", "svg")),
]


def definition(name, block):
    """The lines of a class or function at the top level of an algorithm's file."""
    text = source(name).read_text()
    (node,) = [node for node in ast.parse(text).body if getattr(node, "name", None) == block]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return text.splitlines()[first - 1 : node.end_lineno]


@pytest.mark.parametrize(("blocks", "names"), SHARED)
def test_shared_blocks_are_word_for_word_the_same(blocks, names):
    for block in blocks.split():
        expected = definition(names[0], block)
        for name in names[1:]:
            lines = definition(name, block)
            for line, other in itertools.zip_longest(expected, lines, fillvalue="(the end)"):
                assert line == other, f"{block} first differs between {names[0]}.py and {name}.py here"


@every_file
@pytest.mark.parametrize("reference", ["fqi_amortized", "td3"])
def test_the_file_keeps_the_order_of_the_others(name, reference):
    """What two files both define stands in the same order, so that a diff stays quiet."""
    ours, theirs = (
        [node.name for node in ast.parse(source(x).read_text()).body if hasattr(node, "name")]
        for x in (name, reference)
    )
    assert [x for x in ours if x in theirs] == [x for x in theirs if x in ours]


# Mistakes


@every_algorithm
@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("learning_starts", {"learning_starts": 66}),
        ("steps_per_epoch", {"steps_per_epoch": 6}),
        ("buffer_size", {"buffer_size": 70}),
        ("learning_starts", {"total_steps": 64}),
        ("total_steps", {"total_steps": 100}),
        ("batch_size", {"batch_size": 65}),
        ("batch_size", {"buffer_size": 32, "batch_size": 33}),
        ("env", {"env": "CartPole-v1"}),
    ],
)
def test_a_mistake_names_its_field(name, field, changes):
    config = replace(CONFIGS[name], **changes)
    with pytest.raises(ValueError, match=f"^{field}={getattr(config, field)}: "):
        jax.eval_shape(ALGORITHMS[name].init, config, random.key(0))


@pytest.mark.parametrize(("name", "changes"), [("td3", {"policy_delay": 3}), ("ddpg", {"target_period": 3})])
def test_a_period_that_does_not_fit_names_what_it_must_divide(name, changes):
    config = replace(CONFIGS[name], **changes)
    with pytest.raises(ValueError, match=r"^learning_starts=64: must be a multiple of 12, .* num_envs=4 and "):
        jax.eval_shape(ALGORITHMS[name].init, config, random.key(0))


@every_algorithm
def test_the_largest_batch_that_the_warm_up_fills_is_no_mistake(name):
    state = jax.eval_shape(ALGORITHMS[name].init, replace(CONFIGS[name], batch_size=64), random.key(0))
    assert state.buffer.rows.shape == (72, 9)

"""What every algorithm file promises: its interface, purity, environments, evaluation, and to need no other file."""

import ast
import dataclasses
import functools
import itertools
import math
import subprocess
import sys

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_blocks
from cases import (
    ACTOR_CRITIC,
    ALGORITHMS,
    CONFIGS,
    assert_close,
    assert_same,
    exact_jit,
    fast_jit,
    leaves,
    np_mlp,
    programs,
    random_layers,
    relu,
    replace,
    silu,
    slow,
)
from jax import lax, random
from jax.interpreters import partial_eval as pe

from amortax.algorithms import fqi, gradient_estimators, td3
from amortax.common import lqr

every_file = pytest.mark.parametrize("name", ALGORITHMS)
every_actor_critic = pytest.mark.parametrize("name", ACTOR_CRITIC)

# A run is a pure function of its key and configuration


@functools.cache
def run(name, key):
    """A run by `init` and `epoch`, compiled apart and the state donated: `(state, metrics)`, as from `train`."""
    config, compiled, metrics = CONFIGS[name], programs(name, exact_jit), []
    state = compiled.init(config, random.key(key))
    for _ in range(ALGORITHMS[name].num_epochs(config)):
        state, epoch_metrics = compiled.epoch(config, state)
        metrics.append(epoch_metrics)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *metrics)


@every_file
def test_a_run_is_finite_and_its_metrics_have_an_axis_of_epochs(name):
    """In episodes of three steps, where the last observation is NaN: no target, loss or parameter depends on it."""
    module, env = ALGORITHMS[name], "LastObsNaNDiscrete-test" if name == "dqn" else "LastObsNaN-test"
    three_steps = {"num_base_points": 120} if name == "nfqca" else {}  # in each of its two rounds, to reach the end
    config, env = replace(CONFIGS[name], env=env, **three_steps), module.make_env(env)
    env_state, _ = env.reset(random.key(0))
    last = env_state.replace(time=2), jnp.zeros(env.action_dim), random.key(0)
    _, _, _, next_obs, terminated, _ = env.step(*last)
    assert terminated
    assert np.isnan(next_obs).all()
    state, metrics = jax.jit(module.train)(config, random.key(0))
    stored = {"buffer", "base_points"} & {*state._fields}
    for x in leaves((metrics, state._replace(**dict.fromkeys(stored)))):
        assert np.isfinite(x).all()
    for field in stored:  # nothing is NaN but that observation, and not even it where it is replaced by zero
        rows = getattr(state, field)
        terminated = rows[:, -1] if field == "buffer" else rows.terminated
        unknown = terminated.sum() if name in (*ACTOR_CRITIC, "dqn") else 0
        assert terminated.sum() > 0
        assert sum((~np.isfinite(x)).sum() for x in leaves(rows)) == unknown
    assert module.num_epochs(config) == 2
    assert metrics.eval_returns.shape == (2, config.num_eval_episodes)
    for field, values in metrics._asdict().items():
        assert values.shape[0] == 2
        assert field == "eval_returns" or values.ndim == 1
    if name in ACTOR_CRITIC:
        assert metrics.step.tolist() == [80, 96]
        assert state.buffer.shape == (72, 5)


@pytest.mark.parametrize("name", ["td3", "fqi", *slow("svg_model")])
def test_train_equals_init_and_epochs(name):
    """Bitwise; `train` is the same code in all files, but for those of fitted Q-iteration."""
    assert_same(run(name, 3), programs(name, exact_jit).train(CONFIGS[name], random.key(3)))


def test_one_seed_of_many_equals_that_seed_alone():
    """Bitwise, where the seeds run one after the other in one program."""
    keys = jax.vmap(random.key)(jnp.arange(3))
    runs = exact_jit(lambda config, keys: lax.map(lambda key: td3.train(config, key), keys))(CONFIGS["td3"], keys)
    for i in range(3):
        assert_same(jax.tree.map(lambda x, i=i: x[i], runs), run("td3", i))


def test_vmap_over_configs_and_seeds_equals_separate_runs():
    """Up to float reassociation, which the few updates of these runs do not amplify."""
    values = ((3e-4, 0.99), (3e-3, 0.0), (3e-3, 0.99))
    configs = [replace(CONFIGS["td3"], learning_rate=rate, gamma=gamma) for rate, gamma in values]
    stacked = jax.tree.map(lambda *x: jnp.array(x), *configs)
    assert stacked.learning_rate.shape == stacked.gamma.shape == (3,)
    over_seeds = jax.vmap(td3.train, in_axes=(None, 0))
    together = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))(stacked, jax.vmap(random.key)(jnp.arange(2)))
    alone = [[programs("td3").train(config, random.key(seed)) for seed in range(2)] for config in configs]
    for i, seed in itertools.product(range(3), range(2)):
        run = jax.tree.map(lambda x, i=i, seed=seed: x[i, seed], together)
        assert_close(run, alone[i][seed], rtol=1e-4, atol=1e-5)
    # the runs are not one: their critics differ by far more than the tolerance
    critics = [np.concatenate([x.ravel() for x in leaves(state.params.critic)]) for runs in alone for state, _ in runs]
    for one, other in itertools.combinations(critics, 2):
        assert np.abs(one - other).max() > 1e-3


@every_file
def test_every_real_valued_field_can_be_traced_and_vmapped(name):
    """Each is a leaf, and none shapes the program."""
    module, config = ALGORITHMS[name], CONFIGS[name]
    fields = dataclasses.fields(config)
    kinds = {field.name: getattr(field.type, "__origin__", field.type) for field in fields}
    shaping = {"utd_ratio", "exact_fraction"}  # how many updates and solutions there are
    real = [field for field, kind in kinds.items() if kind is float and field not in shaping]
    assert len(jax.tree.leaves(config)) == len(real) > 1
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), jax.tree.map(jnp.float32, config))
    state, metrics = jax.eval_shape(jax.vmap(module.train), stacked, jax.vmap(random.key)(jnp.arange(2)))
    assert metrics.eval_returns.shape == (2, 2, config.num_eval_episodes)
    assert {x.shape[0] for x in jax.tree.leaves(state.params)} == {2}


@every_file
def test_evaluation_does_not_touch_training(name):
    """What leads to the state that an epoch leaves is the same program, however many episodes are evaluated."""
    module, config = ALGORITHMS[name], CONFIGS[name]

    def program(config, keep):
        state = jax.eval_shape(lambda key: module.init(config, key), random.key(0))
        jaxpr, out = jax.make_jaxpr(lambda state: module.epoch(config, state), return_shape=True)(state)
        kept = jax.tree.leaves((jax.tree.map(lambda _: True, out[0]), jax.tree.map(lambda _: not keep, out[1])))
        return str(pe.dce_jaxpr(jaxpr.jaxpr, kept)[0])

    other = replace(config, num_eval_episodes=config.num_eval_episodes + 1)
    assert program(config, keep=True) == program(other, keep=True)
    assert program(config, keep=False) != program(other, keep=False)


# Counts are rounded up


@pytest.mark.parametrize("name", [*ACTOR_CRITIC, "dqn"])
@pytest.mark.parametrize(
    ("fields", "warm_up", "steps", "capacity"),
    [
        ({}, 64, [80, 96], 72),
        ({"num_envs": 1}, 64, [80, 96], 72),
        ({"num_envs": 16, "total_steps": 2500, "steps_per_epoch": 1000}, 64, [1072, 2080, 3088], 80),
        ({"num_envs": 5, "num_steps": 3, "total_steps": 100, "steps_per_epoch": 16}, 75, [105], 75),
        ({"total_steps": 10}, 64, [80], 72),
        ({"buffer_size": 1, "learning_starts": 1}, 4, [20, 36, 52, 68, 84, 100], 4),
    ],
)
def test_steps_are_rounded_up_to_whole_iterations(name, fields, warm_up, steps, capacity):
    module, config = ALGORITHMS[name], replace(CONFIGS[name], **fields)
    state = jax.eval_shape(lambda key: module.init(config, key), random.key(0))
    assert len(state.buffer) == capacity
    assert module.num_epochs(config) == len(steps)
    per_iteration = config.num_envs * config.num_steps
    assert module.num_iterations(config, config.learning_starts) * per_iteration == warm_up
    assert warm_up + len(steps) * module.num_iterations(config, config.steps_per_epoch) * per_iteration == steps[-1]


def test_the_step_counts_what_was_taken():
    config = replace(CONFIGS["td3"], num_envs=5, num_steps=3, total_steps=100, hidden_sizes=(4,))
    state, metrics = jax.jit(lambda key: td3.train(config, key))(random.key(0))
    assert metrics.step.tolist() == [105]
    assert state.step == 105


# Networks


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "function"),
    [("relu", relu), ("silu", silu), ("elu", lambda x: np.where(x > 0, x, np.expm1(x))), ("tanh", np.tanh)],
)
def test_the_activation_is_what_its_name_says(name, function):
    layers = random_layers(np.random.default_rng(0), (3, 8), (8, 4), (4, 2))
    x = np.random.default_rng(1).normal(size=(5, 3))
    with jax.enable_x64(True):
        y = td3.mlp(td3.Config(activation=name), layers, x)
    np.testing.assert_allclose(y, np_mlp(layers, x, function), rtol=1e-12)


# Environments


@pytest.mark.quick
@pytest.mark.parametrize(
    ("env", "horizon", "terminated"), [("ClockTruncated-test", 50, 0), ("ClockTerminated-test", 10, 1)]
)
def test_transition_keeps_the_last_observation_of_an_episode(env, horizon, terminated):
    """At the end the next observation is the final one, while the environment itself starts anew."""
    config = replace(CONFIGS["td3"], env=env)
    env_state, obs = jax.vmap(td3.make_env(env).reset)(random.split(random.key(0), 4))
    env_state = env_state.replace(time=jnp.array([0, 1, horizon - 2, horizon - 1]))
    policy = lambda config, params, obs, key: jnp.zeros((4, 1))
    _, new_obs, transitions = td3.rollout(config, None, policy, env_state, obs, random.split(random.key(1), 1))
    transition = jax.tree.map(lambda x: x[0], transitions)
    time = np.array([1, 2, horizon - 1, horizon])
    np.testing.assert_allclose(transition.next_obs[:, 0] * horizon, time, rtol=1e-6)
    np.testing.assert_allclose(new_obs[:, 0] * horizon, [1, 2, horizon - 1, 0], rtol=1e-6)
    np.testing.assert_array_equal(transition.terminated, [0, 0, 0, terminated])
    np.testing.assert_array_equal(transition.obs, obs)


@pytest.mark.quick
def test_the_final_observation_is_read_only_where_an_episode_has_ended():
    """A wrapper that transforms observations but not their copy in `info` errs at the end alone."""
    env = td3.make_env("Wrapped-test")
    env_state, _ = env.reset(random.key(0))
    _, obs, _, next_obs, _, _ = env.step(env_state, jnp.zeros(1), random.key(1))
    np.testing.assert_allclose([obs, next_obs], [[0.2 + 100], [0.2 + 100]], rtol=1e-6)
    _, obs, _, next_obs, _, truncated = env.step(env_state.replace(time=4), jnp.zeros(1), random.key(1))
    assert truncated
    np.testing.assert_allclose([obs, next_obs], [[100], [1]], rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("module", [td3, fqi], ids=["box", "box or discrete"])
def test_actions_map_affinely_to_an_asymmetric_box(module):
    env = module.make_env("Table-test")
    assert (env.obs_dim, env.action_dim) == (6, 2)
    for action, expected in (
        ([-1, -1], [[-1], [0.5]]),
        ([0, 0], [[1], [1.5]]),
        ([1, 1], [[3], [2.5]]),
        ([0.5, -0.5], [[2], [1]]),
    ):
        np.testing.assert_allclose(env.rescale(jnp.array(action)), expected, rtol=1e-6)
    env_state, obs = env.reset(random.key(0))
    np.testing.assert_array_equal(obs, np.arange(6.0))
    _, obs, reward, next_obs, _, _ = env.step(env_state, jnp.array([0.5, -0.5]), random.key(1))
    np.testing.assert_allclose(reward, 3, rtol=1e-6)  # of the action in the environment's units
    np.testing.assert_array_equal([obs, next_obs], [np.arange(1.0, 7)] * 2)
    assert obs.dtype == next_obs.dtype == jnp.float32


@pytest.mark.quick
@every_file
def test_an_environment_made_in_float64_serves_in_float32(name, request):
    """It is made once per process, whose precision may change."""
    module, env_name = ALGORITHMS[name], CONFIGS[name].env
    module.make_env.cache_clear()
    request.addfinalizer(module.make_env.cache_clear)
    with jax.enable_x64(True):
        jax.eval_shape(module.init, CONFIGS[name], random.key(0))
    env = module.make_env(env_name)

    def step(carry, key):
        env_state, action = carry
        env_state, obs, *_ = jax.vmap(env.step)(env_state, action, random.split(key, 2))
        return (env_state, action), obs

    env_state, _ = jax.vmap(env.reset)(random.split(random.key(0), 2))
    carry = env_state, jnp.zeros((2, env.action_dim))
    _, obs = jax.jit(lambda carry, keys: lax.scan(step, carry, keys))(carry, random.split(random.key(1), 3))
    assert obs.dtype == jnp.float32


@pytest.mark.quick
def test_discrete_actions_are_codes():
    env = fqi.make_env("CartPole-v1")
    assert (env.discrete, env.action_dim) == (True, 2)
    assert env.rescale(jnp.array([-1.0, 1.0])) == 1
    assert not fqi.make_env("Pendulum-v1").discrete
    np.testing.assert_allclose(fqi.make_env("Pendulum-v1").rescale(jnp.array([1.5])), [2.0])  # projected onto the box


@every_actor_critic
def test_act_stays_in_the_box_and_in_its_shape(name):
    module, config = ALGORITHMS[name], replace(CONFIGS[name], env="Table-test")
    params = jax.eval_shape(lambda key: module.init(config, key), random.key(0)).params
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


def test_random_actions_of_the_warm_up_fill_the_box():
    action = td3.warm_up(CONFIGS["td3"], None, jnp.zeros((10_000, 3)), random.key(0))
    assert action.shape == (10_000, 1)
    np.testing.assert_allclose(np.quantile(action, [0, 0.25, 0.5, 0.75, 1]), [-1, -0.5, 0, 0.5, 1], atol=0.03)


@pytest.mark.parametrize("name", ["td3", "reinforce"])
def test_evaluation_is_whole_greedy_episodes(name):
    """Equal to a plain loop over `env.step` with the same keys; episodes end at different times, in both ways."""
    module, config = ALGORITHMS[name], replace(CONFIGS[name], env="Walk-test", num_eval_episodes=8)
    params = jax.jit(lambda key: module.init(config, key))(random.key(0)).params
    returns = jax.jit(lambda params, key: module.evaluate(config, params, key))(params, random.key(1))
    env, env_params = gymnax.make("Walk-test")
    act, step = jax.jit(lambda obs: module.act(config, params, obs)), jax.jit(env.step)
    expected, ends = [], []
    for key in random.split(random.key(1), 8):
        key, key_reset = random.split(key)
        obs, env_state = env.reset(key_reset, env_params)
        rewards, done = [], False
        while not done:
            key, key_step = random.split(key)
            obs, env_state, reward, terminated, truncated, _ = step(key_step, env_state, act(obs), env_params)
            rewards.append(float(reward))
            done = bool(terminated | truncated)
        expected.append(sum(rewards))
        ends.append((len(rewards), bool(terminated)))
    np.testing.assert_allclose(returns, expected, rtol=1e-5)
    assert {end for _, end in ends} == {True, False}
    assert len({length for length, _ in ends}) >= 3


# Learning


@pytest.mark.parametrize(("name", "env"), [("td3", "ClockTruncated-test"), ("td3", "ClockTerminated-test")])
def test_values_stop_at_a_termination_and_not_at_a_time_limit(name, env):
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10 at any time before the limit; before a termination less."""
    module = ALGORITHMS[name]
    config = module.Config(
        env=env,
        total_steps=4400,
        learning_starts=400,
        steps_per_epoch=4000,
        num_envs=4,
        num_eval_episodes=1,
        buffer_size=4400,
        batch_size=64,
        hidden_sizes=(32, 32),
        learning_rate=2e-3,
        gamma=0.9,
        tau=0.05,
    )
    state, _ = fast_jit(module.train)(config, random.key(0))
    times = np.arange(50) / 50 if env == "ClockTruncated-test" else np.arange(10) / 10
    obs = jnp.asarray(times)[:, None]
    values = module.twin_critics(config, state.params.critic, obs, module.greedy(config, state.params, obs)).min(axis=0)
    if env == "ClockTruncated-test":
        np.testing.assert_allclose(values, 10, rtol=0.03)  # 8.5 if the limit counted as the end
    else:
        np.testing.assert_allclose(values, (1 - 0.9 ** (10 - np.arange(10))) / (1 - 0.9), rtol=0.05)


@every_actor_critic
def test_comes_close_to_the_best_linear_quadratic_cost(name):
    """Within a tenth of the best; with a wrong sign in the actor's loss the cost is over five hundred times that."""
    module = ALGORITHMS[name]
    own = {"ou_theta": 1.0, "ou_dt": 1.0, "ou_sigma": 0.2, "exploration_noise": 0.2, "alpha": 0.1}
    own = {field: value for field, value in own.items() if hasattr(module.Config, field)}
    config = module.Config(
        env="LQR1-v0",
        total_steps=5000,
        steps_per_epoch=4000,
        num_eval_episodes=1,
        batch_size=64,
        learning_rate=2e-3,
        gamma=0.9,
        hidden_sizes=(256,),
        **own,
    )
    state, _ = fast_jit(module.train)(config, random.key(0))
    params = lqr.system(1)
    K = jnp.asarray(lqr.solve(params, 0.9).K)

    def cost(policy):
        return jax.jit(lambda key: lqr.simulate(params, policy, 0.9, key).mean())(random.key(1))

    ratio = cost(lambda s: module.act(config, state.params, s)) / cost(lambda s: -K @ s)
    assert 1 < ratio < 1.1


# Mistakes


@pytest.mark.quick
@every_file
def test_every_number_out_of_its_range_is_named(name):
    """For each field whose range is stated: the value just outside."""
    module = ALGORITHMS[name]
    outside = {"> 0": 0.0, ">= 0": -0.5, "in [0, 1]": 1.5, "in (0, 1]": 0.0, "from 1 to 2147483647": 0}
    wrong = {field.name: math.nan for field in dataclasses.fields(module.Config) if field.type is float}
    wrong["hidden_sizes"] = (8, 0)
    for field in dataclasses.fields(module.Config):
        for rule in getattr(field.type, "__metadata__", ()):
            wrong[field.name] = -1 if field.type.__origin__ is int and rule == ">= 0" else outside[rule]
    assert len(wrong) > 5
    with pytest.raises(ValueError, match=r"^activation=gelu: must be one of relu, silu, elu, tanh"):
        module.init(replace(CONFIGS[name], activation="gelu"), random.key(0))
    for field, value in wrong.items():
        config = replace(CONFIGS[name], **{field: value})
        shown = 0 if field == "hidden_sizes" else value
        with pytest.raises(ValueError, match=f"^{field}={shown}: must be "):
            module.init(config, random.key(0))


MANY = 2**31 - 1
COUNTED = [  # what a field amounts to after rounding up, or times others, is what counts
    *(
        (name, fields)
        for name in ACTOR_CRITIC
        for fields in (
            {"total_steps": MANY},
            {"total_steps": MANY - 1, "learning_starts": MANY, "num_envs": 7},
            {"buffer_size": MANY},
            {"utd_ratio": 1e9},
        )
    ),
    ("reinforce", {"total_steps": MANY}),
    *((name, {"num_base_points": MANY, "num_envs": 7}) for name in ("fqi", "fqi_amortized", "nfqca", "soft_fqi")),
    *((name, {"num_iterations": MANY, "rounds": 1}) for name in ("fqi", "fqi_amortized", "nfqca")),
    ("soft_fqi", {"num_iterations": MANY}),
    *((name, {"num_iterations": 10**5, "iterations_per_epoch": MANY}) for name in ("svg", "svg_model")),
    ("svg", {"num_iterations": 10**4, "num_rollouts": 10**3, "horizon": 10**3}),
    ("svg_model", {"num_iterations": 10**5, "num_envs": 10**5}),
    ("svg_model", {"buffer_size": MANY}),
]


@pytest.mark.quick
@pytest.mark.parametrize(("name", "fields"), COUNTED)
def test_counts_beyond_their_counter_are_named(name, fields):
    """Counters are int32: whatever would exceed one is refused before anything is computed."""
    field = next(iter(fields))
    with pytest.raises(ValueError, match=rf"^{field}={fields[field]}: must be less: \d+ are too many to count"):
        ALGORITHMS[name].init(replace(CONFIGS[name], **fields), random.key(0))


@pytest.mark.quick
@every_file
def test_an_environment_that_does_not_fit_is_named(name):
    module = ALGORITHMS[name]
    env = "Unbounded-test" if name == "dqn" or hasattr(module.make_env("Pendulum-v1"), "discrete") else "CartPole-v1"
    actions = "Discrete actions" if name == "dqn" else ".*Box of floats with finite bounds"
    with pytest.raises(ValueError, match=f"^env={env}: must have {actions}"):
        module.init(replace(CONFIGS[name], env=env), random.key(0))


@pytest.mark.quick
@pytest.mark.parametrize("ratio", [0.1, 0.3, 1e-9])
def test_updates_that_are_not_whole_are_named(ratio):
    with pytest.raises(ValueError, match=f"^utd_ratio={ratio}: must "):
        td3.init(replace(CONFIGS["td3"], utd_ratio=ratio), random.key(0))


# Files that need no other, and say the same where they mean the same


@pytest.mark.quick
@pytest.mark.parametrize("name", [*ALGORITHMS, "gradient_estimators"])
def test_imports_only_what_a_single_file_may(name):
    *body, last = ast.parse((shared_blocks.FOLDER / f"{name}.py").read_text()).body
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


def test_files_alone_train_in_an_empty_folder(tmp_path):
    """All files import, and one trains, where nothing of this project can be imported."""
    for name in [*ALGORITHMS, "gradient_estimators"]:
        (tmp_path / f"{name}.py").write_text((shared_blocks.FOLDER / f"{name}.py").read_text())
    program = f"""
import sys
sys.modules["amortax"] = None  # an import fails, installed or not
sys.path.insert(0, ".")
import jax, {", ".join(ALGORITHMS)}, gradient_estimators
config = td3.{CONFIGS["td3"]}
state, metrics = jax.jit(td3.train)(config, jax.random.key(0))
assert jax.numpy.isfinite(metrics.eval_returns).all()
print(td3.__file__, metrics.step.tolist())
"""
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == [str(tmp_path / "td3.py"), "[80, 96]\n"]


@pytest.mark.quick
def test_shared_blocks_are_word_for_word_the_same():
    assert list(shared_blocks.differences()) == []


@pytest.mark.quick
def test_shared_blocks_are_copied_from_their_reference(tmp_path, monkeypatch):
    """A changed line is named, and `fix` restores it."""
    for path in shared_blocks.FOLDER.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(shared_blocks, "FOLDER", tmp_path)
    sac_file = tmp_path / "sac.py"
    original = sac_file.read_text()
    sac_file.write_text(original.replace("    (env_state, obs), transitions = ", "    (state, obs), transitions = "))
    (found,) = shared_blocks.differences()
    assert found.startswith("rollout: td3.py has '(env_state, obs), transitions = ")
    shared_blocks.fix()
    assert list(shared_blocks.differences()) == []
    assert sac_file.read_text() == original


@pytest.mark.quick
@every_file
def test_the_file_keeps_the_order_of_the_others(name):
    """What two files both define stands in the same order, so that a diff stays short; sections too."""
    text = {x: (shared_blocks.FOLDER / f"{x}.py").read_text() for x in (name, "td3")}
    ours, theirs = (
        ([node.name for node in ast.parse(x).body if hasattr(node, "name")] for x in text.values())
        if (name != "td3")
        else ([], [])
    )
    assert [x for x in ours if x in theirs] == [x for x in theirs if x in ours]
    sections = [line[2:] for line in text[name].splitlines() if line.startswith("# ")]
    order = ["Networks", "Learning", "Policies", "Environment", "Replay buffer", "Base points", "Training"]
    assert [x for x in sections if x in order] == [x for x in order if x in sections]
    assert {"Networks", "Learning", "Policies", "Environment", "Training"} <= set(sections)


@pytest.mark.quick
def test_gradient_estimators_check_their_numbers():
    with pytest.raises(ValueError, match="batch_size=0: must be "):
        gradient_estimators.train(gradient_estimators.Config(batch_size=0), random.key(0))

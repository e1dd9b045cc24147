"""Physics engines as environments: a task by hand through the adapter, and a few steps of the engines' own tasks."""

import contextlib
import importlib
import sys
from types import SimpleNamespace

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax import random

from amortax.algorithms import td3
from amortax.common import brax, checks, envs, film, physics, playground, programs, record, run


@struct.dataclass
class State:
    data: dict
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict
    info: dict


class Counter:
    """The position counts by the action from a whole number; NaN beyond 10, and the end below -10."""

    def reset(self, rng):
        x = jnp.round(random.uniform(rng, minval=0, maxval=5))
        data = {"x": x, "empty": jnp.zeros((0, 3)), "derived": jnp.zeros(1000)}
        metrics = {"speed": jnp.zeros(()), "alive": jnp.zeros(())}
        return State(data, x[None], jnp.zeros(()), jnp.zeros(()), metrics, {"rng": rng})

    def step(self, state, action):
        x = state.data["x"] + action[0]
        x = jnp.where(x > 10, jnp.nan, x)
        state.metrics.update(speed=action[0], alive=1.0)  # Brax has Python numbers too
        info = {**state.info, "rng": random.split(state.info["rng"])[0]}
        done = (x < -10).astype(float)
        return state.replace(data={**state.data, "x": x}, obs=x[None], reward=x, done=done, info=info)


@pytest.fixture(scope="module")
def counter():
    return physics.Physics(Counter(), [-8.0], [8.0])


def at(env, x):
    """A state of `Counter` at `x`."""
    _, state = env.reset(random.key(0))
    like, structure = jax.tree.flatten(env.starts[1])
    full = jax.tree.unflatten(structure, [jnp.zeros(leaf.shape) for leaf in like])
    full = full.replace(data={**full.data, "x": jnp.float32(x)}, obs=jnp.full(1, x, float))
    return state.replace(leaves=physics.not_empty(full))


def test_reset_and_the_resets_within_step_draw_from_two_halves(counter):
    """And no array of a state is empty."""
    found = physics.not_empty(counter.starts[0])
    assert all(len(x) == physics.NUM_STARTS for x in found)
    xs = next(x for x in found if x.shape == (256,) and x.max() > 1)
    obs, state = jax.vmap(counter.reset)(random.split(random.key(1), 2000))
    assert all(x.size for x in jax.tree.leaves(state))
    np.testing.assert_allclose(
        np.bincount(obs[:, 0].astype(int)), np.bincount(xs[:128].astype(int)) * 2000 / 128, rtol=0.3
    )
    env_params = counter.default_params.replace(max_steps_in_episode=1)
    step = jax.vmap(counter.step, in_axes=(0, None, None, None))
    obs, *_ = step(random.split(random.key(2), 2000), at(counter, 1.0), jnp.ones(1), env_params)
    np.testing.assert_allclose(
        np.bincount(obs[:, 0].astype(int)), np.bincount(xs[128:].astype(int)) * 2000 / 128, rtol=0.3
    )


@pytest.mark.parametrize("around", [jax.ensure_compile_time_eval, contextlib.nullcontext])
def test_start_states_are_made_by_one_program(around):
    """Operations on constants are part of it, also where the environment is made while another program is traced."""
    staged = []

    class Recorder(Counter):
        def reset(self, rng):
            staged.append(isinstance(jnp.zeros(1) + 1, jax.core.Tracer))
            return super().reset(rng)

    env = physics.Physics(Recorder(), [-8.0], [8.0])

    @jax.jit
    def reset(key):
        with around():
            made = env.starts[0]
        assert all(type(x) is np.ndarray for x in made)
        return env.reset(key)

    reset(random.key(0))
    assert staged == [True]


def test_state_that_becomes_nan_ends_the_episode(counter):
    """With the previous observation and reward 0, in a state that begins anew."""
    obs, state, reward, terminated, truncated, info = counter.step(random.key(0), at(counter, 7.0), jnp.array([4.0]))
    assert (float(info["final_observation"][0]), float(reward), bool(terminated), bool(truncated)) == (
        7,
        0,
        True,
        False,
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((obs, state)))
    assert state.time == 0
    # an end of the task's own has its own reward
    _, _, reward, terminated, _, info = counter.step(random.key(0), at(counter, -7.0), jnp.array([-4.0]))
    assert (float(info["final_observation"][0]), float(reward), bool(terminated)) == (-11, -11, True)


def test_time_limit_is_no_termination(counter):
    state = at(counter, 1.0).replace(time=999)
    _, _, reward, terminated, truncated, info = counter.step(random.key(0), state, jnp.ones(1))
    assert (float(info["final_observation"][0]), float(reward), bool(terminated), bool(truncated)) == (
        2,
        2,
        False,
        True,
    )


def test_action_repeat_sums_rewards_up_to_the_end():
    env = physics.Physics(Counter(), [-8.0], [8.0], action_repeat=3)
    _, state, reward, terminated, *_ = env.step(random.key(0), at(env, 1.0), jnp.array([2.0]))
    assert (float(reward), bool(terminated), int(state.time)) == (3 + 5 + 7, False, 3)
    _, _, reward, terminated, _, info = env.step(random.key(0), at(env, -1.0), jnp.array([-8.0]))
    assert (float(reward), bool(terminated), float(info["final_observation"][0])) == (-9 - 17, True, -17)
    _, _, reward, terminated, _, info = env.step(random.key(0), at(env, 4.0), jnp.array([5.0]))
    assert (float(reward), bool(terminated), float(info["final_observation"][0])) == (9, True, 9)


def test_actions_are_clipped_to_the_bounds(counter):
    _, state, *_ = counter.step(random.key(0), at(counter, 1.0), jnp.array([9.5]))
    assert float(counter.restored(state.leaves, random.key(0)).data["x"]) == 9


def test_algorithm_trains_in_it(counter):
    gymnax.register("Counter-test", lambda: counter)
    config = td3.Config(env="Counter-test", learning_starts=16, num_envs=2, hidden_sizes=(4,), buffer_size=64)
    state = jax.jit(td3.init)(config, random.key(0))
    transitions = td3.read(config, state.buffer, jnp.arange(16))
    moved = transitions.obs[:, 0] + 8 * transitions.action[:, 0]
    np.testing.assert_allclose(
        transitions.next_obs[:, 0], jnp.where(moved > 10, transitions.obs[:, 0], moved), atol=1e-5
    )
    np.testing.assert_array_equal(transitions.terminated, (moved > 10) | (moved < -10))


def test_a_step_is_traced_once_for_all_programs():
    """Tracing the step of an engine takes seconds."""
    traced = []

    class Recorder(Counter):
        def step(self, state, action):
            traced.append(state)
            return super().step(state, action)

    env = physics.Physics(Recorder(), [-8.0], [8.0])
    gymnax.register("Recorder-test", lambda: env)
    config = td3.Config(env="Recorder-test", learning_starts=16, steps_per_epoch=16, hidden_sizes=(4,), buffer_size=64)
    checks.check_config(config, td3.init)
    programs.compile_programs(config, td3.init, td3.epoch, num_runs=1)
    assert len(traced) == 1


# Names and mistakes


def mistake(capsys, function, *args):
    """The one line on stderr of a call that fails."""
    with pytest.raises(SystemExit) as error:
        function(*args)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_all_names_are_registered_and_listed(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["td3.py", "--list-envs"])
    run.main(td3.Config, td3.init, td3.epoch, td3.num_epochs)
    names = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert len(playground.ENVS) == 25
    for name in (*playground.ENVS, *brax.ENVS, "Pendulum-v1", "LQR-v0"):
        assert name in names
        assert name in gymnax.registered_envs
    assert {f"brax/hopper-{backend}" for backend in ("spring", "positional", "mjx")} <= set(gymnax.registered_envs)
    assert not list(tmp_path.iterdir())


def test_nearest_names_of_an_unknown_task(capsys):
    line = mistake(capsys, envs.register, "playground/CheetaRun")
    assert line.startswith(
        "error: --env playground/CheetaRun: no such gymnax environment; nearest: playground/CheetahRun"
    )
    assert "nearest: brax/halfcheetah" in mistake(capsys, envs.register, "brax/HalfCheeta")


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("playground/FishSwim", "mujoco_playground", "playground"), ("brax/pusher-mjx", "brax", "brax")],
)
def test_missing_extra_is_named(name, package, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    line = mistake(capsys, envs.register, name)
    assert line == f'error: --env {name}: needs the extra {extra}: pip install -e ".[{extra}]"'


@pytest.mark.parametrize("error", [ModuleNotFoundError("no mujoco", name="mujoco"), AttributeError("no such thing")])
def test_broken_package_is_named_with_what_to_reinstall(error, monkeypatch, capsys):
    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    line = mistake(capsys, envs.register, "playground/FishSwim")
    assert str(error) in line
    assert line.endswith("--no-deps mujoco mujoco-core mujoco-studio mujoco-mjx playground")


def test_missing_renderer_is_named(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no EGL")

    monkeypatch.setitem(sys.modules, "mujoco", SimpleNamespace(Renderer=fail))
    line = mistake(capsys, film.draw_mujoco, SimpleNamespace(model=None), [])
    assert "no renderer (RuntimeError: no EGL)" in line
    assert "apt install" in line


def test_versions_of_the_engine_belong_to_a_run(monkeypatch):
    monkeypatch.setattr(record.metadata, "version", lambda name: f"version of {name}")
    for name in ("package", "describe"):  # which make the environment
        monkeypatch.setattr(record.envs, name, lambda env: {})
    versions = record.describe(td3.__file__, td3.Config(env="playground/CheetahRun"), 0)["versions"]
    assert {"playground", "mujoco", "mujoco-mjx"} < set(versions)
    assert "brax" in record.describe(td3.__file__, td3.Config(env="brax/ant"), 0)["versions"]
    assert "brax" not in record.describe(td3.__file__, td3.Config(), 0)["versions"]


def test_folder_of_a_run_has_one_level_for_the_environment():
    assert record.group_folder("out", "sac", "playground/CheetahRun", "x").parts == (
        *("out", "sac", "playground.CheetahRun", "x"),
    )


# The engines


def check_task(name, num_steps=3):
    """A few steps of two environments: as the task's own, from the states that the adapter kept."""
    env, env_params = gymnax.make(name)
    keys = random.split(random.key(0))
    obs, state = jax.vmap(env.reset)(keys)
    assert obs.shape == (2, *env.observation_space(env_params).shape)
    assert all(x.size for x in jax.tree.leaves(state))
    low, high = env.low, env.high
    assert np.isfinite([low, high]).all()
    assert (low < high).all()
    step = jax.jit(jax.vmap(env.step, in_axes=(0, 0, 0, None)))
    task_step = jax.jit(jax.vmap(env.task.step))
    own = jax.vmap(env.restored)(state.leaves, keys)
    for key in random.split(random.key(1), num_steps):
        action = random.uniform(key, (2, *low.shape), minval=low, maxval=high)
        own = task_step(own, action)
        obs, state, reward, terminated, truncated, info = step(keys, state, action, env_params)
        np.testing.assert_allclose(info["final_observation"], own.obs, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(reward, own.reward, rtol=1e-3, atol=1e-3)
        assert not truncated.any()
        np.testing.assert_array_equal(terminated, own.done.astype(bool))


def test_playground_steps_as_its_own_task():
    pytest.importorskip("mujoco_playground")
    check_task("playground/PointMass")


@pytest.mark.slow
@pytest.mark.parametrize("name", playground.ENVS)
def test_all_tasks_of_playground(name, monkeypatch, tmp_path):
    """They leave no file, as MuJoCo does where it warns."""
    pytest.importorskip("mujoco_playground")
    monkeypatch.chdir(tmp_path)
    check_task(name)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*brax.ENVS, *(f"brax/hopper-{backend}" for backend in brax.BACKENDS[1:])])
def test_all_tasks_of_brax(name):
    pytest.importorskip("brax")
    check_task(name)

"""A user's environment: mistakes in it get one line before anything is compiled, and its parameters are flags."""

import importlib
import inspect
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import broken_envs
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CONFIGS, replace
from gymnax.wrappers import purerl
from test_cli import fails
from test_run import execute, flags_of

from amortax.algorithms import fqi, reinforce, td3
from amortax.common import base_points, contract, env_params, envs, play, policy, record, run

SOURCE = inspect.getsource(broken_envs).splitlines()


def line_of(comment):
    """Where an exception is raised in broken_envs.py, as a message names it."""
    (number,) = [i for i, line in enumerate(SOURCE, 1) if line.endswith(f"  # {comment}")]
    return f"broken_envs.py, line {number})\n"


BROKEN = {
    "nothing": ["cannot be made: TypeError: Environment factory must return"],
    "raises": ["cannot be made: KeyError: 'no such map'", line_of("raised here")],
    "asks": ["cannot be made: TypeError: asks() missing 1 required positional argument: 'size'"],
    "ResetOne": ["reset returned float32[2], expected 2 values: obs, state"],
    "StepEnvFour": ["step_env returned 4 values, expected 5 values: obs, state, reward, terminated, info"],
    "OldStep": ["step returned 5 values, expected 6 values: obs, state, reward, terminated, truncated, info"],
    "StepNothing": ["step returned None, expected 6 values"],
    "InfoNone": ["step_env returned None for info, expected a dict"],
    "DictObs": ["reset returned a dict of place, time for an observation", "one array", "ravel_pytree(obs)[0]"],
    "TupleObs": ["reset returned a tuple of 2 values for an observation", "one array", "ravel_pytree(obs)[0]"],
    "OtherShape": ["step_env returned float32[1] for an observation, expected float32[2], as from reset"],
    "OtherType": ["step_env returned int32[2] for an observation, expected float32[2], as from reset"],
    "OwnStepOtherShape": ["step returned float32[1] for an observation, expected float32[2], as from reset"],
    "EmptyObs": ["reset returned float32[0] for an observation, expected at least one number"],
    "ComplexObs": ["reset returned complex64[1] for an observation, expected floats"],
    "CodeWithoutSpace": ["reset returned int32[] for an observation, expected a Discrete observation_space"],
    "FloatForCode": ["reset returned float32[] for an observation, expected an integer", "Discrete(6)"],
    "FirstIsNaN": ["reset returned an observation that is not finite"],
    "NoFinal": ['step returned an info without it for info["final_observation"], expected float32[2]'],
    "FinalOfOtherShape": ['step returned float32[1] for info["final_observation"], expected float32[2]'],
    "RewardVector": ["step_env returned float32[1] for a reward, expected a scalar, float32[]"],
    "RewardComplex": ["step_env returned complex64[] for a reward, expected a scalar"],
    "RewardNaN": ["step returned a reward that is not finite"],
    "TerminatedFloat": ["step_env returned float32[] for terminated, expected a boolean scalar, bool[]"],
    "TerminatedVector": ["step_env returned bool[1] for terminated, expected a boolean scalar"],
    "TruncatedInt": ["step returned int32[] for truncated, expected a boolean scalar"],
    "IsTruncatedFloat": ["is_truncated returned float32[] for a value, expected a boolean scalar"],
    "StateOfOtherType": ["step_env returned a state whose .x is bool[], expected float32[], as from reset"],
    "StateOfOtherStructure": ["step_env returned a state whose", "absent, expected", "as from reset"],
    "StateWithText": ["reset returned a state whose ['phase'] is start, expected arrays alone"],
    "NoLimit": ["max_steps_in_episode is None, expected a number from 1"],
    "NoActionSpace": ["NotImplementedError"],
    "DictActions": ["action_space returned Dict(", "expected a Box or Discrete"],
    "IntegerBox": ["action_space returned a Box of int32, expected floats; whole numbers are Discrete"],
    "HugeBox": ["action_space returned bounds -3e+38 and 3e+38, expected floats below 1e+38"],
    "EmptyBox": ["action_space returned a Box, expected low < high everywhere"],
    "OtherBounds": ["action_space returned a Box whose bounds do not have its shape"],
    "Branches": ["TracerBoolConversionError: Attempted boolean conversion", line_of("a branch")],
    "NumPy": ["TracerArrayConversionError: ", line_of("an array of NumPy")],
    "ParamsOfNoTree": ["TypeError: ", "Settings"],
    "host_fails": ["is gone", line_of("on the host")],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_environment_gets_one_line(monkeypatch, capsys, tmp_path, name):
    line = fails(monkeypatch, capsys, tmp_path / "out", "--env", f"broken_envs:{name}")
    assert line.startswith(f"error: --env broken_envs:{name}: ")
    for text in BROKEN[name]:
        assert text in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import jax\n1 / 0\n", "ZeroDivisionError: division by zero ("),
        ("import jax\nmake = ]\n", "SyntaxError: unmatched ']'"),
        ("import jax\nimport no_such_physics\n", "ModuleNotFoundError: No module named 'no_such_physics'"),
        ("import jax\nfrom jax import no_such\n", "ImportError: cannot import name 'no_such'"),
    ],
)
def test_a_module_that_cannot_be_imported_gets_its_line(monkeypatch, capsys, tmp_path, source, said):
    module = f"unimportable_{abs(hash(said))}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    line = fails(monkeypatch, capsys, tmp_path / "out", "--env", f"{module}:make")
    assert said in line
    assert line.endswith(f"({module}.py, line 2)\n")


def test_the_whole_traceback_is_a_flag(monkeypatch, capsys, tmp_path):
    words = ["td3.py", "--out", str(tmp_path / "out"), "--env", "broken_envs:Branches", "--traceback"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as error:
        run.main(td3.Config, td3.init, td3.epoch, td3.num_epochs)
    *above, last = capsys.readouterr().err.splitlines()
    assert error.value.code == 2
    assert "    if state.x > 3:  # a branch" in above
    assert last.startswith("error: --env broken_envs:Branches: TracerBoolConversionError")


def test_an_exception_after_training_began_has_code_1(monkeypatch, capsys, tmp_path):
    """Only from inside the environment; `explain` leaves others alone."""
    config = replace(CONFIGS["td3"], env="broken_envs:host_fails_late")
    assert execute(monkeypatch, tmp_path, "--no-plot", config=config) == 1
    assert capsys.readouterr().err.endswith(f"{line_of('on the host')}")
    with pytest.raises(ValueError, match="hidden") as error:
        td3.init(replace(config, hidden_sizes=(0,)), jax.random.key(0))
    assert envs.explain("broken_envs:host_fails_late", error.value) is None


# What breaks nothing


@pytest.mark.parametrize("name", [name for name in gymnax.registered_envs if not re.search("-test$|suite$|/", name)])
def test_environments_of_gymnax_keep_the_contract(name):
    env, params = gymnax.make(name)
    assert next(contract.mistakes(env, params), None) is None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Whole", []),
        ("CopyOfOther", ['info["final_observation"] is not the observation in mid-episode']),
        ("Endless", ["has no time limit: an episode of an evaluation ends after 10,000 steps"]),
    ],
)
def test_what_may_not_be_meant_is_a_warning(name, told):
    env = getattr(broken_envs, name)()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        contract.check(name, env, env.default_params)
    assert len(caught) == len(told)
    for warning, text in zip(caught, told, strict=True):
        assert text in str(warning.message)


@pytest.mark.parametrize("module", [td3, fqi], ids=["box", "box or discrete"])
@pytest.mark.parametrize("name", ["IntegerBox", "HugeBox"])
def test_a_box_that_does_not_fit_is_refused_without_the_command_line(module, name):
    if f"{name}-test" not in gymnax.registered_envs:
        gymnax.register(f"{name}-test", getattr(broken_envs, name))
    with pytest.raises(ValueError, match=f"^env={name}-test: must have .* Box of floats with finite bounds"):
        module.make_env(f"{name}-test")


# Discrete observations


def test_discrete_observations_are_one_hot():
    """The same in reset, in step and in `act`: a policy that a number from 0 to 15 could not tell from a table."""
    env = reinforce.make_env("FrozenLake-misc")
    env_state, obs = env.reset(jax.random.key(0))
    np.testing.assert_array_equal(obs, np.eye(16)[0])
    _, obs, _, next_obs, *_ = env.step(env_state, 2.0 * np.eye(4)[2] - 1, jax.random.key(1))
    assert obs.sum() == next_obs.sum() == 1
    table = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    config = reinforce.Config(env="FrozenLake-misc", hidden_sizes=(16,))
    shapes = jax.eval_shape(reinforce.init, config, jax.random.key(0)).params
    layers = [(np.eye(16, dtype=np.float32), np.zeros(16, np.float32)), (table, np.zeros(4, np.float32))]
    assert jax.tree.map(jnp.shape, layers) == jax.tree.map(jnp.shape, shapes.actor.network)
    params = shapes._replace(actor=shapes.actor._replace(network=layers))
    actions = [int(reinforce.act(config, params, np.int64(i))) for i in range(16)]
    np.testing.assert_array_equal(actions, table.argmax(axis=1))


def test_base_points_hold_discrete_observations_as_numbers(capsys, tmp_path):
    path, rng = tmp_path / "points.npz", np.random.default_rng(0)
    obs, next_obs, action = rng.integers(16, size=40), rng.integers(16, size=40), rng.integers(4, size=40)
    np.savez(path, obs=obs, next_obs=next_obs, action=action, reward=np.zeros(40), terminated=np.zeros(40))
    points = base_points.load(path, "FrozenLake-misc")
    np.testing.assert_array_equal(points.obs, np.eye(16)[obs])
    base_points.save(tmp_path / "again.npz", "FrozenLake-misc", points, 40)
    with np.load(tmp_path / "again.npz") as again:
        np.testing.assert_array_equal(again["obs"], obs)
        np.testing.assert_array_equal(again["next_obs"], next_obs)
    np.savez(path, obs=obs + 1, next_obs=next_obs, action=action, reward=np.zeros(40), terminated=np.zeros(40))
    with pytest.raises(SystemExit):
        base_points.load(path, "FrozenLake-misc")
    assert "obs must be whole numbers from 0 to 15" in capsys.readouterr().err


# Evaluation ends


def test_an_evaluation_ends_where_the_environment_does_not():
    """After 10,000 steps, or as many as its parameters say where that is more; in the player too."""
    for name, limit, bound in (("Endless", 5, 10_000), ("EndlessLonger", 10_500, 10_500)):
        env = broken_envs.Endless()
        changed = env_params.change(name, env, [f"max_steps_in_episode={limit}"])
        gymnax.register(f"{name}-test", lambda env=changed: env)
        config = replace(CONFIGS["td3"], env=f"{name}-test")
        shapes = jax.eval_shape(td3.init, config, jax.random.key(0)).params
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        returns = jax.jit(td3.evaluate, static_argnums=0)(config, params, jax.random.key(0))
        np.testing.assert_array_equal(returns, [bound, bound])
    np.testing.assert_array_equal(play.gymnax_returns(td3.act, config, params, 0, jnp.arange(2)), [bound, bound])


ENDLESS = f"""
import runpy, sys
from pathlib import Path
sys.path.append({str(Path(__file__).parent)!r})
from amortax.common import programs
advance = programs.advance
programs.advance = lambda *args: (Path("epoch").touch(), advance(*args))[1]
runpy.run_path({td3.__file__!r}, run_name="__main__")
"""


def wait_until(condition, process):
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def test_a_second_interrupt_ends_an_evaluation_at_once(tmp_path):
    """In an epoch of 16 steps whose evaluation takes 10^9."""
    words = flags_of(replace(CONFIGS["td3"], env="broken_envs:Endless"))
    words += ["--env-params", "max_steps_in_episode=1000000000", "--out", "runs"]
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, *words], cwd=tmp_path, stdout=err, stderr=err)
    try:
        wait_until((tmp_path / "epoch").exists, process)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "interrupt again to stop at once" in (tmp_path / "err").read_text(), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == -signal.SIGINT
    finally:
        process.kill()


# Factories, sources, parameters


OWN = """
from physics import GAIN
from broken_envs import Params, Whole

made = []

class Own(Whole):
    default_params = Params(gain=GAIN)

def make():
    made.append(1)
    return Own()
"""


def test_a_run_in_an_own_environment_with_changed_parameters(monkeypatch, capsys, tmp_path):
    """One call of the factory; what decides the numbers in config.json; another environment is another run; played."""
    (tmp_path / "own_env.py").write_text(OWN)
    (tmp_path / "physics.py").write_text("GAIN = 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = replace(CONFIGS["td3"], env="own_env:make")
    flags = ["--env-params", "max_steps_in_episode=9", "gain=3"]
    assert execute(monkeypatch, tmp_path / "out", "--no-plot", *flags, config=config) == 0
    assert importlib.import_module("own_env").made == [1]
    folder = tmp_path / "out" / "td3" / "own_env.make" / "default" / "seed_0"
    described = record.read_config(folder)
    assert described["env_params"] == {"max_steps_in_episode": 9, "gain": 3.0}
    assert described["jax_config"] == {
        "jax_enable_x64": False,
        "jax_default_prng_impl": "threefry2x32",
        "jax_default_matmul_precision": None,
    }
    assert {"jax", "jaxlib", "optax", "distrax", "gymnax", "numpy", "scipy"} <= set(described["versions"])
    for others, named in ((["gain=3"], "env_params.max_steps_in_episode: 9 -> absent"), ([], "env_params")):
        capsys.readouterr()
        assert execute(monkeypatch, tmp_path / "out", *flags[:1], *others, config=config) == 2
        assert named in capsys.readouterr().err
    envs.register("own_env:make")
    assert gymnax.make("own_env:make")[1].max_steps_in_episode == 5
    policy.load(folder)
    assert vars(gymnax.make("own_env:make")[1]) == {"max_steps_in_episode": 9, "gain": 3.0}
    (tmp_path / "physics.py").write_text("GAIN = 2.5\n")
    assert execute(monkeypatch, tmp_path / "out", "--no-plot", *flags, config=config) == 2
    assert f"env_sha256: {described['env_sha256']} -> " in capsys.readouterr().err
    policy.load(folder)
    assert "note: the code of own_env:make has changed since this run" in capsys.readouterr().err


def test_parameters_of_all_types_are_changed():
    make = lambda name, *words: env_params.change(name, gymnax.make(name)[0], words)
    params = make("Pendulum-v1", "g=9", "max_steps_in_episode=50").default_params
    assert (params.g, params.max_steps_in_episode, params.dt) == (9.0, 50, gymnax.make("Pendulum-v1")[1].dt)
    assert make("DeepSea-bsuite", "deterministic=false").default_params.deterministic is False
    env = make("LQR1-v0", "A=[[0.5]]")
    assert env.changed_params == {"A": [[0.5]]}
    np.testing.assert_array_equal(env.with_transition_gradients().default_params.A, [[0.5]])
    np.testing.assert_array_equal(env.default_params.B, gymnax.make("LQR1-v0")[1].B)
    inner = gymnax.make("Pendulum-v1")[0]
    wrapped = env_params.change("wrapped", purerl.FlattenObservationWrapper(inner), ["g=1"])
    assert wrapped.default_params.g == 1
    assert wrapped.name == inner.name


@pytest.mark.parametrize(
    ("env", "words", "said"),
    [
        (
            "Pendulum-v1",
            "max_step=5",
            "Pendulum-v1 has no parameter max_step; these can be set: .*max_steps_in_episode=200",
        ),
        ("Pendulum-v1", "max_steps_in_episode", "must be NAME=VALUE; these can be set: .*g=10.0"),
        ("Pendulum-v1", "max_steps_in_episode=many", "max_steps_in_episode must be a whole number; these"),
        ("Pendulum-v1", "max_steps_in_episode=1e3", "max_steps_in_episode must be a whole number; these"),
        ("Pendulum-v1", "max_steps_in_episode=true", "max_steps_in_episode must be a whole number; these"),
        ("Pendulum-v1", "max_steps_in_episode=3000000000", "max_steps_in_episode must be a whole number"),
        ("Pendulum-v1", "g=fast", "g must be a finite number; these"),
        ("Pendulum-v1", "g=nan", "g must be a finite number; these"),
        ("Pendulum-v1", "g=1 g=2", "g is given twice"),
        ("PointRobot-misc", "dense_reward=1", "dense_reward must be true or false; these"),
        ("LQR-v0", "A=[[0.9]]", r"A must be a list of shape \[2, 2\] of finite numbers; these"),
        ("LQR-v0", "A=[[0.9],[1,2]]", "A must be a list"),
        ("broken_envs:NoLimit", "max_steps_in_episode=5", ".*must be left alone: a NoneType cannot be set"),
    ],
)
def test_a_parameter_that_does_not_fit_gets_one_line(monkeypatch, capsys, tmp_path, env, words, said):
    line = fails(monkeypatch, capsys, tmp_path / "out", "--env", env, "--env-params", *words.split())
    assert re.match(f"error: --env-params {re.escape(words.split()[0])}: {said}", line)
    assert not (tmp_path / "out").exists()


def test_changed_parameters_are_checked_with_the_environment(monkeypatch, capsys, tmp_path):
    line = fails(monkeypatch, capsys, tmp_path / "out", "--env-params", "max_steps_in_episode=0")
    assert line == "error: --env Pendulum-v1: max_steps_in_episode is 0, expected a number from 1 to 2147483647\n"
    envs.register("Pendulum-v1")


def test_gymnasium_takes_a_time_limit_and_no_other_parameter(capsys):
    envs.register("Pendulum-v1", ["max_steps_in_episode=12"])
    assert play.gymnasium_episode(envs.make_gymnasium("Pendulum-v1"), lambda obs: np.zeros(1), 0)[0] < 0
    assert envs.make_gymnasium("Pendulum-v1").spec.max_episode_steps == 12
    envs.register("Pendulum-v1", ["g=1.5"])
    with pytest.raises(SystemExit):
        envs.make_gymnasium("Pendulum-v1")
    assert "it has no parameters such as this run's g" in capsys.readouterr().err
    envs.register("Pendulum-v1")

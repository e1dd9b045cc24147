"""The player: its returns against hand-made ones, its films frame by frame, and its users' mistakes."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Table, silu
from pages import ROOT
from PIL import Image

from amortax.algorithms import td3
from amortax.common import envs, film, play, policy, record

TINY = {"learning_starts": 16, "batch_size": 8, "steps_per_epoch": 16, "total_steps": 32, "buffer_size": 64}
NUMBER = r"-?\d+\.\d+"


def save_run(folder, config, params, script=td3.__file__):
    """A seed's folder as the runner leaves it."""
    record.write_config(folder, record.describe(script, config, 0))
    policy.save(folder, params)
    return folder


def save_untrained(folder, env):
    """A seed's folder with a policy that has not learned."""
    config = td3.Config(env=env, hidden_sizes=(8,), **TINY)
    shapes = jax.eval_shape(td3.init, config, jax.random.key(0)).params  # to run init would be to compile it
    rng = np.random.default_rng(0)
    return save_run(folder, config, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes))


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """A run folder with one seed, whose policy swings the pendulum up."""
    _, config, params = policy.load(ROOT / "results" / "policies" / "td3" / "Pendulum-v1")
    run = tmp_path_factory.mktemp("runs") / "trained"
    save_run(run / "seed_0", config, params)
    return run


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A seed's folder, not to be written into."""
    return save_untrained(tmp_path_factory.mktemp("runs") / "untrained" / "seed_0", "Pendulum-v1")


@pytest.fixture
def run_play(monkeypatch, capsys):
    """Run the command in this process: `(exit code, stdout, stderr)`."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["play", *map(str, args)])
        code = 0
        try:
            play.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def assert_mistake(result, *parts):
    """Exit code 2, one line on stderr which holds all `parts`, nothing on stdout."""
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    for part in parts:
        assert str(part) in err


def read_film(path):
    """`(seconds, frames)` of a GIF, the frames as bytes `[frames, height, width, 3]`."""
    with Image.open(path) as image:
        assert image.format == "GIF"
        assert image.info["loop"] == 0
        frames, milliseconds = [], 0
        for i in range(image.n_frames):
            image.seek(i)
            milliseconds += image.info["duration"]
            frames.append(np.asarray(image.convert("RGB")))
    return milliseconds / 1000, np.stack(frames)


# Returns


@pytest.mark.parametrize("backend", ["gymnax", "gymnasium"])
def test_line(run_play, untrained, backend):
    code, out, err = run_play(untrained.parent, "--episodes", 7, "--backend", backend)  # the only seed of the group
    assert (code, err) == (0, "")
    pattern = rf"Pendulum-v1 \({backend}\), 7 episodes: return {NUMBER} ± {NUMBER} \(mean ± standard error\)\n"
    assert re.fullmatch(pattern, out)
    assert run_play(untrained, "--episodes", 7, "--backend", backend)[1] == out
    assert run_play(untrained, "--episodes", 7, "--backend", backend, "--seed", 100)[1] != out


@pytest.mark.quick
@pytest.mark.parametrize(
    ("returns", "text"),
    [
        ([-150.0, -140.0], "2 episodes: return -145.0 ± 5.0"),
        ([1.0, 2.0, 3.0, 6.0], "4 episodes: return 3.0 ± 1.1"),
        ([-1234.5678], "1 episode: return -1234.6 ± n/a"),
        ([0.01234, 0.01236], "2 episodes: return 0.012350 ± 0.000010"),
        ([0.01234], "1 episode: return 0.012 ± n/a"),
        ([-5e4, 5e4], "2 episodes: return 0.0 ± 50000.0"),
        ([0.0, 0.0], "2 episodes: return 0.0 ± 0.0"),
        ([np.nan, 1.0], "2 episodes: return nan ± nan"),
    ],
)
def test_summary(returns, text):
    assert play.summarize(np.array(returns)) == text + " (mean ± standard error)"


class FromGymnax(gymnasium.Wrapper):
    """Gymnasium's Pendulum-v1 whose episode of a seed starts where gymnax's of that number does."""

    def reset(self, seed):
        start = play.start(td3.Config(), 0, seed).env_state
        self.env.reset(seed=seed)
        self.unwrapped.state = np.array([start.theta, start.theta_dot], float)
        return self.unwrapped._get_obs(), {}


def test_backends_agree_on_a_trained_policy(pendulum, monkeypatch):
    """The same return for each of eight episodes that start in the same states."""
    module, config, params = policy.load(pendulum / "seed_0")
    ours = np.asarray(play.gymnax_returns(module.act, config, params, 0, jnp.arange(8)))
    make = envs.make_gymnasium
    monkeypatch.setattr(envs, "make_gymnasium", lambda *args: FromGymnax(make(*args)))
    theirs = play.gymnasium_returns(module.act, config, params, 0, 8)
    np.testing.assert_allclose(theirs, ours, rtol=0.01, atol=0.5)
    assert np.ptp(ours) > 100
    assert ours.mean() > -250  # an untrained policy has about -1200


def test_gymnasium_return_by_hand(run_play, pendulum):
    printed = float(re.search(NUMBER, run_play(pendulum, "--episodes", 1, "--seed", 5, "--backend", "gymnasium")[1])[0])
    with np.load(pendulum / "seed_0" / "policy.npz") as file:
        layers = [(file[f"actor/{i}/0"], file[f"actor/{i}/1"]) for i in range(3)]
    env = gymnasium.make("Pendulum-v1")
    obs, _ = env.reset(seed=5)
    total = 0.0
    for _ in range(200):
        x = obs
        for w, b in layers[:-1]:
            x = silu(x @ w + b)
        obs, reward, *_ = env.step(2 * np.tanh(x @ layers[-1][0] + layers[-1][1]))
        total += reward
    assert printed == pytest.approx(total, abs=0.1)


def test_episodes_do_not_depend_on_their_number(untrained, monkeypatch):
    module, config, params = policy.load(untrained)
    few = np.asarray(play.gymnax_returns(module.act, config, params, 3, jnp.arange(4)))
    monkeypatch.setattr(play, "EPISODES_AT_ONCE", 3)
    many = np.asarray(play.gymnax_returns(module.act, config, params, 3, jnp.arange(10)))
    np.testing.assert_allclose(few, many[:4], rtol=1e-4)
    assert len(np.unique(many)) == 10
    few, many = (play.gymnasium_returns(module.act, config, params, 3, n) for n in (2, 4))
    assert few == many[:2]
    assert play.gymnasium_returns(module.act, config, params, 5, 1) == many[2:3]


OWN_ENV = '''
import jax.numpy as jnp
import matplotlib.pyplot as plt
from flax import struct
from gymnax.environments import environment, spaces
from jax import random

@struct.dataclass
class State(environment.EnvState):
    length: int

@struct.dataclass
class Params(environment.EnvParams):
    max_steps_in_episode: int = 4

class Lengths(environment.Environment):
    """Ends by itself after 2, 3, 4 or 5 steps, by the time limit after 4; the reward is the first action."""
    default_params = Params()
    def reset_env(self, key, params):
        state = State(time=0, length=random.randint(key, (), 2, 6))
        return self.get_obs(state), state
    def step_env(self, key, state, action, params):
        state = state.replace(time=state.time + 1)
        return self.get_obs(state), state, action[0, 0], state.time >= state.length, {}
    def get_obs(self, state, params=None, key=None):
        return jnp.array([[state.time, state.length]], int)
    def action_space(self, params):
        return spaces.Box(-1, 1, (1, 2))
    def observation_space(self, params):
        return spaces.Box(0, 5, (1, 2))
    def render(self, state, params):
        figure, axes = plt.subplots(figsize=(2, 1))
        axes.bar(0, state.time)
        return figure, axes
'''

OWN_ALGORITHM = """
import dataclasses
from typing import NamedTuple
import jax
import jax.numpy as jnp

@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    env: str = jax.tree.static(default="play_env:Lengths")
    gain: float = 0.5

class State(NamedTuple):
    params: dict

def init(config, key):
    return State({"action": jnp.array([[1.0, 7.0]])})

def act(config, params, obs):
    return config.gain * params["action"]
"""


def test_own_algorithm_in_own_environment(run_play, tmp_path, monkeypatch):
    """Needs nothing of td3; every return is the number of steps, and no step of the next episode counts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("play_env.py").write_text(OWN_ENV)
    Path("mine.py").write_text(OWN_ALGORITHM)
    module = policy.load_algorithm("mine", Path("mine.py"))
    save_run(tmp_path / "seed_0", module.Config(), module.init(module.Config(), None).params, "mine.py")
    played, summarize = [], play.summarize
    monkeypatch.setattr(play, "summarize", lambda returns: played.append(returns) or summarize(returns))
    code, out, _ = run_play(tmp_path, "--gif", tmp_path / "own.gif", "--episodes", 2000)
    assert code == 0
    steps, total = re.search(rf"own.gif: (\d) frames, return ({NUMBER})", out).groups()
    assert float(total) == int(steps) / 2
    seconds, frames = read_film(tmp_path / "own.gif")
    assert seconds == pytest.approx(int(steps) * 0.05)
    assert frames.shape == (int(steps), 100, 200, 3)  # drawn by the environment's own render
    found, counts = np.unique(played[0], return_counts=True)
    np.testing.assert_array_equal(found, [1.0, 1.5, 2.0])
    np.testing.assert_allclose(counts / 2000, [0.25, 0.25, 0.5], atol=0.05)
    assert_mistake(run_play(tmp_path, "--backend", "gymnasium"), "play_env:Lengths", "Pendulum-v1")


# Films


def assert_film_of_pendulum(path, out, backend):
    """`out` is what one episode printed, `path` its film: the rod has swung up and is above the pivot, on a white page.

    The film is of the very episode whose return is printed.
    """
    line = rf"Pendulum-v1 \({backend}\), 1 episode: return ({NUMBER}) ± n/a \(mean ± standard error\)\n"
    played, filmed = re.fullmatch(rf"{line}{re.escape(str(path))}: 200 frames, return ({NUMBER})\n", out).groups()
    assert float(played) == pytest.approx(float(filmed), rel=1e-3, abs=0.1)
    seconds, frames = read_film(path)
    assert seconds == pytest.approx(200 * 0.05)
    assert frames.shape[1:] == (500, 500, 3)
    assert list(path.parent.iterdir()) == [path]
    np.testing.assert_allclose(frames[-1, 180, 250], (204, 77, 77), atol=16)
    np.testing.assert_allclose(frames[-1, 400, 250], (255, 255, 255), atol=8)


def test_film_of_pendulum(run_play, pendulum, tmp_path):
    path = tmp_path / "new" / "folder" / "film.GIF"
    code, out, err = run_play(pendulum, "--episodes", 1, "--seed", 1, "--gif", path)
    assert (code, err) == (0, "")
    assert_film_of_pendulum(path, out, "gymnax")


def test_film_of_an_environment_without_a_drawing(tmp_path):
    """Curves with a red cursor that moves from the first step to the last."""
    assert not hasattr(Table, "render")
    module, config, params = policy.load(save_untrained(tmp_path / "seed_0", "Table-test"))
    path = tmp_path / "film.gif"
    path.write_bytes(film.encode_gif(play.gymnax_film(module.act, config, params, 0)[1]))
    seconds, frames = read_film(path)
    assert seconds == pytest.approx(5 * 0.05)
    red = (np.abs(frames.astype(int) - (214, 39, 40)) < 24).all(axis=-1).mean(axis=1)  # [frames, columns]
    cursors = red.argmax(axis=1)
    assert (red.max(axis=1) > 0.95).all()
    assert (np.diff(cursors) > 0).all()
    assert np.ptp(cursors) > 300


def draw_three(name):
    """Frames of an environment's first states, one for each of three keys, as bytes `[3, height, width, 3]`."""
    env, env_params = gymnax.make(name)
    reset = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))
    obs, states = jax.device_get(reset(jax.vmap(jax.random.key)(np.arange(3)), env_params))
    states = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(3)]
    frames = film.draw(name, states, obs, np.arange(3.0))
    return np.stack([np.asarray(frame.convert("RGB"), int) for frame in frames])


CLASSIC = [name for name in gymnax.registered_envs if name.endswith(("-v0", "-v1")) and "LQR" not in name]
GRIDS = [name for name in gymnax.registered_envs if name.endswith("-MinAtar")] + ["Catch-bsuite", "DeepSea-bsuite"]
# the others of bsuite, without MNISTBandit-bsuite, which needs a download
VECTORS = [f"{name}-bsuite" for name in ("MemoryChain", "UmbrellaChain", "DiscountingChain", "SimpleBandit")]


@pytest.mark.parametrize("name", [*CLASSIC, *GRIDS, *VECTORS])
def test_every_environment_has_a_film(name):
    """Three frames of one size; only vectors that nobody draws are shown as curves, which have a legend."""
    frames = draw_three(name)
    assert len(frames) == 3
    assert len(np.unique(frames.reshape(-1, 3), axis=0)) > 1
    assert (name in film.GYMNASIUM_STATE) == (name in CLASSIC)


def test_film_of_cartpole_shows_the_cart():
    """The cart is drawn where Gymnasium draws it, in each frame at its own place."""
    env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    state = gymnax.make("CartPole-v1")[0].reset(jax.random.key(0))[1]
    states = [state.replace(x=x, theta=0.1) for x in (-1.0, 1.0)]
    frames = [np.asarray(frame.convert("RGB"), int) for frame in film.draw("CartPole-v1", states, None, None)]
    for x, frame in zip((-1.0, 1.0), frames, strict=True):
        env.reset()
        env.unwrapped.state = (x, 0, 0.1, 0)
        assert (np.abs(frame - env.render()) > 40).mean() < 1e-3
    assert (np.abs(frames[0] - frames[1]) > 40).mean() > 0.01


@pytest.mark.quick
def test_grids_have_a_color_for_each_channel():
    obs = np.zeros((2, 4, 5, 3), bool)
    obs[0, 1, 2, 0] = obs[1, 3, 4, 2] = True
    first, second = (np.asarray(frame.convert("RGB"), int) for frame in film.draw_grids(obs))
    assert first.shape == (320, 400, 3)
    for frame, (row, column), color in ((first, (1, 2), (238, 119, 51)), (second, (3, 4), (51, 187, 238))):
        cells = frame.reshape(4, 80, 5, 80, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(cells[row, column], color, atol=16)
        assert (cells.sum(axis=-1) > 8).sum() == 1


def test_point_robot_draws_itself():
    env, env_params = gymnax.make("PointRobot-misc")
    states = [env.reset(jax.random.key(seed), env_params)[1] for seed in (0, 1)]
    first, second = (np.asarray(film.draw_itself(env, env_params, state).convert("RGB"), int) for state in states)
    assert (np.abs(first - second) > 40).mean() > 1e-3


def test_film_of_mountain_car_shows_the_state():
    """The car is drawn where Gymnasium draws it."""
    env = gymnasium.make("MountainCarContinuous-v0", render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    state = gymnax.make("MountainCarContinuous-v0")[0].reset(jax.random.key(0))[1]
    frame = film.draw_as_gymnasium("MountainCarContinuous-v0", [state.replace(position=obs[0], velocity=obs[1])])[0]
    difference = np.abs(np.asarray(frame.convert("RGB"), int) - env.render())
    assert (difference > 40).mean() < 1e-3


def test_film_that_cannot_be_written(run_play, untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(play, "gymnax_film", lambda *args: (0.0, [Image.new("P", (1, 1))]))
    (tmp_path / "file").write_text("")
    code, out, err = run_play(untrained, "--episodes", 1, "--gif", tmp_path / "file" / "film.gif")
    assert (code, err.count("\n"), out.count("\n")) == (2, 1, 1)
    assert f"--gif {tmp_path}/file/film.gif: cannot write" in err


# Mistakes


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--episodes", "0"], ["--episodes 0", "1 to"]),
        (["--episodes", "few"], ["--episodes", "few"]),
        (["--seed", "-1"], ["--seed -1", "0 to"]),
        (["--backend", "brax"], ["--backend", "brax", "gymnax", "gymnasium"]),
        (["--gif", "film.png"], ["--gif film.png", ".gif"]),
        (["--gif", "gif"], ["--gif gif", ".gif"]),
        (["--episode", "3"], ["--episode", "--episodes"]),
    ],
)
def test_bad_flag(run_play, untrained, tmp_path, monkeypatch, args, parts):
    monkeypatch.chdir(tmp_path)
    assert_mistake(run_play(untrained, *args), *parts)
    assert not list(tmp_path.iterdir())


def test_no_such_run(run_play, tmp_path):
    assert_mistake(run_play(tmp_path / "nowhere"), tmp_path / "nowhere")
    assert_mistake(run_play(tmp_path), tmp_path, "no run here")
    assert_mistake(run_play(), "RUN")


def test_which_seed(run_play, untrained, tmp_path):
    shutil.copytree(untrained, tmp_path / "seed_9")
    assert policy.find_seed(tmp_path) == tmp_path / "seed_9"
    shutil.copytree(untrained, tmp_path / "seed_10")
    assert_mistake(run_play(tmp_path), f"2 seeds; choose one: {tmp_path}/seed_9, {tmp_path}/seed_10")
    assert policy.find_seed(tmp_path / "seed_10") == tmp_path / "seed_10"


def npz(**arrays):
    """The bytes of an npz file."""
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (None, "no policy saved yet"),
        (lambda good: good[: len(good) // 2], "truncated"),
        (lambda good: good[:-1], "truncated"),
        (lambda good: b"", "truncated"),
        (lambda good: npz(weights=np.zeros(3)), "must hold the arrays actor/0/0"),
        (lambda good: npz(**{"actor/0/0": np.array([{}], object)}), "not a policy"),
    ],
    ids=["none", "half", "byte", "empty", "foreign", "pickle"],
)
def test_bad_policy_file(run_play, untrained, tmp_path, spoil, part):
    shutil.copytree(untrained, tmp_path / "seed_0")
    path = tmp_path / "seed_0" / "policy.npz"
    good = path.read_bytes()
    path.unlink()
    if spoil:
        path.write_bytes(spoil(good))
    assert_mistake(run_play(tmp_path), path, part)


@pytest.mark.parametrize("x64", [False, True])
def test_policy_of_another_precision_or_key_type(run_play, untrained, tmp_path, x64):
    """It is played in the precision of the player, up to rounding alike; float64 is said to be another."""
    expected = run_play(untrained, "--episodes", 2)[1]
    config = td3.Config(env="Pendulum-v1", hidden_sizes=(8,), **TINY)
    learned = jax.tree.leaves(policy.load(untrained)[2])
    with jax.enable_x64(x64), jax.default_prng_impl("rbg"):
        shapes = jax.eval_shape(td3.init, config, jax.random.key(0)).params
        same = jax.tree.unflatten(jax.tree.structure(shapes), learned)
        folder = save_run(tmp_path / "seed_0", config, jax.tree.map(lambda x, y: np.asarray(x, y.dtype), same, shapes))
    code, out, err = run_play(folder, "--episodes", 2)
    assert (code, out) == (0, expected)
    note = f"note: {folder / 'policy.npz'} was trained in float64, here float32\n"
    assert err == (note if x64 else "")


def test_an_exception_from_inside_the_environment_gets_one_line(run_play, tmp_path):
    """In the third step of an episode, after the check of the contract; `--traceback` shows all of it."""
    env = "broken_envs:host_fails_in_the_third_step"
    envs.register(env)
    folder = save_untrained(tmp_path / "seed_0", env)
    assert_mistake(run_play(folder), f"--env {env}: ", "is gone")
    code, out, err = run_play(folder, "--traceback")
    assert (code, out) == (2, "")
    assert err.count("\n") > 10
    assert "is gone" in err.splitlines()[-1]


def test_policy_that_does_not_fit(run_play, untrained, tmp_path):
    folder = shutil.copytree(untrained, tmp_path / "seed_0")
    params = policy.load(untrained)[2]
    policy.save(folder, jax.tree.map(lambda x: np.zeros((*x.shape, 2), np.float32), params))
    assert_mistake(run_play(folder), "policy.npz", "must be float32")
    policy.save(folder, jax.tree.map(lambda x: np.full_like(x, np.nan), params))
    assert_mistake(run_play(folder), "policy.npz", "diverged")
    description = json.loads((folder / "config.json").read_text())
    record.write_config(folder, {"algorithm": description["algorithm"]})
    assert_mistake(run_play(folder), "config.json", "describes no run")
    (folder / "config.json").write_text("{")
    assert_mistake(run_play(folder), "config.json", "no run here")


def test_environment_that_gymnasium_does_not_have(run_play, tmp_path, monkeypatch):
    folder = save_untrained(tmp_path / "seed_0", "Reacher-misc")
    both = "environments in both: Pendulum-v1, MountainCarContinuous-v0"
    assert_mistake(run_play(folder, "--backend", "gymnasium"), "--backend gymnasium", "Reacher-misc", both)
    # the same name, another environment
    other = gymnasium.envs.registration.EnvSpec("Reacher-misc", gymnasium.spec("Pendulum-v1").entry_point)
    monkeypatch.setitem(gymnasium.registry, "Reacher-misc", other)
    assert_mistake(run_play(folder, "--backend", "gymnasium"), "Reacher-misc", "shape (3,) there, (8,) in gymnax")


# The command itself


def test_command(pendulum, tmp_path):
    """From any folder, on a machine without a screen: the two lines, and nothing from pygame or ALSA."""
    path = tmp_path / "film" / "film.gif"
    args = pendulum, "--episodes", 1, "--seed", 1, "--backend", "gymnasium", "--gif", path
    command = [sys.executable, "-m", "amortax.common.play", *map(str, args)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"DISPLAY": ""}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert_film_of_pendulum(path, done.stdout, "gymnasium")


def test_help(run_play):
    code, out, _ = run_play("--help")
    assert code == 0
    for word in ("RUN", "--episodes", "--seed", "--backend {gymnax,gymnasium}", "--gif", "folder of a seed"):
        assert word in out

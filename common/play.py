"""Play a saved policy: its return over whole episodes, in gymnax or in Gymnasium, and a film of one of them.

    python -m common.play results/runs/td3/Pendulum-v1/default/seed_0 --gif pendulum.gif

Of an algorithm's module it needs `Config` and `act` only. Episode `i` of `--seed s` is the same whatever `--episodes`
is, and the film shows episode 0.
"""

import contextlib
import dataclasses
import functools
import io
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax, random
from PIL import Image

from common import cli, record

FRAME_MS = 50  # a frame for each step; Pendulum-v1 then moves in real time
EPISODES_AT_ONCE = 1024  # gymnax episodes side by side: it bounds the memory

# what Gymnasium draws from, as gymnax names it
GYMNASIUM_STATE = {"Pendulum-v1": ("theta", "theta_dot"), "MountainCarContinuous-v0": ("position", "velocity")}


@dataclasses.dataclass(frozen=True)
class Play:
    """Play a saved policy, greedily: print the mean of its undiscounted returns, and film an episode."""

    # folder of a seed (.../seed_0), or of a run that has one seed only
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    episodes: int = 100  # whole episodes to play, 1 or more
    seed: int = 0  # of the episodes, 0 or more; Gymnasium gets seed + i for episode i
    backend: Literal["gymnax", "gymnasium"] = "gymnax"  # whose version of the environment to play in
    gif: Path | None = None  # film the first episode into this file, which ends in .gif


class Episode(NamedTuple):
    """A gymnax episode under way."""

    key: jax.Array  # [] random key
    obs: jax.Array  # [...]
    env_state: Any
    total: jax.Array  # [], sum of rewards so far
    ended: jax.Array  # [] bool; obs and env_state then belong to another episode


def main():
    """Command line: `python -m common.play RUN`."""
    play = cli.parse(Play, prog="python -m common.play")
    cli.check_value("episodes", play.episodes)
    if not 0 <= play.seed <= cli.INT_MAX:
        cli.fail(f"--seed {play.seed}: must be from 0 to {cli.INT_MAX}")
    if play.gif and (play.gif.suffix.lower() != ".gif" or play.gif.is_dir()):
        cli.fail(f"--gif {play.gif}: must be a file that ends in .gif")
    module, config, params = record.load_policy(find_seed(play.run))
    if play.backend == "gymnax":
        returns = gymnax_returns(module.act, config, params, play.seed, jnp.arange(play.episodes))
    else:
        returns = gymnasium_returns(module.act, config, params, play.seed, play.episodes)
    print(f"{config.env} ({play.backend}), {summarize(np.asarray(returns, np.float64))}", flush=True)
    if play.gif:
        film = gymnax_film if play.backend == "gymnax" else gymnasium_film
        total, frames = film(module.act, config, params, play.seed)
        try:
            record.write_atomic(play.gif, encode_gif(frames))
        except OSError as error:
            cli.fail(f"--gif {play.gif}: cannot write there: {error}")
        print(f"{play.gif}: {len(frames)} steps, return {total:.{decimals(abs(total))}f}")


def find_seed(run):
    """The folder of a seed: `run` itself, or the only one in it."""
    if not run.is_dir():
        cli.fail(f"{run}: no such folder")
    seeds = sorted(run.glob("seed_*"), key=lambda path: (len(path.name), path.name))
    if len(seeds) > 1 and not (run / "config.json").exists():
        cli.fail(f"{run}: holds {len(seeds)} seeds; choose one: {', '.join(str(path) for path in seeds)}")
    return seeds[0] if len(seeds) == 1 else run


def summarize(returns):
    """`returns [n]` as text: their mean and its standard error."""
    n, mean = len(returns), returns.mean()
    error = returns.std(ddof=1) / math.sqrt(n) if n > 1 else None
    places = decimals(error or abs(mean))
    shown = "n/a" if error is None else f"{error:.{places}f}"
    return f"{n} episode{'s' * (n > 1)}: return {mean:.{places}f} ± {shown} (mean ± standard error)"


def decimals(scale):
    """How many decimals show two digits of `scale >= 0`: from 1 to 6."""
    return min(6, max(1, 1 - math.floor(math.log10(scale)))) if 0 < scale < math.inf else 1


# gymnax


def start(config, seed, i):
    """Episode `i` before its first step."""
    env, env_params = gymnax.make(config.env)
    key, key_reset = random.split(random.fold_in(random.key(seed), i))
    obs, env_state = env.reset(key_reset, env_params)
    return Episode(key, obs, env_state, jnp.zeros(()), jnp.array(False))


def step(act, config, params, episode):
    """The episode one greedy action later."""
    env, env_params = gymnax.make(config.env)
    key, key_step = random.split(episode.key)
    action = act(config, params, episode.obs)
    obs, env_state, reward, terminated, truncated, _ = env.step(key_step, episode.env_state, action, env_params)
    return Episode(key, obs, env_state, episode.total + reward, terminated | truncated)


@functools.partial(jax.jit, static_argnums=0)
def gymnax_returns(act, config, params, seed, episodes):
    """Undiscounted returns `[n]` of the episodes numbered `episodes [n]`."""

    def play(i):
        one_step = functools.partial(step, act, config, params)
        return lax.while_loop(lambda episode: ~episode.ended, one_step, start(config, seed, i)).total

    return lax.map(play, episodes, batch_size=EPISODES_AT_ONCE)


def gymnax_episode(act, config, params, seed):
    """Episode 0 after each of its steps: `[Episode]`, on the host and without keys."""
    one_step = functools.partial(jax.jit(step, static_argnums=0), act, config, jax.device_put(params))
    episodes = [start(config, seed, 0)]
    while not episodes[-1].ended:
        episodes.append(one_step(episodes[-1]))
    return jax.device_get([episode._replace(key=None) for episode in episodes])


def gymnax_film(act, config, params, seed):
    """Episode 0 as `(return, frames)`."""
    *shown, last = gymnax_episode(act, config, params, seed)
    env, env_params = gymnax.make(config.env)
    if config.env in GYMNASIUM_STATE:
        frames = draw_as_gymnasium(config.env, [episode.env_state for episode in shown])
    elif hasattr(env, "render"):
        frames = [draw_itself(env, env_params, episode.env_state) for episode in shown]
    else:
        rewards = np.diff([episode.total for episode in (*shown, last)])
        frames = draw_observations(config.env, np.stack([episode.obs for episode in shown]), rewards)
    return float(last.total), frames


def draw_as_gymnasium(name, env_states):
    """Frames of gymnax states, drawn by Gymnasium's environment of the same name."""
    env = make_gymnasium(name, "rgb_array")
    env.reset()
    frames = []
    for env_state in env_states:
        env.unwrapped.state = np.array([getattr(env_state, field) for field in GYMNASIUM_STATE[name]], float)
        env.unwrapped.last_u = getattr(env_state, "last_u", None)  # the torque, which Pendulum-v1 draws as an arrow
        frames.append(to_frame(env.render()))
    env.close()
    return frames


def draw_itself(env, env_params, env_state):
    """Frame by the environment's own `render(state, env_params) -> (figure, axes)`, as PointRobot-misc has it."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")  # there may be no screen
    figure, _ = env.render(env_state, env_params)
    figure.canvas.draw()
    frame = to_frame(np.array(figure.canvas.buffer_rgba())[..., :3])
    plt.close(figure)
    return frame


def draw_observations(name, obs, rewards):
    """Frames of an environment without a drawing: curves of `obs [n, ...]` and `rewards [n]`, a cursor moving on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    lines = upper.plot(obs.reshape(len(obs), -1))[:12]  # more would not fit into the legend
    upper.legend(lines, range(len(lines)), fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    upper.set(title=name, ylabel="observation")
    lower.plot(rewards, color="black")
    lower.set(xlabel="step", ylabel="reward")
    canvas.draw()
    page = np.array(canvas.buffer_rgba())[..., :3]
    frames = []
    for i in range(len(obs)):  # the page is drawn once: only the cursor differs between frames
        frame, x = page.copy(), round(float(lower.transData.transform((i, 0))[0]))
        frame[:, x : x + 2] = (214, 39, 40)
        frames.append(to_frame(frame))
    return frames


# Gymnasium


def make_gymnasium(name, render_mode=None):
    """Gymnasium's environment of the same name; fails where there is none or where it is another one."""
    if name not in gymnasium.registry:
        known = [x for x in gymnax.registered_envs if x in gymnasium.registry and cli.has_box_actions(x)]
        cli.fail(f"--backend gymnasium: it has no {name}; environments in both: {', '.join(known)}")
    # pygame draws: without a window, a sound device or a greeting on stdout
    for variable in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER", "PYGAME_HIDE_SUPPORT_PROMPT"):
        os.environ.setdefault(variable, "dummy")
    env = gymnasium.make(name, render_mode=render_mode, disable_env_checker=True)
    other, other_params = gymnax.make(name)
    for kind in ("observation_space", "action_space"):
        ours, theirs = getattr(other, kind)(other_params).shape, getattr(env, kind).shape
        if ours != theirs:
            what = kind.replace("_space", "s")
            cli.fail(f"--backend gymnasium: {name} has {what} of shape {theirs} there, {ours} in gymnax")
    return env


def gymnasium_episode(env, act, seed):
    """Play an episode: `(return, frames)`; no frames where `env` does not render."""
    obs, _ = env.reset(seed=seed)
    total, ended, frames = 0.0, False, []
    while not ended:
        if env.render_mode:
            frames.append(to_frame(env.render()))
        obs, reward, terminated, truncated, _ = env.step(np.asarray(act(obs)))
        total, ended = total + float(reward), terminated or truncated
    return total, frames


def compile_act(act, config, params):
    """The policy as `obs -> action`, on the CPU: with one observation at a time a GPU would mostly wait."""
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave no CPU
        params = jax.device_put(params, jax.local_devices(backend="cpu")[0])
    return functools.partial(jax.jit(act), config, params)


def gymnasium_returns(act, config, params, seed, episodes):
    """Undiscounted returns `[episodes]`."""
    env, greedy = make_gymnasium(config.env), compile_act(act, config, params)
    return [gymnasium_episode(env, greedy, seed + i)[0] for i in range(episodes)]


def gymnasium_film(act, config, params, seed):
    """Episode 0 as `(return, frames)`."""
    return gymnasium_episode(make_gymnasium(config.env, "rgb_array"), compile_act(act, config, params), seed)


# GIF


def to_frame(pixels):
    """Bytes `[height, width, 3]` as an image of 32 colours: a third of the memory of all the frames."""
    # by octree: Pillow's default, median cut, takes six times as long
    return Image.fromarray(pixels).quantize(32, method=Image.Quantize.FASTOCTREE)


def encode_gif(frames):
    """The bytes of an endless GIF; frames that repeat are merged into a longer one."""
    data = io.BytesIO()
    frames[0].save(data, format="GIF", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    return data.getvalue()


if __name__ == "__main__":
    from common.devices import set_up_backend

    set_up_backend()
    main()

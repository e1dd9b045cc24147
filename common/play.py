"""Play a saved policy: its return over whole episodes, in gymnax or in Gymnasium, and a film of one of them.

    python -m amortax.common.play results/runs/td3/Pendulum-v1/default/seed_0 --gif pendulum.gif

It uses `Config`, `init` and `act` of an algorithm's module. Episode `i` of `--seed s` does not depend on `--episodes`,
and the film shows episode 0.
"""

import contextlib
import dataclasses
import functools
import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax, random

from amortax.common import cli, contract, envs, film, policy, record

EPISODES_AT_ONCE = 1024  # gymnax episodes in parallel: it bounds the memory


@dataclasses.dataclass(frozen=True)
class Play:
    """Play a saved policy greedily: print the mean of its undiscounted returns, and film an episode."""

    # folder of a seed (.../seed_0), or of a group with a single seed
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    which: Literal["last", "best"] = "last"  # the last policy, or the one of the best evaluation while it trained
    episodes: Annotated[int, ">= 1"] = 100  # whole episodes to play
    seed: Annotated[int, ">= 0"] = 0  # of the episodes; Gymnasium gets seed + i for episode i
    backend: Literal["gymnax", "gymnasium"] = "gymnax"  # whose implementation of the environment to use
    gif: cli.OptionalPath = None  # film the first episode into this file, which ends in .gif
    traceback: bool = False  # show all of an exception from inside the environment, which gets one line otherwise


class Episode(NamedTuple):
    """A gymnax episode in progress."""

    key: jax.Array  # [] random key
    obs: jax.Array  # [...]
    env_state: Any
    total: jax.Array  # [], sum of rewards so far
    steps_left: jax.Array  # []
    ended: jax.Array  # [] bool; obs and env_state then belong to another episode


def main():
    """Command line: `amortax play RUN`, or `python -m amortax.common.play RUN`."""
    cli.show_warnings()
    cli.show_rules(Play)
    play = cli.parse(Play, prog="amortax play")
    cli.check_range("episodes", play.episodes, 1, cli.INT_MAX)
    cli.check_range("seed", play.seed, 0, cli.INT_MAX)
    if play.gif and (play.gif.suffix.lower() != ".gif" or play.gif.is_dir()):
        cli.fail(f"--gif {play.gif}: must be a file that ends in .gif")
    module, config, params = policy.load(policy.find_seed(play.run), play.which, play.traceback)
    try:
        show(play, module, config, params)
    except Exception as error:
        inside_env = envs.explain(config.env, error, play.traceback)
        if not inside_env:
            raise
        cli.fail(inside_env)


def show(play, module, config, params):
    """Print the returns of the episodes, and write the film."""
    if play.backend == "gymnax":
        returns = gymnax_returns(module.act, config, params, play.seed, jnp.arange(play.episodes))
    else:
        returns = gymnasium_returns(module.act, config, params, play.seed, play.episodes)
    print(f"{config.env} ({play.backend}), {summarize(np.asarray(returns, np.float64))}", flush=True)
    if play.gif:
        make_film = gymnax_film if play.backend == "gymnax" else gymnasium_film
        total, frames = make_film(module.act, config, params, play.seed)
        try:
            record.write_atomic(play.gif, film.encode_gif(frames))
        except OSError as error:
            cli.fail(f"--gif {play.gif}: cannot write there: {error}")
        print(f"{play.gif}: {len(frames)} frames, return {total:.{decimals(abs(total))}f}")


def summarize(returns):
    """`returns [n]` as text: their mean and its standard error."""
    n, mean = len(returns), returns.mean()
    error = returns.std(ddof=1) / math.sqrt(n) if n > 1 else None
    places = decimals(error or abs(mean))
    shown = "n/a" if error is None else f"{error:.{places}f}"
    return f"{n} episode{'s' * (n > 1)}: return {mean:.{places}f} ± {shown} (mean ± standard error)"


def decimals(scale):
    """How many decimals, from 1 to 6, show two digits of `scale >= 0`."""
    return min(6, max(1, 1 - math.floor(math.log10(scale)))) if 0 < scale < math.inf else 1


# gymnax


def start(config, seed, i):
    """Episode `i` before its first step."""
    env, env_params = gymnax.make(config.env)
    key, key_reset = random.split(random.fold_in(random.key(seed), i))
    obs, env_state = env.reset(key_reset, env_params)
    return Episode(key, obs, env_state, jnp.zeros(()), jnp.int32(contract.max_steps(env_params)), jnp.array(False))


def step(act, config, params, episode):
    """The episode one greedy action later."""
    env, env_params = gymnax.make(config.env)
    key, key_step = random.split(episode.key)
    action = act(config, params, episode.obs)
    obs, env_state, reward, terminated, truncated, _ = env.step(key_step, episode.env_state, action, env_params)
    ended = terminated | truncated | (episode.steps_left <= 1)
    return Episode(key, obs, env_state, episode.total + reward, episode.steps_left - 1, ended)


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
    rewards = np.diff([episode.total for episode in (*shown, last)])
    obs = np.stack([episode.obs for episode in shown])
    frames = film.draw(config.env, [episode.env_state for episode in shown], obs, rewards)
    return float(last.total), frames


# Gymnasium


def gymnasium_episode(env, act, seed):
    """Play an episode: `(return, frames)`, without frames where `env` does not render."""
    obs, _ = env.reset(seed=seed)
    total, ended, frames = 0.0, False, []
    while not ended:
        if env.render_mode:
            frames.append(film.to_frame(env.render()))
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
    env, greedy = envs.make_gymnasium(config.env), compile_act(act, config, params)
    return [gymnasium_episode(env, greedy, seed + i)[0] for i in range(episodes)]


def gymnasium_film(act, config, params, seed):
    """Episode 0 as `(return, frames)`."""
    return gymnasium_episode(envs.make_gymnasium(config.env, "rgb_array"), compile_act(act, config, params), seed)


if __name__ == "__main__":
    from amortax.common.devices import set_up_backend

    set_up_backend()
    main()

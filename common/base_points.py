"""Base points of fitted Q-iteration in a file: transitions from anywhere, with actions in the environment's units.

The file is what `numpy.savez(path, obs=..., action=..., reward=..., next_obs=..., terminated=...)` writes, from arrays
of leading axis [n]; others in it are ignored.
"""

from typing import NamedTuple

import gymnax
import jax
import numpy as np

from amortax.common import cli, distributed, record

TOLERANCE = 1e-5  # by how much an action may exceed its bounds, relative to their distance: files round


class BasePoints(NamedTuple):
    """Transitions in the form of the algorithms; in a file each array may have any shape of the same size."""

    obs: np.ndarray  # [n, obs_dim]
    action: np.ndarray  # [n, action_dim], in [-1, 1], or codes of Discrete actions
    reward: np.ndarray  # [n]
    next_obs: np.ndarray  # [n, obs_dim], before any reset
    terminated: np.ndarray  # [n], 0 at a time limit


def load_and_save(data, options, config, init):
    """The base points of `--base-points` as a list of further arguments of `init`; obeys `--save-base-points`."""
    points = [load(data.base_points, config.env)] if data.base_points else []
    if data.save_base_points and not options.resume:
        state = jax.jit(init)(config, jax.random.key(options.seed), *points)
        save(data.save_base_points, config.env, state.base_points, int(state.step))
    return points


def load(path, env_name):
    """The base points in a file; fails at the first mistake in it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # a file can be wrong in any way
        cli.fail(f"--base-points {path}: cannot be read as an .npz file: {error}")
    if not set(BasePoints._fields) <= set(arrays):
        cli.fail(f"--base-points {path}: must hold {', '.join(BasePoints._fields)}; it holds {', '.join(arrays)}")
    points = BasePoints(*(arrays[name] for name in BasePoints._fields))
    mistake = next(mistakes(points, env_name), None)
    if mistake:
        cli.fail(f"--base-points {path}: {mistake}")
    obs, action, reward, next_obs, terminated = (x.reshape(len(x), -1).astype(np.float32) for x in points)
    n = num_categories(env_name)
    obs, next_obs = (np.eye(n, dtype=np.float32)[x[:, 0].astype(int)] if n else x for x in (obs, next_obs))
    return BasePoints(obs, encode(action, action_space(env_name)), reward[:, 0], next_obs, terminated[:, 0])


def mistakes(points, env_name):
    """Yield the mistakes in the arrays of a file, each after those that it takes to be absent."""
    env, env_params = gymnax.make(env_name)
    obs_dim = jax.eval_shape(env.reset, jax.random.key(0), env_params)[0].size
    low, high, discrete = bounds(action_space(env_name))
    n = points.reward.size
    if not n:
        yield "must hold at least one transition"
    for name, x, size in zip(points._fields, points, (obs_dim, len(low), 1, obs_dim, 1), strict=True):
        if x.dtype.kind not in "biuf":
            yield f"{name} must hold numbers, not {x.dtype}"
        if x.shape[:1] != (n,) or x.size != n * size:
            yield f"{name} must have shape {[n, size] if size > 1 else [n]} for {env_name}, not {list(x.shape)}"
    points = BasePoints(*(x.reshape(n, -1).astype(np.float32) for x in points))
    wrong = {name: ~np.isfinite(x).all(axis=1) for name, x in points._asdict().items()}
    wrong["next_obs"] &= points.terminated[:, 0] != 1  # nothing is learned from it otherwise
    for name, rows in wrong.items():
        if rows.any():
            yield f"{name} must be finite; it is not in row {rows.argmax()}"
    categories = num_categories(env_name)
    for name, x in (("obs", points.obs), ("next_obs", points.next_obs)) if categories else ():
        if not np.isin(x, np.arange(categories)).all():
            yield f"{name} must be whole numbers from 0 to {categories - 1}, the observations of {env_name}"
    if not np.isin(points.terminated, (0, 1)).all():
        yield "terminated must be 0 or 1"
    slack = TOLERANCE * (high - low)
    wrong = (points.action < low - slack) | (points.action > high + slack) | (discrete & (points.action % 1 != 0))
    if wrong.any():
        row = wrong.any(axis=1).argmax()
        first, last, found = (", ".join(f"{x:g}" for x in values) for values in (low, high, points.action[row]))
        kind = "a whole number " if discrete else ""
        yield f"action must be {kind}from ({first}) to ({last}), the bounds of {env_name}; row {row} is ({found})"


def num_categories(env_name):
    """The number of Discrete observations of a gymnax environment; 0 for all others."""
    env, env_params = gymnax.make(env_name)
    obs = jax.eval_shape(env.reset, jax.random.key(0), env_params)[0]
    one_of_n = obs.ndim == 0 and jax.numpy.issubdtype(obs.dtype, jax.numpy.integer)
    return env.observation_space(env_params).n if one_of_n else 0


def action_space(env_name):
    """The action space of a gymnax environment."""
    env, env_params = gymnax.make(env_name)
    return env.action_space(env_params)


def bounds(space):
    """The least and the greatest action, flat, and whether actions are Discrete."""
    if hasattr(space, "n"):
        return np.zeros(1), np.full(1, space.n - 1), True
    low, high = (np.broadcast_to(x, space.shape).ravel() for x in (space.low, space.high))
    return low, high, False


def encode(action, space):
    """Actions `[n, action_dim]` in [-1, 1], or codes, from those in the environment's units, flat."""
    low, high, discrete = bounds(space)
    if discrete:
        return 2 * np.eye(space.n, dtype=np.float32)[action[:, 0].astype(int)] - 1
    return np.clip(2 * (action - low) / (high - low) - 1, -1, 1).astype(np.float32)


def decode(action, space):
    """Actions in the environment's units and shape, from those `[n, action_dim]` in [-1, 1], or codes."""
    low, high, discrete = bounds(space)
    if discrete:
        return action.argmax(axis=1)
    return (low + (action + 1) / 2 * (high - low)).reshape(-1, *space.shape).astype(np.float32)


def save(path, env_name, points, num):
    """Write the first `num` base points to a new file; fails where it cannot be written."""
    if path.suffix != ".npz":
        cli.fail(f"--save-base-points {path}: must be a file that ends in .npz")
    points = BasePoints(*(np.asarray(x)[:num] for x in points))
    action, terminated = decode(points.action, action_space(env_name)), points.terminated > 0
    coded = {"obs": points.obs, "next_obs": points.next_obs} if num_categories(env_name) else {}
    codes = {name: x.argmax(axis=1) for name, x in coded.items()}
    problem = "it exists" if distributed.is_first() and path.exists() else ""
    if distributed.is_first() and not problem:
        try:
            record.write_arrays(path, points._replace(action=action, terminated=terminated, **codes)._asdict())
        except OSError as error:
            problem = str(error)
    if any(distributed.any_process(problem != "")):
        cli.fail(f"--save-base-points {path}: cannot write there: {problem or 'see process 0'}")
    distributed.print_once(f"{path}: {len(points.reward):,} base points")

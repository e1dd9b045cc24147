"""Divergence: whether a run is finite, and which of its quantities was the first that is not."""

import contextlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from amortax.common import record

announced = set()  # folders of the runs whose divergence this process has printed


def losses(metrics):
    """The losses and the objective among the metrics by name."""
    return {name: value for name, value in metrics._asdict().items() if "loss" in name or name == "objective"}


def is_finite(state, metrics):
    """Whether parameters, losses and, where the state has them, current observations are; traced, in the program."""
    watched = state.params, losses(metrics), getattr(state, "obs", ())
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(watched)]).all()


def first_quantity(algorithm, config, state, metrics):
    """What was the first to be non-finite in a run that is not: "reward is", "parameters are", ...

    `algorithm` holds the functions of the algorithm's file by name.
    """
    with contextlib.suppress(Exception):  # a user's file may store otherwise: its losses are named then
        quantity = of_environment(*transitions(algorithm, config, state))
        if quantity:
            return quantity
    named = {name: value for name, value in losses(metrics).items() if not np.isfinite(value).all()}
    if named and set(losses(metrics)) == {"objective"}:  # a sum of rewards, of whose gradients only finite ones count
        return "reward is"
    return f"loss ({', '.join(named)}) is" if named else "parameters are"


def transitions(algorithm, config, state):
    """The transitions that a state holds, leading axis [n], and whether the environment was given finite numbers [n].

    Where it holds none, one step of each of its environments, with actions of zero.
    """
    if hasattr(state, "buffer"):
        known = algorithm["read"](config, state.buffer, jnp.arange(min(int(state.step), len(state.buffer))))
    elif hasattr(state, "base_points"):
        known = state.base_points
    else:
        env, num_envs = algorithm["make_env"](config.env), len(state.obs)
        keys = jax.random.split(jax.random.key(0), num_envs)
        outcome = jax.vmap(env.step)(state.env_state, jnp.zeros((num_envs, env.action_dim)), keys)
        return *outcome[2:5], rows_finite(num_envs, *jax.tree.leaves(state.env_state))
    return known.reward, known.next_obs, known.terminated, rows_finite(len(known.reward), known.obs, known.action)


def rows_finite(n, *arrays):
    """Whether all arrays are finite in each of their `n` rows."""
    return np.all([np.isfinite(np.asarray(x)).reshape(n, -1).all(axis=1) for x in arrays if x.size], axis=0)


def of_environment(reward, next_obs, terminated, given):
    """Whether the environment answered finite numbers with a reward or observation that is not; None if neither."""
    if (given & ~np.isfinite(reward)).any():
        return "reward is"
    # the last observation of a terminated episode is never used
    if (given & ~rows_finite(len(given), next_obs) & (np.asarray(terminated) == 0)).any():
        return "observation is"
    return None


def announce(run, runs, reason, row):
    """Print that a run, one of `runs`, has diverged; `row` is its last one."""
    where = f" of {run.group.name}" if len({other.group for other in runs}) > 1 else ""
    print(f"seed {run.seed}{where} diverged{reason} after {record.amount(row)}", file=sys.stderr)
    announced.add(run.folder)

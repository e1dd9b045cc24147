"""Optimal mean returns on Pendulum-v1 and MountainCarContinuous-v0, by dynamic programming.

Backward induction (Bellman, "Dynamic Programming", 1957; Bertsekas, "Dynamic Programming and Optimal Control", volume
I, chapter 1) over a grid of states and actions, with linear interpolation between the states:

    V_0(s) = 0,    V_k(s) = max_a [r(s, a) + (0 if s' is terminal, else V_{k-1}(s'))],    s' = f(s, a)

k counts the steps to go, up to the time limit; r and f are the environment's own `step_env`; there is no discount.
`dp_value` is the mean of V over the starts; interpolation biases it downwards where V is concave, upwards where V is
convex. `return` is the mean return of the greedy policy of V in the environment itself: up to sampling error, a lower
bound of the optimum. It is estimated as `dp_value`, over very many starts, plus the mean of return - V(start) over the
episodes, which varies less than a return; `standard_error` is that of the sum.
"""

from functools import partial
from typing import NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from experiments import study
from experiments.study import Experiment


class Axis(NamedTuple):  # the grid's points are spread evenly from low to high, both included
    field: str  # of the environment's state
    low: float
    high: float
    periodic: bool = False


AXES = {
    "Pendulum-v1": (Axis("theta", -np.pi, np.pi, periodic=True), Axis("theta_dot", -8.0, 8.0)),
    "MountainCarContinuous-v0": (Axis("position", -1.2, 0.45), Axis("velocity", -0.07, 0.07)),  # up to the goal
}
SMALL = (51, 11), (101, 11)  # points of each axis, actions
BIG = {"Pendulum-v1": ((301, 21), (601, 21), (1201, 21)), "MountainCarContinuous-v0": ((151, 41), (301, 41), (601, 41))}


def action_grid(env, params, num_actions):
    """Actions `[num_actions]` from bound to bound, denser around zero, where the mountain car's best actions are."""
    u = jnp.linspace(-1, 1, num_actions)
    return float(np.max(env.action_space(params).high)) * u * jnp.abs(u)


def locate(axes, num_points, state):
    """`state [...]` in the grid: flat index `[...]` of its cell's lowest corner, and two positions within, `[...]`."""

    def locate_on(axis):
        u = (getattr(state, axis.field) - axis.low) / (axis.high - axis.low)
        u = (u % 1 if axis.periodic else jnp.clip(u, 0, 1)) * (num_points - 1)
        cell = jnp.minimum(jnp.floor(u), num_points - 2)
        return cell.astype(int), u - cell

    (i, x), (j, y) = map(locate_on, axes)
    return i * num_points + j, x, y


def interpolate(values, num_points, index, x, y):
    """Bilinear interpolation of `values [num_points**2]` at a result of `locate`: `[...]`."""
    corner = lambda offset: values.at[index + offset].get(mode="promise_in_bounds")
    near, far = ((1 - y) * corner(k) + y * corner(k + 1) for k in (0, num_points))
    return (1 - x) * near + x * far


def transition(env, params, state, action):
    """`(next state, reward, alive)`; the environments are deterministic, so the key does not matter."""
    _, state, reward, terminated, _ = env.step_env(random.key(0), state, action, params)
    return state, reward, ~terminated


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def solve(name, num_points, num_actions, num_steps=None):
    """Values of the grid's points: `[num_steps, num_points**2]` with 0, 1, ... steps to go, `[num_points**2]` with all.

    The number of steps is the time limit by default.
    """
    (env, params), axes = gymnax.make(name), AXES[name]
    blank = env.reset_env(random.key(0), params)[1]
    grid = jnp.meshgrid(*(jnp.linspace(axis.low, axis.high, num_points) for axis in axes), indexing="ij")
    fields = {axis.field: x.ravel() for axis, x in zip(axes, grid, strict=True)}

    def outcomes(action):
        next_state, reward, alive = jax.vmap(lambda f: transition(env, params, blank.replace(**f), action))(fields)
        return reward, alive, locate(axes, num_points, next_state)

    # once for all steps, and one action after the other, which saves memory
    reward, alive, located = lax.map(outcomes, action_grid(env, params, num_actions))

    def backup(values, _):
        return (reward + alive * interpolate(values, num_points, *located)).max(axis=0), values

    start, values = lax.scan(backup, jnp.zeros(num_points**2), length=num_steps or params.max_steps_in_episode)
    return values, start


@partial(jax.jit, static_argnums=(0, 2, 3))
def play(name, values, num_points, num_actions, keys):
    """Returns `[len(keys)]` of the greedy policy of `values`, counted as in the algorithms' `evaluate`."""
    env, params = gymnax.make(name)
    actions = action_grid(env, params, num_actions)

    def greedy(to_go, state):
        next_state, reward, alive = jax.vmap(transition, (None, None, None, 0))(env, params, state, actions)
        future = interpolate(to_go, num_points, *locate(AXES[name], num_points, next_state))
        return actions[(reward + alive * future).argmax()]

    def step(carry, to_go):
        state, ended, total = carry
        action = jax.vmap(greedy, (None, 0))(to_go, state)
        _, state, reward, terminated, truncated, _ = jax.vmap(env.step, (0, 0, 0, None))(keys, state, action, params)
        return (state, ended | terminated | truncated, total + jnp.where(ended, 0, reward)), None

    carry = jax.vmap(env.reset, (0, None))(keys, params)[1], jnp.zeros(len(keys), bool), jnp.zeros(len(keys))
    return lax.scan(step, carry, values, reverse=True)[0][2]


@partial(jax.jit, static_argnums=(0, 2))
def start_values(name, start, num_points, keys):
    """`start [num_points**2]`, interpolated at the starts drawn with `keys`: `[len(keys)]`."""
    state = jax.vmap(gymnax.make(name)[0].reset)(keys)[1]
    return interpolate(start, num_points, *locate(AXES[name], num_points, state))


def row(name, num_points, num_actions, num_episodes):
    """The numbers of one grid, explained in the module's docstring."""
    values, start = solve(name, num_points, num_actions)
    key_starts, key_episodes = random.split(random.key(0))
    keys = random.split(key_episodes, num_episodes)
    returns = play(name, values, num_points, num_actions, keys)
    starts = (start_values(name, start, num_points, k) for k in (keys, random.split(key_starts, 256 * num_episodes)))
    returns, few, many = (np.asarray(x, float) for x in (returns, *starts))
    mean, gain = many.mean(), returns - few
    error = np.hypot(many.std() / np.sqrt(len(many)), gain.std() / np.sqrt(len(gain)))
    found = {"dp_value": mean, "return": mean + gain.mean(), "standard_error": error}
    rounded = {key: float(f"{x:.6g}") for key, x in found.items()}
    return {"env": name, "points": num_points, "actions": num_actions, **rounded}


def measure(cell):
    """The row of a grid."""
    return [row(*cell)]


def cells(grids, num_episodes):
    """`{label: arguments of row}` from `{env: grids}`."""
    return {f"{env}, {grid[0]} points": (env, *grid, num_episodes) for env in grids for grid in grids[env]}


def notes(rows):
    """The returns of the finest grids."""
    found = {row["env"]: row["return"] for row in rows}
    text = " and ".join(f"{value:.1f} on {env}" for env, value in found.items())
    return (
        f"The greedy policy of the finest grid earns {text}, a lower bound of the optimum; the gain from the last "
        "refinement shows how tight it is. This policy knows the remaining time, which learned policies do not observe."
    )


def table(rows):
    """The numbers of every grid."""
    decimals = lambda row, *names: [f"{row[name]:.3f}" for name in names]
    names = "dp_value", "return", "standard_error"
    lines = [[row["label"], f"{row['actions']:.0f}", *decimals(row, *names)] for row in rows]
    return study.table(["points per axis", "actions", "value", "return of the greedy policy", "standard error"], lines)


EXPERIMENTS = {
    "optimum": Experiment(
        title="Optimal returns by dynamic programming",
        question="What is the highest mean return that any policy can reach?",
        cells=cells(BIG, 16_384),
        measure=measure,
        notes=notes,
        table=table,
        quick=lambda _: cells(dict.fromkeys(AXES, SMALL), 1024),
        sample="16,384 episodes and 4.2 million starts each",
    )
}

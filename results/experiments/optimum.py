"""Compute the best mean returns on Pendulum-v1 and MountainCarContinuous-v0.

Backward induction (Bellman, "Dynamic Programming", 1957; Bertsekas, "Dynamic Programming and Optimal Control", volume
I, chapter 1) over a grid of states and actions, with linear interpolation between the states:

    V_0(s) = 0,    V_k(s) = max_a [r(s, a) + (0 if s' is terminal, else V_{k-1}(s'))],    s' = f(s, a)

k counts the steps to go, up to the time limit; r and f are the environment's own `step_env`; nothing is discounted.
`dp_value` is the mean of V over the starts; interpolation puts it below the optimum where V is concave, above where it
is convex. `return` is the mean return of the policy that is greedy to V, in the environment itself: but for chance, the
optimum is no less. It is estimated as `dp_value`, over very many starts, plus the mean of return - V(start) over the
episodes, which varies less than a return; `standard_error` is that of the sum.
"""

from functools import partial
from typing import NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import study
from jax import lax, random
from study import Experiment


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
    """Actions `[num_actions]` from bound to bound, denser around zero, where the mountain car's best ones lie."""
    u = jnp.linspace(-1, 1, num_actions)
    return float(np.max(env.action_space(params).high)) * u * jnp.abs(u)


def locate(axes, num_points, state):
    """Where the grid has `state [...]`: flat index `[...]` of its cell's lowest corner, place within `[...]` twice."""

    def place(axis):
        u = (getattr(state, axis.field) - axis.low) / (axis.high - axis.low)
        u = (u % 1 if axis.periodic else jnp.clip(u, 0, 1)) * (num_points - 1)
        cell = jnp.minimum(jnp.floor(u), num_points - 2)
        return cell.astype(int), u - cell

    (i, x), (j, y) = map(place, axes)
    return i * num_points + j, x, y


def interpolate(values, num_points, index, x, y):
    """Bilinear interpolation of `values [num_points**2]` at what `locate` returned: `[...]`."""
    corner = lambda offset: values.at[index + offset].get(mode="promise_in_bounds")
    near, far = ((1 - y) * corner(k) + y * corner(k + 1) for k in (0, num_points))
    return (1 - x) * near + x * far


def transition(env, params, state, action):
    """`(next state, reward, alive)`; the environments are deterministic, so that any key will do."""
    _, state, reward, terminated, _ = env.step_env(random.key(0), state, action, params)
    return state, reward, ~terminated


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def solve(name, num_points, num_actions, num_steps=None):
    """Values of the grid's points: `[num_steps, num_points**2]` with 0, 1, ... to go, `[num_points**2]` with all."""
    (env, params), axes = gymnax.make(name), AXES[name]
    blank = env.reset_env(random.key(0), params)[1]
    grid = jnp.meshgrid(*(jnp.linspace(axis.low, axis.high, num_points) for axis in axes), indexing="ij")
    fields = {axis.field: x.ravel() for axis, x in zip(axes, grid, strict=True)}

    def outcomes(action):
        next_state, reward, alive = jax.vmap(lambda f: transition(env, params, blank.replace(**f), action))(fields)
        return reward, alive, locate(axes, num_points, next_state)

    # once for all steps, and action by action, which saves memory
    reward, alive, places = lax.map(outcomes, action_grid(env, params, num_actions))

    def back(values, _):
        return (reward + alive * interpolate(values, num_points, *places)).max(axis=0), values

    start, values = lax.scan(back, jnp.zeros(num_points**2), length=num_steps or params.max_steps_in_episode)
    return values, start


@partial(jax.jit, static_argnums=(0, 2, 3))
def play(name, values, num_points, num_actions, keys):
    """Returns `[len(keys)]` of the policy that is greedy to `values`, counted as the algorithms' `evaluate` does."""
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
    """`start [num_points**2]`, interpolated at the starts by `keys`: `[len(keys)]`."""
    state = jax.vmap(gymnax.make(name)[0].reset)(keys)[1]
    return interpolate(start, num_points, *locate(AXES[name], num_points, state))


def row(name, num_points, num_actions, num_episodes):
    """One grid's figures, as the module's docstring has them."""
    values, start = solve(name, num_points, num_actions)
    key_starts, key_episodes = random.split(random.key(0))
    keys = random.split(key_episodes, num_episodes)
    returns = play(name, values, num_points, num_actions, keys)
    starts = (start_values(name, start, num_points, k) for k in (keys, random.split(key_starts, 256 * num_episodes)))
    returns, few, many = (np.asarray(x, float) for x in (returns, *starts))
    mean, gain = many.mean(), returns - few
    error = np.hypot(many.std() / np.sqrt(len(many)), gain.std() / np.sqrt(len(gain)))
    figures = {"dp_value": mean, "return": mean + gain.mean(), "standard_error": error}
    rounded = {key: float(f"{figure:.6g}") for key, figure in figures.items()}
    return {"env": name, "points": num_points, "actions": num_actions, **rounded}


def cells(grids, num_episodes):
    """`{label: arguments of row}` of `{env: grids}`."""
    return {f"{env}, {grid[0]} points": (env, *grid, num_episodes) for env in grids for grid in grids[env]}


def report(rows):
    """What came out."""
    best = {row["env"]: row["return"] for row in rows}  # the finest grid's
    text = "; ".join(f"{value:.1f} on {env}" for env, value in best.items())
    text = (
        f"A policy found on the finest grid reaches {text}, so that no optimum is less; how little the last refinement "
        "adds says how much more there can be. It knows the time that is left, which learned policies do not see."
    )
    decimals = lambda row, *names: [f"{row[name]:.3f}" for name in names]
    lines = [
        [row["label"], f"{row['actions']:.0f}", *decimals(row, "dp_value", "return", "standard_error")] for row in rows
    ]
    header = ["grid, on each axis", "actions", "value of the grid", "return of its policy", "standard error"]
    return "\n".join([text, "", study.table(header, lines)])


EXPERIMENTS = {
    "optimum": Experiment(
        title="The best possible returns, by dynamic programming",
        cells=cells(BIG, 16_384),
        measure=lambda cell: [row(*cell)],
        report=report,
        quick=lambda _: cells(dict.fromkeys(AXES, SMALL), 1024),
        sources=("optimum",),
        sample="16,384 episodes and 4.2 million starts of each",
    )
}

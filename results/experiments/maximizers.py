"""fqi's maximizers against the exact maximum of trained Q-networks.

The ReLU networks (hidden 32 x 32) are those of fqi on environments with 1, 2 and 4 actions, the last a linear-quadratic
system. A gap is the exact maximum, by mixed-integer programming, minus the value of the action found, in percent of the
range of q: from its minimum over random actions to its maximum, over all states. Times are those of the compiled
maximizer on a batch of states, on one core, medians of three calls. Close other programs.
"""

import statistics

import gymnax
import jax
import numpy as np

from amortax.algorithms import fqi
from amortax.common import devices, lqr, milp
from experiments import drawing, study, training
from experiments.study import Experiment


def four_inputs():
    """The system of four dimensions, with one input for each."""
    return lqr.LQR(lqr.system(4).replace(B=0.5 * np.eye(4), R=np.eye(4)))


FOUR_INPUTS = "FourInputs-misc"
ENVS = {"Pendulum-v1": 1, "Reacher-misc": 2, FOUR_INPUTS: 4}  # numbers of actions
SOLVERS = (  # maximizer, num_candidates, maximizer_steps; the first is the default
    ("gradient", 4, 10),
    ("gradient", 16, 20),
    ("lbfgs", 4, 10),
    ("lbfgs", 16, 10),
    ("cem", 16, 4),
    ("cem", 64, 5),
    ("grid", 11, 1),
)
STYLES = {
    "gradient": (drawing.BLUE, "o"),
    "lbfgs": (drawing.ORANGE, "s"),
    "cem": (drawing.GREEN, "^"),
    "grid": (drawing.PINK, "D"),
}
CANDIDATES = {"gradient": "starts", "lbfgs": "starts", "cem": "samples", "grid": "points per axis"}
FLOOR = 1e-5  # percent; less is rounding
TRAINED = 20, {"hidden_sizes": (32, 32), "activation": "relu"}  # iterations, fields of the configuration
BARELY_TRAINED = 1, TRAINED[1] | {"num_base_points": 100, "hidden_sizes": (4,), "num_envs": 4, "fit_steps": 1}


def solve(config, params, obs, num_states):
    """Actions at the first `num_states`, and seconds per state: the median of three calls on a larger batch."""
    batch = obs[:8192]
    program = jax.jit(fqi.maximize, compiler_options=devices.cpu_compiler_options())
    call = lambda: program(config, params, batch, jax.random.key(1))
    actions = jax.block_until_ready(call())
    return actions[:num_states], statistics.median(training.seconds(call) for _ in range(3)) / len(batch)


def measure(cell):
    """A row for each solver; `cell` has environment, length and fields of the training, solvers, number of states."""
    if FOUR_INPUTS not in gymnax.registered_envs:
        gymnax.register(FOUR_INPUTS, four_inputs)
    with training.one_thread():
        return compare(*cell)


def compare(env, num_iterations_and_fields, solvers, num_states):
    """The rows of `measure`."""
    num_iterations, fields = num_iterations_and_fields
    config = fqi.Config(env=env, gamma=0.9, **fields)
    state, iteration = jax.jit(fqi.init)(config, jax.random.key(0)), jax.jit(fqi.iteration)
    for _ in range(num_iterations):
        state = iteration(config, state)
    params, obs = state.params.critic, state.base_points.next_obs
    states, layers = obs[:num_states], jax.tree.map(np.asarray, params)
    solutions = []
    seconds = training.seconds(lambda: solutions.extend(milp.relu_network(layers, s) for s in np.asarray(states)))
    exact, proof = (np.array([getattr(s, name) for s in solutions]) for name in ("value", "gap"))
    actions = jax.random.uniform(jax.random.key(2), (1000, 1, ENVS[env]), minval=-1, maxval=1)
    q = jax.jit(jax.vmap(lambda a: fqi.critic(config, params, states, a.repeat(num_states, axis=0))))(actions)
    scale = 100 / (exact.max() - q.min())

    def row(name, candidates, steps, gap, seconds):
        found = {"mean_gap": gap.mean(), "worst_gap": gap.max(), "microseconds": 1e6 * seconds}
        found = {name: study.short(x) for name, x in found.items()}
        return {"env": env, "maximizer": name, "candidates": candidates, "steps": steps} | found

    rows = [row("milp", "", "", scale * proof, seconds / num_states)]
    for name, candidates, steps in solvers:
        own = {"maximizer": name, "num_candidates": candidates, "maximizer_steps": steps}
        config = fqi.Config(**(vars(config) | own))
        actions, seconds = solve(config, params, obs, num_states)
        gap = scale * (exact - np.asarray(fqi.critic(config, params, states, actions)))
        rows.append(row(name, candidates, "" if name == "grid" else steps, gap, seconds))
    return rows


def label(row):
    """The name of a solver with its settings."""
    steps = "" if row["steps"] == "" else f", {row['steps']:.0f} steps"
    return f"{row['maximizer']}, {row['candidates']:.0f} {CANDIDATES[row['maximizer']]}{steps}"


def draw(rows):
    """A panel for each environment: gap over time."""
    envs = study.labels(rows)
    page, panels = drawing.figure(3.8 * max(2, len(envs)), 4.3, 1, len(envs), sharey=True)
    for axes, env in zip(panels[0], envs, strict=True):
        for row in (row for row in rows if row["label"] == env):
            if row["maximizer"] == "milp":
                axes.axvline(row["microseconds"], color="black", linestyle="--", label="milp, exact")
                continue
            color, marker = STYLES[row["maximizer"]]
            default = (row["maximizer"], row["candidates"], row["steps"]) == SOLVERS[0]
            most = max(r["candidates"] for r in rows if r["maximizer"] == row["maximizer"])
            face = color if row["candidates"] == most else "white"
            axes.loglog(row["microseconds"], max(FLOOR, row["mean_gap"]), marker, color=color, markerfacecolor=face,
                        markersize=8, linestyle="none", label=label(row) + ", the default" * default)  # fmt: skip
        actions = ENVS[env]
        axes.set(title=f"{env}, {actions} action{'s' * (actions > 1)}", xlabel="time (µs per state)")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("mean gap to the maximum (% of q's range,\nat least 10⁻⁵)")
    page.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return page


def notes(rows):
    """Gaps and time of the default, and the time of the exact solver."""
    default = [row for row in rows if (row["maximizer"], row["candidates"]) == SOLVERS[0][:2]]
    exact = [row["microseconds"] for row in rows if row["maximizer"] == "milp"]
    return (
        f"The default, {label(default[0])}, misses at most {max(row['mean_gap'] for row in default):.2f} % of q's "
        f"range on average and {max(row['worst_gap'] for row in default):.2f} % in the worst state, and takes at most "
        f"{max(row['microseconds'] for row in default):,.1f} µs per state; the exact solver takes at least "
        f"{min(exact):,.0f} µs. Gaps are in percent of q's range, from its minimum over random actions to its maximum. "
        "The gap of `milp` is that between its solution and its proven bound."
    )


def table(rows):
    """Gaps and times of every solver."""
    percent = lambda row: [f"{row[name]:z.4f} %" for name in ("mean_gap", "worst_gap")]
    count = lambda x: x if x == "" else f"{x:.0f}"
    lines = []
    for row in rows:
        solver = [row["maximizer"], count(row["candidates"]), count(row["steps"])]
        lines.append([row["env"], ENVS[row["env"]], *solver, *percent(row), f"{row['microseconds']:,.1f}"])
    header = ["environment", "actions", "maximizer", "candidates", "steps", "mean gap", "worst gap", "µs per state"]
    return study.table(header, lines)


EXPERIMENTS = {
    "maximizers": Experiment(
        title="fqi's maximizers compared with the exact maximum",
        question="How far from the exact maximum are the actions of fqi's solvers, and how long do they take?",
        cells={env: (env, TRAINED, SOLVERS, 200) for env in ENVS},
        measure=measure,
        notes=notes,
        table=table,
        draw=draw,
        quick=lambda cells: {env: (env, BARELY_TRAINED, SOLVERS[:1] + SOLVERS[-1:], 5) for env in list(cells)[:1]},
        sources=("algorithms/fqi.py", "common/lqr.py", "common/milp.py"),
        sample="200 states of each environment",
    )
}

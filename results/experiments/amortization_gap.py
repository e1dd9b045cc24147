"""How much amortization loses: over training, the gap between the policy's actions and the best ones for its critic.

The Control Suite needs an extra: `pip install -e ".[playground]"`.
"""

import functools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from amortax.algorithms import fqi
from amortax.common import milp, play
from experiments import control_suite, drawing, study, training
from experiments.study import Criterion, Experiment, is_below, short
from experiments.training import Run

NUM_STATES = 256  # of the replay buffer
NUM_EXACT = 32  # of them, where the maximum is proved after training
ALGORITHMS = ("ddpg", "td3", "sac")
SMALL = "Pendulum-v1"  # the task with small networks of ReLU, whose maximum integer programming proves
LENGTH = "--total-steps 50000 --learning-starts 4000 --steps-per-epoch 11500"


def sample_obs(module, config, state):
    """Observations `[NUM_STATES, obs_dim]` of a state's replay buffer, evenly spaced in time."""
    rows = jnp.arange(NUM_STATES) * jnp.minimum(state.step, len(state.buffer)) // NUM_STATES
    return module.read(config, state.buffer, rows).obs


def objective(module, config, params, obs):
    """What the actor ascends in an action, at one `obs [obs_dim]`: a function of the action."""
    if not hasattr(module, "twin_critics"):
        return functools.partial(module.critic, config, params.critic, obs)
    if hasattr(params, "log_alpha"):
        return lambda action: module.twin_critics(config, params.critic, obs, action).min(axis=0)
    return functools.partial(module.critic, config, jax.tree.map(lambda x: x[0], params.critic), obs)


def improve(q, action):
    """Ten steps of gradient ascent from `action [action_dim]`, unless they are worse."""
    return fqi.exhaustive(q, jnp.stack([action, fqi.gradient_ascent(q, action[None], 10)]))


def solutions(q, action, key):
    """Actions of several solvers, by name, for a policy's `action`."""
    starts = random.uniform(key, (16, len(action)), minval=-1, maxval=1)
    return {
        "gradient": fqi.gradient_ascent(q, starts, 30),
        "lbfgs": fqi.lbfgs(q, starts, 10),
        "cem": fqi.cross_entropy(q, key, len(action), 64, 10),
        "improved": improve(q, action),
    }


def gaps(module, config, params, obs, key):
    """At each of `obs [n, obs_dim]`: how far each solver is above the policy, all of them, and all above random.

    `gap` is max q(s, .) - q(s, pi(s)) by the best solver; `range` is max q(s, .) - q(s, a) for uniformly random a.
    """

    def at(obs, key):
        q = objective(module, config, params, obs)
        action = module.greedy(config, params, obs)
        found = {name: q(x) - q(action) for name, x in solutions(q, action, key).items()}
        gap = jnp.maximum(0, jnp.stack([*found.values()]).max())
        others = jax.vmap(q)(random.uniform(key, (64, len(action)), minval=-1, maxval=1))
        return found | {"gap": gap, "range": gap + q(action) - others.mean()}

    return jax.lax.map(lambda x: at(*x), (obs, random.split(key, len(obs))), batch_size=64)


def missed(module, config, params, obs, gap):
    """By how much the proven maximum at `obs [n, obs_dim]` exceeds the policy's value by more than `gap [n]`, a mean.

    "" where q is not one network of ReLU.
    """
    if config.activation != "relu" or hasattr(params, "log_alpha"):  # SAC's is the minimum of two
        return ""
    twins = hasattr(module, "twin_critics")
    critic = jax.tree.map(lambda x: x[0], params.critic) if twins else params.critic
    found = []
    for x in jnp.asarray(obs):
        value = objective(module, config, params, x)(module.greedy(config, params, x))
        found.append(milp.relu_network(critic, np.asarray(x)).value - float(value))
    return float(np.mean(np.array(found) - gap))


def improved_act(module):
    """`act` of an algorithm's module, but each action of the policy is improved before it is taken."""

    def act(config, params, obs):
        env = module.make_env(config.env)
        x = env.flatten(obs)
        return env.rescale(improve(objective(module, config, params, x), module.greedy(config, params, x)))

    return act


def measure(run):
    """A row for every seed and epoch of a run, from a process of its own, which sets up devices once."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure_here, run, training.WORK).result()


def measure_here(run, work):
    """The same in this process, with the run's code in the folder `work`."""
    training.WORK = work
    module, config = training.load(run)
    of_states = jax.jit(functools.partial(gaps, module, config))
    act, episodes = improved_act(module), jnp.arange(config.num_eval_episodes)
    rows = []
    pick = functools.partial(sample_obs, module, config)
    for snapshot in training.snapshots(module, config, run.seeds, pick):
        if snapshot.metrics is None:  # nothing has been learned
            continue
        key = random.fold_in(random.key(snapshot.seed), snapshot.step)
        row = {"seed": snapshot.seed, "progress": snapshot.step}
        row["return"] = np.mean(snapshot.metrics.eval_returns, dtype=np.float64)
        improved = np.asarray(play.gymnax_returns(act, config, snapshot.params, snapshot.seed, episodes))
        row["improved_return"] = improved.mean(dtype=np.float64)
        found, every = of_states(snapshot.params, snapshot.picked, key), NUM_STATES // NUM_EXACT
        row |= {name: float(x.mean()) for name, x in found.items()} | {"missed": ""}
        if snapshot.step >= config.total_steps:
            states = snapshot.picked[::every], found["gap"][::every]
            row["missed"] = missed(module, config, snapshot.params, *states)
        rows.append({name: short(x) for name, x in row.items()} | {"finite": int(training.is_finite(snapshot.params))})
    return sorted(rows, key=lambda row: row["seed"])


# Verdict, table and figure


def share(rows, label, name="gap"):
    """A gap as a share of the range, `[num_seeds, num_epochs]`."""
    return study.returns(rows, label, name)[1] / study.returns(rows, label, "range")[1]


def holds(rows):
    """For each algorithm and task: the return of improved actions is not above the policy's."""
    final = lambda label, name: study.final(rows, label, name)
    return {x: not is_below(final(x, "return"), final(x, "improved_return")) for x in study.labels(rows)}


def table(rows):
    """Final returns, with and without improvement, and gaps."""
    improved = lambda label: study.estimate(study.final(rows, label, "improved_return"))
    gap = lambda label: study.estimate(100 * share(rows, label)[:, -1])
    columns = {"return_of_improved_actions": improved, "gap_(%_of_range)": gap}
    proved = ("missed",) if any(row["missed"] != "" for row in rows) else ()
    for name in ("gradient", "lbfgs", "cem", "improved", *proved):
        columns[name] = functools.partial(shown, rows, name)
    return study.return_table(rows, **columns)


def shown(rows, name, label):
    """A solver's gap as text, in percent of the range."""
    values = study.returns(rows, label, name)[1][:, -1]
    if "" in values:
        return ""
    return study.estimate(100 * values.astype(float) / study.returns(rows, label, "range")[1][:, -1])


def draw(rows):
    """Above the gap, below the returns over training; a column for each task."""
    tasks = study.envs(rows)
    page, panels = drawing.figure(3.6 * len(tasks), 6, 2, len(tasks), sharex="col")
    for (above, below), task in zip(panels.T, tasks, strict=True):
        for label, algorithm in study.variants(rows, task).items():
            color = drawing.algorithm_color(algorithm)
            drawing.draw_values(above, *shares(rows, label), algorithm, per=1e3, color=color)
            drawing.draw_curve(below, rows, label, algorithm, per=1e3, color=color)
            style = {"color": color, "linestyle": "--"}
            drawing.draw_curve(below, rows, label, f"{algorithm}, improved", "improved_return", per=1e3, **style)
        above.set(title=task, ylim=(0, None))
        below.set(xlabel="environment steps (thousands)")
        for axes in (above, below):
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
    panels[0][0].set_ylabel("max q - q(policy)\n(% of max q - q(random action))")
    panels[1][0].set_ylabel("greedy return per episode")
    return page


def shares(rows, label):
    """`(progress [num_epochs], gap in percent of the range [num_seeds, num_epochs])`."""
    return study.returns(rows, label)[0], 100 * share(rows, label)


def on(*tasks):
    """Runs of all algorithms on tasks of the Control Suite."""
    return control_suite.cells(*((name, task) for task in tasks for name in ALGORITHMS), length=LENGTH)


def experiment(where, cells, quick, notes=""):
    """The gap over training of some runs, of which `quick` is small and stands for all."""
    return Experiment(
        title=f"A policy network loses nothing that a solver could win back while it acts: {where}",
        question="How far are the policy's actions from the maximizers of its critic, over training, and would better "
        "actions earn more?",
        cells=cells,
        measure=measure,
        criterion=Criterion(
            "for each algorithm and task: the return is not above the policy's when each of its actions is improved by "
            "ten steps of gradient ascent on its critic, after training.",
            holds,
        ),
        notes=f"Gaps are means over {NUM_STATES} states of the replay buffer, in percent of the distance between the "
        "best and a uniformly random action: 0 is a perfect amortization, 100 one that is no better than chance. The "
        "gap is to the best of all solvers: `gradient` and `lbfgs` from 16 random starts, `cem`, and `improved` from "
        "the policy's own action. SAC's policy maximizes the entropy too, so that its gap is not meant to vanish."
        + notes,
        table=table,
        draw=draw,
        quick=lambda cells: training.smaller(cells, quick),
        sources=("algorithms/fqi.py", "common/milp.py", "common/play.py"),
        sample=f"{control_suite.SEEDS} seeds each; each return is the mean of 8 episodes"
        + f", 128 on {SMALL}" * any(run.env == SMALL for run in cells.values()),
    )


PROVED = (
    " `missed` is what all of them leave below the proven maximum, by integer programming at "
    f"{NUM_EXACT} states, for the networks of ReLU with 64 units on {SMALL}."
)
CELLS = {f"{name} on {SMALL}": Run(name, SMALL, "--activation relu", control_suite.SEEDS) for name in ALGORITHMS}
EXPERIMENTS = {
    "amortization_gap": experiment(
        "swinging up a pole",
        CELLS | on("CartpoleSwingup"),
        f"td3 on {SMALL}",
        PROVED,
    ),
    "amortization_gap_spinning": experiment("spinning", on("FingerSpin"), "td3 on FingerSpin"),
    "amortization_gap_running": experiment("running", on("CheetahRun"), "td3 on CheetahRun"),
}

"""The activation of the hidden layers: smooth ones and ReLU, where a policy seeks the maximum of a critic over actions.

With ReLU q(s, .) is piecewise linear, and its maxima lie at kinks, between which the policy jumps. `LQR-v0` tells what
that costs, since its optimal policy is known: costs are discounted, over 2,048 episodes, relative to those of the
Riccati gain from the same starts and with the same noise, as in `closed_form`.
"""

import importlib
import statistics

import gymnax
import jax
import jax.numpy as jnp
import numpy as np

from amortax.common import devices, lqr, plot, policy, record
from experiments import closed_form, drawing, study, training
from experiments.curves import ACTOR_CRITICS, LQR_FLAGS, LQR_GAMMA, STEPS
from experiments.study import Criterion, Experiment, column
from experiments.training import FITTED, Run

ACTIVATIONS = {"silu": drawing.GREEN, "elu": drawing.BLUE, "tanh": drawing.ORANGE, "relu": drawing.PINK}
LQR = "LQR-v0"
SWING_UP = "Pendulum-v1"
EXPLICIT = ("fqi", "fqi_amortized", "nfqca", "ddpg")  # algorithms of deterministic policies without TD3's smoothing
LIMIT = 1.1  # of their median cost relative to the optimum
SEEDS = 8
ACTIONS = np.linspace(-1, 1, 401)  # at which q is drawn
LANDSCAPE_STATES = ((0.5, 0.0), (-0.5, 0.5), (0.0, -0.8))


# Costs


def cells():
    """`{label: Run}` of each algorithm with SiLU and ReLU, of ddpg with all."""
    runs = {}
    for algorithm in EXPLICIT:
        for activation in ACTIVATIONS if algorithm == "ddpg" else ("silu", "relu"):
            own = f"--activation {activation}" * (activation != "silu")  # which is the default
            command = " ".join(f"{lqr_flags(algorithm)} {own}".split())
            runs[f"{algorithm}, {activation}"] = Run(algorithm, LQR, command, seeds=SEEDS)
    return runs


def lqr_flags(algorithm):
    """Random base points over all actions for the fitted files; for the others as in `curves_lqr`."""
    if algorithm in FITTED:
        return f"--gamma {LQR_GAMMA} --num-base-points 5000"
    return f"{STEPS[LQR]} {LQR_FLAGS.get(algorithm, '')} --gamma {LQR_GAMMA}"


def costs(run):
    """A row for each seed: the cost at the end of training, relative to the optimum."""
    return [{name: row[name] for name in ("seed", "cost_ratio")} for row in closed_form.measure(run)]


def smooth_holds(rows):
    """For each algorithm of `EXPLICIT`: the median cost with SiLU is within 10 % of the optimum and below ReLU's."""
    answers = {}
    for algorithm in EXPLICIT:
        if f"{algorithm}, silu" in study.labels(rows):
            silu, relu = (np.median(column(rows, f"{algorithm}, {x}", "cost_ratio")) for x in ("silu", "relu"))
            answers[algorithm] = silu <= LIMIT and silu < relu
    return answers


def by_algorithm(rows):
    """The algorithms of labels `algorithm, activation`, in order."""
    return list(dict.fromkeys(label.split(", ")[0] for label in study.labels(rows)))


def cost_table(rows):
    """Median and worst cost of each algorithm with each activation."""
    values = lambda label: column(rows, label, "cost_ratio")
    return activation_table(rows, lambda label: f"{np.median(values(label)):.3f} ({values(label).max():.3f})")


def draw_costs(rows):
    """For each algorithm its seeds with each activation, and their medians."""
    page, ((axes,),) = drawing.figure(9, 4)
    draw_seeds(axes, rows, lambda label: column(rows, label, "cost_ratio"), lambda x: [np.median(x)] * 3)
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label="optimum")
    axes.set(ylabel="cost / optimum\nmedians; dots are seeds")
    axes.legend(fontsize="small", ncols=2)
    return page


def activation_table(rows, shown):
    """A line for each algorithm and a column for each activation, with `shown(label)`."""
    present = study.labels(rows)
    cell = lambda label: shown(label) if label in present else ""
    lines = [[name, *(cell(f"{name}, {x}") for x in ACTIVATIONS)] for name in by_algorithm(rows)]
    return study.table(["algorithm", *ACTIVATIONS], lines)


def draw_seeds(axes, rows, values_of, estimate):
    """For each algorithm its seeds with each activation, and beside them `estimate(values)`: center, low and high."""
    algorithms, present = by_algorithm(rows), study.labels(rows)
    for i, (activation, color) in enumerate(ACTIVATIONS.items()):
        axes.plot([], [], "o", color=color, label=activation)
        for x, algorithm in enumerate(algorithms):
            label, place = f"{algorithm}, {activation}", x + 0.2 * (i - 1.5)
            if label in present:
                values = values_of(label)
                center, low, high = estimate(values)
                axes.plot([place + 0.06] * len(values), values, ".", color="0.65", markersize=4, zorder=1)
                axes.errorbar(place, center, [[center - low], [high - center]], fmt="o", color=color, zorder=2)
    axes.set_xticks(range(len(algorithms)), algorithms)
    axes.grid(axis="y", alpha=0.3)


# Returns


def return_cells():
    """`{label: Run}` of every algorithm with a critic over actions, with each activation."""
    runs = {}
    for algorithm in (*ACTOR_CRITICS, *FITTED):
        for activation in ACTIVATIONS:
            own = f"{STEPS[SWING_UP]} " * (algorithm in ACTOR_CRITICS) + f"--activation {activation}"
            runs[f"{algorithm}, {activation}"] = Run(algorithm, SWING_UP, own, seeds=SEEDS)
    return runs


def returns_hold(rows):
    """For each algorithm: the final return with SiLU is not below that with ReLU."""
    return {
        algorithm: not study.is_below(study.final(rows, f"{algorithm}, silu"), study.final(rows, f"{algorithm}, relu"))
        for algorithm in by_algorithm(rows)
    }


def return_table(rows):
    """Final returns of each algorithm with each activation."""
    return activation_table(rows, lambda label: study.estimate(study.final(rows, label)))


def draw_returns(rows):
    """For each algorithm its seeds with each activation, and their interquartile means with intervals."""
    page, ((axes,),) = drawing.figure(11, 4)
    draw_seeds(axes, rows, lambda label: study.final(rows, label), lambda x: (plot.iqm(x), *plot.interval(x)))
    axes.set(ylabel=f"{SWING_UP}\nfinal greedy return per episode")
    axes.legend(fontsize="small", ncols=4)
    return page


# The value over actions


def landscape(run):
    """Rows of q(s, .) at some states for the first seed, and of the optimal action."""
    module, config, params = policy.load(record.seed_folder(training.train(run), 0))
    K = lqr.solve(gymnax.make(LQR)[1], LQR_GAMMA).K / lqr.ACTION_BOUND
    rows = []
    for state in LANDSCAPE_STATES:
        obs = jnp.tile(jnp.array(state), (len(ACTIONS), 1))
        values = module.critic(config, params.critic, obs, jnp.array(ACTIONS)[:, None])
        columns = {"state": str(state), "optimal": study.short(float(-K[0] @ np.array(state)))}
        pairs = zip(ACTIONS, np.asarray(values), strict=True)
        rows += [columns | {"action": study.short(action), "q": study.short(q)} for action, q in pairs]
    return rows


def draw_landscape(rows):
    """For each state a panel with q(s, .), each activation's relative to its maximum."""
    states = list(dict.fromkeys(row["state"] for row in rows))
    page, panels = drawing.figure(4 * len(states), 3.8, 1, len(states), sharey=True)
    for axes, state in zip(panels[0], states, strict=True):
        for label in study.labels(rows):
            own = [row for row in rows if row["label"] == label and row["state"] == state]
            q = np.array([row["q"] for row in own])
            axes.plot([row["action"] for row in own], q - q.max(), color=ACTIVATIONS[label.split(", ")[1]], label=label)
            axes.axvline(own[0]["optimal"], color="black", linestyle="--", linewidth=1)
        axes.set(title=f"s = {state}", xlabel="action, scaled to [-1, 1]")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("q(s, a) minus its maximum over a")
    panels[0][0].legend(fontsize="small")
    return page


# Time


def times(cell):
    """A row for each activation and repeat, interleaved, on one core: seconds of an epoch; `cell` has its fields."""
    algorithm, fields, repeats = cell
    module, rows = importlib.import_module(f"amortax.algorithms.{algorithm}"), []
    with training.one_thread():
        epoch = jax.jit(module.epoch, compiler_options=devices.cpu_compiler_options())
        configs = {x: module.Config(**fields, activation=x) for x in ACTIVATIONS}
        states = {x: jax.jit(module.init)(config, jax.random.key(0)) for x, config in configs.items()}
        for repeat in range(1 + repeats):  # the first compiles
            for activation, config in configs.items():
                seconds = study.short(training.seconds(lambda c=config, s=states[activation]: epoch(c, s)))
                rows.append({"activation": activation, "repeat": repeat, "seconds": seconds})
    return [row for row in rows if row["repeat"]]


def time_table(rows):
    """Median times relative to ReLU."""
    lines = []
    for label in study.labels(rows):
        own = [row for row in rows if row["label"] == label]
        median = {x: statistics.median(row["seconds"] for row in own if row["activation"] == x) for x in ACTIVATIONS}
        lines.append([label, *(f"{seconds / median['relu']:.2f}" for seconds in median.values())])
    return study.table(["an epoch of", *ACTIVATIONS], lines)


def of(*algorithms):
    """The quick version with these algorithms alone, with SiLU and ReLU."""
    return lambda cells: training.smaller(cells, *(f"{name}, {x}" for name in algorithms for x in ("silu", "relu")))


TINY = {"num_eval_episodes": 1, "hidden_sizes": (4,), "steps_per_epoch": 8, "total_steps": 1008}
LQR_CELLS = cells()
EXPERIMENTS = {
    "smooth_costs": Experiment(
        title="Smooth activations let critics find the optimal linear policy",
        question="What does a piecewise linear critic cost where a policy seeks its maximum?",
        cells=LQR_CELLS,
        measure=costs,
        criterion=Criterion(
            f"for {', '.join(EXPLICIT)}: the median cost on {LQR} with SiLU is at most {100 * (LIMIT - 1):.0f} % above "
            "that of the closed-form optimal policy, and below that with ReLU.",
            smooth_holds,
        ),
        notes="Numbers are discounted costs relative to the optimum: medians over the seeds, worst seeds in "
        "parentheses. The fitted files learn from 5,000 steps with uniformly random actions. The figure "
        "[below](#smooth_landscape) shows why ReLU costs so much.",
        table=cost_table,
        draw=draw_costs,
        quick=of("fqi"),
        sources=("common/lqr.py", "results/experiments/closed_form.py"),
        sample=f"{SEEDS} seeds each; each cost is the mean of 2,048 episodes",
    ),
    "smooth_returns": Experiment(
        title=f"Smooth activations learn {SWING_UP} as well as ReLU",
        question="Does the activation matter for returns where the optimal policy is not linear?",
        cells=return_cells(),
        measure=training.learning_curves,
        criterion=Criterion(
            "for each algorithm: the final return with SiLU is not below that with ReLU.", returns_hold
        ),
        notes="All files have SiLU as their default; `--activation` chooses another.",
        table=return_table,
        draw=draw_returns,
        quick=of("ddpg"),
        sample=study.returns_sample(seeds=SEEDS),
    ),
    "smooth_landscape": Experiment(
        title="The value over actions with SiLU and with ReLU",
        question="What does q(s, .) look like, of which a policy seeks the maximum?",
        cells={label: LQR_CELLS[label] for label in ("fqi, silu", "fqi, relu")},
        measure=landscape,
        notes=f"Shown is the critic of fqi on {LQR}, seed 0, at three states; the dashed line is the optimal action. "
        "The true q(s, .) is a parabola. A piecewise linear one has its maximum at a kink, wherever that lies.",
        draw=draw_landscape,
        quick=of("fqi"),
        sources=("common/lqr.py",),
        sample="one seed each",
    ),
    "smooth_time": Experiment(
        title="The time that activations take",
        question="How much slower than ReLU are smooth activations?",
        cells={
            "ddpg, 64 x 64": ("ddpg", {"num_eval_episodes": 1}, 5),
            "ddpg, 256 x 256": ("ddpg", {"num_eval_episodes": 1, "hidden_sizes": (256, 256)}, 5),
            "fqi, 64 x 64": ("fqi", {"num_eval_episodes": 1, "iterations_per_epoch": 1}, 5),
        },
        measure=times,
        notes="Times are relative to ReLU, medians of interleaved repeats on one core.",
        table=time_table,
        quick=lambda _: {"ddpg": ("ddpg", TINY, 1)},
        sources=("algorithms/ddpg.py", "algorithms/fqi.py"),
        sample="5 interleaved repeats",
    ),
}

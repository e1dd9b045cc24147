"""Tasks of the DeepMind Control Suite in MuJoCo Playground: learning curves beside published returns, and networks.

They need an extra: `pip install -e ".[playground]"`.
"""

import functools

from policies.make import LENGTH, NETWORKS

from amortax.common import plot
from experiments import study, training
from experiments.curves import draw_over_training, reach
from experiments.study import Criterion, Experiment, is_below
from experiments.training import Run

OWN = {"ddpg": "--target-period 1"}
SEEDS = 4
# Returns of SAC from states. At 100,000 environment steps: Laskin, Srinivas, Abbeel, "CURL" (ICML 2020), table 1; at
# 500,000: Lee et al., "SimBa" (ICLR 2025). Their simulator is MuJoCo itself, and actions are repeated.
AFTER_100K = {
    "FingerSpin": 811,
    "CartpoleSwingup": 835,
    "ReacherEasy": 746,
    "CheetahRun": 616,
    "WalkerWalk": 891,
    "BallInCup": 746,
}
AFTER_500K = {
    "CartpoleBalance": 999,
    "CartpoleSwingup": 863,
    "CheetahRun": 716,
    "FingerSpin": 815,
    "ReacherEasy": 952,
    "WalkerWalk": 957,
}
# How many steps of a task each action lasts: Hafner et al., "PlaNet" (ICML 2019), and the paper on CURL after it; both
# without CartpoleBalance, here as the other task with a pole.
REPEATS = {
    "CartpoleBalance": 8,
    "CartpoleSwingup": 8,
    "ReacherEasy": 4,
    "FingerSpin": 2,
    "BallInCup": 4,
    "CheetahRun": 4,
    "WalkerWalk": 2,
}
# Returns of PPO after 8,000,000 steps in dm_control: CleanRL's documentation of `ppo_continuous_action.py`, 10 seeds.
PPO_AFTER_8M = {"CheetahRun": 433, "WalkerWalk": 393, "CartpoleSwingup": 641}
PPO = "--total-steps 1966080 --steps-per-epoch 196608 --num-envs 32 --num-steps 64 --num-eval-episodes 8"
PPO += " --normalize-obs --gamma 0.99 --gae-lambda 0.95 --actor-learning-rate 1e-3"
WINDOWS = "--num-envs 2 --critic-learning-rate 3e-3 --gamma 0.99 --num-eval-episodes 8"
WINDOWS += " --total-steps 98304 --steps-per-epoch 12288"  # whole iterations, and no more steps than DDPG takes
ROLLOUTS = "--num-rollouts 16 --horizon 300 --num-iterations 320 --iterations-per-epoch 40 --learning-rate 5e-3"
ROLLOUTS += " --num-eval-episodes 8"
FIGURES = "that of SAC from states in the papers on CURL (after 100,000 steps) or SimBa (after 500,000)"


def run(algorithm, task, length=LENGTH, flags="", seeds=SEEDS):
    """A run on a task."""
    flags = " ".join(filter(None, [length, NETWORKS, OWN.get(algorithm), flags]))
    return Run(algorithm, f"playground/{task}", flags, seeds)


def cells(*pairs, **options):
    """`{label: Run}` of pairs of an algorithm and a task."""
    return {f"{algorithm} on {task}": run(algorithm, task, **options) for algorithm, task in pairs}


def published(task, after_100k=AFTER_100K):
    """`(return, steps in thousands)` of a task."""
    return (after_100k[task], 100) if task in after_100k else (AFTER_500K[task], 500)


def reached(after_100k, rows):
    """For each task: whether SAC's final interquartile mean is at least the published return."""
    final = lambda task: plot.iqm(study.final(rows, f"sac on {task}"))
    return {task: final(task) >= published(task, after_100k)[0] for task in study.envs(rows)}


def table(after_100k, rows):
    """Final returns beside the published ones."""

    def known(label):
        value, steps = published(study.split(label)[1], after_100k)
        return f"{value} after {steps},000 steps"

    return study.return_table(rows, SAC_published=known)


def scale(axes, task):
    """An axis of all returns that are possible."""
    axes.set_ylim(0, 1000)


def mark(axes, task, value, what):
    """A published return, on such an axis."""
    axes.axhline(value, color="black", linestyle="--", linewidth=1, label=f"{what}: {value}")
    scale(axes, task)


def mark_published(after_100k, axes, task):
    """SAC's published return."""
    value, steps = published(task, after_100k)
    mark(axes, task, value, f"SAC at {steps}k, published")


def experiment(
    title,
    question,
    cells,
    criterion,
    notes,
    quick=(),
    measure=training.learning_curves,
    table=study.return_table,
    mark=scale,
):
    """An experiment on the returns of some runs, of which those named by `quick`, or the first, stand for all."""
    first = next(iter(cells))
    return Experiment(
        title=title,
        question=question,
        cells=cells,
        measure=measure,
        criterion=criterion,
        notes=notes,
        table=table,
        draw=functools.partial(draw_over_training, mark=mark),
        quick=lambda cells: training.smaller(cells, *(quick or [first])),
        sample=study.returns_sample(cells[first].seeds, "8 episodes"),
    )


def beside_published(title, question, cells, notes, after_100k=AFTER_100K, measure=training.learning_curves):
    """An experiment on the returns of SAC beside published ones."""
    return experiment(
        title,
        question,
        cells,
        Criterion(
            f"for each task: SAC's final interquartile mean is at least {FIGURES}.",
            functools.partial(reached, after_100k),
        ),
        f"{notes} A dashed line is the published return.",
        measure=measure,
        table=functools.partial(table, after_100k),
        mark=functools.partial(mark_published, after_100k),
    )


def curves(title, pairs, notes="", after_100k=AFTER_100K, **options):
    """Learning curves of pairs of an algorithm and a task."""
    return beside_published(
        title,
        "How fast do these runs learn, and how well, beside published returns?",
        cells(*pairs, **options),
        "All tasks have the same flags: two layers of 256 units, `--tau 0.005`, 8 environments, an update per step. "
        "The physics differ: ours is MJX in MuJoCo Playground, without action repeat; theirs is MuJoCo in dm_control, "
        f"with actions repeated two to eight times.{notes}",
        after_100k,
    )


def long(where, task):
    """SAC's learning curve over five times the steps."""
    # epochs of 15,500 steps: where two devices run at once, XLA:CPU frees some memory only at the end of an epoch
    length = "--total-steps 500000 --learning-starts 4000 --steps-per-epoch 15500 --buffer-size 500000"
    title = f"SAC reaches published returns in five times the steps: {where}"
    return curves(title, [("sac", task)], after_100k={}, seeds=2, length=length)


def repeated(task):
    """SAC's run on a task with repeated actions, of 100,000 of the task's steps."""
    repeat, warm_up, epochs = REPEATS[task], 1000, 5
    per_epoch = (100_000 // repeat - warm_up) // epochs // 8 * 8  # whole iterations of 8 environments
    length = f"--total-steps {warm_up + epochs * per_epoch} --learning-starts {warm_up} --steps-per-epoch {per_epoch}"
    return run("sac", task, f"{length} --env-params action_repeat={repeat}")


def curves_by_task_steps(run):
    """Learning curves over the steps of the task, of which each action takes several."""
    repeat = REPEATS[run.env.removeprefix("playground/")]
    return [row | {"progress": repeat * row["progress"]} for row in training.learning_curves(run)]


def shac_is_above(rows):
    """For each task: shac's final return is above ddpg's."""
    finals = {task: study.finals(rows, task) for task in study.envs(rows)}
    return {task: is_below(x["ddpg"], x["shac"]) for task, x in finals.items()}


def beside_ddpg(task):
    """SHAC's run on a task, and DDPG's."""
    return {f"shac on {task}": Run("shac", f"playground/{task}", WINDOWS, SEEDS)} | cells(("ddpg", task))


SMOOTH = {f"{name}, {activation}": (name, activation) for name in ("td3", "sac") for activation in ("silu", "relu")}


def smooth_holds(rows):
    """For each algorithm and task: SiLU's final return is not below ReLU's."""
    answers = {}
    for task in study.envs(rows):
        finals = study.finals(rows, task)
        for name in dict.fromkeys(variant.split(", ")[0] for variant in finals):
            answers[f"{name} on {task}"] = not is_below(finals[f"{name}, silu"], finals[f"{name}, relu"])
    return answers


def with_both(*tasks):
    """Pairs of SAC and TD3 with each task."""
    return [(algorithm, task) for task in tasks for algorithm in ("sac", "td3")]


EXPERIMENTS = {
    "cartpole": curves(
        "SAC reaches published returns on the Control Suite: balancing and swinging up a pole",
        [*with_both("CartpoleBalance", "CartpoleSwingup"), ("ddpg", "CartpoleSwingup")],
    ),
    "manipulation": curves(
        "SAC reaches published returns on the Control Suite: reaching, spinning, catching",
        with_both("ReacherEasy", "FingerSpin", "BallInCup"),
        " An episode of ReacherEasy or BallInCup earns nearly everything or nothing: a mean of eight is coarse.",
    ),
    "locomotion": curves(
        "SAC reaches published returns on the Control Suite: running and walking",
        [*with_both("CheetahRun", "WalkerWalk"), ("ddpg", "CheetahRun")],
    ),
    "running_long": long("running", "CheetahRun"),
    "walking_long": long("walking", "WalkerWalk"),
    "action_repeat": beside_published(
        "SAC reaches published returns on the Control Suite when it repeats actions as often",
        "How well does SAC learn these tasks when each action lasts as long as in the published runs?",
        {f"sac on {task}": repeated(task) for task in REPEATS},
        "Each action is repeated as often as in the papers on PlaNet and CURL, and there is one update for each "
        "action: an eighth to a half of the updates of the runs without repeats, with the same other flags. The steps "
        "are those of the task.",
        measure=curves_by_task_steps,
    ),
    "ppo_physics": experiment(
        "PPO learns the Control Suite in a quarter of the published steps",
        "How fast does PPO learn these tasks, and how well, beside published returns?",
        {f"ppo on {task}": Run("ppo", f"playground/{task}", PPO, SEEDS) for task in PPO_AFTER_8M},
        Criterion(
            "for each task: the final interquartile mean is at least CleanRL's of PPO after 8,000,000 steps.",
            functools.partial(reach, {f"ppo on {task}": least for task, least in PPO_AFTER_8M.items()}),
        ),
        "All tasks have the same flags: 32 environments, 64 steps, two layers of 64 units, normalized observations. A "
        "dashed line is the published return, a mean of 10 seeds and of training episodes. The physics differ: ours is "
        "MJX in MuJoCo Playground, theirs is MuJoCo in dm_control. Neither repeats actions.",
        mark=lambda axes, task: mark(axes, task, PPO_AFTER_8M[task], "CleanRL at 8,000k"),
        table=functools.partial(
            study.return_table, CleanRL=lambda label: f"{PPO_AFTER_8M[study.split(label)[1]]} after 8,000,000 steps"
        ),
    ),
    "svg_physics": experiment(
        "SVG balances a pole by the derivatives of MuJoCo's steps",
        "Do derivatives through whole rollouts of a physics engine train a policy?",
        {"svg on CartpoleBalance": Run("svg", "playground/CartpoleBalance", ROLLOUTS, SEEDS)},
        Criterion(
            "the final interquartile mean is at least 900, of 1,000 at most.",
            functools.partial(reach, {"svg on CartpoleBalance": 900}),
        ),
        "A rollout has the first 300 steps of an episode's 1,000. Networks have two layers of 64 units.",
    ),
    "short_windows_physics": experiment(
        "SHAC learns differentiable physics better than DDPG from as many steps",
        "Does SHAC, which differentiates the simulator, learn better than DDPG, which does not?",
        beside_ddpg("CartpoleBalance") | beside_ddpg("CartpoleSwingup") | beside_ddpg("ReacherEasy"),
        Criterion("for each task: SHAC's final return is above DDPG's after as many steps.", shac_is_above),
        "SHAC has two layers of 64 units, DDPG two of 256 and the flags of the other tasks. SHAC has 2 environments, "
        "chosen on CartpoleBalance with these seeds: with 8 it makes a quarter of the updates. The simulator has "
        "derivatives in reverse mode where its solver makes one iteration. The rewards of ReacherEasy are 0 or 1, "
        "which have no derivative to follow: there SHAC has its critic alone.",
        quick=("shac on CartpoleBalance", "ddpg on CartpoleBalance"),
    ),
    "smooth_physics": experiment(
        "Smooth networks are no worse than ReLU on the Control Suite",
        "Does the activation that is best on linear-quadratic systems also learn physics?",
        {
            f"{variant} on {task}": run(name, task, flags="" if activation == "silu" else f"--activation {activation}")
            for task in ("FingerSpin", "CheetahRun", "WalkerWalk")
            for variant, (name, activation) in SMOOTH.items()
        },
        Criterion("for each algorithm and task: the final return with SiLU is not below that with ReLU.", smooth_holds),
        "The runs with SiLU are those of the learning curves.",
    ),
}

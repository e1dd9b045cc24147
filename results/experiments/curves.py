"""Learning curves: every algorithm on every suitable environment, with the optimum where it is known."""

import functools
import math

import gymnax
import numpy as np

from amortax.common import lqr, plot
from experiments import drawing, study, training
from experiments.study import Criterion, Experiment
from experiments.training import FITTED, Run

ACTOR_CRITICS = ("ddpg", "td3", "sac_value", "sac")
STEPS = {  # flags of the actor-critics
    "Pendulum-v1": "--total-steps 10000 --steps-per-epoch 1000",
    "MountainCarContinuous-v0": "--total-steps 33000 --steps-per-epoch 4000",
    "PointRobot-misc": "--total-steps 17000 --steps-per-epoch 2000",
    "Reacher-misc": "--total-steps 17000 --steps-per-epoch 2000",
    "Swimmer-misc": "--total-steps 17000 --steps-per-epoch 2000",
    "LQR-v0": "--total-steps 25000 --steps-per-epoch 3000",
}
SHORTER = {  # flags of the others; Pendulum has their defaults
    "fitted": "--num-iterations 20 --iterations-per-epoch 4 --fit-steps 500",
    "svg": "--num-iterations 480 --iterations-per-epoch 48",
    "reinforce": "--total-steps 102400 --steps-per-epoch 10240",
}
MODEL = "--gamma 0.97 --num-rollouts 64 --iterations-per-epoch 80"
PPO = "--total-steps 98304 --steps-per-epoch 8192"  # whole iterations
LONGER = "--total-steps 2048000 --steps-per-epoch 204800"
SHAC = {"Reacher-misc": LONGER, "Swimmer-misc": LONGER}  # Pendulum-v1 has the defaults
LQR_GAMMA = 0.9
LQR_FLAGS = {  # for episodes of 20 steps and wide bounds of the actions
    **dict.fromkeys(FITTED, "--exploration-range 0.3"),
    "ddpg": "--ou-theta 1 --ou-dt 1 --ou-sigma 0.2 --target-period 1 --tau 0.005 --learning-rate 5e-4",
    "td3": "--exploration-noise 0.2 --learning-rate 3e-4",
    "sac_value": "--alpha 0.2",
    "svg": "--horizon 20",
    "shac": "--num-steps 20",
}


def runs(env):
    """`{label: Run}` of all algorithms on an environment with continuous actions."""

    def run(algorithm, flags):
        if env == "LQR-v0":
            flags = f"{flags} {LQR_FLAGS.get(algorithm, '')} --gamma {LQR_GAMMA}"
        return Run(algorithm, env, " ".join(flags.split()))

    flags = dict.fromkeys(SHORTER, "") if env == "Pendulum-v1" else dict(SHORTER)
    if env == "MountainCarContinuous-v0":
        flags["fitted"] += " --num-eval-episodes 32"  # of 999 steps, each with a call of the solver
    nodes = "--num-nodes 12" if env.endswith("-misc") else ""  # of a quadrature over two actions
    fitted = {name: f"{flags['fitted']} {nodes * (name == 'soft_fqi')}" for name in FITTED}
    cells = {name: run(name, STEPS[env]) for name in ACTOR_CRITICS}
    cells |= {name: run(name, flags) for name, flags in fitted.items()}
    cells |= {"svg": run("svg", flags["svg"]), "svg_model": run("svg_model", MODEL)}
    cells |= {"reinforce": run("reinforce", flags["reinforce"])}
    return cells | {"ppo": run("ppo", PPO), "shac": run("shac", SHAC.get(env, ""))}


GROWING = (
    "--maximizer exhaustive --gamma 0.99 --rounds 6 --num-base-points 30000 --num-envs 10 --exploration-noise 0.2"
    " --num-iterations 600 --iterations-per-epoch 20 --fit-steps 100"
)
LEAST = {"CartPole-v1": 475, "Acrobot-v1": -90, "MountainCar-v0": -130}  # final returns that solve these tasks
DISCRETE = {f"fqi on {env}": Run("fqi", env, GROWING, seeds=8) for env in LEAST} | {
    f"reinforce on {env}": Run("reinforce", env, "--total-steps 256000 --steps-per-epoch 25600")
    for env in ("CartPole-v1", "Acrobot-v1")
}

# dqn's on CartPole-v1 and Acrobot-v1, where a mistake of now shows hundreds of steps later
SWINGING = "--gamma 0.995 --batch-size 256 --epsilon-steps 5000"
WIDE = "--hidden-sizes 256 256 --activation relu"  # rl-zoo's network for MountainCar-v0
ONLINE = {  # of whole iterations
    "dqn on CartPole-v1": Run("dqn", "CartPole-v1", f"--total-steps 49960 --steps-per-epoch 4896 {SWINGING}"),
    "ppo on CartPole-v1": Run("ppo", "CartPole-v1", PPO),
    "dqn on Acrobot-v1": Run("dqn", "Acrobot-v1", f"--total-steps 99960 --steps-per-epoch 9896 {SWINGING}"),
    "ppo on Acrobot-v1": Run("ppo", "Acrobot-v1", PPO),
    "dqn on MountainCar-v0": Run("dqn", "MountainCar-v0", f"--total-steps 119960 --steps-per-epoch 11896 {WIDE}"),
    "ppo on MountainCar-v0": Run("ppo", "MountainCar-v0", PPO),
}
REACHED = {  # final returns of solved tasks
    "dqn on CartPole-v1": 500,
    "ppo on CartPole-v1": 500,
    "dqn on Acrobot-v1": -80,
    "dqn on MountainCar-v0": -112,
}
MINATAR_LENGTH = "--total-steps 1966080 --steps-per-epoch 196608"
MINATAR_LONG = "--total-steps 9830400 --steps-per-epoch 983040"
MINATAR_PPO = (
    "--num-envs 64 --num-steps 128 --update-epochs 4 --num-minibatches 8 --actor-learning-rate 3e-3"
    " --critic-learning-rate 3e-3 --gamma 0.99 --gae-lambda 0.95 --entropy-coef 0.03"
    " --hidden-sizes 128 128 --activation relu"
)
MINATAR_DQN = (
    "--total-steps 999872 --steps-per-epoch 99488 --learning-starts 4992 --num-envs 8 --num-steps 4 --utd-ratio 0.25"
    " --batch-size 32 --learning-rate 3e-4 --epsilon-steps 100000 --epsilon-end 0.02"
)
INVADERS = "ppo on SpaceInvaders-MinAtar"
GAMES = {"Breakout-MinAtar": 55, "SpaceInvaders-MinAtar": 135}  # final returns asked of ppo
MINATAR = {
    f"{algorithm} on {env}": Run(algorithm, env, flags, seeds=8)
    for env in GAMES
    for algorithm, flags in (("dqn", MINATAR_DQN), ("ppo", f"{MINATAR_LENGTH} {MINATAR_PPO}"))
}


def reach(least, rows):
    """For each label of `least`: whether its final interquartile mean is at least that."""
    return {label: plot.iqm(study.final(rows, label)) >= x for label, x in least.items() if label in study.labels(rows)}


def listed(least):
    """`{label: number}` as text."""
    return ", ".join(f"{number} for {label}" for label, number in least.items())


def discrete_holds(rows):
    """For each environment: whether fqi's final interquartile mean solves it."""
    solved = lambda env: plot.iqm(study.final(rows, f"fqi on {env}")) >= LEAST[env]
    return {env: solved(env) for env in LEAST if f"fqi on {env}" in study.labels(rows)}


def optimum(env):
    """The best mean return of any policy, of `-K s` on a linear-quadratic system; None where it is not known."""
    if env in lqr.ENVS:
        return lqr_return(gymnax.make(env)[1])
    rows = study.read(study.RESULTS / "data" / "optimum.csv")
    values = [float(row["return"]) for row in rows if row["env"] == env]
    return values[-1] if values else None  # of the finest grid


def lqr_return(system):
    """Expected undiscounted return of an episode of the policy that is optimal for discount `LQR_GAMMA`."""
    K = lqr.solve(system, LQR_GAMMA).K
    A, B, Q, R, noise = (np.asarray(x, np.float64) for x in (system.A, system.B, system.Q, system.R, system.noise))
    closed_loop, cost, total = A - B @ K, Q + K.T @ R @ K, 0.0
    covariance = np.eye(len(A)) / 3  # of starts uniform in [-1, 1]
    for _ in range(system.max_steps_in_episode):
        total -= np.trace(cost @ covariance)
        covariance = closed_loop @ covariance @ closed_loop.T + noise @ noise.T
    return total


PANELS = {  # title: its algorithms, unit of progress, and what that is divided by
    "replay": (ACTOR_CRITICS, "environment steps (thousands)", 1e3),
    "fitted to random base points": (FITTED, "iterations", 1),
    "policy gradients": (
        ("svg", "svg_model", "shac", "reinforce", "ppo"),
        "environment steps (thousands, log scale)",
        1e3,
    ),
}
TICKS = {"Pendulum-v1": (-1500, -1000, -500, -300, -200, -150), "LQR-v0": (-100, -50, -20, -10, -5, -4)}


def draw(env, rows):
    """A panel for each family of algorithms, all with the same axis of returns."""
    page, panels = drawing.figure(11, 3.6, 1, len(PANELS), sharey=True)
    present = study.labels(rows)
    for axes, (title, (algorithms, unit, per)) in zip(panels[0], PANELS.items(), strict=True):
        for label in filter(present.__contains__, algorithms):
            drawing.draw_curve(axes, rows, label, label, per=per, color=drawing.algorithm_color(label))
        drawing.draw_optimum(axes, optimum(env))
        axes.set(title=title, xlabel=unit)
        if "log" in unit:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    panels[0][0].set_ylabel(f"{env}\ngreedy return per episode" + " (log scale)" * (env in TICKS))
    if env in TICKS:
        panels[0][0].set_yscale("symlog", linthresh=1)  # the returns are negative
        panels[0][0].set_yticks(TICKS[env], [f"{tick:,}" for tick in TICKS[env]])
        panels[0][0].minorticks_off()
        panels[0][0].set_ylim(top=0.9 * optimum(env))
    return page


def notes(env, note, rows):
    """The best algorithm and the optimum, where it is known, before a note."""
    best = max(study.labels(rows), key=lambda label: plot.iqm(study.final(rows, label)))
    value, limit = plot.iqm(study.final(rows, best)), optimum(env)
    known = "" if limit is None else f"; the optimum is {limit:.1f}"
    return f"The highest final interquartile mean is that of {best}, {value:.1f}{known}. {note}"


def table(rows):
    """Returns, and how long each algorithm was trained."""
    trained = lambda label: f"{study.trained_for(rows, label):,.0f} {'iterations' if label in FITTED else 'steps'}"
    return study.return_table(rows, first="algorithm", trained_for=trained)


QUICK = {  # every algorithm somewhere
    "Pendulum-v1": ("ddpg", "td3", "fqi", "svg"),
    "MountainCarContinuous-v0": ("nfqca",),
    "PointRobot-misc": ("sac_value",),
    "Reacher-misc": ("sac", "svg_model", "ppo"),
    "Swimmer-misc": ("fqi_amortized", "shac"),
    "LQR-v0": ("soft_fqi", "reinforce"),
}


def experiment(env, note, episodes="128 episodes"):
    """The learning curves on one environment."""
    return Experiment(
        title=f"Learning curves: {env}",
        question=f"How fast does each algorithm learn {env}, and how well?",
        cells=runs(env),
        measure=training.learning_curves,
        notes=functools.partial(notes, env, note),
        table=table,
        draw=functools.partial(draw, env),
        quick=lambda cells: training.smaller(cells, *QUICK[env]),
        sample=study.returns_sample(episodes=episodes),
    )


def draw_over_training(rows, mark=lambda axes, env: drawing.draw_optimum(axes, optimum(env))):
    """Return over training, a panel for each environment, in which `mark(axes, env)` draws what is known of it."""
    envs = study.envs(rows)
    height, width = math.ceil(len(envs) / 4), min(len(envs), 4)
    page, panels = drawing.figure(4.6 * width, 3.6 * height, height, width)
    for axes in panels.flat[len(envs) :]:
        axes.remove()
    for axes, env in zip(panels.flat, envs, strict=False):
        seen = []
        for label, variant in study.variants(rows, env).items():
            color = drawing.algorithm_color(label)  # variants of one algorithm differ in their lines
            style = {"color": color, "linestyle": drawing.LINES[seen.count(color)]}
            drawing.draw_curve(axes, rows, label, variant, per=1e3, **style)
            seen.append(color)
        mark(axes, env)
        axes.set(title=env, xlabel="environment steps (thousands)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in panels[:, 0]:
        axes.set_ylabel("greedy return per episode")
    return page


def mark_balance(axes, env):
    """The highest return of CartPole-v1, with reward 1 in each of at most 500 steps."""
    drawing.draw_optimum(axes, 500 if env == "CartPole-v1" else None)


def length_table(rows):
    """Returns, and how many steps each algorithm was trained for."""
    return study.return_table(rows, trained_for=lambda label: f"{study.trained_for(rows, label):,.0f} steps")


def draw_discrete(rows):
    """A panel for each algorithm and environment."""
    labels = study.labels(rows)
    page, panels = drawing.figure(2.8 * len(labels), 3.2, 1, len(labels))
    for axes, label in zip(panels[0], labels, strict=True):
        algorithm, env = study.split(label)
        per, unit = (1, "iterations") if algorithm in FITTED else (1e3, "environment steps (thousands)")
        drawing.draw_curve(axes, rows, label, algorithm, per=per, color=drawing.algorithm_color(label))
        mark_balance(axes, env)
        axes.set(title=label, xlabel=unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0][0].set_ylabel("greedy return per episode")
    return page


EXPERIMENTS = {
    "curves_pendulum": experiment("Pendulum-v1", "Fitted Q-iteration has only 20,000 random steps to learn from."),
    "curves_mountain_car": experiment(
        "MountainCarContinuous-v0",
        "The only reward is at the top of the hill; a return near 0 is a policy that stands still because exploration "
        "never reached it.",
        episodes="128 episodes, 32 for the fitted algorithms",
    ),
    "curves_point_robot": experiment(
        "PointRobot-misc", "The goal is not observed, so the policy can only search for it."
    ),
    "curves_reacher": experiment("Reacher-misc", "SVG differentiates the environment, and takes many more steps."),
    "curves_swimmer": experiment("Swimmer-misc", "SVG differentiates the environment, and takes many more steps."),
    "curves_lqr": experiment("LQR-v0", "The dashed line is the expected return of the Riccati gain, in closed form."),
    "curves_discrete": Experiment(
        title="A growing batch solves tasks with discrete actions by fitted Q-iteration",
        question="How fast do fitted Q-iteration and REINFORCE learn with discrete actions, and how well?",
        cells=DISCRETE,
        measure=training.learning_curves,
        criterion=Criterion(
            "for each environment: fqi's final interquartile mean is at least "
            + ", ".join(f"{least} on {env}" for env, least in LEAST.items())
            + ".",
            discrete_holds,
        ),
        notes="With few actions fqi evaluates all of them, and reinforce samples one. The base points of fqi grow in "
        "six rounds of 5,000 steps, the first with random actions, the others with epsilon-greedy ones, and each round "
        "has a hundred short fits. The policy after each evaluation is the best so far, chosen by 32 training episodes "
        "of its own, not by those of the evaluation.",
        table=study.return_table,
        draw=draw_discrete,
        quick=lambda cells: training.smaller(cells, "fqi on CartPole-v1", "reinforce on CartPole-v1"),
        sample="8 seeds of fqi and 16 of reinforce; each return is the mean of 128 episodes",
    ),
    "curves_online_discrete": Experiment(
        title="DQN and PPO solve tasks with discrete actions",
        question="How fast do DQN and PPO learn with discrete actions, and how well?",
        cells=ONLINE,
        measure=training.learning_curves,
        criterion=Criterion(
            f"for each task: the final interquartile mean is at least {listed(REACHED)}.",
            functools.partial(reach, REACHED),
        ),
        notes="On MountainCar-v0 the networks of DQN are those of rl-zoo, two layers of 256 ReLU units, elsewhere two "
        "of 64 SiLU units. On CartPole-v1 and Acrobot-v1 it has batches of 256 and a discount of 0.995, and epsilon "
        "is at its end by step 5,000. A reward of -1 for each step until the goal says nothing before it is reached, "
        "which on MountainCar-v0 random actions hardly ever do: PPO, which has no replay, has nothing to learn from.",
        table=length_table,
        draw=functools.partial(draw_over_training, mark=mark_balance),
        quick=lambda cells: training.smaller(cells, "dqn on CartPole-v1", "ppo on CartPole-v1"),
        sample=study.returns_sample(),
    ),
    "curves_minatar": Experiment(
        title="PPO learns Breakout and Space Invaders of MinAtar in two million steps",
        question="How fast do DQN and PPO learn games from images of 10 x 10 pixels, and how well?",
        cells=MINATAR,
        measure=training.learning_curves,
        criterion=Criterion(
            "for each game: PPO's final interquartile mean is at least "
            + ", ".join(f"{least} on {env}" for env, least in GAMES.items())
            + ".",
            functools.partial(reach, {f"ppo on {env}": least for env, least in GAMES.items()}),
        ),
        notes="Images are flattened, and networks have two layers without convolutions, of 64 units for DQN and of 128 "
        "for PPO. The other settings of PPO are those that PureJaxRL publishes for these games, but a fifth of its "
        "steps, 0.003 instead of 0.005 as the step size and 0.03 instead of 0.01 as the weight of the entropy. DQN "
        "makes an update every four steps.",
        table=length_table,
        draw=draw_over_training,
        quick=lambda cells: training.smaller(cells, "dqn on Breakout-MinAtar", "ppo on Breakout-MinAtar"),
        sample=study.returns_sample(8),
    ),
    "minatar_long": Experiment(
        title="PPO scores 180 in Space Invaders of MinAtar after ten million steps",
        question="How much better does PPO play after five times the steps?",
        cells={INVADERS: MINATAR[INVADERS]._replace(flags=f"{MINATAR_LONG} {MINATAR_PPO}")},
        measure=training.learning_curves,
        criterion=Criterion(
            "for this game: the final interquartile mean is at least 180.", functools.partial(reach, {INVADERS: 180})
        ),
        notes="The settings are those of the runs with two million steps, but for the length, over which the step size "
        "falls to zero.",
        table=length_table,
        draw=draw_over_training,
        quick=lambda cells: training.smaller(cells, INVADERS),
        sample=study.returns_sample(8),
    ),
}

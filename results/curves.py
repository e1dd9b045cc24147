"""Learning curves: every algorithm on every environment that fits it, with the optimum where it is known."""

import gymnax
import numpy as np
import study
from study import FITTED, ROOT, Experiment, Run

from common import lqr, plot

ACTOR_CRITICS = ("ddpg", "td3", "sac_value", "sac")
STEPS = {  # flags of the actor-critics
    "Pendulum-v1": "--total-steps 10000 --steps-per-epoch 1000",
    "MountainCarContinuous-v0": "--total-steps 33000 --steps-per-epoch 4000",
    "PointRobot-misc": "--total-steps 17000 --steps-per-epoch 2000",
    "Reacher-misc": "--total-steps 17000 --steps-per-epoch 2000",
    "Swimmer-misc": "--total-steps 17000 --steps-per-epoch 2000",
    "LQR-v0": "--total-steps 25000 --steps-per-epoch 3000",
}
FEWER = {  # of the others, where it is not Pendulum, whose defaults these are
    "fitted": "--num-iterations 20 --iterations-per-epoch 4 --fit-steps 500",
    "svg": "--num-iterations 480 --iterations-per-epoch 48",
    "reinforce": "--total-steps 102400 --steps-per-epoch 10240",
}
LEARNED = "--model learned --gamma 0.97 --num-rollouts 64"
LQR_GAMMA = 0.9
LQR_FLAGS = {  # what episodes of 20 steps and wide bounds of the actions ask for
    **dict.fromkeys(FITTED, "--exploration-range 0.3"),
    "ddpg": "--ou-theta 1 --ou-dt 1 --ou-sigma 0.2 --target-period 1 --tau 0.005 --learning-rate 5e-4",
    "td3": "--exploration-noise 0.2 --learning-rate 3e-4",
    "sac_value": "--alpha 0.2",
    "svg": "--horizon 20",
}


def runs(env):
    """`{label: Run}` of all algorithms on an environment with a box of actions."""

    def run(algorithm, flags):
        if env == "LQR-v0":
            flags = f"{flags} {LQR_FLAGS.get(algorithm, '')} --gamma {LQR_GAMMA}"
        return Run(algorithm, env, " ".join(flags.split()))

    few = dict.fromkeys(FEWER, "") if env == "Pendulum-v1" else dict(FEWER)
    if env == "MountainCarContinuous-v0":
        few["fitted"] += " --num-eval-episodes 32"  # of 999 steps, with a solver at each
    nodes = "--num-nodes 12" if env.endswith("-misc") else ""  # of a quadrature over two actions
    fitted = {name: f"{few['fitted']} {nodes * (name == 'soft_fqi')}" for name in FITTED}
    cells = {name: run(name, STEPS[env]) for name in ACTOR_CRITICS}
    cells |= {name: run(name, flags) for name, flags in fitted.items()}
    cells |= {"svg": run("svg", few["svg"]), "svg learned": run("svg", f"{LEARNED} --iterations-per-epoch 80")}
    return cells | {"reinforce": run("reinforce", few["reinforce"])}


DISCRETE = {
    "fqi on CartPole-v1": Run("fqi", "CartPole-v1", f"--maximizer exhaustive --gamma 0.99 {FEWER['fitted']}"),
    "fqi on Acrobot-v1": Run("fqi", "Acrobot-v1", f"--maximizer exhaustive --gamma 0.99 {FEWER['fitted']}"),
    "reinforce on CartPole-v1": Run("reinforce", "CartPole-v1", "--total-steps 256000 --steps-per-epoch 25600"),
    "reinforce on Acrobot-v1": Run("reinforce", "Acrobot-v1", "--total-steps 256000 --steps-per-epoch 25600"),
}


def optimum(env):
    """The best mean return of any policy, of `-K s` on a linear-quadratic system; None where it is not known."""
    if env in lqr.ENVS:
        return lqr_return(gymnax.make(env)[1])
    rows = study.read(ROOT / "results" / "optimum.csv")
    values = [float(row["return"]) for row in rows if row["env"] == env]
    return values[-1] if values else None  # the finest grid's


def lqr_return(system):
    """Expected undiscounted return of an episode of the policy that is best for discount `LQR_GAMMA`."""
    K = lqr.solve(system, LQR_GAMMA).K
    A, B, Q, R, noise = (np.asarray(x, np.float64) for x in (system.A, system.B, system.Q, system.R, system.noise))
    closed, cost, covariance, total = A - B @ K, Q + K.T @ R @ K, np.eye(len(A)) / 3, 0.0  # of [-1, 1]: 1/3
    for _ in range(system.max_steps_in_episode):
        total -= np.trace(cost @ covariance)
        covariance = closed @ covariance @ closed.T + noise @ noise.T
    return total


PANELS = {  # title: its algorithms, unit of progress, and what that is divided by
    "replay": (ACTOR_CRITICS, "environment steps (thousands)", 1e3),
    "fitted to random base points": (FITTED, "iterations", 1),
    "policy gradients": (("svg", "svg learned", "reinforce"), "environment steps (thousands, log scale)", 1e3),
}
TICKS = {"Pendulum-v1": (-1500, -1000, -500, -300, -200, -150), "LQR-v0": (-100, -50, -20, -10, -5, -4)}
NAMES = {"svg": "svg, true model", "svg learned": "svg, learned model"}


def draw(env, rows):
    """A panel for each family of algorithms, all with one axis of returns."""
    page, panels = study.figure(11, 3.6, 1, len(PANELS), sharey=True)
    present = study.labels(rows)
    for axes, (title, (algorithms, unit, per)) in zip(panels[0], PANELS.items(), strict=True):
        for label in filter(present.__contains__, algorithms):
            style = {"color": plot.COLOURS[label.split()[0]], "linestyle": "--" if label == "svg learned" else "-"}
            study.draw_curve(axes, rows, label, NAMES.get(label, label), per=per, **style)
        study.optimum_line(axes, optimum(env))
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


def report(env, note, rows):
    """What came out: the table, and how far the best is from the optimum."""
    steps = {label: study.returns(rows, label)[0][-1] for label in study.labels(rows)}
    unit = lambda label: f"{steps[label]:,.0f} {'iterations' if label in FITTED else 'steps'}"
    best = max(study.labels(rows), key=lambda label: plot.iqm(study.final(rows, label)))
    value, limit = plot.iqm(study.final(rows, best)), optimum(env)
    far = "" if limit is None else f", where the best policy has {limit:.1f}"
    text = f"The highest interquartile mean at the end is that of {best}, {value:.1f}{far}. {note}"
    return "\n".join([text, "", study.return_table(rows, trained_for=unit)])


QUICK = {  # every algorithm somewhere
    "Pendulum-v1": ("ddpg", "td3", "fqi", "svg"),
    "MountainCarContinuous-v0": ("nfqca",),
    "PointRobot-misc": ("sac_value",),
    "Reacher-misc": ("sac", "svg learned"),
    "Swimmer-misc": ("fqi_amortized",),
    "LQR-v0": ("soft_fqi", "reinforce"),
}


def experiment(env, note, episodes="128 episodes"):
    """The learning curves on one environment."""
    return Experiment(
        title=f"Learning curves: {env}",
        cells=runs(env),
        measure=study.learning_curves,
        draw=lambda rows: draw(env, rows),
        report=lambda rows: report(env, note, rows),
        quick=lambda cells: study.smaller(cells, *QUICK[env]),
        sample=study.sample(episodes=episodes),
    )


def draw_discrete(rows):
    """A panel for each algorithm and environment."""
    labels = study.labels(rows)
    page, panels = study.figure(2.8 * len(labels), 3.2, 1, len(labels))
    for axes, label in zip(panels[0], labels, strict=True):
        algorithm, _, env = label.split()
        per, unit = (1, "iterations") if algorithm in FITTED else (1e3, "environment steps (thousands)")
        study.draw_curve(axes, rows, label, algorithm, per=per, color=plot.COLOURS[algorithm])
        study.optimum_line(axes, 500 if env == "CartPole-v1" else None)  # a reward of 1 for each of 500 steps at most
        axes.set(title=label, xlabel=unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0][0].set_ylabel("greedy return per episode")
    return page


def report_discrete(rows):
    """What came out."""
    text = (
        "Where actions are few, fitted Q-iteration tries them all, and REINFORCE samples them. Fitted Q-iteration "
        "learns from 20,000 random steps alone, which end before they have seen what a good policy sees."
    )
    return "\n".join([text, "", study.return_table(rows)])


DISCRETE_EXPERIMENT = Experiment(
    title="Learning curves: discrete actions",
    cells=DISCRETE,
    measure=study.learning_curves,
    draw=draw_discrete,
    report=report_discrete,
    quick=lambda cells: study.smaller(cells, "fqi on CartPole-v1", "reinforce on CartPole-v1"),
    sample=study.sample(),
)
EXPERIMENTS = {
    "curves_pendulum": experiment("Pendulum-v1", "Fitted-Q learns from 20,000 random steps alone."),
    "curves_mountain_car": experiment(
        "MountainCarContinuous-v0",
        "A return of 0 is to stand still and never have seen the top of the hill, where the only reward is.",
        episodes="128 episodes, 32 where base points are fitted",
    ),
    "curves_point_robot": experiment(
        "PointRobot-misc", "The goal is hidden from the policy, which can but search for it in the dark."
    ),
    "curves_reacher": experiment("Reacher-misc", "SVG differentiates the true model over many more steps."),
    "curves_swimmer": experiment("Swimmer-misc", "SVG differentiates the true model over many more steps."),
    "curves_lqr": experiment("LQR-v0", "The dashed line is the Riccati gain's expected return, in closed form."),
    "curves_discrete": DISCRETE_EXPERIMENT,
}

"""Common claims about the algorithms, tested on their returns: each has a criterion, a verdict and a figure."""

from amortax.common import plot
from experiments import drawing, study, training, value_bias
from experiments.curves import (
    DISCRETE,
    LQR_FLAGS,
    LQR_GAMMA,
    ONLINE,
    STEPS,
    draw_over_training,
    length_table,
    optimum,
    runs,
)
from experiments.study import Criterion, Experiment, is_below
from experiments.training import Run

PENDULUM, CAR, REACHER, SWIMMER, LQR = (
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "Reacher-misc",
    "Swimmer-misc",
    "LQR-v0",
)


def cells(variants, envs):
    """`{label: Run}` of `{variant: (algorithm, flags, change)}` in each environment, as long as its learning curves."""
    return {
        f"{variant} on {env}": Run(algorithm, env, f"{STEPS[env]} {flags}".strip(), change=change)
        for env in envs
        for variant, (algorithm, flags, change) in variants.items()
    }


def best(finals, text):
    """Of the variants with `text` in their names, the one with the highest interquartile mean: its values."""
    return max((values for variant, values in finals.items() if text in variant), key=plot.iqm)


def draw_final_returns(rows):
    """For each environment a panel with the final return of each variant: side by side, or one below the other."""
    envs = study.envs(rows)
    widths = [len(study.variants(rows, env)) for env in envs]
    if sum(widths) > 8:
        page, panels = drawing.figure(8, 3 * len(envs), len(envs), 1)
    else:
        page, panels = drawing.figure(1.6 + 0.95 * sum(widths), 3.6, 1, len(envs), width_ratios=widths)
    for axes, env in zip(panels.ravel(), envs, strict=True):
        variants = study.variants(rows, env)
        names = {label: name.replace(", ", "\n").replace(" ", "\n") for label, name in variants.items()}
        values = {label: study.final(rows, label) for label in names}
        drawing.draw_points(axes, names, values, color=drawing.algorithm_color)
        drawing.draw_optimum(axes, optimum(env))
        axes.set_title(env)
        axes.tick_params(axis="x", labelsize="small")
    for axes in panels[:, 0]:
        axes.set_ylabel("final greedy return")
    return page


def over_training_table(rows, digits=1):
    """Final returns, and means over training."""
    mean = lambda label: study.estimate(study.mean_over_training(rows, label), digits)
    return study.return_table(rows, digits, mean_over_training=mean)


# Overestimation

OVERESTIMATION = {
    "ddpg": ("ddpg", "", ""),
    "td3": ("td3", "", ""),
    "td3, one critic": ("td3", "", "td3_one_critic"),
    "td3, no smoothing": ("td3", "--target-noise 0", ""),
    "td3, no delay": ("td3", "--policy-delay 1", ""),
}


def overestimation_holds(rows):
    """For each environment: DDPG's bias above zero, TD3's not positive, and above TD3's with one critic."""
    answers = {}
    for env in study.envs(rows):
        bias = study.finals(rows, env, "value_bias")
        one_critic = bias.get("td3, one critic", bias["ddpg"])
        ddpg_overestimates = is_below(0 * bias["ddpg"], bias["ddpg"])
        answers[env] = ddpg_overestimates and plot.iqm(bias["td3"]) <= 0 and is_below(bias["td3"], one_critic)
    return answers


def overestimation_table(rows):
    """Final returns and biases."""
    bias = lambda label: study.estimate(study.final(rows, label, "value_bias"))
    return study.return_table(rows, final_bias=bias)


def draw_overestimation(rows):
    """Bias above, return below, over training; a column for each environment."""
    envs = study.envs(rows)
    page, panels = drawing.figure(5 * len(envs), 6, 2, len(envs), sharex="col")
    for (above, below), env in zip(panels.T, envs, strict=True):
        for i, (label, variant) in enumerate(study.variants(rows, env).items()):
            style = {"color": drawing.algorithm_color(label), "linestyle": drawing.LINES[max(0, i - 1)]}
            drawing.draw_curve(above, rows, label, variant, "value_bias", per=1e3, **style)
            drawing.draw_curve(below, rows, label, variant, per=1e3, **style)
        above.axhline(0, color="black", linewidth=0.8)
        drawing.draw_optimum(below, optimum(env))
        above.set_title(env)
        below.set_xlabel("environment steps (thousands)")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("value bias: critic's value minus\ndiscounted return, greedy policy")
    panels[1][0].set_ylabel("greedy return per episode")
    panels[0][0].legend(fontsize="small")
    return page


# Exploration

AS_WIDE = 0.92  # stationary standard deviation of DDPG's default process
OU_AS_GAUSSIAN = "--ou-theta 1 --ou-dt 1 --ou-sigma"
EXPLORATION = {
    "ddpg, OU": ("ddpg", "", ""),
    "ddpg, Gaussian 0.92": ("ddpg", f"{OU_AS_GAUSSIAN} {AS_WIDE}", ""),
    "ddpg, Gaussian 0.1": ("ddpg", f"{OU_AS_GAUSSIAN} 0.1", ""),
    "td3, OU": ("td3", "", "td3_ou_noise"),
    "td3, Gaussian 0.92": ("td3", f"--exploration-noise {AS_WIDE}", ""),
    "td3, Gaussian 0.1": ("td3", "", ""),
}
HELD = {
    "td3, Gaussian held": ("td3", "--exploration-noise 0.5", "td3_held_noise"),
    "sac, held": ("sac", "", "sac_held_noise"),
}


def exploration_holds(rows):
    """For each algorithm and environment: the better of two Gaussians is not below Ornstein-Uhlenbeck noise."""
    answers = {}
    for env in study.envs(rows):
        finals = study.finals(rows, env)
        for algorithm in ("ddpg", "td3"):
            if f"{algorithm}, OU" in finals and any(f"{algorithm}, Gaussian 0" in variant for variant in finals):
                gaussian = best(finals, f"{algorithm}, Gaussian 0")
                answers[f"{algorithm} on {env}"] = not is_below(gaussian, finals[f"{algorithm}, OU"])
    return answers


# Policy delay

DELAY = {f"td3, delay {n}": ("td3", "" if n == 2 else f"--policy-delay {n}", "") for n in (1, 2, 4)}


def delay_holds(rows):
    """For each environment: the default delay is above no delay."""
    finals = {env: study.finals(rows, env) for env in study.envs(rows)}
    return {env: is_below(x["td3, delay 1"], x["td3, delay 2"]) for env, x in finals.items()}


# Target networks: copied every K updates, or averaged at every update

TARGETS = {
    "ddpg, every 1": ("ddpg", "--target-period 1", ""),
    "ddpg, every 40": ("ddpg", "", ""),
    "ddpg, every 200": ("ddpg", "--target-period 200", ""),
    "ddpg, tau 0.1": ("ddpg", "--target-period 1 --tau 0.1", ""),
    "ddpg, tau 0.02": ("ddpg", "--target-period 1 --tau 0.02", ""),
    "ddpg, tau 0.005": ("ddpg", "--target-period 1 --tau 0.005", ""),
}


def targets_hold(rows):
    """For each environment: of the best copies and the best averages, neither is below the other."""
    answers = {}
    for env in study.envs(rows):
        finals = study.finals(rows, env)
        copied = best(finals, "every")
        averaged = best(finals, "tau" if any("tau" in variant for variant in finals) else "every")
        answers[env] = not is_below(copied, averaged) and not is_below(averaged, copied)
    return answers


# Amortization: how many exact solutions a policy needs, and how long a window of them

AMORTIZATION = {  # variant: algorithm and flags; a fraction of 0.1 and a window of 4 are the defaults
    "fqi": ("fqi", ""),
    **{f"exact {x}": ("fqi_amortized", f"--exact-fraction {x}" * (x != 0.1)) for x in (0.5, 0.1, 0.01)},
    "nfqca": ("nfqca", ""),
    **{f"window {k}": ("fqi_amortized", f"--window {k}") for k in (0, 1, 16)},
}
CLAIMED = ("exact 0.1", "nfqca")
AMORTIZATION_PANELS = {
    "exact maximizers at a fraction of base points": lambda label: not label.startswith("window"),
    "window of past iterations, exact 0.1": lambda label: label.startswith("window") or label == "exact 0.1",
}


def not_below_fqi(rows):
    """For each variant: it is not below fqi."""
    fqi = study.final(rows, "fqi")
    return {label: not is_below(study.final(rows, label), fqi) for label in study.labels(rows) if label != "fqi"}


def amortization_holds(rows):
    """The answers for the variants in the claim."""
    return {label: answer for label, answer in not_below_fqi(rows).items() if label in CLAIMED}


def amortization_notes(rows):
    """The answers for the other variants."""
    others = {label: answer for label, answer in not_below_fqi(rows).items() if label not in CLAIMED}
    text = (
        "fqi solves for the maximizing action at every base point; `exact x` solves at a fraction x of them and fits "
        "the policy to these solutions; nfqca has no solver. `window n` is exact 0.1 with the solutions of n past "
        "iterations kept, where the default is 4."
    )
    listed = "; ".join(f"{label}: {'yes' if answer else 'no'}" for label, answer in others.items())
    return text + (f" The criterion for the other variants: {listed}." if others else "")


def draw_amortization(rows):
    """How far final returns are below the optimum, over the fraction of exact maximizers and over the window."""
    limit = optimum(PENDULUM)
    gaps = {label: limit - study.final(rows, label) for label in study.labels(rows)}
    chosen = [list(filter(which, gaps)) for which in AMORTIZATION_PANELS.values()]
    color = lambda label: plot.COLORS.get(label, plot.COLORS["fqi_amortized"])
    widths = [max(1, len(labels)) for labels in chosen]
    page, panels = drawing.figure(10, 3.8, 1, 2, sharey=True, width_ratios=widths)
    for axes, (title, _), labels in zip(panels[0], AMORTIZATION_PANELS.items(), chosen, strict=True):
        if "window" in title:  # in the order of the window
            labels = sorted(labels, key=lambda label: 4 if label == "exact 0.1" else int(label.split()[1]))
        names = {x: "window 4" if x == "exact 0.1" and "window" in title else x for x in labels}
        names = {label: name.replace(" ", "\n") for label, name in names.items()}
        drawing.draw_points(axes, names, gaps, color=color)
        axes.set(title=title, yscale="log")
    panels[0][0].set_ylabel(f"final return below the optimum, {limit:.1f} (log scale)")
    return page


# Pathwise gradients against score functions; the experiment `gradient_variance` compares their variances

SAMPLES = "--num-rollouts 20 --horizon 50 --num-iterations 512 --iterations-per-epoch 32"  # 1,000 steps an update
SAMPLES_LQR = "--num-rollouts 50 --num-iterations 512 --iterations-per-epoch 32"
PATHWISE = {
    f"svg on {PENDULUM}": Run("svg", PENDULUM, SAMPLES),
    f"reinforce on {PENDULUM}": Run("reinforce", PENDULUM, ""),
    f"svg on {LQR}": Run("svg", LQR, f"{SAMPLES_LQR} {LQR_FLAGS['svg']} --gamma {LQR_GAMMA}"),
    f"reinforce on {LQR}": Run("reinforce", LQR, f"--gamma {LQR_GAMMA}"),
}


def higher_over_training(rows, variant, other):
    """For each environment: the mean over training of `variant` is above that of `other`."""
    mean = lambda variant, env: study.mean_over_training(rows, f"{variant} on {env}")
    return {env: is_below(mean(other, env), mean(variant, env)) for env in study.envs(rows)}


# Short windows with a critic against whole rollouts, and clipped steps against one: runs of the learning curves

WINDOWS = {f"{name} on {env}": runs(env)[name] for env in (PENDULUM, REACHER, SWIMMER) for name in ("shac", "svg")}
SWUNG_UP = -150
CARTPOLE = "CartPole-v1"
CLIPPED = {
    f"ppo on {PENDULUM}": runs(PENDULUM)["ppo"],
    f"reinforce on {PENDULUM}": runs(PENDULUM)["reinforce"],
    f"ppo on {CARTPOLE}": ONLINE[f"ppo on {CARTPOLE}"],
    f"reinforce on {CARTPOLE}": DISCRETE[f"reinforce on {CARTPOLE}"],
}
CLIPPED_LEAST = {PENDULUM: -165, CARTPOLE: 500}


def windows_hold(rows):
    """For each environment: shac is above svg; on Pendulum-v1 it reaches SWUNG_UP in at most half of svg's steps."""
    answers = {}
    for env in study.envs(rows):
        finals = study.finals(rows, env)
        if env == PENDULUM:
            shorter = study.trained_for(rows, f"shac on {env}") <= study.trained_for(rows, f"svg on {env}") / 2
            answers[env] = shorter and plot.iqm(finals["shac"]) >= SWUNG_UP
        else:
            answers[env] = is_below(finals["svg"], finals["shac"])
    return answers


def clipped_hold(rows):
    """For each environment: ppo reaches the given return in fewer steps than reinforce takes."""
    answers = {}
    for env in study.envs(rows):
        shorter = study.trained_for(rows, f"ppo on {env}") < study.trained_for(rows, f"reinforce on {env}")
        answers[env] = shorter and plot.iqm(study.final(rows, f"ppo on {env}")) >= CLIPPED_LEAST[env]
    return answers


# n-step targets: the change that `changes/README.md` explains

N_STEP = {
    "td3, 1 step": ("td3", "", ""),
    "td3, 3 steps": ("td3", "--n-step 3", "td3_n_step"),
}


# Changes to TD3, each a diff in `changes/`

CHANGES = {
    "td3": ("td3", "", ""),
    "td3, 4 updates": ("td3", "--utd-ratio 4", ""),
    "td3, layer norm and 4 updates": ("td3", "--utd-ratio 4", "td3_layer_norm"),
    "td3, 5 critics and 4 updates": ("td3", "--utd-ratio 4", "td3_ensemble"),
    "td3, prioritized": ("td3", "", "td3_prioritized"),
    "td3, normalized obs": ("td3", "", "td3_normalize_obs"),
    "td3, schedule": ("td3", "", "td3_schedule"),
}
UNCHANGED = ("td3", "td3, 4 updates")


def improves(rows, label, other):
    """Whether the mean over training of a changed algorithm is above another's; with a schedule, the final return."""
    measured = study.final if "schedule" in label else study.mean_over_training
    return is_below(measured(rows, other), measured(rows, label))


def changes_hold(rows):
    """For each change and environment: it improves on td3."""
    changed = [label for label in study.labels(rows) if study.split(label)[0] not in UNCHANGED]
    return {label.removeprefix("td3, "): improves(rows, label, f"td3 on {study.split(label)[1]}") for label in changed}


def changes_notes(rows):
    """What the changes are, and what their number of updates alone does not explain."""
    text = (
        "`4 updates` is a `utd_ratio` of 4. `5 critics` takes the minimum of two of them, drawn anew for each update. "
        "With `schedule` the step sizes fall linearly to zero at the end of the run. The exponents of `prioritized` "
        "are 0.6 for the probabilities and 0.4 for the weights, without annealing."
    )
    changed = [label for label in study.labels(rows) if "and 4 updates" in label]
    answers = {label: improves(rows, label, f"td3, 4 updates on {study.split(label)[1]}") for label in changed}
    listed = "; ".join(f"{label.removeprefix('td3, ')}: {'yes' if x else 'no'}" for label, x in answers.items())
    return text + (f" The criterion against td3 with as many updates: {listed}." if listed else "")


def draw_changes(rows):
    """Return over training: a column for each change, and a row for each environment."""
    envs, present = study.envs(rows), study.labels(rows)
    changes = list(dict.fromkeys(study.split(label)[0] for label in present))
    changes = [variant for variant in changes if variant not in UNCHANGED]
    page, panels = drawing.figure(2.7 * len(changes), 2.9 * len(envs), len(envs), len(changes), sharey="row")
    for row, env in zip(panels, envs, strict=True):
        for axes, change in zip(row, changes, strict=True):
            styles = {"td3": {"color": "0.5"}, change: {"color": plot.COLORS["td3"]}}
            if "4 updates" in change:
                styles["td3, 4 updates"] = {"color": drawing.BLUE}
            for variant, style in styles.items():
                if f"{variant} on {env}" in present:
                    name = variant.removeprefix("td3, ") if variant == change else variant
                    drawing.draw_curve(axes, rows, f"{variant} on {env}", name, per=1e3, **style)
            drawing.draw_optimum(axes, optimum(env))
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small", loc="lower right")
        row[0].set_ylabel(f"{env}\ngreedy return per episode")
    for axes in panels[-1]:
        axes.set_xlabel("environment steps (thousands)", fontsize="small")
    return page


# Which of REINFORCE's settings decide whether it swings the pendulum up

MILLION = "--total-steps 1024000 --steps-per-epoch 102400"
SETTINGS = {  # the defaults, and one change each
    "reinforce": "",
    "reinforce, step size 0.003": "--actor-learning-rate 0.003",
    "reinforce, lambda 1": "--gae-lambda 1",
    "reinforce, gamma 0.99": "--gamma 0.99",
    "reinforce, ReLU": "--activation relu",
}


def every_setting_counts(rows):
    """For each change: the return of the defaults is above."""
    finals = study.finals(rows, PENDULUM)
    return {variant: is_below(finals[variant], finals["reinforce"]) for variant in finals if variant != "reinforce"}


EXPERIMENTS = {
    "overestimation": Experiment(
        title="Clipped double Q-learning removes DDPG's overestimation",
        question="How far do the critics of DDPG and TD3 overestimate the value of their policies?",
        cells=cells(OVERESTIMATION, (PENDULUM, REACHER)),
        measure=value_bias.measure,
        criterion=Criterion(
            "for each environment: DDPG's final bias is above zero, TD3's has an interquartile mean of at most zero, "
            "and TD3's is below that of TD3 with one critic instead of the minimum of two.",
            overestimation_holds,
        ),
        notes="The bias is the critic's value of the first observation of an episode minus the discounted return from "
        "there. The variants without smoothing and without delay show the effect of TD3's other two changes. A "
        "critic that underestimates is biased as well.",
        table=overestimation_table,
        draw=draw_overestimation,
        quick=lambda cells: training.smaller(
            cells, "ddpg on Pendulum-v1", "td3 on Pendulum-v1", "td3, one critic on Pendulum-v1"
        ),
        sample=study.returns_sample(),
    ),
    "exploration": Experiment(
        title="Uncorrelated Gaussian noise explores as well as Ornstein-Uhlenbeck noise",
        question="Does exploration need noise that is correlated over time?",
        cells=cells(EXPLORATION, (PENDULUM,)) | cells(EXPLORATION | HELD, (CAR,)),
        measure=training.learning_curves,
        criterion=Criterion(
            "for each algorithm and environment: the final return with the better of the two Gaussians is not below "
            "that with the Ornstein-Uhlenbeck process.",
            exploration_holds,
        ),
        notes="Gaussian 0.92 has the stationary standard deviation of the process, which stays correlated for dozens "
        "of steps. `held` redraws Gaussian noise only every 30 steps, long enough to swing the car up the hill.",
        table=study.return_table,
        draw=draw_final_returns,
        quick=lambda cells: training.smaller(cells, "td3, OU on Pendulum-v1", "td3, Gaussian 0.1 on Pendulum-v1"),
        sample=study.returns_sample(),
    ),
    "policy_delay": Experiment(
        title="Delayed policy updates help TD3",
        question="Does TD3 learn better if it updates the policy less often than the critics?",
        cells=cells(DELAY, (PENDULUM, REACHER, SWIMMER)),
        measure=training.learning_curves,
        criterion=Criterion(
            "for each environment: the final return with a delay of 2 is above that without a delay.", delay_holds
        ),
        notes="All variants take the same number of environment steps and of critic updates; a longer delay means "
        "fewer updates of the policy and the targets.",
        table=study.return_table,
        draw=draw_final_returns,
        quick=lambda cells: training.smaller(cells, "td3, delay 1 on Pendulum-v1", "td3, delay 2 on Pendulum-v1"),
        sample=study.returns_sample(),
    ),
    "targets": Experiment(
        title="Periodically copied and Polyak-averaged target networks are equally good",
        question="Does it matter whether DDPG's targets are copied every K updates or averaged with step tau?",
        cells=cells(TARGETS, (PENDULUM, REACHER)),
        measure=training.learning_curves,
        criterion=Criterion(
            "for each environment: of the best K and the best tau, neither final return is below the other.",
            targets_hold,
        ),
        notes="`every 1` has no target networks. A copy every 1 / tau updates lags about as far behind as an average "
        "with step tau.",
        table=study.return_table,
        draw=draw_final_returns,
        quick=lambda cells: training.smaller(cells, "ddpg, every 40 on Reacher-misc"),
        sample=study.returns_sample(),
    ),
    "amortization": Experiment(
        title="A policy fitted to a few exact maximizers replaces the solver",
        question="How many exact maximizers does amortized fitted Q-iteration need?",
        cells={name: Run(algorithm, PENDULUM, flags, seeds=8) for name, (algorithm, flags) in AMORTIZATION.items()},
        measure=training.learning_curves,
        criterion=Criterion(
            "for exact 0.1 and nfqca: the final return is not below that of fqi.",
            amortization_holds,
        ),
        notes=amortization_notes,
        table=study.return_table,
        draw=draw_amortization,
        quick=lambda cells: training.smaller(cells, "fqi", "exact 0.1"),
        sample=study.returns_sample(8),
    ),
    "pathwise_returns": Experiment(
        title="Pathwise gradients learn from fewer samples than score functions",
        question="How do the returns of pathwise and score-function policy gradients compare for equal samples?",
        cells=PATHWISE,
        measure=training.learning_curves,
        criterion=Criterion(
            "for each environment: the return of SVG (pathwise gradient), averaged over all evaluations as "
            "a measure of sample efficiency, is above that of REINFORCE (score function, value baseline).",
            lambda rows: higher_over_training(rows, "svg", "reinforce"),
        ),
        notes="Both take about 1,000 environment steps per update, and the same total. The variances of such "
        "estimators are compared [below](#gradient_variance).",
        table=lambda rows: over_training_table(rows, digits=2),
        draw=draw_over_training,
        quick=lambda cells: training.smaller(cells, *list(cells)[:2]),
        sample=study.returns_sample(),
    ),
    "short_windows": Experiment(
        title="Short windows with a critic learn from fewer steps than whole rollouts",
        question="Does SHAC, which differentiates short windows and has a critic, learn better than SVG?",
        cells=WINDOWS,
        measure=training.learning_curves,
        criterion=Criterion(
            f"on {PENDULUM}: SHAC's final interquartile mean is at least {SWUNG_UP} in at most half of SVG's steps; on "
            f"{REACHER} and {SWIMMER}: its final return is above SVG's.",
            windows_hold,
        ),
        notes="The runs are those of the learning curves.",
        table=length_table,
        draw=draw_over_training,
        quick=lambda cells: training.smaller(cells, f"shac on {PENDULUM}", f"svg on {PENDULUM}"),
        sample=study.returns_sample(),
    ),
    "clipped_steps": Experiment(
        title="Several clipped steps on the same transitions learn from fewer samples than one",
        question="How much faster than REINFORCE does PPO learn?",
        cells=CLIPPED,
        measure=training.learning_curves,
        criterion=Criterion(
            "for each environment: in fewer steps than REINFORCE takes PPO's final interquartile mean is at least "
            + " and ".join(f"{least} on {env}" for env, least in CLIPPED_LEAST.items())
            + ".",
            clipped_hold,
        ),
        notes="The runs are those of the learning curves.",
        table=length_table,
        draw=draw_over_training,
        quick=lambda cells: training.smaller(cells, f"ppo on {PENDULUM}", f"reinforce on {PENDULUM}"),
        sample=study.returns_sample(),
    ),
    "n_step": Experiment(
        title="n-step targets learn faster",
        question="Does TD3 learn faster from 3-step targets than from 1-step targets?",
        cells=cells(N_STEP, (PENDULUM, REACHER)),
        measure=training.learning_curves,
        criterion=Criterion(
            "for each environment: the return with 3 steps, averaged over all evaluations as a measure of learning "
            "speed, is above that with 1 step.",
            lambda rows: higher_over_training(rows, "td3, 3 steps", "td3, 1 step"),
        ),
        notes="The intermediate rewards come from older policies, which is not corrected for.",
        table=over_training_table,
        draw=draw_over_training,
        quick=lambda cells: training.smaller(cells, "td3, 1 step on Pendulum-v1", "td3, 3 steps on Pendulum-v1"),
        sample=study.returns_sample(),
    ),
    "changes": Experiment(
        title="Five ideas from the literature, a few lines each, improve TD3",
        question="Which common changes to TD3 improve it on tasks as small as these?",
        cells={label: run._replace(seeds=8) for label, run in cells(CHANGES, (PENDULUM, REACHER)).items()},
        measure=training.learning_curves,
        criterion=Criterion(
            "for each change and environment: the return, averaged over all evaluations as a measure of learning "
            "speed, is above that of td3; with a schedule, the final return is.",
            changes_hold,
        ),
        notes=changes_notes,
        table=over_training_table,
        draw=draw_changes,
        quick=lambda cells: training.smaller(
            cells,
            *(f"td3{x} on Pendulum-v1" for x in ("", ", 4 updates", ", layer norm and 4 updates", ", prioritized")),
        ),
        sample=study.returns_sample(seeds=8),
    ),
    "reinforce_settings": Experiment(
        title="REINFORCE on Pendulum-v1 depends on all of its settings",
        question="Which settings decide whether REINFORCE swings the pendulum up in a million steps?",
        cells={
            f"{variant} on {PENDULUM}": Run("reinforce", PENDULUM, f"{MILLION} {flags}".strip(), seeds=32)
            for variant, flags in SETTINGS.items()
        },
        measure=training.learning_curves,
        criterion=Criterion("for each change: its final return is below that of the defaults.", every_setting_counts),
        notes="The defaults are a step size of 0.001, lambda 0.9, gamma 0.97 and SiLU; each other row changes one of "
        "them. An episode never terminates and lasts 200 steps, so rewards to go are long sums, whose variance a "
        "shorter horizon (gamma, lambda) lowers; a policy that has lost its way in a long step rarely comes back.",
        table=study.return_table,
        draw=draw_final_returns,
        quick=lambda cells: training.smaller(cells, "reinforce on Pendulum-v1", "reinforce, lambda 1 on Pendulum-v1"),
        sample=study.returns_sample(seeds=32),
    ),
}

"""What the field says of these algorithms, held to runs of them: each claim a figure and a verdict."""

import study
from curves import LQR_FLAGS, LQR_GAMMA, STEPS, optimum
from study import Experiment, Run, verdict

from common import plot

PENDULUM, CAR, REACHER, SWIMMER, LQR = (
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "Reacher-misc",
    "Swimmer-misc",
    "LQR-v0",
)
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def answers(cases, held):
    """Each case with a yes or a no."""
    return "; ".join(f"{case}: {'yes' if yes else 'no'}" for case, yes in zip(cases, held, strict=True))


def split(label):
    """`(what, environment)` of a label `what on environment`."""
    return label.rsplit(" on ", 1)


def envs(rows):
    """The environments of the labels, in order."""
    return list(dict.fromkeys(split(label)[1] for label in study.labels(rows)))


def on(env, rows):
    """`{label: what}` of an environment."""
    return {label: split(label)[0] for label in study.labels(rows) if split(label)[1] == env}


def cells(variants, places):
    """`{label: Run}` of `{what: (algorithm, flags, change)}` in each environment, with its curve's number of steps."""
    return {
        f"{what} on {env}": Run(algorithm, env, f"{STEPS[env]} {flags}".strip(), change=change)
        for env in places
        for what, (algorithm, flags, change) in variants.items()
    }


def algorithm_color(label):
    """The colour of the algorithm that a label begins with."""
    return plot.COLOURS[label.replace(",", " ").split()[0]]


def less(a, b):
    """Whether the 95 % interval of `a [num_seeds]` lies below that of `b`."""
    return plot.interval(a)[1] < plot.interval(b)[0]


def draw_final_returns(rows):
    """For each environment a panel with the final return of each variant: side by side, or below each other."""
    places = envs(rows)
    widths = [len(on(env, rows)) for env in places]
    if sum(widths) > 8:
        page, panels = study.figure(8, 3 * len(places), len(places), 1)
    else:
        page, panels = study.figure(1.6 + 0.95 * sum(widths), 3.6, 1, len(places), width_ratios=widths)
    for axes, env in zip(panels.ravel(), places, strict=True):
        names = {label: what.replace(", ", "\n").replace(" ", "\n") for label, what in on(env, rows).items()}
        study.draw_finals(axes, rows, names, color=algorithm_color)
        study.optimum_line(axes, optimum(env))
        axes.set_title(env)
        axes.tick_params(axis="x", labelsize="small")
    for axes in panels[:, 0]:
        axes.set_ylabel("greedy return at the end")
    return page


def means_over_training(rows):
    """Each label's mean return over all evaluations `[num_seeds]`."""
    return {label: study.returns(rows, label)[1].mean(axis=1) for label in study.labels(rows)}


def draw_over_training(rows):
    """Return over training, a panel for each environment."""
    page, panels = study.figure(4.6 * len(envs(rows)), 3.6, 1, len(envs(rows)))
    for axes, env in zip(panels[0], envs(rows), strict=True):
        seen = []
        for label, what in on(env, rows).items():
            color = algorithm_color(label)  # a line of its own for each of an algorithm's variants
            study.draw_curve(axes, rows, label, what, per=1e3, color=color, linestyle=LINES[seen.count(color)])
            seen.append(color)
        study.optimum_line(axes, optimum(env))
        axes.set(title=env, xlabel="environment steps (thousands)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0][0].set_ylabel("greedy return per episode")
    return page


def experiment(title, cells, report, draw, quick, seeds=16):
    """An experiment whose cells are runs of `seeds` seeds."""
    return Experiment(
        title=title,
        cells=cells,
        measure=study.learning_curves,
        report=report,
        draw=draw,
        quick=lambda cells: study.smaller(cells, *quick),
        sample=study.sample(seeds),
    )


# DDPG overestimates, and TD3's minimum cures it

OVERESTIMATION = {
    "ddpg": ("ddpg", "", ""),
    "td3": ("td3", "", ""),
    "td3, one critic": ("td3", "", "td3_one_critic"),
    "td3, no smoothing": ("td3", "--target-noise 0", ""),
    "td3, no delay": ("td3", "--policy-delay 1", ""),
}


def draw_overestimation(rows):
    """Bias above, return below, over training; a column for each environment."""
    places = envs(rows)
    page, panels = study.figure(5 * len(places), 6, 2, len(places), sharex="col")
    for (above, below), env in zip(panels.T, places, strict=True):
        for i, (label, what) in enumerate(on(env, rows).items()):
            style = {"color": algorithm_color(label), "linestyle": LINES[max(0, i - 1)]}
            study.draw_curve(above, rows, label, what, "value_bias", per=1e3, **style)
            study.draw_curve(below, rows, label, what, per=1e3, **style)
        above.axhline(0, color="black", linewidth=0.8)
        study.optimum_line(below, optimum(env))
        above.set_title(env)
        below.set_xlabel("environment steps (thousands)")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("value bias: critic's value of the\ngreedy policy less its return")
    panels[1][0].set_ylabel("greedy return per episode")
    panels[0][0].legend(fontsize="small")
    return page


def report_overestimation(rows):
    """Does DDPG's bias end above zero, TD3's not, and TD3's without the minimum above TD3's?"""
    held, biases = [], {label: study.final(rows, label, "value_bias") for label in study.labels(rows)}
    for env in envs(rows):
        bias = {what: biases[label] for label, what in on(env, rows).items()}
        one = bias.get("td3, one critic", bias["ddpg"])
        held.append(less(0 * bias["ddpg"], bias["ddpg"]) and plot.iqm(bias["td3"]) <= 0 and less(bias["td3"], one))
    text = (
        f"{verdict(held)} Asked of each environment: DDPG's critic ends above what its policy earns, TD3's does not, "
        "and TD3 with one critic for the minimum of two ends above TD3. Smoothing and delay removed alone show what "
        "the other two changes do to the bias; a critic that is below the truth is biased as well."
    )
    bias = lambda label: study.estimate(biases[label])
    return "\n".join([text, "", study.return_table(rows, digits=1, bias_at_the_end=bias)])


# Uncorrelated Gaussian noise explores as well as Ornstein-Uhlenbeck

AS_WIDE = 0.92  # standard deviation of DDPG's default process once it has settled
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


def report_exploration(rows):
    """Is the better of the two Gaussians not below Ornstein-Uhlenbeck noise, for each algorithm and environment?"""
    held, cases = [], []
    for env in envs(rows):
        values = {what: study.final(rows, label) for label, what in on(env, rows).items()}
        for algorithm in ("ddpg", "td3"):
            gaussian = [v for what, v in values.items() if what.startswith(f"{algorithm}, Gaussian 0")]
            if f"{algorithm}, OU" in values and gaussian:
                held.append(not less(max(gaussian, key=plot.iqm), values[f"{algorithm}, OU"]))
                cases.append(f"{algorithm} on {env}")
    text = (
        f"{verdict(held)} Asked of each algorithm and environment: is the better Gaussian not below the "
        f"Ornstein-Uhlenbeck process ({answers(cases, held)})? Gaussian 0.92 is as wide as the process, whose pushes "
        "last for dozens of steps; `held` draws Gaussian noise anew every 30 steps only, as the hill asks for."
    )
    return "\n".join([text, "", study.return_table(rows)])


# Delaying the policy's update helps

DELAY = {f"td3, delay {n}": ("td3", "" if n == 2 else f"--policy-delay {n}", "") for n in (1, 2, 4)}


def report_delay(rows):
    """Is the default delay above none, at the same number of updates of the critics?"""
    held = []
    for env in envs(rows):
        one, two, *_ = (study.final(rows, label) for label in on(env, rows))
        held.append(less(one, two))
    text = (
        f"{verdict(held)} Asked of each environment: does a delay of 2 end above none, its interval above the other's "
        f"({answers(envs(rows), held)})? All see "
        "the same environment steps and update the critics as often; a longer delay updates policy and targets less."
    )
    return "\n".join([text, "", study.return_table(rows)])


# Target copies: hard every K updates, or soft at each

TARGETS = {
    "ddpg, every 1": ("ddpg", "--target-period 1", ""),
    "ddpg, every 40": ("ddpg", "", ""),
    "ddpg, every 200": ("ddpg", "--target-period 200", ""),
    "ddpg, tau 0.1": ("ddpg", "--target-period 1 --tau 0.1", ""),
    "ddpg, tau 0.02": ("ddpg", "--target-period 1 --tau 0.02", ""),
    "ddpg, tau 0.005": ("ddpg", "--target-period 1 --tau 0.005", ""),
}


def report_targets(rows):
    """Is the best hard copy as good as the best soft one?"""
    held = []
    for env in envs(rows):
        values = {what: study.final(rows, label) for label, what in on(env, rows).items()}
        best = lambda kind, values=values: max((v for what, v in values.items() if kind in what), key=plot.iqm)
        hard, soft = best("every"), best("tau") if any("tau" in what for what in values) else best("every")
        held.append(not less(hard, soft) and not less(soft, hard))
    text = (
        f"{verdict(held)} The claim is that copying the targets whole every K updates and moving them by tau at each "
        "are two forms of one cure. Asked of each environment: with each at its best, does neither interval lie above "
        f"the other ({answers(envs(rows), held)})? `every 1` has no targets of its own; a copy every 1 / tau updates "
        "lags as much as a soft one with tau."
    )
    return "\n".join([text, "", study.return_table(rows)])


# Amortization: how few exact solutions a policy needs, and how long a window of them

AMORTIZATION = {  # what: algorithm and flags; a fraction of 0.1 and a window of 4 are the defaults
    "fqi": ("fqi", ""),
    **{f"exact {x}": ("fqi_amortized", f"--exact-fraction {x}" * (x != 0.1)) for x in (0.5, 0.1, 0.01)},
    "nfqca": ("nfqca", ""),
    **{f"window {k}": ("fqi_amortized", f"--window {k}") for k in (0, 1, 16)},
}
AMORTIZATION_PANELS = {
    "exact maximisers at a fraction of base points": lambda what: not what.startswith("window"),
    "window of past iterations, exact 0.1": lambda what: what.startswith("window") or what == "exact 0.1",
}


def draw_amortization(rows):
    """How far returns end below the optimum, over the fraction of exact maximisers and over the window."""
    limit = optimum(PENDULUM)
    below = [row | {"return": limit - row["return"]} for row in rows]
    chosen = [list(filter(which, study.labels(rows))) for which in AMORTIZATION_PANELS.values()]
    color = lambda label: plot.COLOURS.get(label, plot.COLOURS["fqi_amortized"])
    page, panels = study.figure(10, 3.8, 1, 2, sharey=True, width_ratios=[max(1, len(labels)) for labels in chosen])
    for axes, (title, _), labels in zip(panels[0], AMORTIZATION_PANELS.items(), chosen, strict=True):
        if "window" in title:  # in the order of the window
            labels = sorted(labels, key=lambda label: 4 if label == "exact 0.1" else int(label.split()[1]))
        names = {x: "window 4" if x == "exact 0.1" and "window" in title else x for x in labels}
        names = {label: name.replace(" ", "\n") for label, name in names.items()}
        study.draw_finals(axes, below, names, color=color)
        axes.set(title=title, yscale="log")
    panels[0][0].set_ylabel(f"return below the optimum, {limit:.1f} (log scale)")
    return page


def report_amortization(rows):
    """Are a tenth of the solutions, and none of NFQCA's, as good as all?"""
    values = {label: study.final(rows, label) for label in study.labels(rows)}
    as_good = {what: not less(values[what], values["fqi"]) for what in values}
    held = [as_good[what] for what in ("exact 0.1", "nfqca") if what in values]
    others = [what for what in values if what not in ("fqi", "exact 0.1", "nfqca")]
    text = (
        f"{verdict(held)} The claim is that a policy fitted to a few solutions stands in for the solver: the intervals "
        "of one solution in ten, and of NFQCA, which needs none, do not end below that of fqi, which solves at every "
        "point. Asked the same of other fractions of solutions, and of one in ten that is kept for a window of other "
        f"than 4 further iterations: {answers(others, [as_good[what] for what in others])}."
    )
    return "\n".join([text, "", study.return_table(rows)])


# Reparameterised gradients beat those of the score function, in RL too; see also the experiment `gradient_variance`

SAMPLES = "--num-rollouts 20 --horizon 50 --num-iterations 512 --iterations-per-epoch 32"  # 1,000 steps an update
SAMPLES_LQR = "--num-rollouts 50 --num-iterations 512 --iterations-per-epoch 32"
PATHWISE = {
    f"svg on {PENDULUM}": Run("svg", PENDULUM, SAMPLES),
    f"reinforce on {PENDULUM}": Run("reinforce", PENDULUM, ""),
    f"svg on {LQR}": Run("svg", LQR, f"{SAMPLES_LQR} {LQR_FLAGS['svg']} --gamma {LQR_GAMMA}"),
    f"reinforce on {LQR}": Run("reinforce", LQR, f"--gamma {LQR_GAMMA}"),
}


def report_pathwise(rows):
    """Is SVG's mean over all evaluations, which tells how many samples it needs, above REINFORCE's?"""
    means = means_over_training(rows)
    held = []
    for env in envs(rows):
        of = {what: means[label] for label, what in on(env, rows).items()}
        held.append(less(of["reinforce"], of["svg"]))
    text = (
        f"{verdict(held)} Asked of each environment: is the mean return of all evaluations, which tells how many "
        "samples it takes, higher with the derivative along the path (SVG, true model) than with the score function "
        "(REINFORCE with a value baseline)? Both take about 1,000 environment steps for an update, and as many in all; "
        "the variances of such estimators are compared [below](#gradient_variance)."
    )
    mean = lambda label: study.estimate(means[label], 2)
    return "\n".join([text, "", study.return_table(rows, digits=2, mean_over_training=mean)])


# n-step targets: the change that `changes/README.md` walks through

N_STEP = {
    "td3, 1 step": ("td3", "", ""),
    "td3, 3 steps": ("td3", "--n-step 3", "td3_n_step"),
}


def report_n_step(rows):
    """Is the mean over all evaluations, which tells how fast it learns, higher with 3 steps than with one?"""
    means = means_over_training(rows)
    held = []
    for env in envs(rows):
        one, three, *_ = (means[label] for label in on(env, rows))
        held.append(less(one, three))
    text = (
        f"{verdict(held)} Asked of each environment: is the mean return of all evaluations, which tells how fast it "
        f"learns, higher with 3 steps than with one ({answers(envs(rows), held)})? The rewards of the steps between "
        "are those of older policies, which is not corrected for."
    )
    return "\n".join(
        [text, "", study.return_table(rows, mean_over_training=lambda label: study.estimate(means[label]))]
    )


EXPERIMENTS = {
    "overestimation": experiment(
        "DDPG overestimates, and TD3's minimum cures it",
        cells(OVERESTIMATION, (PENDULUM, REACHER)),
        report_overestimation,
        draw_overestimation,
        ["ddpg on Pendulum-v1", "td3 on Pendulum-v1", "td3, one critic on Pendulum-v1"],
    ),
    "exploration": experiment(
        "Uncorrelated Gaussian noise explores as well as Ornstein-Uhlenbeck",
        cells(EXPLORATION, (PENDULUM,)) | cells(EXPLORATION | HELD, (CAR,)),
        report_exploration,
        draw_final_returns,
        ["td3, OU on Pendulum-v1", "td3, Gaussian 0.1 on Pendulum-v1"],
    ),
    "policy_delay": experiment(
        "Delaying the policy's update helps",
        cells(DELAY, (PENDULUM, REACHER, SWIMMER)),
        report_delay,
        draw_final_returns,
        ["td3, delay 1 on Pendulum-v1", "td3, delay 2 on Pendulum-v1"],
    ),
    "targets": experiment(
        "Targets copied whole every K updates, or moved by tau at each",
        cells(TARGETS, (PENDULUM, REACHER)),
        report_targets,
        draw_final_returns,
        ["ddpg, every 40 on Reacher-misc"],
    ),
    "amortization": experiment(
        "A policy fitted to a few solutions stands in for the solver",
        {what: Run(algorithm, PENDULUM, flags, seeds=8) for what, (algorithm, flags) in AMORTIZATION.items()},
        report_amortization,
        draw_amortization,
        ["fqi", "exact 0.1"],
        seeds=8,
    ),
    "pathwise_returns": experiment(
        "Reparameterised gradients beat score functions: returns",
        PATHWISE,
        report_pathwise,
        draw_over_training,
        list(PATHWISE)[:2],
    ),
    "n_step": experiment(
        "n-step targets learn faster",
        cells(N_STEP, (PENDULUM, REACHER)),
        report_n_step,
        draw_over_training,
        ["td3, 1 step on Pendulum-v1", "td3, 3 steps on Pendulum-v1"],
    ),
}

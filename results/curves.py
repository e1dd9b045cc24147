"""Learning curves: every algorithm on every environment that fits it, with the optimum where it is known."""

from study import FITTED, Run

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
    "reinforce": "--total-steps 256000 --steps-per-epoch 25600",
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

    few = dict.fromkeys(FEWER, "") if env == "Pendulum-v1" else FEWER
    cells = {name: run(name, STEPS[env]) for name in ACTOR_CRITICS}
    cells |= {name: run(name, few["fitted"]) for name in FITTED}
    cells |= {"svg": run("svg", few["svg"]), "svg learned": run("svg", f"{LEARNED} --iterations-per-epoch 80")}
    return cells | {"reinforce": run("reinforce", few["reinforce"])}


DISCRETE = {
    "fqi on CartPole-v1": Run("fqi", "CartPole-v1", "--maximizer exhaustive --gamma 0.99"),
    "fqi on Acrobot-v1": Run("fqi", "Acrobot-v1", "--maximizer exhaustive --gamma 0.99"),
    "reinforce on CartPole-v1": Run("reinforce", "CartPole-v1"),
    "reinforce on Acrobot-v1": Run("reinforce", "Acrobot-v1"),
}

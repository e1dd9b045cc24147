"""Train with other libraries for `benchmark.py`, each with the Python of its own virtual environment.

    python results/benchmark/peers.py LIBRARY {TD3,SAC,DQN,PPO} --steps STEPS
    python results/benchmark/peers.py {rejax,sbx,sb3} {TD3,SAC} --steps STEPS --until RETURN --seed SEED
    python results/benchmark/peers.py {sbx,sb3} {TD3,SAC,DQN} --steps STEPS --returns --settings SETTINGS --seed SEED
    python results/benchmark/peers.py purejaxrl PPO --steps STEPS --returns --settings published --env ENV --seed SEED

The first form prepares, prints a line of JSON, and then for each line that it reads trains for STEPS and prints the
number of updates and the seconds. The second prints the environment steps and the seconds from its start until a greedy
evaluation, one every thousand steps, reaches RETURN. The third prints the mean return of `EPISODES` greedy episodes
after STEPS, and the seconds from its start until they begin. The fourth has the mean return of the last episode of each
environment of its training, as this library evaluates nothing.

TD3 and SAC on Pendulum-v1, DQN on CartPole-v1: batch 256, one environment, one update per environment step, learning
rate 0.001, gamma 0.99. PPO on CartPole-v1 makes 4 passes of 4 minibatches over 128 steps of 4 environments. The
libraries are rejax, SBX, Stable-Baselines3; PureJaxRL with PPO and CleanRL with DQN, of which FOLDER/source is a clone,
for FOLDER with the virtual environment of this Python.
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402, the clock starts first
import contextlib  # noqa: E402
import importlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import runpy  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

WARMUP = 1000  # steps without updates
EVERY = 1000  # steps between evaluations
EPISODES = 16  # per evaluation
STEPS, PASSES = 128, 4  # of PPO
SOURCE = Path(sys.prefix) / "source"
ZOO = {  # rl-zoo's hyperparameters for CartPole-v1
    "DQN": {
        "learning_rate": 2.3e-3,
        "batch_size": 64,
        "buffer_size": 100_000,
        "learning_starts": 1000,
        "gamma": 0.99,
        "target_update_interval": 10,
        "train_freq": 256,
        "gradient_steps": 128,
        "exploration_fraction": 0.16,
        "exploration_final_eps": 0.04,
        "policy_kwargs": {"net_arch": [256, 256]},
    }
}
MINATAR = {  # PureJaxRL's hyperparameters for MinAtar that are not those of the benchmark, examples/brax_minatar.ipynb
    "LR": 5e-3,
    "NUM_ENVS": 64,
    "NUM_MINIBATCHES": 8,
    "ENT_COEF": 0.01,
    "ANNEAL_LR": True,
}


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=TURNS)
    parser.add_argument("name", choices=("TD3", "SAC", "DQN", "PPO"))
    parser.add_argument("--steps", type=int, required=True, help="environment steps, of each turn in the first form")
    parser.add_argument("--env", help="Pendulum-v1 or CartPole-v1 by default; or playground/TASK")
    parser.add_argument("--envs", type=int, default=4, help="environments of PPO")
    parser.add_argument("--minibatches", type=int, default=4, help="minibatches of a pass of PPO")
    parser.add_argument("--hidden", type=int, default=64, help="width of both hidden layers")
    parser.add_argument("--buffer", type=int, default=50_000, help="transitions in the replay buffer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="trained at once, by rejax and PureJaxRL")
    parser.add_argument("--until", type=float, help="the return to reach")
    parser.add_argument("--returns", action="store_true", help="train once, and evaluate")
    text = "its own, or those that it or rl-zoo publishes for the environment"
    parser.add_argument("--settings", choices=("ours", "defaults", "published"), default="ours", help=text)
    case = parser.parse_args()
    case.env = case.env or ("CartPole-v1" if case.name in ("DQN", "PPO") else "Pendulum-v1")
    return case


def num_updates(case):
    """The updates in a turn, PPO's counted by minibatch."""
    per_step = PASSES * case.minibatches / (case.envs * STEPS) if case.name == "PPO" else 1
    return case.steps * per_step * case.seeds


def seconds():
    """Since the start of the process."""
    return time.perf_counter() - START


def timed(call):
    """The call, returning its seconds."""

    def turn():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return turn


def compile_seeds(case, train):
    """The compiled training of all seeds, and their keys, for a `train` of one key."""
    import jax

    keys = jax.random.split(jax.random.PRNGKey(case.seed), case.seeds)
    return jax.jit(jax.vmap(train) if case.seeds > 1 else lambda k: train(k[0])).lower(keys).compile(), keys


def rejax_train(case, steps, eval_freq):
    """rejax's compiled training of all seeds, and its keys."""
    import flax.linen as nn
    import rejax

    if case.name == "PPO":
        fields = {"num_envs": case.envs, "num_steps": STEPS, "num_epochs": PASSES, "num_minibatches": case.minibatches}
    else:
        fields = {"num_envs": 1, "num_epochs": 1, "buffer_size": case.buffer, "fill_buffer": WARMUP, "batch_size": 256}
        fields |= {"polyak": 0.995} | ({"target_update_freq": 1} if case.name == "DQN" else {})
    algorithm = getattr(rejax, case.name).create(
        env=case.env,
        total_timesteps=steps,
        eval_freq=eval_freq,
        learning_rate=1e-3,
        gamma=0.99,
        skip_initial_evaluation=True,
        **fields,
    )
    wide = {"hidden_layer_sizes": (case.hidden, case.hidden), "activation": nn.relu}
    networks = ("agent",) if case.name == "DQN" else ("actor", "critic")
    algorithm = algorithm.replace(**{network: getattr(algorithm, network).clone(**wide) for network in networks})
    return compile_seeds(case, algorithm.train)


def rejax_turns(case):
    """A turn trains from scratch; the steps that fill the buffer count towards its time, not its updates."""
    import jax

    steps = case.steps + WARMUP * (case.name != "PPO")
    train, keys = rejax_train(case, steps, steps)
    return timed(lambda: jax.block_until_ready(train(keys)))


def purejaxrl_train(case):
    """PureJaxRL's compiled training of all seeds with PPO, and its keys."""
    from unittest import mock

    for engine in ("brax", "brax.envs.wrappers.training", "navix"):  # which its wrappers import
        sys.modules[engine] = mock.MagicMock()
    sys.path.insert(0, str(SOURCE / "purejaxrl"))
    config = {"LR": 1e-3, "NUM_ENVS": case.envs, "NUM_STEPS": STEPS, "TOTAL_TIMESTEPS": case.steps, "ANNEAL_LR": False}
    config |= {"UPDATE_EPOCHS": PASSES, "NUM_MINIBATCHES": case.minibatches, "GAMMA": 0.99, "GAE_LAMBDA": 0.95}
    config |= {"CLIP_EPS": 0.2, "ENT_COEF": 0.0, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5, "ACTIVATION": "relu"}
    config |= {"ENV_NAME": case.env} | (MINATAR if case.settings == "published" else {})
    return compile_seeds(case, importlib.import_module("ppo").make_train(config))


def purejaxrl_turns(case):
    """A turn of PPO trains from scratch, without evaluations."""
    import jax

    train, keys = purejaxrl_train(case)
    return timed(lambda: jax.block_until_ready(train(keys)))


def purejaxrl_returns(case):
    """The returns of the episodes that have ended last."""
    train, keys = purejaxrl_train(case)
    returns = train(keys)["metrics"]["returned_episode_returns"][-1]
    return {"return": float(returns.mean()), "seconds": seconds()}


def cleanrl_turns(case):
    """A turn runs the script of DQN, and takes the time of its last steps from the rates that it prints."""
    text = (SOURCE / "cleanrl" / "dqn_jax.py").read_text()
    for width in (120, 84):
        text = text.replace(f"nn.Dense({width})", f"nn.Dense({case.hidden})")
    sys.path.insert(0, str(SOURCE))
    fields = {
        "total-timesteps": WARMUP + case.steps + 1,
        "learning-starts": 0,
        "learning-rate": 1e-3,
        "batch-size": 256,
    }
    fields |= {"buffer-size": case.buffer, "train-frequency": 1, "target-network-frequency": 1, "tau": 0.005}
    sys.argv = ["dqn_jax.py", *(f"--{name}={value}" for name, value in fields.items())]

    def turn():
        printed = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            Path("dqn_jax.py").write_text(text)
            runpy.run_path("dqn_jax.py", run_name="__main__")
        rates = [int(rate) for rate in re.findall(r"SPS: (\d+)", printed.getvalue())]  # after 100, 200, ... steps
        return len(rates) * 100 / rates[-1] - WARMUP / rates[WARMUP // 100 - 1]

    return turn


def rejax_until(case):
    """Its training cannot be stopped: the time until its end, without the share of the steps after the goal."""
    import jax

    train, keys = rejax_train(case, case.steps, EVERY)
    compiled = seconds()
    _, (_, returns) = jax.block_until_ready(train(keys))
    trained = seconds() - compiled
    reached = [i + 1 for i, r in enumerate(returns.mean(axis=-1).ravel().tolist()) if r >= case.until]
    if not reached:
        return None
    return {"steps": reached[0] * EVERY, "seconds": compiled + trained * reached[0] * EVERY / case.steps}


def make_env(name):
    """Gymnasium's environment, or a task of MuJoCo Playground that steps on the CPU, one at a time."""
    import gymnasium

    if not name.startswith("playground/"):
        return gymnasium.make(name)
    import jax
    import numpy as np
    from mujoco_playground import dm_control_suite

    class Task(gymnasium.Env):
        """Its state and a random key are all that it remembers."""

        def __init__(self):
            task = dm_control_suite.load(name.removeprefix("playground/"), config_overrides={"impl": "jax"})
            self.start, self.advance = jax.jit(task.reset), jax.jit(task.step)
            low, high = task.mj_model.actuator_ctrlrange.T.astype(np.float32)
            self.action_space = gymnasium.spaces.Box(low, high)
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (task.observation_size,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.state = self.start(jax.random.PRNGKey(self.np_random.integers(2**31)))
            return np.asarray(self.state.obs), {}

        def step(self, action):
            self.state = self.advance(self.state, action)
            return np.asarray(self.state.obs), float(self.state.reward), bool(self.state.done), False, {}

    return gymnasium.wrappers.TimeLimit(Task(), 1000)


def model_of(case):
    """A model of Stable-Baselines3 or SBX, and its environment."""
    import numpy as np
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise

    module, layers, relu = {
        "sbx": ("sbx", "flax.linen", "relu"),
        "sb3": ("stable_baselines3", "torch.nn", "ReLU"),
    }[case.library]
    env = make_vec_env(lambda: make_env(case.env), case.envs if case.name == "PPO" else 1)
    make = getattr(importlib.import_module(module), case.name)
    if case.settings != "ours":
        return make("MlpPolicy", env, seed=case.seed, **(ZOO[case.name] if case.settings == "published" else {}))
    activation = getattr(importlib.import_module(layers), relu)
    if case.name == "PPO":
        fields = {"n_steps": STEPS, "batch_size": case.envs * STEPS // case.minibatches, "n_epochs": PASSES}
    else:
        fields = {"learning_starts": WARMUP, "batch_size": 256, "buffer_size": case.buffer, "tau": 0.005}
        fields |= {"train_freq": 1, "gradient_steps": 1}
    if case.name == "TD3":
        shape = env.action_space.shape
        fields |= {"action_noise": NormalActionNoise(np.zeros(shape), np.full(shape, 0.1))}
    if case.name == "DQN":
        fields |= {"target_update_interval": 1}
    return make(
        "MlpPolicy",
        env,
        seed=case.seed,
        policy_kwargs={"net_arch": [case.hidden, case.hidden], "activation_fn": activation},
        gamma=0.99,
        learning_rate=1e-3,
        **fields,
    )


def evaluate(case, model):
    """The mean return of greedy episodes."""
    from stable_baselines3.common.evaluation import evaluate_policy

    return evaluate_policy(model, make_env(case.env), EPISODES, warn=False)[0]


def model_turns(case):
    """A turn continues where the previous one ended."""
    model = model_of(case)
    model.learn(WARMUP + 100)
    return timed(lambda: model.learn(case.steps, reset_num_timesteps=False))


def model_until(case):
    """Evaluates after every thousand steps."""
    model = model_of(case)
    for done in range(EVERY, case.steps + 1, EVERY):
        model.learn(EVERY, reset_num_timesteps=False)
        if evaluate(case, model) >= case.until:
            return {"steps": done, "seconds": seconds()}
    return None


def model_returns(case):
    """Evaluates once."""
    model = model_of(case)
    model.learn(case.steps)
    return {"seconds": seconds(), "return": float(evaluate(case, model))}


TURNS = {  # of each library
    "rejax": rejax_turns,
    "purejaxrl": purejaxrl_turns,
    "cleanrl": cleanrl_turns,
    "sbx": model_turns,
    "sb3": model_turns,
}


def main():
    """Train, and print."""
    case = parse()
    rejax = case.library == "rejax"
    if case.until is not None:
        print(json.dumps(rejax_until(case) if rejax else model_until(case)))
        return
    if case.returns:
        print(json.dumps(purejaxrl_returns(case) if case.library == "purejaxrl" else model_returns(case)))
        return
    turn = TURNS[case.library](case)
    print(json.dumps({"ready": seconds()}), flush=True)
    for _ in sys.stdin:
        took = turn()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"updates": num_updates(case), "seconds": took, "peak": peak}), flush=True)


main()

"""Train with other libraries for `benchmark.py`, each with the Python of its own virtual environment.

    python results/benchmark/peers.py {rejax,sbx,sb3} {TD3,SAC,DQN,PPO} HIDDEN BUFFER SEEDS STEPS
    python results/benchmark/peers.py {rejax,sbx,sb3} {TD3,SAC,DQN,PPO} HIDDEN BUFFER SEEDS STEPS --until RETURN

The first form prepares, prints a line of JSON, and then for each line that it reads trains for STEPS and prints the
number of updates and the seconds. The second, where SEEDS is the seed, prints the environment steps and the seconds
from its start until a greedy evaluation, one every thousand steps, reaches RETURN. TD3 and SAC on Pendulum-v1, DQN on
CartPole-v1: batch 256, one environment, one update per environment step, learning rate 0.001, gamma 0.99. PPO on
CartPole-v1 makes 4 passes of 4 minibatches over 128 steps of 4 environments; BUFFER means nothing to it.
"""

import time

START = time.perf_counter()

import importlib  # noqa: E402, the clock starts first
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402

WARMUP = 1000  # steps without updates
EVERY = 1000  # steps between evaluations
EPISODES = 16  # per evaluation
ENVS, STEPS, PASSES, MINIBATCHES = 4, 128, 4, 4  # of PPO


def env_of(name):
    """The environment that an algorithm is measured on."""
    return "CartPole-v1" if name in ("DQN", "PPO") else "Pendulum-v1"


def num_updates(name, steps):
    """The updates in a number of environment steps, PPO's counted by minibatch."""
    return steps * PASSES * MINIBATCHES / (ENVS * STEPS) if name == "PPO" else steps


def rejax_train(name, hidden, buffer, seeds, steps, eval_freq):
    """rejax's compiled training of all seeds, and its keys."""
    import flax.linen as nn
    import jax
    import rejax

    if name == "PPO":
        fields = {"num_envs": ENVS, "num_steps": STEPS, "num_epochs": PASSES, "num_minibatches": MINIBATCHES}
    else:
        fields = {"num_envs": 1, "num_epochs": 1, "buffer_size": buffer, "fill_buffer": WARMUP, "batch_size": 256}
        fields |= {"polyak": 0.995} | ({"target_update_freq": 1} if name == "DQN" else {})
    algorithm = getattr(rejax, name).create(
        env=env_of(name),
        total_timesteps=steps,
        eval_freq=eval_freq,
        learning_rate=1e-3,
        gamma=0.99,
        skip_initial_evaluation=True,
        **fields,
    )
    wide = {"hidden_layer_sizes": (hidden, hidden), "activation": nn.relu}
    networks = ("agent",) if name == "DQN" else ("actor", "critic")
    algorithm = algorithm.replace(**{network: getattr(algorithm, network).clone(**wide) for network in networks})
    keys = jax.random.split(jax.random.PRNGKey(0), seeds)
    train = jax.jit(jax.vmap(algorithm.train)) if seeds > 1 else jax.jit(lambda k: algorithm.train(k[0]))
    return train.lower(keys).compile(), keys


def rejax_turns(name, hidden, buffer, seeds, steps):
    """A turn trains from scratch; the steps that fill the buffer count towards its time, not its updates."""
    import jax

    steps += WARMUP * (name != "PPO")
    train, keys = rejax_train(name, hidden, buffer, seeds, steps, steps)
    return lambda: jax.block_until_ready(train(keys))


def rejax_until(name, hidden, buffer, seed, steps, goal):
    """Its training cannot be stopped: the time until its end, without the share of the steps after the goal."""
    import jax

    train, _ = rejax_train(name, hidden, buffer, 1, steps, EVERY)
    compiled = time.perf_counter()
    _, (_, returns) = jax.block_until_ready(train(jax.random.split(jax.random.PRNGKey(seed), 1)))
    seconds = time.perf_counter() - compiled
    reached = [i + 1 for i, r in enumerate(returns.mean(axis=-1).ravel().tolist()) if r >= goal]
    if not reached:
        return None
    return {"steps": reached[0] * EVERY, "seconds": compiled - START + seconds * reached[0] * EVERY / steps}


def torch_model(library, name, hidden, buffer, seed=0):
    """A model of Stable-Baselines3 or SBX, and its environment's module."""
    import numpy as np
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise

    module, layers, relu = {
        "sbx": ("sbx", "flax.linen", "relu"),
        "sb3": ("stable_baselines3", "torch.nn", "ReLU"),
    }[library]
    activation = getattr(importlib.import_module(layers), relu)
    if name == "PPO":
        fields = {"n_steps": STEPS, "batch_size": ENVS * STEPS // MINIBATCHES, "n_epochs": PASSES}
    else:
        fields = {"learning_starts": WARMUP, "batch_size": 256, "buffer_size": buffer, "tau": 0.005}
        fields |= {"train_freq": 1, "gradient_steps": 1}
    if name == "TD3":
        fields |= {"action_noise": NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))}
    if name == "DQN":
        fields |= {"target_update_interval": 1}
    return getattr(importlib.import_module(module), name)(
        "MlpPolicy",
        make_vec_env(env_of(name), ENVS if name == "PPO" else 1),
        seed=seed,
        policy_kwargs={"net_arch": [hidden, hidden], "activation_fn": activation},
        gamma=0.99,
        learning_rate=1e-3,
        **fields,
    )


def torch_turns(library, name, hidden, buffer, seeds, steps):
    """A turn continues where the previous one ended."""
    model = torch_model(library, name, hidden, buffer)
    model.learn(WARMUP + 100)
    return lambda: model.learn(steps, reset_num_timesteps=False)


def torch_until(library, name, hidden, buffer, seed, steps, goal):
    """Evaluates after every thousand steps."""
    import gymnasium
    from stable_baselines3.common.evaluation import evaluate_policy

    model = torch_model(library, name, hidden, buffer, seed)
    for done in range(EVERY, steps + 1, EVERY):
        model.learn(EVERY, reset_num_timesteps=False)
        mean, _ = evaluate_policy(model, gymnasium.make(env_of(name)), EPISODES, warn=False)
        if mean >= goal:
            return {"steps": done, "seconds": time.perf_counter() - START}
    return None


def main():
    """Command line."""
    library, name = sys.argv[1:3]
    hidden, buffer, seeds, steps = map(int, sys.argv[3:7])
    if sys.argv[7:]:
        goal = float(sys.argv[8])
        reached = (
            rejax_until(name, hidden, buffer, seeds, steps, goal)
            if library == "rejax"
            else torch_until(library, name, hidden, buffer, seeds, steps, goal)
        )
        print(json.dumps(reached))
        return
    make = rejax_turns if library == "rejax" else lambda *sizes: torch_turns(library, *sizes)
    turn = make(name, hidden, buffer, seeds, steps)
    print(json.dumps({"ready": time.perf_counter() - START}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        turn()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"updates": num_updates(name, steps) * seeds, "seconds": seconds, "peak": peak}), flush=True)


main()

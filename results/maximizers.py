"""Judge fqi's maximisers by the exact maximum of trained Q-networks; write `maximizers.md`.

    python results/maximizers.py

The networks (hidden 32 x 32) are those of fqi on environments with 1, 2 and 4 actions, the last a linear-quadratic
system. A gap is the exact maximum, by mixed-integer programming, less the value of the action found, in percent of the
range of q: from its least value over random actions to its greatest, over all states. Times are those of the compiled
maximiser on many states at once, on one core.
"""

import argparse
import statistics
import time

import gymnax
import jax
import numpy as np
from benchmark import ROOT, machine

from algorithms import fqi
from common import devices, lqr, milp


def four_inputs():
    """The system of four dimensions, each pushed by an input of its own."""
    return lqr.LQR(lqr.system(4).replace(B=0.5 * np.eye(4), R=np.eye(4)))


gymnax.register("FourInputs-misc", four_inputs)
ENVS = {"Pendulum-v1": 1, "Reacher-misc": 2, "FourInputs-misc": 4}
SOLVERS = (  # maximizer, num_candidates, maximizer_steps; the first is the default
    ("gradient", 4, 10),
    ("gradient", 16, 20),
    ("lbfgs", 4, 10),
    ("cem", 16, 4),
    ("cem", 64, 5),
    ("grid", 11, 1),
)


def train(env):
    """Configuration, parameters of the critic, and next observations of the base points."""
    fields = {"num_iterations": 20, "iterations_per_epoch": 20, "num_eval_episodes": 1, "gamma": 0.9}
    config = fqi.Config(env=env, hidden_sizes=(32, 32), **fields)
    state, _ = jax.jit(fqi.train)(config, jax.random.key(0))
    return config, state.params.critic, state.base_points.next_obs


def measure(config, params, obs, num_states):
    """Actions at the first `num_states` and seconds a state, the median of three calls on more of them."""
    many = obs[: 500 if config.maximizer == "lbfgs" else 8192]
    solve = jax.jit(fqi.maximize, compiler_options=devices.cpu_compiler_options())
    actions = jax.block_until_ready(solve(config, params, many, jax.random.key(1)))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(solve(config, params, many, jax.random.key(1)))
        seconds.append((time.perf_counter() - start) / len(many))
    return actions[:num_states], statistics.median(seconds)


def main():
    """Parse the command line; train, judge, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-states", type=int, default=200)
    num_states = parser.parse_args().num_states
    devices.set_up_backend()
    lines = [
        f"Gap to the exact maximum of q over {num_states} states, in percent of its range, and time of each state.",
        f"`python results/maximizers.py --num-states {num_states}`",
        f"on {machine()}.",
        "",
        "| environment | actions | maximizer | candidates | steps | mean gap | worst gap | microseconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for env, action_dim in ENVS.items():
        config, params, obs = train(env)
        start = time.perf_counter()
        layers = [tuple(np.asarray(x) for x in layer) for layer in params]
        solutions = [milp.relu_network(layers, s) for s in np.asarray(obs[:num_states])]
        seconds = (time.perf_counter() - start) / num_states
        exact, proof = (np.array([getattr(s, name) for s in solutions]) for name in ("value", "gap"))
        random_actions = jax.random.uniform(jax.random.key(2), (1000, 1, action_dim), minval=-1, maxval=1)
        tile = lambda action, obs=obs: np.broadcast_to(action, (num_states, action.shape[-1]))
        q = np.array([fqi.critic(config, params, obs[:num_states], tile(action)) for action in random_actions])
        scale = 100 / (exact.max() - q.min())
        figures = f"{scale * proof.mean():.4f} % | {scale * proof.max():.4f} % | {1e6 * seconds:,.0f}"
        lines.append(f"| {env} | {action_dim} | milp |  |  | {figures} |")
        for name, candidates, steps in SOLVERS:
            fields = {"maximizer": name, "num_candidates": candidates, "maximizer_steps": steps}
            config = fqi.Config(**(vars(config) | fields))
            actions, seconds = measure(config, params, obs, num_states)
            gap = scale * (exact - np.asarray(fqi.critic(config, params, obs[:num_states], actions)))
            figures = f"{gap.mean():.4f} % | {gap.max():.4f} % | {1e6 * seconds:,.1f}"
            shown = "" if name == "grid" else steps
            lines.append(f"| {env} | {action_dim} | {name} | {candidates} | {shown} | {figures} |")
            print(lines[-1], flush=True)
    (ROOT / "results" / "maximizers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Measure speed and memory, also of peers; write `benchmark.json` and the tables of `results/README.md` and the README.

    python results/benchmark/benchmark.py                  everything except the peers
    python results/benchmark/benchmark.py --peers FOLDER   with each peer in a virtual environment in FOLDER
    python results/benchmark/benchmark.py --only WORD ...  only these groups; the other rows of `benchmark.json` remain
    python results/benchmark/benchmark.py --redraw         only the tables, from `benchmark.json`; measures nothing

Groups: peers, discrete, on_policy, steps, goal, returns, floor, skeleton, buffer, seeds, hosts, memory, compile,
command, physics, physics_returns, gpu. Measurements that are compared are interleaved, one turn of each after the
other; the numbers are medians of `--turns` turns after a warm-up turn. Close other programs. The last three need the
extras of the physics engines; without a GPU the rows of `gpu` have no numbers.
"""

import argparse
import concurrent.futures
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parent
ROOT = RESULTS.parent
ALGORITHMS = ("ddpg", "td3", "sac_value", "sac", "dqn", "svg_model")  # those with a replay buffer
EVERY_ALGORITHM = ("fqi", "fqi_amortized", "nfqca", "soft_fqi", *ALGORITHMS, "reinforce", "ppo", "svg", "shac")
DISCRETE = {"dqn": {"num_steps": 1, "utd_ratio": 1.0, "batch_size": 256}}  # fields of what is compared on CartPole-v1
ON_POLICY = (  # environment, number of environments, minibatches, seeds, steps per turn of ppo and of its peers
    ("CartPole-v1", 4, 4, 1, 51_200, {"purejaxrl": 51_200, "rejax": 51_200, "sbx": 5120, "sb3": 2560}),
    ("CartPole-v1", 4, 4, 8, 51_200, {"purejaxrl": 51_200, "rejax": 51_200}),
    ("Breakout-MinAtar", 64, 8, 1, 163_840, {"purejaxrl": 163_840}),  # which with 8 seeds hangs
)
RATES = {  # cases of the files whose updates are not one for each environment step
    "dqn, CartPole-v1": ("dqn", {"steps_per_epoch": 4_000}),
    "shac, Pendulum-v1": ("shac", {"steps_per_epoch": 20_480}),
}
TASK = "playground/CheetahRun"
HOPPER = {"env": "brax/hopper", "num_envs": 128, "hidden_sizes": [256, 256], "steps_per_epoch": 12_800}
CHEETAH = {"env": TASK, "num_envs": 1024, "hidden_sizes": [256, 256], "steps_per_epoch": 102_400}
TASK_PEERS, SEEDS, EPISODES = ("sbx", "sb3"), 2, 16
TASK_STEPS = 31_000  # a warm-up of 1,000 and whole epochs
BEST_RETURNS = (  # a run of experiments/curves.py; a peer, its steps and what it follows
    ("dqn on CartPole-v1", "sb3", 50_000, "rl-zoo's settings"),
    ("ppo on Breakout-MinAtar", "purejaxrl", 1_966_080, "its settings for MinAtar, while it trains"),
)
RETURN_SEEDS = 12
GPU = (  # case, algorithms, fields, numbers of seeds
    ("brax/hopper, 128 environments", ("td3", "sac"), HOPPER, (1, 200, 300)),
    ("Pendulum-v1", ("td3",), {"steps_per_epoch": 1000}, (1, 16, 256, 1024, 4096)),
    ("CheetahRun, 1,024 environments, 1 update per 16 steps", ("td3", "sac"), CHEETAH | {"utd_ratio": 1 / 16}, (1,)),
)
GYMNASIUM = ("gymnasium[classic-control]==1.4.0", "playground==0.2.0", "mujoco==4.0.0", "mujoco-mjx==3.17.0")
SHARED = ("distrax==0.1.8", "flax==0.12.8", "optax==0.2.8", "tensorboard", "torch", "tyro")
PEERS = {  # requirements for pip
    "rejax": ("rejax==0.1.3", "gymnax==0.0.9"),
    "sbx": ("sbx-rl==0.28.0", *GYMNASIUM),
    "sb3": ("stable-baselines3==2.9.2", *GYMNASIUM),
    "purejaxrl": ("gymnax==0.0.9", *SHARED[:3]),
    "cleanrl": (GYMNASIUM[0], *SHARED[1:]),
}
SOURCES = {  # of those that are no packages: repository and commit
    "purejaxrl": ("https://github.com/luchris429/purejaxrl", "31756b197773a52db763fdbe6d635e4b46522a73"),
    "cleanrl": ("https://github.com/vwxyzjn/cleanrl", "fe8d8a03c41a7ef5b523e2e354bd01c363e786bb"),
}
NAMES = {"rejax": "rejax", "sbx": "SBX", "sb3": "Stable-Baselines3", "purejaxrl": "PureJaxRL", "cleanrl": "CleanRL"}
COLUMNS = ("rejax", "sbx", "sb3")  # of the table in the README: those with TD3 and SAC
GOAL = -200
LIMIT = 600  # seconds of a turn, after which a process counts as hanging
QUOTED = (  # the cases of the table in the README
    ("td3", "64 x 64, buffer of 50,000"),
    ("sac", "64 x 64, buffer of 50,000"),
    ("td3", "256 x 256, buffer of 50,000"),
    ("sac", "256 x 256, buffer of 50,000"),
    ("td3", "8 seeds, 64 x 64, buffer of 50,000"),
    ("td3", f"process start to a return of {GOAL}"),
)


# Workers: each runs in its own process and prints one JSON value or, if it serves, one for each line that it reads


def load(name, **fields):
    """An algorithm's module and configuration, with epochs long enough to be timed, and threads as in the runner."""
    from amortax.common import brax, devices, playground  # noqa: F401, they register their environments

    module = importlib.import_module(f"amortax.algorithms.{name}")
    num_runs = fields.pop("num_seeds", 1)
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    epochs = {"steps_per_epoch": 2000, "total_steps": 2_001_000}
    if name == "svg_model":
        fields = {"num_rollouts": 64} | fields
        epochs = {"iterations_per_epoch": 200, "num_iterations": 200_000}
    config = module.Config(**epochs | {"activation": "relu"} | fields)  # which is the peers'
    devices.set_up_backend(num_runs, devices.largest_product(config))
    return module, config


def prepare(module, config, num_seeds=1, grid=None):
    """A call that trains all runs for one epoch with the runner's programs, in rounds; it returns the states."""
    from amortax.common import programs, sweep

    runs = [(cell.config, seed) for cell in sweep.cells(config, grid or {}) for seed in range(num_seeds)]
    compiled = programs.compile_programs(config, module.init, module.epoch, len(runs))
    size = compiled.round_size
    batches = [programs.place(compiled, *zip(*runs[i : i + size], strict=True)) for i in range(0, len(runs), size)]
    states = [programs.start(compiled, batch) for batch in batches]

    def advance():
        for batch, states_of_round in zip(batches, states, strict=True):
            programs.advance(compiled, batch, states_of_round)
        return compiled, states

    return advance


def serve(call, updates):
    """Time one call for each line of standard input."""
    print("{}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"updates": updates, "seconds": seconds, "peak": peak}), flush=True)


def worker_steps(name, fields, num_seeds=1):
    """Serve epochs, counted by their environment steps."""
    module, config = load(name, **fields, num_seeds=num_seeds)
    steps = iterations_per_epoch(module, config) * config.num_envs * config.num_steps
    serve(prepare(module, config, num_seeds), steps * num_seeds)


def worker_epochs(name, fields, num_seeds=1, grid=None):
    """Serve epochs of all runs; `grid` maps fields to the values that are swept."""
    num_runs = num_seeds
    for values in (grid or {}).values():
        num_runs *= len(values)
    module, config = load(name, **fields, num_seeds=num_runs)
    serve(prepare(module, config, num_seeds, grid), updates_per_epoch(module, config) * num_runs)


def updates_per_epoch(module, config):
    """Updates of one run: of the policy for SVG, PPO and SHAC, of the critics for those with a `utd_ratio`."""
    iterations = iterations_per_epoch(module, config)
    if hasattr(config, "utd_ratio"):
        return round(iterations * config.num_envs * config.num_steps * config.utd_ratio)
    return iterations * getattr(config, "update_epochs", 1) * getattr(config, "num_minibatches", 1)


def iterations_per_epoch(module, config):
    """Iterations of one run."""
    given = getattr(config, "iterations_per_epoch", None)
    return given or module.num_iterations(config, config.steps_per_epoch)


def compiled(updates, *arguments):
    """`updates`, compiled as in the runner, as a call that returns when it has finished."""
    import jax

    from amortax.common import devices

    program = jax.jit(updates, compiler_options=devices.cpu_compiler_options()).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def worker_floor(name, fields):
    """Serve the updates of an epoch on one fixed batch, and nothing else."""
    import jax
    import jax.numpy as jnp
    from jax import random

    module, config = load(name, **fields)
    state = jax.jit(module.init)(config, random.key(0))
    (rows,) = module.sample_rows(config, state.buffer, state.step, random.key(1), 1)
    batch = module.read(config, state.buffer, rows)
    noise = random.normal(random.key(2), (2, *batch.action.shape))
    inputs = {"ddpg": (), "td3": (noise[0],), "sac_value": (noise,), "sac": (noise,), "dqn": ()}  # besides the batch
    counted = name in ("ddpg", "td3", "dqn")  # which updates include the policy or the targets depends on their number

    def update(carry, count):
        if name == "svg_model":
            return update_svg(module, config, carry, batch, rollouts), None
        return module.update(config, *carry, batch, *inputs[name], *[count] * counted)[:2], None

    if name == "svg_model":
        rollouts = module.sample_rollouts(config, state.params.model, state.buffer, state.step, random.key(2))
    updates = updates_per_epoch(module, config)
    every = lambda carry: jax.lax.scan(update, carry, 1 + jnp.arange(updates))[0]
    serve(compiled(every, (state.params, state.opt_state)), updates)


def update_svg(module, config, carry, batch, rollouts):
    """SVG's updates of its model on one batch and of its policy on the same rollouts: `(params, opt_state)`."""
    import jax

    params, opt_state = carry
    fit = lambda carry, _: (module.update_model(config, *carry, batch)[:2], None)
    (model, model_opt_state), _ = jax.lax.scan(fit, (params.model, opt_state.model), length=config.model_steps)
    params, opt_state = params._replace(model=model), opt_state._replace(model=model_opt_state)
    return module.update(config, params, opt_state, *rollouts)[:2]


def worker_skeleton(hidden, updates):
    """Serve the matrix products of TD3's updates, and nothing else."""
    import jax
    import jax.numpy as jnp

    _, config = load("td3", hidden_sizes=[hidden, hidden])

    def forward(weights, x):
        layers = [x]
        for w in weights:
            layers.append(layers[-1] @ w)
        return layers

    def backward(weights, layers):
        """Products that give the derivatives with respect to weights, and to the input of the first layer."""
        g, products = layers[-1], []
        for w, x in zip(weights[::-1], layers[-2::-1], strict=True):
            products.append(x.T @ g)
            g = g @ w.T
        return products[::-1], g

    def moved(weights, products):
        return [w + 1e-9 * p for w, p in zip(weights, products, strict=True)]

    def update_critics(carry, _):
        actor, *critics = carry
        next_inputs = inputs + 1e-6 * forward(actor, obs)[-1]  # the target policy's action
        targets = sum(forward(critic, next_inputs)[-1] for critic in critics)
        layers = [forward(critic, inputs + 1e-6 * targets) for critic in critics]
        return (actor, *(moved(c, backward(c, x)[0]) for c, x in zip(critics, layers, strict=True))), None

    def update(carry, _):
        (actor, critic, other), _ = jax.lax.scan(update_critics, carry, length=config.policy_delay)
        layers = forward(actor, obs)
        values = forward(critic, inputs + 1e-6 * layers[-1])
        g = values[-1]
        for w in critic[::-1]:
            g = g @ w.T
        layers[-1] = g[:, -1:]
        return (moved(actor, backward(actor, layers)[0]), critic, other), None

    key = jax.random.key(0)
    sizes = lambda inputs: [(inputs, hidden), (hidden, hidden), (hidden, 1)]
    actor, critic, other = ([0.1 * jax.random.normal(key, shape) for shape in sizes(n)] for n in (3, 4, 4))
    obs, inputs = (jax.random.normal(key, (config.batch_size, n)) for n in (3, 4))
    every = lambda carry: jax.lax.scan(update, carry, length=updates // config.policy_delay)[0]
    serve(compiled(every, (actor, critic, jax.tree.map(jnp.negative, other))), updates)


def worker_memory(buffer_size, num_seeds):
    """[peak resident bytes of TD3 with a checkpoint, bytes of its buffers]."""
    import jax

    from amortax.common import checkpoint, programs

    module, config = load("td3", buffer_size=buffer_size, num_seeds=num_seeds)
    advance = prepare(module, config, num_seeds)
    with tempfile.TemporaryDirectory() as folder:
        compiled, (states, *_) = advance()
        position = checkpoint.Position(0, num_seeds, 1)
        checkpoint.save(Path(folder), position, programs.to_arrays(compiled, states))
        compiled, rounds = advance()
    buffers = sum(x.nbytes for states in rounds for state in states for x in jax.tree.leaves(state.buffer))
    print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, buffers]))


def worker_compile(name):
    """Seconds to trace and compile `train`, with empty caches."""
    import jax

    os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
    from amortax.common import devices

    module = importlib.import_module(f"amortax.algorithms.{name}")
    config = module.Config()
    devices.set_up_backend(1, devices.largest_product(config))
    key = jax.random.key(0)
    start = time.perf_counter()
    jax.jit(module.train, compiler_options=devices.cpu_compiler_options()).lower(config, key).compile()
    print(time.perf_counter() - start)


def worker_device():
    """The kind of the device, and how it multiplies matrices of float32."""
    import jax

    device, precision = jax.devices()[0], jax.config.jax_default_matmul_precision
    print(json.dumps({"platform": device.platform, "kind": device.device_kind, "precision": precision or "default"}))


# Measuring


def command_of(name, *args, prefix=()):
    """The command of a worker."""
    return [*prefix, sys.executable, __file__, "--worker", name, json.dumps(args)]


def single_core(i=0):
    """Words before a command that keep it on one core, the i-th."""
    return ("taskset", "--cpu-list", str(i % os.cpu_count()))


def each_seed(measure, num_seeds=SEEDS):
    """`[measure(seed)]` of all seeds, one after the other on each core, which is that of `single_core(seed)`."""
    cores = os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        of_cores = list(pool.map(lambda i: [measure(seed) for seed in range(i, num_seeds, cores)], range(cores)))
    return [of_cores[seed % cores][seed // cores] for seed in range(num_seeds)]


def answer(command):
    """The last JSON value that a command prints."""
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(turns, *commands):
    """`[(updates/s, peak bytes)]` of serving commands, interleaved: medians of all turns except the first."""
    processes = []
    for command in commands:
        words = [str(word) for word in command]
        processes.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        read_json(processes[-1])  # ready, before the next one starts
    turns = [[ask(process) for process in processes] for _ in range(turns + 1)][1:]
    for process in processes:
        process.stdin.close()
        process.wait()
    return [
        (statistics.median(x["updates"] / x["seconds"] for x in column), max(x["peak"] for x in column))
        for column in zip(*turns, strict=True)
    ]


def ask(process):
    """One turn of a serving process; SystemExit where it hangs."""
    process.stdin.write("\n")
    process.stdin.flush()
    timer = threading.Timer(LIMIT, process.kill)
    timer.start()
    try:
        return read_json(process)
    finally:
        timer.cancel()


def read_json(process):
    """The next line of JSON that a process prints."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"{process.args}: ended with exit code {process.wait()}")


def install(folder):
    """`{peer: Python}` of virtual environments in `folder`, created if they do not exist, each with its sources."""
    pythons = {}
    for peer, packages in PEERS.items():
        environment = Path(folder).resolve() / peer
        if not environment.exists():
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
            subprocess.run([environment / "bin" / "pip", "install", "--quiet", *packages], check=True)
            if peer in SOURCES:
                (repository, commit), source = SOURCES[peer], environment / "source"
                subprocess.run(["git", "clone", "--quiet", repository, source], check=True)
                subprocess.run(["git", "checkout", "--quiet", commit], cwd=source, check=True)
        pythons[peer] = environment / "bin" / "python"
    return pythons


def version_of(peer):
    """A peer with its version, as text."""
    if peer in SOURCES:
        return f"{NAMES[peer]} at {SOURCES[peer][1][:7]}"
    return ", ".join(package for package in PEERS[peer] if package not in GYMNASIUM)


def peer_command(pythons, peer, name, steps, **options):
    """The command that trains a peer's algorithm; an option that is True is a flag."""
    words = [pythons[peer], FOLDER / "peers.py", peer, name.upper(), "--steps", steps]
    for option, value in options.items():
        words += [f"--{option}", value] if value is not True else [f"--{option}"]
    return words


def counted(seeds):
    """A number of seeds in words."""
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def updates_row(name, what, value, text, ratio):
    """A row whose value is a rate."""
    row = {"algorithm": name, "what": what, "measured": f"{value:,.0f} updates/s", "beside": text}
    return row | {"value": value, "ratio": ratio}


def measure_peers(turns, pythons):
    """Updates per second and peak memory of TD3 and SAC on the same work as each peer."""
    cases = [  # algorithm, hidden, buffer, seeds, steps per turn of each peer
        ("td3", 64, 50_000, 1, {"rejax": 4000, "sbx": 2000, "sb3": 500}),
        ("sac", 64, 50_000, 1, {"rejax": 4000, "sbx": 2000, "sb3": 500}),
        ("td3", 256, 50_000, 1, {"rejax": 1500, "sbx": 600, "sb3": 200}),
        ("sac", 256, 50_000, 1, {"rejax": 1500, "sbx": 600, "sb3": 200}),
        ("td3", 64, 1_000_000, 1, {"rejax": 1000}),
        ("td3", 64, 50_000, 8, {"rejax": 2000}),
        ("sac", 64, 50_000, 8, {"rejax": 2000}),
    ]
    for name, hidden, buffer, seeds, steps in cases if pythons else ():
        fields = {"steps_per_epoch": 1000} if hidden == 256 or seeds > 1 else {}
        yield from rows_beside_peers(turns, pythons, name, steps, fields, hidden, buffer, seeds)


def measure_discrete(turns, pythons):
    """DQN's updates per second with the target of each peer: rejax has double Q-learning, the others do not."""
    cases = [(True, {"rejax": 4000}), (False, {"cleanrl": 2000, "sbx": 2000, "sb3": 1000})]
    for double, steps in cases if pythons else ():
        fields = DISCRETE["dqn"] | {"double": double}
        yield from rows_beside_peers(turns, pythons, "dqn", steps, fields, also=", CartPole-v1" + ", double" * double)


def rows_beside_peers(turns, pythons, name, steps, fields, hidden=64, buffer=50_000, seeds=1, also=""):
    """A row for each peer of `steps`, by its steps in a turn: updates per second and memory, ours and the peer's."""
    fields = fields | {"hidden_sizes": [hidden, hidden], "buffer_size": buffer}
    commands = [command_of("epochs", name, fields | {"num_envs": n}, seeds) for n in (8, 1)]
    sizes = {"hidden": hidden, "buffer": buffer, "seeds": seeds}
    commands += [peer_command(pythons, peer, name, number, **sizes) for peer, number in steps.items()]
    (ours, peak), (one_env, _), *theirs = take_turns(turns, *commands)
    many = f"{seeds} seeds, " if seeds > 1 else ""
    what = f"{many}{hidden} x {hidden}, buffer of {buffer:,}{also}"
    for peer, (rate, peer_peak) in zip(steps, theirs, strict=True):
        text = f"{ours / rate:.1f} x {NAMES[peer]}, {rate:,.0f} ({one_env / rate:.1f} x with num_envs 1); "
        text += f"memory {peak / 2**20:,.0f} MiB, {peer_peak / 2**20:,.0f} MiB"
        yield updates_row(name, what, ours, text, ours / rate)


def measure_on_policy(turns, pythons):
    """PPO's environment steps per second, with 4 passes over 128 steps as in `peers.py`, beside peers."""
    for env, num_envs, minibatches, seeds, steps, peers in ON_POLICY if pythons else ():
        fields = {"env": env, "num_envs": num_envs, "num_steps": 128, "num_eval_episodes": 1}
        fields |= {"update_epochs": 4, "num_minibatches": minibatches, "steps_per_epoch": steps}
        sizes = {"env": env, "envs": num_envs, "minibatches": minibatches, "seeds": seeds}
        theirs = [peer_command(pythons, peer, "ppo", n, **sizes) for peer, n in peers.items()]
        found = take_turns(turns, command_of("epochs", "ppo", fields, seeds), *theirs)
        ours, *rates = (rate * num_envs * 128 / (4 * minibatches) for rate, _ in found)  # of updates
        what = f"{counted(seeds)}, {env}, {num_envs} environments, 128 steps"
        row = {"algorithm": "ppo", "what": what, "value": ours}
        for peer, rate in zip(peers, rates, strict=True):
            text = f"{ours / rate:.1f} x {NAMES[peer]}, {rate:,.0f}"
            yield row | {"measured": f"{ours:,.0f} steps/s", "beside": text, "ratio": ours / rate}


def measure_steps(turns, pythons):
    """Environment steps per second, with the updates that they ask for."""
    for what, (name, fields) in RATES.items():
        ((rate, peak),) = take_turns(turns, command_of("steps", name, fields))
        row = {"algorithm": name, "what": what.removeprefix(f"{name}, "), "measured": f"{rate:,.0f} steps/s"}
        yield row | {"beside": f"memory {peak / 2**20:,.0f} MiB", "value": rate, "ratio": None}


def measure_goal(turns, pythons):
    """Seconds from the start of a process, with empty caches, to a greedy return of GOAL: medians of three seeds."""
    peers = COLUMNS if pythons else ()
    for name in ("td3", "sac"):
        times = {peer: [] for peer in ("ours", *peers)}
        for seed in range(3):
            times["ours"].append(seconds_until(GOAL, evaluations(name, seed, "--total-steps", "20000")))
            for peer in peers:
                reached = answer(peer_command(pythons, peer, name, 20_000, until=GOAL, seed=seed))
                times[peer].append(reached["seconds"] if reached else float("inf"))
        ours = statistics.median(times.pop("ours"))
        medians = {NAMES[peer]: statistics.median(seconds) for peer, seconds in times.items()}
        texts = [f"{p} {s:.0f} s" if s < float("inf") else f"{p} not in 20,000 steps" for p, s in medians.items()]
        row = {"algorithm": name, "what": f"process start to a return of {GOAL}", "measured": f"{ours:.1f} s"}
        yield row | {"beside": ", ".join(texts), "value": ours, "ratio": min(medians.values(), default=None)}


def evaluations(name, seed, *flags, prefix=()):
    """`(seconds from the start of the command, mean return)` of each evaluation, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*prefix, sys.executable, ROOT / "algorithms" / f"{name}.py", "--seed", str(seed), *flags]
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=folder, env=os.environ | cache_in(f"{folder}/cache")
        )
        try:
            for line in process.stdout:
                if found := re.search(r"return (-?[\d,.]+)", line):
                    yield time.perf_counter() - start, float(found[1].replace(",", ""))
        finally:
            process.kill()
            process.wait()


def seconds_until(goal, evaluated):
    """Seconds of the first evaluation whose return is at least `goal`; infinite without one."""
    return next((seconds for seconds, mean in evaluated if mean >= goal), float("inf"))


def cache_in(folder):
    """Environment variables for a compilation cache in `folder`."""
    return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


def measure_returns(turns, pythons):
    """Final returns after equal steps, of peers with the settings that they publish for the environment."""
    import numpy as np

    from amortax.common import plot

    sys.path.append(str(RESULTS))
    from experiments import curves

    runs = curves.ONLINE | curves.MINATAR
    for label, peer, steps, settings in BEST_RETURNS if pythons else ():
        name, env, flags, *_ = runs[label]
        evaluated = each_seed(functools.partial(all_evaluations, name, f"--env {env} {flags}"), RETURN_SEEDS)
        options = {"env": env, "settings": "published"}
        trained = each_seed(functools.partial(peer_returns, pythons, peer, name, steps, options), RETURN_SEEDS)
        ours, theirs = np.array([x[-1][1] for x in evaluated]), np.array([x["return"] for x in trained])
        row = {"algorithm": name, "what": f"{env}, return after {steps:,} steps", "measured": plot.summary(ours)}
        row |= {"beside": f"{NAMES[peer]}, {settings}: {plot.summary(theirs)}", "value": plot.iqm(ours), "ratio": None}
        yield row


def measure_floor(turns, pythons):
    """Whole epochs compared with only their updates, on one fixed batch."""
    for name in ALGORITHMS:
        for hidden in (64, 256):
            fields = {"hidden_sizes": [hidden, hidden]}
            if name != "svg_model":
                fields |= {"steps_per_epoch": 2000 if hidden == 64 else 1000}
            commands = command_of("epochs", name, fields), command_of("floor", name, fields)
            (whole, _), (floor, _) = take_turns(turns, *commands)
            text = f"{whole / floor:.2f} of the update-only floor, {floor:,.0f}"
            yield updates_row(name, f"one seed, {hidden} x {hidden}", whole, text, whole / floor)


def measure_skeleton(turns, pythons):
    """TD3 compared with only the matrix products of its updates."""
    for hidden in (64, 256):
        fields = {"hidden_sizes": [hidden, hidden], "steps_per_epoch": 2000 if hidden == 64 else 1000}
        products = command_of("skeleton", hidden, fields["steps_per_epoch"])
        (whole, _), (skeleton, _) = take_turns(turns, command_of("epochs", "td3", fields), products)
        text = f"{whole / skeleton:.2f} of its matrix products alone, {skeleton:,.0f}"
        yield updates_row("td3", f"one seed, {hidden} x {hidden}", whole, text, whole / skeleton)


def measure_buffer(turns, pythons):
    """A buffer of a million transitions compared with one of ten thousand."""
    for name in ALGORITHMS:
        for seeds in (1, 8) if name == "td3" else (1,):
            sizes = 10_000, 1_000_000
            commands = [command_of("epochs", name, {"buffer_size": size}, seeds) for size in sizes]
            (small, _), (large, _) = take_turns(turns, *commands)
            text = f"{large / small:.2f} of that with a buffer of 10,000, {small:,.0f}"
            what = f"{counted(seeds)}, buffer of 1,000,000"
            yield updates_row(name, what, large, text, large / small)


def measure_seeds(turns, pythons):
    """Many runs compared with few."""
    fields = {"steps_per_epoch": 1000}
    grid = {"learning_rate": [3e-4, 1e-3, 3e-3], "gamma": [0.95, 0.98, 0.99]}
    one, eight, many, plain, swept = take_turns(
        turns,
        command_of("epochs", "td3", fields, prefix=single_core()),
        *(command_of("epochs", "td3", fields, seeds) for seeds in (8, 32, 36)),
        command_of("epochs", "td3", fields, 4, grid),
    )
    (one, _), (eight, _), (many, _), (plain, _), (swept, _) = one, eight, many, plain, swept
    cores = f"on {os.cpu_count()} cores"
    text = f"{eight / one:.2f} x one seed on one core, {one:,.0f}"
    yield updates_row("td3", f"8 seeds {cores}", eight, text, eight / one)
    yield updates_row("td3", f"32 seeds {cores}", many, f"{many / eight:.2f} x 8 seeds, {eight:,.0f}", many / eight)
    text = f"{swept / plain:.2f} x 36 seeds, {plain:,.0f}"
    yield updates_row("td3", f"a sweep of 3 x 3 cells of 4 seeds {cores}", swept, text, swept / plain)


def measure_hosts(turns, pythons):
    """Two processes of one device compared with one process of two, by the last rate that the command line prints."""
    rates = {1: [], 2: []}
    for turn in range(turns + 1):
        for processes in rates:
            with tempfile.TemporaryDirectory() as folder:
                rates[processes].append(command_rate(processes, folder, 29_500 + turn))
    one, two = (statistics.median(rates[processes][1:]) for processes in (1, 2))
    text = f"{two / one:.2f} x one process of two devices, {one:,.0f}"
    yield updates_row("td3", "8 seeds, two processes of one device", two, text, two / one)


def command_rate(num_processes, folder, port):
    """Steps per second of 8 seeds of TD3 by the command line, without compilation."""
    command = [sys.executable, ROOT / "algorithms" / "td3.py", "--num-seeds", 8, "--total-steps", 21_000]
    command += ["--steps-per-epoch", 5000, "--no-plot", "--out", folder]
    distributed = ["--distributed", "--coordinator-address", f"127.0.0.1:{port}", "--num-processes", num_processes]
    processes = []
    for i in range(num_processes):
        words = [str(word) for word in ([*command, *distributed, "--process-id", i] if num_processes > 1 else command)]
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(2 // num_processes)}
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env))
    outputs = [process.communicate()[0] for process in processes]
    return float(re.findall(r"([\d,]+) steps/s", outputs[0])[-1].replace(",", ""))


def measure_memory(turns, pythons):
    """Peak memory with large buffers."""
    peak, buffers = answer(command_of("memory", 1_000_000, 8))
    text = f"{(peak - buffers) / 2**30:.2f} GiB more than the buffers, {buffers / 2**30:.2f} GiB"
    row = {"algorithm": "td3", "what": "peak memory, 8 seeds, buffers of 1,000,000", "beside": text}
    yield row | {"measured": f"{peak / 2**30:.2f} GiB", "value": peak, "ratio": peak / buffers}


def measure_compile(turns, pythons):
    """Seconds to trace and compile `train`."""
    for name in EVERY_ALGORITHM:
        seconds = statistics.median(answer(command_of("compile", name)) for _ in range(turns))
        row = {"algorithm": name, "what": "trace and compile `train`", "measured": f"{seconds:.1f} s", "beside": ""}
        yield row | {"value": seconds, "ratio": None}


def measure_command(turns, pythons):
    """Seconds of the README's command, everything included."""
    with tempfile.TemporaryDirectory() as folder:
        first = [command_seconds(f"{folder}/cache{i}", folder) for i in range(turns)]
        later = [command_seconds(f"{folder}/cache0", folder) for _ in range(turns)]
    first, later = statistics.median(first), statistics.median(later)
    row = {
        "algorithm": "td3",
        "what": "`python algorithms/td3.py --seed 0`",
        "measured": f"{first:.1f} s the first time",
    }
    yield row | {"beside": f"{later:.1f} s from the second time on", "value": first, "ratio": later / first}


def command_seconds(cache, folder):
    """Seconds of one call."""
    start = time.perf_counter()
    command = [sys.executable, ROOT / "algorithms" / "td3.py", "--seed", "0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, env=os.environ | cache_in(cache))
    return time.perf_counter() - start


def measure_physics(turns, pythons):
    """Rates on a task of the Control Suite, beside peers that call its compiled step."""
    for name in ("sac", "td3") if pythons else ():
        fields = {"env": TASK, "hidden_sizes": [256, 256], "tau": 0.005}
        fields |= {"steps_per_epoch": 2000, "num_eval_episodes": 1}  # an episode has 1,000 steps
        commands = [command_of("steps", name, fields | {"num_envs": n}) for n in (8, 1)]
        commands += [peer_command(pythons, peer, name, 500, env=TASK, hidden=256) for peer in TASK_PEERS]
        (ours, _), (one_env, _), *theirs = take_turns(turns, *commands)
        for peer, (rate, _) in zip(TASK_PEERS, theirs, strict=True):
            text = f"{ours / rate:.1f} x {NAMES[peer]}, {rate:,.0f} ({one_env / rate:.1f} x with num_envs 1)"
            yield updates_row(name, f"{TASK}, 256 x 256", ours, text, ours / rate)


def measure_physics_returns(turns, pythons):
    """Returns after equal steps on the same task, and the seconds until then, of runs that have a core each."""
    for name in ("sac", "td3") if pythons else ():
        flags = f"--env {TASK} --hidden-sizes 256 256 --tau 0.005 --num-eval-episodes {EPISODES}"
        flags += f" --total-steps {TASK_STEPS} --steps-per-epoch 5000 --activation relu"  # which is the peers'
        ours = each_seed(functools.partial(all_evaluations, name, flags))
        reached = statistics.mean(evaluated[-1][1] for evaluated in ours)
        row = {"algorithm": name, "what": f"{TASK}, return after {TASK_STEPS:,} steps, one core", "value": reached}
        for peer in TASK_PEERS:
            for label, options in (("same settings", {"hidden": 256}), ("its defaults", {"settings": "defaults"})):
                options = {"env": TASK, **options}
                theirs = each_seed(functools.partial(peer_returns, pythons, peer, name, TASK_STEPS, options))
                mean, took = (statistics.mean(x[part] for x in theirs) for part in ("return", "seconds"))
                until = statistics.mean(seconds_until(mean, evaluated) for evaluated in ours)
                there = f"there after {until:,.0f} s" if until < float("inf") else "not there with every seed"
                text = f"{NAMES[peer]}, {label}: {mean:,.0f} after {took:,.0f} s, Amortax {there}"
                yield row | {"measured": f"{reached:,.0f}", "beside": text, "ratio": took / until}


def all_evaluations(name, flags, seed):
    """Those of our command on one core."""
    return list(evaluations(name, seed, *flags.split(), prefix=single_core(seed)))


def peer_returns(pythons, peer, name, steps, options, seed):
    """A peer's final return and its seconds, on one core."""
    command = peer_command(pythons, peer, name, steps, returns=True, seed=seed, **options)
    return answer([*single_core(seed), *command])


def measure_gpu(turns, pythons):
    """Environment steps per second on a GPU, of one run also the share of its updates."""
    device = answer(command_of("device"))
    for case, names, fields, numbers in GPU:
        for name in names:
            for seeds in numbers:
                row = {"algorithm": name, "what": f"{case}, {seeds:,} seed{'s' * (seeds > 1)}", "ratio": None}
                if device["platform"] != "gpu":
                    yield row | {"measured": "not measured", "beside": "no GPU", "value": None}
                    continue
                commands = [command_of("steps", name, fields, seeds)]
                commands += [command_of("floor", name, fields)] * (seeds == 1)
                (rate, _), *floor = take_turns(turns, *commands)
                text = f"{device['kind']}, precision of products: {device['precision']}"
                for updates, _ in floor:
                    text += f"; {rate * fields.get('utd_ratio', 1) / updates:.0%} of the time in updates"
                yield row | {"measured": f"{rate:,.0f} steps/s", "beside": text, "value": rate}


GROUPS = {name.removeprefix("measure_"): f for name, f in list(globals().items()) if name.startswith("measure_")}


# The table


def machine(*more_packages):
    """CPU and versions, as text."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    packages = ("jax", "optax", "gymnax", "numpy", *more_packages)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, {versions}"


def table(measured):
    """The table in Markdown."""
    lines = [
        "Pendulum-v1, default configurations except where stated, ReLU networks, one update per environment step.",
        "Per 20 environment steps svg_model makes one update of the policy, from 64 rollouts, and 8 of the model.",
        "Rates are medians over turns; memory is the peak of a process, first Amortax, then the peer. Returns on",
        f"{TASK} are means of {SEEDS} seeds, too few to rank, and {EPISODES} greedy episodes each.",
        f"On Breakout-MinAtar, where a run gets past the first wall or does not, {RETURN_SEEDS} are too few as well.",
        f"Peers: {', '.join(measured['peers'].values()) or 'not measured'}.",
        "",
        f"`python results/benchmark/benchmark.py --peers FOLDER`: {origin(measured, measured['groups'])}.",
        "",
        "| algorithm | case | measured | compared with |",
        "|---|---|---|---|",
    ]
    rows = [row for group in GROUPS for row in measured["groups"].get(group, ())]
    return lines + [f"| {row['algorithm']} | {row['what']} | {row['measured']} | {row['beside']} |" for row in rows]


def origin(measured, groups):
    """How and where groups were measured, as text, with their names where they differ."""
    named = {}
    for group in groups:
        named.setdefault(measured["origins"][group], []).append(group)
    if len(named) == 1:
        return next(iter(named))
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in named.items())


def short_table(measured):
    """The table of the README in Markdown: a line for each of the `QUOTED` cases, and a column for each peer."""
    names = [NAMES[peer] for peer in COLUMNS]
    groups = [group for group in ("peers", "goal") if group in measured["groups"]]
    rows = [row for group in groups for row in measured["groups"][group]]
    lines = [f"| algorithm | case | Amortax | {' | '.join(names)} |", "|---|---|---|---|---|---|"]
    for algorithm, what in QUOTED:
        found = [row for row in rows if (row["algorithm"], row["what"]) == (algorithm, what)]
        theirs = " ".join(row["beside"] for row in found)
        cells = [re.search(rf"\b{name},? (not in [\d,]+ steps|[\d,]+( s)?)", theirs) for name in names]
        for row in found[:1]:
            ours, *rate = row["measured"].split(" updates/s")
            case = [algorithm, what + ", updates/s" * bool(rate), ours, *(cell[1] if cell else "" for cell in cells)]
            lines.append(f"| {' | '.join(case)} |")
    return [
        *lines,
        "",
        "Pendulum-v1, ReLU networks, one update per environment step. Rates are medians over turns, times over 3",
        f"seeds, from empty caches: {origin(measured, groups)};",
        f"{', '.join(text for peer, text in measured['peers'].items() if peer in COLUMNS)}.",
    ]


def main():
    """Parse the command line; measure; write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="folder of the peers' virtual environments")
    parser.add_argument("--turns", type=int, default=5, help="number of turns to take medians of, 5 by default")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups to measure")
    parser.add_argument("--redraw", action="store_true", help="only write the tables, from benchmark.json")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, args = arguments.worker
        globals()[f"worker_{name}"](*json.loads(args))
        return
    path = FOLDER / "benchmark.json"
    if arguments.redraw:
        write_tables(json.loads(path.read_text()))
        return
    pythons = install(arguments.peers) if arguments.peers else {}
    measured = json.loads(path.read_text()) if path.exists() else {"groups": {}, "origins": {}, "peers": {}}
    measured["peers"] |= {peer: version_of(peer) for peer in pythons}
    for group in arguments.only:
        measured["groups"][group] = []
        measured["origins"][group] = f"{arguments.turns} turns on {machine()}"
        for row in GROUPS[group](arguments.turns, pythons):
            measured["groups"][group].append(row)
            print(f"| {row['algorithm']} | {row['what']} | {row['measured']} | {row['beside']} |", flush=True)
            path.write_text(json.dumps(measured, indent=1) + "\n")
    write_tables(measured)


def write_tables(measured):
    """Write the tables into `results/README.md` and the project's README."""
    write_between(RESULTS / "README.md", "benchmark", "\n".join(table(measured)))
    write_between(ROOT / "README.md", "speed", "\n".join(short_table(measured)))


def write_between(path, name, text):
    """Replace the text between two markers in a file; markers that are missing are added at its end."""
    from amortax.common import record  # not in the process that measures

    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = path.read_text() if path.exists() else "# Results\n"
    if begin not in old:
        old += f"\n{begin}\n{end}\n"
    before, rest = old.split(begin, 1)
    record.write_atomic(path, f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}".encode())


if __name__ == "__main__":
    main()

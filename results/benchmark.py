"""Measure speed and memory of the algorithms on this machine and write the table `results/benchmark.md`.

    python results/benchmark.py                          all but the comparison with a peer
    python results/benchmark.py --rejax ENV/bin/python   also rejax 0.1.3, installed with gymnax 0.0.9 in an environment

Each figure is the median of several measurements; those that are compared are measured by turns. Close other programs.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5
ALGORITHMS = ("ddpg", "td3", "sac_value", "sac", "svg")
SINGLE_CORE = ["taskset", "--cpu-list", "0"]


# Workers: each runs in a process of its own and prints one JSON value


def load(name, **fields):
    """An algorithm's module and its configuration, with epochs long enough to be timed; threads as the runner's."""
    from common import devices

    module = importlib.import_module(f"algorithms.{name}")
    num_seeds = fields.pop("num_seeds", 1)
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    epochs = {"steps_per_epoch": 2000, "total_steps": 2_001_000}
    if name == "svg":
        fields = {"model": "learned", "num_rollouts": 64} | fields
        epochs = {"iterations_per_epoch": 200, "num_iterations": 200_000}
    config = module.Config(**epochs | fields)
    devices.set_up_backend(num_seeds, devices.largest_product(config))
    return module, config


def timed_rates(calls, work, repeats=REPEATS):
    """Median units of work per second of each call, taking turns."""
    seconds = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, spent in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    return [work / statistics.median(spent[1:]) for spent in seconds]  # the first round warms up


def prepare(module, config, num_seeds=1):
    """A call that advances all seeds by one epoch, through the programs of the runner."""
    from common import run

    programs = run.compile_programs(config, module.init, module.epoch, num_seeds)
    slots = run.place(programs, [run.Run(config, seed, Path()) for seed in range(num_seeds)])
    states = run.start(programs, slots)
    return lambda: run.advance(programs, slots, states)


def fixed_work(module, config, state):
    """`(arguments of learn after its first three, updates it makes of them)`: one fixed batch, or a period of them."""
    from jax import random

    action_dim = len(module.make_env(config)[2])
    period = getattr(config, "policy_delay", getattr(config, "target_period", None))
    shape = (config.batch_size,) if period is None else (period, config.batch_size)
    batches = module.buffer_sample(state.buffer, random.key(1), shape, action_dim)
    if hasattr(config, "target_period"):
        return (batches,), period
    noise_shape = (*shape, action_dim) if period else (2, *shape, action_dim)
    return (batches, random.normal(random.key(2), noise_shape)), period or 1


def worker_floor(name, fields):
    """[updates/s of whole epochs, updates/s of the same updates on one fixed batch]."""
    import jax
    import jax.numpy as jnp

    from common import devices

    module, config = load(name, **fields)
    epoch = prepare(module, config)
    state = jax.jit(module.init)(config, jax.random.key(0))
    arguments, period = fixed_work(module, config, state)

    def updates(carry):
        step = lambda carry, _: (module.learn(config, *carry, *arguments)[:2], None)
        return jax.lax.scan(step, carry, length=config.steps_per_epoch // period)[0]

    carry = jax.tree.map(jnp.copy, (state.params, state.opt_state))
    updates = jax.jit(updates, compiler_options=devices.cpu_compiler_options())
    return timed_rates([epoch, lambda: jax.block_until_ready(updates(carry))], config.steps_per_epoch)


def worker_svg_floor(fields):
    """The same of SVG with a learned model: an update is one of the policy, with those of the model before it."""
    import jax
    import jax.numpy as jnp

    from common import devices

    module, config = load("svg", **fields)
    epoch = prepare(module, config)
    state = jax.jit(module.init)(config, jax.random.key(0))
    shape = config.model_steps, config.batch_size
    batches = module.buffer_sample(state.buffer, jax.random.key(1), shape, len(module.make_env(config)[2]))
    starts, noises = module.draw(config, state.params.model, state.buffer, jax.random.key(2))

    def update(carry, _):
        fit = lambda carry, batch: (module.update_model(config, *carry, batch)[:2], None)
        carry = jax.lax.scan(fit, carry, batches)[0]
        return module.update_actor(config, *carry, starts, noises)[:2], None

    updates = lambda carry: jax.lax.scan(update, carry, length=config.iterations_per_epoch)[0]
    carry = jax.tree.map(jnp.copy, (state.params, state.opt_state))
    updates = jax.jit(updates, compiler_options=devices.cpu_compiler_options())
    return timed_rates([epoch, lambda: jax.block_until_ready(updates(carry))], config.iterations_per_epoch)


def worker_buffer(name, num_seeds):
    """[updates/s with a buffer of 10,000, with one of 1,000,000]."""
    loaded = [load(name, buffer_size=size, num_seeds=num_seeds) for size in (10_000, 1_000_000)]
    work = 200 if name == "svg" else 2000
    return timed_rates([prepare(*pair, num_seeds) for pair in loaded], work * num_seeds)


def worker_rate(name, fields, num_seeds=1):
    """Updates/s of `num_seeds` seeds."""
    module, config = load(name, **fields, num_seeds=num_seeds)
    return timed_rates([prepare(module, config, num_seeds)], config.steps_per_epoch * num_seeds, 3)[0]


def worker_memory(buffer_size, num_seeds):
    """[peak resident bytes of a run of TD3 with a checkpoint, bytes of its buffers]."""
    import jax

    from common import checkpoint, run

    module, config = load("td3", buffer_size=buffer_size, num_seeds=num_seeds)
    programs = run.compile_programs(config, module.init, module.epoch, num_seeds)
    slots = run.place(programs, [run.Run(config, seed, Path()) for seed in range(num_seeds)])
    states, _ = run.advance(programs, slots, run.start(programs, slots))
    with tempfile.TemporaryDirectory() as folder:
        saved, position = checkpoint.open_folder(Path(folder)), checkpoint.Position(0, num_seeds, 1)
        checkpoint.save(saved, 1, position, programs, slots, states)
        states, _ = run.advance(programs, slots, states)
    buffers = sum(x.nbytes for state in states for x in jax.tree.leaves(state.buffer))
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, buffers]


# The table


def work(name, *args, prefix=()):
    """Run a worker in a fresh process and return what it prints."""
    command = [*prefix, sys.executable, __file__, "--worker", name, json.dumps(args)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def command_seconds(cache, folder):
    """Wall seconds of the README's command, everything included."""
    start = time.perf_counter()
    command = [sys.executable, ROOT / "algorithms" / "td3.py", "--seed", "0"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, env=environment)
    return time.perf_counter() - start


def rejax_rate(python, name, hidden, buffer_size, steps):
    """Updates/s of rejax's algorithm (see `results/rejax_rate.py`)."""
    command = [python, ROOT / "results" / "rejax_rate.py", name.upper(), steps, 1, buffer_size, hidden]
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[2])


def measure(rejax, rounds):
    """Yield the rows `(algorithm, what, value, comparison)` of the table."""
    for name in ALGORITHMS:
        for hidden in (64, 256):
            sizes = {"hidden_sizes": [hidden, hidden]}
            if name == "svg":
                whole, floor = work("svg_floor", sizes)
            else:
                whole, floor = work("floor", name, sizes | {"steps_per_epoch": 1000})
            text = f"{whole / floor:.2f} of the update-only floor, {floor:,.0f}"
            yield name, f"one seed, {hidden} x {hidden}", f"{whole:,.0f} updates/s", text
        for num_seeds in (1, 8):
            small, large = work("buffer", name, num_seeds)
            text = f"{large / small:.2f} of that with a buffer of 10,000, {small:,.0f}"
            what = f"{'one seed' if num_seeds == 1 else f'{num_seeds} seeds'}, buffer of 1,000,000"
            yield name, what, f"{large:,.0f} updates/s", text
    pairs = [(work("rate", "td3", {}, 8), work("rate", "td3", {}, 1, prefix=SINGLE_CORE)) for _ in range(rounds)]
    eight, one = (statistics.median(column) for column in zip(*pairs, strict=True))
    text = f"{eight / one:.2f} x one seed on one core, {one:,.0f}"
    yield "td3", f"8 seeds on {os.cpu_count()} cores", f"{eight:,.0f} updates/s", text
    beside = [("td3", 64, 50_000, 6000), ("td3", 64, 1_000_000, 2000), ("td3", 256, 50_000, 3000)]
    beside += [("sac", 64, 50_000, 6000), ("sac", 256, 50_000, 3000)]
    for name, hidden, buffer_size, steps in beside if rejax else ():
        fields = {"hidden_sizes": [hidden, hidden], "buffer_size": buffer_size}
        rates = [], [], []
        for _ in range(rounds):
            rates[0].append(work("rate", name, fields))
            rates[1].append(work("rate", name, fields | {"num_envs": 1}))
            rates[2].append(rejax_rate(rejax, name, hidden, buffer_size, steps))
        ours, one_env, theirs = map(statistics.median, rates)
        text = f"{ours / theirs:.1f} x rejax 0.1.3, {theirs:,.0f} ({one_env / theirs:.1f} x with num_envs 1)"
        yield name, f"one seed, {hidden} x {hidden}, buffer of {buffer_size:,}", f"{ours:,.0f} updates/s", text
    peak, buffers = work("memory", 1_000_000, 8)
    text = f"{(peak - buffers) / 2**30:.2f} GiB more than the buffers, {buffers / 2**30:.2f} GiB"
    yield "td3", "peak memory, 8 seeds, buffers of 1,000,000", f"{peak / 2**30:.2f} GiB", text
    with tempfile.TemporaryDirectory() as folder:
        first, *later = (command_seconds(f"{folder}/cache", folder) for _ in range(4))
    text = f"{statistics.median(later):.1f} s from the second time on"
    yield "td3", "`python algorithms/td3.py --seed 0`", f"{first:.1f} s the first time", text


def machine():
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "gymnax", "numpy"))
    return f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, {versions}"


def main():
    """Parse the command line; measure; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rejax", help="Python interpreter of an environment with rejax")
    parser.add_argument("--rounds", type=int, default=3, help="turns of processes that are compared, 3 by default")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, args = arguments.worker
        print(json.dumps(globals()[f"worker_{name}"](*json.loads(args))))
        return
    options = "--rejax ENV/bin/python " if arguments.rejax else ""
    lines = [
        "Pendulum-v1, the default configurations but for what is named; one update for each environment step. svg: a",
        "learned model: one update of the policy, from 64 rollouts, with 8 of the model, for 20 environment steps.",
        f"`python results/benchmark.py {options}--rounds {arguments.rounds}`",
        f"on {machine()}.",
        "",
        "| algorithm | what | measured | beside |",
        "|---|---|---|---|",
    ]
    for row in measure(arguments.rejax, arguments.rounds):
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    (ROOT / "results" / "benchmark.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

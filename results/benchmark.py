"""Measure speed and memory of TD3 on this machine and write the table `results/benchmark.md`.

    python results/benchmark.py                          all but the comparison with a peer
    python results/benchmark.py --rejax ENV/bin/python   also rejax 0.1.3, installed with gymnax 0.0.9 in an environment

Each figure is the median of several measurements; those that are compared are measured by turns. Close other programs.
"""

import argparse
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
SINGLE_CORE = ["taskset", "--cpu-list", "0"]


# Workers: each runs in a process of its own and prints one JSON value


def make_config(**fields):
    """TD3's configuration with epochs long enough to be timed."""
    from algorithms import td3

    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return td3.Config(**{"steps_per_epoch": 2000, "total_steps": 2_001_000} | fields)


def set_up_backend(config, num_seeds=1):
    """Threads and devices as the runner has them."""
    from common import run

    run.set_up_backend(num_seeds, run.largest_product(config))


def timed_rates(calls, work, repeats=REPEATS):
    """Median units of work per second of each call, taking turns."""
    seconds = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, spent in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    return [work / statistics.median(spent[1:]) for spent in seconds]  # the first round warms up


def prepare(config, num_seeds):
    """A call that advances all seeds by one epoch, through the programs of the runner."""
    from algorithms import td3
    from common import run

    programs = run.compile_programs(config, td3.init, td3.epoch, num_seeds)
    waves = run.start(config, programs, list(range(num_seeds)))
    return lambda: run.advance(config, programs, waves)


def worker_floor(fields):
    """[updates/s of whole epochs, updates/s of the same updates on one fixed batch]."""
    import jax
    import jax.numpy as jnp

    from algorithms import td3
    from common import run

    config = make_config(**fields)
    set_up_backend(config)
    epoch = prepare(config, 1)
    state = jax.jit(td3.init)(config, jax.random.key(0))
    action_dim = state.params.actor[-1][1].shape[-1]
    shape = (config.policy_delay, config.batch_size)
    batches = td3.buffer_sample(state.buffer, jax.random.key(1), shape, action_dim)
    noise = jax.random.normal(jax.random.key(2), (*shape, action_dim))

    def updates(carry):
        step = lambda carry, _: (td3.learn(config, *carry, batches, noise)[:2], None)
        return jax.lax.scan(step, carry, length=config.steps_per_epoch // config.policy_delay)[0]

    carry = jax.tree.map(jnp.copy, (state.params, state.opt_state))
    updates = jax.jit(updates, compiler_options=run.cpu_compiler_options())
    return timed_rates([epoch, lambda: jax.block_until_ready(updates(carry))], config.steps_per_epoch)


def worker_buffer(num_seeds):
    """[updates/s with a buffer of 10,000, with one of 1,000,000]."""
    configs = [make_config(buffer_size=size) for size in (10_000, 1_000_000)]
    set_up_backend(configs[0], num_seeds)
    epochs = [prepare(config, num_seeds) for config in configs]
    return timed_rates(epochs, 2000 * num_seeds)


def worker_rate(fields, num_seeds=1):
    """Updates/s of `num_seeds` seeds."""
    config = make_config(**fields)
    set_up_backend(config, num_seeds)
    return timed_rates([prepare(config, num_seeds)], config.steps_per_epoch * num_seeds, 3)[0]


def worker_memory(buffer_size, num_seeds):
    """[peak resident bytes of a run with a checkpoint, bytes of its buffers]."""
    import jax

    from algorithms import td3
    from common import checkpoint, run

    config = make_config(buffer_size=buffer_size)
    set_up_backend(config, num_seeds)
    programs = run.compile_programs(config, td3.init, td3.epoch, num_seeds)
    waves = run.start(config, programs, list(range(num_seeds)))
    rows = {seed: [{"step": 0}] for seed in range(num_seeds)}
    with tempfile.TemporaryDirectory() as folder:
        waves, *_ = run.advance(config, programs, waves)
        checkpoint.save(checkpoint.open_folder(Path(folder), [*rows]), 1, waves, rows)
        run.advance(config, programs, waves)
    buffers = sum(x.nbytes for wave in waves for x in jax.tree.leaves(wave.buffer))
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


def rejax_rate(python, hidden, buffer_size, steps):
    """Updates/s of rejax's TD3 (see `results/rejax_rate.py`)."""
    command = [python, ROOT / "results" / "rejax_rate.py", "TD3", steps, 1, buffer_size, hidden]
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[2])


def measure(rejax, rounds):
    """Yield the rows `(what, value, comparison)` of the table."""
    for hidden in (64, 256):
        whole, floor = work("floor", {"hidden_sizes": [hidden, hidden], "steps_per_epoch": 1000})
        text = f"{whole / floor:.2f} of the update-only floor, {floor:,.0f}"
        yield f"one seed, {hidden} x {hidden}", f"{whole:,.0f} updates/s", text
    for num_seeds in (1, 8):
        small, large = work("buffer", num_seeds)
        text = f"{large / small:.2f} of that with a buffer of 10,000, {small:,.0f}"
        yield (
            f"{'one seed' if num_seeds == 1 else f'{num_seeds} seeds'}, buffer of 1,000,000",
            f"{large:,.0f} updates/s",
            text,
        )
    pairs = [(work("rate", {}, 8), work("rate", {}, 1, prefix=SINGLE_CORE)) for _ in range(rounds)]
    eight, one = (statistics.median(column) for column in zip(*pairs, strict=True))
    text = f"{eight / one:.2f} x one seed on one core, {one:,.0f}"
    yield f"8 seeds on {os.cpu_count()} cores", f"{eight:,.0f} updates/s", text
    if rejax:
        for hidden, buffer_size, steps in ((64, 50_000, 6000), (64, 1_000_000, 2000), (256, 50_000, 3000)):
            fields = {"hidden_sizes": [hidden, hidden], "buffer_size": buffer_size}
            rates = [], [], []
            for _ in range(rounds):
                rates[0].append(work("rate", fields))
                rates[1].append(work("rate", fields | {"num_envs": 1}))
                rates[2].append(rejax_rate(rejax, hidden, buffer_size, steps))
            ours, one_env, theirs = map(statistics.median, rates)
            text = f"{ours / theirs:.1f} x rejax 0.1.3, {theirs:,.0f} ({one_env / theirs:.1f} x with num_envs 1)"
            yield f"one seed, {hidden} x {hidden}, buffer of {buffer_size:,}", f"{ours:,.0f} updates/s", text
    peak, buffers = work("memory", 1_000_000, 8)
    text = f"{(peak - buffers) / 2**30:.2f} GiB more than the buffers, {buffers / 2**30:.2f} GiB"
    yield "peak memory, 8 seeds, buffers of 1,000,000", f"{peak / 2**30:.2f} GiB", text
    with tempfile.TemporaryDirectory() as folder:
        first, *later = (command_seconds(f"{folder}/cache", folder) for _ in range(4))
    text = f"{statistics.median(later):.1f} s from the second time on"
    yield "`python algorithms/td3.py --seed 0`", f"{first:.1f} s the first time", text


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
        "TD3 on Pendulum-v1, the default configuration but for what is named; one update for each environment step.",
        f"`python results/benchmark.py {options}--rounds {arguments.rounds}`",
        f"on {machine()}.",
        "",
        "| what | measured | beside |",
        "|---|---|---|",
    ]
    for row in measure(arguments.rejax, arguments.rounds):
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    (ROOT / "results" / "benchmark.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

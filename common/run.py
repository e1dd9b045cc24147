"""Runner: trains the seeds of one command on all local devices, shows progress, saves, resumes.

`init` and `epoch` are compiled once each, with the state donated, and placed by `jax.shard_map` over a mesh axis
`seed`. A call of the compiled program advances one wave of seeds by one epoch: on a CPU one seed on each device (a
device a core), wave after wave, so that the program, and with it every bit of a seed, is the same whatever the number
of seeds; on a GPU all seeds in one wave, those of a device vmapped.

Memory: the replay buffers take `num_seeds * buffer_size * 4 * (2 * obs_dim + action_dim + 2)` bytes, updated in place.
Everything else, the interpreter included, stays under 1 GiB, but while Orbax writes a checkpoint it holds one copy of
the buffers more.
"""

import contextlib
import dataclasses
import inspect
import itertools
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from jax.extend.backend import clear_backends
from jax.sharding import PartitionSpec

from common import checkpoint, cli, plot, record

CHECKPOINT_SHARE = 0.05  # of the running time, at most, goes into checkpoints
LARGE_PRODUCT = 2_500_000  # multiply-adds; XLA:CPU shares a matrix product of more than about these among threads


def main(config_class, init, epoch):
    """Command line of an algorithm file: exit code 0; 1 if a seed diverged; 2 for a mistake; 130 when interrupted."""
    script = inspect.getsourcefile(init)
    config, options = cli.parse_run(config_class, Path(sys.argv[0]).name)
    set_up_backend(options.num_seeds, largest_product(config))
    if getattr(config, "base_points", "") and not Path(config.base_points).exists():
        write_base_points(config, init, options.seed)
    cli.check_shapes(config, init, options.num_seeds)
    group = record.group_folder(options.out, Path(script).stem, config.env, options.name)
    seeds = list(range(options.seed, options.seed + options.num_seeds))
    claim(group, script, config, seeds, options.resume)
    try:
        raise SystemExit(run(config, init, epoch, seeds, group, options))
    except jax.errors.JaxRuntimeError as error:
        late = re.search(r"TimeoutError: (.*)", str(error))  # of a solver that the program calls
        if not late:
            raise
        cli.fail(f"--maximizer {config.maximizer}: {late[1]}")


def set_up_backend(num_seeds=1, largest_product=0):
    """A CPU device for each core or seed, and the compilation cache; an environment that says otherwise wins.

    `largest_product` counts the multiply-adds of the largest matrix product of the program.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = os.environ.get("XLA_FLAGS", "") + " ".join(os.environ)
    if "NPROC" not in os.environ:
        # XLA keeps NPROC threads, or one for each device if they are more. Those that have no seed of their own take
        # small operations from those that have, and passing them on costs up to a third of the speed. Large products
        # gain from threads, but one thread sums in another order than several do: the choice between one and several
        # must not depend on the number of seeds.
        os.environ["NPROC"] = str(max(2, cores)) if largest_product > LARGE_PRODUCT else "1"
        clear_backends()  # importing gymnax makes arrays, and with them a backend
    if "xla_force_host_platform_device_count" not in given and "JAX_NUM_CPU_DEVICES" not in given:
        clear_backends()
        jax.config.update("jax_num_cpu_devices", min(cores, num_seeds))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amortax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def largest_product(config):
    """Multiply-adds of a batch, or of what the policy learns from at once, between two hidden layers, at most."""
    sizes = config.hidden_sizes
    rows = max(config.batch_size, config.num_envs * getattr(config, "num_steps", 1), getattr(config, "num_rollouts", 1))
    return rows * max([n * m for n, m in itertools.pairwise(sizes)], default=0)


def write_base_points(config, init, seed):
    """Collect base points as `seed` would, and write them to `config.base_points` for all seeds and algorithms."""
    path = Path(config.base_points)
    if path.suffix != ".npz":
        cli.fail(f"--base-points {path}: must be a file that ends in .npz")
    collecting = dataclasses.replace(config, base_points="")
    cli.check_shapes(collecting, init, 1)
    base_points = jax.jit(init)(collecting, jax.random.key(seed)).base_points
    try:
        record.write_arrays(path, base_points._asdict())
    except OSError as error:
        cli.fail(f"--base-points {path}: cannot write there: {error}")
    print(f"{path}: {len(base_points.reward):,} base points of seed {seed}")


def claim(group, script, config, seeds, resume):
    """Write each seed's `config.json`; fail with nothing written where there is another run, or none to resume."""
    for path in group.glob("checkpoint_*_*"):
        first, last = map(int, path.name.split("_")[1:])
        if first <= seeds[-1] and seeds[0] <= last and not (resume and [first, last] == [seeds[0], seeds[-1]]):
            again = f"--seed {first} --num-seeds {last - first + 1} --resume"
            cli.fail(f"--name {group.name}: {group} holds an unfinished run; {again} goes on with it")
    descriptions = {seed: record.describe(script, config, seed) for seed in seeds}
    for seed, description in descriptions.items():
        folder = record.seed_folder(group, seed)
        if resume and not (folder / "config.json").exists():
            cli.fail(f"--resume: nothing to resume in {folder}")
        if folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
            changes = record.differences(record.read_config(folder), description)
            if changes and resume:
                cli.fail(f"--resume: {folder} was run differently: {'; '.join(changes)}")
            if changes:
                cli.fail(f"--name {group.name}: {folder} holds a different run ({'; '.join(changes)}); choose another")
    try:
        for seed, description in descriptions.items():
            record.remove_leftovers(record.seed_folder(group, seed))
            record.write_config(record.seed_folder(group, seed), description)
    except OSError as error:
        cli.fail(f"--out {group.parents[2]}: cannot write there: {error}")


class Work(NamedTuple):
    """What a run counts: it starts at `start`, an epoch adds `per_epoch`, and it ends at `total`."""

    unit: str
    start: int
    per_epoch: int
    total: int


def work(config):
    """Algorithms with a number of iterations count these, all others environment steps."""
    if hasattr(config, "num_iterations"):
        return Work("iterations", 0, config.iterations_per_epoch, config.num_iterations)
    return Work("steps", getattr(config, "learning_starts", 0), config.steps_per_epoch, config.total_steps)


class Programs(NamedTuple):
    """What was compiled, and for how many seeds at a time."""

    init: Callable
    epoch: Callable
    wave_size: int
    sharding: jax.sharding.Sharding


def compile_programs(config, init, epoch, num_seeds, per_device=None):
    """Compile `init` and `epoch`; both take and give a leading axis `[wave_size]` of seeds.

    `per_device` seeds of a wave share a device: by default one on a CPU, on a GPU as many as it takes for one wave.
    `epoch` also gives `finite [wave_size]`: whether every learned parameter is.
    """
    devices = jax.local_devices()
    if per_device is None:
        per_device = 1 if devices[0].platform == "cpu" else math.ceil(num_seeds / len(devices))
    devices = devices[: math.ceil(num_seeds / per_device)]
    mesh = jax.make_mesh((len(devices),), ("seed",), (jax.sharding.AxisType.Auto,), devices=devices)
    compiler_options = cpu_compiler_options() if devices[0].platform == "cpu" else None
    over_seeds = PartitionSpec("seed")

    def place(function):
        def on_device(config, x):
            if per_device > 1:
                return jax.vmap(function, in_axes=(None, 0))(config, x)
            # reshapes, not slices: the donated buffer must not be copied
            one = function(config, jax.tree.map(lambda a: a.reshape(a.shape[1:]), x))
            return jax.tree.map(lambda a: a.reshape(1, *a.shape), one)

        specs = {"in_specs": (PartitionSpec(), over_seeds), "out_specs": over_seeds}
        on_devices = jax.shard_map(on_device, mesh=mesh, check_vma=False, **specs)
        return jax.jit(on_devices, donate_argnums=1, compiler_options=compiler_options)

    def checked_epoch(config, state):
        state, metrics = epoch(config, state)
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state.params)]).all()
        return state, metrics, finite

    sharding = jax.sharding.NamedSharding(mesh, over_seeds)
    wave_size = per_device * len(devices)
    keys = jax.ShapeDtypeStruct((wave_size,), jax.random.key(0).dtype, sharding=sharding)
    init = place(init).lower(config, keys).compile()
    states = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), init.out_info)
    return Programs(init, place(checked_epoch).lower(config, states).compile(), wave_size, sharding)


def cpu_compiler_options():
    """XLA's options on a CPU: Eigen for all matrix products, a tenth faster at 256 x 256 than YNNPACK for some."""
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # a version of XLA that does not know it
        return None
    return options


def run(config, init, epoch, seeds, group, options):
    """Train, or go on training, `seeds`; write all results; return the exit code."""
    saved = checkpoint.open_folder(group, seeds)
    if options.resume and saved.latest_step() is None and is_complete(group, seeds, config):
        print("this run is complete; nothing to resume")
        return finish(config, group, seeds, options)

    interrupted, (unit, done, per_epoch, total) = catch_interrupts(), work(config)
    with show_progress(total * len(seeds), unit) as progress:
        programs = compile_programs(config, init, epoch, len(seeds))
        if options.resume and saved.latest_step() is not None:
            rows, waves = checkpoint.restore(saved, programs, seeds)
            done = saved.latest_step()
        else:
            rows, waves = {seed: [] for seed in seeds}, start(config, programs, seeds)
        progress(done * len(seeds), math.nan)
        last_save = time.monotonic()
        save_seconds = 0.0
        while done < total and not interrupted.is_set():
            waves, metrics, finite = advance(config, programs, waves)
            for i, seed in enumerate(seeds):
                row = record.metrics_row(jax.tree.map(lambda x, i=i: x[i], metrics), finite[i])
                rows[seed].append(row)
                record.write_metrics(record.seed_folder(group, seed), rows[seed])
            done += per_epoch
            progress(done * len(seeds), np.mean([rows[seed][-1]["eval_return_mean"] for seed in seeds]))
            if time.monotonic() - last_save >= save_seconds / CHECKPOINT_SHARE:
                last_save = time.monotonic()
                save(saved, done, waves, rows, group)
                save_seconds = time.monotonic() - last_save
        save(saved, done, waves, rows, group)
    if done < total:
        print(f"interrupted and saved after {done:,} {unit}; the same command with --resume goes on from there")
        return 130
    code = finish(config, group, seeds, options)
    checkpoint.delete(saved)
    return code


def start(config, programs, seeds):
    """The states of all seeds after `init`, as waves."""
    waves = checkpoint.in_waves(seeds, programs.wave_size)
    keys = [jnp.stack([jax.random.key(seed) for seed in wave]) for wave in waves]
    return [programs.init(config, jax.device_put(wave, programs.sharding)) for wave in keys]


def advance(config, programs, waves):
    """One epoch of every seed: `(waves, metrics, finite)`, the latter on the host with a leading axis of seeds."""
    outs = []
    for i, state in enumerate(waves):
        waves[i], *out = programs.epoch(config, state)  # returns at once: the devices work through the waves
        outs.append(out)
    return waves, *jax.tree.map(lambda *x: np.concatenate(x), *(wait(out) for out in outs))


def wait(arrays):
    """Fetch arrays to the host; sleeping between looks lets a signal be heard while the devices work."""
    while not all(x.is_ready() for x in jax.tree.leaves(arrays)):
        time.sleep(0.005)
    return jax.device_get(arrays)


def catch_interrupts():
    """An event that the first SIGINT or SIGTERM sets; a second one ends the process at once."""
    asked = threading.Event()

    def hear(number, frame):
        print("\nfinishing this epoch, then saving; once more to stop at once", file=sys.stderr)
        signal.signal(number, signal.SIG_DFL)
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hear)
    return asked


@contextlib.contextmanager
def show_progress(total, unit):
    """Yield `report(done by all seeds, mean_return)`: a bar on a terminal, a line an epoch elsewhere."""
    console = rich.console.Console(highlight=False)
    columns = (rich.progress.BarColumn(), rich.progress.TextColumn("{task.description}"))
    bar = rich.progress.Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task("compiling", total=total)
    first = None  # amount and time of the first report: a resumed run starts in the middle

    def report(done, mean_return):
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = done, now
            text = f"{done:,} of {total:,} {unit}"
        else:
            rate = (done - first[0]) / (now - first[1])
            left = f"{(total - done) / rate:.0f} s left"
            speed = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
            text = f"{done:,} of {total:,} {unit}  return {mean_return:.1f}  {speed} {unit}/s  {left}"
        bar.update(task, completed=done, description=text)
        if not console.is_terminal:
            print(text, flush=True)

    if not console.is_terminal:
        print("compiling", flush=True)
    with bar:
        yield report


def save(saved, done, waves, rows, group):
    """Write a checkpoint and, for those who look at a run before its end, the policies."""
    states = checkpoint.save(saved, done, waves, rows)
    for seed, state in states.items():
        record.write_policy(record.seed_folder(group, seed), state.params)


def is_complete(group, seeds, config):
    """Whether every seed has its last row and its policy."""
    folders = [record.seed_folder(group, seed) for seed in seeds]
    if not all((folder / name).exists() for folder in folders for name in ("metrics.csv", "policy.npz")):
        return False
    _, start, per_epoch, total = work(config)
    return all(start + per_epoch * len(record.read_metrics(folder)["step"]) == total for folder in folders)


def finish(config, group, seeds, options):
    """Draw the curve, print the result, and return the exit code."""
    unit, _, _, total = work(config)
    if not options.no_plot:
        plot.draw(group)
    rows = {seed: record.read_metrics(record.seed_folder(group, seed)) for seed in seeds}
    diverged = [seed for seed in seeds if not rows[seed]["finite"][-1]]
    final = np.array([rows[seed]["eval_return_mean"][-1] for seed in seeds if seed not in diverged])
    if len(final) > 1:
        low, high = plot.interval(final)
        print(
            f"greedy return after {total:,} {unit}: {plot.iqm(final):.1f} (interquartile mean of "
            f"{len(final)} seeds, 95 % interval {low:.1f} to {high:.1f}, worst {final.min():.1f})"
        )
    elif len(final):
        error = rows[seeds[0]]["eval_return_std"][-1] / math.sqrt(config.num_eval_episodes)
        print(
            f"greedy return after {total:,} {unit}: {final[0]:.1f} "
            f"(mean of {config.num_eval_episodes} episodes, standard error {error:.1f})"
        )
    for seed in diverged:
        when = int(record.progress(rows[seed])[rows[seed]["finite"] == 0][0])
        print(f"seed {seed} diverged: parameters are not finite after {when} {unit}", file=sys.stderr)
    print(f"results: {group}")
    return 1 if diverged else 0

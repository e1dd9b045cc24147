"""Runner: trains the runs of one command on all devices, shows progress, saves, resumes.

A run is one seed of one configuration. `init` and `epoch` are compiled with the state donated, as programs of one
device, and called on every device: on a CPU one run at a time on each device (a device a core), on a GPU all its runs,
vmapped. One program over all devices would be another one for XLA than that of one device, and round differently; so
every bit of a run on a CPU is the same whatever the number of runs and devices. Where memory cannot hold all runs, they
are trained in rounds, one after the other.

Each process writes the runs that its devices hold, the first one all that the runs share.

Memory: the replay buffers take `buffer_size * 4 * (2 * obs_dim + action_dim + 2)` bytes for each run, updated in
place. Everything else, the interpreter included, stays under 1 GiB, but while Orbax writes a checkpoint it holds one
copy of the buffers more.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import math
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from common import checkpoint, cli, devices, plot, record, sweep, track

CHECKPOINT_SHARE = 0.05  # of the running time, at most, goes into saving


class Run(NamedTuple):
    """One seed of one configuration, and the folder that it shares with the configuration's other seeds."""

    config: object
    seed: int
    group: Path


def main(config_class, init, epoch):
    """Command line of an algorithm file.

    Its exit code is 0, or 1 if a seed diverged, 2 for a mistake, 3 if another process was lost, 130 if interrupted.
    """
    script = inspect.getsourcefile(init)
    config, options = cli.parse_run(config_class, Path(sys.argv[0]).name)
    track.check(options.track)
    grid = sweep.parse(config, options.sweep)
    cells = sweep.cells(config, grid)
    if options.distributed:
        devices.connect(options)
    devices.set_up_backend(len(cells) * options.num_seeds, devices.largest_product(config))
    if getattr(config, "base_points", "") and not Path(config.base_points).exists():
        write_base_points(config, init, options.seed)
    cli.check_shapes(config, init)
    group = record.group_folder(options.out, Path(script).stem, config.env, options.name)
    seeds = range(options.seed, options.seed + options.num_seeds)
    runs = [Run(cell.config, seed, group.with_name(group.name + cell.suffix)) for cell in cells for seed in seeds]
    home = group.with_name(f"{group.name}-sweep") if grid else group
    claim(home, script, runs, grid, options)
    try:
        raise SystemExit(train(init, epoch, runs, home, grid, options))
    except Exception as error:
        if jax.process_count() > 1:
            devices.leave(error)
        if isinstance(error, track.Failed):
            cli.fail(error)
        late = re.search(r"TimeoutError: (.*)", str(error))  # of a solver that the program calls
        if not late:
            raise
        cli.fail(f"--maximizer {config.maximizer}: {late[1]}")


def write_base_points(config, init, seed):
    """Collect base points as `seed` would, and write them to `config.base_points` for all seeds and algorithms."""
    path = Path(config.base_points)
    if path.suffix != ".npz":
        cli.fail(f"--base-points {path}: must be a file that ends in .npz")
    collecting = dataclasses.replace(config, base_points="")
    cli.check_shapes(collecting, init)
    base_points = jax.jit(init)(collecting, jax.random.key(seed)).base_points
    try:
        record.write_arrays(path, base_points._asdict())
    except OSError as error:
        cli.fail(f"--base-points {path}: cannot write there: {error}")
    print(f"{path}: {len(base_points.reward):,} base points of seed {seed}")


def claim(home, script, runs, grid, options):
    """Write each run's `config.json`; fail with nothing written where there is another run, or none to resume."""
    first, last = runs[0].seed, runs[-1].seed
    for path in home.glob("checkpoint_*_*"):
        start, end = map(int, path.name.split("_")[1:])
        if start <= last and first <= end and not (options.resume and [start, end] == [first, last]):
            again = f"--seed {start} --num-seeds {end - start + 1} --resume"
            cli.fail(f"--name {options.name}: {home} holds an unfinished run; {again} goes on with it")
    descriptions = {folder(run): record.describe(script, run.config, run.seed) for run in runs}
    for path, description in descriptions.items():
        if options.resume and not (path / "config.json").exists():
            cli.fail(f"--resume: nothing to resume in {path}")
        if path.exists() and any(file.name[0] != "." for file in path.iterdir()):
            changes = record.differences(record.read_config(path), description)
            if changes and options.resume:
                cli.fail(f"--resume: {path} was run differently: {'; '.join(changes)}")
            if changes:
                cli.fail(f"--name {options.name}: {path} holds a different run ({'; '.join(changes)}); choose another")
    if grid:
        descriptions[home] = sweep.describe(descriptions[folder(runs[0])], grid, [first, last])
        changes = record.differences(record.read_config(home), descriptions[home]) if home.exists() else []
        if changes:
            cli.fail(f"--name {options.name}: {home} holds a different sweep ({'; '.join(changes)}); choose another")
    devices.synchronize("checked")
    problem = ""
    try:
        if devices.is_first():
            for path in {home, *descriptions}:
                record.remove_leftovers(path)
            for path, description in descriptions.items():
                record.write_config(path, description)
    except OSError as error:
        problem = str(error)
    if any(devices.any_says(problem != "")):
        cli.fail(f"--out {options.out}: cannot write there: {problem or 'process 0 says why'}")


def folder(run):
    """The folder of one run."""
    return record.seed_folder(run.group, run.seed)


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
    """`init` and `epoch`, compiled for each device of this process that is among `devices`, those of all processes.

    Each device advances `per_device` runs at a time.
    """

    init: dict
    epoch: dict
    devices: list
    per_device: int


class Slot(NamedTuple):
    """Runs that a device advances by one call: their places among all runs, and, on the device, what they differ in."""

    device: jax.Device
    wave: int
    places: list
    configs: object
    seeds: jax.Array


def compile_programs(config, init, epoch, num_runs, per_device=None):
    """Compile `init` and `epoch`; both take and give a leading axis `[per_device]` of runs, `config` included.

    `init` takes configurations and seeds, `epoch` configurations and states; `epoch` also gives `finite [per_device]`:
    whether every learned parameter is. By default `per_device` is one on a CPU, on a GPU as many as it takes for one
    slot on each device.
    """
    cpu = jax.default_backend() == "cpu"
    if per_device is None:
        per_device = 1 if cpu else math.ceil(num_runs / jax.device_count())

    def seeded_init(config, seed):
        return init(config, jax.random.key(seed))

    def checked_epoch(config, state):
        state, metrics = epoch(config, state)
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state.params)]).all()
        return state, metrics, finite

    def alone(function):
        # reshapes, not slices: the donated buffer must not be copied
        def of_one(*batched):
            one = function(*jax.tree.map(lambda x: x.reshape(x.shape[1:]), batched))
            return jax.tree.map(lambda x: x.reshape(1, *x.shape), one)

        return of_one

    over_runs = jax.vmap if per_device > 1 else alone
    compiler_options = devices.cpu_compiler_options() if cpu else None
    used = devices.for_slots(math.ceil(num_runs / per_device))
    own = [device for device in used if device.process_index == jax.process_index()]

    def on_device(device, tree):
        sharding = jax.sharding.SingleDeviceSharding(device)
        struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        return jax.tree.map(lambda x: struct((per_device, *x.shape), x.dtype), tree)

    def compile_for_each(function, *shapes):
        jitted = jax.jit(over_runs(function), donate_argnums=1, compiler_options=compiler_options)
        lowered = [jitted.lower(*(on_device(device, x) for x in shapes)) for device in own]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return dict(zip(own, pool.map(lambda x: x.compile(), lowered), strict=True))

    configs = jax.tree.map(lambda x: np.zeros((), leaf_type(x)), config)
    state = jax.eval_shape(init, config, jax.random.key(0))
    compiled = compile_for_each(seeded_init, configs, np.int32(0)), compile_for_each(checked_epoch, configs, state)
    return Programs(*compiled, used, per_device)


def compile_to_fit(config, init, epoch, num_runs, limit):
    """`(programs, round_size)`: no more than `round_size` runs at a time take more than `limit` bytes of a device."""
    programs = compile_programs(config, init, epoch, num_runs)
    state, extra = memory(programs)
    while state + extra > limit and programs.per_device > 1:
        per_device = min(programs.per_device - 1, int(programs.per_device * limit / (state + extra)) or 1)
        programs = compile_programs(config, init, epoch, num_runs, per_device)
        state, extra = memory(programs)
    if state + extra > limit:
        need, have = (state + extra) / 2**30, limit / 2**30
        cli.fail(f"a seed on each device needs {need:.1f} GiB of it, and {have:.1f} GiB are there for it")
    slots = num_runs if limit == math.inf else int((limit - extra) // state)
    return programs, min(num_runs, slots * programs.per_device * len(programs.devices))


def memory(programs):
    """`(state, extra)` bytes on a device: the states of one slot, and what advancing it takes besides."""
    sizes = next(iter(programs.epoch.values())).memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    state = sizes.alias_size_in_bytes
    return state, total - 2 * state


def train(init, epoch, runs, home, grid, options):
    """Train, or go on training, `runs`; write all results; return the exit code."""
    saved = checkpoint.open_folder(home / f"checkpoint_{runs[0].seed}_{runs[-1].seed}")
    unit, start, _, total = work(runs[0].config)
    position = checkpoint.latest(saved) if options.resume else None
    first = position.first if position else 0
    if options.resume and not position:  # between two rounds, or at the very end
        first = next((i for i, run in enumerate(runs) if not is_complete(run)), len(runs))
    if first == len(runs):
        tell("this run is complete; nothing to resume")
        checkpoint.delete(saved)
        return finish(runs, home, grid, options)

    interrupted = catch_interrupts()
    with show_progress(total * len(runs), unit) as progress:
        limit = devices.memory()
        programs, round_size = compile_to_fit(runs[0].config, init, epoch, len(runs) - first, limit)
        devices.synchronize("compiled")
        if round_size < len(runs) - first:
            tell(f"memory holds {round_size:,} of {len(runs) - first:,} runs at a time: they are trained in rounds")
        while first < len(runs):
            position = position or checkpoint.Position(first, min(first + round_size, len(runs)), start)
            with track.tracking(options) as log:
                done = train_round(programs, runs, position, saved, interrupted, progress, log)
            if done < total:
                break
            first, position = position.last, None
    if done < total:
        tell(f"interrupted and saved after {done:,} {unit}; the same command with --resume goes on from there")
        return 130
    devices.synchronize("trained")
    code = finish(runs, home, grid, options)
    checkpoint.delete(saved)
    return code


def tell(line):
    """Print a line, once for all processes."""
    if devices.is_first():
        print(line, flush=True)


def train_round(programs, runs, position, saved, interrupted, progress, log):
    """Train runs `position.first` to `position.last - 1` to their end or an interrupt; return how far each came."""
    before, done, runs = position.first, position.done, runs[position.first : position.last]
    _, begin, per_epoch, total = work(runs[0].config)
    slots = place(programs, runs)
    rows = {i: record.read_rows(folder(runs[i]), (done - begin) // per_epoch) for slot in slots for i in slot.places}
    states = checkpoint.restore(saved, position, programs, slots) if position.at_once else start(programs, slots)

    def save():
        write_runs(runs, slots, states, rows, log)
        checkpoint.save(saved, before * total + done, position._replace(done=done), programs, slots, states)

    progress(before * total + done * len(runs), math.nan)
    last_save, save_seconds = time.monotonic(), 0.0
    stop, _ = devices.any_says(interrupted.is_set(), False)
    while done < total and not stop:
        states, outs = advance(programs, slots, states)
        for slot, (metrics, finite) in zip(slots, outs, strict=True):
            for k, i in enumerate(slot.places):
                rows[i].append(record.metrics_row(jax.tree.map(lambda x, k=k: x[k], metrics), finite[k]))
        done += per_epoch
        returns = [row[-1]["eval_return_mean"] for row in rows.values()]
        progress(before * total + done * len(runs), np.mean(returns or math.nan))
        due = time.monotonic() - last_save >= save_seconds / CHECKPOINT_SHARE
        stop, due = devices.any_says(interrupted.is_set(), due)  # all processes save together
        if due and done < total and not stop:
            last_save = time.monotonic()
            save()
            save_seconds = time.monotonic() - last_save
    save()
    return done


def place(programs, runs):
    """The slots of `runs` that this process's devices hold; the last of all is filled up with copies of one run."""
    slots, size = [], programs.per_device
    for number, first in enumerate(range(0, len(runs), size)):
        wave, i = divmod(number, len(programs.devices))
        device = programs.devices[i]
        if device in programs.epoch:
            places = list(range(len(runs)))[first : first + size]
            chosen = [runs[i] for i in checkpoint.filled(places, size)]
            configs = jax.tree.map(lambda *x: np.array(x, leaf_type(x[0])), *(run.config for run in chosen))
            seeds = np.array([run.seed for run in chosen], np.int32)
            slots.append(Slot(device, wave, places, *jax.device_put((configs, seeds), device)))
    return slots


def leaf_type(x):
    """The type of a hyperparameter on a device."""
    return np.float32 if isinstance(x, float) else jnp.result_type(x)


def start(programs, slots):
    """The states of all slots after `init`."""
    return [programs.init[slot.device](slot.configs, slot.seeds) for slot in slots]


def advance(programs, slots, states):
    """One epoch of every run: `(states, [(metrics, finite)])`, the latter on the host, with a leading axis of runs."""
    outs = []
    for i, slot in enumerate(slots):
        states[i], *out = programs.epoch[slot.device](slot.configs, states[i])  # returns at once, and the device works
        outs.append(out)
    while not all(x.is_ready() for x in jax.tree.leaves(outs)):
        time.sleep(0.005)  # between looks a signal is heard
    return states, jax.device_get(outs)


def write_runs(runs, slots, states, rows, log):
    """Write and track the metrics and, for those who look at a run before its end, write the policies."""
    for slot, state in zip(slots, states, strict=True):
        params = jax.device_get(state.params)
        for k, i in enumerate(slot.places):
            if rows[i]:
                record.write_rows(folder(runs[i]) / "metrics.csv", rows[i])
                log(folder(runs[i]), rows[i])
            record.write_policy(folder(runs[i]), jax.tree.map(lambda x, k=k: x[k], params))


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
    bar = rich.progress.Progress(*columns, console=console, disable=not console.is_terminal or not devices.is_first())
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
        say(text)

    def say(text):
        if not console.is_terminal and devices.is_first():
            print(text, flush=True)

    say("compiling")
    with bar:
        yield report


def is_complete(run):
    """Whether a run has its last row and its policy."""
    _, start, per_epoch, total = work(run.config)
    if not all((folder(run) / name).exists() for name in ("metrics.csv", "policy.npz")):
        return False
    return start + per_epoch * len(record.read_metrics(folder(run))["step"]) == total


def finish(runs, home, grid, options):
    """Draw, print the result, and return the exit code."""
    unit, _, _, total = work(runs[0].config)
    columns = [record.read_metrics(folder(run)) for run in runs]
    finite = np.array([bool(c["finite"][-1]) for c in columns])
    code = 0 if finite.all() else 1
    if not devices.is_first():
        return code
    final = np.array([c["eval_return_mean"][-1] for c in columns])
    if not options.no_plot:
        for group in dict.fromkeys(run.group for run in runs):
            plot.draw(group)
    if grid:
        each = [slice(i, i + options.num_seeds) for i in range(0, len(runs), options.num_seeds)]
        table = sweep.table(grid, [final[i][finite[i]] for i in each], [int((~finite[i]).sum()) for i in each])
        record.write_rows(home / "sweep.csv", table)
        if not options.no_plot:
            sweep.draw(home, grid, table)
        print(f"greedy return after {total:,} {unit}, interquartile mean of {options.num_seeds} seeds:\n")
        print(sweep.text(table), "\n")
    elif finite.sum() > 1:
        low, high = plot.interval(final[finite])
        print(
            f"greedy return after {total:,} {unit}: {plot.iqm(final[finite]):.1f} (interquartile mean of "
            f"{finite.sum()} seeds, 95 % interval {low:.1f} to {high:.1f}, worst {final[finite].min():.1f})"
        )
    elif finite.any():
        episodes = runs[0].config.num_eval_episodes
        error = columns[finite.argmax()]["eval_return_std"][-1] / math.sqrt(episodes)
        print(
            f"greedy return after {total:,} {unit}: {final[finite][0]:.1f} "
            f"(mean of {episodes} episodes, standard error {error:.1f})"
        )
    for run, c in zip(runs, columns, strict=True):
        if not c["finite"][-1]:
            when = int(record.progress(c)[c["finite"] == 0][0])
            where = f" of {run.group.name}" if grid else ""
            print(f"seed {run.seed}{where} diverged: parameters are not finite after {when} {unit}", file=sys.stderr)
    print(f"results: {home}")
    return code

"""Runner: trains the runs of one command on all devices, in rounds; shows progress, saves and resumes.

A run is one seed of one configuration, a group the seeds of a configuration, a round the runs that are trained at once:
devices x runs per device. Memory and checkpoints do not grow with the number of runs.

Each process writes the files of the runs that its devices hold, process 0 those that the runs share.
"""

import inspect
import itertools
import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from amortax.common import (
    base_points,
    checkpoint,
    checks,
    cli,
    devices,
    distributed,
    envs,
    milp,
    plot,
    policy,
    programs,
    progress,
    record,
    sweep,
    track,
)
from amortax.common.checkpoint import Position

CHECKPOINT_SHARE = 0.05  # of the running time, at most, is spent on saving
SAVE_SECONDS = 1.0  # what saving is expected to take before it was measured


def main(config_class, init, epoch, num_epochs):
    """Command line of an algorithm file.

    Its exit code is 0, or 1 if a seed diverged, 2 for a mistake, 3 if another process was lost, 130 if interrupted.
    """
    cli.show_warnings()
    config, options, data = cli.parse_run(config_class, init)
    if options.list_envs:
        return envs.show_all()
    grid = sweep.parse(config, options.sweep)
    try:
        out_folder, runs, points = prepare(config, options, data, grid, init)
        checkpoints = out_folder / f"checkpoint_{runs[0].seed}_{runs[-1].seed}"
        complete = train(init, epoch, num_epochs(config), runs, points, checkpoints, options)
        distributed.synchronize("trained")
    except Exception as error:
        fail_late(error)
    if not complete:
        raise SystemExit(130)
    code = report(runs, out_folder, grid, options)
    checkpoint.delete(checkpoints)
    raise SystemExit(code)


def prepare(config, options, data, grid, init):
    """Set up devices and processes, check everything, then write `config.json`s: `(out_folder, runs, base points)`."""
    track.check(options.track)
    cells = sweep.cells(config, grid)
    if options.distributed:
        distributed.connect(options.coordinator_address, options.num_processes, options.process_id)
    devices.set_up_backend(len(cells) * options.num_seeds, devices.largest_product(config))
    envs.register(config.env)  # which may make arrays
    for changed in [config, *sweep.one_by_one(config, grid)]:
        checks.check_config(changed, init)
    points = base_points.load_and_save(data, options, config, init)
    script = inspect.getsourcefile(init)
    group = record.group_folder(options.out, Path(script).stem, config.env, options.name)
    seeds = range(options.seed, options.seed + options.num_seeds)
    groups = [(cell.config, group.with_name(group.name + cell.suffix)) for cell in cells]
    runs = [record.Run(config, seed, folder) for config, folder in groups for seed in seeds]
    out_folder = group.with_name(f"{group.name}-sweep") if grid else group
    checks.check_folders(out_folder, script, runs, grid, options, data.base_points)
    return out_folder, runs, points


def fail_late(error):
    """End the process for an error that is no mistake in the command."""
    message = str(error) if isinstance(error, (track.Failed, distributed.Lost)) else None
    if isinstance(error, jax.errors.JaxRuntimeError) and milp.failures:  # in a call of the host by the program
        message = f"--maximizer milp: {milp.failures.pop()}"
    if jax.process_count() > 1:
        distributed.abort(error, message)
    if message:
        cli.fail(message)
    raise error


class Training(NamedTuple):
    """What a command trains: its runs, `num_epochs` epochs each, by compiled programs, with a folder of checkpoints."""

    runs: list
    num_epochs: int
    programs: programs.Programs
    checkpoints: Path


def train(init, epoch, num_epochs, runs, points, checkpoints, options):
    """Train the runs in rounds, with --resume from where they were left; whether all have come to their end."""
    position = resume(runs, num_epochs, checkpoints) if options.resume else Position(0, len(runs), 0)
    if position.first == len(runs):
        distributed.print_once("this run is complete; nothing to resume")
        return True
    interrupted = catch_interrupts()
    with progress.show() as show:
        show("compiling")
        num_runs = len(runs) - position.first
        compiled = programs.compile_to_fit(runs[0].config, init, epoch, num_runs, devices.memory(), points)
        training = Training(runs, num_epochs, compiled, checkpoints)
        distributed.synchronize("compiled")
        while position.first < len(runs):
            position = position._replace(last=min(position.last, position.first + compiled.round_size))
            with track.tracking(options.track, options.resume) as log:
                epochs, row = train_round(training, position, interrupted, show, log)
            if epochs < num_epochs:
                break
            position = Position(position.last, len(runs), 0)
    if position.first < len(runs):
        done = f"and saved after {record.amount(row)}" if row else "before the first epoch"
        distributed.print_once(f"interrupted {done}; run the same command with --resume to continue")
    return position.first == len(runs)


def resume(runs, num_epochs, checkpoints):
    """Where to continue: with the round of the checkpoint, or else with the first run that is not complete."""

    def is_complete(run):
        return (run.folder / "policy.npz").exists() and record.num_rows(run.folder) == num_epochs

    saved = checkpoint.latest(checkpoints)
    if saved:
        of_round = runs[saved.first : saved.last]
        # a kill while a later round wrote its files may have left them behind this checkpoint
        usable = list(itertools.takewhile(lambda run: record.num_rows(run.folder) >= saved.epochs, of_round))
        if not all(is_complete(run) for run in usable):
            return saved._replace(last=saved.first + len(usable))
    return Position(next((i for i, run in enumerate(runs) if not is_complete(run)), len(runs)), len(runs), 0)


def train_round(training, position, interrupted, show, log):
    """Train a round from `position` to its end or an interrupt, and save it: `(epochs, last row of its first run)`."""
    runs = training.runs[position.first : position.last]
    batch = programs.place(training.programs, [run.config for run in runs], [run.seed for run in runs])
    rows = {i: record.read_rows(runs[i].folder, position.epochs) for held in batch.run_indices for i in held}
    began = last_save = time.monotonic()
    states, reached, save_seconds = begin(training, position, batch), position, SAVE_SECONDS
    (stop,) = distributed.any_process(interrupted.is_set())
    while reached.epochs < training.num_epochs and not stop:
        states, outs = programs.advance(training.programs, batch, states)
        for i, (metrics, finite) in programs.by_run(batch, outs).items():
            rows[i].append(record.metrics_row(metrics, finite))
        reached = reached._replace(epochs=reached.epochs + 1)
        show(*epoch_line(training, position, reached, rows, time.monotonic() - began))
        due = time.monotonic() - last_save >= save_seconds / CHECKPOINT_SHARE
        stop, due = distributed.any_process(interrupted.is_set(), due)  # all processes save together
        if due and not stop and reached.epochs < training.num_epochs:
            last_save = time.monotonic()
            save(training, reached, batch, states, rows, log)
            save_seconds = time.monotonic() - last_save
    if reached != position:
        save(training, reached, batch, states, rows, log)
    return reached.epochs, rows[0][-1] if rows.get(0) else None


def begin(training, position, batch):
    """The states of a round at `position`, from its checkpoint or from `init`."""
    if not position.epochs:
        return programs.start(training.programs, batch)
    arrays = checkpoint.restore(training.checkpoints, programs.num_arrays(training.programs))
    return programs.from_arrays(training.programs, arrays, position.last - position.first)


def save(training, reached, batch, states, rows, log):
    """Write and track the metrics, write the policies, and, unless the round is at its end, a checkpoint."""
    params = programs.by_run(batch, jax.device_get([state.params for state in states]))
    for i, run_rows in rows.items():
        folder = training.runs[reached.first + i].folder
        record.write_rows(folder / "metrics.csv", run_rows)
        log(folder, run_rows)
        policy.save(folder, params[i])
    if reached.epochs < training.num_epochs:
        with distributed.collective():
            checkpoint.save(training.checkpoints, reached, programs.to_arrays(training.programs, states))


def epoch_line(training, position, reached, rows, seconds):
    """Text on the last epoch, and how many epochs of all rounds are done, of how many; `position` was `seconds` ago."""
    size, num_epochs = training.programs.round_size, training.num_epochs
    before, after = math.ceil(reached.first / size), math.ceil((len(training.runs) - reached.last) / size)
    rounds = before + 1 + after
    done, total = before * num_epochs + reached.epochs, rounds * num_epochs
    if not rows:  # this process holds copies only, and prints nothing
        return "", done, total
    round_text = f"round {before + 1:,} of {rounds:,}, " if rounds > 1 else ""
    num_runs, new_epochs = reached.last - reached.first, reached.epochs - position.epochs
    line = progress.line(rows, num_runs, new_epochs, seconds, total - done)
    return f"{round_text}epoch {reached.epochs:,} of {num_epochs:,}  {line}", done, total


def catch_interrupts():
    """An event that the first SIGINT or SIGTERM sets; a second one ends the process at once."""
    interrupted = threading.Event()

    def on_signal(number, frame):
        print("\nfinishing this epoch, then saving; interrupt again to stop at once", file=sys.stderr)
        signal.signal(number, signal.SIG_DFL)
        interrupted.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return interrupted


def report(runs, out_folder, grid, options):
    """Draw the curves, print the result, and return the exit code."""
    columns = [record.read_metrics(run.folder) for run in runs]
    finite = np.array([bool(c["finite"][-1]) for c in columns])
    final = np.array([c["eval_return_mean"][-1] for c in columns])
    if not distributed.is_first():
        return 0 if finite.all() else 1
    if not options.no_plot:
        for group in dict.fromkeys(run.group for run in runs):
            plot.draw(group)
    after = f"greedy return after {record.amount({name: x[-1] for name, x in columns[0].items()})}"
    if grid:
        table = sweep.table(grid, final.reshape(-1, options.num_seeds), finite.reshape(-1, options.num_seeds))
        sweep.write(out_folder, grid, table, with_plot=not options.no_plot)
        print(f"{after}, interquartile mean of {options.num_seeds} seeds:\n\n{sweep.text(table)}\n")
    elif finite.sum() > 1:
        print(f"{after}: {plot.summary(final[finite])}")
    elif finite.any():
        deviation = columns[finite.argmax()]["eval_return_std"][-1]
        print(f"{after}: {final[finite][0]:.1f} (mean over episodes, standard deviation {deviation:.1f})")
    for run, c in zip(runs, columns, strict=True):
        if not c["finite"][-1]:
            at = record.amount({name: x[c["finite"] == 0][0] for name, x in c.items()})
            where = f" of {run.group.name}" if grid else ""
            print(f"seed {run.seed}{where} diverged: parameters are not finite after {at}", file=sys.stderr)
    print(f"results: {out_folder}")
    return 0 if finite.all() else 1

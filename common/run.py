"""Runner: trains the runs of one command on all devices, in rounds; shows progress, saves and resumes.

A run is one seed of one configuration, a group the seeds of a configuration, a round the runs that are trained at once:
devices x runs per device. Memory and checkpoints do not grow with the number of runs.

Each process writes the files of the runs that its devices hold, process 0 those that the runs share.
"""

import inspect
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
    divergence,
    envs,
    evaluation,
    milp,
    policy,
    programs,
    progress,
    record,
    report,
    resume,
    sweep,
    track,
)
from amortax.common.checkpoint import Position

CHECKPOINT_SHARE = 0.05  # of the running time, at most, is spent on saving
SAVE_SECONDS = 1.0  # what saving is expected to take before it was measured


def main(config_class, init, epoch, num_epochs):
    """Command line of an algorithm file.

    Its exit code is 0, or 1 if a seed diverged or a file cannot be written, 2 for a mistake, 3 if another process was
    lost, 130 if interrupted.
    """
    cli.show_warnings()
    config, options, data = cli.parse_run(config_class, init)
    if options.list_envs:
        with cli.printing():
            return envs.show_all()
    grid = sweep.parse(config, options.sweep)
    began = False
    try:
        out_folder, runs, shared = prepare(config, options, data, grid, (init, epoch, num_epochs))
        began = True
        checkpoints = out_folder / f"checkpoint_{runs[0].seed}_{runs[-1].seed}"
        first = policy.warm_started(init) if options.init_from else init
        complete = train(first, epoch, num_epochs(config), runs, shared, checkpoints, options)
        distributed.synchronize("trained")
    except Exception as error:
        fail_late(error, config.env, options.traceback, code=1 if began else 2)
    if not complete:
        raise SystemExit(130)
    code = report.report(runs, out_folder, grid, options)
    checkpoint.delete(checkpoints)
    raise SystemExit(code)


def prepare(config, options, data, grid, functions):
    """Set up devices and processes, check everything, write `config.json`s: `(out_folder, runs, shared)`.

    `shared` are further arguments of `init`, the same for all runs: base points, parameters to start from.
    """
    init, *_ = functions
    track.check(options.track)
    cells = sweep.cells(config, grid)
    if options.distributed:
        distributed.connect(options.coordinator_address, options.num_processes, options.process_id)
    devices.set_up_backend(len(cells) * options.num_seeds, devices.largest_product(config))
    envs.register(config.env, options.env_params, options.traceback)
    for changed in [config, *sweep.one_by_one(config, grid)]:
        checks.check_config(changed, init)
    files = {"base_points": data.base_points}
    shared = base_points.load_and_save(data, options, config, init)
    if options.init_from:
        files["init_from"] = policy.find_parameters(options.init_from)
        shared.append(policy.load_parameters(files["init_from"], config, init))
    script = inspect.getsourcefile(init)
    group = record.group_folder(options.out, Path(script).stem, config.env, options.name)
    seeds = range(options.seed, options.seed + options.num_seeds)
    groups = [(cell.config, group.with_name(group.name + cell.suffix)) for cell in cells]
    runs = [record.Run(config, seed, folder) for config, folder in groups for seed in seeds]
    out_folder = group.with_name(f"{group.name}-sweep") if grid else group
    runs = checks.check_folders(out_folder, script, runs, grid, options, files, functions)
    return out_folder, runs, shared


def fail_late(error, env, show_traceback, code):
    """End the process for an error that is no mistake in the command; with `code` for one inside the environment."""
    message = str(error) if isinstance(error, (track.Failed, distributed.Lost)) else None
    if isinstance(error, jax.errors.JaxRuntimeError) and milp.failures:  # in a call of the host by the program
        message = f"--maximizer milp: {milp.failures.pop()}"
    if isinstance(error, record.WriteError):
        message = f"cannot write {error.filename}: {error.strerror}; then continue with: {cli.resume_command()}"
        code = 1
    inside_env = None if message else envs.explain(env, error, show_traceback)
    if jax.process_count() > 1:
        distributed.abort(error, message or inside_env)
    if message or inside_env:
        cli.fail(message or inside_env, code if inside_env or isinstance(error, record.WriteError) else 2)
    raise error


class Training(NamedTuple):
    """What a command trains: its runs, `num_epochs` epochs each, by compiled programs, with a folder of checkpoints."""

    runs: list
    num_epochs: int
    programs: programs.Programs
    checkpoints: Path
    keep_states: bool  # write the last states
    algorithm: dict  # the functions of the algorithm's file by name


def train(init, epoch, num_epochs, runs, shared, checkpoints, options):
    """Train the runs in rounds, with --resume from where they were left; whether all have come to their end."""
    position = resume.position(runs, num_epochs, checkpoints) if options.resume else Position(0, len(runs), 0)
    if position.first == len(runs):
        distributed.print_once("this run is complete; nothing to resume")
        return True
    interrupted = catch_interrupts()
    with progress.show() as show:
        show("compiling")
        num_runs = len(runs) - position.first
        compiled = programs.compile_to_fit(runs[0].config, init, epoch, num_runs, devices.memory(), shared)
        num_bytes = programs.state_bytes(compiled)
        keep_states = checkpoint.is_kept(options.keep_state, num_bytes)
        training = Training(runs, num_epochs, compiled, checkpoints, keep_states, inspect.unwrap(epoch).__globals__)
        distributed.synchronize("compiled")
        while position.first < len(runs):
            position = position._replace(last=min(position.last, position.first + compiled.round_size))
            with track.tracking(options.track, options.resume) as log:
                epochs, row = train_round(training, position, interrupted, show, log)
            if epochs < num_epochs:
                break
            position = resume.next_position(runs, position.last, num_epochs, options.resume)
    if position.first == len(runs):
        if options.keep_state == "small" and not training.keep_states:
            how = "--keep-state always keeps it, to extend a run later"
            distributed.print_once(f"the last state, of {num_bytes / 1e6:,.0f} MB a run, is not kept; {how}")
    else:
        done = f"and saved after {record.amount(row)}" if row else "before the first epoch"
        distributed.print_once(f"interrupted {done}; continue with: {cli.resume_command()}")
    return position.first == len(runs)


def train_round(training, position, interrupted, show, log):
    """Train a round from `position` to its end or an interrupt, and save it: `(epochs, last row)`."""
    runs = training.runs[position.first : position.last]
    batch = programs.place(training.programs, [run.config for run in runs], [run.seed for run in runs])
    rows = {i: record.read_rows(runs[i].folder, position.epochs) for held in batch.run_indices for i in held}
    began = last_save = time.monotonic()
    states, reached, save_seconds = begin(training, position, batch), position, SAVE_SECONDS
    best = {}  # parameters of the runs whose best evaluation has not been saved
    (stop,) = distributed.any_process(interrupted.is_set())
    while reached.epochs < training.num_epochs and not stop:
        states, outs = programs.advance(training.programs, batch, states)
        reached = reached._replace(epochs=reached.epochs + 1)
        add_rows(training, reached, batch, states, outs, rows, best, log)
        best |= best_params(batch, states, rows)
        show(*epoch_line(training, position, reached, rows, time.monotonic() - began))
        due = time.monotonic() - last_save >= save_seconds / CHECKPOINT_SHARE
        left = not all(record.has_diverged(x) for x in rows.values())
        stop, due, left = distributed.any_process(interrupted.is_set(), due, left)  # all processes save together
        if not left:
            reached = reached._replace(epochs=training.num_epochs)
        elif due and not stop and reached.epochs < training.num_epochs:
            last_save = time.monotonic()
            save(training, reached, batch, states, rows, best, log)
            best, save_seconds = {}, time.monotonic() - last_save
    if reached != position:
        save(training, reached, batch, states, rows, best, log)
    longest = max(rows.values(), key=len, default=[])
    if reached.epochs == training.num_epochs and position.first == position.epochs == 0:  # once for all rounds
        evaluation.report(training, batch, states, longest, time.monotonic() - began)
    return reached.epochs, longest[-1] if longest else None


def begin(training, position, batch):
    """The states of a round at `position`, from what was saved of it or from `init`."""
    if not position.epochs:
        return programs.start(training.programs, batch)
    runs, like = training.runs[position.first : position.last], programs.array_shapes(training.programs)
    arrays = resume.restore(runs, position, training.checkpoints, like)
    return programs.from_arrays(training.programs, arrays, position.last - position.first)


def best_params(batch, states, rows):
    """Copies of the parameters of the runs whose last evaluation is their best, by run."""
    better = [i for i, run_rows in rows.items() if policy.is_best(run_rows)]
    params = programs.by_run(batch, jax.device_get([state.params for state in states])) if better else {}
    return {i: jax.tree.map(np.array, params[i]) for i in better}


def save(training, reached, batch, states, rows, best, log):
    """Write policies, last states, metrics (and track these), and, unless the round is at its end, a checkpoint."""
    at_end = reached.epochs == training.num_epochs
    kept = programs.arrays_by_run(batch, states) if at_end and training.keep_states else {}
    params = programs.by_run(batch, jax.device_get([state.params for state in states]))
    for i, run_rows in rows.items():
        if len(run_rows) == reached.epochs and not record.has_diverged(run_rows):  # else its files have been written
            write(training.runs[reached.first + i], run_rows, params[i], best.get(i), kept.get(i), log)
    if not at_end:
        with distributed.collective():
            checkpoint.save(training.checkpoints, reached, programs.to_arrays(training.programs, states))


def write(run, rows, params, best, state, log):
    """Write a run's policy and metrics and track these; also its best policy and its last state, unless None."""
    if not (run.folder / "config.json").exists():  # somebody has removed the folder
        record.write_config(run.folder, run.description)
    policy.save(run.folder, params)
    if best is not None:
        policy.save(run.folder, best, "best")
    if state is not None:
        checkpoint.keep(run.folder, len(rows), state)
    record.write_rows(run.folder / "metrics.csv", rows)  # last: its rows tell that a run is complete
    log(run.folder, rows)


def add_rows(training, reached, batch, states, outs, rows, best, log):
    """Append the metrics of an epoch to each run's rows, and end a run that is not finite.

    Its files stay as they are now, while its device computes on; the line names what was not finite first.
    """
    for i, (metrics, finite) in programs.by_run(batch, outs).items():
        if record.has_diverged(rows[i]):
            continue
        rows[i].append(record.metrics_row(metrics, finite))
        if not finite:
            run, state = training.runs[reached.first + i], programs.by_run(batch, states)[i]
            quantity = divergence.first_quantity(training.algorithm, run.config, state, metrics)
            divergence.announce(run, training.runs, f": {quantity} not finite", rows[i][-1])
            write(run, rows[i], jax.device_get(state.params), best.get(i), None, log)


def epoch_line(training, position, reached, rows, seconds):
    """Text on the last epoch, and how many epochs of all rounds are done, of how many; `position` was `seconds` ago."""
    size, num_epochs = training.programs.round_size, training.num_epochs
    before, after = math.ceil(reached.first / size), math.ceil((len(training.runs) - reached.last) / size)
    rounds = before + 1 + after
    done, total = before * num_epochs + reached.epochs, rounds * num_epochs
    round_text = f"round {before + 1:,} of {rounds:,}, " if rounds > 1 else ""
    num_runs, new_epochs = reached.last - reached.first, reached.epochs - position.epochs
    rows = {i: run_rows for i, run_rows in rows.items() if len(run_rows) == reached.epochs}  # without diverged ones
    line = progress.line(rows, num_runs, new_epochs, seconds, total - done) if rows else ""
    return f"{round_text}epoch {reached.epochs:,} of {num_epochs:,}  {line}".rstrip(), done, total


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

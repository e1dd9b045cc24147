"""Training runs of the experiments, the keys of their results, and the measurement of times.

Results are keyed by the code that computes them, without comments and docstrings, so that a change of words or figures
recomputes nothing. For the same reason the runs train copies of the algorithm files without comments and docstrings.
"""

import ast
import contextlib
import functools
import hashlib
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.extend.backend import clear_backends

from amortax.common import devices, policy, programs, record
from experiments.study import RESULTS, ROOT, short

WORK = RESULTS / "runs" / "reproduce"  # finished cells and runs; git ignores it
FITTED = ("fqi", "fqi_amortized", "nfqca", "soft_fqi")
SMALL = {  # flags of a run that takes a second
    "fitted": "--num-iterations 2 --iterations-per-epoch 1 --num-base-points 200 --fit-steps 4 --batch-size 16",
    "actor-critic": "--total-steps 1200 --learning-starts 400 --steps-per-epoch 400 --batch-size 16",
    "reinforce": "--total-steps 64 --steps-per-epoch 32 --num-envs 4 --num-steps 4 --batch-size 4",
    "ppo": "--total-steps 64 --steps-per-epoch 32 --num-envs 4 --num-steps 4 --num-minibatches 2",
    "shac": "--total-steps 64 --steps-per-epoch 32 --num-envs 4 --num-steps 4 --batch-size 4",
    "svg": "--num-iterations 4 --iterations-per-epoch 2 --num-rollouts 2 --horizon 3",
    "svg_model": "--num-iterations 4 --iterations-per-epoch 2 --num-rollouts 2 --horizon 3 --learning-starts 40"
    " --batch-size 16",
}


class Run(NamedTuple):
    """Seeds 0 to `seeds - 1` of one command line of an algorithm, perhaps with a change to its file."""

    algorithm: str
    env: str
    flags: str = ""
    seeds: int = 16
    change: str = ""  # name of a file in `changes/`, without .diff


class Snapshot(NamedTuple):
    """A run during its training."""

    seed: int
    step: int  # environment steps so far
    params: Any
    metrics: Any  # of the epoch that has just ended; None before the first
    picked: Any  # what else was asked for of its state


def small(run):
    """The run with two seeds, tiny networks and hardly any steps."""
    kind = "fitted" if run.algorithm in FITTED else run.algorithm
    flags = f"{run.flags} --hidden-sizes 8 --num-eval-episodes 2 {SMALL.get(kind, SMALL['actor-critic'])}"
    return run._replace(flags=flags, seeds=2)


def smaller(cells, *names):
    """The named cells, or all of them if none is named, made small."""
    return {label: small(cells[label]) for label in names or cells}


# Keys


@functools.cache
def code(text):
    """Python source without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"


def code_of(function):
    """The code of a function of a module and of what it uses of that module, without comments and docstrings."""
    defined, found, names = {}, [], [function.__name__]
    for node in ast.parse(code(Path(inspect.getsourcefile(function)).read_text())).body:
        targets = [x for target in getattr(node, "targets", []) for x in ast.walk(target) if isinstance(x, ast.Name)]
        for name in [x.id for x in targets] or [getattr(node, "name", None)]:
            defined[name] = node
    for name in names:  # which grows
        node = defined.get(name)
        if node and node not in found:
            found.append(node)
            names += [x.id for x in ast.walk(node) if isinstance(x, ast.Name)]
    return "\n".join(ast.unparse(node) for node in found)


def digest(text, env=None):
    """Eight hexadecimal digits of a text and of the versions that determine what it computes, in an environment."""
    versions = [f"{name} {version}" for name, version in record.versions(env).items()]
    return hashlib.sha256("\n".join([text, *versions]).encode()).hexdigest()[:8]


def fingerprint(experiment, cell):
    """The key of a cell's rows: the cell, the code that determines the numbers, and the versions."""
    sources = [source(cell)] if isinstance(cell, Run) else []
    sources += [code((ROOT / path).read_text()) for path in experiment.sources]
    text = "\n".join([repr(cell), code_of(experiment.measure), *sources])
    return digest(text, cell.env if isinstance(cell, Run) else None)


def source(run):
    """The code of the algorithm's file with the run's change; RuntimeError where the change does not apply."""
    path = ROOT / "algorithms" / f"{run.algorithm}.py"
    if not run.change:
        return code(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(path, Path(folder) / "my_idea.py")
        patch = RESULTS / "changes" / f"{run.change}.diff"
        # outside a repository git only patches
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(folder).parent)}
        done = subprocess.run(["git", "apply", patch], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{patch.name} does not apply to {path.name}: {done.stderr.strip()}")
        return code(copy.read_text())


def script(run):
    """The file that the run executes: its code, in a folder named after its digest."""
    text = source(run)
    path = WORK / "code" / digest(text) / f"{run.algorithm}.py"
    if not path.exists():
        record.write_atomic(path, text.encode())
    return path


# Training


def train(run):
    """Train by the command line, resuming a run that was stopped: the folder of its seeds."""
    path = script(run)
    name = "_".join(filter(None, [path.parent.name, run.change, re.sub(r"[^\w.]+", "-", run.flags).strip("-")]))[:200]
    group = record.group_folder(WORK / "runs", run.algorithm, run.env, name)
    begun = record.seed_folder(group, run.seeds - 1).exists()  # perhaps with more seeds, for another experiment
    command = [sys.executable, path, "--env", run.env, "--num-seeds", str(run.seeds), *run.flags.split()]
    command += ["--out", WORK / "runs", "--name", group.name, "--no-plot", *["--resume"] * begun]
    # in a session of its own, so that an interrupt comes from here alone, whoever sent it
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, **options) as process:
        message = wait(process)
    if process.returncode not in (0, 1):  # 1: a seed diverged, which its rows show
        raise SystemExit(f"error: {run.algorithm} on {run.env}: {message.strip()}")
    return group


def wait(process):
    """What a process writes to standard error until it ends; each interrupt is passed on to it."""
    try:
        return process.communicate()[1]
    except KeyboardInterrupt:
        print("waiting for the current run to save; interrupt again to stop at once", file=sys.stderr)
        process.send_signal(signal.SIGINT)
        wait(process)
        raise


def learning_curves(run):
    """A row for every seed and evaluation of a run."""
    group, rows = train(run), []
    for seed in range(run.seeds):
        columns = record.read_metrics(record.seed_folder(group, seed))
        progress = record.progress(columns) if run.algorithm in FITTED else columns["step"]
        for values in zip(progress, columns["eval_return_mean"], columns["finite"], strict=True):
            row = dict(zip(("progress", "return", "finite"), values, strict=True))
            rows.append({"seed": seed} | {name: short(x) for name, x in row.items()})
    return rows


def load(run):
    """`(module, config)` of a run, to train it in this process."""
    module = policy.load_algorithm(run.algorithm, script(run))
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return module, tyro.cli(module.Config, args=["--env", run.env, *run.flags.split()], config=markers)


def snapshots(module, config, num_seeds, pick=lambda state: ()):
    """Train in this process and yield a `Snapshot` of every seed before the first epoch and after each.

    `pick` takes from a seed's state what else a snapshot has. The programs are those of the runner, so that a seed is
    the same run as on the command line.
    """
    devices.set_up_backend(num_seeds, devices.largest_product(config))
    compiled = programs.compile_programs(config, module.init, module.epoch, num_seeds)
    picks = jax.jit(jax.vmap(pick))
    for first in range(0, num_seeds, compiled.round_size):
        seeds = list(range(first, min(first + compiled.round_size, num_seeds)))
        batch = programs.place(compiled, [config] * len(seeds), seeds)
        states, metrics = programs.start(compiled, batch), {}
        for epoch in range(1 + module.num_epochs(config)):
            if epoch:
                states, outs = programs.advance(compiled, batch, states)
                metrics = programs.by_run(batch, [out[0] for out in outs])
            seen = programs.by_run(batch, [(state.step, state.params, picks(state)) for state in states])
            for i, (step, params, picked) in jax.device_get(seen).items():
                yield Snapshot(seeds[i], int(step), params, metrics.get(i), picked)


def is_finite(params):
    """Whether all learned parameters are."""
    return all(np.isfinite(x).all() for x in jax.tree.leaves(params))


# Times


@contextlib.contextmanager
def one_thread():
    """Give XLA one thread of the CPU, as the command line does; arrays from outside become invalid."""
    before = os.environ.get("NPROC")
    if before != "1":
        os.environ["NPROC"] = "1"
        clear_backends()  # it is read when a backend starts
    try:
        yield
    finally:
        if before != "1":
            os.environ.pop("NPROC") if before is None else os.environ.update(NPROC=before)
            clear_backends()


def seconds(call):
    """Time of a call until its results are ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start

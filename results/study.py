"""What the experiments of `reproduce.py` share: training runs, tables and the parts of figures."""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from common import plot, record

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "results" / "runs" / "reproduce"  # finished cells; git ignores it
FITTED = ("fqi", "fqi_amortized", "nfqca", "soft_fqi")
SMALL = {  # flags of a run that takes a second
    "fitted": "--num-iterations 2 --iterations-per-epoch 1 --num-base-points 200 --fit-steps 4 --batch-size 16",
    "actor-critic": "--total-steps 1200 --learning-starts 400 --steps-per-epoch 400 --batch-size 16",
    "reinforce": "--total-steps 64 --steps-per-epoch 32 --num-envs 4 --num-steps 4 --batch-size 4",
    "svg": "--num-iterations 4 --iterations-per-epoch 2 --num-rollouts 2 --horizon 3 --learning-starts 40"
    " --batch-size 16",
}


class Experiment(NamedTuple):
    """Named cells, each measured by itself, of which one table of raw numbers, one figure and one text are made."""

    title: str
    cells: dict  # label: what to measure, plain data
    measure: Callable  # cell -> rows, dicts with the same keys
    report: Callable  # rows -> text in Markdown
    draw: Callable | None = None  # rows -> Figure
    quick: Callable | None = None  # cells -> the few and small ones of `--quick`
    sources: tuple = ()  # files besides the algorithms' that decide the numbers
    sample: str = ""  # what the numbers are a sample of


class Run(NamedTuple):
    """Seeds 0 to `seeds - 1` of one command line of an algorithm, perhaps with a change to its file."""

    algorithm: str
    env: str
    flags: str = ""
    seeds: int = 16
    change: str = ""  # name of a file in `changes/`, without .diff


# Training


def small(run):
    """The run with two seeds, tiny networks and hardly any steps."""
    kind = "fitted" if run.algorithm in FITTED else run.algorithm
    flags = f"{run.flags} --hidden-sizes 8 --num-eval-episodes 2 {SMALL.get(kind, SMALL['actor-critic'])}"
    return run._replace(flags=flags, seeds=2)


def source(run):
    """The text of the algorithm's file, changed if the run asks for it; RuntimeError where the change does not fit."""
    path = ROOT / "algorithms" / f"{run.algorithm}.py"
    if not run.change:
        return path.read_text()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        patch = ROOT / "results" / "changes" / f"{run.change}.diff"
        # outside of any repository git only patches
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(folder).parent)}
        done = subprocess.run(["git", "apply", patch], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{patch.name} does not fit {path.name}: {done.stderr.strip()}")
        return (Path(folder) / path.name).read_text()


def train(run):
    """The folder of the finished run, which goes on where it was stopped: an ordinary one of the command line."""
    text = source(run)
    script = ROOT / "algorithms" / f"{run.algorithm}.py"
    name = "_".join(filter(None, [digest(text), run.change, re.sub(r"[^\w.]+", "-", run.flags).strip("-")]))[:200]
    if run.change:
        script = WORK / "changed" / digest(text) / f"{run.algorithm}.py"
        record.write_atomic(script, text.encode())
    group = record.group_folder(WORK / "runs", run.algorithm, run.env, f"{name}_{run.seeds}")
    command = [sys.executable, script, "--env", run.env, "--num-seeds", str(run.seeds), *run.flags.split()]
    command += ["--out", WORK / "runs", "--name", group.name, "--no-plot", *["--resume"] * group.exists()]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode > 1:  # 1 is a seed that diverged, which its rows tell
        raise SystemExit(f"error: {run.algorithm} on {run.env}: {done.stderr.strip()}")
    return group


def learning_curves(run):
    """Rows of every seed at every evaluation of a run."""
    group, rows = train(run), []
    for seed in range(run.seeds):
        columns = record.read_metrics(record.seed_folder(group, seed))
        progress = record.progress(columns) if run.algorithm in FITTED else columns["step"]
        bias = columns.get("value_bias", [""] * len(progress))
        for values in zip(progress, columns["eval_return_mean"], bias, columns["finite"], strict=True):
            row = dict(zip(("progress", "return", "value_bias", "finite"), values, strict=True))
            rows.append({"seed": seed} | {name: short(x) for name, x in row.items()})
    return rows


def digest(text):
    """Eight hexadecimal digits of a text and of the versions that decide what it computes."""
    packages = ("jax", "jaxlib", "optax", "gymnax", "distrax", "numpy")
    versions = [platform.python_version(), *(importlib.metadata.version(name) for name in packages)]
    return hashlib.sha256("\n".join([text, *versions]).encode()).hexdigest()[:8]


def short(x):
    """Six significant digits of a number; whole numbers without a point."""
    return x if isinstance(x, str) else int(x) if float(x).is_integer() else float(f"{x:.6g}")

"""What the experiments of `reproduce.py` share: training runs, tables and the parts of figures."""

import contextlib
import csv
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.backend import clear_backends
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
    draw: Callable | None = None  # rows -> Figure, or the bytes of a film
    quick: Callable | None = None  # cells -> the few and small ones of `--quick`
    sources: tuple = ()  # files besides the algorithms' that decide the numbers
    sample: str = ""  # what the numbers are a sample of
    picture: str = "png"  # type of the file that holds what `draw` makes


class Run(NamedTuple):
    """Seeds 0 to `seeds - 1` of one command line of an algorithm, perhaps with a change to its file."""

    algorithm: str
    env: str
    flags: str = ""
    seeds: int = 16
    change: str = ""  # name of a file in `changes/`, without .diff


def sample(seeds=16, episodes="128 episodes"):
    """What the returns of an experiment's runs are a sample of."""
    return f"{seeds} seeds of each, each return a mean over {episodes}"


# Training


def small(run):
    """The run with two seeds, tiny networks and hardly any steps."""
    kind = "fitted" if run.algorithm in FITTED else run.algorithm
    flags = f"{run.flags} --hidden-sizes 8 --num-eval-episodes 2 {SMALL.get(kind, SMALL['actor-critic'])}"
    return run._replace(flags=flags, seeds=2)


def smaller(cells, *names):
    """The named of many cells, small; all of them if none is named."""
    return {label: small(cells[label]) for label in names or cells}


def source(run):
    """The text of the algorithm's file, changed if the run asks for it; RuntimeError where the change does not fit."""
    path = ROOT / "algorithms" / f"{run.algorithm}.py"
    if not run.change:
        return path.read_text()
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(path, Path(folder) / "my_idea.py")
        patch = ROOT / "results" / "changes" / f"{run.change}.diff"
        # outside of any repository git only patches
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(folder).parent)}
        done = subprocess.run(["git", "apply", patch], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{patch.name} does not fit {path.name}: {done.stderr.strip()}")
        return copy.read_text()


def train(run):
    """The folder of the finished run, which goes on where it was stopped: an ordinary one of the command line."""
    text = source(run)
    script = ROOT / "algorithms" / f"{run.algorithm}.py"
    name = "_".join(filter(None, [digest(text), run.change, re.sub(r"[^\w.]+", "-", run.flags).strip("-")]))[:200]
    if run.change:
        script = WORK / "changed" / digest(text) / f"{run.algorithm}.py"
        record.write_atomic(script, text.encode())
    group = record.group_folder(WORK / "runs", run.algorithm, run.env, name)
    begun = record.seed_folder(group, run.seeds - 1).exists()  # perhaps with more seeds, for another experiment
    command = [sys.executable, script, "--env", run.env, "--num-seeds", str(run.seeds), *run.flags.split()]
    command += ["--out", WORK / "runs", "--name", group.name, "--no-plot", *["--resume"] * begun]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            _, said = process.communicate()
        except KeyboardInterrupt:  # which the terminal sends to the run too
            print("waiting for the run in progress to save; once more to stop at once", file=sys.stderr)
            process.communicate()
            raise
    if process.returncode not in (0, 1):  # 1 is a seed that diverged, which its rows tell
        raise SystemExit(f"error: {run.algorithm} on {run.env}: {said.strip()}")
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


# Times


@contextlib.contextmanager
def one_thread():
    """XLA keeps one thread of the CPU in here, as the command line lets it; arrays from outside do not live on."""
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
    """Time of a call until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


# Rows: dicts with a `label`, read from a .csv file


def read(path):
    """The rows of a .csv file, as text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows):
    """Rows of a .csv file with numbers for what are numbers."""

    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    return [{name: number(text) for name, text in row.items()} for row in rows]


def returns(rows, label, column="return"):
    """`(progress [num_epochs], values [num_seeds, num_epochs])` of a label's seeds, without those that diverged."""
    seeds = {}
    for row in rows:
        if row["label"] == label:
            seeds.setdefault(row["seed"], []).append(row)
    kept = [seed for seed in seeds.values() if all(row["finite"] for row in seed)]
    return np.array([row["progress"] for row in kept[0]]), np.array([[row[column] for row in seed] for seed in kept])


def labels(rows):
    """The labels, in order."""
    return list(dict.fromkeys(row["label"] for row in rows))


def final(rows, label, column="return"):
    """The last values `[num_seeds]` of a label."""
    return returns(rows, label, column)[1][:, -1]


def estimate(values, digits=1):
    """Interquartile mean and 95 % bootstrap interval as text."""
    low, high = plot.interval(values)
    return f"{plot.iqm(values):z,.{digits}f} ({low:z,.{digits}f} to {high:z,.{digits}f})"  # z: no -0.0


def verdict(held):
    """The words for a list of whether each case of a claim held."""
    return "**Holds.**" if all(held) else "**Holds in part.**" if any(held) else "**Does not hold.**"


def table(header, lines):
    """A table in Markdown of a header and rows of cells."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(x) for x in row) + " |" for row in rows)


def return_table(rows, digits=1, **columns):
    """Final return of each label: interquartile mean with its interval, worst seed; `columns` are named further ones.

    Each of `columns` is a function of the label that gives text.
    """
    header = ["what", "return at the end", "worst seed", *(name.replace("_", " ") for name in columns)]
    lines = []
    for label in labels(rows):
        values = final(rows, label)
        cells = [label, estimate(values, digits), f"{values.min():z,.{digits}f}"]
        lines.append(cells + [column(label) for column in columns.values()])
    return table(header, lines)


# Figures


def figure(width, height, num_rows=1, num_columns=1, **options):
    """`(Figure, panels [num_rows, num_columns])`, the size in inches."""
    page = Figure(figsize=(width, height), dpi=120, layout="constrained")  # not pyplot's: it needs no display
    return page, page.subplots(num_rows, num_columns, squeeze=False, **options)


def draw_curve(axes, rows, label, name, column="return", per=1, **style):
    """Interquartile mean of a label's seeds over its progress divided by `per`, and its 95 % bootstrap band."""
    progress, values = returns(rows, label, column)
    low, high = plot.interval(values)
    (line,) = axes.plot(progress / per, plot.iqm(values), label=name, **style)
    axes.fill_between(progress / per, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_finals(axes, rows, names, color):
    """For each `{label: name}` a point with its 95 % interval, in `color(label)`, and the seeds beside it."""
    for x, label in enumerate(names):
        values = final(rows, label)
        low, high = plot.interval(values)
        spread = 0.18 + 0.12 * np.linspace(-1, 1, len(values))
        axes.plot(x + spread, values, ".", color="0.65", markersize=4, zorder=1)
        axes.errorbar(x - 0.12, plot.iqm(values), [[plot.iqm(values) - low], [high - plot.iqm(values)]], fmt="o",
                      color=color(label), capsize=3, zorder=2)  # fmt: skip
    axes.set_xticks(range(len(names)), names.values())
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(axis="y", alpha=0.3)


def optimum_line(axes, value):
    """A dashed line where the best policy is known to be."""
    if value is not None:
        axes.axhline(value, color="black", linestyle="--", linewidth=1, label=f"best possible, {value:,.1f}")

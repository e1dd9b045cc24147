"""The files of a run: their layout, writing and reading.

    <out>/<algorithm>/<env>/<name>/seed_<s>/config.json    what was run, and all that decides its numbers
    <out>/<algorithm>/<env>/<name>/seed_<s>/metrics.csv    a row for each epoch
    <out>/<algorithm>/<env>/<name>/seed_<s>/policy.npz     every learned array, named by its place in `State.params`
    <out>/<algorithm>/<env>/<name>/seed_<s>/policy_best.npz     the same, at the best evaluation
    <out>/<algorithm>/<env>/<name>/seed_<s>/state.npz      the last state, to extend the run, where it is small
    <out>/<algorithm>/<env>/<name>/curve.png               all seeds of the folder

    A sweep writes such a folder for each of its cells, and one of its own beside them: see `common/sweep.py`.

Every file is replaced atomically: a reader finds it complete or absent.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import platform
import re
import shutil
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from amortax.common import envs
from amortax.common.cli import fail

# what determines the numbers beside the code; scipy solves the integer programs
PACKAGES = ("jax", "jaxlib", "optax", "distrax", "gymnax", "numpy", "scipy", "jax-cuda12-plugin", "jax-cuda13-plugin")
# packages of the physics engines, by what their environments' names begin with
ENGINES = {"playground": ("playground", "mujoco", "mujoco-mjx"), "brax": ("brax",)}
JAX_CONFIG = ("jax_enable_x64", "jax_default_prng_impl", "jax_default_matmul_precision")
RUN_FILES = ("config.json", "metrics.csv", "policy.npz", "policy_best.npz", "state.npz")
FILES = (*RUN_FILES, "curve.png", "sweep.csv", "sweep.png")
PLACE = ("device", "versions")  # entries of `config.json` that say where a run was made, not which run it is


class Run(NamedTuple):
    """One seed of one configuration, and the folder of its group: all seeds of the configuration."""

    config: object
    seed: int
    group: Path
    description: dict | None = None  # the content of its `config.json`

    @property
    def folder(self):
        """The folder of the run."""
        return seed_folder(self.group, self.seed)


def group_folder(out, algorithm, env, name):
    """The folder that the seeds of one configuration share."""
    return Path(out) / algorithm / re.sub("[:/]", ".", env) / name


def seed_folder(group, seed):
    """The folder of one seed."""
    return Path(group) / f"seed_{seed}"


def seeds(group):
    """The seeds that have a folder in a group, sorted; whatever else lies there is ignored."""
    return sorted(int(path.name[5:]) for path in Path(group).glob("seed_*") if is_ours(path, r"seed_(0|[1-9]\d*)"))


def is_ours(folder, pattern):
    """Whether this is a folder with a name of the pattern, and not a copy or a file with a similar one."""
    return bool(re.fullmatch(pattern, folder.name, re.ASCII)) and folder.is_dir()


class WriteError(OSError):
    """A file could not be written; it holds its former content."""


def write_atomic(path, data):
    """Write bytes to `path`; whatever happens, it holds all of them or its former content."""
    try:
        replace(path, data)
    except OSError as error:
        raise WriteError(error.errno, error.strerror, str(path)) from error


def replace(path, data):
    """Write bytes to a temporary file, and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def remove_leftovers(folder):
    """Delete temporary files of a process that was killed while it wrote files or removed checkpoints."""
    for path in Path(folder).glob(".*"):
        name, _, random = path.name.removeprefix(".").removesuffix(".tmp").rpartition(".")
        if name in FILES and path.name == f".{name}.{random}.tmp":
            path.unlink(missing_ok=True)
        elif is_ours(path, r"\.checkpoint_\d+_\d+"):
            shutil.rmtree(path, ignore_errors=True)


def describe(script, config, seed, files=None):
    """The content of `config.json`: everything that determines the numbers of one seed, and nothing else.

    `files` are those that it learns from, by name, or None.
    """
    env = getattr(config, "env", None)
    description = {
        "algorithm": Path(script).stem,
        "seed": seed,
        "config": as_json(config),
        "source": str(Path(script).resolve()),
        "source_sha256": sha256(script),
        "device": jax.devices()[0].device_kind,
        "versions": versions(env),
        "jax_config": {name: getattr(jax.config, name) for name in JAX_CONFIG},
    } | envs.describe(env)
    description |= {f"{name}_sha256": sha256(path) for name, path in (files or {}).items() if path}
    return json.loads(json.dumps(description))  # tuples become lists, as in what is read


def versions(env):
    """`{name: version}` of Python and of the packages that determine the numbers of a run in the environment `env`."""
    found, engine = {"python": platform.python_version()}, ENGINES.get((env or "").partition("/")[0], ())
    for name in filter(None, [*PACKAGES, *engine, envs.package(env)]):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def as_json(config):
    """The fields of a configuration as they are in `config.json`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def read_fields(config_class, fields):
    """The configuration of the fields in `config.json`; TypeError where it has others."""
    return config_class(**{name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()})


def sha256(path):
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def differences(old, new, prefix=""):
    """Lines `field: old -> new` for everything in which two descriptions differ."""
    lines = []
    for name in sorted((set(old) | set(new)) - {"source"}):  # the same code in another place is the same run
        a, b = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a} -> {b}")
    return lines


def place_differences(old, new):
    """The `differences` in where two runs were made."""
    return differences(*({name: x[name] for name in PLACE if name in x} for x in (old, new)))


def read_config(folder):
    """The description in `folder/config.json`; fails if there is none."""
    try:
        description = json.loads((Path(folder) / "config.json").read_text())
        if not isinstance(description, dict):
            raise ValueError("must be an object")
        return description
    except (OSError, ValueError) as error:
        fail(f"{folder}: no run here: config.json: {error}")


def write_config(folder, description):
    """Write `config.json`."""
    write_atomic(Path(folder) / "config.json", (json.dumps(description, indent=2) + "\n").encode())


def metrics_row(metrics, finite):
    """One seed's metrics of an epoch as a flat dict of Python numbers: `eval_returns` as its mean and deviation."""
    row = {"step": int(metrics.step)}
    row["eval_return_mean"] = float(np.mean(metrics.eval_returns, dtype=np.float64))
    row["eval_return_std"] = float(np.std(metrics.eval_returns, dtype=np.float64))
    rest = (name for name in metrics._fields if name not in ("step", "eval_returns"))
    return row | {name: float(getattr(metrics, name)) for name in rest} | {"finite": int(finite)}


def write_rows(path, rows):
    """Write dicts with the same keys as a .csv file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(Path(path), text.getvalue().encode())


def read_metrics(folder):
    """`metrics.csv` as a dict of columns."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def read_rows(folder, num):
    """The first `num` rows of `metrics.csv`, as text, so that they can be written again unchanged."""
    if not num:
        return []
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))[:num]


def num_rows(folder):
    """The number of rows of `metrics.csv`; 0 without one."""
    path = Path(folder) / "metrics.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def has_diverged(rows):
    """Whether the last of a run's rows, numbers or text, says that it is not finite: the run has ended there."""
    return bool(rows) and not float(rows[-1]["finite"])


def progress(columns):
    """What a curve is drawn over, from `read_metrics`: iterations where they are counted, else environment steps."""
    return columns["iteration"] if "iteration" in columns else columns["step"]


def amount(row):
    """How far a row of `metrics.csv`, or its columns at one epoch, has come: "5,000 steps" or "20 iterations"."""
    return f"{int(float(progress(row))):,} {unit(row)}"


def unit(columns):
    """The unit of `progress`."""
    return "iterations" if "iteration" in columns else "steps"


def write_arrays(path, arrays):
    """Write named arrays as an .npz file; the same arrays give the same bytes."""
    data = io.BytesIO()
    # np.savez would store the time of writing
    with zipfile.ZipFile(data, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(name + ".npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    write_atomic(path, data.getvalue())

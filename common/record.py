"""What a run leaves behind, and how it is read again.

    <out>/<algorithm>/<env>/<name>/seed_<s>/config.json    what was run: algorithm, seed, hyperparameters, versions
    <out>/<algorithm>/<env>/<name>/seed_<s>/metrics.csv    a row for each epoch
    <out>/<algorithm>/<env>/<name>/seed_<s>/policy.npz     every learned array, named by its place in `State.params`
    <out>/<algorithm>/<env>/<name>/curve.png               all seeds of the folder

    A sweep leaves such a folder for each of its cells, and its own beside them: see `common/sweep.py`.

Every file is replaced in one step, so a reader finds it whole or absent.
"""

import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from common import milp
from common.cli import fail, register_env


def group_folder(out, algorithm, env, name):
    """The folder that the seeds of one run share."""
    return Path(out) / algorithm / env.replace(":", ".") / name


def seed_folder(group, seed):
    """The folder of one seed."""
    return Path(group) / f"seed_{seed}"


def write_atomic(path, data):
    """Write bytes to `path` so that, whatever happens, it holds all of them or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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
    """Delete what a process left that was killed while it wrote files or removed checkpoints."""
    for name in ("config.json", "metrics.csv", "policy.npz", "curve.png", "sweep.csv", "sweep.png"):
        for path in Path(folder).glob(f".{name}.*"):
            path.unlink(missing_ok=True)
    for path in Path(folder).glob(".checkpoint_*"):
        shutil.rmtree(path, ignore_errors=True)


def describe(script, config, seed):
    """What `config.json` holds: all that decides the numbers of one seed, and nothing else."""
    packages = ("jax", "jaxlib", "optax", "gymnax", "numpy")
    description = {
        "algorithm": Path(script).stem,
        "seed": seed,
        "config": dataclasses.asdict(config),
        "source": str(Path(script).resolve()),
        "source_sha256": sha256(script),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }
    if getattr(config, "base_points", ""):
        description["base_points_sha256"] = sha256(config.base_points)
    return json.loads(json.dumps(description))  # tuples become the lists that a reader gets


def sha256(path):
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def differences(old, new, prefix=""):
    """Lines `field: old -> new` for all that two descriptions do not share."""
    lines = []
    for name in sorted((set(old) | set(new)) - {"source"}):  # the same code elsewhere is the same run
        a, b = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a} -> {b}")
    return lines


def read_config(folder):
    """The description in `folder/config.json`; fails if there is none."""
    try:
        return json.loads((Path(folder) / "config.json").read_text())
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
    """The first `num` rows of `metrics.csv`, to be written again as they are."""
    if not num:
        return []
    try:
        with open(Path(folder) / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))[:num]
    except OSError as error:
        fail(f"--resume: {folder}: {error}")
    if len(rows) < num:
        fail(f"--resume: {folder}/metrics.csv has {len(rows)} rows, its checkpoint was written after {num}")
    return rows


def progress(columns):
    """What a curve is drawn over, from `read_metrics`: iterations where they are counted, else environment steps."""
    return columns["iteration"] if "iteration" in columns else columns["step"]


def array_names(params):
    """A name such as `actor/0/1` for each leaf of `params`, in order."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def write_policy(folder, params):
    """Write `policy.npz`."""
    write_arrays(Path(folder) / "policy.npz", dict(zip(array_names(params), jax.tree.leaves(params), strict=True)))


def write_arrays(path, arrays):
    """Write named arrays as an .npz file; the same arrays give the same bytes."""
    data = io.BytesIO()
    # np.savez would stamp the members with the time of writing
    with zipfile.ZipFile(data, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(name + ".npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    write_atomic(path, data.getvalue())


def load_policy(folder):
    """Return `(module, config, params)` of a saved run: the algorithm's module, its Config and its State.params."""
    folder = Path(folder)
    description = read_config(folder)
    try:
        module = load_algorithm(description["algorithm"], description["source"])
        if sha256(module.__file__) != description["source_sha256"]:
            print(f"note: {module.__file__} has changed since this run", file=sys.stderr)
        register_env(description["config"]["env"])
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
        config = module.Config(**values)
        shapes = jax.eval_shape(module.init, config, jax.random.key(0)).params
    except Exception as error:  # a description or a source that somebody edited can be wrong in any way
        fail(f"{folder / 'config.json'}: describes no run that can be rebuilt: {type(error).__name__}: {error}")
    names, leaves = array_names(shapes), jax.tree.leaves(shapes)
    path = folder / "policy.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError:
        fail(f"{path}: no policy saved yet")
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        fail(f"{path}: truncated or not a policy: {error}")
    if sorted(arrays) != sorted(names):
        fail(f"{path}: not a policy of {description['algorithm']}: it must hold the arrays {', '.join(names)}")
    for name, leaf in zip(names, leaves, strict=True):
        if arrays[name].shape != leaf.shape or arrays[name].dtype != leaf.dtype:
            found = f"{arrays[name].dtype}{list(arrays[name].shape)}"
            fail(f"{path}: {name} is {found}, config.json asks for {leaf.dtype}{list(leaf.shape)}")
        if not np.isfinite(arrays[name]).all():
            fail(f"{path}: {name} is not finite: this seed diverged")
    return module, config, jax.tree.unflatten(jax.tree.structure(shapes), [arrays[name] for name in names])


def load_algorithm(name, source):
    """Import the file that a run was made with, or, where it is gone, the algorithm of that name shipped here."""
    shipped = Path(__file__).parent.parent / "algorithms" / f"{name}.py"
    path = next((p for p in (Path(source), shipped) if p.is_file()), None)
    if path is None:
        fail(f"{source}: the file that this run was made with is gone")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if hasattr(module, "MAXIMIZERS"):
        module.MAXIMIZERS["milp"] = milp.maximize
    return module

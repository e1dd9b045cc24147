"""Policies: the learned arrays of a run, written as `policy.npz` and rebuilt from a run's folder."""

import importlib.util
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np

from amortax.common import envs, record
from amortax.common.cli import fail


def array_names(params):
    """A name such as `actor/0/1` for each leaf of `params`, in order."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def save(folder, params):
    """Write `policy.npz`."""
    arrays = dict(zip(array_names(params), jax.tree.leaves(params), strict=True))
    record.write_arrays(Path(folder) / "policy.npz", arrays)


def load(folder):
    """Return `(module, config, params)` of a saved run: the algorithm's module, its Config and its State.params."""
    folder = Path(folder)
    description = record.read_config(folder)
    try:
        module = load_algorithm(description["algorithm"], description["source"])
        if record.sha256(module.__file__) != description["source_sha256"]:
            print(f"note: {module.__file__} has changed since this run", file=sys.stderr)
        envs.register(description["config"]["env"])
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
        config = module.Config(**values)
        shapes = jax.eval_shape(module.init, config, jax.random.key(0)).params
    except Exception as error:  # a description or a source that somebody edited can be wrong in any way
        fail(f"{folder / 'config.json'}: describes no run that can be rebuilt: {type(error).__name__}: {error}")
    arrays = read_arrays(folder / "policy.npz")
    names, leaves = array_names(shapes), jax.tree.leaves(shapes)
    check_arrays(folder / "policy.npz", description["algorithm"], arrays, dict(zip(names, leaves, strict=True)))
    other = {f"{arrays[name].dtype}, here {leaf.dtype}" for name, leaf in zip(names, leaves, strict=True)}
    other -= {f"{leaf.dtype}, here {leaf.dtype}" for leaf in leaves}
    if other:  # JAX_ENABLE_X64 was another
        print(f"note: {folder / 'policy.npz'} was trained in {'; '.join(sorted(other))}", file=sys.stderr)
    arrays = [arrays[name].astype(leaf.dtype) for name, leaf in zip(names, leaves, strict=True)]
    return module, config, jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def read_arrays(path):
    """The arrays of an .npz file by name; fails on anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        fail(f"{path}: no policy saved yet")
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        fail(f"{path}: truncated or not a policy: {error}")


def check_arrays(path, algorithm, arrays, shapes):
    """Fail unless `arrays` have the names, shapes and kinds of numbers of `shapes` and are finite."""
    if sorted(arrays) != sorted(shapes):
        fail(f"{path}: not a policy of {algorithm}: it must hold the arrays {', '.join(shapes)}")
    for name, leaf in shapes.items():
        if arrays[name].shape != leaf.shape or arrays[name].dtype.kind != leaf.dtype.kind:
            found = f"{arrays[name].dtype}{list(arrays[name].shape)}"
            fail(f"{path}: {name} is {found}, config.json asks for {leaf.dtype}{list(leaf.shape)}")
        if not np.isfinite(arrays[name]).all():
            fail(f"{path}: {name} is not finite: this seed diverged")


def load_algorithm(name, source):
    """Import the file that made a run or, where it is gone, the algorithm of that name in this package."""
    shipped = Path(__file__).parent.parent / "algorithms" / f"{name}.py"
    path = next((p for p in (Path(source), shipped) if p.is_file()), None)
    if path is None:
        fail(f"{source}: the file that made this run is gone")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

"""Policies: the learned arrays of a run, the last and the best, written to its folder and rebuilt from there."""

import importlib.util
import inspect
import math
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from amortax.common import envs, record
from amortax.common.cli import fail

FILES = {"last": "policy.npz", "best": "policy_best.npz"}  # the best is that of the highest mean return


def array_names(params):
    """A name such as `actor/0/1` for each leaf of `params`, in order."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def save(folder, params, which="last"):
    """Write `policy.npz`, or `policy_best.npz`."""
    arrays = dict(zip(array_names(params), jax.tree.leaves(params), strict=True))
    record.write_arrays(Path(folder) / FILES[which], arrays)


def is_best(rows):
    """Whether the last row of a run has the highest return so far, the first of equals, and finite parameters."""
    *earlier, last = (float(row["eval_return_mean"]) if int(row["finite"]) else math.nan for row in rows)
    return math.isfinite(last) and not any(x >= last for x in earlier)


def load(folder, which="last", show_traceback=False):
    """Return `(module, config, params)` of a saved run: the algorithm's module, its Config and its State.params.

    `which` is "last" or "best", the parameters with the highest mean return in an evaluation.
    A broken environment ends the process with one line, after its traceback if that is asked for.
    """
    folder = Path(folder)
    description = record.read_config(folder)
    try:
        source = description.get("source")  # absent in results/policies: the algorithm of this package, as it is now
        module = load_algorithm(description["algorithm"], source)
        if source and record.sha256(module.__file__) != description["source_sha256"]:
            print(f"note: {module.__file__} has changed since this run", file=sys.stderr)
        changes = [f"{key}={value}" for key, value in description.get("env_params", {}).items()]
        envs.register(description["config"]["env"], changes, show_traceback)
        known = description.get("env_sha256")  # of code that is not gymnax's
        if known and known != envs.describe(description["config"]["env"]).get("env_sha256"):
            print(f"note: the code of {description['config']['env']} has changed since this run", file=sys.stderr)
        config = record.read_fields(module.Config, description["config"])
        shapes = jax.eval_shape(module.init, config, jax.random.key(0)).params
    except Exception as error:  # a description or a source that somebody edited can be wrong in any way
        fail(f"{folder / 'config.json'}: describes no run that can be rebuilt: {type(error).__name__}: {error}")
    path = folder / FILES[which]
    return module, config, read(path, path, description["algorithm"], shapes)


def find_seed(run):
    """The folder of a seed: `run` itself, or the only one in it."""
    if not run.is_dir():
        fail(f"{run}: no such folder")
    seeds = [record.seed_folder(run, seed) for seed in record.seeds(run)]
    if len(seeds) > 1 and not (run / "config.json").exists():
        fail(f"{run}: holds {len(seeds)} seeds; choose one: {', '.join(str(path) for path in seeds)}")
    return seeds[0] if len(seeds) == 1 else run


def read(path, label, algorithm, shapes):
    """The parameters in an .npz file; fails, with its `label`, unless they fit to those of an algorithm."""
    arrays = read_arrays(path, label)
    names, leaves = array_names(shapes), jax.tree.leaves(shapes)
    check_arrays(label, algorithm, arrays, dict(zip(names, leaves, strict=True)))
    other = {f"{arrays[name].dtype}, here {leaf.dtype}" for name, leaf in zip(names, leaves, strict=True)}
    other -= {f"{leaf.dtype}, here {leaf.dtype}" for leaf in leaves}
    if other:  # JAX_ENABLE_X64 was another
        print(f"note: {label} was trained in {'; '.join(sorted(other))}", file=sys.stderr)
    arrays = [arrays[name].astype(leaf.dtype) for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def read_arrays(path, label):
    """The arrays of an .npz file by name; fails on anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        fail(f"{label}: no policy saved yet")
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        fail(f"{label}: truncated or not a policy: {error}")


def check_arrays(label, algorithm, arrays, shapes):
    """Fail unless `arrays` have the names, shapes and kinds of numbers of `shapes` and are finite."""
    if sorted(arrays) != sorted(shapes):
        fail(f"{label}: not a policy of {algorithm}: it must hold the arrays {', '.join(shapes)}")
    for name, leaf in shapes.items():
        if arrays[name].shape != leaf.shape or arrays[name].dtype.kind != leaf.dtype.kind:
            found = f"{arrays[name].dtype}{list(arrays[name].shape)}"
            fail(f"{label}: {name} is {found}, must be {leaf.dtype}{list(leaf.shape)}")
        if not np.isfinite(arrays[name]).all():
            fail(f"{label}: {name} is not finite: this seed diverged")


# Warm starts


def find_parameters(path):
    """The file of `--init-from`: itself, or the last policy of the run in this folder."""
    return find_seed(path) / FILES["last"] if path.is_dir() else path


def load_parameters(path, config, init):
    """The parameters in a file, for runs of `config` to start from; fails unless they fit."""
    shapes = jax.eval_shape(init, config, jax.random.key(0)).params
    return read(path, f"--init-from {path}", Path(inspect.getsourcefile(init)).stem, shapes)


def warm_started(init):
    """`init`, but its last argument is the parameters to start from."""

    def start(config, key, *shared):
        *shared, params = shared
        state = init(config, key, *shared)
        # copies: a state may hold its parameters several times, and each is donated
        same = [name for name, x in state._asdict().items() if isinstance(x, type(params))]
        return state._replace(**{name: jax.tree.map(jnp.copy, params) for name in same})

    return start


def load_algorithm(name, source):
    """Import the file that made a run or, where it is gone or None, the algorithm of that name in this package."""
    shipped = Path(__file__).parent.parent / "algorithms" / f"{name}.py"
    path = Path(source) if source and Path(source).is_file() else shipped
    if not path.is_file():
        fail(f"{source or name}: the file that made this run is gone")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

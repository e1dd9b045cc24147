"""Base points of fitted Q-iteration in a file, so that all seeds and several algorithms learn from the same ones."""

import dataclasses
from pathlib import Path

import jax

from amortax.common import checks, cli, distributed, record


def write_if_absent(config, init, seed):
    """Where `config.base_points` names a file that does not exist, collect base points as `seed` would and write it."""
    path = Path(getattr(config, "base_points", ""))
    if path.exists():  # also the current folder, which stands for no name
        return
    if path.suffix != ".npz":
        cli.fail(f"--base-points {path}: must be a file that ends in .npz")
    collecting = dataclasses.replace(config, base_points="")
    checks.check_config(collecting, init)
    base_points = jax.jit(init)(collecting, jax.random.key(seed)).base_points
    try:
        record.write_arrays(path, base_points._asdict())
    except OSError as error:
        cli.fail(f"--base-points {path}: cannot write there: {error}")
    distributed.print_once(f"{path}: {len(base_points.reward):,} base points of seed {seed}")

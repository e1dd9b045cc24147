"""Checkpoints by Orbax: the states of all seeds of a command and their metrics so far, seed by seed.

Nothing in a checkpoint depends on how many devices the seeds were on, so a run may resume on another number of them.
"""

import logging
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

logging.getLogger("absl").setLevel(logging.ERROR)


def open_folder(group, seeds):
    """Orbax's manager of the checkpoints of `seeds`; it makes its folder when it first saves."""
    folder = (group / f"checkpoint_{seeds[0]}_{seeds[-1]}").resolve()
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder, options=options)


def save(manager, done, waves, rows):
    """Save the stacked states `waves` and the metrics rows of each seed; return `{seed: state}` on the host."""
    states = dict(zip(rows, (state for wave in waves for state in split(wave)), strict=False))  # a last wave is padded
    leaves = {str(seed): [np.asarray(x) for x in jax.tree.leaves(state)] for seed, state in states.items()}
    args = ocp.args.Composite(state=ocp.args.StandardSave(leaves), rows=ocp.args.JsonSave([*rows.values()]))
    if done != manager.latest_step():
        manager.save(done, args=args)
    return states


def restore(manager, programs, seeds):
    """`({seed: rows}, waves)` of the latest checkpoint, on the devices that `programs` were compiled for."""
    args = ocp.args.Composite(state=ocp.args.StandardRestore(), rows=ocp.args.JsonRestore())
    saved = manager.restore(manager.latest_step(), args=args)
    info = jax.tree.leaves(programs.init.out_info)
    waves = []
    for wave in in_waves(seeds, programs.wave_size):
        states = [saved.state[str(seed)] for seed in wave]
        leaves = [to_device(np.stack(x), like, programs.sharding) for like, *x in zip(info, *states, strict=True)]
        waves.append(jax.tree.unflatten(jax.tree.structure(programs.init.out_info), leaves))
    return dict(zip(seeds, saved.rows, strict=True)), waves


def in_waves(seeds, wave_size):
    """The seeds in lists of `wave_size`; the last one is filled up with copies of the last seed."""
    filled = seeds + [seeds[-1]] * (-len(seeds) % wave_size)
    return [filled[i : i + wave_size] for i in range(0, len(filled), wave_size)]


def split(wave):
    """The states of a wave's seeds as NumPy arrays, random keys as their data; on a CPU they are views, not copies."""
    wave = jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, wave)
    leaves = [[row for shard in x.addressable_shards for row in np.asarray(shard.data)] for x in jax.tree.leaves(wave)]
    return [jax.tree.unflatten(jax.tree.structure(wave), state) for state in zip(*leaves, strict=True)]


def to_device(array, like, sharding):
    """An array as it was before `split`."""
    return jax.device_put(jax.random.wrap_key_data(array) if is_key(like) else array, sharding)


def is_key(x):
    """Whether `x` holds random keys."""
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def delete(manager):
    """Remove all checkpoints: the run is complete."""
    manager.close()
    shutil.rmtree(manager.directory, ignore_errors=True)

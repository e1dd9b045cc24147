"""Checkpoints by Orbax: the states of the runs in progress, written by all processes together.

A checkpoint may be read on another number of devices or processes than wrote it.
"""

import logging
import math
import os
import shutil
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common import devices

logging.getLogger("absl").setLevel(logging.ERROR)


class Position(NamedTuple):
    """How far a command has come: of runs `first` to `last - 1`, `done`; saved in arrays of `at_once` runs, if any."""

    first: int
    last: int
    done: int
    at_once: int = 0


def open_folder(path):
    """Orbax's manager of the checkpoints in `path`; it makes the folder when it first saves."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(path.resolve(), options=options)


def save(manager, step, position, programs, slots, states):
    """Save the states of `slots` as checkpoint `step`, a number that grows: for each wave, arrays over all devices."""
    if step == manager.latest_step():
        return
    used, per_device = programs.devices, programs.per_device
    sharding = NamedSharding(Mesh(np.array(used), ("run",)), PartitionSpec("run"))
    held = {(slot.wave, slot.device): jax.tree.leaves(data(state)) for slot, state in zip(slots, states, strict=True)}
    like = jax.tree.leaves(jax.eval_shape(data, out_info(programs)))
    waves = {}
    for wave in range(math.ceil((position.last - position.first) / (per_device * len(used)))):
        shards = [held.get((wave, device)) or zeros(like, device) for device in programs.epoch]
        leaves = [
            jax.make_array_from_single_device_arrays((per_device * len(used), *x.shape[1:]), sharding, list(parts))
            for x, *parts in zip(like, *shards, strict=True)
        ]
        waves[f"wave_{wave}"] = ocp.args.PyTreeSave(leaves)
    position = ocp.args.JsonSave(position._replace(at_once=per_device * len(used))._asdict())
    manager.save(step, args=ocp.args.Composite(position=position, **waves))


def latest(manager):
    """The `Position` of the latest checkpoint; None without one."""
    if manager.latest_step() is None:
        return None
    args = ocp.args.Composite(position=ocp.args.JsonRestore())
    return Position(**manager.restore(manager.latest_step(), args=args).position)


def restore(manager, position, programs, slots):
    """The states of `slots` in the latest checkpoint, each on its device."""
    like, structure = jax.tree.flatten(out_info(programs))
    wanted = {i for slot in slots for i in slot.places}
    as_numpy = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(like)
    states = {}
    for wave, first in enumerate(range(0, position.last - position.first, position.at_once)):
        args = {f"wave_{wave}": ocp.args.PyTreeRestore(item=as_numpy, restore_args=as_numpy)}
        (saved,) = manager.restore(manager.latest_step(), args=ocp.args.Composite(**args)).values()
        for i in wanted & set(range(first, first + position.at_once)):
            states[i] = [x[i - first] for x in saved]
    restored = []
    for slot in slots:
        chosen = [states[i] for i in filled(slot.places, programs.per_device)]
        leaves = [np.stack(x) for x in zip(*chosen, strict=True)]
        leaves = [jax.device_put(x, slot.device) for x in leaves]
        keys = [jax.random.wrap_key_data(x) if is_key(one) else x for x, one in zip(leaves, like, strict=True)]
        restored.append(jax.tree.unflatten(structure, keys))
    return restored


def filled(places, per_device):
    """The runs that a slot works on: its own, and copies of the last one."""
    return places + places[-1:] * (per_device - len(places))


def zeros(like, device):
    """What stands in a checkpoint for a device without runs."""
    return [jax.device_put(np.zeros(x.shape, x.dtype), device) for x in like]


def out_info(programs):
    """Shapes of the state of a slot."""
    return next(iter(programs.init.values())).out_info


def data(tree):
    """Random keys as their data; all else as it is."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def is_key(x):
    """Whether `x` holds random keys."""
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def delete(manager):
    """Remove all checkpoints: the command is complete."""
    manager.close()
    if devices.is_first() and manager.directory.exists():
        hidden = manager.directory.with_name(f".{manager.directory.name}")
        os.replace(manager.directory, hidden)  # at once: what a kill leaves of them must not pass for a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)

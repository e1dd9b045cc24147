"""Checkpoints by Orbax: the states of the round in progress, written by all processes together; last states in .npz.

A checkpoint can be read by another number of devices or processes than wrote it. Orbax is imported when it is first
used: that takes a second, and a short run needs no checkpoint. The last state of a finished run is in its own folder,
so that it can be extended alone.
"""

import logging
import os
import shutil
from typing import NamedTuple

import jax
import numpy as np

from amortax.common import cli, distributed, record

KEPT_BYTES = 16e6  # the last state of a run is kept by default up to this size

logging.getLogger("absl").setLevel(logging.ERROR)


class Position(NamedTuple):
    """How far a command has come: each of its runs `first` to `last - 1`, a round, has trained `epochs` epochs."""

    first: int
    last: int
    epochs: int


def open_manager(folder):
    """Orbax's manager of the checkpoints in `folder`; it makes the folder when it first saves."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.resolve(), options=options)


def save(folder, position, arrays):
    """Save `position` and a list of arrays over the devices of all processes, in place of the last checkpoint."""
    import orbax.checkpoint as ocp

    where = position._asdict() | {"command": cli.resume_command()}
    args = ocp.args.Composite(position=ocp.args.JsonSave(where), states=ocp.args.PyTreeSave(arrays))
    try:
        with open_manager(folder) as manager:
            manager.save((manager.latest_step() or 0) + 1, args=args)
    except Exception as error:  # Orbax reports a full disk in several ways
        if jax.process_count() > 1:  # another process may be lost
            raise
        raise record.WriteError(0, str(error)[:200], str(folder)) from error


def latest(folder):
    """The `Position` of the checkpoint in `folder`; None without one."""
    saved = read_position(folder)
    return saved and Position(*(saved[name] for name in Position._fields))


def command(folder):
    """The command that continues at the checkpoint in `folder`; None without one, or where it does not tell."""
    return (read_position(folder) or {}).get("command")


def read_position(folder):
    """What `save` has written beside the states, as a dict; None without a checkpoint."""
    if not folder.is_dir():
        return None
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(position=ocp.args.JsonRestore())
    try:
        with open_manager(folder) as manager:
            step = manager.latest_step()
            return None if step is None else dict(manager.restore(step, args=args).position)
    except Exception as error:  # files can be wrong in any way
        how = "without this folder its runs start anew"
        cli.fail(f"--resume: {folder}: its state cannot be read: {str(error)[:200]}; {how}")


def restore(folder, like):
    """The arrays of the checkpoint in `folder` as NumPy arrays; fails unless each is as in the list `like`."""
    import orbax.checkpoint as ocp

    as_numpy = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(like)
    args = ocp.args.Composite(states=ocp.args.PyTreeRestore(item=as_numpy, restore_args=as_numpy))
    try:
        with open_manager(folder) as manager:
            arrays = manager.restore(manager.latest_step(), args=args).states
    except Exception as error:  # files, versions and structures can be wrong in any way
        cli.fail(f"--resume: {folder}: its state cannot be read: {str(error)[:200]}")
    check_arrays(folder, arrays, like)
    return arrays


def check_arrays(path, arrays, like):
    """Fail unless `arrays`, with a leading axis of any size, have the types and the other axes of `like`."""
    for i, (x, y) in enumerate(zip(arrays, like, strict=True)):
        if (x.dtype, x.shape[1:]) != (y.dtype, y.shape[1:]):
            found, expected = (f"{z.dtype}{list(z.shape[1:])}" for z in (x, y))
            cli.fail(f"--resume: {path}: its state cannot be read: array {i} is {found}, the program's {expected}")


def delete(folder):
    """Remove all checkpoints: the command is complete."""
    if distributed.is_first() and folder.is_dir():
        hidden = folder.with_name(f".{folder.name}")
        os.replace(folder, hidden)  # at once: what a kill leaves must not be taken for a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)


# Last states


def is_kept(option, num_bytes):
    """Whether --keep-state asks for the last states, of `num_bytes` a run."""
    return option == "always" or (option == "small" and num_bytes <= KEPT_BYTES)


def keep(folder, epochs, arrays):
    """Write the state of a run after its last epoch to its folder."""
    record.write_arrays(folder / "state.npz", {"epochs": epochs} | {str(i): x for i, x in enumerate(arrays)})


def kept_epochs(folder):
    """After how many epochs the state that a run has kept is; 0 without one."""
    return int(read_kept(folder, ["epochs"])[0]) if (folder / "state.npz").exists() else 0


def read_kept(folder, names):
    """Some of the arrays that `keep` wrote."""
    try:
        with np.load(folder / "state.npz", allow_pickle=False) as file:
            return [file[name] for name in names]
    except Exception as error:  # a file can be wrong in any way
        cli.fail(f"--resume: {folder / 'state.npz'}: its state cannot be read: {error}")


def restore_kept(folders, like):
    """The states that runs have kept, as `restore` gives those of a checkpoint."""
    states = [read_kept(folder, [str(i) for i in range(len(like))]) for folder in folders]
    for folder, arrays in zip(folders, states, strict=True):
        check_arrays(folder / "state.npz", [x[None] for x in arrays], like)
    return [np.stack(arrays) for arrays in zip(*states, strict=True)]

"""Several processes that share the runs of one command, by `jax.distributed`."""

import contextlib
import os
import sys
import traceback
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.extend.backend import clear_backends

from amortax.common import cli

LOST_AFTER = 30  # seconds without a heartbeat until a process counts as lost


def connect(coordinator_address="", num_processes=0, process_id=-1):
    """Join the processes of this command; what is not given, JAX detects from the environment."""
    clear_backends()  # importing gymnax made one, for this process alone
    try:
        jax.distributed.initialize(
            coordinator_address or None,
            num_processes or None,
            process_id if process_id >= 0 else None,
            heartbeat_timeout_seconds=LOST_AFTER,
        )
    except (ValueError, RuntimeError) as error:
        how = "--coordinator-address, --num-processes and --process-id, or start it by Slurm, Open MPI or Kubernetes"
        cli.fail(f"--distributed: {str(error).splitlines()[0]}; give {how}")


class Lost(Exception):
    """An operation of all processes failed: one of them was lost; the message is written for the user."""


@contextlib.contextmanager
def collective():
    """Raise `Lost` where an operation of all processes fails."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # which one depends on the operation
        if jax.process_count() == 1:
            raise
        said = str(error).splitlines()[0]
        how = f"continue in all processes with --resume, here: {cli.resume_command()}"
        raise Lost(f"--distributed: another process was lost ({said}); {how}") from error


def abort(error, message=None) -> NoReturn:
    """End this process at once, with exit code 3: a regular exit would wait for the others, of which one may be lost.

    Prints `message`, or else the traceback of `error`.
    """
    if message is None:
        traceback.print_exception(error)
    else:
        print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(3)


def is_first():
    """Whether this is process 0, which prints and writes the shared files."""
    return jax.process_index() == 0


def print_once(line):
    """Print a line, from process 0."""
    if is_first():
        print(line, flush=True)


def synchronize(name):
    """Wait for the other processes."""
    if jax.process_count() > 1:
        with collective():
            multihost_utils.sync_global_devices(name)


def gather(values):
    """`values [n]` of each process, `[num_processes, n]`."""
    if jax.process_count() == 1:
        return np.array([values])
    with collective():
        return multihost_utils.process_allgather(np.array(values))


def any_process(*flags):
    """For each flag, whether it is true in any process."""
    return gather(flags).any(axis=0)

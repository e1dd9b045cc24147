"""Where programs run: devices and threads of a CPU, several hosts, and how much memory there is."""

import itertools
import os
import re
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.extend.backend import clear_backends

from common import cli

LARGE_PRODUCT = 2_500_000  # multiply-adds; XLA:CPU shares a matrix product of more than about these among threads
CPU_SHARE = 0.45  # of the memory of a machine, for runs: while Orbax writes a checkpoint it holds a copy of them
DEVICE_SHARE = 0.95  # of what XLA may allocate on an accelerator
LOST_AFTER = 30  # seconds without a sign of life until a process counts as lost


def set_up_backend(num_runs=1, largest_product=0):
    """A CPU device for each core or run, and the compilation cache; an environment that says otherwise wins.

    `largest_product` counts the multiply-adds of the largest matrix product of the program.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = os.environ.get("XLA_FLAGS", "") + " ".join(os.environ)
    if "NPROC" not in os.environ:
        # XLA keeps NPROC threads, or one for each device if they are more. Those that have no run of their own take
        # small operations from those that have, and passing them on costs up to a third of the speed. Large products
        # gain from threads, but one thread sums in another order than several do: the choice between one and several
        # must not depend on the number of runs.
        os.environ["NPROC"] = str(max(2, cores)) if largest_product > LARGE_PRODUCT else "1"
        clear_backends()  # importing gymnax makes arrays, and with them a backend
    if "xla_force_host_platform_device_count" not in given and "JAX_NUM_CPU_DEVICES" not in given:
        clear_backends()
        jax.config.update("jax_num_cpu_devices", min(cores, num_runs))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amortax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def largest_product(config):
    """Multiply-adds of a batch, or of what the policy learns from at once, between two hidden layers, at most."""
    sizes = config.hidden_sizes
    rows = max(config.batch_size, config.num_envs * getattr(config, "num_steps", 1), getattr(config, "num_rollouts", 1))
    return rows * max([n * m for n, m in itertools.pairwise(sizes)], default=0)


def cpu_compiler_options():
    """XLA's options on a CPU, as measured on two cores of an Intel Xeon and of an AMD EPYC, but for those in XLA_FLAGS.

    On Intel Eigen for all matrix products is up to a tenth faster than XLA's own choice, YNNPACK for some; on AMD it is
    slower, and vectors of 512 bits are a twentieth faster than those of 256. Level 2 compiles in three quarters of the
    time of level 3, and the program is as fast.
    """
    path = Path("/proc/cpuinfo")
    intel = path.exists() and "GenuineIntel" in path.read_text()
    options = {"xla_cpu_experimental_ynn_fusion_type": ""} if intel else {"xla_cpu_prefer_vector_width": 512}
    options |= {"xla_backend_optimization_level": 2}
    options = {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # a version of XLA that does not know it
        return None
    return options


def connect(options):
    """Join the processes of this command by `jax.distributed`; what no flag says, JAX finds in the environment."""
    clear_backends()  # importing gymnax made one, for this process alone
    try:
        jax.distributed.initialize(
            options.coordinator_address or None,
            options.num_processes or None,
            options.process_id if options.process_id >= 0 else None,
            heartbeat_timeout_seconds=LOST_AFTER,
        )
    except (ValueError, RuntimeError) as error:
        how = "--coordinator-address, --num-processes and --process-id, or start it by Slurm, Open MPI or Kubernetes"
        cli.fail(f"--distributed: {str(error).splitlines()[0]}; give {how}")


def leave(error) -> NoReturn:
    """End this process for `error`, with exit code 3: JAX itself would wait for a process that is lost, and abort."""
    said = str(error)
    if re.search("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|closed by peer|heartbeat|[Bb]arrier", said):
        print(
            f"error: --distributed: another process was lost ({said.splitlines()[0]}); --resume goes on",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(3)


def is_first():
    """Whether this is process 0, which speaks and writes for all."""
    return jax.process_index() == 0


def synchronize(name):
    """Wait for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_says(*flags):
    """For each flag, whether any process raises it."""
    if jax.process_count() == 1:
        return flags
    return multihost_utils.process_allgather(np.array(flags)).any(axis=0)


def for_slots(num):
    """Devices of all processes for `num` slots, as many of each process, in turns."""
    processes = [[d for d in jax.devices() if d.process_index == i] for i in range(jax.process_count())]
    each = -(-num // len(processes))
    return [device for row in zip(*(own[:each] for own in processes), strict=True) for device in row]


def memory():
    """Bytes on each device for the states of runs and the work on them; infinite where nothing says."""
    stats = jax.local_devices()[0].memory_stats()
    limit = float("inf")
    if stats and "bytes_limit" in stats:
        limit = DEVICE_SHARE * stats["bytes_limit"]
    elif jax.default_backend() == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        limit = CPU_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    if jax.process_count() > 1:
        limit = float(multihost_utils.process_allgather(np.float32(limit)).min())
    return limit

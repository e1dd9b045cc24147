"""Devices: how many a CPU has, its threads, XLA's options, and how much memory there is for runs."""

import itertools
import os
from pathlib import Path

import jax
import numpy as np
from jax.extend.backend import clear_backends

from amortax.common import distributed

LARGE_PRODUCT = 2_500_000  # multiply-adds; XLA:CPU splits a larger matrix product among threads
CPU_SHARE = 0.45  # of the memory of a machine, for runs: while Orbax writes a checkpoint it holds a copy of them
DEVICE_SHARE = 0.95  # of what XLA may allocate on an accelerator


def set_up_backend(num_runs=1, largest_product=0):
    """Set up a CPU device for each core or run, and the compilation cache; environment variables take precedence.

    `largest_product` counts the multiply-adds of the largest matrix product of the program.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = os.environ.get("XLA_FLAGS", "") + " ".join(os.environ)
    if "NPROC" not in os.environ:
        # XLA has NPROC threads, but at least one for each device. Threads without a run of their own take small
        # operations from those with one, and the hand-over costs up to a third of the speed. Large products gain from
        # threads, but several threads sum in a different order than one: the choice must not depend on the number of
        # runs.
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
    """Multiply-adds of the product of a batch and the largest pair of hidden layers; 0 where there are none."""
    sizes = getattr(config, "hidden_sizes", ())
    factors = ("batch_size",), ("num_envs", "num_steps"), ("num_rollouts",)  # what may be the rows of a batch
    rows = max(np.prod([getattr(config, name, 1) for name in names]) for names in factors)
    return int(rows) * max([n * m for n, m in itertools.pairwise(sizes)], default=0)


def cpu_compiler_options():
    """XLA's options for a CPU, without those in XLA_FLAGS; measured on two cores of an Intel Xeon and an AMD EPYC.

    On Intel, Eigen for all matrix products is up to a tenth faster than XLA's default, YNNPACK for some; on AMD it is
    slower, and vectors of 512 bits are a twentieth faster than those of 256. Level 2 compiles in three quarters of the
    time of level 3, and the program is as fast.
    """
    path = Path("/proc/cpuinfo")
    intel = path.exists() and "GenuineIntel" in path.read_text()
    options = {"xla_cpu_experimental_ynn_fusion_type": ""} if intel else {"xla_cpu_prefer_vector_width": 512}
    options |= {"xla_backend_optimization_level": 2}
    return known_options(options)


def known_options(options):
    """`options` of XLA without those in XLA_FLAGS; None where this version of XLA does not know one of them."""
    options = {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def choose(number):
    """At most `number` devices, rounded up to equally many of each process, taking the processes in turn."""
    processes = [[d for d in jax.devices() if d.process_index == i] for i in range(jax.process_count())]
    each = -(-number // len(processes))
    return [device for row in zip(*(own[:each] for own in processes), strict=True) for device in row]


def memory():
    """Bytes on each device for runs, the least over all processes; infinite where it is not known."""
    stats = jax.local_devices()[0].memory_stats()
    limit = float("inf")
    if stats and "bytes_limit" in stats:
        limit = DEVICE_SHARE * stats["bytes_limit"]
    elif jax.default_backend() == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        limit = CPU_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    return float(distributed.gather([np.float32(limit)]).min())

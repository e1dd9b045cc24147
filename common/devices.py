"""Devices: how many a CPU has, its threads, XLA's options and compiled programs, and how much memory there is."""

import hashlib
import itertools
import math
import os
import platform
from pathlib import Path

import jax
import numpy as np
from jax.extend.backend import clear_backends

from amortax.common import distributed

LARGE_PRODUCT = 2_500_000  # multiply-adds; XLA:CPU splits a larger matrix product among threads
CPU_SHARE = 0.45  # of the memory of a machine, for runs: while Orbax writes a checkpoint it holds a copy of them
DEVICE_SHARE = 0.95  # of what XLA may allocate on an accelerator
CACHE_BYTES = 2**30  # of compiled programs, at most, when a command starts
ROOT = Path("/")  # where Linux tells of processors and cgroups


def set_up_backend(num_runs=1, largest_product=0):
    """Set up a CPU device for each core or run, and the compilation cache; environment variables take precedence.

    `largest_product` counts the multiply-adds of the largest matrix product of the program.
    """
    cores = num_cores()
    given = os.environ.get("XLA_FLAGS", "") + " ".join(os.environ)
    if "xla_force_host_platform_device_count" not in given and "JAX_NUM_CPU_DEVICES" not in given:
        clear_backends()  # importing gymnax makes arrays, and with them a backend
        jax.config.update("jax_num_cpu_devices", min(cores, num_runs))
    if "NPROC" not in os.environ:
        # XLA has NPROC threads, but at least one for each device. Threads without a run of their own take small
        # operations from those with one, and the hand-over costs up to a third of the speed. Large products gain from
        # threads, but several threads sum in a different order than one: the choice must not depend on the number of
        # runs.
        clear_backends()
        os.environ["NPROC"] = str(max(2, cores)) if largest_product > LARGE_PRODUCT else "1"
        jax.devices()  # starts a backend, which reads it
        del os.environ["NPROC"]  # other commands that this process trains or starts choose for themselves
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        everything = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amortax"
        shrink(everything, CACHE_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(everything / processor()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def processor():
    """A name for the instructions that this processor has: a program compiled for others may crash on it."""
    path = ROOT / "proc/cpuinfo"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    kinds = ("flags", "Features", "vendor_id", "CPU implementer", "model name", "CPU part")
    features = sorted({line for line in lines if line.split(":")[0].strip() in kinds}) or [platform.processor()]
    return f"{platform.machine()}-{hashlib.sha256(chr(10).join(features).encode()).hexdigest()[:12]}"


def shrink(folder, limit):
    """Remove the least recently used files below `folder` until the others have at most `limit` bytes.

    JAX's own bound needs one more package, and a lock at each program.
    """
    files = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    excess = sum(stat.st_size for stat, _ in files) - limit
    for stat, path in sorted(files, key=lambda file: max(file[0].st_atime, file[0].st_mtime)):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= stat.st_size


def cgroup_values(names):
    """The numbers in the files of these names, of this process's control groups and those above them, v1 and v2.

    A file of two numbers, `cpu.max`, is a quota and its period: their quotient. "max" is infinite.
    """
    path = ROOT / "proc/self/cgroup"
    for line in path.read_text().splitlines() if path.exists() else []:
        _, controllers, inside = line.split(":", 2)
        mount = ROOT / "sys/fs/cgroup" / controllers  # v2 has no list of controllers
        for folder in [mount / inside.lstrip("/"), *(mount / inside.lstrip("/")).parents]:
            if folder.is_relative_to(mount):
                yield from (number for number in (read_quotient(folder / name) for name in names) if number)


def read_quotient(path):
    """The number in a file, or the first over the second; infinite for "max" or a negative one, None without it."""
    try:
        first, *second = [math.inf if word == "max" else float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return None
    return (first if first >= 0 else math.inf) / (second[0] if second else 1)


def num_cores():
    """The cores that this process may use: by its affinity, and by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [*cgroup_values(["cpu.max"])]
    for quota, period in zip(cgroup_values(["cpu.cfs_quota_us"]), cgroup_values(["cpu.cfs_period_us"]), strict=True):
        quotas.append(quota / period)
    return max(1, int(min([cores, *quotas])))


def total_memory():
    """Bytes of this machine's memory, or of the part that its container may use; infinite where it is not known."""
    known = "SC_PHYS_PAGES" in os.sysconf_names
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else math.inf
    return min([present, *cgroup_values(["memory.max", "memory.limit_in_bytes"])])


def largest_product(config):
    """Multiply-adds of the product of a batch and the largest pair of hidden layers; 0 where there are none."""
    sizes = getattr(config, "hidden_sizes", ())
    factors = ("batch_size",), ("num_envs", "num_steps"), ("num_rollouts",)  # what may be the rows of a batch
    rows = max(np.prod([getattr(config, name, 1) for name in names]) for names in factors)
    return int(rows) * max([n * m for n, m in itertools.pairwise(sizes)], default=0)


def cpu_compiler_options():
    """XLA's options for a CPU, without those in XLA_FLAGS; measured on two cores of an Intel Xeon and an AMD EPYC.

    On AMD, vectors of 512 bits are a twentieth faster than those of 256. Level 2 compiles in three quarters of the time
    of level 3, and the program is as fast. `xla_cpu_experimental_ynn_fusion_type` stays as it is: without it, Eigen
    computes all matrix products, on Intel up to a tenth faster, but not always rightly where two devices run at once.
    """
    path = ROOT / "proc/cpuinfo"
    intel = path.exists() and "GenuineIntel" in path.read_text()
    vectors = {} if intel else {"xla_cpu_prefer_vector_width": 512}
    return known_options({"xla_backend_optimization_level": 2} | vectors)


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
    elif jax.default_backend() == "cpu":
        limit = CPU_SHARE * total_memory() / jax.local_device_count()
    return float(distributed.gather([np.float32(limit)]).min())

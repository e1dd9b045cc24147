"""Two single-threaded CPU devices and one compilation cache for the tests and the processes that they start."""

import gc
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


def known_to_xla(flags):
    """Whether this version of XLA takes these flags: one that it does not know ends the process."""
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(start, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode == 0


os.environ.setdefault("NPROC", "1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have it from the process that starts them
    # for programs that run for a moment only: compiled in a third of the time, to slower code
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    more = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if known_to_xla(more):
        flags += f" {more}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="amortax-xla-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
sys.path.append(str(Path(__file__).parent.parent / "results"))  # whose scripts import each other
MAPS = Path("/proc/self/maps")
TESTS = itertools.count()


gc.set_threshold(100_000, 50, 100)  # traces are many small objects: by default they are searched again and again


@pytest.fixture(autouse=True)
def forget_programs():
    """A compiled program takes a thousand memory maps, of which Linux gives a process 65,530: forget them in time.

    To count them takes 20 ms, so they are counted after every eighth test.
    """
    yield
    if next(TESTS) % 8 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        import jax

        jax.clear_caches()

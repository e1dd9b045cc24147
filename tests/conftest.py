"""Two single-threaded CPU devices and one compilation cache for the tests and the processes that they start."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("NPROC", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"  # compiles sooner
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="amortax-xla-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
sys.path.append(str(Path(__file__).parent.parent / "results"))  # whose scripts import each other
MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def forget_programs():
    """A compiled program takes a thousand memory maps, of which Linux gives a process 65,530: forget them in time."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        import jax

        jax.clear_caches()

"""Two single-threaded CPU devices and one compilation cache for the tests and the processes that they start."""

import os
import tempfile

os.environ.setdefault("NPROC", "1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="amortax-xla-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

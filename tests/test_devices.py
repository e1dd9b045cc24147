"""Devices: the limits of a container, threads, and the folder of compiled programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import CONFIGS

from amortax.algorithms import td3
from amortax.common import checks, devices

pytestmark = pytest.mark.quick
CPUINFO = "processor : 0\nmodel name : A\ncpu MHz : {mhz}\nflags : fpu sse2 {more}\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 16 cores that tells nothing; call it with `path=text` for each file that it has."""
    monkeypatch.setattr(devices, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))

    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)

    return write


V1 = {"proc/self/cgroup": "4:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n1:name=systemd:/\n"}
V2 = {"proc/self/cgroup": "0::/user/job\n"}
CPU_V1, MEMORY_V1 = "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, 16, None),
        (V2, 16, None),
        (V2 | {"sys/fs/cgroup/user/job/cpu.max": "max 100000\n", "sys/fs/cgroup/memory.max": "max\n"}, 16, None),
        (V2 | {"sys/fs/cgroup/user/job/cpu.max": "250000 100000\n"}, 2, None),
        (V2 | {"sys/fs/cgroup/user/job/cpu.max": "10000 100000\n"}, 1, None),
        (
            V2 | {"sys/fs/cgroup/user/cpu.max": "400000 100000\n", "sys/fs/cgroup/user/memory.max": "1048576\n"},
            4,
            2**20,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "2097152\n"}, 16, 2**21),  # as within a container
        (V1 | {f"{CPU_V1}/cpu.cfs_quota_us": "-1\n", f"{CPU_V1}/cpu.cfs_period_us": "100000\n"}, 16, None),
        (V1 | {f"{CPU_V1}/cpu.cfs_quota_us": "300000\n", f"{CPU_V1}/cpu.cfs_period_us": "100000\n"}, 3, None),
        (V1 | {f"{MEMORY_V1}/docker/x/memory.limit_in_bytes": "1048576\n"}, 16, 2**20),
        (V1 | {f"{MEMORY_V1}/memory.limit_in_bytes": "9223372036854771712\n"}, 16, None),
    ],
)
def test_limits_of_a_container(machine, files, cores, memory):
    """The least along the path of its control group, of either version; None is the whole machine's memory."""
    machine(files)
    assert devices.num_cores() == cores
    assert devices.total_memory() == (memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def test_what_does_not_fit_the_container_is_refused(machine, capsys):
    machine(V2 | {"sys/fs/cgroup/memory.max": "1024\n"})
    with pytest.raises(SystemExit):
        checks.check_config(CONFIGS["td3"], td3.init)
    assert capsys.readouterr().err.startswith("error: --buffer-size 72: a run needs 0.0 GiB; this machine has 0.0 GiB")


COMMANDS = """
import contextlib, os, time
from pathlib import Path
from amortax.common import devices

def threads():
    time.sleep(0.5)  # a thread has its name only once it runs
    found = set()
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that has ended meanwhile
            if "XLAEigen" in path.read_text():
                found.add(path.parent.name)
    return found

given = dict(os.environ)
for product in (10**9, 0, 10**9):
    before = threads()
    devices.set_up_backend(1, product)
    print(len(threads() - before), os.environ == given)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux names the threads of a process")
def test_each_command_of_a_process_has_threads_for_its_own_sizes():
    """Also after another, which leaves nothing in the environment for it or for a process that it starts."""
    env = {name: value for name, value in os.environ.items() if name not in ("NPROC", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run([sys.executable, "-c", COMMANDS], env=env, capture_output=True, text=True, check=True)
    several = max(2, devices.num_cores())
    assert done.stdout.splitlines() == [f"{several} True", "1 True", f"{several} True"]


def test_processors_with_other_instructions_have_other_folders(machine):
    names = {}
    for mhz, more in ((1000, ""), (2000, ""), (1000, "avx512f")):
        machine({"proc/cpuinfo": CPUINFO.format(mhz=mhz, more=more)})
        names[mhz, more] = devices.processor()
    assert names[1000, ""] == names[2000, ""] != names[1000, "avx512f"]


def test_the_oldest_compiled_programs_are_removed(tmp_path):
    for i, name in enumerate(("new", "old/older", "old/oldest")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - i, 1000 - i))
    devices.shrink(tmp_path, 100)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3
    devices.shrink(tmp_path, 20)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"new", "older"}
    devices.shrink(tmp_path / "none", 0)


def test_a_process_uses_the_folder_of_its_processor(tmp_path):
    program = (
        "import jax; from amortax.common import devices; devices.set_up_backend(); "
        "print(jax.config.jax_compilation_cache_dir)"
    )
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / "amortax" / devices.processor())

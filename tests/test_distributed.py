"""Two processes on loopback: the files of one process, a lost process, a refused start, another number of them."""

import os
import signal
import socket
import subprocess

import pytest

from tests.test_run import command, contents, group


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(out, *flags, num_devices=2, num_processes=2, env=None):
    """The processes of one command."""
    port = free_port()
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(num_devices)} | (env or {})
    given = ["--distributed", "--coordinator-address", f"127.0.0.1:{port}", "--num-processes", str(num_processes)]
    return [
        subprocess.Popen(
            command(out, *flags, *given, "--process-id", str(i)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for i in range(num_processes)
    ]


def finish(processes):
    """`[(exit code, stdout, stderr)]` of the processes."""
    said = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The files of three seeds in one process."""
    out = tmp_path_factory.mktemp("one")
    subprocess.run(command(out, "--num-seeds", "3"), check=True, capture_output=True)
    return contents(group(out))


def test_two_processes_of_two_devices_write_the_files_of_one(one_process, tmp_path):
    (first, second) = finish(start(tmp_path, "--num-seeds", "3"))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "interquartile mean of 3 seeds" in first[1]
    assert [line for line in second[1].splitlines() if "Gloo" not in line] == []
    assert contents(group(tmp_path)) == one_process


def test_a_lost_process_ends_the_other_and_one_goes_on_alone(one_process, tmp_path):
    """Longer than the run of `one_process`, whose files it must pass through on the way."""
    processes = start(tmp_path, "--num-seeds", "3", num_devices=1)
    while "return" not in processes[0].stdout.readline():
        assert processes[0].poll() is None
    processes[1].kill()
    (first, second) = finish(processes)
    assert second[0] == -signal.SIGKILL
    assert first[0] == 3, first[2]
    (line,) = [line for line in first[2].splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --distributed: another process was lost")
    assert line.endswith("--resume goes on")
    assert contents(group(tmp_path)) != one_process
    subprocess.run(command(tmp_path, "--num-seeds", "3", "--resume"), check=True, capture_output=True)
    assert contents(group(tmp_path)) == one_process


def test_an_interrupt_of_one_saves_all_and_more_processes_go_on(one_process, tmp_path):
    """The second process is asked to stop; three processes of one device finish what two began."""
    processes = start(tmp_path, "--num-seeds", "3", num_devices=1)
    while "return" not in processes[0].stdout.readline():
        assert processes[0].poll() is None
    processes[1].send_signal(signal.SIGTERM)
    (first, second) = finish(processes)
    assert (first[0], second[0]) == (130, 130), first[2] + second[2]
    assert "interrupted and saved" in first[1]
    codes = [
        code for code, *_ in finish(start(tmp_path, "--num-seeds", "3", "--resume", num_devices=1, num_processes=3))
    ]
    assert codes == [0, 0, 0]
    assert contents(group(tmp_path)) == one_process


def test_mistakes_end_all_processes(one_process, tmp_path):
    """Another run in the folder: each process says so, and none waits for another."""
    subprocess.run(command(tmp_path, "--gamma", "0.5", "--no-plot"), check=True, capture_output=True)
    before = contents(tmp_path)
    for code, _, err in finish(start(tmp_path, num_devices=1)):
        assert code == 2
        assert "holds a different run (config.gamma: 0.5 -> 0.99" in err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--num-processes 2", "go with --distributed"),
        ("--distributed", "coordinator_address should be defined"),
        ("--distributed --coordinator-address nowhere", "must be host:port"),
        ("--distributed --coordinator-address a:1 --num-processes 2 --process-id 2", "must be from 0 to 1"),
    ],
)
def test_flags(tmp_path, flags, said):
    done = subprocess.run(command(tmp_path, *flags.split()), capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --")
    assert said in line

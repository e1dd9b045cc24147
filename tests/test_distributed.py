"""Two processes on loopback: the files of one process, a lost process, a refused start, another number of them."""

import os
import signal
import socket
import subprocess

import pytest
from test_run import command, contents, group

RUN = ["--num-seeds", "3", "--total-steps", "1152"]  # long enough to be stopped


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(out, *flags, num_devices=2, num_processes=2):
    """The processes of one command."""
    port = free_port()
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(num_devices)}
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
    subprocess.run(command(out, *RUN), check=True, capture_output=True)
    return contents(group(out))


def test_two_processes_of_two_devices_write_the_files_of_one(one_process, tmp_path):
    (first, second) = finish(start(tmp_path, *RUN))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "interquartile mean of 3 seeds" in first[1]
    assert [line for line in second[1].splitlines() if "Gloo" not in line] == []
    assert contents(group(tmp_path)) == one_process


def test_interrupted_then_lost_then_finished_by_more_processes(one_process, tmp_path):
    """An interrupt of one saves all; a kill of one ends the other; three processes finish what two began."""
    (first, second) = stopped(start(tmp_path, *RUN, num_devices=1), signal.SIGTERM)
    assert (first[0], second[0]) == (130, 130), first[2] + second[2]
    assert "interrupted and saved" in first[1]

    (first, second) = stopped(start(tmp_path, *RUN, "--resume", num_devices=1), signal.SIGKILL)
    assert (first[0], second[0]) == (3, -signal.SIGKILL), first[2]
    (line,) = [line for line in first[2].splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --distributed: another process was lost")
    assert line.endswith("--resume goes on")
    assert "Traceback" not in first[2]
    assert contents(group(tmp_path)) != one_process

    finished = finish(start(tmp_path, *RUN, "--resume", num_devices=1, num_processes=3))
    assert [code for code, *_ in finished] == [0, 0, 0], finished
    assert contents(group(tmp_path)) == one_process


def stopped(processes, number):
    """What `finish` gives, when the second process gets a signal after the first epoch."""
    while "return" not in processes[0].stdout.readline():
        assert processes[0].poll() is None
    processes[1].send_signal(number)
    return finish(processes)


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

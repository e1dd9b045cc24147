"""Processes on loopback: the files of one process, a lost process, a refused start, another number of them."""

import os
import signal
import socket
import subprocess

import pytest
from test_run import CONFIG, command, contents, execute, group

RUN = ["--num-seeds", "3"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(out, *flags, num_devices=1, num_processes=2, share=1e9):
    """The processes of one command, which save after every epoch unless `share` is less."""
    port = free_port()
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(num_devices)}
    given = ["--distributed", "--coordinator-address", f"127.0.0.1:{port}", "--num-processes", str(num_processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command(out, *flags, *given, "--process-id", str(i), share=share), env=env, **pipes)
        for i in range(num_processes)
    ]


def finish(processes):
    """`[(exit code, stdout, stderr)]` of the processes."""
    said = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def stopped(processes, number):
    """What `finish` gives, when the second process gets a signal after the first epoch."""
    while "return" not in processes[0].stdout.readline():
        assert processes[0].poll() is None
    processes[1].send_signal(number)
    return finish(processes)


def printed(said):
    """The lines of a process on stdout, without those of Gloo."""
    return [line for line in said.splitlines() if "Gloo" not in line]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The files of three seeds in one process."""
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        assert execute(patch, out, *RUN) == 0
    return contents(group(out))


def interrupt(out):
    """Four devices of two processes train three seeds, until an interrupt of one process saves all."""
    (first, second) = stopped(start(out, *RUN, num_devices=2), signal.SIGTERM)
    assert (first[0], second[0]) == (130, 130), first[2] + second[2]
    assert "interrupted and saved after" in first[1]
    assert printed(second[1]) == []


def test_interrupted_then_finished_by_one_process(monkeypatch, one_process, tmp_path):
    """With the files of one process that was not interrupted."""
    interrupt(tmp_path)
    assert contents(group(tmp_path)) != one_process
    assert execute(monkeypatch, tmp_path, *RUN, "--resume") == 0
    assert contents(group(tmp_path)) == one_process


@pytest.mark.slow
def test_interrupted_then_lost_then_finished_by_more_processes(one_process, tmp_path):
    """Two devices resume, and a kill of one process ends the other; three processes finish, with the files of one."""
    interrupt(tmp_path)
    (first, second) = stopped(start(tmp_path, *RUN, "--resume"), signal.SIGKILL)
    assert (first[0], second[0]) == (3, -signal.SIGKILL), first[2]
    (line,) = [line for line in first[2].splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --distributed: another process was lost")
    assert "; continue in all processes with --resume, here: python " in line
    assert "Traceback" not in first[2]
    assert contents(group(tmp_path)) != one_process

    finished = finish(start(tmp_path, *RUN, "--resume", num_processes=3, share=0.05))
    assert [code for code, *_ in finished] == [0, 0, 0], finished
    assert "interquartile mean of 3 seeds" in finished[0][1]
    assert [printed(said) for _, said, _ in finished[1:]] == [[], []]
    assert contents(group(tmp_path)) == one_process
    assert not list(group(tmp_path).glob("*checkpoint*"))


def test_mistakes_end_all_processes(monkeypatch, tmp_path):
    """Another run in the folder: each process says so, and none waits for another."""
    assert execute(monkeypatch, tmp_path, "--gamma", "0.5", "--no-plot") == 0
    before = contents(tmp_path)
    for code, _, err in finish(start(tmp_path)):
        assert code == 2
        assert f"holds a different run (config.gamma: 0.5 -> {CONFIG.gamma}" in err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--num-processes 2", "need --distributed"),
        ("--distributed --coordinator-address nowhere", "must be host:port"),
        ("--distributed --num-processes -1", "must be 1 or more"),
        ("--distributed --coordinator-address a:1 --num-processes 2 --process-id 2", "must be from 0 to 1"),
    ],
)
def test_flags(monkeypatch, capsys, tmp_path, flags, said):
    assert execute(monkeypatch, tmp_path, *flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --")
    assert said in line


def test_nothing_to_connect_to(tmp_path):
    done = subprocess.run(command(tmp_path, "--distributed"), capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --distributed: ")
    assert "coordinator_address should be defined" in line

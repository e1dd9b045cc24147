"""The runner: the same bytes for a seed in any company, and nothing lost to a kill, an interrupt or a mistake."""

import csv
import dataclasses
import functools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALGORITHMS, CONFIGS, assert_close, assert_same, replace

from amortax.algorithms import fqi, td3
from amortax.common import (
    checkpoint,
    checks,
    cli,
    devices,
    divergence,
    evaluation,
    milp,
    plot,
    policy,
    programs,
    record,
    run,
)

SCRIPT = Path(td3.__file__)
CONFIG = replace(CONFIGS["td3"], total_steps=160)  # six epochs
STEPS = [80, 96, 112, 128, 144, 160]
THREE = ("--num-seeds", "3")  # two rounds on two devices


def flags_of(config):
    """The flags that give a configuration."""
    changed = [field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]
    values = {name: getattr(config, name) for name in changed}
    words = lambda value: () if value is True else map(str, value if isinstance(value, tuple) else (value,))
    return [word for name, value in values.items() for word in ("--" + name.replace("_", "-"), *words(value))]


# the runner, but with another share of its time for checkpoints
SCRIPT_WITH_SHARE = f"""
import runpy
from amortax.common import run
run.CHECKPOINT_SHARE = %g
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def command(out, *flags, share=1e9):
    """The words of a process of the command line that saves, by default, after every epoch."""
    return [sys.executable, "-c", SCRIPT_WITH_SHARE % share, *flags_of(CONFIG), "--out", str(out), *flags]


COMPILE = programs.compile_programs


@functools.lru_cache(maxsize=8)
def compiled(config, init, epoch, runs_per_device, device, structure, shapes):
    """Programs for one device, and for what the runs share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "choose", lambda _: [device])
        shared = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes])
        return COMPILE(config, init, epoch, runs_per_device, runs_per_device, shared)


def compile_once(config, init, epoch, num_runs, runs_per_device=1, shared=()):
    """`compile_programs`, but compiled once for the commands of all tests, whose hyperparameters are arguments."""
    config = jax.tree.map(lambda x: type(x)(0), config)
    used = devices.choose(math.ceil(num_runs / runs_per_device))
    arrays, structure = jax.tree.flatten(shared)
    shapes = tuple(x.shape for x in arrays)
    parts = [compiled(config, init, epoch, runs_per_device, device, structure, shapes) for device in used]
    both = [x.init[0] for x in parts], [x.epoch[0] for x in parts]
    return programs.Programs(*both, used, used, runs_per_device, shared)


def execute(monkeypatch, out, *flags, module=td3, config=CONFIG, epoch=None):
    """Run the command in this process, without compiling what an earlier one has compiled; returns its exit code."""
    monkeypatch.setattr(programs, "compile_programs", compile_once)
    monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *flags_of(config), "--out", str(out), *flags])
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit) as end:
            run.main(module.Config, module.init, epoch or module.epoch, module.num_epochs)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    return end.value.code


def interrupt_after(patch, num_epochs):
    """Let the next command be interrupted after this many epochs; returns a list that grows by one each epoch."""
    asked, epochs, advance = threading.Event(), [], programs.advance

    def counted(*args):
        epochs.append(1)
        if len(epochs) == num_epochs:
            asked.set()
        return advance(*args)

    if num_epochs == 0:
        asked.set()
    patch.setattr(run, "catch_interrupts", lambda: asked)
    patch.setattr(programs, "advance", counted)
    return epochs


def use_devices(patch, number):
    """Let the next commands find this many devices."""
    choose = devices.choose
    patch.setattr(devices, "choose", lambda n: choose(n)[:number])


def group(out, name="default", algorithm="td3", env="Pendulum-v1"):
    return Path(out) / algorithm / env / name


def contents(folder):
    """Bytes of every visible file below `folder`, by relative path."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


class Killed(BaseException):
    """Ends a command in this process as a kill would, at a chosen place."""


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Three seeds on two devices without a break, by a process: its output, and its files as `contents`."""
    out = tmp_path_factory.mktemp("unbroken")
    done = subprocess.run(command(out, *THREE), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr, group=group(out), contents=contents(group(out)))


@pytest.fixture(scope="module")
def unbroken(shell):
    """The files of three seeds that ran without a break."""
    return shell.contents


def assert_finished(out, unbroken):
    """The files are those of the unbroken run, and nothing else is left."""
    assert contents(group(out)) == unbroken
    assert sorted(path.name for path in group(out).iterdir()) == ["curve.png", "seed_0", "seed_1", "seed_2"]
    assert not [path for path in group(out).rglob(".*") if path.is_file()]


# Files and output


def test_layout(unbroken):
    names = {f"seed_{seed}/{name}" for seed in range(3) for name in record.RUN_FILES}
    assert set(unbroken) == names | {"curve.png"}
    described = json.loads(unbroken["seed_1/config.json"])
    assert (described["algorithm"], described["seed"]) == ("td3", 1)
    assert described["config"] | {"hidden_sizes": (8, 8)} == {**vars(CONFIG)}
    rows = list(csv.DictReader(unbroken["seed_1/metrics.csv"].decode().splitlines()))
    assert [int(row["step"]) for row in rows] == STEPS
    assert unbroken["curve.png"].startswith(b"\x89PNG")


def test_plain_lines_when_piped(shell):
    first, *epochs, summary, where = shell.out.splitlines()
    assert first == "compiling"
    assert len(epochs) == 12
    for i, line in enumerate(epochs):
        start = f"round {i // 6 + 1} of 2, epoch {i % 6 + 1} of 6  {STEPS[i % 6]} steps  return "
        assert re.fullmatch(re.escape(start) + r"-\d+\.\d  [\d,.]+ steps/s  \d+ s left", line), line
    finals = [record.read_metrics(shell.group / f"seed_{seed}")["eval_return_mean"][-1] for seed in range(3)]
    assert summary.startswith(f"greedy return after 160 steps: {np.mean(finals):.1f} (interquartile mean of 3 seeds, ")
    assert f"worst {min(finals):.1f}" in summary
    assert where == f"results: {shell.group}"
    assert "\x1b" not in shell.out
    assert shell.err == ""


def as_a_user():
    """The environment of a process without what the tests set: threads, devices and compiler are a user's."""
    ours = ("NPROC", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    return {name: value for name, value in os.environ.items() if name not in ours}


def test_files_hold_what_init_and_epoch_return(monkeypatch, capsys, tmp_path):
    """Bitwise what the runner's programs return, and up to rounding what `init` and `epoch` do by themselves."""
    assert execute(monkeypatch, tmp_path, "--seed", "1", "--no-plot") == 0
    assert not (group(tmp_path) / "curve.png").exists()
    compiled = compile_once(CONFIG, td3.init, td3.epoch, 1)
    batch = programs.place(compiled, [CONFIG], [1])
    states, metrics = programs.start(compiled, batch), []
    state = cases.programs("td3").init(CONFIGS["td3"], jax.random.key(1))
    for _ in STEPS:
        states, outs = programs.advance(compiled, batch, states)
        metrics.append(programs.by_run(batch, outs)[0][0])
        state, alone = cases.programs("td3").epoch(CONFIGS["td3"], state)
        assert_close(tuple(metrics[-1]), tuple(alone), rtol=1e-3)
    metrics = jax.tree.map(lambda *x: np.stack(x), *metrics)
    folder = group(tmp_path) / "seed_1"
    rows = record.read_metrics(folder)
    for name in set(metrics._fields) - {"eval_returns"}:
        np.testing.assert_array_equal(rows[name], np.asarray(getattr(metrics, name), float))
    returns = np.asarray(metrics.eval_returns, np.float64)
    np.testing.assert_array_equal(rows["eval_return_mean"], returns.mean(axis=1))
    np.testing.assert_array_equal(rows["eval_return_std"], returns.std(axis=1))
    mean, deviation = returns[-1].mean(), returns[-1].std()
    said = f"greedy return after 160 steps: {mean:.1f} (mean over episodes, standard deviation {deviation:.1f})"
    assert said in capsys.readouterr().out.splitlines()
    _, config, params = policy.load(folder)
    assert vars(config) == vars(CONFIG)
    assert_same(jax.tree.leaves(params), jax.tree.leaves(jax.device_get(programs.by_run(batch, states)[0].params)))


def test_a_warning_is_one_line_at_the_start(tmp_path):
    """Once for each environment, before the first epoch is trained."""
    small = flags_of(replace(CONFIGS["svg"], env="PointRobot-misc"))
    again = [sys.executable, ALGORITHMS["svg"].__file__, *small, "--no-plot", "--out", str(tmp_path)]
    done = subprocess.run(again, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    warning = "warning: the reward of PointRobot-misc has no gradient by the state for svg to follow"
    assert lines.count(warning) == 1
    assert lines.index(warning) < lines.index("compiling")


@pytest.mark.quick
def test_flags_of_xla_are_left_alone(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert devices.cpu_compiler_options()["xla_backend_optimization_level"] == 2
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")
    assert "xla_backend_optimization_level" not in devices.cpu_compiler_options()


@pytest.mark.parametrize(
    ("number", "flags"), [(2, "--seed 2"), (2, "--seed 1 --num-seeds 5"), (1, "--seed 1 --num-seeds 2")]
)
def test_seed_is_bitwise_the_same_in_any_company(monkeypatch, unbroken, tmp_path, number, flags):
    use_devices(monkeypatch, number)
    assert execute(monkeypatch, tmp_path, *flags.split()) == 0
    for name, data in contents(group(tmp_path) / "seed_2").items():
        assert data == unbroken[f"seed_2/{name}"], name


@pytest.mark.slow
def test_seeds_on_two_devices_do_not_disturb_each_other(tmp_path):
    """Each of two seeds alone and beside the other, with threads, devices and compiler as a user has them.

    XLA shares products of this size among threads, and Eigen's go wrong where two programs run at once.
    """
    flags = "--env Breakout-MinAtar --total-steps 65536 --steps-per-epoch 65536 --num-envs 64 --num-steps 128"
    flags += " --update-epochs 4 --num-minibatches 8 --activation relu --num-eval-episodes 2 --no-plot"
    for words in ("--name together --num-seeds 2", "--name alone_0", "--name alone_1 --seed 1"):
        command = [sys.executable, "-m", "amortax.algorithms.ppo", *flags.split(), *words.split(), "--out", tmp_path]
        done = subprocess.run(command, env=as_a_user(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    files = lambda name: contents(group(tmp_path, name, "ppo", "Breakout-MinAtar"))
    for seed in range(2):
        alone, together = files(f"alone_{seed}"), files("together")
        assert f"seed_{seed}/metrics.csv" in alone
        assert alone == {name: data for name, data in together.items() if name.startswith(f"seed_{seed}/")}


@pytest.mark.parametrize(
    ("seconds", "steps", "said"),
    [
        (900, 1_000, "evaluations took about 30% of the time; less with fewer --num-eval-episodes"),
        (1_800, 1_000, ""),
        (299, 1_000, ""),
        (900, 25_601, ""),
    ],
)
def test_time_of_evaluations_is_said_where_it_is_much(seconds, steps, said, monkeypatch, capsys):
    """Three epochs, each with an evaluation of 90 seconds of up to 128 * 200 steps of Pendulum-v1."""
    training = SimpleNamespace(runs=[record.Run(td3.Config(), 0, None)], algorithm=vars(td3), programs=None)
    monkeypatch.setattr(evaluation, "evaluation_seconds", lambda *_: 90.0)
    evaluation.report(training, None, None, [{"step": i * steps} for i in range(3)], seconds)
    assert capsys.readouterr().out[: len(said) or None] == said


def test_an_evaluation_is_timed_by_itself(monkeypatch, capsys, tmp_path):
    """Of 3 seeds on two devices, of a file's own `evaluate`; once, not in each round."""
    monkeypatch.setattr(evaluation, "SECONDS", 0)
    monkeypatch.setattr(evaluation, "SHARE", 0)
    assert execute(monkeypatch, tmp_path, *THREE, "--no-plot") == 0
    said = capsys.readouterr().out
    assert "round 2 of 2" in said
    assert said.count("evaluations took about ") == 1


def test_same_command_again_gives_the_same_bytes(monkeypatch, capsys, tmp_path):
    """Short commands write no checkpoint; where they do, the files are the same, and a complete run is left alone."""
    saves, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: (saves.append(args[1]), save(*args)))
    assert execute(monkeypatch, tmp_path) == 0
    assert run.SAVE_SECONDS / run.CHECKPOINT_SHARE == 20
    assert saves == []
    first = contents(tmp_path)
    monkeypatch.setattr(run, "CHECKPOINT_SHARE", 1e9)
    assert execute(monkeypatch, tmp_path) == 0
    assert saves == [(0, 1, epochs) for epochs in range(1, 6)]
    assert contents(tmp_path) == first
    capsys.readouterr()
    assert execute(monkeypatch, tmp_path, "--resume") == 0
    assert "this run is complete; nothing to resume" in capsys.readouterr().out
    assert contents(tmp_path) == first
    assert not list(group(tmp_path).glob("checkpoint_*"))  # which would pass for an unfinished run


def test_different_run_is_not_overwritten(monkeypatch, capsys, tmp_path):
    assert execute(monkeypatch, tmp_path, "--no-plot") == 0
    first = contents(tmp_path)
    capsys.readouterr()
    for flags in (["--gamma", "0.5"], ["--gamma", "0.5", "--resume"]):
        assert execute(monkeypatch, tmp_path, *flags) == 2
        line = capsys.readouterr().err
        assert "config.gamma: 0.99 -> 0.5" in line
        assert ("--resume" if "--resume" in flags else "--name default") in line
        assert contents(tmp_path) == first
    edited = record.read_config(group(tmp_path) / "seed_0") | {"source_sha256": "0" * 64}
    record.write_config(group(tmp_path) / "seed_0", edited)
    assert execute(monkeypatch, tmp_path) == 2
    assert "source_sha256" in capsys.readouterr().err
    assert execute(monkeypatch, tmp_path, "--name", "other", "--gamma", "0.5", "--no-plot") == 0


def test_counts_of_steps_are_rounded_up(monkeypatch, tmp_path):
    """16 environments fit no round number: 1,000 and 2,500 steps become 63 and 157 iterations."""
    config = replace(CONFIG, num_envs=16, total_steps=2500, learning_starts=1000, steps_per_epoch=1000, buffer_size=999)
    assert execute(monkeypatch, tmp_path, "--no-plot", config=config) == 0
    assert record.read_metrics(group(tmp_path) / "seed_0")["step"].tolist() == [2 * 1008, 3 * 1008]


# Interrupts, kills, resuming


def test_interrupt_saves_and_resumes(monkeypatch, capsys, unbroken, tmp_path):
    """Two devices hold two of three seeds; one device resumes the first of them and restarts the second."""
    process = subprocess.Popen(command(tmp_path, *THREE), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "return" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    words = shlex.join(["python", str(SCRIPT), *flags_of(CONFIG), "--out", str(tmp_path), *THREE, "--resume"])
    assert re.search(r"interrupted and saved after \d+ steps; continue with: " + re.escape(words) + "\n", out)
    assert "Traceback" not in err
    broken = contents(group(tmp_path))
    files = {f"seed_{seed}/{name}" for seed in range(2) for name in record.RUN_FILES[:-1]}  # no state.npz yet
    assert {name for name in broken if name.startswith("seed_")} == files | {"seed_2/config.json"}
    # neither the same command without --resume nor another range of seeds may run over it
    for others in (THREE, ["--seed", "2"], ["--seed", "2", "--resume"]):
        assert execute(monkeypatch, tmp_path, *others) == 2
        assert capsys.readouterr().err.endswith(f"holds an unfinished run; continue it with: {words}\n")
    assert contents(group(tmp_path)) == broken
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    again = subprocess.run(command(tmp_path, *THREE, "--resume"), capture_output=True, text=True, env=env)
    assert again.returncode == 0, again.stderr
    assert "round 3 of 3, epoch 6 of 6" in again.stdout
    assert_finished(tmp_path, unbroken)


def test_interrupt_before_the_first_epoch(monkeypatch, capsys, tmp_path, unbroken):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        assert execute(patch, tmp_path) == 130
    assert "interrupted before the first epoch; continue with: python td3.py --total-steps " in capsys.readouterr().out
    assert set(contents(group(tmp_path))) == {"seed_0/config.json"}
    assert execute(monkeypatch, tmp_path, "--resume", "--no-plot") == 0
    for name, data in contents(group(tmp_path) / "seed_0").items():
        assert data == unbroken[f"seed_0/{name}"], name


def test_interrupt_in_the_second_round(monkeypatch, capsys, unbroken, tmp_path):
    with monkeypatch.context() as patch:
        epochs = interrupt_after(patch, 8)
        assert execute(patch, tmp_path, *THREE) == 130
        assert "interrupted and saved after 96 steps" in capsys.readouterr().out
        assert len(epochs) == 8
        run.catch_interrupts().clear()
        assert execute(patch, tmp_path, *THREE, "--resume") == 0
        assert len(epochs) == 6 + 6
    assert_finished(tmp_path, unbroken)


def test_resume_between_two_rounds(monkeypatch, capsys, unbroken, tmp_path):
    """Without a checkpoint, the runs that are complete are left alone, and the others are trained."""
    assert execute(monkeypatch, tmp_path, *THREE) == 0
    (group(tmp_path) / "seed_2" / "policy.npz").unlink()
    before = {path: path.stat().st_mtime_ns for path in group(tmp_path).glob("seed_[01]/[mp]*")}
    capsys.readouterr()
    assert execute(monkeypatch, tmp_path, *THREE, "--resume") == 0
    assert capsys.readouterr().out.count("return -") == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_finished(tmp_path, unbroken)


def test_states_with_arrays_of_no_elements_are_saved_and_resumed(monkeypatch, tmp_path):
    """Bitwise as unbroken: Orbax cannot save such arrays, and they come back with their shapes and types."""
    config = replace(CONFIG, env="Empty-test")
    assert execute(monkeypatch, tmp_path / "unbroken", config=config) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert execute(patch, tmp_path / "broken", config=config) == 130
    assert execute(monkeypatch, tmp_path / "broken", "--resume", config=config) == 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("number", [1, 2])
def test_resume_with_another_number_of_devices(monkeypatch, unbroken, tmp_path, number):
    """From two devices to one, killed there while the second run, restarted, is behind the checkpoint of both."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert execute(patch, tmp_path, *THREE) == 130
    with monkeypatch.context() as patch:

        def killed(folder, position, arrays):
            assert position == (1, 2, 1)
            raise Killed

        use_devices(patch, 1)
        interrupt_after(patch, 3 + 1)
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(Killed):
            execute(patch, tmp_path, *THREE, "--resume")
    assert [record.num_rows(group(tmp_path) / f"seed_{seed}") for seed in range(3)] == [6, 1, 0]
    (folder,) = group(tmp_path).glob("checkpoint_*")
    assert checkpoint.latest(folder) == (0, 2, 3)
    use_devices(monkeypatch, number)
    assert execute(monkeypatch, tmp_path, *THREE, "--resume") == 0
    assert_finished(tmp_path, unbroken)


def test_killed_while_it_removes_its_checkpoint(monkeypatch, unbroken, tmp_path):
    """Of the checkpoint, a file is gone: what is left must not be taken for one."""

    def killed(folder, **_):
        next(Path(folder).rglob("manifest.ocdbt")).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "CHECKPOINT_SHARE", 1e9)
        patch.setattr(checkpoint, "shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(Killed):
            execute(patch, tmp_path, *THREE)
    assert len([path for path in group(tmp_path).iterdir() if "checkpoint" in path.name]) == 1
    assert execute(monkeypatch, tmp_path, *THREE, "--resume") == 0
    assert_finished(tmp_path, unbroken)


def check_whole(files):
    """Every visible file of an unfinished run can be read."""
    for name, data in files.items():
        if name.endswith("config.json"):
            assert json.loads(data)["algorithm"] == "td3"
        elif name.endswith("metrics.csv"):
            rows = list(csv.DictReader(data.decode().splitlines()))
            assert data.endswith(b"\n")
            assert all(None not in row.values() for row in rows)
        elif name.endswith("curve.png"):
            assert data.rstrip().endswith(b"IEND\xaeB`\x82")


def test_killed_at_random_moments(monkeypatch, unbroken, tmp_path):
    """Two kills, each of a run that resumes what the last one left; then the files of an unbroken run."""
    moments = random.Random(0)
    codes = []
    for i in range(2):
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        process = subprocess.Popen(command(tmp_path, *THREE, *["--resume"] * (i > 0)), **quiet)
        for _ in range(1 + moments.randint(0, 3)):  # "compiling", and so many epochs
            process.stdout.readline()
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.communicate()
        codes.append(process.returncode)
        check_whole({k: v for k, v in contents(group(tmp_path)).items() if "checkpoint" not in k})
    assert set(codes) <= {0, -signal.SIGKILL}  # a slow test may meet the last process at its end
    assert -signal.SIGKILL in codes
    assert execute(monkeypatch, tmp_path, *THREE, "--resume") == 0
    assert_finished(tmp_path, unbroken)


def test_resume_lists_every_difference(monkeypatch, capsys, tmp_path):
    checks.check_folders(group(tmp_path), SCRIPT, [record.Run(CONFIG, 0, group(tmp_path))], {}, cli.Options())
    assert execute(monkeypatch, tmp_path, "--resume", "--gamma", "0.9", "--hidden-sizes", "4") == 2
    line = capsys.readouterr().err
    assert "config.gamma: 0.99 -> 0.9" in line
    assert "config.hidden_sizes: [8, 8] -> [4]" in line
    assert line.endswith("; it was run with --hidden-sizes 8 8 --gamma 0.99\n")


# Rounds and memory


def test_runs_that_share_a_device_are_vmapped(tmp_path):
    """As on a GPU: two runs on a device, one and a copy on the other, equal single runs but for rounding."""
    pairs = compile_once(CONFIG, td3.init, td3.epoch, 3, runs_per_device=2)
    batch = programs.place(pairs, [CONFIG] * 3, [0, 1, 2])
    assert batch.run_indices == [[0, 1], [2]]
    assert [seeds.tolist() for seeds in batch.seeds] == [[0, 1], [2, 2]]
    states = programs.start(pairs, batch)
    checkpoint.save(tmp_path / "checkpoint", checkpoint.Position(0, 3, 1), programs.to_arrays(pairs, states))
    # a checkpoint of this layout continues in the other one, with a run at a time on a device
    assert checkpoint.latest(tmp_path / "checkpoint") == (0, 3, 1)
    single = compile_once(CONFIG, td3.init, td3.epoch, 3)
    arrays = checkpoint.restore(tmp_path / "checkpoint", programs.array_shapes(single))
    restored = programs.from_arrays(single, arrays, single.round_size)
    single_batch = programs.place(single, [CONFIG] * 2, [0, 1])
    assert single_batch.run_indices == [[0], [1]]
    fresh = programs.by_run(single_batch, programs.start(single, single_batch))
    saved, again = programs.by_run(batch, states), programs.by_run(single_batch, restored)
    for i in range(2):
        assert_same(saved[i], again[i])
        assert_close(saved[i].params, fresh[i].params, rtol=1e-6, atol=1e-7)
    _, outs = programs.advance(pairs, batch, states)
    _, expected = programs.advance(single, single_batch, restored)
    outs, expected = programs.by_run(batch, outs), programs.by_run(single_batch, expected)
    assert sorted(outs) == [0, 1, 2]
    for i in range(2):
        (metrics, finite), (alone, _) = outs[i], expected[i]
        assert finite
        assert metrics.step == 80
        np.testing.assert_allclose(metrics.critic_loss, alone.critic_loss, rtol=1e-3)


def test_as_many_runs_on_a_device_as_its_memory_holds(monkeypatch, capsys, tmp_path):
    """On a GPU all runs share its memory; where they do not fit, fewer are trained at once, and at least one must."""

    def as_on_a_gpu(config, init, epoch, num_runs, runs_per_device=2, shared=()):
        return compile_once(config, init, epoch, num_runs, runs_per_device, shared)

    one, two = (programs.memory(compile_once(CONFIG, td3.init, td3.epoch, 4, size)) for size in (1, 2))
    buffers = jax.tree.leaves(jax.eval_shape(td3.init, CONFIG, jax.random.key(0)))
    assert sum(x.size * x.dtype.itemsize for x in buffers) <= one < two
    monkeypatch.setattr(programs, "compile_programs", as_on_a_gpu)
    for limit, size in ((two, 2), (two - 1, 1), (one, 1)):
        fitted = programs.compile_to_fit(CONFIG, td3.init, td3.epoch, 4, limit)
        assert (fitted.runs_per_device, fitted.round_size) == (size, 2 * size)
    monkeypatch.setattr(devices, "memory", lambda: one - 1)
    assert execute(monkeypatch, tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: a run needs 0.0 GiB of its device; 0.0 GiB are available")


# Diverged seeds


def is_even(key):
    return jax.random.key_data(key)[0] % 2 == 0


def poisoned_epoch(config, state):
    """TD3's epoch, but at step 112 every seed whose key is even loses its actor."""
    state, metrics = td3.epoch(config, state)
    hit = (metrics.step == 112) & is_even(state.key_eval)
    actor = jax.tree.map(lambda x: jnp.where(hit, jnp.nan, x), state.params.actor)
    return state._replace(params=state.params._replace(actor=actor)), metrics


def test_diverged_seeds_are_named_and_the_others_finish(monkeypatch, capsys, tmp_path):
    init = compile_once(CONFIG, td3.init, td3.epoch, 1).init[0]
    configs = programs.place(compile_once(CONFIG, td3.init, td3.epoch, 1), [CONFIG], [0]).configs[0]
    keys = [init(configs, jnp.array([seed])).key_eval[0] for seed in range(4)]
    lost = [seed for seed, key in enumerate(keys) if is_even(key)]
    assert 0 < len(lost) < 4, "choose a rule that hits some of the seeds"
    assert execute(monkeypatch, tmp_path, "--num-seeds", "4", epoch=poisoned_epoch) == 1
    said = capsys.readouterr()
    named = [line for line in said.err.splitlines() if "diverged" in line]
    assert named == [f"seed {s} diverged: parameters are not finite after 112 steps" for s in lost]
    healthy = next(seed for seed in range(4) if seed not in lost)
    ended = record.read_metrics(group(tmp_path) / f"seed_{lost[0]}")
    assert ended["step"].tolist() == [80, 96, 112]
    assert ended["finite"].tolist() == [1, 1, 0]
    rows = record.read_metrics(group(tmp_path) / f"seed_{healthy}")
    assert rows["step"].tolist() == STEPS
    assert np.isfinite(list(rows.values())).all()
    title = plot.curve(group(tmp_path)).axes[0].get_title()
    assert f"{len(lost)} of 4 seeds diverged" in title
    with pytest.raises(SystemExit):
        policy.load(group(tmp_path) / f"seed_{lost[0]}")
    assert "diverged" in capsys.readouterr().err


def test_all_seeds_diverge(monkeypatch, capsys, tmp_path):
    assert execute(monkeypatch, tmp_path, "--learning-rate", "1e38") == 1
    said = capsys.readouterr()
    assert said.err == "seed 0 diverged: loss (critic_loss, actor_loss) is not finite after 80 steps\n"
    assert "greedy return" not in said.out
    assert said.out.count("epoch ") == 1  # the command ends with its last run
    files = contents(group(tmp_path))
    assert set(files) == {"curve.png", *(f"seed_0/{name}" for name in ("config.json", "metrics.csv", "policy.npz"))}
    assert execute(monkeypatch, tmp_path, "--learning-rate", "1e38", "--resume") == 1
    said = capsys.readouterr()
    assert "nothing to resume" in said.out
    assert said.err == "seed 0 diverged after 80 steps\n"
    assert contents(group(tmp_path)) == files


@pytest.mark.parametrize(
    ("name", "env", "quantity"),
    [
        ("td3", "RewardNaN-test", "reward"),
        ("td3", "ObsNaN-test", "observation"),
        ("fqi", "RewardNaN-test", "reward"),
        ("reinforce", "RewardNaN-test", "reward"),
        ("svg", "RewardNaN-test", "reward"),
    ],
)
def test_the_first_quantity_that_is_not_finite_is_named(monkeypatch, capsys, tmp_path, name, env, quantity):
    """The environment fails from its third step on; the run ends at the next epoch, of two or more."""
    config = replace(CONFIGS[name], env=env)
    assert execute(monkeypatch, tmp_path, "--no-plot", module=ALGORITHMS[name], config=config) == 1
    said = capsys.readouterr().err.splitlines()
    columns = record.read_metrics(group(tmp_path, algorithm=name, env=env) / "seed_0")
    assert (
        said[-1]
        == f"seed 0 diverged: {quantity} is not finite after {record.amount({n: x[-1] for n, x in columns.items()})}"
    )
    assert columns["finite"].tolist() == [0]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "quantity"), [("svg", "reward is"), ("shac", "loss (objective) is"), ("svg_model", "loss (objective) is")]
)
def test_an_objective_that_is_not_finite_is_a_divergence(name, quantity):
    """Even where every other number is finite; where nothing but rewards is in it, these are named."""
    metrics = ALGORITHMS[name].Metrics._make(np.ones(len(ALGORITHMS[name].Metrics._fields)))
    state = SimpleNamespace(params=np.ones(3))
    assert divergence.is_finite(state, metrics)
    metrics = metrics._replace(objective=np.float64(np.inf))
    assert not divergence.is_finite(state, metrics)
    assert divergence.first_quantity({}, CONFIGS[name], state, metrics) == quantity


def test_a_diverged_run_ends_alike_where_the_others_were_interrupted(monkeypatch, tmp_path):
    """Killed before, and interrupted after some seeds diverged: the files are those of an unbroken command."""
    flags = ("--num-seeds", "2")
    assert execute(monkeypatch, tmp_path / "unbroken", *flags, epoch=poisoned_epoch) == 1
    for num_epochs in (2, 2):
        with monkeypatch.context() as patch:
            interrupt_after(patch, num_epochs)
            patch.setattr(run, "CHECKPOINT_SHARE", 1e9)
            resume = ["--resume"] if (tmp_path / "broken").exists() else []
            assert execute(patch, tmp_path / "broken", *flags, *resume, epoch=poisoned_epoch) == 130
    assert execute(monkeypatch, tmp_path / "broken", *flags, "--resume", epoch=poisoned_epoch) == 1
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


# Curves


@pytest.mark.quick
def test_iqm_and_interval():
    values = np.array([8.0, 1, 7, 2, 6, 3, 5, 4])
    assert plot.iqm(values) == pytest.approx(4.5)  # the mean of 3, 4, 5, 6
    assert plot.iqm(np.array([-1e9, *values[1:7], 1e9])) == pytest.approx(plot.iqm(values), abs=0.6)
    low, high = plot.interval(np.stack([values, np.full(8, 2.0)], axis=1))
    assert low[1] == high[1] == 2
    assert 1 <= low[0] < 4.5 < high[0] <= 8
    # the interval covers the center of a normal sample about 95 times in 100
    samples = np.random.default_rng(0).normal(size=(40, 300))
    low, high = plot.interval(samples)
    assert 0.89 <= np.mean((low < 0) & (high > 0)) <= 0.99


@pytest.mark.quick
def test_curve_has_labels_band_and_thin_lines(tmp_path):
    folder = tmp_path / "td3" / "Env" / "run"
    for seed, final in enumerate([1.0, 2.0, 3.0, 4.0]):
        rows = [{"step": s, "eval_return_mean": final * s, "finite": 1} for s in (10, 20)]
        record.write_rows(folder / f"seed_{seed}" / "metrics.csv", rows)
    axes = plot.curve(folder).axes[0]
    assert axes.get_xlabel() == "environment steps"
    assert axes.get_ylabel() == "greedy return (sum of rewards per episode)"
    assert axes.get_title() == "td3 on Env"
    *thin, mean = axes.get_lines()
    assert len(thin) == 4
    np.testing.assert_allclose(mean.get_ydata(), [25, 50])  # the mean of the seeds 2 and 3
    assert len(axes.collections) == 1


# Other algorithms on the command line


def execute_other(monkeypatch, out, name, *flags, **changes):
    """`execute` with another algorithm's small configuration."""
    config = replace(CONFIGS[name], **changes)
    return execute(monkeypatch, out, *flags, module=ALGORITHMS[name], config=config)


def test_fitted_q_counts_iterations_and_resumes(monkeypatch, capsys, tmp_path):
    """An interrupt after one epoch, then the files of an unbroken run; the curve is drawn over iterations."""
    assert execute_other(monkeypatch, tmp_path / "unbroken", "fqi") == 0
    said = capsys.readouterr().out
    assert "epoch 2 of 2  4 iterations  return -" in said
    assert "iterations/s" in said
    assert "greedy return after 4 iterations" in said
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert execute_other(patch, tmp_path, "fqi") == 130
    assert "saved after 2 iterations" in capsys.readouterr().out
    assert execute_other(monkeypatch, tmp_path, "fqi", "--resume") == 0
    assert contents(tmp_path / "fqi") == contents(tmp_path / "unbroken" / "fqi")
    _, progress, returns, _ = plot.read_group(group(tmp_path, algorithm="fqi"))
    assert progress.tolist() == [2, 4]
    assert returns.shape == (1, 2)
    assert plot.curve(group(tmp_path, algorithm="fqi")).axes[0].get_xlabel() == "iterations"


@pytest.mark.parametrize(
    ("name", "changes", "progress"),
    [
        ("reinforce", {}, [32, 64]),
        ("ppo", {}, [32, 64]),
        ("dqn", {}, [80, 96]),
        ("svg", {}, [2, 4]),
        ("svg_model", {}, [2, 4]),
        ("shac", {}, [32, 64]),
    ],
    ids=["reinforce", "ppo", "dqn", "svg", "svg_model", "shac"],
)
def test_policy_gradients_run_on_the_command_line(monkeypatch, tmp_path, name, changes, progress):
    """Two seeds, one after the other; the second is bitwise the run of that seed alone; the policy is read again."""
    use_devices(monkeypatch, 1)
    assert execute_other(monkeypatch, tmp_path, name, "--num-seeds", "2", "--no-plot", **changes) == 0
    assert execute_other(monkeypatch, tmp_path / "alone", name, "--seed", "1", "--no-plot", **changes) == 0
    places = {"algorithm": name, "env": CONFIGS[name].env}
    folder, alone = (group(out, **places) / "seed_1" for out in (tmp_path, tmp_path / "alone"))
    assert contents(folder) == contents(alone)
    assert record.progress(record.read_metrics(folder)).tolist() == progress
    module, config, params = policy.load(folder)
    assert np.isfinite(module.act(config, params, jnp.zeros(module.make_env(config.env).obs_dim))).all()


def test_base_points_are_saved_and_shared(monkeypatch, capsys, tmp_path):
    """One command saves those of its first seed, in the environment's units; all seeds of another learn from them."""
    path, runs = tmp_path / "points.npz", tmp_path / "runs"
    flags = ["--save-base-points", str(path), "--seed", "3", "--no-plot"]
    assert execute_other(monkeypatch, runs, "fqi", *flags) == 0
    assert f"{path}: 80 base points" in capsys.readouterr().out
    expected = jax.jit(fqi.init)(CONFIGS["fqi"], jax.random.key(3)).base_points
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_allclose(file["action"], 2 * expected.action, rtol=1e-6)  # a torque is twice the action
        for name in ("obs", "reward", "next_obs", "terminated"):
            np.testing.assert_array_equal(file[name], getattr(expected, name))
    assert execute_other(monkeypatch, tmp_path / "again", "fqi", *flags) == 2
    assert f"--save-base-points {path}: cannot write there: it exists" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    flags = ["--base-points", str(path), "--name", "again", "--seed", "3", "--num-seeds", "2", "--no-plot"]
    assert execute_other(monkeypatch, runs, "fqi", *flags) == 0
    first, again, other = (
        record.read_metrics(group(runs, name, "fqi") / seed)
        for name, seed in (("default", "seed_3"), ("again", "seed_3"), ("again", "seed_4"))
    )
    np.testing.assert_allclose(again["q_value"], first["q_value"], rtol=1e-3)  # the actions went to a file and back
    assert np.abs(other["q_value"] - first["q_value"]).max() > 1e-3
    sha256 = record.read_config(group(runs, "again", "fqi") / "seed_4")["base_points_sha256"]
    assert sha256 == record.sha256(path)
    np.savez(path, **(expected._asdict() | {"reward": expected.reward + 1}))
    for resume in ([], ["--resume"]):
        capsys.readouterr()
        assert execute_other(monkeypatch, runs, "fqi", *flags, *resume) == 2
        assert sha256 in capsys.readouterr().err


def test_runs_on_one_device_share_their_base_points():
    """Vmapped, as on a GPU, over seeds alone."""
    points = jax.jit(fqi.init)(CONFIGS["fqi"], jax.random.key(3)).base_points
    pair = compile_once(CONFIGS["fqi"], fqi.init, fqi.epoch, 2, runs_per_device=2, shared=[points])
    batch = programs.place(pair, [CONFIGS["fqi"]] * 2, [0, 1])
    states = programs.by_run(batch, programs.start(pair, batch))
    for i in range(2):
        assert_same(states[i].base_points, jax.tree.map(np.asarray, points))
    assert np.abs(states[0].params.critic[0][0] - states[1].params.critic[0][0]).max() > 0.1


SMALL_MILP = {
    "maximizer": "milp",
    "activation": "relu",
    "hidden_sizes": (4,),
    "num_iterations": 1,
    "num_eval_episodes": 1,
}


def test_an_exact_maximizer_trains_and_plays(monkeypatch, capfd, tmp_path):
    """The command line brings `milp` along, and so does the reader of saved policies; out of time, it is named."""
    assert execute_other(monkeypatch, tmp_path, "fqi", "--no-plot", **SMALL_MILP) == 0
    module, config, params = policy.load(group(tmp_path, algorithm="fqi") / "seed_0")
    obs = jnp.array([0.6, 0.8, 1.0])
    torque = module.act(config, params, obs)
    layers = [tuple(np.asarray(x) for x in layer) for layer in params.critic]
    np.testing.assert_allclose(torque, 2 * milp.relu_network(layers, np.asarray(obs)).action, rtol=1e-5)
    monkeypatch.setattr(milp, "TIME_LIMIT", 1e-6)
    capfd.readouterr()
    assert execute_other(monkeypatch, tmp_path, "fqi", "--name", "late", "--no-plot", **SMALL_MILP) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines[-1].startswith("error: --maximizer milp: no proven maximum within time_limit=1e-06 s")

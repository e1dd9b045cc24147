"""The runner: the same bytes for a seed however it is run, and nothing lost to a kill, an interrupt or a mistake."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FUSIONS

from algorithms import fqi, fqi_amortized, nfqca, reinforce, svg, td3
from common import checkpoint, cli, devices, milp, plot, record, run

SCRIPT = Path(td3.__file__)
SMALL = {
    "total_steps": 512,
    "learning_starts": 128,
    "steps_per_epoch": 64,
    "num_envs": 4,
    "hidden_sizes": (8, 8),
    "batch_size": 16,
    "buffer_size": 256,
    "num_eval_episodes": 2,
}
CONFIG = td3.Config(**SMALL)
FLAGS = [
    word
    for name, value in SMALL.items()
    for word in ("--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,)))
]
# the runner, saving a checkpoint after every epoch
EAGER = f"""
import runpy
from common import run
run.CHECKPOINT_SHARE = 1e9
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def command(out, *flags):
    """A process of the command line that saves after every epoch."""
    return [sys.executable, "-c", EAGER, *FLAGS, "--out", str(out), *flags]


def execute(monkeypatch, out, *flags, epoch=td3.epoch):
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["td3.py", *FLAGS, "--out", str(out), *flags])
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit) as end:
            run.main(td3.Config, td3.init, epoch)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    return end.value.code


def group(out, name="default"):
    return Path(out) / "td3" / "Pendulum-v1" / name


def contents(folder):
    """Bytes of every visible file below `folder`, by relative path."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The files of three seeds that ran without a break."""
    out = tmp_path_factory.mktemp("unbroken")
    done = subprocess.run(command(out, "--num-seeds", "3"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return contents(group(out))


def test_layout(unbroken):
    names = {f"seed_{seed}/{name}" for seed in range(3) for name in ("config.json", "metrics.csv", "policy.npz")}
    assert set(unbroken) == names | {"curve.png"}
    described = json.loads(unbroken["seed_1/config.json"])
    assert (described["algorithm"], described["seed"]) == ("td3", 1)
    assert described["config"] | {"hidden_sizes": (8, 8)} == {**vars(CONFIG)}
    rows = list(csv.DictReader(unbroken["seed_1/metrics.csv"].decode().splitlines()))
    assert [int(row["step"]) for row in rows] == [192, 256, 320, 384, 448, 512]
    assert unbroken["curve.png"].startswith(b"\x89PNG")


def as_a_user():
    """The environment of a process without what the tests set: threads, devices and compiler are a user's."""
    ours = ("NPROC", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    return {name: value for name, value in os.environ.items() if name not in ours}


def test_files_hold_what_train_returns(monkeypatch, tmp_path):
    alone = command(tmp_path, "--seed", "1", "--no-plot")
    done = subprocess.run(alone, env=as_a_user(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    train = jax.jit(td3.train, compiler_options=devices.cpu_compiler_options() | FUSIONS)
    state, metrics = train(CONFIG, jax.random.key(1))
    folder = group(tmp_path) / "seed_1"
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    for name in ("step", "critic_loss", "actor_loss"):
        np.testing.assert_array_equal([float(row[name]) for row in rows], np.asarray(getattr(metrics, name), float))
    returns = np.asarray(metrics.eval_returns, np.float64)
    np.testing.assert_array_equal([float(row["eval_return_mean"]) for row in rows], returns.mean(axis=1))
    np.testing.assert_array_equal([float(row["eval_return_std"]) for row in rows], returns.std(axis=1))
    _, config, params = record.load_policy(folder)
    assert vars(config) == vars(CONFIG)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_flags_of_xla_are_left_alone(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert devices.cpu_compiler_options()["xla_backend_optimization_level"] == 2
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")
    assert "xla_backend_optimization_level" not in devices.cpu_compiler_options()


@pytest.mark.parametrize(("devices", "flags"), [("1", "--seed 2"), ("2", "--num-seeds 8")])
def test_seed_is_bitwise_the_same_in_any_company(unbroken, tmp_path, devices, flags):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": devices}
    done = subprocess.run(command(tmp_path, *flags.split()), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, data in contents(group(tmp_path) / "seed_2").items():
        assert data == unbroken[f"seed_2/{name}"], name


def test_wide_seed_is_bitwise_the_same_in_any_company(tmp_path):
    """Products that XLA shares among threads: threads, devices and compiler as a user has them."""
    wide = ["--hidden-sizes", "256", "256", "--batch-size", "256", "--learning-starts", "256", "--total-steps", "320"]
    wide += ["--no-plot", "--seed", "2"]
    for name, *flags in (["alone"], ["together", "--num-seeds", "2"]):
        again = command(tmp_path, *wide, "--name", name, *flags)
        done = subprocess.run(again, env=as_a_user(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert contents(group(tmp_path, "alone") / "seed_2") == contents(group(tmp_path, "together") / "seed_2")


def test_plain_lines_when_piped(tmp_path):
    done = subprocess.run(command(tmp_path, "--no-plot"), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "compiling"
    assert lines[1] == "128 of 512 steps"
    assert lines[2].startswith("192 of 512 steps  return -")
    assert "steps/s" in lines[2]
    assert lines[2].endswith("s left")
    assert lines[-2].startswith("greedy return after 512 steps: -")
    assert lines[-1] == f"results: {group(tmp_path)}"
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    assert not (group(tmp_path) / "curve.png").exists()


def test_same_command_again_gives_the_same_bytes(monkeypatch, capsys, tmp_path):
    assert execute(monkeypatch, tmp_path) == 0
    first = contents(tmp_path)
    assert execute(monkeypatch, tmp_path) == 0
    assert contents(tmp_path) == first
    assert execute(monkeypatch, tmp_path, "--resume") == 0
    assert "this run is complete" in capsys.readouterr().out
    assert contents(tmp_path) == first
    assert not list(group(tmp_path).glob("checkpoint_*"))  # which would pass for an unfinished run


def test_different_run_is_not_overwritten(monkeypatch, capsys, tmp_path):
    assert execute(monkeypatch, tmp_path, "--no-plot") == 0
    first = contents(tmp_path)
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


def test_interrupt_saves_and_resumes(monkeypatch, capsys, unbroken, tmp_path):
    flags = ["--num-seeds", "3"]
    process = subprocess.Popen(command(tmp_path, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "return" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume goes on from there" in out
    assert "Traceback" not in err
    broken = contents(group(tmp_path))
    assert {name for name in broken if name.startswith("seed_0/")} == {
        "seed_0/config.json",
        "seed_0/metrics.csv",
        "seed_0/policy.npz",
    }
    # neither the same command without --resume nor another range of seeds may run over it
    for others in (flags, ["--seed", "2"], ["--seed", "2", "--resume"]):
        assert execute(monkeypatch, tmp_path, *others) == 2
        assert "unfinished run; --seed 0 --num-seeds 3 --resume goes on" in capsys.readouterr().err
    assert contents(group(tmp_path)) == broken
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}  # and on another number of devices
    subprocess.run(command(tmp_path, *flags, "--resume"), check=True, capture_output=True, env=env)
    assert contents(group(tmp_path)) == unbroken
    assert sorted(path.name for path in group(tmp_path).iterdir()) == ["curve.png", "seed_0", "seed_1", "seed_2"]


def test_killed_while_it_removes_its_checkpoint(monkeypatch, unbroken, tmp_path):
    """Of the checkpoint, a file is gone: what is left must not be taken for one."""

    class Killed(BaseException):
        pass

    def killed(folder, **_):
        next(Path(folder).rglob("manifest.ocdbt")).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(Killed):
            execute(patch, tmp_path, "--num-seeds", "3")
    assert len([path for path in group(tmp_path).iterdir() if "checkpoint" in path.name]) == 1
    assert execute(monkeypatch, tmp_path, "--num-seeds", "3", "--resume") == 0
    assert contents(group(tmp_path)) == unbroken
    assert sorted(path.name for path in group(tmp_path).iterdir()) == ["curve.png", "seed_0", "seed_1", "seed_2"]


def test_interrupt_before_the_first_epoch(monkeypatch, tmp_path, unbroken):
    def interrupted():
        asked = threading.Event()
        asked.set()
        return asked

    with monkeypatch.context() as patch:
        patch.setattr(run, "catch_interrupts", interrupted)
        assert execute(patch, tmp_path) == 130
    assert execute(monkeypatch, tmp_path, "--resume", "--no-plot") == 0
    for name, data in contents(group(tmp_path) / "seed_0").items():
        assert data == unbroken[f"seed_0/{name}"], name


def test_seeds_that_share_a_device_are_vmapped(tmp_path):
    """As on a GPU: two seeds on a device, one and a filler on the other, equal single runs but for rounding."""
    runs = [run.Run(CONFIG, seed, tmp_path) for seed in range(3)]
    programs = run.compile_programs(CONFIG, td3.init, td3.epoch, len(runs), per_device=2)
    slots = run.place(programs, runs)
    assert [slot.places for slot in slots] == [[0, 1], [2]]
    assert [slot.seeds.tolist() for slot in slots] == [[0, 1], [2, 2]]
    states = run.start(programs, slots)
    manager = checkpoint.open_folder(tmp_path / "checkpoint")
    checkpoint.save(manager, 1, checkpoint.Position(0, 3, 128), programs, slots, states)
    for seed, (slot, i) in enumerate([(0, 0), (0, 1), (1, 0)]):
        alone = jax.tree.leaves(jax.jit(td3.init)(CONFIG, jax.random.key(seed)).params)
        for ours, theirs in zip(jax.tree.leaves(states[slot].params), alone, strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-6, atol=1e-7)
    # a checkpoint of this layout goes on in the other one, a seed at a time on a device
    single = run.compile_programs(CONFIG, td3.init, td3.epoch, len(runs))
    single_slots = run.place(single, runs)
    assert [slot.places for slot in single_slots] == [[0], [1], [2]]
    position = checkpoint.latest(manager)
    assert position == (0, 3, 128, 4)
    restored = checkpoint.restore(manager, position, single, single_slots)
    _, [(first, finite), _] = run.advance(programs, slots, states)
    _, expected = run.advance(single, single_slots, restored)
    assert finite.tolist() == [True, True]
    for i in range(2):
        np.testing.assert_allclose(first.critic_loss[i], expected[i][0].critic_loss[0], rtol=1e-3)
    np.testing.assert_array_equal(first.step, [192] * 2)


def test_runs_that_memory_cannot_hold_at_once_are_trained_in_rounds(monkeypatch, capsys, unbroken, tmp_path):
    """Two of three seeds fit: a second round follows; an interrupt in it, and the files are those of one round."""
    programs = run.compile_programs(CONFIG, td3.init, td3.epoch, 1)
    state, extra = run.memory(programs)
    buffers = jax.tree.leaves(jax.eval_shape(td3.init, CONFIG, jax.random.key(0)))
    assert state >= sum(x.size * x.dtype.itemsize for x in buffers)
    assert 0 < extra < 10 * state
    advance, calls = run.advance, []

    def interrupted():
        event = threading.Event()
        seen.append(event)
        return event

    def counted(*args):
        calls.append(1)
        if len(calls) == 8:  # of the first round's 6, and the second round's 6
            seen[-1].set()
        return advance(*args)

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(devices, "memory", lambda: 1.5 * state + extra)
        patch.setattr(run, "catch_interrupts", interrupted)
        patch.setattr(run, "advance", counted)
        assert execute(patch, tmp_path, "--num-seeds", "3") == 130
        said = capsys.readouterr().out
        assert "memory holds 2 of 3 runs at a time" in said
        assert "interrupted and saved after 256 steps" in said
        assert execute(patch, tmp_path, "--num-seeds", "3", "--resume") == 0
        assert len(calls) == 8 + 4
        patch.setattr(devices, "memory", lambda: 0.5 * state)
        assert execute(patch, tmp_path, "--name", "other") == 2
        assert "GiB" in capsys.readouterr().err
    assert contents(group(tmp_path)) == unbroken


def test_resume_between_two_rounds(monkeypatch, capsys, unbroken, tmp_path):
    """Without a checkpoint, the runs that are complete are left alone, and the others are trained."""
    assert execute(monkeypatch, tmp_path, "--num-seeds", "3") == 0
    (group(tmp_path) / "seed_2" / "policy.npz").unlink()
    capsys.readouterr()
    assert execute(monkeypatch, tmp_path, "--num-seeds", "3", "--resume") == 0
    assert "1,152 of 1,536 steps\n" in capsys.readouterr().out
    assert contents(group(tmp_path)) == unbroken


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


def test_killed_at_random_moments(unbroken, tmp_path):
    """Four kills, each of a run that resumes what the last one left; then the files of an unbroken run."""
    moments = random.Random(0)
    started = time.monotonic()
    subprocess.run(command(tmp_path / "timing", "--num-seeds", "3"), check=True, capture_output=True)
    whole = time.monotonic() - started
    kills = 0
    while kills < 4:
        resume = ["--resume"] if (group(tmp_path) / "seed_2" / "config.json").exists() else []
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command(tmp_path, "--num-seeds", "3", *resume), **quiet)
        try:
            # most of a run is the start of Python: aim at what comes after
            process.wait(moments.uniform(0.5, 1.0) * whole)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            # it came to its end before its kill: aim earlier, at a run from the start
            assert process.returncode == 0, process.stderr.read()
            assert contents(group(tmp_path)) == unbroken
            shutil.rmtree(group(tmp_path))
            whole *= 0.8
        check_whole({k: v for k, v in contents(group(tmp_path)).items() if "checkpoint" not in k})
    subprocess.run(command(tmp_path, "--num-seeds", "3", "--resume"), check=True, capture_output=True)
    assert contents(group(tmp_path)) == unbroken
    assert not [path for path in group(tmp_path).rglob(".*") if path.is_file()]


def poisoned_epoch(config, state):
    """TD3's epoch, but at step 320 every seed whose key is even loses its actor."""
    state, metrics = td3.epoch(config, state)
    hit = (metrics.step == 320) & is_even(state.key)
    actor = jax.tree.map(lambda x: jnp.where(hit, jnp.nan, x), state.params.actor)
    return state._replace(params=state.params._replace(actor=actor)), metrics


def is_even(key):
    return jax.random.key_data(key)[0] % 2 == 0


def test_diverged_seeds_are_named_and_the_others_finish(monkeypatch, capsys, tmp_path, unbroken):
    config, seeds = CONFIG, [0, 1, 2, 3]
    states = {seed: jax.jit(td3.init)(config, jax.random.key(seed)) for seed in seeds}
    lost = []
    for seed, state in states.items():
        for _ in range(3):
            state, metrics = jax.jit(td3.epoch)(config, state)
        assert metrics.step == 320
        if is_even(state.key):
            lost.append(seed)
    assert 0 < len(lost) < 4, "choose a rule that hits some of the seeds"
    assert execute(monkeypatch, tmp_path, "--num-seeds", "4", epoch=poisoned_epoch) == 1
    said = capsys.readouterr()
    named = [line for line in said.err.splitlines() if "diverged" in line]
    assert named == [f"seed {s} diverged: parameters are not finite after 320 steps" for s in lost]
    healthy = next(seed for seed in seeds if seed not in lost)
    rows = record.read_metrics(group(tmp_path) / f"seed_{healthy}")
    assert rows["step"][-1] == 512
    assert np.isfinite(list(rows.values())).all()
    title = plot.curve(group(tmp_path)).axes[0].get_title()
    assert f"{len(lost)} of 4 seeds diverged" in title
    with pytest.raises(SystemExit):
        record.load_policy(group(tmp_path) / f"seed_{lost[0]}")
    assert "diverged" in capsys.readouterr().err


def test_all_seeds_diverge(monkeypatch, capsys, tmp_path):
    assert execute(monkeypatch, tmp_path, "--learning-rate", "1e38") == 1
    assert "seed 0 diverged: parameters are not finite after 192 steps" in capsys.readouterr().err
    assert (group(tmp_path) / "curve.png").exists()


def test_resume_lists_every_difference(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "check_shapes", lambda *_: None)
    config = CONFIG
    run.claim(group(tmp_path), SCRIPT, [run.Run(config, 0, group(tmp_path))], {}, cli.Options())
    assert execute(monkeypatch, tmp_path, "--resume", "--gamma", "0.9", "--hidden-sizes", "4") == 2
    line = capsys.readouterr().err
    assert "config.gamma: 0.99 -> 0.9" in line
    assert "config.hidden_sizes: [8, 8] -> [4]" in line


def test_iqm_and_interval():
    values = np.array([8.0, 1, 7, 2, 6, 3, 5, 4])
    assert plot.iqm(values) == pytest.approx(4.5)  # the mean of 3, 4, 5, 6
    assert plot.iqm(np.array([-1e9, *values[1:7], 1e9])) == pytest.approx(plot.iqm(values), abs=0.6)
    low, high = plot.interval(np.stack([values, np.full(8, 2.0)], axis=1))
    assert low[1] == high[1] == 2
    assert 1 <= low[0] < 4.5 < high[0] <= 8
    # the interval covers the centre of a normal sample about 95 times in 100
    samples = np.random.default_rng(0).normal(size=(40, 300))
    low, high = plot.interval(samples)
    assert 0.89 <= np.mean((low < 0) & (high > 0)) <= 0.99


def test_curve_has_labels_band_and_thin_lines(tmp_path):
    for seed, final in enumerate([1.0, 2.0, 3.0, 4.0]):
        rows = [{"step": s, "eval_return_mean": final * s, "finite": 1} for s in (10, 20)]
        record.write_rows(tmp_path / "td3" / "Env" / "run" / f"seed_{seed}" / "metrics.csv", rows)
    axes = plot.curve(tmp_path / "td3" / "Env" / "run").axes[0]
    assert axes.get_xlabel() == "environment steps"
    assert axes.get_ylabel() == "greedy return (sum of rewards per episode)"
    assert axes.get_title() == "td3 on Env"
    *thin, mean = axes.get_lines()
    assert len(thin) == 4
    np.testing.assert_allclose(mean.get_ydata(), [25, 50])  # the mean of the seeds 2 and 3
    assert len(axes.collections) == 1


FITTED = {
    "num-base-points": 400,
    "num-iterations": 4,
    "iterations-per-epoch": 1,
    "fit-steps": 5,
    "num-eval-episodes": 2,
}


def run_fitted(monkeypatch, out, *flags, module=fqi, sizes=FITTED):
    monkeypatch.setattr(sys, "argv", ["fqi.py", *(f"--{k}={v}" for k, v in sizes.items()), "--out", str(out), *flags])
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as end:
        run.main(module.Config, module.init, module.epoch)
    for number, handler in handlers:
        signal.signal(number, handler)
    return end.value.code


def test_fitted_q_counts_iterations_and_resumes(monkeypatch, capsys, tmp_path):
    """An interrupt after one epoch, then the files of an unbroken run; the curve is drawn over iterations."""
    assert run_fitted(monkeypatch, tmp_path / "unbroken") == 0
    said = capsys.readouterr().out
    assert "4 of 4 iterations  return -" in said
    assert "greedy return after 4 iterations" in said
    with monkeypatch.context() as patch:

        def interrupted():
            event = threading.Event()
            patch.setattr(run, "advance", lambda *args: (advance(*args), event.set())[0])
            return event

        advance = run.advance
        patch.setattr(run, "catch_interrupts", interrupted)
        assert run_fitted(monkeypatch, tmp_path) == 130
    assert "after 1 iterations" in capsys.readouterr().out
    assert run_fitted(monkeypatch, tmp_path, "--resume") == 0
    assert contents(tmp_path / "fqi") == contents(tmp_path / "unbroken" / "fqi")
    (group,) = (tmp_path / "fqi" / "Pendulum-v1").iterdir()
    _, progress, returns, _ = plot.read_group(group)
    assert progress.tolist() == [1, 2, 3, 4]
    assert returns.shape == (1, 4)
    assert plot.curve(group).axes[0].get_xlabel() == "iterations"


REINFORCE = {"total-steps": 128, "steps-per-epoch": 64, "num-envs": 4, "num-steps": 8, "batch-size": 16}
SVG = {"num-iterations": 4, "iterations-per-epoch": 2, "num-rollouts": 4, "horizon": 5}
LEARNED = SVG | {"model": "learned", "learning-starts": 80, "batch-size": 16, "buffer-size": 100}


@pytest.mark.parametrize(
    ("module", "sizes", "progress"),
    [(reinforce, REINFORCE, [64, 128]), (svg, SVG, [2, 4]), (svg, LEARNED, [2, 4])],
    ids=["reinforce", "svg-true", "svg-learned"],
)
def test_policy_gradients_run_on_the_command_line(monkeypatch, tmp_path, module, sizes, progress):
    """Two seeds on two devices; the second is bitwise the run of that seed alone; the policy is read again."""
    sizes = sizes | {"num-eval-episodes": 2}
    assert run_fitted(monkeypatch, tmp_path, "--num-seeds", "2", "--no-plot", module=module, sizes=sizes) == 0
    assert run_fitted(monkeypatch, tmp_path / "alone", "--seed", "1", module=module, sizes=sizes) == 0
    (group,) = (tmp_path / Path(module.__file__).stem).glob("*/*")
    (alone,) = (tmp_path / "alone" / Path(module.__file__).stem).glob("*/*")
    assert contents(group / "seed_1") == contents(alone / "seed_1")
    assert record.progress(record.read_metrics(group / "seed_1")).tolist() == progress
    loaded, config, params = record.load_policy(group / "seed_1")
    obs = jnp.zeros(params.actor[0][0][0].shape[0] if module is reinforce else 3)
    assert np.isfinite(loaded.act(config, params, obs)).all()


def test_a_policy_without_a_solver_runs(monkeypatch, tmp_path):
    """The window of `exact_fraction` 0 is empty, and an array without rows could not be placed on devices."""
    flags = ["--exact-fraction", "0", "--num-seeds", "2", "--no-plot"]
    assert run_fitted(monkeypatch, tmp_path, *flags, module=fqi_amortized) == 0


def test_base_points_are_written_once_and_shared(monkeypatch, capsys, tmp_path):
    """The first command writes the file, with the first seed's; all seeds of another algorithm's read it."""
    path = tmp_path / "points.npz"
    assert run_fitted(monkeypatch, tmp_path, "--base-points", str(path), "--seed", "3") == 0
    assert f"{path}: 400 base points of seed 3" in capsys.readouterr().out
    expected = jax.jit(fqi.init)(fqi.Config(num_base_points=400), jax.random.key(3)).base_points
    with np.load(path, allow_pickle=False) as file:
        for name, array in expected._asdict().items():
            np.testing.assert_array_equal(file[name], array)
    written = path.read_bytes()
    flags = ["--base-points", str(path), "--num-seeds", "2", "--exploration-range", "0.5"]
    assert run_fitted(monkeypatch, tmp_path, *flags, module=nfqca) == 0
    assert path.read_bytes() == written
    described = record.read_config(tmp_path / "nfqca" / "Pendulum-v1" / "default" / "seed_0")
    np.savez(path, **(expected._asdict() | {"reward": expected.reward + 1}))
    assert run_fitted(monkeypatch, tmp_path, *flags, module=nfqca) == 2
    assert described["base_points_sha256"] in capsys.readouterr().err


def test_an_exact_maximiser_that_takes_too_long_is_named(monkeypatch, capfd, tmp_path):
    monkeypatch.setitem(fqi.MAXIMIZERS, "milp", milp.maximize)
    monkeypatch.setattr(milp, "TIME_LIMIT", 1e-6)
    flags = ["--num-base-points", "100", "--maximizer", "milp", "--num-iterations", "1"]
    assert run_fitted(monkeypatch, tmp_path, *flags) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines[-1].startswith("error: --maximizer milp: no proven maximum within time_limit=1e-06 s")


def test_an_exact_maximiser_trains_and_plays(monkeypatch, capsys, tmp_path):
    """The command line brings `milp` along, and so does the reader of saved policies."""
    monkeypatch.setitem(fqi.MAXIMIZERS, "milp", milp.maximize)
    small = "--num-base-points 100 --hidden-sizes 4 --maximizer milp --num-eval-episodes 1 --num-iterations 1"
    assert run_fitted(monkeypatch, tmp_path, *small.split(), "--no-plot") == 0
    module, config, params = record.load_policy(tmp_path / "fqi" / "Pendulum-v1" / "default" / "seed_0")
    obs = jax.numpy.array([0.6, 0.8, 1.0])
    torque = module.act(config, params, obs)
    layers = [tuple(np.asarray(x) for x in layer) for layer in params.critic]
    np.testing.assert_allclose(torque, 2 * milp.relu_network(layers, np.asarray(obs)).action, rtol=1e-5)

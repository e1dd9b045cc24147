"""Trackers hold what metrics.csv holds, under the same names, each step once; a run without them is the same run."""

import json
import os
import re
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import SCRIPT, STEPS, command, contents, execute, group, interrupt_after
from wandb.proto.wandb_internal_pb2 import Record

from amortax.common import checkpoint, record, run, track

BOTH = ["--track", "tensorboard", "wandb"]


@pytest.fixture(autouse=True, scope="module")
def offline():
    """No test asks a server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        wandb.teardown()  # it reads the environment once
        yield
    wandb.teardown()


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder of two seeds that were tracked by both."""
    out = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CHECKPOINT_SHARE", 1e9)  # a checkpoint after every epoch
        assert execute(patch, out, "--num-seeds", "2", *BOTH) == 0
    return group(out)


def events(folder):
    """`{name: {step: value}}` as TensorBoard shows a run."""
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    values = {name: [(event.step, event.value) for event in shown.Scalars(name)] for name in shown.Tags()["scalars"]}
    assert all(len(pairs) == len(dict(pairs)) for pairs in values.values()), "a step is shown twice"
    return {name: dict(pairs) for name, pairs in values.items()}


def records(path):
    """The records of a .wandb file: LevelDB's log format, after a header of 7 bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # the end of a block
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        at += 7 + size
        whole += data[at - size : at]
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def histories(folder):
    """`[(run's name and config, {name: {step: value}})]` of a seed's wandb files, in the order of writing."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        described, values = None, {}
        for item in records(path):
            if item.HasField("run"):
                described = item.run
            for entry in item.history.item:
                if not entry.nested_key[0].startswith("_"):
                    series = values.setdefault(entry.nested_key[0], {})
                    assert item.history.step.num not in series, "a step was sent twice"
                    series[item.history.step.num] = json.loads(entry.value_json)
        found.append((described, values))
    return found


def expected(folder, dtype):
    """What metrics.csv says, as `{name: {step: value}}`."""
    columns = record.read_metrics(folder)
    steps = record.progress(columns).astype(int).tolist()
    return {k: dict(zip(steps, v.astype(dtype).tolist(), strict=True)) for k, v in columns.items()}


def test_tensorboard_holds_the_metrics(tracked):
    for seed in range(2):
        folder = record.seed_folder(tracked, seed)
        shown = events(folder)
        assert list(shown["critic_loss"]) == STEPS
        assert shown == expected(folder, np.float32)
        text = EventAccumulator(str(folder / "tensorboard")).Reload().Tensors("config/text_summary")
        (described,) = text[0].tensor_proto.string_val
        assert json.loads(described) == record.read_config(folder)


def test_wandb_holds_the_metrics(tracked):
    ids = set()
    for seed in range(2):
        folder = record.seed_folder(tracked, seed)
        ((described, values),) = histories(folder)
        assert list(values["critic_loss"]) == STEPS
        assert values == expected(folder, float)
        assert (described.project, described.run_group) == ("amortax", "td3/Pendulum-v1/default")
        assert described.display_name == f"td3/Pendulum-v1/default/seed_{seed}"
        config = {item.key: json.loads(item.value_json) for item in described.config.update if item.key != "_wandb"}
        assert config == record.read_config(folder)
        ids.add(described.run_id)
    assert len(ids) == 2


def test_without_the_flag_the_files_are_the_same_and_nothing_is_imported(monkeypatch, tracked, tmp_path):
    imports = "import sys, amortax.common.run; print(*{m.split('.')[0] for m in sys.modules})"
    imported = subprocess.run(
        [sys.executable, "-c", imports], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "jax" in imported
    assert not {"tensorboardX", "tensorboard", "wandb"} & set(imported)
    # nor while a run without the flag is tracked: there are no modules to find
    for name in [name for name in sys.modules if name.split(".")[0] in ("tensorboardX", "wandb")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert execute(monkeypatch, tmp_path, "--num-seeds", "2") == 0
    files = contents(tracked)
    assert {name.split("/")[1] for name in files if name not in contents(group(tmp_path))} == {"tensorboard", "wandb"}
    for name, data in contents(group(tmp_path)).items():
        assert files[name] == data, name


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb.sdk")])
def test_missing_package(monkeypatch, capsys, tmp_path, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert execute(monkeypatch, tmp_path / "out", "--track", kind) == 2
    assert capsys.readouterr().err == f'error: --track {kind}: needs the package: pip install -e ".[{kind}]"\n'
    assert not (tmp_path / "out").exists()


def test_without_a_key_wandb_is_refused_before_anything_is_written(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(tmp_path / "home")}
    again = [sys.executable, SCRIPT, "--track", "wandb", "--out", tmp_path / "out"]
    quiet = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(again, env=env, cwd=tmp_path, timeout=60, **quiet)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(r"error: --track wandb: .*api.key", done.stderr, re.IGNORECASE)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_broken_twice_each_step_is_there_once(monkeypatch, tracked, tmp_path):
    """Interrupted untracked; then tracked, and lost after its rows were sent but not saved; then to the end."""
    monkeypatch.setattr(run, "CHECKPOINT_SHARE", 1e9)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert execute(patch, tmp_path) == 130
    folder = record.seed_folder(group(tmp_path), 0)
    assert record.num_rows(folder) == 1
    with monkeypatch.context() as patch:

        def lost(folder, position, arrays):
            if position.epochs == 3:
                raise ConnectionError("lost")
            save(folder, position, arrays)

        save = checkpoint.save
        patch.setattr(checkpoint, "save", lost)
        with pytest.raises(ConnectionError):
            execute(patch, tmp_path, "--resume", *BOTH)
    assert events(folder) == expected(folder, np.float32)  # closed, though an error passed
    assert list(events(folder)["step"]) == STEPS[:3]
    time.sleep(1)  # wandb names its folders by the second
    assert execute(monkeypatch, tmp_path, "--resume", *BOTH) == 0
    assert events(folder) == expected(folder, np.float32)
    (first, before), (second, after) = histories(folder)
    assert first.run_id == second.run_id
    assert [list(before["step"]), list(after["step"])] == [STEPS[:3], STEPS[3:]]
    assert {name: before[name] | after[name] for name in before} == expected(folder, float)
    for name in ("metrics.csv", "policy.npz", "config.json"):
        assert (folder / name).read_bytes() == (tracked / "seed_0" / name).read_bytes()

    # the finished run may be repeated: to wandb another run, in TensorBoard instead of the first
    assert execute(monkeypatch, tmp_path, "--no-plot", *BOTH) == 0
    assert events(folder) == expected(folder, np.float32)
    *_, (third, again) = histories(folder)
    assert third.run_id != first.run_id
    assert again == expected(folder, float)


@pytest.mark.slow
def test_killed_nothing_is_lost(monkeypatch, tmp_path):
    """TensorBoard shows each step once; wandb, whose process goes with a killed one, is sent again what it may lack."""
    env = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}  # else wandb's process were this one's
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command(tmp_path, *BOTH), env=env, **quiet)
    for _ in range(2):
        while "return" not in process.stdout.readline():
            assert process.poll() is None
    process.kill()
    process.communicate()
    folder = record.seed_folder(group(tmp_path), 0)
    run_id = json.loads((folder / "wandb" / "run.json").read_text())["id"]
    assert execute(monkeypatch, tmp_path, "--resume", *BOTH) == 0
    assert events(folder) == expected(folder, np.float32)
    *_, (described, values) = histories(folder)
    assert described.run_id == run_id
    assert values == expected(folder, float)


def test_curves_over_iterations(tmp_path):
    """A fitted algorithm's steps stand still: its rows are sent over its iterations; a row is sent once."""
    rows = [{"step": "400", "iteration": str(float(i)), "critic_loss": str(1 / i), "finite": "1"} for i in (1, 2, 3)]
    folder = tmp_path / "fqi" / "Env" / "default" / "seed_0"
    record.write_config(folder, {"seed": 0})
    with track.tracking(("tensorboard", "wandb", "wandb"), False) as log:
        for num in (1, 3):
            record.write_rows(folder / "metrics.csv", rows[:num])
            log(folder, rows[:num])
    assert list(events(folder)["critic_loss"]) == [1, 2, 3]
    assert events(folder) == expected(folder, np.float32)
    ((_, values),) = histories(folder)
    assert values == expected(folder, float)


def test_a_server_that_refuses_is_named(monkeypatch, capsys, tmp_path):
    def refuse(**_):
        raise wandb.errors.CommError("no such\nproject")

    monkeypatch.setattr(wandb, "init", refuse)
    assert execute(monkeypatch, tmp_path, "--track", "wandb") == 2
    assert capsys.readouterr().err == "error: --track wandb: no such project\n"

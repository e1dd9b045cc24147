"""Result folders: foreign files, names, whose runs share a curve, resuming elsewhere, extending, warm starts."""

import errno
import json
import math
import os
import shlex
import shutil
import sys

import jax
import numpy as np
import pytest
from cases import ALGORITHMS, CONFIGS, assert_same, load_broken, replace
from test_cli import fails
from test_run import CONFIG, Killed, compile_once, contents, execute, flags_of, group, interrupt_after

from amortax.algorithms import td3
from amortax.common import checkpoint, checks, play, plot, policy, programs, record

SHORT = replace(CONFIG, total_steps=96)  # two epochs of the six of CONFIG


# Foreign files


def add_foreign_files(folder):
    """What editors, backups and file managers leave: copies, swap files, folders with similar names."""
    names = ["notes.txt", "config.json~", ".config.json.swp", "metrics.csv.bak", ".DS_Store", "seed_1.bak", "seed_x"]
    for path in [folder, *(folder / f"seed_{seed}" for seed in record.seeds(folder)), *folder.glob("checkpoint_0_0")]:
        for name in names:
            (path / name).write_text("mine")
        for name in ("seed_0.bak", "seed_00", "seed_0 (copy)", "checkpoint_0_0.bak", "checkpoint_a_b", ".checkpoint_0"):
            (path / name).mkdir()
            (path / name / "metrics.csv").write_text("mine")
            (path / name / "config.json").write_text("mine")
    (folder / "checkpoint_0_1").write_text("mine")


def foreign(folder):
    return {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.read_bytes() == b"mine"
    }


def test_foreign_files_are_ignored_and_kept(monkeypatch, capsys, tmp_path):
    """In an interrupted run, then while it is resumed, run again, drawn and looked up."""
    assert execute(monkeypatch, tmp_path / "clean") == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert execute(patch, tmp_path) == 130
    add_foreign_files(group(tmp_path))
    lasting = {name: data for name, data in foreign(tmp_path).items() if "/checkpoint_0_0/" not in name}
    assert ".config.json.swp" in "".join(lasting)
    capsys.readouterr()
    assert execute(monkeypatch, tmp_path, "--resume") == 0
    assert foreign(tmp_path) == lasting
    assert execute(monkeypatch, tmp_path) == 0
    assert foreign(tmp_path) == lasting
    assert capsys.readouterr().err == ""
    for name, data in contents(group(tmp_path / "clean")).items():
        assert (group(tmp_path) / name).read_bytes() == data
    assert record.seeds(group(tmp_path)) == [0] == plot.read_group(group(tmp_path))[0]


def test_foreign_file_where_a_folder_goes(monkeypatch, capsys, tmp_path):
    group(tmp_path).mkdir(parents=True)
    (group(tmp_path) / "seed_0").write_text("mine")
    assert f"--out {tmp_path}: cannot write there" in fails(monkeypatch, capsys, tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_files_of_an_unknown_run_are_kept(monkeypatch, capsys, tmp_path):
    folder = group(tmp_path) / "seed_0"
    folder.mkdir(parents=True)
    (folder / "policy.npz").write_text("mine")
    assert "holds a policy.npz, but no config.json" in fails(monkeypatch, capsys, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["policy.npz"]


# Names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("n" * 256, "it must have at most 255 bytes, not 256"),
        ("ä" * 128, "it must have at most 255 bytes, not 256"),
        ("a/b", "must be a plain folder name"),
        ("a\\b", "must be a plain folder name"),
        ("a b", "must be a plain folder name"),
        ("..", "must be a plain folder name"),
        ("v1.", "without a dot at its end"),
        ("nul", "reserves for a device"),
        ("COM1.old", "reserves for a device"),
        ("mine-sweep", "must not end in -sweep"),
    ],
)
def test_names_that_no_folder_can_have(monkeypatch, capsys, tmp_path, name, said):
    line = fails(monkeypatch, capsys, tmp_path / "out", "--name", name)
    assert line.startswith("error: --name ")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_names_of_a_sweep_that_are_too_long(monkeypatch, capsys, tmp_path):
    line = fails(monkeypatch, capsys, tmp_path / "out", "--name", "n" * 245, "--sweep", "gamma=0.9,0.99")
    assert "_gamma=0.99 must have at most 255 bytes, not 256" in line
    line = fails(monkeypatch, capsys, tmp_path / "/".join(["o" * 250] * 17))
    assert "File name too long" in line
    assert not list(tmp_path.iterdir())


def test_separators_in_an_environment_make_no_folders():
    assert record.group_folder("out", "td3", "playground/CheetahRun", "default").parts[-3:-1] == (
        "td3",
        "playground.CheetahRun",
    )


# Which runs share a curve


def test_seeds_of_other_configurations_are_refused(monkeypatch, capsys, tmp_path):
    """A second seed under the same name: of the same configuration also from elsewhere, of no other one."""
    assert execute(monkeypatch, tmp_path, config=SHORT) == 0
    description = record.read_config(group(tmp_path) / "seed_0")
    elsewhere = description | {
        "device": "Abacus",
        "source": "/gone",
        "versions": description["versions"] | {"jax": "9"},
    }
    record.write_config(group(tmp_path) / "seed_0", elsewhere)
    assert execute(monkeypatch, tmp_path, "--seed", "1", config=SHORT) == 0
    files = contents(tmp_path)
    capsys.readouterr()
    for flags, said in (
        (["--learning-rate", "0.01"], "config.learning_rate: 0.001 -> 0.01"),
        (["--total-steps", "160"], "config.total_steps: 96 -> 160"),
    ):
        assert execute(monkeypatch, tmp_path, "--seed", "2", *flags, config=SHORT) == 2
        line = capsys.readouterr().err
        assert line.startswith(
            f"error: --name default: {group(tmp_path) / 'seed_0'} is of another configuration ({said}"
        )
    record.write_config(group(tmp_path) / "seed_0", description | {"source_sha256": "0"})
    assert execute(monkeypatch, tmp_path, "--seed", "2", config=SHORT) == 2
    assert "(source_sha256: 0 -> " in capsys.readouterr().err
    record.write_config(group(tmp_path) / "seed_0", elsewhere)
    assert contents(tmp_path) == files


# Resuming elsewhere


def test_resume_in_a_moved_folder_on_another_device_with_other_versions(monkeypatch, capsys, tmp_path):
    """One line of warning; here the numbers are the same."""
    assert execute(monkeypatch, tmp_path / "unbroken", "--num-seeds", "2", "--no-plot") == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert execute(patch, tmp_path / "a", "--num-seeds", "2", "--no-plot") == 130
    shutil.move(tmp_path / "a", tmp_path / "b")
    for folder in group(tmp_path / "b").glob("seed_*"):
        old = record.read_config(folder)
        record.write_config(folder, old | {"device": "Abacus", "versions": old["versions"] | {"jax": "0.0.1"}})
    capsys.readouterr()
    assert execute(monkeypatch, tmp_path / "b", "--num-seeds", "2", "--no-plot", "--resume") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --resume on another device or with other versions (device: Abacus -> ")
    assert f"versions.jax: 0.0.1 -> {jax.__version__}" in line
    found, expected = (contents(group(tmp_path / out)) for out in ("b", "unbroken"))
    for seed in range(2):  # where it began stays written down
        assert json.loads(found.pop(f"seed_{seed}/config.json"))["device"] == "Abacus"
        del expected[f"seed_{seed}/config.json"]
    assert found == expected


@pytest.mark.parametrize("damage", ["shape", "number", "file"])
def test_resume_refuses_a_state_that_it_cannot_read(monkeypatch, capsys, tmp_path, damage):
    """Of another structure, as another version of a library may write it, or truncated."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        if damage != "file":
            change = {"shape": lambda x: [x[0], x[1][:, :4], *x[2:]], "number": lambda x: x[:-1]}[damage]
            save = checkpoint.save
            patch.setattr(checkpoint, "save", lambda *args: save(*args[:2], change(args[2]), *args[3:]))
        assert execute(patch, tmp_path, "--no-plot") == 130
    if damage == "file":
        for path in group(tmp_path).glob("checkpoint_0_0/*/states/**/d/*"):
            path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    files = contents(group(tmp_path))
    assert execute(monkeypatch, tmp_path, "--no-plot", "--resume") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --resume: {group(tmp_path) / 'checkpoint_0_0'}: its state cannot be read")
    assert contents(group(tmp_path)) == files


# The best policy


def test_best_policy_is_that_of_the_best_evaluation(monkeypatch, tmp_path):
    """Its parameters are those after the epoch with the highest return, also where the run was resumed after it."""
    config = replace(CONFIG, learning_rate=0.02)  # erratic
    assert execute(monkeypatch, tmp_path, "--num-seeds", "6", "--no-plot", config=config) == 0
    epochs = [int(record.read_metrics(group(tmp_path) / f"seed_{i}")["eval_return_mean"].argmax()) for i in range(6)]
    seed, best = next((seed, best) for seed, best in enumerate(epochs) if 0 < best < 5)
    folder = group(tmp_path) / f"seed_{seed}"
    compiled = compile_once(CONFIG, td3.init, td3.epoch, 1)
    batch = programs.place(compiled, [config], [seed])
    states = programs.start(compiled, batch)
    for _ in range(best + 1):
        states, _ = programs.advance(compiled, batch, states)
    params = jax.tree.map(np.array, programs.by_run(batch, jax.device_get([states[0].params]))[0])
    assert_same(jax.tree.leaves(policy.load(folder, "best")[2]), jax.tree.leaves(params))
    assert np.any(policy.load(folder)[2].actor[0][0] != params.actor[0][0])
    with monkeypatch.context() as patch:
        interrupt_after(patch, best + 1)
        assert execute(patch, tmp_path / "broken", "--seed", str(seed), "--no-plot", config=config) == 130
    broken = group(tmp_path / "broken") / f"seed_{seed}"
    assert_same(jax.tree.leaves(policy.load(broken)[2]), jax.tree.leaves(params))
    assert execute(monkeypatch, tmp_path / "broken", "--seed", str(seed), "--no-plot", "--resume", config=config) == 0
    assert contents(broken) == contents(folder)


@pytest.mark.quick
def test_best_is_the_first_of_the_highest_finite_returns():
    def best(*returns, finite=1):
        return policy.is_best([{"eval_return_mean": x, "finite": finite} for x in returns])

    assert best(-3.0)
    assert best("-3.0", -2.0)
    assert best(math.nan, -4.0)
    for returns in ([1.0, 1.0], [1.0, 0.5], [1.0, math.nan], [-math.inf], [math.inf]):
        assert not best(*returns)
    assert not best(1.0, finite=0)


def test_best_policy_is_played(monkeypatch, capsys, tmp_path):
    assert execute(monkeypatch, tmp_path, "--no-plot", config=SHORT) == 0
    folder = group(tmp_path) / "seed_0"
    policy.save(folder, jax.tree.map(lambda x: 3 * x, policy.load(folder)[2]), "best")
    said = []
    for flags in ([], ["--which", "last"], ["--which", "best"]):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["play", str(folder), "--episodes", "2", *flags])
        play.main()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    (folder / "policy_best.npz").unlink()
    with pytest.raises(SystemExit):
        play.main()
    assert capsys.readouterr().err == f"error: {folder / 'policy_best.npz'}: no policy saved yet\n"


# Extending a finished run


def test_extended_run_is_bitwise_a_run_of_that_length(monkeypatch, capsys, tmp_path):
    """Three seeds in two rounds: of two epochs, then of four, then of six, after a kill."""
    flags = ["--num-seeds", "3"]
    assert execute(monkeypatch, tmp_path / "long", *flags) == 0
    assert execute(monkeypatch, tmp_path, *flags, config=SHORT) == 0
    assert execute(monkeypatch, tmp_path, *flags, "--resume", "--total-steps", "128", config=SHORT) == 0
    assert record.read_metrics(group(tmp_path) / "seed_2")["step"].tolist() == [80, 96, 112, 128]
    write = record.write_atomic

    def kill(path, data):
        if path.name == "metrics.csv" and path.parent.name == "seed_1":
            raise Killed
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_atomic", kill)
        with pytest.raises(Killed):
            execute(patch, tmp_path, *flags, "--resume")
    assert [record.num_rows(group(tmp_path) / f"seed_{seed}") for seed in range(3)] == [6, 4, 4]
    with monkeypatch.context() as patch:
        epochs = interrupt_after(patch, 9)
        assert execute(patch, tmp_path, *flags, "--resume") == 0
        assert len(epochs) == 6 + 2  # the second from its start, as its last state is ahead of its metrics; the third
    assert contents(group(tmp_path)) == contents(group(tmp_path / "long"))
    capsys.readouterr()
    assert execute(monkeypatch, tmp_path, *flags, "--resume", config=SHORT) == 2
    assert "was run differently: config.total_steps: 160 -> 96" in capsys.readouterr().err
    assert contents(group(tmp_path)) == contents(group(tmp_path / "long"))


def test_extending_an_interrupted_run_or_one_seed_of_a_group(monkeypatch, tmp_path):
    assert execute(monkeypatch, tmp_path / "long", "--num-seeds", "2") == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert execute(patch, tmp_path, "--num-seeds", "2", config=SHORT) == 130
    assert execute(monkeypatch, tmp_path, "--num-seeds", "2", "--resume") == 0
    assert contents(group(tmp_path)) == contents(group(tmp_path / "long"))
    assert execute(monkeypatch, tmp_path, "--num-seeds", "2", "--name", "b", config=SHORT) == 0
    for seed in ("1", "0"):
        assert execute(monkeypatch, tmp_path, "--seed", seed, "--name", "b", "--resume") == 0
    assert contents(group(tmp_path, "b")) == contents(group(tmp_path / "long"))


def test_state_that_was_not_kept(monkeypatch, capsys, tmp_path):
    assert execute(monkeypatch, tmp_path, "--keep-state", "never", config=SHORT) == 0
    assert not (group(tmp_path) / "seed_0" / "state.npz").exists()
    monkeypatch.setattr(checkpoint, "KEPT_BYTES", 1e3)
    assert execute(monkeypatch, tmp_path, config=SHORT) == 0
    assert "the last state, of 0 MB a run, is not kept; --keep-state always keeps it" in capsys.readouterr().out
    files = contents(tmp_path)
    assert execute(monkeypatch, tmp_path, "--resume") == 2
    folder = group(tmp_path) / "seed_0"
    said = f"error: --resume: {folder} cannot be extended: its last state was not kept (see --keep-state)\n"
    assert capsys.readouterr().err == said
    assert contents(tmp_path) == files
    assert execute(monkeypatch, tmp_path, "--keep-state", "always", config=SHORT) == 0
    state = folder / "state.npz"
    assert state.stat().st_size > checkpoint.KEPT_BYTES
    state.write_bytes(state.read_bytes()[:1000])
    assert execute(monkeypatch, tmp_path, "--resume") == 2
    assert f"error: --resume: {state}: its state cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fqi", "svg"])
def test_iterations_are_extended(monkeypatch, tmp_path, name):
    places = {"algorithm": name, "env": CONFIGS[name].env}
    for out, changes in (("a", {}), ("b", {"num_iterations": 2})):
        config = replace(CONFIGS[name], **changes)
        assert execute(monkeypatch, tmp_path / out, "--no-plot", module=ALGORITHMS[name], config=config) == 0
    assert record.num_rows(group(tmp_path / "b", **places) / "seed_0") == 1
    again = ["--no-plot", "--resume"]
    assert execute(monkeypatch, tmp_path / "b", *again, module=ALGORITHMS[name], config=CONFIGS[name]) == 0
    assert contents(group(tmp_path / "b", **places)) == contents(group(tmp_path / "a", **places))


def test_what_depends_on_the_length_is_not_extended(monkeypatch, capsys, tmp_path):
    """Rounds of base points here, an optimizer's schedule in a user's copy; nor may other fields change."""
    fields = {"rounds": 2, "num_iterations": 4}
    nfqca = ALGORITHMS["nfqca"]
    assert execute(monkeypatch, tmp_path, "--no-plot", module=nfqca, config=replace(CONFIGS["nfqca"], **fields)) == 0
    files = contents(tmp_path)
    capsys.readouterr()
    longer = replace(CONFIGS["nfqca"], rounds=2, num_iterations=8)
    assert execute(monkeypatch, tmp_path, "--no-plot", "--resume", module=nfqca, config=longer) == 2
    line = capsys.readouterr().err
    assert "cannot be extended (num_iterations: 4 -> 8): what it learns depends on this" in line
    assert execute(monkeypatch, tmp_path, "--no-plot", "--resume", "--gamma", "0.5", module=nfqca, config=longer) == 2
    assert "was run differently: config.gamma: 0.97 -> 0.5; config.num_iterations: 4 -> 8" in capsys.readouterr().err
    assert contents(tmp_path) == files


def test_a_schedule_of_a_copied_file_depends_on_the_length(tmp_path):
    schedule = "optax.cosine_decay_schedule(config.learning_rate, config.total_steps)"
    broken = load_broken(td3, tmp_path, "optax.adam(config.learning_rate)", f"optax.adam({schedule})")
    for module, same in ((td3, True), (broken, False)):
        configs = [module.Config(total_steps=n, hidden_sizes=(8, 8)) for n in (10**4, 10**5)]
        short, long = (checks.program_text(config, module.init, module.epoch) for config in configs)
        assert (short == long) == same


def test_cells_of_a_sweep_are_extended(monkeypatch, tmp_path):
    grid = ["--sweep", "gamma=0.9,0.98"]
    assert execute(monkeypatch, tmp_path / "long", *grid) == 0
    assert execute(monkeypatch, tmp_path, *grid, config=SHORT) == 0
    assert execute(monkeypatch, tmp_path, *grid, "--resume") == 0
    assert contents(group(tmp_path).parent) == contents(group(tmp_path / "long").parent)


# Warm starts


@pytest.mark.parametrize("name", ["td3", "nfqca"])
def test_warm_start_begins_with_the_parameters_of_a_run(monkeypatch, capsys, tmp_path, name):
    """Whatever part of the state holds them; a learning rate next to zero keeps them; resuming needs the same file."""
    module, config = (
        ALGORITHMS[name],
        replace(CONFIGS[name], learning_rate=1e-30, **({"tau": 0.0} if name == "td3" else {})),
    )
    assert execute(monkeypatch, tmp_path, "--no-plot", module=module, config=CONFIGS[name]) == 0
    source = group(tmp_path, algorithm=name) / "seed_0"
    flags = ["--name", "warm", "--seed", "7", "--no-plot", "--init-from"]
    assert execute(monkeypatch, tmp_path, *flags, str(source.parent), module=module, config=config) == 0
    folder = group(tmp_path, "warm", name) / "seed_7"
    for old, new in zip(*(jax.tree.leaves(policy.load(x)[2]) for x in (source, folder)), strict=True):
        np.testing.assert_allclose(old, new, rtol=1e-6)
    assert record.read_config(folder)["init_from_sha256"] == record.sha256(source / "policy.npz")
    files = contents(tmp_path)
    capsys.readouterr()
    assert execute(monkeypatch, tmp_path, *flags[:-1], "--resume", module=module, config=config) == 2
    assert "was run differently: init_from_sha256: " in capsys.readouterr().err
    again = [*flags, str(source.parent), "--resume"]
    assert execute(monkeypatch, tmp_path, *again, module=module, config=config) == 0
    assert contents(tmp_path) == files


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere", ": no policy saved yet"),
        ("", "no policy saved yet"),
        ("a.npz", ": critic/0/0 is float32[2, 4, 8], must be float32[2, 4, 64]"),
        ("b.npz", ": not a policy of td3: it must hold the arrays actor/0/0, "),
        ("c.npz", ": actor/0/0 is not finite"),
        ("d.npz", ": truncated or not a policy"),
    ],
)
def test_warm_starts_that_do_not_fit(monkeypatch, capsys, tmp_path, path, said):
    shapes = jax.eval_shape(td3.init, td3.Config(), jax.random.key(0)).params
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    arrays = dict(zip(policy.array_names(params), jax.tree.leaves(params), strict=True))
    record.write_arrays(tmp_path / "a.npz", arrays | {"critic/0/0": np.zeros((2, 4, 8), np.float32)})
    record.write_arrays(tmp_path / "b.npz", {"w": np.zeros(3)})
    record.write_arrays(tmp_path / "c.npz", arrays | {"actor/0/0": np.full((3, 64), np.nan, np.float32)})
    (tmp_path / "d.npz").write_text("mine")
    line = fails(monkeypatch, capsys, tmp_path / "out", "--init-from", str(tmp_path / path))
    assert line.startswith(f"error: --init-from {tmp_path / path}")
    assert said in line
    assert not (tmp_path / "out").exists()


# Hints


def test_hint_of_an_interrupted_sweep_continues_it(monkeypatch, capsys, tmp_path):
    """Both that at the interrupt and that of a later command, with all flags; the hint is run as it is printed."""
    flags = ["--sweep", "gamma=0.9,0.98", "--name", "a+b", "--no-plot", "--keep-state", "never", "--num-seeds", "2"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert execute(patch, tmp_path, *flags) == 130
    hint = capsys.readouterr().out.splitlines()[-1].partition("; continue with: ")[2]
    words = shlex.split(hint)
    assert words == ["python", "td3.py", *flags_of(CONFIG), "--out", str(tmp_path), *flags, "--resume"]
    assert execute(monkeypatch, tmp_path, *flags) == 2
    assert capsys.readouterr().err.endswith(f"holds an unfinished run; continue it with: {hint}\n")
    given = words[2 + len(flags_of(CONFIG)) + 2 :]
    assert execute(monkeypatch, tmp_path, *given) == 0
    assert (group(tmp_path, "a+b-sweep") / "sweep.csv").exists()


# Disks and processes


@pytest.mark.parametrize("name", ["policy_best.npz", "state.npz"])
def test_full_disk(monkeypatch, capsys, tmp_path, name):
    """One line and exit code 1; what is there is whole; a hint that continues to the files of an unbroken run."""
    assert execute(monkeypatch, tmp_path / "unbroken", "--no-plot") == 0
    write = os.fsync

    def fill(handle):
        if f"/.{name}." in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle)

    with monkeypatch.context() as patch:
        patch.setattr(record.os, "fsync", fill)
        capsys.readouterr()
        assert execute(patch, tmp_path, "--no-plot") == 1
    folder = group(tmp_path) / "seed_0"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot write {folder / name}: No space left on device; then continue with: python ")
    assert not list(tmp_path.rglob(".*.tmp"))
    assert not (folder / name).exists()
    assert vars(policy.load(folder)[1]) == vars(CONFIG)
    assert execute(monkeypatch, tmp_path, "--no-plot", "--resume") == 0
    assert contents(group(tmp_path)) == contents(group(tmp_path / "unbroken"))


def test_folder_that_vanishes(monkeypatch, tmp_path):
    """It is made again, with all that makes it a run."""
    assert execute(monkeypatch, tmp_path / "unbroken", "--no-plot") == 0
    advance, calls = programs.advance, []

    def remove(*args):
        calls.append(1)
        if len(calls) == 3:
            shutil.rmtree(tmp_path / "td3")
        return advance(*args)

    with monkeypatch.context() as patch:
        patch.setattr(programs, "advance", remove)
        assert execute(patch, tmp_path, "--no-plot") == 0
    assert contents(group(tmp_path)) == contents(group(tmp_path / "unbroken"))


def test_what_a_killed_writer_leaves_is_removed(monkeypatch, tmp_path):
    """And nothing else with a similar name."""
    for name in record.FILES:
        with monkeypatch.context() as patch:
            patch.setattr(record.os, "replace", killed)
            patch.setattr(record.os, "unlink", lambda path: None)
            with pytest.raises(Killed):
                record.write_atomic(tmp_path / name, b"half")
    assert len(list(tmp_path.iterdir())) == len(record.FILES)
    (tmp_path / ".state.npz.swp").write_text("mine")
    record.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".state.npz.swp"]


def killed(*_):
    raise Killed


def test_checkpoint_that_cannot_be_read(monkeypatch, capsys, tmp_path):
    folder = group(tmp_path) / "checkpoint_0_0"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert execute(patch, tmp_path, "--no-plot") == 130
    for path in folder.glob("*/position/*"):
        path.write_text("half")
    capsys.readouterr()
    assert execute(monkeypatch, tmp_path, "--no-plot", "--resume") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --resume: {folder}: its state cannot be read")
    shutil.rmtree(folder)
    assert execute(monkeypatch, tmp_path, "--no-plot", "--resume") == 0

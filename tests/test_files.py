"""Result folders: foreign files, names, whose runs share a curve, resuming elsewhere, extending, warm starts."""

import pytest
from cases import replace
from test_cli import fails
from test_run import CONFIG, contents, execute, group, interrupt_after

from amortax.common import plot, record

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

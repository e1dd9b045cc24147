"""Sweeps: each cell is bitwise a plain run; the table and the heat map are those of the cells; mistakes take a line."""

import csv

import numpy as np
import pytest
from test_run import contents, execute, group

from amortax.algorithms import fqi, td3
from amortax.common import plot, record, sweep

GRID = ["--sweep", "learning_rate=0.001,1e-4", "--sweep", "gamma=0.9,0.98"]
TWO = ("--num-seeds", "2")


def test_cells_are_plain_runs(monkeypatch, capsys, tmp_path):
    """A grid of four cells and two seeds, interrupted by a missing policy and resumed, beside two plain runs."""
    assert execute(monkeypatch, tmp_path, *GRID, *TWO) == 0
    said = capsys.readouterr().out
    assert "greedy return after 160 steps, interquartile mean of 2 seeds:" in said
    cells = sorted(path.name for path in group(tmp_path).parent.iterdir())
    names = [f"default_learning_rate={a}_gamma={b}" for a in (0.0001, 0.001) for b in (0.9, 0.98)]
    assert cells == ["default-sweep", *names]
    plain = tmp_path / "plain"
    assert execute(monkeypatch, plain, "--learning-rate", "1e-4", "--gamma", "0.98", *TWO) == 0
    assert contents(group(tmp_path, names[1])) == contents(group(plain))
    with open(group(tmp_path, "default-sweep") / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [("0.001", "0.9"), ("0.001", "0.98"), ("0.0001", "0.9"), ("0.0001", "0.98")]
    assert [(row["learning_rate"], row["gamma"]) for row in rows] == expected
    finals = [record.read_metrics(group(plain) / f"seed_{seed}")["eval_return_mean"][-1] for seed in (0, 1)]
    assert float(rows[3]["iqm"]) == pytest.approx(np.mean(finals))
    assert float(rows[3]["worst"]) == min(finals)
    assert f"{np.mean(finals):.1f}" in said

    done = contents(group(tmp_path).parent)
    (group(tmp_path, names[3]) / "seed_1" / "policy.npz").unlink()
    assert execute(monkeypatch, tmp_path, *GRID, *TWO, "--resume") == 0
    assert contents(group(tmp_path).parent) == done
    capsys.readouterr()
    assert execute(monkeypatch, tmp_path, *GRID[:2], "--sweep", "gamma=0.9,0.98,0.99", *TWO) == 2
    assert "holds a different sweep (sweep.gamma: [0.9, 0.98] -> [0.9, 0.98, 0.99])" in capsys.readouterr().err
    assert contents(group(tmp_path).parent) == done


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("batch_size=64,128", "batch_size shapes the compiled program; start a separate run for each value"),
        ("env=Pendulum-v1", "env shapes the compiled program"),
        ("gama=0.9", "no field gama; these can be swept: learning_rate, gamma, tau"),
        ("gamma", "must be FIELD=VALUE"),
        ("gamma=", "'' is not a number of type float"),
        ("gamma=0.9,high", "'high' is not a number"),
        ("gamma=0.9,1.5", "--gamma 1.5: must be in [0, 1]"),
        ("gamma=0.9,0.90", "a value is repeated"),
        ("tau=0.1 --sweep tau=0.2", "tau is swept twice"),
    ],
)
def test_mistakes(monkeypatch, capsys, tmp_path, word, said):
    assert execute(monkeypatch, tmp_path, "--sweep", *word.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --")
    assert said in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick
def test_cells_of_three_fields():
    grid = sweep.parse(td3.Config(), ["learning-rate=1e-3,1e-4", "gamma=0.9,0.99", "tau=0.01,0.1,1"])
    assert grid == {"learning_rate": [1e-3, 1e-4], "gamma": [0.9, 0.99], "tau": [0.01, 0.1, 1.0]}
    cells = sweep.cells(td3.Config(), grid)
    assert len({cell.suffix for cell in cells}) == 12
    expected = [(a, b, c) for a in (1e-3, 1e-4) for b in (0.9, 0.99) for c in (0.01, 0.1, 1.0)]
    assert [(c.config.learning_rate, c.config.gamma, c.config.tau) for c in cells] == expected
    assert sweep.cells(fqi.Config(), {}) == [("", fqi.Config())]


@pytest.mark.quick
def test_table_and_heat_map():
    """Each number stands in the panel, row and column of its values; a cell whose seeds all diverged says so."""
    grid = {"a": [1.0, 2.0], "b": [3.0, 4.0], "c": [5.0, 6.0, 7.0]}
    returns = np.random.default_rng(0).normal(size=(12, 8))
    finite = np.arange(8) >= np.arange(12)[:, None] % 3  # in cells 0, 3, 6, ... all eight, in the next ones seven, six
    finite[7] = False
    returns[~finite] = 1e9  # of seeds that do not count
    rows = sweep.table(grid, returns, finite)
    assert (rows[8]["a"], rows[8]["b"], rows[8]["c"], rows[8]["diverged"]) == (2.0, 3.0, 7.0, 2)
    final = returns[8, 2:]
    assert rows[8]["iqm"] == pytest.approx(plot.iqm(final))
    assert (rows[8]["low"], rows[8]["high"]) == pytest.approx(tuple(plot.interval(final)))
    assert rows[8]["worst"] == final.min()
    assert np.isnan([rows[7][name] for name in ("iqm", "low", "high", "worst")]).all()
    assert [row["diverged"] for row in rows] == [0, 1, 2, 0, 1, 2, 0, 8, 2, 0, 1, 2]
    assert len(sweep.text(rows).splitlines()) == 13
    figure = sweep.heat_map(grid, rows, "title")
    panels = [ax for ax in figure.axes if ax.images and ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["a = 1", "a = 2"]
    shown = panels[1].images[0].get_array()
    np.testing.assert_array_equal(shown, np.array([row["iqm"] for row in rows[6:]]).reshape(2, 3))
    labels = [f"{rows[6]['iqm']:.1f}", "diverged", f"{rows[8]['iqm']:.1f}"]
    assert [label.get_text() for label in panels[1].texts][:3] == labels
    assert (panels[1].get_xlabel(), panels[1].get_ylabel()) == ("c", "b")
    (single,) = [ax for ax in sweep.heat_map({"c": [5.0, 6.0]}, rows[:2], "title").axes if ax.texts]
    assert [text.get_text() for text in single.texts] == [f"{row['iqm']:.1f}" for row in rows[:2]]

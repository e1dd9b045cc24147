"""The code of the pages runs as it stands, its commands are accepted by their parsers, its links and numbers exist."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import re
import shlex
import sys
import threading
from pathlib import Path

import benchmark.benchmark
import numpy as np
import pytest
import reproduce
import shared_blocks
from cases import ALGORITHMS
from pages import PAGES, README, RESULTS, ROOT, TEXT, anchors, blocks, links, tables

from amortax.algorithms import fqi, gradient_estimators, td3
from amortax.common import base_points, cli, demo, play, record, run

# commands of one line, in blocks or in a sentence, also after `&&`
COMMANDS = sorted(set(re.findall(r"(?:^|`|&& )((?:python (?:-m |[\w/]+\.py)|amortax \w)[^`\n]*)", TEXT, re.MULTILINE)))


def test_python_blocks_print_what_they_say(monkeypatch):
    """Unchanged, but with small networks and batches, which are not in what they print."""
    ours = blocks("python", README)
    assert ours
    monkeypatch.setattr(td3, "Config", functools.partial(td3.Config, hidden_sizes=(8,), batch_size=8))
    said, names = io.StringIO(), {}
    with contextlib.redirect_stdout(said):
        for block in ours:
            assert len(block.strip().splitlines()) <= 10
            exec(block, names)
    assert said.getvalue().splitlines() == re.findall(r"print.*# (\([\d, ]*\))", "".join(ours))
    assert np.abs(np.diff(names["metrics"].critic_loss, axis=0)).min() > 0  # no two seeds are the same


def test_transitions_of_a_gymnasium_loop_are_learned_from(monkeypatch, tmp_path):
    """The text of the page, but for the number of steps; each transition goes on where the last one ended."""
    (block,) = blocks("python", PAGES["algorithms/README.md"])
    assert len(blocks("python")) == 2  # the other is run above
    assert len(block.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    exec(block.replace("10_000", "450"), {})
    assert block.count("10_000") == 1
    points = base_points.load("pendulum.npz", "Pendulum-v1")
    assert (len(points.reward), points.terminated.sum()) == (450, 0)
    goes_on = np.arange(449) % 200 != 199  # Gymnasium's time limit
    np.testing.assert_array_equal(points.next_obs[:-1][goes_on], points.obs[1:][goes_on])
    assert (points.next_obs[[199, 399]] != points.obs[[200, 400]]).any(axis=1).all()
    torque = 2 * points.action[:, 0]
    angle, velocity = np.arctan2(points.obs[:, 1], points.obs[:, 0]), points.obs[:, 2]
    cost = angle**2 + 0.1 * velocity**2 + 0.001 * torque**2
    np.testing.assert_allclose(points.reward, -cost, rtol=1e-3, atol=1e-4)
    assert np.abs(points.action).max() > 0.98
    words = "--num-iterations 1 --fit-steps 20 --hidden-sizes 8 --num-eval-episodes 2 --maximizer-steps 2 --no-plot"
    monkeypatch.setattr(sys, "argv", ["fqi.py", "--base-points", "pendulum.npz", *words.split()])
    monkeypatch.setattr(run, "catch_interrupts", threading.Event)
    with pytest.raises(SystemExit) as end:
        run.main(fqi.Config, fqi.init, fqi.epoch, fqi.num_epochs)
    assert end.value.code == 0
    assert "python algorithms/fqi.py --base-points pendulum.npz\n" in TEXT
    assert record.read_metrics(Path("results/runs/fqi/Pendulum-v1/default/seed_0"))["step"].tolist() == [450]


@pytest.mark.quick
def test_blocks_of_commands_are_those_that_other_tests_run():
    """tests/test_cli.py copies a file and runs it as here; tests/test_estimators.py has the numbers of the table."""
    assert "pip install -e .\npython algorithms/td3.py --seed 0\n" in blocks("bash", README)
    assert 'pip install -e ".[test]" && pytest\n' in blocks("bash", README)
    assert "cp algorithms/td3.py my_idea.py\npython my_idea.py --name first-try\n" in blocks("bash")
    assert "python algorithms/gradient_estimators.py --chapter-table\n" in blocks("bash")


@pytest.mark.quick
@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_accepted_by_its_parser(command, monkeypatch):
    program, script, *words = shlex.split(command.replace("HOST:PORT", "host:1"))
    if script == "-m":
        (script, *words) = words
    if program == "amortax":
        script = "amortax.common.play" if script == "play" else f"algorithms/{script}.py"
    monkeypatch.setattr(sys, "argv", [script, *words])
    name = Path(script).stem
    if script == "amortax.common.play":
        played = cli.parse(play.Play).run
        assert played.name in ("default", "RUN") or (ROOT / played / "policy.npz").exists()
    elif script == "results/reproduce.py":
        names = [word for word in words if not word.startswith("--")]
        assert set(names) - {"NAME"} <= {*reproduce.EXPERIMENTS, "all"}
        assert {word[2:] for word in words} - {name[2:] for name in names} <= {
            field.name for field in dataclasses.fields(reproduce.Reproduce)
        }
    elif script == "results/benchmark/benchmark.py":
        assert f"python {script} {' '.join(words)}" in benchmark.benchmark.__doc__
    elif script == "tests/shared_blocks.py":
        assert f"{' '.join([script, *words])} " in shared_blocks.__doc__
    elif script == "algorithms/NAME.py":
        assert not words
    elif name == "gradient_estimators":
        demo.parse(gradient_estimators.Config)
    else:
        module = importlib.import_module(f"amortax.algorithms.{'td3' if name == 'my_idea' else name}")
        assert name == "my_idea" or (ROOT / script).samefile(module.__file__)
        cli.parse_run(module.Config, module.init)


@pytest.mark.quick
@pytest.mark.parametrize("name", [*PAGES, *RESULTS])
def test_links_and_tables_are_whole(name):
    text = (PAGES | RESULTS)[name]
    for path, anchor in links(text):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), anchor
    for header, *rows in tables(text):
        assert all(len(row) == len(header) for row in rows), header


@pytest.mark.quick
def test_flags_and_files_name_what_exists():
    assert len(COMMANDS) > 10
    classes = [module.Config for module in (*ALGORITHMS.values(), gradient_estimators)]
    classes += [cli.Options, cli.Data, demo.Options, play.Play, reproduce.Reproduce]
    flags = {f"--{field.name.replace('_', '-')}" for x in classes for field in dataclasses.fields(x)}
    commands = re.compile(r"`(?:ruff|python tests/).*?`|^ruff .*$", re.MULTILINE)  # of other programs
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", commands.sub("", TEXT)))
    assert named - flags - {"--help", "--peers", "--no-double"} == set()
    assert set(re.findall(r"\[`(\w+)\.py`\]\(algorithms/\w+\.py\)", README)) == {*ALGORITHMS, "gradient_estimators"}
    for diff in re.findall(r"`diff (\S+) (\S+)`", TEXT):
        assert all((ROOT / path).exists() for path in diff)


@pytest.mark.quick
def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) < 165
    assert lines.index("pip install -e .") < 25


@pytest.mark.quick
def test_every_number_of_the_speed_tables_is_the_measured_one():
    measured = json.loads((ROOT / "results" / "benchmark" / "benchmark.json").read_text())
    lines = benchmark.benchmark.table(measured)
    assert "\n".join(lines) in RESULTS["results/README.md"]
    short = benchmark.benchmark.short_table(measured)
    assert "\n".join(["<!-- speed -->", *short, "<!-- end of speed -->"]) in README
    _, *rows = tables("\n".join(short))[0]
    assert len(rows) == len(benchmark.benchmark.QUOTED)
    for algorithm, case, *numbers in rows:  # are those of the lines of the whole table
        found = [line for line in lines if line.startswith(f"| {algorithm} | {case.removesuffix(', updates/s')} |")]
        assert found
        assert all(re.search(rf"[ ,]{re.escape(number)}\b", " ".join(found)) for number in numbers)
    assert measured["origins"]["peers"] in README

"""The README's code runs as it stands, its commands are accepted by their parsers, its links and numbers exist."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import benchmark.benchmark
import pytest
import reproduce
from cases import ALGORITHMS

from amortax.algorithms import gradient_estimators, td3
from amortax.common import cli, demo, play

ROOT = Path(td3.__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
# commands of one line, in blocks or in a sentence, also after `&&`
COMMANDS = sorted(set(re.findall(r"(?:^|`|&& )(python (?:-m |[\w/]+\.py)[^`\n]*)", TEXT, re.MULTILINE)))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_python_block_prints_what_it_says(monkeypatch):
    """Unchanged, but with small networks and batches, which are not in what it prints."""
    (block,) = blocks("python")
    monkeypatch.setattr(td3, "Config", functools.partial(td3.Config, hidden_sizes=(8,), batch_size=8))
    assert len(block.strip().splitlines()) <= 10
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(block, {})
    assert said.getvalue().splitlines() == re.findall(r"print.*# (\([\d, ]*\))", block)


@pytest.mark.quick
def test_blocks_of_commands_are_those_that_other_tests_run():
    """tests/test_cli.py copies a file and runs it as here; tests/test_estimators.py has the numbers of the table."""
    assert "pip install -e . && python algorithms/td3.py --seed 0\n" in blocks("bash")
    assert 'pip install -e ".[test]" && pytest\n' in blocks("bash")
    assert "cp algorithms/td3.py my_idea.py\npython my_idea.py --name first-try\n" in blocks("bash")
    assert "python algorithms/gradient_estimators.py --chapter-table\n" in blocks("bash")


@pytest.mark.quick
@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_accepted_by_its_parser(command, monkeypatch):
    _, script, *words = shlex.split(command.replace("HOST:PORT", "host:1"))
    if script == "-m":
        (script, *words) = words
    monkeypatch.setattr(sys, "argv", [script, *words])
    name = Path(script).stem
    if script == "amortax.common.play":
        assert cli.parse(play.Play).run.name == "default"
    elif script == "results/reproduce.py":
        names = [word for word in words if not word.startswith("--")]
        assert set(names) - {"NAME"} <= {*reproduce.EXPERIMENTS, "all"}
        assert {word[2:] for word in words} - {name[2:] for name in names} <= {
            field.name for field in dataclasses.fields(reproduce.Reproduce)
        }
    elif script == "results/benchmark/benchmark.py":
        assert f"python {script} {' '.join(words)}" in benchmark.benchmark.__doc__
    elif name == "gradient_estimators":
        demo.parse(gradient_estimators.Config)
    else:
        module = importlib.import_module(f"amortax.algorithms.{'td3' if name == 'my_idea' else name}")
        assert name == "my_idea" or (ROOT / script).samefile(module.__file__)
        cli.parse_run(module.Config, module.init)


@pytest.mark.quick
def test_flags_and_links_name_what_exists():
    assert len(COMMANDS) > 10
    for link in re.findall(r"\]\(([\w./-]+)[#)]", TEXT):
        assert (ROOT / link).exists(), link
    headings = {x.lower() for x in re.findall(r'<a (?:id|name)="(.*?)"', (ROOT / "results" / "README.md").read_text())}
    headings |= set(re.findall(r"^#+ (\w+)$", (ROOT / "results" / "README.md").read_text(), re.MULTILINE))
    for anchor in re.findall(r"\]\(results/README.md#([\w-]+)\)", TEXT):
        assert anchor in headings, anchor
    classes = [module.Config for module in (*ALGORITHMS.values(), gradient_estimators)]
    classes += [cli.Options, cli.Data, demo.Options, play.Play, reproduce.Reproduce]
    flags = {f"--{field.name.replace('_', '-')}" for x in classes for field in dataclasses.fields(x)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT))
    assert named - flags - {"--help", "--peers"} == set()
    for name in [*ALGORITHMS, "gradient_estimators"]:
        assert f"[`{name}.py`](algorithms/{name}.py)" in TEXT
    for diff in re.findall(r"`diff (\S+) (\S+)`", TEXT):
        assert all((ROOT / path).exists() for path in diff)


@pytest.mark.quick
def test_every_number_of_the_speed_tables_is_the_measured_one():
    """The table of `results/README.md` is that of `benchmark.json`; the README quotes lines of it."""
    measured = json.loads((ROOT / "results" / "benchmark" / "benchmark.json").read_text())
    table = benchmark.benchmark.table(measured)
    assert "\n".join(table) in (ROOT / "results" / "README.md").read_text()
    speed = TEXT[TEXT.index("## Speed") :].split("\n## ")[0]
    quoted = [line for line in speed.splitlines() if re.match(r"\| \w+ \| ", line) and "| case |" not in line]
    assert len(quoted) > 5
    assert set(quoted) <= set(table)
    assert measured["machine"] in speed

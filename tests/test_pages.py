"""The pages of the algorithms and of the chapter: each flag, metric, function, test and verdict is that of the code."""

import ast
import dataclasses
import functools
import importlib
import re

import pytest
import reproduce
from cases import ALGORITHMS
from experiments import study
from pages import ALGORITHM_PAGE, CHAPTER, CONTRIBUTING, PAGES, README, ROOT, RUNNER, TEXT, section, tables

from amortax.algorithms import gradient_estimators
from amortax.common import demo, plot

FILES = {**ALGORITHMS, "gradient_estimators": gradient_estimators}
PARTS = ["What it does", "It adds", "Flags", "Metrics", "Differences from the paper", "Results", "Tests"]
SHARED = {re.sub("`", "", row[0]): row for row in tables(section(ALGORITHM_PAGE, "## Metrics in all files"))[0][1:]}
SECTIONS = (  # of the chapter
    "20. Embedded optimization", "20.1 Amortized optimization", "21. Deterministic parametrized policies",
    "21.1 Neural fitted Q-iteration for continuous actions (NFQCA)", "21.2 Deep deterministic policy gradient (DDPG)",
    "21.3 Twin delayed deep deterministic policy gradient (TD3)", "22. Stochastic policy parameterization",
    "22.1 Soft actor-critic", "22.1.1 Fitted Q-iteration for the smooth Bellman equations",
    "22.1.2 Approximating Boltzmann policies by Gaussians", "22.1.3 Reparameterizing the objective",
    "23. Derivative estimation for stochastic optimization", "23.1 Change of measure: the likelihood ratio method",
    "23.2 A change of variables: the reparameterization trick", "23.2.1 Common examples of reparameterization",
    "23.3 Demonstration: numerical analysis of gradient estimators",
    "24. Stochastic value gradients with model-based rollouts",
)  # fmt: skip
BOXES = (
    "fitted Q-iteration with explicit optimization", "fitted Q-iteration with amortized optimization", "NFQCA", "DDPG",
    "TD3", "soft actor-critic", "SVG(infinity), manual gradient evaluation", "SVG(infinity), automatic differentiation",
)  # fmt: skip


def parts(name):
    """The parts of an algorithm's section by their titles, in the order of the page."""
    _, *rest = re.split(r"^\*\*(.*?)\.?\*\* ?", section(ALGORITHM_PAGE, f"## {name}"), flags=re.MULTILINE)
    titles = [title.replace("papers", "paper") for title in rest[::2]]
    return dict(zip(titles, rest[1::2], strict=True))


def names_in(text):
    return set(re.findall(r"`(\w+)`", text))


@functools.cache
def names_of_tests(path):
    return {node.name for node in ast.parse((ROOT / "tests" / path).read_text()).body if hasattr(node, "name")}


def functions_in(text):
    """The modules and names of `file.name` in a text."""
    folders = {path.stem: path.parent.name for name in ("algorithms", "common") for path in (ROOT / name).glob("*.py")}
    named = [(file, name) for file, name in re.findall(r"`(\w+)\.([\w.]+)`", text) if name not in ("py", "npz")]
    return [(f"amortax.{folders[file]}.{file}", name) for file, name in named if file in folders]


@pytest.mark.quick
def test_every_file_has_a_section():
    headings = re.findall(r"^## (\w+)$", ALGORITHM_PAGE, re.MULTILINE)
    assert sorted(headings) == sorted(FILES) == sorted(p.stem for p in (ROOT / "algorithms").glob("[!_]*.py"))
    assert all(f"](#{name})" in ALGORITHM_PAGE for name in FILES)


@pytest.mark.quick
@pytest.mark.parametrize("name", FILES)
def test_sections_have_the_same_form(name):
    found = parts(name)
    assert list(found) == PARTS
    assert len(re.split(r"(?<=[.?!])\s+(?=[A-Z])", found["What it does"].strip())) == 3
    assert found["It adds"].count("```math\n") == 1
    assert section(ALGORITHM_PAGE, f"## {name}").strip().startswith(f"[`{name}.py`]({name}.py) · ")
    assert "::test_" in found["Tests"]


@pytest.mark.quick
@pytest.mark.parametrize("name", FILES)
def test_flags_are_those_of_the_file(name):
    fields = dataclasses.fields(FILES[name].Config)
    fields += dataclasses.fields(demo.Options) if name == "gradient_estimators" else ()
    flags = {f"--{field.name.replace('_', '-')}" for field in fields}
    flags |= {f"--no-{field.name.replace('_', '-')}" for field in fields if field.default is True}
    named = set(re.findall(r"--[a-z][a-z-]*", " ".join(parts(name).values())))
    assert named
    assert named <= flags


@pytest.mark.quick
@pytest.mark.parametrize("name", FILES)
def test_every_metric_is_explained(name):
    """Once for all files or in the section of its own; what both explain is more particular there."""
    text = parts(name)["Metrics"]
    own = [row for table in tables(text) for row in table[1:]]
    if name == "gradient_estimators":
        fields = gradient_estimators.Estimates._fields + gradient_estimators.Statistics._fields
        listed = set()
    else:
        fields = FILES[name].Metrics._fields
        listed = names_in(re.search(r"Explained above: (.*?)\.(?:\s|$)", text, re.DOTALL)[1])
        assert listed == set(SHARED) & set(fields)
    explained = {metric for row in own for metric in names_in(row[0])}
    assert listed | explained == set(fields)
    assert all(row[1] and row[2] for row in [*own, *SHARED.values()])


@pytest.mark.quick
def test_shared_metrics_are_metrics():
    assert set(SHARED) <= {metric for module in ALGORITHMS.values() for metric in module.Metrics._fields}


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES)
def test_functions_and_tests_exist(page):
    for module, name in functions_in(PAGES[page]):
        functools.reduce(getattr, name.split("."), importlib.import_module(module))
    for path, name in re.findall(r"`(test_\w+\.py)::(\w+)`", PAGES[page]):
        assert name in names_of_tests(path), f"{path}::{name}"


@pytest.mark.quick
def test_the_chapter_is_complete():
    headings = re.findall(r"^##+ (\d.*)$", CHAPTER, re.MULTILINE)
    assert tuple(headings) == SECTIONS
    rows = [row for table in tables(CHAPTER) for row in table[1:]]
    assert tuple(re.findall(r"\*\*box: (.*?)\*\*", CHAPTER)) == BOXES
    for equation, function, test, _ in rows:
        assert functions_in(function), equation
        assert "::test_" in test, equation
    assert {module.split(".")[-1] for module, _ in functions_in(CHAPTER)} >= {*FILES} - {"dqn", "ppo", "shac"}


@pytest.mark.quick
def test_verdicts_are_those_of_the_data():
    table = reproduce.claims_table(reproduce.EXPERIMENTS)
    verdicts = dict(re.findall(r"\(#(\w+)\) \| (.*?) \|", table))
    told = re.findall(r"results/README\.md#(\w+)\)\s\(\*(.*?)\*\)", f"{ALGORITHM_PAGE}\n{CHAPTER}", re.DOTALL)
    assert len(told) > 30
    for name, verdict in told:
        assert " ".join(verdict.split()) == verdicts[name], name


@pytest.mark.quick
def test_returns_beside_published_ones_are_those_of_the_data():
    rows = tables(section(ALGORITHM_PAGE, "## Returns beside published ones"))[0][1:]
    measured = [(re.fullmatch(r"\[(\w+)\]\(#\1\)", file)[1], env, here) for file, env, here, *_ in rows if here]
    assert len(measured) > 5
    for algorithm, env, here in measured:
        value, name, steps = re.fullmatch(r"\[(.*)\]\(\.\./results/README\.md#(\w+)\) after (.*)", here).groups()
        data = study.numbers(study.read(ROOT / "results" / "data" / f"{name}.csv"))
        (label,) = {f"{algorithm} on {env}", algorithm} & {*study.labels(data)}
        found = plot.iqm(study.final(data, label)), study.trained_for(data, label)
        assert (value, steps) == (f"{found[0]:z,.0f}", f"{found[1]:,.0f}"), label


@pytest.mark.quick
def test_every_module_of_the_runner_is_listed():
    listed = re.findall(r"\[`(\w+)\.py`\]", section(RUNNER, "## Modules"))
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "common").glob("[!_]*.py"))


@pytest.mark.quick
def test_the_workflow_has_the_steps_of_the_gate():
    workflow = (ROOT / ".github" / "workflows" / "gate.yml").read_text()
    steps = (ROOT / ".ci" / "run").read_text().split("\n\n")[-1].splitlines()[2:]
    assert steps == ["ruff check .", "ruff format --check .", "pytest"]
    assert [f"      - run: {step}" for step in steps] == workflow.splitlines()[-3:]
    assert 'pip install -e ".[test]"' in README
    assert '-e ".[test]"\n' in workflow
    assert all(step in CONTRIBUTING for step in steps)
    lowest = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f'python: "{lowest}", resolution: lowest-direct' in workflow
    assert f"Python {lowest} or later" in README


@pytest.mark.quick
def test_files_that_pages_name_exist():
    for path in set(re.findall(r"\b((?:algorithms|common|tests|results)/[\w/]+\.(?:py|md|csv|diff))\b", TEXT)):
        assert (ROOT / path).exists() or "NAME" in path, path

"""The README's code runs as it stands, and its commands name what exists."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

from algorithms import (
    ddpg,
    fqi,
    fqi_amortized,
    gradient_estimators,
    nfqca,
    reinforce,
    sac,
    sac_value,
    soft_fqi,
    svg,
    td3,
)
from common import cli, demo, play

ROOT = Path(td3.__file__).parent.parent
ALGORITHMS = (fqi, fqi_amortized, nfqca, soft_fqi, ddpg, td3, sac_value, sac, gradient_estimators, reinforce, svg)
CLASSES = (*(module.Config for module in ALGORITHMS), cli.Options, demo.Options, play.Play)
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_python_block_prints_what_it_says(tmp_path):
    (block,) = blocks("python")
    assert len(block.strip().splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == re.findall(r"print.*# (\([\d, ]*\))", block)


def test_copied_file_runs_anywhere_with_the_command_line(tmp_path):
    commands = next(block for block in blocks("bash") if "cp " in block).strip()
    small = " --total-steps 128 --learning-starts 64 --steps-per-epoch 64 --batch-size 16 --num-eval-episodes 2"
    script = commands.replace("algorithms", str(ROOT / "algorithms")).replace("python", sys.executable)
    subprocess.run(["bash", "-ec", script + small], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "results/runs/my_idea/Pendulum-v1/first-try/seed_0/policy.npz").exists()


def test_commands_and_links_name_what_exists(capsys):
    assert "pip install -e . && python algorithms/td3.py --seed 0\n" in blocks("bash")
    assert 'pip install -e ".[test]" && pytest\n' in blocks("bash")
    for link in re.findall(r"\]\(([\w./-]+)[#)]", TEXT):
        assert (ROOT / link).exists(), link
    flags = {f"--{name.replace('_', '-')}" for c in CLASSES for name in c.__annotations__}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT))
    assert named - flags - {"--help", "--peers", "--list"} == set()


def test_every_figure_of_speed_is_the_measured_one():
    """The table of `results/README.md` is that of `results/benchmark.json`; the README quotes lines of it."""
    table = load_script("benchmark").table(json.loads((ROOT / "results" / "benchmark.json").read_text()))
    assert "\n".join(table) in (ROOT / "results" / "README.md").read_text()
    quoted = [line for line in TEXT[TEXT.index("## Speed") :].splitlines() if re.match(r"\| (td3|sac) \|", line)]
    assert len(quoted) > 5
    assert set(quoted) <= set(table)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

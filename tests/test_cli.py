"""The command line: every field is a flag; a mistake gets one line on stderr, exit code 2, and writes nothing."""

import dataclasses
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import gymnax
import jax
import pytest
from cases import ALGORITHMS, CONFIGS, replace
from test_run import flags_of

from amortax.algorithms import ddpg, dqn, fqi, nfqca, ppo, soft_fqi, svg, td3
from amortax.common import checks, cli, demo, envs, main, record, run

SCRIPT = Path(td3.__file__)


def fails(monkeypatch, capsys, out, *flags, module=td3):
    """Run the command in this process; return its one line of error after checking the rest."""
    monkeypatch.setattr(sys, "argv", ["td3.py", "--out", str(out), *flags])
    with pytest.raises(SystemExit) as error:
        run.main(module.Config, module.init, module.epoch, module.num_epochs)
    said = capsys.readouterr()
    assert error.value.code == 2
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")
    assert not said.out
    return said.err


# Mistakes: one of each kind; tests/test_contract.py has the range of every field


MISTAKES = [
    (td3, "--env Pendulum-v2", ["--env Pendulum-v2: no such", "nearest: Pendulum-v1"]),
    (td3, "--env pendulum", ["--env pendulum: no such", "nearest: Pendulum-v1"]),
    (td3, "--env zzz", ["--env zzz: no such", "Reacher-misc"]),
    (td3, "--env CartPole-v1", ["--env CartPole-v1: must have actions in a Box", "some that fit:", "Swimmer-misc"]),
    (dqn, "--env Pendulum-v1", ["--env Pendulum-v1: must have Discrete actions", "some that fit:", "Acrobot-v1"]),
    (svg, "--env Table-test", ["--env Table-test: must have transition gradients", "some that fit:", "Swimmer-misc"]),
    (dqn, "--loss absolute", ["--loss", "absolute", "huber"]),
    (dqn, "--target-period 0", ["--target-period 0: must be from 1"]),
    (ppo, "--clip 0", ["--clip 0.0: must be > 0\n"]),
    (ppo, "--num-minibatches 3", ["--num-minibatches 3: must divide", "the 2048 transitions of num_envs * num_steps"]),
    (ppo, "--num-minibatches 2048", ["--num-minibatches 2048: must divide", "into parts of 2 or more"]),
    (td3, "--env Unbounded-test", ["--env Unbounded-test: must have", "finite bounds", "Swimmer-misc"]),
    (fqi, "--env Unbounded-test", ["--env Unbounded-test: must have Discrete", "finite bounds", "Swimmer-misc"]),
    (td3, "--env no_such_module:make", ["--env no_such_module:make", "module:factory"]),
    (td3, "--env math:pi", ["--env math:pi", "callable"]),
    (td3, "--env math:sqrt", ["--env math:sqrt", "cannot be made"]),
    (td3, "--total-steps 0", ["--total-steps 0: must be from 1 to 2147483647\n"]),
    (td3, "--total-steps 3000000000", ["--total-steps 3000000000: must be from 1 to 2147483647\n"]),
    (td3, "--total-steps 2147483647", ["--total-steps 2147483647: must be less: 2147484000 are too many to count\n"]),
    (td3, "--buffer-size 2147483647", ["--buffer-size 2147483647: must be less: 2147483648 are too many to count\n"]),
    (td3, "--total-steps 1e4", ["--total-steps", "1e4"]),
    (td3, "--hidden-sizes 64 0", ["--hidden-sizes 0: must be from 1"]),
    (td3, "--gamma 1.5", ["--gamma 1.5: must be in [0, 1]\n"]),
    (td3, "--gamma nan", ["--gamma nan: must be in [0, 1]\n"]),
    (td3, "--gamma abc", ["--gamma", "abc"]),
    (td3, "--gamma", ["--gamma"]),
    (td3, "--learning-rate 0", ["--learning-rate 0.0: must be > 0\n"]),
    (td3, "--exploration-noise -0.1", ["--exploration-noise -0.1: must be >= 0\n"]),
    (ddpg, "--ou-mu inf", ["--ou-mu inf: must be finite\n"]),
    (td3, "--utd-ratio 0.3", ["--utd-ratio 0.3: must make whole updates"]),
    (td3, "--buffer-size 2000000000", ["--buffer-size 2000000000: a run needs", "GiB"]),
    (td3, "--num-seeds 0", ["--num-seeds 0: must be from 1"]),
    (td3, "--seed -1", ["--seed -1: must be from 0"]),
    (td3, "--seed 2147483647", ["--seed 2147483647: must be from 0 to 2147483646"]),
    (td3, "--seed 1.5", ["--seed", "1.5"]),
    (td3, "--name a/b", ["--name 'a/b'", "folder name"]),
    (td3, "--name ..", ["--name '..'", "folder name"]),
    (td3, "--gama 0.9", ["--gama", "(perhaps you meant --gamma)", "--help lists all flags"]),
    (td3, "--track mlflow", ["--track", "mlflow", "wandb"]),
    (td3, "--num-processes 2", ["--num-processes and --process-id need --distributed"]),
    (td3, "--resume", ["--resume: nothing to resume in"]),
    (td3, "stray", ["stray"]),
    (fqi, "--maximizer magic", ["--maximizer", "magic", "gradient"]),
    (fqi, "--maximizer exhaustive", ["--maximizer exhaustive: must be", "gradient", "Pendulum-v1 are a Box"]),
    (fqi, "--env CartPole-v1", ["--maximizer gradient: must be exhaustive", "CartPole-v1 are Discrete"]),
    (fqi, "--maximizer grid --num-candidates 100001", ["--num-candidates 100001", "grid", "too large"]),
    (fqi, "--maximizer my_solvers:solve", ["--maximizer my_solvers:solve: No module named 'my_solvers'"]),
    (fqi, "--maximizer milp", ["--maximizer milp: must be used with a network, and with activation relu"]),
    (fqi, f"--base-points {SCRIPT}", ["--base-points", "td3.py: cannot be read"]),
    (fqi, "--base-points no_such.npz", ["--base-points no_such.npz: cannot be read"]),
    (fqi, "--num-base-points 100 --save-base-points points.txt", ["--save-base-points points.txt", ".npz"]),
    (fqi, "--num-base-points 100 --save-base-points /proc/p.npz", ["--save-base-points /proc/p.npz: cannot write"]),
    (td3, "--base-points points.npz", ["--base-points", "--help lists all flags"]),
    (nfqca, "--env CartPole-v1", ["--env CartPole-v1: must have actions in a Box", "Swimmer-misc"]),
    (soft_fqi, "--num-nodes 100001", ["--num-nodes 100001", "too large"]),
    (soft_fqi, "--env CartPole-v1 --integral dual", ["--integral dual: must be quadrature", "Discrete"]),
]


@pytest.mark.parametrize(("module", "flags", "named"), MISTAKES, ids=[f"{m.__name__[19:]} {f}" for m, f, _ in MISTAKES])
def test_mistake(monkeypatch, capsys, tmp_path, module, flags, named):
    line = fails(monkeypatch, capsys, tmp_path / "out", *flags.split(), module=module)
    for text in named:
        assert text in line
    assert not (tmp_path / "out").exists()


def test_out_is_a_file_or_not_writable(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert f"--out {tmp_path / 'file'}" in fails(monkeypatch, capsys, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert "--out /proc/runs: cannot write" in fails(monkeypatch, capsys, "/proc/runs")


@pytest.mark.quick
@pytest.mark.parametrize(
    "fields",
    [
        {"num_envs": 1},
        {"num_envs": 7},
        {"num_envs": 16},
        {"policy_delay": 3},
        {"total_steps": 10_501},
        {"total_steps": 10, "learning_starts": 10_000},
        {"steps_per_epoch": 1001},
        {"batch_size": 1001, "learning_starts": 64},
        {"buffer_size": 1001},
    ],
    ids=str,
)
def test_counts_need_not_be_multiples_of_each_other(fields):
    """Such a run is accepted, and has at least one epoch that has at least one iteration."""
    config = replace(td3.Config(), **fields)
    checks.check_config(config, td3.init)
    checks.check_config(config, td3.train)
    assert td3.num_epochs(config) >= 1


# Flags


def test_help_shows_every_field_with_its_rule(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["td3.py", "--help"])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as error:
        run.main(td3.Config, td3.init, td3.epoch, td3.num_epochs)
    text = capsys.readouterr().out
    assert error.value.code == 0
    rules = {"seed": ">= 0", "num_seeds": ">= 1"}
    for field in dataclasses.fields(td3.Config):
        kind = td3.Count if field.type == tuple[td3.Count, ...] else field.type
        (rules[field.name],) = getattr(kind, "__metadata__", [""])
    for field in dataclasses.fields(td3.Config) + dataclasses.fields(cli.Options):
        flag, rule = f"--{field.name.replace('_', '-')}", rules.get(field.name, "")
        assert any(f"{flag} " in line and rule in line for line in text.splitlines()), (flag, rule)
    assert "--gamma FLOAT in [0, 1]" in text
    assert "--num-envs INT from 1 to 2147483647" in text
    assert "--hidden-sizes [INT ...] from 1 to 2147483647" in text
    assert "--init-from PATH" in text
    assert "environment steps, warm-up included" in text
    assert td3.__doc__.splitlines()[0][:60] in text


@pytest.mark.parametrize(
    "words",
    [
        (SCRIPT, "--help"),
        (SCRIPT, "--list-envs"),
        ("-m", "amortax.common.main", "--help"),
        (SCRIPT.parent.parent / "results" / "reproduce.py", "--list"),
    ],
)
def test_a_reader_that_has_enough_ends_it_quietly(words):
    """As in `--help | head`; a text shorter than the buffer is written only at the end."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, *words], stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_every_field_is_read_from_its_flag(monkeypatch):
    """All fields of all kinds at once, each with a value that is not its default."""
    changed = {"env": "LQR-v0", "hidden_sizes": (8, 9, 10), "activation": "elu"}
    for field in dataclasses.fields(td3.Config):
        if field.name not in changed:
            changed[field.name] = field.default * 2 if isinstance(field.default, int) else field.default / 2
    config = td3.Config(**changed)
    words = "--seed 7 --num-seeds 2 --no-plot --out x --name n --resume --list-envs --sweep gamma=0.1 --sweep tau=0.2"
    words += " --env-params g=9.8 dt=0.1 --traceback --keep-state never --init-from run"
    words += " --track wandb tensorboard --distributed --coordinator-address a:1 --num-processes 3 --process-id 2"
    monkeypatch.setattr(sys, "argv", ["td3.py", *flags_of(config), *words.split()])
    expected = {"seed": 7, "num_seeds": 2, "sweep": ("gamma=0.1", "tau=0.2"), "name": "n", "out": Path("x")}
    expected |= {"env_params": ("g=9.8", "dt=0.1"), "traceback": True, "list_envs": True}
    expected |= {"resume": True, "no_plot": True, "track": ("wandb", "tensorboard"), "distributed": True}
    expected |= {"keep_state": "never", "init_from": Path("run")}
    expected |= {"coordinator_address": "a:1", "num_processes": 3, "process_id": 2}
    assert set(expected) == {field.name for field in dataclasses.fields(cli.Options)}
    assert cli.parse_run(td3.Config, td3.init) == (config, cli.Options(**expected), cli.Data())


def test_files_of_base_points_are_flags_where_init_takes_them(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fqi.py", "--base-points", "a.npz", "--save-base-points", "b.npz"])
    _, _, data = cli.parse_run(fqi.Config, fqi.init)
    assert data == cli.Data(Path("a.npz"), Path("b.npz"))


def test_user_environment(monkeypatch, tmp_path):
    (tmp_path / "my_env.py").write_text(
        "from gymnax.environments.classic_control.pendulum import Pendulum\n\n\ndef make():\n    return Pendulum()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    envs.register("my_env:make")
    env, _ = gymnax.make("my_env:make")
    assert env.name == "Pendulum-v1"
    assert jax.eval_shape(td3.init, td3.Config(env="my_env:make"), jax.random.key(0)).obs.shape == (8, 3)


# The command `amortax`


@pytest.fixture
def amortax(monkeypatch, capsys):
    """Run `amortax WORDS` in this process: `(exit code, stdout, stderr)`."""

    def run_words(*words):
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/amortax", *words])
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # to have it back
        code = 0
        try:
            main.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run_words


@pytest.mark.quick
@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_amortax_lists_every_command(amortax, words):
    """In one line each, which is its name and what it is."""
    code, out, err = amortax(*words)
    assert (code, err) == (0, "")
    lines = re.findall(r"^  (\w+) +(\S.*[^.])$", out, re.MULTILINE)
    assert [name for name, _ in lines] == [*sorted([*ALGORITHMS, "gradient_estimators"]), "play"]
    assert dict(lines)["ddpg"] == "Deep Deterministic Policy Gradient (DDPG)"
    assert max(map(len, out.splitlines())) < 120


@pytest.mark.quick
@pytest.mark.parametrize(("word", "nearest"), [("tdd3", "td3"), ("SAC-value", "sac_value"), ("pla", "play")])
def test_amortax_names_the_nearest_command(amortax, word, nearest):
    line = f"error: {word}: no such command; nearest: {nearest}; amortax --help lists all\n"
    assert amortax(word, "--seed", "0") == (2, "", line)


@pytest.mark.quick
def test_amortax_names_a_command_for_any_word(amortax):
    for word in ("", "-", "--seed", "../td3", "td3.py", "__init__"):
        code, out, err = amortax(word)
        assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.quick
@pytest.mark.parametrize("name", [*ALGORITHMS, "gradient_estimators"])
def test_amortax_runs_the_file_as_a_script(amortax, monkeypatch, name):
    """The runner gets the functions of the file itself, with the flags as they were given."""
    seen = []
    for module in (run, demo):
        monkeypatch.setattr(module, "main", lambda *args: seen.append((args, sys.argv)))
    assert amortax(name, "--seed", "3") == (0, "", "")
    (((config_class, function, *_), argv),) = seen
    assert Path(inspect.getsourcefile(function)).samefile(SCRIPT.with_stem(name))
    assert config_class.__module__ == "__main__"
    assert argv == [f"amortax {name}", "--seed", "3"]


def test_amortax_has_the_flags_and_the_mistakes_of_the_file(amortax):
    assert "usage: amortax td3 [-h] [OPTIONS]" in amortax("td3", "--help")[1]
    assert "usage: amortax play [-h] [OPTIONS] RUN" in amortax("play", "--help")[1]
    assert amortax("td3", "--gamma", "2") == (2, "", "error: --gamma 2.0: must be in [0, 1]\n")
    assert amortax("play", "nowhere") == (2, "", "error: nowhere: no such folder\n")


@pytest.mark.quick
def test_hint_of_the_command_that_was_given(monkeypatch):
    for argv, hint in (
        (["amortax td3", "--name", "a b"], "amortax td3 --name 'a b' --resume"),
        (["td3.py", "--resume", "--seed", "1"], "python td3.py --resume --seed 1"),
        (["/my folder/td3.py"], "python '/my folder/td3.py' --resume"),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        assert cli.resume_command() == hint


@pytest.mark.quick
def test_amortax_is_installed_as_a_command():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"amortax": "amortax.common.main:main"}


# A copied file


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A folder with a copy of an algorithm file, some fields and one rule more, and files named as this project's."""
    folder = tmp_path_factory.mktemp("copy")
    text = SCRIPT.read_text()
    fields = (
        'my_number: Annotated[float, "in [2, 3]"] = 2.5  # what I try',
        "lag: int = 0  # a leaf",
        "num_lags: int = jax.tree.static(default=0)  # static",
        "learning_rate_decay: float = 0.0  # named as others that must be > 0",
        "offsets: tuple[int, ...] = jax.tree.static(default=(0, -1))  # several",
        "label: str | None = jax.tree.static(default=None)  # a text, or none",
    )
    for old, new in (
        ("    tau: Annotated", "".join(f"    {field}\n" for field in fields) + "    tau: Annotated"),
        ("RULES = {\n", 'RULES = {\n    "in [2, 3]": lambda x: (x >= 2) & (x <= 3),\n'),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "my_idea.py").write_text(text)
    for name in ("common.py", "algorithms/__init__.py", "algorithms/td3.py", "jax_utils.py", "wandb/latest-run"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise RuntimeError('not mine')\n")
    return folder


def test_copied_file_runs_beside_whatever_lies_there(copy):
    """By the command of the README, with a field of its own."""
    config = replace(CONFIGS["td3"], total_steps=80, hidden_sizes=(4,), num_eval_episodes=1)
    words = ["--name", "first-try", "--my-number", "3", "--label", "x", "--no-plot", *flags_of(config)]
    done = subprocess.run([sys.executable, "my_idea.py", *words], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = copy / "results/runs/my_idea/Pendulum-v1/first-try/seed_0"
    assert (folder / "policy.npz").exists()
    written = record.read_config(folder)["config"]
    assert (written["my_number"], written["lag"], written["num_lags"], written["label"]) == (3, 0, 0, "x")


def test_field_of_a_copied_file_is_checked_by_its_own_rule(copy, monkeypatch, capsys, tmp_path):
    spec = importlib.util.spec_from_file_location("my_idea", copy / "my_idea.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_idea", module)  # where the command line looks for the docstring
    spec.loader.exec_module(module)
    line = fails(monkeypatch, capsys, tmp_path / "out", "--my-number", "3.5", module=module)
    assert line == "error: --my-number 3.5: must be in [2, 3]\n"
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["my_idea.py", "--help"])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        cli.parse_run(module.Config, module.init)
    text = capsys.readouterr().out
    assert "--my-number FLOAT in [2, 3]" in text
    assert "--lag INT " in text
    assert "--lag INT from" not in text
    assert "what I try" in text


@pytest.mark.quick
@pytest.mark.parametrize("fields", [{}, {"lag": -3, "num_lags": -1, "learning_rate_decay": -0.5}, {"label": "any"}])
def test_field_without_a_rule_takes_any_number(copy, fields):
    """Whatever it is called, and whether it is a leaf or static; only a number that is not finite is refused."""
    spec = importlib.util.spec_from_file_location("my_idea", copy / "my_idea.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.check(module.Config(**fields))
    with pytest.raises(ValueError, match=r"^learning_rate_decay=nan: must be finite"):
        module.check(module.Config(learning_rate_decay=float("nan")))


def test_mistake_in_the_shell_has_no_traceback(copy, tmp_path):
    command = [sys.executable, copy / "my_idea.py", "--my-number", "1", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --my-number 1.0: must be in [2, 3]\n"
    assert not list(tmp_path.iterdir())

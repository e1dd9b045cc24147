"""Mistakes get one line on stderr that names flag and value, exit code 2, and leave nothing behind."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import gymnax
import jax
import pytest
from gymnax.environments import spaces
from gymnax.environments.classic_control.pendulum import Pendulum

from algorithms import ddpg, fqi, fqi_amortized, nfqca, sac, sac_value, soft_fqi, td3
from common import cli, run

SCRIPT = Path(td3.__file__)


def fails(monkeypatch, capsys, out, *flags, module=td3):
    """Run the command in this process; return its one line of error after checking the rest."""
    monkeypatch.setattr(sys, "argv", ["td3.py", "--out", str(out), *flags])
    with pytest.raises(SystemExit) as error:
        run.main(module.Config, module.init, module.epoch)
    said = capsys.readouterr()
    assert error.value.code == 2
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")
    assert not said.out
    return said.err


MISTAKES = [
    ("--env Pendulum-v2", ["--env Pendulum-v2", "Pendulum-v1"]),
    ("--env pendulum", ["--env pendulum", "Pendulum-v1"]),
    ("--env zzz", ["--env zzz", "Reacher-misc"]),
    ("--env CartPole-v1", ["--env CartPole-v1", "Box", "Swimmer-misc"]),
    ("--env no_such_module:make", ["--env no_such_module:make", "module:factory"]),
    ("--env math:pi", ["--env math:pi", "callable"]),
    ("--env math:sqrt", ["--env math:sqrt", "cannot be made"]),
    ("--total-steps 0", ["--total-steps 0", "from 1"]),
    ("--total-steps -5", ["--total-steps -5", "from 1"]),
    ("--total-steps 3000000000", ["--total-steps 3000000000", "to 2147483647"]),
    ("--total-steps 1e4", ["--total-steps", "1e4"]),
    ("--num-envs 0", ["--num-envs 0", "from 1"]),
    ("--num-envs 7", ["--learning-starts 1000", "multiple of 14", "num_envs=7"]),
    ("--num-seeds 0", ["--num-seeds 0", "from 1"]),
    ("--seed -1", ["--seed -1", "from 0"]),
    ("--seed 1.5", ["--seed", "1.5"]),
    ("--hidden-sizes 64 0", ["--hidden-sizes 0", "from 1"]),
    ("--policy-delay 0", ["--policy-delay 0", "from 1"]),
    ("--num-eval-episodes 0", ["--num-eval-episodes 0", "from 1"]),
    ("--gamma 1.01", ["--gamma 1.01", "[0, 1]"]),
    ("--gamma nan", ["--gamma nan", "finite"]),
    ("--gamma abc", ["--gamma", "abc"]),
    ("--tau -0.1", ["--tau -0.1", "[0, 1]"]),
    ("--learning-rate inf", ["--learning-rate inf", "finite"]),
    ("--learning-rate 0", ["--learning-rate 0", "more than 0"]),
    ("--exploration-noise -0.1", ["--exploration-noise -0.1", "0 or more"]),
    ("--target-noise -1", ["--target-noise -1", "0 or more"]),
    ("--noise-clip -1", ["--noise-clip -1", "0 or more"]),
    ("--batch-size 1001", ["--batch-size 1001", "at most 1000", "warm-up"]),
    ("--batch-size 32 --buffer-size 16", ["--batch-size 32", "at most 16"]),
    ("--buffer-size 1001", ["--buffer-size 1001", "multiple of 8"]),
    ("--buffer-size 2000000000", ["--buffer-size 2000000000", "GiB"]),
    ("--learning-starts 10000", ["--learning-starts 10000", "less than total_steps=10000"]),
    ("--steps-per-epoch 1001", ["--steps-per-epoch 1001", "multiple of 8"]),
    ("--total-steps 10500", ["--total-steps 10500", "multiple of steps_per_epoch=1000"]),
    ("--name a/b", ["--name 'a/b'", "folder name"]),
    ("--name ..", ["--name '..'", "folder name"]),
    ("--gama 0.9", ["--gama", "--gamma"]),
    ("--gamma", ["--gamma"]),
    ("--track mlflow", ["--track", "mlflow", "wandb"]),
    ("--resume", ["--resume", "nothing to resume"]),
    ("stray", ["stray"]),
]


@pytest.mark.parametrize(("flags", "named"), MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_mistake(monkeypatch, capsys, tmp_path, flags, named):
    out = tmp_path / "out"
    line = fails(monkeypatch, capsys, out, *flags.split())
    for text in named:
        assert text in line
    assert not out.exists()


OWN_MISTAKES = [
    (ddpg, "--target-period 0", ["--target-period 0", "from 1"]),
    (ddpg, "--target-period 7", ["--learning-starts 1000", "multiple of 56", "target_period"]),
    (ddpg, "--ou-theta -1", ["--ou-theta -1", "0 or more"]),
    (ddpg, "--ou-sigma -1", ["--ou-sigma -1", "0 or more"]),
    (ddpg, "--ou-dt 0", ["--ou-dt 0", "more than 0"]),
    (ddpg, "--ou-mu nan", ["--ou-mu nan", "finite"]),
    (sac_value, "--alpha 0", ["--alpha 0", "more than 0"]),
    (sac, "--initial-alpha -1", ["--initial-alpha -1", "more than 0"]),
    (sac, "--target-entropy inf", ["--target-entropy inf", "finite"]),
    (fqi, "--maximizer magic", ["--maximizer", "magic", "gradient"]),
    (fqi, "--maximizer exhaustive", ["--maximizer exhaustive", "gradient", "Pendulum-v1", "a Box"]),
    (fqi, "--env CartPole-v1", ["--maximizer gradient", "exhaustive", "CartPole-v1", "Discrete"]),
    (fqi, "--maximizer grid --num-candidates 100001", ["--num-candidates 100001", "grid", "too large"]),
    (fqi, "--num-base-points 150", ["--num-base-points 150", "multiple of num_envs=100"]),
    (fqi, "--iterations-per-epoch 3", ["--iterations-per-epoch 3", "divisor of num_iterations=50"]),
    (fqi, f"--base-points {SCRIPT}", ["--base-points", "td3.py", "not a file of base points"]),
    (fqi, "--base-points points.txt", ["--base-points points.txt", ".npz"]),
    (fqi, "--base-points /proc/points.npz", ["--base-points /proc/points.npz", "cannot write"]),
    (fqi, "--exploration-range 2", ["--exploration-range 2", "at most 1"]),
    (fqi, "--tolerance -1", ["--tolerance -1", "0 or more"]),
    (fqi_amortized, "--exact-fraction 1.5", ["--exact-fraction 1.5", "[0, 1]"]),
    (fqi_amortized, "--exact-fraction -0.5", ["--exact-fraction -0.5", "[0, 1]"]),
    (fqi_amortized, "--window -1", ["--window -1", "from 0"]),
    (nfqca, "--env CartPole-v1", ["--env CartPole-v1", "Box", "Swimmer-misc"]),
    (nfqca, "--rounds 3", ["--num-base-points 20000", "multiple of 300"]),
    (soft_fqi, "--beta 0", ["--beta 0", "more than 0"]),
    (soft_fqi, "--num-nodes 100001", ["--num-nodes 100001", "too large"]),
    (soft_fqi, "--env CartPole-v1 --integral dual", ["--integral dual", "quadrature"]),
]


@pytest.mark.parametrize(("module", "flags", "named"), OWN_MISTAKES, ids=[flags for _, flags, _ in OWN_MISTAKES])
def test_mistake_in_an_algorithm_s_own_flags(monkeypatch, capsys, tmp_path, module, flags, named):
    line = fails(monkeypatch, capsys, tmp_path / "out", *flags.split(), module=module)
    for text in named:
        assert text in line
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert f"--out {tmp_path / 'file'}" in fails(monkeypatch, capsys, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_out_is_not_writable(monkeypatch, capsys):
    assert "--out /proc/runs: cannot write" in fails(monkeypatch, capsys, "/proc/runs")


def test_foreign_files_in_the_folder_are_kept(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "td3" / "Pendulum-v1" / "default" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    assert "config.json" in fails(monkeypatch, capsys, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_from_the_shell_without_a_traceback(tmp_path):
    command = [sys.executable, SCRIPT, "--gamma", "2", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --gamma 2.0: must be in [0, 1]\n"
    assert not list(tmp_path.iterdir())


def test_help_names_every_field(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["td3.py", "--help"])
    with pytest.raises(SystemExit) as error:
        run.main(td3.Config, td3.init, td3.epoch)
    text = capsys.readouterr().out
    assert error.value.code == 0
    fields = dataclasses.fields(td3.Config) + dataclasses.fields(cli.Options)
    for field in fields:
        assert f"--{field.name.replace('_', '-')} " in text
    assert "environment steps in all, the warm-up included" in text


def test_every_field_is_read_from_its_flag(monkeypatch):
    flags = "--hidden-sizes 8 9 10 --gamma 0.5 --total-steps 3000 --seed 7 --no-plot --out x --name n --resume"
    monkeypatch.setattr(sys, "argv", ["td3.py", *flags.split()])
    config, options = cli.parse_run(td3.Config, "td3.py")
    assert config == td3.Config(hidden_sizes=(8, 9, 10), gamma=0.5, total_steps=3000)
    assert options == cli.Options(seed=7, no_plot=True, out=Path("x"), name="n", resume=True)


class Unbounded(Pendulum):
    """Pendulum whose actions have no bounds."""

    def action_space(self, params=None):
        return spaces.Box(-float("inf"), float("inf"), (1,))


def test_user_environment(monkeypatch, capsys, tmp_path):
    (tmp_path / "my_env.py").write_text(
        "from gymnax.environments.classic_control.pendulum import Pendulum\n\n\ndef make():\n    return Pendulum()\n"
    )
    monkeypatch.chdir(tmp_path)
    cli.register_env("my_env:make")
    env, _ = gymnax.make("my_env:make")
    assert env.name == "Pendulum-v1"
    assert jax.eval_shape(td3.init, td3.Config(env="my_env:make"), jax.random.key(0)).obs.shape == (8, 3)


def test_unbounded_actions(monkeypatch, capsys, tmp_path):
    gymnax.register("Unbounded-test", Unbounded)
    assert "finite bounds" in fails(monkeypatch, capsys, tmp_path / "out", "--env", "Unbounded-test")

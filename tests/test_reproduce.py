"""Every experiment of `results/` runs in its small version; what is committed is what its raw numbers say."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import boltzmann
import curves
import gymnax
import jax.numpy as jnp
import numpy as np
import pytest
import reproduce
import study
from cases import QUICK_FLAGS
from jax import random
from PIL import Image

from algorithms import sac, td3
from common import lqr

ROOT = Path(td3.__file__).parent.parent
RESULTS = ROOT / "results"
README = (RESULTS / "README.md").read_text()
NAMES = sorted(reproduce.EXPERIMENTS)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Finished cells are kept in a folder of these tests' own, and shared by them as by the experiments."""
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        for module in (study, reproduce):
            patch.setattr(module, "WORK", folder)
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")  # each device compiles for itself
        patch.setenv("XLA_FLAGS", QUICK_FLAGS)
        yield folder


@pytest.mark.parametrize("name", NAMES)
def test_quick_version_runs(name, work, tmp_path):
    experiment = reproduce.EXPERIMENTS[name]
    reproduce.reproduce(name, tmp_path, quick=True)
    rows = study.read(tmp_path / f"{name}.csv")
    assert list(dict.fromkeys(row["label"] for row in rows)) == list(experiment.quick(experiment.cells))
    assert experiment.draw is None or min(Image.open(tmp_path / reproduce.picture(name)).size) >= 200
    text = (tmp_path / "README.md").read_text()
    assert f"`python results/reproduce.py {name} --quick`" in text
    assert experiment.report(study.numbers(rows)) in text


def test_what_is_measured_is_kept_and_what_is_missing_measured(tmp_path, monkeypatch):
    measured = []

    def measure(cell):
        measured.append(cell)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return [{"square": cell**2}]

    report = lambda rows: str(sum(row["square"] for row in rows))
    experiment = study.Experiment("Squares", {"two": 2, "three": 3}, measure, report)
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"squares": experiment})
    monkeypatch.setattr(reproduce, "WORK", tmp_path / "work")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "squares", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="130"):
        reproduce.main()
    assert not (tmp_path / "squares.csv").exists()
    reproduce.main()
    assert measured == [2, 3, 3]
    assert (tmp_path / "squares.csv").read_text() == "label,square\ntwo,4\nthree,9\n"
    first = (tmp_path / "README.md").read_text()
    assert "\n13.0\n" in first
    reproduce.main()  # nothing is measured, and the section is replaced by its like
    assert (measured, (tmp_path / "README.md").read_text()) == ([2, 3, 3], first)


def test_interrupt_waits_until_the_run_in_progress_has_saved(monkeypatch, capsys, tmp_path):
    """A stand-in for a run saves half a second after an interrupt, which reaches both processes as from a terminal."""
    script = f"""
import os, pathlib, signal, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    raise SystemExit(130)
signal.signal(signal.SIGINT, save)
os.kill(os.getppid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
"""
    monkeypatch.setattr(study, "WORK", tmp_path)
    monkeypatch.setattr(study, "source", lambda run: script)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            study.train(study.Run("td3", "Pendulum-v1", change="stand-in"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()
    assert "waiting for the run in progress to save" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_committed_numbers_are_whole_and_the_text_is_what_they_say(name):
    experiment = reproduce.EXPERIMENTS[name]
    rows = study.read(RESULTS / f"{name}.csv")
    assert list(dict.fromkeys(row["label"] for row in rows)) == list(experiment.cells)
    for label, cell in experiment.cells.items():
        if isinstance(cell, study.Run) and "seed" in rows[0]:
            own = [row for row in rows if row["label"] == label]
            assert {int(row["seed"]) for row in own} == set(range(cell.seeds))
            last = {int(row["progress"]) for row in own if "progress" in row}
            named = re.search(r"--(?:total-steps|num-iterations) (\d+)", cell.flags)
            assert not (named and last and cell.algorithm != "svg") or max(last) == int(named[1])
    assert experiment.report(study.numbers(rows)) in README
    assert f"`python results/reproduce.py {name}`" in README
    assert experiment.draw is None or f"]({reproduce.picture(name)})" in README
    assert experiment.draw is None or (RESULTS / reproduce.picture(name)).exists()


def test_the_readme_tells_the_verdicts():
    text = (ROOT / "README.md").read_text()
    table = reproduce.claims_table()
    assert f"<!-- claims -->\n{table}\n<!-- end of claims -->" in text
    assert table.count("\n") > 8


def command(*flags, **options):
    return subprocess.run(
        [sys.executable, RESULTS / "reproduce.py", *map(str, flags)], capture_output=True, text=True, **options
    )


def test_names_and_mistakes():
    listed = command("--list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(reproduce.EXPERIMENTS)
    for flags, said in ((("nonsense",), "nonsense: no such experiment"), ((), "no experiment named")):
        done = command(*flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {said}")
        assert done.stderr.count("\n") == 1


# Experiments against closed forms


def test_expected_return_of_the_best_linear_policy_is_what_its_episodes_have():
    for env in lqr.ENVS:
        system = gymnax.make(env)[1]
        K = jnp.asarray(lqr.solve(system, curves.LQR_GAMMA).K)
        costs = lqr.simulate(system, lambda s, K=K: -K @ s, 1.0, random.key(0), 20_000, system.max_steps_in_episode)
        error = float(costs.std() / np.sqrt(len(costs)))
        assert abs(-float(costs.mean()) - curves.lqr_return(system)) < 4 * error


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.01)])
def test_distance_from_the_boltzmann_policy_is_the_divergence_of_two_gaussians(scale, shift):
    """The best gain and `scale` times the best deviation, `shift`ed, all small, where tanh is the identity."""
    alpha = 0.02
    best = lqr.solve(gymnax.make("LQR-v0")[1], boltzmann.GAMMA, 1.0)
    best = best._replace(K=0.01 * best.K)  # small actions; what is best does not matter here
    K, std = jnp.asarray(best.K), float(np.sqrt(alpha * best.covariance[0, 0]))
    weights = jnp.concatenate([-K.T, jnp.zeros_like(K.T)], axis=1) / lqr.ACTION_BOUND
    bias = jnp.array([shift, jnp.log(scale * std / lqr.ACTION_BOUND)])
    expected = -np.log(scale) + (scale**2 - 1) / 2 + (shift * lqr.ACTION_BOUND / std) ** 2 / 2
    distance = boltzmann.kl_divergence(sac, [(weights, bias)], best, alpha)
    np.testing.assert_allclose(distance, expected, atol=0.02)


# Verdicts on made-up returns of four seeds, which spread by 1


def rows_of(returns, biases=None):
    return [
        {
            "label": label,
            "seed": i,
            "progress": 1,
            "return": x + i / 3,
            "value_bias": (biases or {}).get(label, 0) + i / 3,
        }
        | {"finite": 1.0}
        for label, x in returns.items()
        for i in range(4)
    ]


VERDICTS = [
    ("policy_delay", {"td3, delay 1": -200, "td3, delay 2": -150}, "Holds."),
    ("policy_delay", {"td3, delay 1": -150.5, "td3, delay 2": -150}, "Does not hold."),
    ("exploration", {"ddpg, OU": -150, "ddpg, Gaussian 0.92": -150.5, "ddpg, Gaussian 0.1": -300}, "Holds."),
    ("exploration", {"td3, OU": -150, "td3, Gaussian 0.92": -200, "td3, Gaussian 0.1": -300}, "Does not hold."),
    ("targets", {"ddpg, every 1": -900, "ddpg, every 40": -150, "ddpg, tau 0.1": -150.5}, "Holds."),
    ("targets", {"ddpg, every 1": -900, "ddpg, every 40": -190, "ddpg, tau 0.1": -150}, "Does not hold."),
    ("n_step", {"td3, 1 step": -400, "td3, 3 steps": -300}, "Holds."),
    ("n_step", {"td3, 1 step": -300, "td3, 3 steps": -400}, "Does not hold."),
    ("pathwise_returns", {"svg": -150, "reinforce": -1000}, "Holds."),
    ("pathwise_returns", {"svg": -1000, "reinforce": -1000}, "Does not hold."),
]


@pytest.mark.parametrize(("name", "returns", "verdict"), VERDICTS)
def test_verdict_follows_the_returns(name, returns, verdict):
    rows = rows_of({f"{what} on Pendulum-v1": x for what, x in returns.items()})
    assert reproduce.EXPERIMENTS[name].report(rows).startswith(f"**{verdict}**")


@pytest.mark.parametrize(
    ("exact", "nfqca", "verdict"),
    [(-150, -150, "Holds."), (-150, -400, "Holds in part."), (-400, -400, "Does not hold.")],
)
def test_verdict_on_amortization(exact, nfqca, verdict):
    rows = rows_of({"fqi": -150.5, "exact 0.1": exact, "nfqca": nfqca})
    assert reproduce.EXPERIMENTS["amortization"].report(rows).startswith(f"**{verdict}**")


@pytest.mark.parametrize(
    ("ddpg", "td3", "one_critic", "holds"), [(9, -9, 5, 1), (-9, -9, 5, 0), (9, 4, 8, 0), (9, -9, -9, 0)]
)
def test_verdict_on_overestimation(ddpg, td3, one_critic, holds):
    biases = {"ddpg": ddpg, "td3": td3, "td3, one critic": one_critic}
    biases = {f"{what} on Pendulum-v1": x for what, x in biases.items()}
    text = reproduce.EXPERIMENTS["overestimation"].report(rows_of(dict.fromkeys(biases, -150), biases))
    assert text.startswith("**Holds.**" if holds else "**Does not hold.**")


@pytest.mark.parametrize(("last", "verdict"), [(0.01, "Holds."), (0.5, "Does not hold.")])
def test_verdict_on_the_boltzmann_policy(last, verdict):
    rows = [
        {
            "label": "sac on LQR-v0",
            "seed": i,
            "progress": t,
            "finite": 1.0,
            "kl": kl * (1 + i / 100),
            "temperature": 0.1,
        }
        for i in range(4)
        for t, kl in enumerate((2.0, last))
    ]
    assert reproduce.EXPERIMENTS["boltzmann"].report(rows).startswith(f"**{verdict}**")

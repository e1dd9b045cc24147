"""The experiments of `results/`: their keys, what is kept, small versions of each kind, and the committed numbers."""

import re
import shutil
import signal
import sys
from pathlib import Path

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reproduce
from cases import ALGORITHMS, CONFIGS, replace, slow
from experiments import amortization_gap, boltzmann, control_suite, curves, study, training, value_bias
from jax import random
from PIL import Image

from amortax.algorithms import sac
from amortax.common import lqr, play

ROOT, RESULTS = study.ROOT, study.RESULTS
README = (RESULTS / "README.md").read_text()
NAMES = sorted(reproduce.EXPERIMENTS)
MEASURED = [name for name in NAMES if (RESULTS / "data" / f"{name}.csv").exists()]
QUICK = (  # with those of SLOW one for each way of measuring; the others have the same with other flags
    "curves_discrete",  # two algorithms on the command line
    "action_repeat",
    "film_landscape",
    "optimum",
    "estimators",
    "distributions",
    "gumbel_softmax",
    "gradient_variance",
    "svg_gradients",
    "maximizers",
    "amortization_time",
)
SLOW = (
    "overestimation",  # in this process; one of its files is changed
    "smooth_costs",
    "smooth_landscape",
    "smooth_time",
    "boltzmann",
    "closed_form_1",
    "film_pendulum",
    "lineage",
    "amortization_gap",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Finished cells are kept in a folder of these tests' own, and shared by them as by the experiments."""
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "WORK", folder)
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")  # each device compiles for itself
        yield folder


def labels(rows):
    return list(dict.fromkeys(row["label"] for row in rows))


def parsed(run):
    """`(module, config)` of a run: the parameters of its environment are no flag of the algorithm."""
    return training.load(run._replace(flags=re.sub(r"--env-params \S+ ", "", run.flags)))


def test_a_quick_version_for_every_way_of_measuring():
    measures = {name: reproduce.EXPERIMENTS[name].measure for name in NAMES}
    assert {measures[name] for name in QUICK + SLOW} == set(measures.values())


@pytest.mark.parametrize("name", [*QUICK, *slow(*SLOW)])
def test_quick_version_runs(name, work, tmp_path):
    if reproduce.needs_playground(name, quick=True):
        pytest.importorskip("mujoco_playground")
    experiment = reproduce.EXPERIMENTS[name]
    reproduce.reproduce(name, tmp_path, quick=True)
    rows = study.read(tmp_path / "data" / f"{name}.csv")
    assert labels(rows) == list(experiment.quick(experiment.cells))
    assert experiment.draw is None or min(Image.open(tmp_path / reproduce.figure_path(name)).size) >= 200
    text = (tmp_path / "README.md").read_text()
    assert f"`python results/reproduce.py {name} --quick`" in text
    assert study.report(experiment, study.numbers(rows)) in text


def runs_of_experiments():
    """What is trained, in the full and in the quick versions."""
    for experiment in reproduce.EXPERIMENTS.values():
        for cell in (*experiment.cells.values(), *experiment.quick(experiment.cells).values()):
            if isinstance(cell, training.Run):
                yield cell._replace(seeds=0)


def test_every_run_has_flags_and_numbers_that_its_algorithm_accepts(work):
    runs = {*runs_of_experiments()}
    assert len(runs) > 100
    for run in runs:
        module, config = parsed(run)
        module.check(config)


@pytest.mark.slow
def test_every_run_has_an_environment_that_its_algorithm_accepts(work):
    """`init` is traced once for each; nothing is compiled or trained."""
    runs = {(run.algorithm, run.change, run.env): run for run in runs_of_experiments()}
    for run in runs.values():
        if reproduce.PLAYGROUND or not run.env.startswith("playground/"):
            module, config = parsed(run)
            jax.eval_shape(lambda key, module=module, config=config: module.init(config, key), random.key(0))


# Keys and files


SOURCE = '''"""A module."""
import math
SCALE, OTHER = 2.0, 3.0  # a comment
def helper(x):
    """Twice."""
    return SCALE * x
def unused(x):
    return x
def measure(cell):
    """Rows."""
    # why
    return [{"x": helper(cell)}]
def documented():
    """Nothing else."""
'''


@pytest.mark.quick
def test_code_is_without_comments_and_docstrings():
    text = training.code(SOURCE)
    assert '"""' not in text
    assert "#" not in text
    assert "documented():\n    pass" in text
    assert training.code(SOURCE.replace("# why", "# another").replace("Twice.", "Double.")) == text
    assert training.code(SOURCE.replace("SCALE * x", "x * SCALE")) != text
    namespace = {}
    exec(text, namespace)
    assert namespace["measure"](2) == [{"x": 4.0}]


def load(path, text):
    """The module `path`, written anew."""
    path.write_text(text)
    module = type(sys)(path.stem)
    exec(compile(text, path, "exec"), module.__dict__)
    return module


@pytest.mark.quick
def test_the_key_of_a_cell_follows_the_code_and_not_the_words(tmp_path):
    def key(old="", new="", cell=2, **fields):
        measure = load(tmp_path / "measured.py", SOURCE.replace(old, new) if old else SOURCE).measure
        experiment = study.Experiment("Title", "How big?", {}, measure, **fields)
        return training.fingerprint(experiment, cell), training.code_of(measure)

    first, code = key()
    assert "helper" in code
    assert "SCALE" in code
    assert "unused" not in code
    assert "import" not in code
    words = (("# why", "# what"), ("Twice.", "Double."), ("# a comment", ""), ("return x\n", "return x + 1\n"))
    for old, new in words:  # the last in a function that `measure` does not use
        assert key(old, new)[0] == first, old
    assert key(notes="Other words.", sample="many")[0] == first
    changed = [key(cell=3)[0], key(sources=("common/lqr.py",))[0]]
    changed += [key("SCALE * x", "x / SCALE")[0], key("2.0, 3.0", "4.0, 3.0")[0], key('"x": ', '"y": ')[0]]
    assert len({first, *changed}) == 6


@pytest.mark.quick
def test_the_key_of_a_run_has_the_algorithm_with_its_change(monkeypatch, tmp_path):
    experiment = reproduce.EXPERIMENTS["n_step"]
    plain, changed = (training.Run("td3", "Pendulum-v1", change=change) for change in ("", "td3_n_step"))
    assert "n_step" in training.source(changed)
    assert "n_step" not in training.source(plain)
    with pytest.raises(RuntimeError, match=r"td3_n_step\.diff does not apply to sac\.py"):
        training.source(changed._replace(algorithm="sac"))
    before = training.fingerprint(experiment, plain)
    assert before != training.fingerprint(experiment, changed)
    (tmp_path / "algorithms").mkdir()
    copy = Path(shutil.copy(ROOT / "algorithms" / "td3.py", tmp_path / "algorithms"))
    monkeypatch.setattr(training, "ROOT", tmp_path)
    copy.write_text(copy.read_text() + "\n# a comment\n")
    assert training.fingerprint(experiment, plain) == before
    copy.write_text(copy.read_text() + "\nX = 1\n")
    assert training.fingerprint(experiment, plain) != before


@pytest.fixture
def squares(tmp_path, monkeypatch):
    """An experiment that is interrupted once, on the command line: `(run, cells measured so far)`."""
    measured = []

    def measure(cell):
        measured.append(cell)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return [{"square": cell**2}]

    notes = lambda rows: str(sum(row["square"] for row in rows))
    experiment = study.Experiment("Squares", "How big?", {"two": 2, "three": 3}, measure, notes=notes)
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"squares": experiment})
    monkeypatch.setattr(training, "WORK", tmp_path / "work")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "squares", "--out", str(tmp_path), *flags])
        reproduce.main()

    return run, measured


def test_what_is_measured_is_kept_and_what_is_missing_measured(squares, tmp_path, monkeypatch, capsys):
    run, measured = squares
    data, readme = tmp_path / "data" / "squares.csv", tmp_path / "README.md"
    with pytest.raises(SystemExit, match="130"):
        run()
    assert not data.exists()
    run()
    assert measured == [2, 3, 3]
    assert data.read_text() == "label,square\ntwo,4\nthree,9\n"
    first = readme.read_text()
    assert "\n13.0\n" in first
    run()  # nothing is measured, and the section is replaced by its like
    assert (measured, readme.read_text()) == ([2, 3, 3], first)

    # on another day and machine new words stand with the old data and their origin
    monkeypatch.setattr(reproduce, "machine", lambda: "another machine")
    changed = reproduce.EXPERIMENTS["squares"]._replace(notes="New words.")
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"squares": changed})
    run("--redraw")
    assert measured == [2, 3, 3]
    assert readme.read_text() == first.replace("\n13.0\n", "\nNew words.\n")
    data.unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run("--redraw")
    assert capsys.readouterr().err.startswith("error: --redraw: ")
    assert measured == [2, 3, 3]


@pytest.mark.parametrize("times", [1, 2])
def test_interrupt_waits_until_the_current_run_has_saved(times, monkeypatch, capsys, tmp_path):
    """A stand-in for a run saves half a second after the first interrupt, and a second one ends it.

    The interrupts are sent to this process alone, and a terminal's do not reach the run.
    """
    script = f"""
import os, pathlib, signal, time
def save(*_):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    time.sleep(0.5)
    if {times} == 2:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    raise SystemExit(130)
signal.signal(signal.SIGINT, save)
assert os.getsid(0) == os.getpid()
os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
    monkeypatch.setattr(training, "WORK", tmp_path)
    monkeypatch.setattr(training, "source", lambda run: script)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            training.train(training.Run("td3", "Pendulum-v1", change="stand-in"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists() == (times == 1)
    assert capsys.readouterr().err.count("waiting for the current run to save") == times


@pytest.mark.quick
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("nonsense",), "nonsense: no such experiment"),
        ((), "no experiment given"),
        (("optimum", "--quick", "--redraw"), "--redraw: not with --quick"),
    ],
)
def test_mistakes(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags])
    with pytest.raises(SystemExit, match="2"):
        reproduce.main()
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith(f"error: {said}")
    assert printed.err.count("\n") == 1


@pytest.mark.quick
def test_experiments_that_need_an_extra_are_skipped_or_refused(monkeypatch, capsys):
    """Where it is not installed; a small version may not need it."""
    monkeypatch.setattr(reproduce, "PLAYGROUND", False)
    wanted = {name: reproduce.EXPERIMENTS[name] for name in ("locomotion", "amortization_gap")}
    monkeypatch.setattr(reproduce, "EXPERIMENTS", wanted)
    measured = []
    monkeypatch.setattr(reproduce, "reproduce", lambda name, *_: measured.append(name))
    needs = 'needs the extra playground: pip install -e ".[playground]"'
    for flags, names in ((["all"], []), (["all", "--quick"], ["amortization_gap"])):
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags])
        reproduce.main()
        assert measured == names
        assert f"locomotion: {needs}; skipped" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "locomotion"])
    with pytest.raises(SystemExit, match="2"):
        reproduce.main()
    assert capsys.readouterr().err == f"error: locomotion: {needs}\n"


@pytest.mark.quick
def test_names(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--list"])
    reproduce.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(reproduce.EXPERIMENTS)


# What is committed


def length_of(run, asked):
    """Environment steps of a run, rounded up to whole iterations in the warm-up and in each epoch; or iterations.

    Where actions are repeated they are those of the task.
    """
    if "--steps-per-epoch" not in run.flags:
        return asked
    module, config = parsed(run)
    iterations = module.num_epochs(config) * module.num_iterations(config, config.steps_per_epoch)
    if hasattr(config, "learning_starts"):
        iterations += module.num_iterations(config, config.learning_starts)
    repeat = re.search(r"action_repeat=(\d+)", run.flags)
    return iterations * config.num_envs * config.num_steps * (int(repeat[1]) if repeat else 1)


@pytest.mark.parametrize("name", NAMES)
def test_committed_numbers_are_whole_and_the_text_is_what_they_say(name, work, tmp_path):
    experiment = reproduce.EXPERIMENTS[name]
    if name not in MEASURED:  # to be measured: it has no section
        assert f"<!-- {name} -->" not in README or f"<!-- {name} -->\n<!-- end of {name} -->" in README
        assert not (RESULTS / reproduce.figure_path(name)).exists()
        return
    rows = study.read(RESULTS / "data" / f"{name}.csv")
    assert labels(rows) == list(experiment.cells)
    for label, cell in experiment.cells.items():
        if isinstance(cell, training.Run) and "seed" in rows[0]:
            own = [row for row in rows if row["label"] == label]
            assert {int(row["seed"]) for row in own} == set(range(cell.seeds))
            last = {int(row["progress"]) for row in own if "progress" in row}
            asked = re.search(r"--(?:total-steps|num-iterations) (\d+)", cell.flags)
            if asked and last and cell.algorithm != "svg":
                assert max(last) == length_of(cell, int(asked[1]))
    # written anew, with nothing measured
    page = tmp_path / "README.md"
    page.write_text(README)
    section = reproduce.section(name, study.numbers(rows), reproduce.origin_of(name, README))
    reproduce.write_between(page, name, section)
    assert page.read_text() == README
    if experiment.draw:
        assert f"]({reproduce.figure_path(name)})" in README
        assert (RESULTS / reproduce.figure_path(name)).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MEASURED if reproduce.EXPERIMENTS[name].draw])
def test_committed_figures_are_drawn_anew(name, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(RESULTS / "data" / f"{name}.csv", tmp_path / "data")
    (tmp_path / "README.md").write_text(README)
    reproduce.redraw(name, tmp_path)
    assert (tmp_path / "README.md").read_text() == README
    drawn, committed = (Image.open(folder / reproduce.figure_path(name)) for folder in (tmp_path, RESULTS))
    np.testing.assert_allclose(drawn.size, committed.size, atol=2)  # pixels, by other versions of matplotlib
    assert min(drawn.size) >= 200


@pytest.mark.quick
def test_the_readmes_tell_the_verdicts():
    every = reproduce.claims_table(reproduce.EXPERIMENTS)
    assert f"<!-- claims -->\n{every}\n<!-- end of claims -->" in README
    assert every.count("\n") > 8
    selected = reproduce.claims_table(reproduce.SELECTED, "results/README.md")
    assert f"<!-- claims -->\n{selected}\n<!-- end of claims -->" in (ROOT / "README.md").read_text()
    assert selected.count("\n") == len(reproduce.SELECTED) + 1
    assert set(selected.replace("(results/README.md#", "(#").splitlines()) < set(every.splitlines())


# Experiments against closed forms


@pytest.mark.parametrize("name", ["ddpg", "td3"])
@pytest.mark.parametrize(
    ("env", "horizon", "terminates"), [("ClockTruncated-test", 50, False), ("ClockTerminated-test", 10, True)]
)
def test_value_bias_of_a_constant_critic(name, env, horizon, terminates):
    """A critic that says 7 everywhere, where each step earns 1; the second of two says 5, which counts if it is asked.

    The bias is in closed form.
    """
    module, config = ALGORITHMS[name], replace(CONFIGS[name], env=env, gamma=0.9)
    params = jax.jit(module.init)(config, random.key(0)).params
    *hidden, (w, b) = params.critic
    says = jnp.array([[7.0], [5.0]]) if name == "td3" else jnp.array([7.0])
    params = params._replace(critic=[*hidden, (jnp.zeros_like(w), jnp.broadcast_to(says, b.shape))])
    for num_critics in (1, 2):
        value = 5 if (name, num_critics) == ("td3", 2) else 7
        bias = jax.jit(lambda params, key, n=num_critics: value_bias.value_bias(module, n, config, params, key))
        earned = (1 - 0.9**horizon) / (1 - 0.9)
        expected = value - earned - (0 if terminates else value * 0.9**horizon)
        np.testing.assert_allclose(bias(params, random.key(1)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddpg", "td3", "sac"])
def test_amortization_gap_of_a_concave_critic(name, monkeypatch):
    """The actor ascends -(a - obs[0])^2, TD3's first critic and SAC's lower one; the policy chooses obs[0] + 0.3.

    The gap is 0.09, and the policy's value is above that of random actions by E (a - obs[0])^2 - 0.09.
    """
    module, config = ALGORITHMS[name], CONFIGS[name]
    params = jax.jit(module.init)(config, random.key(0)).params
    scale = {"ddpg": jnp.array(1.0), "td3": jnp.array([1.0, 2.0]), "sac": jnp.array([0.5, 1.0])}[name]
    params = params._replace(critic=scale)
    monkeypatch.setattr(module, "critic", lambda config, scale, obs, a: -scale * jnp.square(a[..., 0] - obs[..., 0]))
    monkeypatch.setattr(module, "greedy", lambda config, params, obs: obs[..., :1] + 0.3)
    obs = jnp.stack([jnp.linspace(-0.6, 0.6, 64), jnp.ones(64), jnp.ones(64)], axis=1)
    found = jax.jit(lambda key: amortization_gap.gaps(module, config, params, obs, key))(random.key(0))
    for solver in ("gradient", "lbfgs", "cem", "improved", "gap"):
        np.testing.assert_allclose(found[solver], 0.09, atol=1e-3, err_msg=solver)
    np.testing.assert_allclose(found["range"].mean(), (1 / 3 + jnp.square(obs[:, 0])).mean(), rtol=0.05)


def test_improved_actions_are_not_worse_than_the_policy():
    """Here each step of the ascent lowers the value in the end, and the policy's action is the best."""
    q = lambda action: -jnp.abs(action[0])
    np.testing.assert_array_equal(amortization_gap.improve(q, jnp.zeros(1)), 0)
    np.testing.assert_allclose(amortization_gap.improve(q, jnp.array([0.5])), 0, atol=0.02)


def test_return_of_improved_actions_is_that_of_their_episodes():
    """In the test's clock each step earns 1 whatever the action."""
    config = replace(CONFIGS["td3"], env="ClockTruncated-test")
    params = jax.jit(ALGORITHMS["td3"].init)(config, random.key(0)).params
    act = amortization_gap.improved_act(ALGORITHMS["td3"])
    np.testing.assert_allclose(play.gymnax_returns(act, config, params, 0, jnp.arange(2)), 50)


def test_what_solvers_miss_is_their_distance_to_the_maximum():
    """By brute force over the only action of TD3's first critic, with ReLU; the gap is said to be 0 everywhere."""
    module, config = ALGORITHMS["td3"], replace(CONFIGS["td3"], env="Pendulum-v1", activation="relu")
    params = jax.jit(module.init)(config, random.key(0)).params
    obs = random.normal(random.key(1), (4, 3))
    actions = jnp.linspace(-1, 1, 20_001)[:, None]
    at = lambda obs: jax.vmap(amortization_gap.objective(module, config, params, obs))
    best = [float(at(x)(actions).max() - at(x)(module.greedy(config, params, x)[None])[0]) for x in obs]
    found = amortization_gap.missed(module, config, params, obs, jnp.zeros(4))
    np.testing.assert_allclose(found, np.mean(best), atol=1e-3)
    assert amortization_gap.missed(module, replace(config, activation="silu"), params, obs, jnp.zeros(4)) == ""


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
    distance = boltzmann.kl_divergence(sac, sac.Config(), [(weights, bias)], best, alpha)
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


def verdict_on(name, rows):
    experiment = reproduce.EXPERIMENTS[name]
    verdict = study.verdict(study.judge(experiment, rows))
    assert f"**{verdict}** Criterion, {experiment.criterion.words}" in study.report(experiment, rows)
    return verdict


VERDICTS = [
    ("policy_delay", {"td3, delay 1": -200, "td3, delay 2": -150}, "Holds."),
    ("policy_delay", {"td3, delay 1": -150.5, "td3, delay 2": -150}, "Does not hold."),
    ("exploration", {"ddpg, OU": -150, "ddpg, Gaussian 0.92": -150.5, "ddpg, Gaussian 0.1": -300}, "Holds."),
    ("exploration", {"td3, OU": -150, "td3, Gaussian 0.92": -200, "td3, Gaussian 0.1": -300}, "Does not hold."),
    ("targets", {"ddpg, every 1": -900, "ddpg, every 40": -150, "ddpg, tau 0.1": -150.5}, "Holds."),
    ("targets", {"ddpg, every 1": -900, "ddpg, every 40": -190, "ddpg, tau 0.1": -150}, "Does not hold."),
    ("n_step", {"td3, 1 step": -400, "td3, 3 steps": -300}, "Holds."),
    ("n_step", {"td3, 1 step": -300, "td3, 3 steps": -400}, "Does not hold."),
    ("changes", {"td3": -400, "td3, schedule": -300}, "Holds."),
    ("changes", {"td3": -300, "td3, 4 updates": -200, "td3, 5 critics and 4 updates": -300.5}, "Does not hold."),
    ("pathwise_returns", {"svg": -150, "reinforce": -1000}, "Holds."),
    ("pathwise_returns", {"svg": -1000, "reinforce": -1000}, "Does not hold."),
]


@pytest.mark.quick
@pytest.mark.parametrize(("name", "returns", "verdict"), VERDICTS)
def test_verdict_follows_the_returns(name, returns, verdict):
    rows = rows_of({f"{what} on Pendulum-v1": x for what, x in returns.items()})
    assert verdict_on(name, rows) == verdict


@pytest.mark.parametrize(
    ("exact", "nfqca", "verdict"),
    [
        (-150, -150, "Holds."),
        (-150, -400, "Holds in part: yes for exact 0.1; no for nfqca."),
        (-400, -400, "Does not hold."),
    ],
)
def test_verdict_on_amortization(exact, nfqca, verdict):
    rows = rows_of({"fqi": -150.5, "exact 0.1": exact, "nfqca": nfqca})
    assert verdict_on("amortization", rows) == verdict


@pytest.mark.quick
@pytest.mark.parametrize(
    ("cart_pole", "acrobot", "verdict"),
    [
        (480, -85, "Holds."),
        (480, -95, "Holds in part: yes for CartPole-v1; no for Acrobot-v1."),
        (470, -95, "Does not hold."),
    ],
)
def test_verdict_on_discrete_actions(cart_pole, acrobot, verdict):
    rows = rows_of({"fqi on CartPole-v1": cart_pole, "fqi on Acrobot-v1": acrobot, "reinforce on CartPole-v1": 0})
    assert verdict_on("curves_discrete", rows) == verdict


@pytest.mark.quick
@pytest.mark.parametrize(
    ("silu", "relu", "verdict"), [(1.05, 1.5, "Holds."), (1.05, 1.01, "Does not hold."), (1.2, 1.5, "Does not hold.")]
)
def test_verdict_on_smooth_activations(silu, relu, verdict):
    """Of three seeds the middle one counts."""
    middle = {"fqi, silu": silu, "fqi, relu": relu}
    rows = [
        {"label": label, "seed": i, "cost_ratio": ratio}
        for label, value in middle.items()
        for i, ratio in enumerate((1.0, value, 9.0))
    ]
    assert verdict_on("smooth_costs", rows) == verdict


@pytest.mark.parametrize(
    ("ddpg", "td3", "one_critic", "holds"), [(9, -9, 5, 1), (-9, -9, 5, 0), (9, 4, 8, 0), (9, -9, -9, 0)]
)
def test_verdict_on_overestimation(ddpg, td3, one_critic, holds):
    biases = {"ddpg": ddpg, "td3": td3, "td3, one critic": one_critic}
    biases = {f"{what} on Pendulum-v1": x for what, x in biases.items()}
    verdict = verdict_on("overestimation", rows_of(dict.fromkeys(biases, -150), biases))
    assert verdict == ("Holds." if holds else "Does not hold.")


@pytest.mark.quick
@pytest.mark.parametrize(("after_100k", "verdict"), [(640, "Holds."), (600, "Does not hold.")])
def test_verdict_on_the_control_suite(after_100k, verdict):
    """616 are published after 100,000 steps, and 716 after 500,000."""
    rows = rows_of({"sac on CheetahRun": after_100k, "td3 on CheetahRun": 0})
    assert verdict_on("locomotion", rows) == verdict
    assert "616 after 100,000 steps" in study.report(reproduce.EXPERIMENTS["locomotion"], rows)
    assert verdict_on("running_long", rows) == "Does not hold."
    assert control_suite.published("CartpoleBalance") == (999, 500)


@pytest.mark.quick
@pytest.mark.parametrize(("after_100k", "verdict"), [(840, "Holds."), (800, "Does not hold.")])
def test_verdict_on_repeated_actions(after_100k, verdict):
    """835 are published; the steps are those of the task, of which an action takes eight."""
    rows = rows_of({"sac on CartpoleSwingup": after_100k})
    assert verdict_on("action_repeat", rows) == verdict
    for label, run in reproduce.EXPERIMENTS["action_repeat"].cells.items():
        repeat, steps = (int(re.search(rf"{flag}.(\d+)", run.flags)[1]) for flag in ("action_repeat", "total-steps"))
        assert 99_800 < length_of(run, steps) == repeat * steps <= 100_000, label


def test_learning_curves_with_repeated_actions_count_the_steps_of_the_task(monkeypatch):
    monkeypatch.setattr(training, "learning_curves", lambda run: [{"seed": 0, "progress": 12_480, "return": 1.0}])
    run = reproduce.EXPERIMENTS["action_repeat"].cells["sac on CartpoleSwingup"]
    assert control_suite.curves_by_task_steps(run) == [{"seed": 0, "progress": 99_840, "return": 1.0}]


@pytest.mark.quick
@pytest.mark.parametrize(("after_2m", "verdict"), [(440, "Holds."), (400, "Does not hold.")])
def test_verdict_on_ppo_and_the_control_suite(after_2m, verdict):
    """433 are published after 8,000,000 steps."""
    rows = rows_of({"ppo on CheetahRun": after_2m})
    assert verdict_on("ppo_physics", rows) == verdict
    assert "433 after 8,000,000 steps" in study.report(reproduce.EXPERIMENTS["ppo_physics"], rows)


@pytest.mark.quick
@pytest.mark.parametrize(("svg", "verdict"), [(950, "Holds."), (850, "Does not hold.")])
def test_verdict_on_rollouts_in_physics(svg, verdict):
    assert verdict_on("svg_physics", rows_of({"svg on CartpoleBalance": svg})) == verdict


@pytest.mark.quick
@pytest.mark.parametrize(("shac", "verdict"), [(900, "Holds."), (700, "Does not hold.")])
def test_verdict_on_short_windows_in_physics(shac, verdict):
    rows = rows_of({"shac on CartpoleBalance": shac, "ddpg on CartpoleBalance": 800})
    assert verdict_on("short_windows_physics", rows) == verdict


@pytest.mark.quick
@pytest.mark.parametrize(("silu", "verdict"), [(400, "Holds."), (300, "Does not hold.")])
def test_verdict_on_smooth_networks_in_physics(silu, verdict):
    rows = rows_of({"td3, silu on CheetahRun": silu, "td3, relu on CheetahRun": 400})
    assert verdict_on("smooth_physics", rows) == verdict


@pytest.mark.parametrize(("improved", "verdict"), [(0, "Holds."), (50, "Does not hold.")])
def test_verdict_on_the_amortization_gap(improved, verdict):
    gaps = dict.fromkeys(("gradient", "lbfgs", "cem", "improved", "gap"), 0.5) | {"range": 2.0, "missed": ""}
    rows = [row | gaps | {"improved_return": row["return"] + improved} for row in rows_of({"td3 on CheetahRun": 400})]
    assert verdict_on("amortization_gap", rows) == verdict
    assert "| 25.0 (25.0 to 25.0) |" in study.report(reproduce.EXPERIMENTS["amortization_gap"], rows)


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
    assert verdict_on("boltzmann", rows) == verdict

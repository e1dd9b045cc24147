"""The changes of `results/changes`: each applies, is short, says what its page says, and is right.

Where `algorithms/td3.py` has changed so that a diff no longer applies, apply what does by hand to a copy, and write the
diff anew with `git diff --no-index -U1`, headed as it is now; the page shows the hunks of n-step targets word for word.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reproduce
from cases import (
    SMALL,
    assert_close,
    assert_same,
    exact_jit,
    load_broken,
    np_critic,
    np_critics,
    np_mlp,
    random_layers,
    replace,
    silu,
)
from jax import random
from jax.flatten_util import ravel_pytree
from pages import RESULTS, ROOT, blocks
from scipy import stats
from test_cli import fails
from test_structure import SIZES, assert_touches_batches_only, jit, seed_key
from test_td3 import hand_case

from amortax.algorithms import td3
from amortax.common import cli

PAGE = ROOT / "results" / "changes" / "README.md"
DIFF = PAGE.parent / "td3_n_step.diff"
DIFFS = sorted(path.stem for path in PAGE.parent.glob("*.diff"))
TEXT = RESULTS["results/changes/README.md"]


def execute(*command, folder):
    """Run a command in a folder that is below no git repository."""
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent), "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """`name of a diff -> the changed file, loaded`; each applies to the algorithm at the start of its name."""
    base, modules = tmp_path_factory.mktemp("changes"), {}

    def load(name):
        if name not in modules:
            folder = base / name
            folder.mkdir()
            shutil.copy(ROOT / "algorithms" / f"{name.split('_')[0]}.py", folder / "my_idea.py")
            execute("git", "apply", str(PAGE.parent / f"{name}.diff"), folder=folder)
            spec = importlib.util.spec_from_file_location(name, folder / "my_idea.py")
            modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)  # the command line looks there
            spec.loader.exec_module(modules[name])
        return modules[name]

    yield load
    for name in modules:
        del sys.modules[name]


@pytest.fixture
def my_idea(changed):
    """The change that the page explains."""
    return changed("td3_n_step")


# The page


@pytest.mark.quick
def test_the_page_shows_the_diff_whole_and_names_what_exists(changed):
    assert "--- a/my_idea.py\n+++ b/my_idea.py\n" + "".join(blocks("diff", TEXT)) == DIFF.read_text()
    assert f"{num_changed('td3_n_step')} lines removed or added" in " ".join(TEXT.split())
    for link in re.findall(r"\]\(([\w./-]+)[#)]", TEXT):
        assert (PAGE.parent / link).exists(), link
    configs = [changed(name).Config for name in DIFFS]
    flags = {f"--{name.replace('_', '-')}" for c in (*configs, cli.Options) for name in c.__annotations__}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT)) <= flags
    for name in re.findall(r"`(\w+)\(\)`", TEXT):
        assert hasattr(changed("td3_n_step"), name), name


@pytest.mark.quick
def test_the_page_lists_every_diff_with_an_experiment_that_runs_it():
    table = TEXT[TEXT.index("## Other changes") :]
    experiments = {}
    for line in table.splitlines():
        experiments |= dict.fromkeys(
            re.findall(r"\((\w+)\.diff\)", line), re.findall(r"README\.md#(\w+)|`(\w+)`, to be", line)
        )
    assert sorted(experiments) == DIFFS
    for name, ((measured, planned),) in experiments.items():
        experiment = measured or planned
        assert bool(measured) == (ROOT / "results" / "data" / f"{experiment}.csv").exists()
        changes = {getattr(cell, "change", "") for cell in reproduce.EXPERIMENTS[experiment].cells.values()}
        assert name in changes, name


def num_changed(name):
    return sum(line[0] in "+-" for line in (PAGE.parent / f"{name}.diff").read_text().splitlines()[2:])


@pytest.mark.quick
def test_every_diff_applies_and_is_short_and_tidy(changed):
    for name in DIFFS:
        assert changed(name).Config()
        assert num_changed(name) <= 25 or name == "td3_ou_noise"
    folder = Path(changed(DIFFS[0]).__file__).parent.parent
    for command in (("check",), ("format", "--check")):
        execute(sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), ".", folder=folder)


def test_the_commands_run_in_a_folder_of_their_own(tmp_path):
    commands = blocks("bash", TEXT)[0].strip()
    assert commands.endswith("--n-step 3")
    small = " --total-steps 72 --learning-starts 64 --steps-per-epoch 8 --batch-size 16 --num-eval-episodes 2 --no-plot"
    for folder in ("algorithms", "results/changes"):
        commands = commands.replace(f" {folder}/", f" {ROOT / folder}/")
    script = commands.replace("python ", f"{sys.executable} ") + small
    execute("bash", "-ec", script, folder=tmp_path)
    assert (tmp_path / "results/runs/my_idea/Pendulum-v1/default/seed_0/policy.npz").exists()


@pytest.mark.quick
def test_zero_steps_get_one_line(my_idea, monkeypatch, capsys, tmp_path):
    said = fails(monkeypatch, capsys, tmp_path, "--n-step", "0", module=my_idea)
    assert said == "error: --n-step 0: must be from 1 to 2147483647\n"


# All changes


@pytest.mark.parametrize("name", DIFFS)
def test_an_epoch_returns_a_state_like_its_own(changed, name):
    """Every change traced whole; nothing is compiled."""
    module = changed(name)
    config = module.Config(**SMALL)
    state = jax.eval_shape(lambda key: module.init(config, key), seed_key())
    after, _ = jax.eval_shape(lambda state: module.epoch(config, state), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


WALK_SIZES = SMALL | {"env": "Walk-test", "total_steps": 512, "steps_per_epoch": 64, "hidden_sizes": (8,)}


@functools.cache
def trained_as_td3():
    return exact_jit(td3.train)(td3.Config(**WALK_SIZES), random.key(0))


@pytest.mark.parametrize(
    ("name", "fields"), [("td3_n_step", {"n_step": 1}), ("td3_ensemble", {"num_critics": 2, "num_min": 2})]
)
def test_the_special_case_trains_bitwise_as_td3(changed, name, fields):
    """Networks, optimizer's state and metrics, with a buffer that wraps around and episodes that end in both ways."""
    module, (expected, expected_metrics) = changed(name), trained_as_td3()
    state, metrics = exact_jit(module.train)(module.Config(**WALK_SIZES, **fields), random.key(0))
    assert_same(tuple(metrics), tuple(expected_metrics))
    assert_same(tuple(state.params), tuple(expected.params))
    assert_same(tuple(state.opt_state), tuple(expected.opt_state))


# n-step targets


NUM_ENVS, NUM_STEPS, CAPACITY, GAMMA = 3, 96, 60, 0.9
WALK = {"env": "Walk-test", "num_envs": NUM_ENVS, "gamma": GAMMA, "learning_starts": NUM_STEPS, "batch_size": 1000}
WALK |= {"buffer_size": NUM_STEPS, "hidden_sizes": (8,)}


@functools.cache
def collected(module):
    """Rows of all that 3 environments do in 96 steps of random actions: row i is a step of environment i % 3."""
    return np.asarray(exact_jit(module.init)(module.Config(**WALK), random.key(1)).buffer)


@functools.cache
def record():
    """The same, unpacked, and whether each step is the first of its episode."""
    _, unravel = ravel_pytree(td3.example(td3.Config(**WALK)))
    steps = jax.tree.map(np.asarray, jax.vmap(unravel)(collected(td3)))
    is_first = steps.obs[:, 0] == 0  # an episode starts at time 0
    continues = ~is_first[NUM_ENVS:]
    np.testing.assert_array_equal(steps.next_obs[:-NUM_ENVS][continues], steps.obs[NUM_ENVS:][continues])
    return steps, is_first


@functools.cache
def coin_flips():
    """Made-up steps: observations are 0 or 1, so that episodes often seem to go on where they have ended."""
    rng, shape = np.random.default_rng(0), record()[0].obs.shape
    flips = lambda p: (rng.random(shape) < p).astype(np.float32)
    steps = record()[0]._replace(obs=flips(0.3), next_obs=flips(0.3), terminated=flips(0.2)[:, 0])
    is_first = np.ones(len(steps.obs), bool)
    is_first[NUM_ENVS:] = steps.terminated[:-NUM_ENVS] == 1
    is_first[NUM_ENVS:] |= (steps.next_obs[:-NUM_ENVS] != steps.obs[NUM_ENVS:])[:, 0]
    return steps, is_first


def walk(steps, is_first, start, count, n):
    """Up to n steps from one on, where `count` steps are known: reward, last observation, discount, why it ended."""
    i, reward, discount = start, 0.0, 1.0
    for k in range(n):
        reward, discount = reward + discount * steps.reward[i], discount * GAMMA
        if steps.terminated[i]:
            return reward, steps.next_obs[i], 0.0, "terminated"
        if k + 1 == n:
            return reward, steps.next_obs[i], discount, "n steps"
        if i + NUM_ENVS >= count:
            return reward, steps.next_obs[i], discount, "newest"
        if is_first[i + NUM_ENVS]:
            return reward, steps.next_obs[i], discount, "time limit"
        i += NUM_ENVS


def check_windows(module, recorded, count, n):
    """Samples from a ring of 60 rows after `count` steps equal the walk; every stored step is drawn, every end met."""
    config, (steps, is_first) = module.Config(**WALK, n_step=n), recorded()
    rows = np.asarray(jax.vmap(lambda step: ravel_pytree(step)[0])(steps))
    ring = np.zeros((CAPACITY, rows.shape[1]), np.float32)
    for i in range(count):
        ring[i % CAPACITY] = rows[i]
    step = jnp.int32(count)
    (drawn,) = module.sample_rows(config, jnp.asarray(ring), step, random.key(2), 1)
    batch = jax.jit(module.read_n_steps)(config, jnp.asarray(ring), step, drawn)
    batch = jax.tree.map(np.asarray, batch)
    assert [x.shape for x in batch] == [(1000, 1), (1000, 1), (1000,), (1000, 1), (1000,), (1000,)]
    # random actions tell which step was drawn
    start_of = {action: i for i, action in enumerate(steps.action[:, 0].tolist())}
    starts = [start_of[action] for action in batch.action[:, 0].tolist()]
    assert sorted(set(starts)) == list(range(max(0, count - CAPACITY), count))
    np.testing.assert_array_equal(batch.obs, steps.obs[starts])
    walks = (walk(steps, is_first, start, count, n) for start in starts)
    rewards, next_obs, discounts, ends = zip(*walks, strict=True)
    np.testing.assert_allclose(batch.reward, rewards, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch.next_obs, next_obs)
    np.testing.assert_allclose(np.where(batch.terminated == 1, 0, batch.discount), discounts, rtol=1e-5)
    assert set(ends) == {"terminated", "n steps"} | ({"time limit", "newest"} if n > 1 else set())


@pytest.mark.parametrize("count", [48, 60, 96], ids=["part", "full", "wrapped"])
def test_n_steps_equal_a_walk_over_the_trajectories(my_idea, count):
    for n in (1, 2, 3, 5):
        check_windows(my_idea, record, count, n)
    check_windows(my_idea, coin_flips, count, 4)


@pytest.mark.parametrize(
    ("recorded", "old", "new"),
    [
        (record, "rows + k * config.num_envs", "rows + k"),
        (record, " & (later.obs == batch.next_obs).all(axis=-1)", ""),
        (coin_flips, "(k <= num_later) & ", ""),
        (coin_flips, "(batch.terminated == 0) & ", ""),
        (coin_flips, "joins &= ", "joins = "),
    ],
    ids=["environments", "time limits", "newest", "episodes", "episodes that seem to go on"],
)
def test_the_walk_catches_mixed(my_idea, tmp_path, recorded, old, new):
    broken = load_broken(my_idea, tmp_path, old, new)
    with pytest.raises(AssertionError, match=r"not equal|Not equal"):
        check_windows(broken, recorded, count=96, n=4)


def test_the_target_uses_the_discounts(my_idea):
    config, params, _, batch, noise = hand_case()
    discount = np.linspace(0.1, 0.8, len(batch.reward))
    one_step = [td3.td_target(replace(config, gamma=g), params, batch, noise) for g in (0.0, 1.0)]
    target = my_idea.td_target(config, params, my_idea.Transition(*batch, discount), noise)
    np.testing.assert_allclose(target, one_step[0] + discount * (one_step[1] - one_step[0]), rtol=1e-4)


def test_three_steps_are_read_from_the_buffer_without_a_copy_of_it(my_idea):
    config = my_idea.Config(**SIZES)
    state = jax.eval_shape(lambda key: my_idea.init(config, key), seed_key())
    compiled = jit(lambda state: my_idea.iteration(config, state, 0), donate_argnums=0).lower(state).compile()
    assert_touches_batches_only(compiled, depth=0, num_seeds=1)


# One critic; Ornstein-Uhlenbeck noise


@pytest.mark.quick
def test_one_critic_gives_the_target(changed):
    """As td3's minimum where both critics are the first."""
    module, (config, params, _, batch, noise) = changed("td3_one_critic"), hand_case()
    first = jax.tree.map(lambda x: np.stack([x[0], x[0]]), params.target_critic)
    with jax.enable_x64(True):
        target = module.td_target(config, params, batch, noise)
        expected = td3.td_target(config, params._replace(target_critic=first), batch, noise)
    np.testing.assert_allclose(target, expected, rtol=1e-12)


@pytest.mark.quick
def test_the_noise_is_an_ornstein_uhlenbeck_process(changed):
    """A step of the Euler-Maruyama method by hand, and greedy actions plus noise, clipped."""
    module, noise, key = changed("td3_ou_noise"), np.array([[-1.0], [0.5], [2.0]]), random.key(1)
    config = module.Config(ou_theta=0.2, ou_sigma=0.3, ou_mu=0.4, ou_dt=0.25)
    normal = np.asarray(random.normal(key, noise.shape))
    expected = noise + 0.2 * (0.4 - noise) * 0.25 + 0.3 * 0.5 * normal
    actor = random_layers(np.random.default_rng(0), (3, 4), (4, 1))
    params, obs = module.Params(actor, None, None, None), np.eye(3)
    action, after = module.explore(config, params, obs, jnp.asarray(noise), key)
    np.testing.assert_allclose(after, expected, rtol=1e-5)
    by_hand = np.clip(np.tanh(np_mlp(actor, obs)) + expected, -1, 1)
    np.testing.assert_allclose(action, by_hand, rtol=1e-5)


# Layer normalization


@pytest.mark.quick
def test_layer_norm_in_the_critics_equals_numpy(changed):
    """A forward pass in float64; the actor has none."""
    module, (config, params, _, batch, _) = changed("td3_layer_norm"), hand_case()

    def normalized(layers, x):
        for w, b in layers[:-1]:
            x = x @ w
            x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
            x = silu(x + b)
        return (x @ layers[-1][0] + layers[-1][1])[:, 0]

    x = np.concatenate([batch.obs, batch.action], axis=1)
    expected = [normalized([(w[i], b[i]) for w, b in params.critic], x) for i in range(2)]
    with jax.enable_x64(True):
        q = module.twin_critics(config, params.critic, batch.obs, batch.action)
        assert_same(module.actor(config, params.actor, batch.obs), td3.actor(config, params.actor, batch.obs))
    np.testing.assert_allclose(q, expected, rtol=1e-9)


# Schedule


@pytest.mark.quick
@pytest.mark.parametrize(("step", "share"), [(1000, 1), (4000, 0.75), (7000, 0.5), (13_000, 0), (13_008, 0)])
def test_the_schedule_falls_from_the_end_of_the_warm_up_to_the_end_of_the_run(changed, monkeypatch, step, share):
    """The step size that each update of an iteration gets, whatever an optimizer has counted."""
    module = changed("td3_schedule")
    monkeypatch.setattr(module, "collect", lambda config, state, policy: state)
    monkeypatch.setattr(module, "read", lambda config, buffer, rows: None)
    monkeypatch.setattr(module, "update", lambda config, params, opt, batch, noise, count: (0, 0, config.learning_rate))
    config = module.Config(total_steps=13_000, learning_starts=1000, learning_rate=0.02)
    state = module.State(0, 0, jnp.zeros((4, 1)), None, None, jnp.int32(step), random.key(0), None)
    _, rates = module.iteration(config, state, 0)
    np.testing.assert_allclose(rates, np.full(8, 0.02 * share), rtol=1e-6, atol=1e-12)


# Normalized observations


@pytest.mark.quick
def test_running_statistics_equal_those_of_all_observations(changed):
    """Parts of different sizes, far from zero, against NumPy's in float64."""
    module, rng = changed("td3_normalize_obs"), np.random.default_rng(0)
    obs = rng.normal([5.0, -100, 0], [0.01, 3, 40], size=(300, 4, 3)).astype(np.float32)
    obs[150:] *= 1.5
    stats, seen = jnp.zeros((2, 3)), 0
    for length in (1, 2, 97, 200):
        part = obs[seen : seen + length]
        seen += length
        stats = module.update_stats(stats, part, jnp.int32(4 * seen))
    assert seen == len(obs)
    exact = obs.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(stats, [exact.mean(axis=0), exact.var(axis=0)], rtol=1e-4, atol=1e-4)


def test_policy_and_updates_see_normalized_observations(changed):
    """As td3's do if the observations are normalized by hand, and not otherwise; the statistics stay as they are."""
    module, (config, params, opt_state, batch, noise) = changed("td3_normalize_obs"), hand_case()
    mean, var = np.array([0.5, -0.5, 0]), np.array([4.0, 0.25, 1e-4])
    by_hand = lambda obs: np.clip((obs - mean) / np.sqrt(var + 1e-8), -10, 10)
    assert (np.abs(by_hand(batch.obs)) == 10).any()
    normalized = batch._replace(obs=by_hand(batch.obs), next_obs=by_hand(batch.next_obs))
    stats = np.stack([mean, var])
    own, own_opt_state = module.Params(*params, stats), module.OptState(*opt_state)
    with jax.enable_x64(True):
        got = jax.jit(module.update)(config, own, own_opt_state, batch, noise, 3)
        expected = jax.jit(td3.update)(config, params, opt_state, normalized, noise, 3)
        action = module.greedy(config, own, batch.obs)
        np.testing.assert_allclose(action, td3.greedy(config, params, normalized.obs), rtol=1e-9)
    assert_close(tuple(got[0]), (*expected[0], stats), rtol=1e-7, atol=1e-9)
    assert_close(got[2], expected[2], rtol=1e-9)


def test_statistics_are_those_of_the_observations_in_the_buffer(changed):
    module = changed("td3_normalize_obs")
    state = jax.jit(module.init)(module.Config(**WALK), random.key(1))
    obs = np.asarray(state.buffer)[:, :1].astype(np.float64)
    np.testing.assert_allclose(state.params.obs_stats, [obs.mean(axis=0), obs.var(axis=0)], rtol=1e-4)


# Ensemble


@pytest.mark.quick
def test_targets_are_of_a_pair_of_critics_drawn_anew(changed, monkeypatch):
    """Each of the ten pairs of five critics is drawn about as often as any other, and never a critic twice."""
    module, drawn = changed("td3_ensemble"), []

    def td_target(config, params, batch, noise):
        drawn.append(tuple(sorted(params.target_critic.tolist())))
        raise StopIteration

    monkeypatch.setattr(module, "td_target", td_target)
    params = module.Params(None, None, None, jnp.arange(5))
    for count in range(1, 201):
        with pytest.raises(StopIteration):
            module.update(module.Config(), params, None, None, None, jnp.int32(count))
    counts = np.array([drawn.count((i, j)) for i in range(5) for j in range(i + 1, 5)])
    assert counts.sum() == 200
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.quick
def test_every_critic_of_the_ensemble_regresses_onto_the_target(changed):
    module, (config, _, _, batch, _) = changed("td3_ensemble"), hand_case()
    critics = random_layers(np.random.default_rng(1), (4, 5, 5), (4, 5, 1))
    target = np.linspace(-1, 1, len(batch.reward))
    q = [np_critic([(w[i], b[i]) for w, b in critics], batch.obs, batch.action) for i in range(4)]
    with jax.enable_x64(True):
        loss, _ = module.critic_loss(critics, config, batch, target)
    np.testing.assert_allclose(loss, sum(np.mean((x - target) ** 2) for x in q), rtol=1e-9)


# Prioritized replay


@pytest.mark.quick
@pytest.mark.parametrize("exponent", [0.0, 0.6])
def test_rows_are_drawn_in_proportion_to_their_priorities(changed, exponent):
    """Uniformly with an exponent of 0; never a row that is not filled."""
    module, errors = changed("td3_prioritized"), np.arange(1, 9) / 2
    buffer = np.zeros((12, 7), np.float32)
    buffer[:8, -1] = errors**exponent
    rows = module.sample_rows(module.Config(batch_size=1000), jnp.asarray(buffer), None, random.key(0), 20)
    assert rows.shape == (20, 1000)
    expected = errors**exponent / (errors**exponent).sum() * rows.size
    counts = np.bincount(np.asarray(rows).ravel(), minlength=12)
    assert counts[8:].sum() == 0
    assert stats.chisquare(counts[:8], expected).pvalue > 0.01


@pytest.mark.quick
def test_importance_weights_by_hand(changed):
    """In the loss, relative to the largest; equal priorities, as of an exponent of 0, give td3's loss to the bit."""
    module, (config, params, _, batch, _) = changed("td3_prioritized"), hand_case()
    config, target = module.Config(importance_exponent=0.5), np.linspace(-1, 1, len(batch.reward))
    weighted = module.Transition(*batch, np.array([1.0, 4, 4, 16, 0.25, 1, 4, 100]))
    weights = np.array([0.5, 0.25, 0.25, 0.125, 1, 0.5, 0.25, 0.05])
    q = np.array(np_critics(params.critic, batch.obs, batch.action))
    with jax.enable_x64(True):
        loss, q_value = module.critic_loss(params.critic, config, weighted, target)
        equal, _ = module.critic_loss(params.critic, config, module.Transition(*batch, np.ones(8)), target)
        np.testing.assert_array_equal(equal, td3.critic_loss(params.critic, config, batch, target)[0])
    np.testing.assert_allclose(loss, (weights * (q - target) ** 2).mean(axis=1).sum(), rtol=1e-9)
    np.testing.assert_allclose(q_value, q.mean(), rtol=1e-9)


@pytest.mark.quick
def test_new_rows_get_the_highest_priority_and_replayed_ones_their_errors(changed, monkeypatch):
    """An iteration whose updates change nothing; its rows 0 and 7 are replayed, and 2 to 5 of 12 are the newest."""
    module, rng, sampled = changed("td3_prioritized"), np.random.default_rng(0), []

    def sample_rows(config, buffer, step, key, num_batches):
        sampled.append(np.asarray(buffer[:, -1]))
        return jnp.tile(jnp.array([0, 7]), (num_batches, 1))

    monkeypatch.setattr(module, "collect", lambda config, state, policy: state)
    monkeypatch.setattr(module, "sample_rows", sample_rows)
    monkeypatch.setattr(module, "update", lambda config, params, opt, batch, noise, count: (params, opt, 0.0))
    config = module.Config(num_envs=4, priority_exponent=0.7)
    actor = random_layers(rng, (3, 4), (4, 1))
    critics, targets = (random_layers(rng, (2, 4, 4), (2, 4, 1)) for _ in range(2))
    params = jax.tree.map(jnp.float32, module.Params(actor, critics, actor, targets))
    buffer = rng.normal(size=(12, 10)).astype(np.float32)  # obs 3, action 1, reward, next_obs 3, terminated, priority
    buffer[:, 8], buffer[:, 9] = np.arange(12) % 2, np.arange(1, 13)
    state = module.State(params, (), jnp.asarray(buffer), None, None, jnp.int32(18), random.key(0), None)
    after = np.asarray(module.iteration(config, state, 0)[0].buffer)
    expected = buffer[:, 9].copy()
    expected[2:6] = 12
    np.testing.assert_array_equal(sampled[0], expected)
    batch = td3.Transition(buffer[:, :3], buffer[:, 3:4], buffer[:, 4], buffer[:, 5:8], buffer[:, 8])
    y = td3.td_target(config, params, batch, jnp.zeros((12, 1)))
    errors = np.abs(np.array(np_critics(critics, batch.obs, batch.action)) - y).mean(axis=0)
    expected[[0, 7]] = errors[[0, 7]] ** 0.7
    np.testing.assert_allclose(after[:, 9], expected, rtol=1e-4)
    np.testing.assert_array_equal(after[:, :9], buffer[:, :9])


# Held noise


@pytest.mark.quick
@pytest.mark.parametrize("name", ["td3_held_noise", "sac_held_noise"])
def test_noise_is_held_for_thirty_steps(changed, monkeypatch, name):
    """The noise of exploration in 90 iterations of 8 environments, whatever the key of the step."""
    module, noises = changed(name), []

    def collect(config, state, policy):
        noises.append(tuple(policy(config, None, None, random.key(state.step)).tolist()))
        raise StopIteration

    monkeypatch.setattr(module, "collect", collect)
    monkeypatch.setattr(module, "explore", lambda config, params, obs, key: random.normal(key, (8,)))
    state = module.State(*[None] * len(module.State._fields))
    for t in range(90):
        with pytest.raises(StopIteration):
            module.iteration(*(module.Config(), state._replace(step=8 * t), 0)[: 3 - (name == "sac_held_noise")])
    assert [noises.count(noise) for noise in dict.fromkeys(noises)] == [30, 30, 30]
    assert len(set(noises[0])) == 8

"""The change that `results/changes/README.md` explains: it applies, says what its page says, and is right.

Where `algorithms/td3.py` has changed so that the diff no longer applies, apply what does by hand to a copy, and write
the diff anew with `diff -U1`, headed as it is now; the page shows its hunks word for word.
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
from cases import SMALL, assert_same, exact_jit, load_broken
from jax import random
from jax.flatten_util import ravel_pytree
from test_cli import fails
from test_structure import SIZES, assert_touches_batches_only, jit, seed_key

from amortax.algorithms import td3
from amortax.common import cli

ROOT = Path(td3.__file__).parent.parent
PAGE = ROOT / "results" / "changes" / "README.md"
DIFF = PAGE.parent / "td3_n_step.diff"
TEXT = PAGE.read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def execute(*command, folder):
    """Run a command in a folder that is below no git repository."""
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent), "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def my_idea(tmp_path_factory):
    """The changed file, loaded."""
    folder = tmp_path_factory.mktemp("changes")
    shutil.copy(td3.__file__, folder / "my_idea.py")
    execute("git", "apply", str(DIFF), folder=folder)
    spec = importlib.util.spec_from_file_location("my_idea", folder / "my_idea.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_idea"] = module  # where the command line looks for the docstring
    spec.loader.exec_module(module)
    yield module
    del sys.modules["my_idea"]


# The page


@pytest.mark.quick
def test_the_page_shows_the_diff_whole_and_names_what_exists(my_idea):
    assert "--- a/my_idea.py\n+++ b/my_idea.py\n" + "".join(blocks("diff")) == DIFF.read_text()
    changed = [line for line in DIFF.read_text().splitlines()[2:] if line[0] in "+-"]
    assert f"{len(changed)} lines removed or added" in TEXT
    for link in re.findall(r"\]\(([\w./-]+)\)", TEXT):
        assert (PAGE.parent / link).exists(), link
    flags = {f"--{name.replace('_', '-')}" for c in (my_idea.Config, cli.Options) for name in c.__annotations__}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT)) <= flags
    for name in re.findall(r"`(\w+)\(\)`", TEXT):
        assert hasattr(my_idea, name), name


def test_the_commands_run_in_a_folder_of_their_own(tmp_path):
    commands = blocks("bash")[0].strip()
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


@pytest.mark.quick
def test_the_changed_file_is_as_tidy_as_the_others(my_idea):
    settings = ("--config", str(ROOT / "pyproject.toml"), "my_idea.py")
    for command in (("check",), ("format", "--check")):
        execute(sys.executable, "-m", "ruff", *command, *settings, folder=Path(my_idea.__file__).parent)


# The change


def test_one_step_trains_bitwise_as_td3(my_idea):
    """Networks, optimizer's state and metrics, with a buffer that wraps around and episodes that end in both ways."""
    sizes = SMALL | {"env": "Walk-test", "total_steps": 512, "steps_per_epoch": 64, "hidden_sizes": (8,)}
    expected, expected_metrics = exact_jit(td3.train)(td3.Config(**sizes), random.key(0))
    state, metrics = exact_jit(my_idea.train)(my_idea.Config(**sizes, n_step=1), random.key(0))
    assert_same(tuple(metrics), tuple(expected_metrics))
    assert_same(tuple(state.params), tuple(expected.params))
    assert_same(tuple(state.opt_state), tuple(expected.opt_state))


NUM_ENVS, NUM_STEPS, CAPACITY, GAMMA = 3, 96, 60, 0.9
WALK = {"env": "Walk-test", "num_envs": NUM_ENVS, "gamma": GAMMA, "learning_starts": NUM_STEPS, "batch_size": 1000}
WALK |= {"buffer_size": NUM_STEPS, "hidden_sizes": (8,)}


@functools.cache
def collected(module):
    """Rows of all that 3 environments do in 96 steps of random actions: row i is a step of environment i % 3."""
    return np.asarray(exact_jit(module.init)(module.Config(**WALK), random.key(1)).buffer)


@functools.cache
def record():
    """The same by td3.py, whose file the change leaves alone."""
    _, unravel = ravel_pytree(td3.example(td3.Config(**WALK)))
    steps = jax.tree.map(np.asarray, jax.vmap(unravel)(collected(td3)))
    same_episode = steps.obs[NUM_ENVS:, 0] > 0  # an episode starts at time 0
    np.testing.assert_array_equal(steps.next_obs[:-NUM_ENVS][same_episode], steps.obs[NUM_ENVS:][same_episode])
    return steps


def walk(start, count, n):
    """Up to n steps from one on, where `count` steps are known: reward, last observation, discount, why it ended."""
    steps, i, reward, discount = record(), start, 0.0, 1.0
    for k in range(n):
        reward, discount = reward + discount * steps.reward[i], discount * GAMMA
        if steps.terminated[i]:
            return reward, steps.next_obs[i], 0.0, "terminated"
        if k + 1 == n:
            return reward, steps.next_obs[i], discount, "n steps"
        if i + NUM_ENVS >= count:
            return reward, steps.next_obs[i], discount, "newest"
        if steps.obs[i + NUM_ENVS, 0] == 0:
            return reward, steps.next_obs[i], discount, "time limit"
        i += NUM_ENVS


def check_windows(module, count, n):
    """Samples from a ring of 60 rows after `count` steps equal the walk; every stored step is drawn, every end met."""
    config, rows = module.Config(**WALK, n_step=n), collected(module)
    ring = np.zeros((CAPACITY, rows.shape[1]), np.float32)
    for i in range(count):
        ring[i % CAPACITY] = rows[i]
    step = jnp.int32(count)
    (drawn,) = module.sample_rows(config, jnp.asarray(ring), step, random.key(2), 1)
    batch = jax.jit(module.read_n_steps)(config, jnp.asarray(ring), step, drawn)
    batch = jax.tree.map(np.asarray, batch)
    assert [x.shape for x in batch] == [(1000, 1), (1000, 1), (1000,), (1000, 1), (1000,), (1000,)]
    # random actions tell which step was drawn
    start_of = {action: i for i, action in enumerate(record().action[:, 0].tolist())}
    starts = [start_of[action] for action in batch.action[:, 0].tolist()]
    assert sorted(set(starts)) == list(range(max(0, count - CAPACITY), count))
    np.testing.assert_array_equal(batch.obs, record().obs[starts])
    rewards, next_obs, discounts, ends = zip(*(walk(start, count, n) for start in starts), strict=True)
    np.testing.assert_allclose(batch.reward, rewards, rtol=1e-5)
    np.testing.assert_array_equal(batch.next_obs, next_obs)
    np.testing.assert_allclose(batch.discount, discounts, rtol=1e-5)
    assert set(ends) == {"terminated", "n steps"} | ({"time limit", "newest"} if n > 1 else set())


@pytest.mark.parametrize("count", [48, 60, 96], ids=["part", "full", "wrapped"])
def test_n_steps_equal_a_walk_over_the_trajectories(my_idea, count):
    for n in (1, 2, 3, 5):
        check_windows(my_idea, count, n)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rows + k * config.num_envs", "rows + k"),
        ("(batch.ended == 0) & (k <= num_later)", "k <= num_later"),
        ("(1 - terminated), terminated | truncated", "(1 - terminated), terminated"),
        ("(batch.ended == 0) & (k <= num_later)", "batch.ended == 0"),
    ],
    ids=["environments", "episodes", "time limits", "newest"],
)
def test_the_walk_catches_mixed(my_idea, tmp_path, old, new):
    broken = load_broken(my_idea, tmp_path, old, new)
    with pytest.raises(AssertionError, match=r"not equal|Not equal"):
        check_windows(broken, count=96, n=3)


def test_three_steps_are_read_from_the_buffer_without_a_copy_of_it(my_idea):
    config = my_idea.Config(**SIZES)
    state = jax.eval_shape(lambda key: my_idea.init(config, key), seed_key())
    compiled = jit(lambda state: my_idea.iteration(config, state, 0), donate_argnums=0).lower(state).compile()
    assert_touches_batches_only(compiled, depth=0, num_seeds=1)

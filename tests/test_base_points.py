"""Base points in files: actions in the environment's units, and one line for each kind of mistake."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CONFIGS, replace
from jax import random

from amortax.algorithms import fqi
from amortax.common import base_points
from amortax.common.base_points import BasePoints

GOOD = BasePoints(  # on Table-test: observations of six numbers, actions [2, 1] in an asymmetric box
    obs=np.arange(30.0).reshape(5, 6),
    action=np.array([[-1, 0.5], [3, 2.5], [1, 1.5], [2, 2], [0, 1]])[:, :, None],
    reward=np.arange(5.0),
    next_obs=np.arange(30.0).reshape(5, 2, 3) + 1,
    terminated=np.array([False, True, False, False, True]),
)


def write(path, points, **others):
    np.savez(path, **(points._asdict() | others))
    return path


@pytest.mark.quick
def test_actions_are_mapped_from_the_environments_units(tmp_path):
    """Observations may have the environment's shape or be flat; arrays of other names are ignored."""
    points = base_points.load(write(tmp_path / "points.npz", GOOD, truncated=np.ones(3)), "Table-test")
    np.testing.assert_allclose(points.action, [[-1, -1], [1, 1], [0, 0], [0.5, 0.5], [-0.5, -0.5]], atol=1e-6)
    np.testing.assert_array_equal(points.obs, GOOD.obs)
    np.testing.assert_array_equal(points.next_obs, GOOD.obs + 1)
    np.testing.assert_array_equal(points.reward, np.arange(5))
    np.testing.assert_array_equal(points.terminated, [0, 1, 0, 0, 1])
    rescaled = jax.vmap(fqi.make_env("Table-test").rescale)(points.action)
    np.testing.assert_allclose(rescaled, GOOD.action, rtol=1e-6)
    assert {x.dtype for x in points} == {np.dtype("float32")}


@pytest.mark.quick
def test_discrete_actions_are_whole_numbers(tmp_path):
    n, zeros = 4, np.zeros((4, 6))
    points = BasePoints(zeros, np.array([2, 0, 1, 2]), np.zeros(n), zeros, np.zeros(n))
    loaded = base_points.load(write(tmp_path / "points.npz", points), "Acrobot-v1")
    np.testing.assert_array_equal(loaded.action, [[-1, -1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])


@pytest.mark.quick
@pytest.mark.parametrize("env", ["Table-test", "Acrobot-v1"])
def test_what_is_saved_is_loaded_again(tmp_path, env):
    """The base points that were collected, without the copies that stand in for later rounds."""
    maximizer = "exhaustive" if env == "Acrobot-v1" else "grid"
    config = replace(CONFIGS["fqi"], env=env, maximizer=maximizer, rounds=2)
    state = jax.jit(lambda key: fqi.init(config, key))(random.key(0))
    assert (len(state.base_points.reward), state.step) == (80, 40)
    base_points.save(tmp_path / "points.npz", env, state.base_points, int(state.step))
    for saved, collected in zip(base_points.load(tmp_path / "points.npz", env), state.base_points, strict=True):
        np.testing.assert_allclose(saved, collected[:40], atol=1e-6)


def changed(name, row, value):
    x = np.array(getattr(GOOD, name), float)
    x[row] = value
    return GOOD._replace(**{name: x})


MISTAKES = [
    (b"", "cannot be read as an .npz file"),
    (b"obs,action\n1,2\n", "cannot be read as an .npz file"),
    (np.zeros(3), "cannot be read as an .npz file"),
    ({"weights": np.zeros(3)}, "must hold obs, action, reward, next_obs, terminated; it holds weights"),
    (dict(zip(("observations", "actions"), GOOD, strict=False)), "it holds observations, actions"),
    (GOOD._replace(action=np.array(["left"] * 5)), "action must hold numbers"),
    (GOOD._replace(action=np.array([{}] * 5)), "cannot be read"),
    (BasePoints(*(x[:0] for x in GOOD)), "must hold at least one transition"),
    (GOOD._replace(obs=np.zeros((5, 3))), r"obs must have shape \[5, 6\] for Table-test, not \[5, 3\]"),
    (GOOD._replace(action=np.zeros((5, 1))), r"action must have shape \[5, 2\] for Table-test, not \[5, 1\]"),
    (GOOD._replace(terminated=np.zeros(4)), r"terminated must have shape \[5\] for Table-test, not \[4\]"),
    (changed("reward", 3, np.nan), "reward must be finite; it is not in row 3"),
    (changed("obs", (2, 1), np.inf), "obs must be finite; it is not in row 2"),
    (changed("next_obs", 2, np.nan), "next_obs must be finite; it is not in row 2"),
    (changed("terminated", 2, np.nan), "terminated must be finite; it is not in row 2"),
    (changed("terminated", 1, 2), "terminated must be 0 or 1"),
    (changed("action", 4, 2.6), r"action must be from \(-1, 0.5\) to \(3, 2.5\), .*; row 4 is \(2.6, 2.6\)"),
]


@pytest.mark.quick
@pytest.mark.parametrize(("content", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_in_a_file_is_named(tmp_path, capsys, content, said):
    path = tmp_path / "points.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        with path.open("wb") as file:
            np.save(file, content)
    else:
        np.savez(path, **(content if isinstance(content, dict) else content._asdict()))
    with pytest.raises(SystemExit) as error:
        base_points.load(path, "Table-test")
    line = capsys.readouterr().err
    assert error.value.code == 2
    assert line.count("\n") == 1
    assert re.match(rf"error: --base-points {path}: .*{said}", line)


@pytest.mark.quick
def test_discrete_actions_must_exist(tmp_path, capsys):
    zeros = np.zeros((2, 6))
    for action in (3, -1, 0.5):
        points = BasePoints(zeros, np.array([0, action]), np.zeros(2), zeros, np.zeros(2))
        with pytest.raises(SystemExit):
            base_points.load(write(tmp_path / "points.npz", points), "Acrobot-v1")
        assert "action must be a whole number from (0) to (2), the bounds of Acrobot-v1; row 1" in (
            capsys.readouterr().err
        )


@pytest.mark.quick
def test_the_last_observation_of_a_terminated_episode_may_be_missing(tmp_path):
    """Nothing is learned from it; a policy that is fitted there sees zeros."""
    path = write(tmp_path / "points.npz", changed("next_obs", 1, np.nan))
    config = replace(CONFIGS["fqi"], env="Table-test")
    state = jax.jit(fqi.init)(config, random.key(0), base_points.load(path, "Table-test"))
    np.testing.assert_array_equal(state.base_points.next_obs[1], np.zeros(6))
    np.testing.assert_array_equal(state.base_points.next_obs[0], GOOD.obs[0] + 1)
    assert jnp.isfinite(state.base_points.next_obs).all()


@pytest.mark.quick
def test_rounding_beyond_a_bound_is_clipped(tmp_path):
    path = write(tmp_path / "points.npz", changed("action", 1, np.array([[3.00001], [2.5]])))
    assert np.abs(base_points.load(path, "Table-test").action).max() == 1

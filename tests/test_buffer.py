"""The replay buffer against a plain Python ring, and the distribution of its samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CONFIGS, replace
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import random
from scipy import stats

from amortax.algorithms import td3

store = jax.jit(td3.store)


def sample(config, buffer, step, key):
    """A batch."""
    (rows,) = td3.sample_rows(config, buffer, step, key, 1)
    return td3.read(config, buffer, rows)


DIMS = {"ClockTruncated-test": (1, 1), "Table-test": (6, 2)}


def transitions(start, shape, obs_dim, action_dim):
    """Transitions `[*shape]` that tell their number, counted from `start`, in every field."""
    i = start + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    column = i[..., None]
    return td3.Transition(
        obs=jnp.asarray(column + np.arange(obs_dim) / 8),
        action=jnp.asarray(-column - np.arange(action_dim) / 8),
        reward=jnp.asarray(i + 1000),
        next_obs=jnp.asarray(column + 2000 + np.arange(obs_dim) / 8),
        terminated=jnp.asarray(i % 3 == 0),  # of type bool, as environments give it
    )


def fill(writes, shape, capacity, obs_dim, action_dim):
    """A buffer after so many writes of transitions `[*shape]` each, the step, and the same as a list of rows."""
    n = int(np.prod(shape))
    buffer, ring = jnp.zeros((capacity, 2 * obs_dim + action_dim + 2)), [None] * capacity
    for step in range(0, writes * n, n):
        batch = transitions(step, shape, obs_dim, action_dim)
        buffer = store(buffer, step, batch)
        rows = np.concatenate([np.asarray(x, np.float32).reshape(n, -1) for x in batch], axis=1)
        for k in range(n):
            ring[(step + k) % capacity] = rows[k]
    return buffer, writes * n, ring


@pytest.mark.quick
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1, 1), (1, 4), (3, 2)]),
    multiple=st.integers(1, 4),
    env=st.sampled_from([*DIMS]),
    writes=st.integers(0, 9),
)
def test_store_equals_a_plain_ring(shape, multiple, env, writes):
    """Also after several times around, an iteration's steps of all environments at a time."""
    buffer, _, ring = fill(writes, shape, int(np.prod(shape)) * multiple, *DIMS[env])
    filled = [x for x in ring if x is not None]
    np.testing.assert_array_equal(buffer[: len(filled)], np.reshape(filled, (len(filled), buffer.shape[1])))
    assert not np.any(buffer[len(filled) :])


@pytest.mark.quick
@pytest.mark.parametrize("env", DIMS)
@pytest.mark.parametrize("writes", [1, 2, 7])
def test_sample_gives_whole_stored_transitions(env, writes):
    """Every sample is one stored transition with all its fields."""
    config = replace(CONFIGS["td3"], env=env, batch_size=50)
    buffer, step, ring = fill(writes, (2, 2), 12, *DIMS[env])
    batch = sample(config, buffer, step, random.key(writes))
    obs_dim, action_dim = DIMS[env]
    assert [x.shape for x in batch] == [(50, obs_dim), (50, action_dim), (50,), (50, obs_dim), (50,)]
    number = np.asarray(batch.obs[:, 0]).astype(int)
    assert set(number) <= {int(x[0]) for x in ring if x is not None}
    for x, y in zip(batch, transitions(0, (step,), *DIMS[env]), strict=True):
        np.testing.assert_array_equal(x, np.asarray(y, np.float32)[number])


@pytest.mark.quick
@pytest.mark.parametrize(("writes", "filled"), [(1, 4), (7, 28), (16, 64), (23, 64)])
def test_sample_is_uniform_over_the_filled_rows(writes, filled):
    """Chi-square test on a fixed key; with a part of the buffer filled, all of it, and after a wrap-around."""
    config = replace(CONFIGS["td3"], env="ClockTruncated-test", batch_size=20_000)
    buffer, step, ring = fill(writes, (1, 4), 64, 1, 1)
    samples = np.asarray(sample(config, buffer, step, random.key(7)).obs).ravel()
    stored = sorted(x[0] for x in ring if x is not None)
    values, counts = np.unique(samples, return_counts=True)
    assert len(stored) == filled
    assert values.tolist() == stored
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.quick
def test_samples_of_different_keys_differ():
    config = replace(CONFIGS["td3"], env="ClockTruncated-test", batch_size=64)
    buffer, step, _ = fill(16, (1, 4), 64, 1, 1)
    one, same, other = (sample(config, buffer, step, random.key(i)).obs for i in (0, 0, 1))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(one, same)

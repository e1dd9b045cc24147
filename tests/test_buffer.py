"""The replay buffer against a plain Python ring, and the distribution of its samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import random
from scipy import stats

import algorithms.td3 as td3

add = jax.jit(td3.buffer_add)
sample = jax.jit(td3.buffer_sample, static_argnums=(2, 3))


def transitions(start, n, obs_dim, action_dim):
    """`n` transitions that tell their number, counted from `start`, in every field, with a different sign or shift."""
    i = np.arange(start, start + n, dtype=np.float32)
    column = i[:, None]
    return td3.Transition(
        obs=jnp.asarray(column + np.arange(obs_dim) / 8),
        action=jnp.asarray(-column - np.arange(action_dim) / 8),
        reward=jnp.asarray(i + 1000),
        next_obs=jnp.asarray(column + 2000 + np.arange(obs_dim) / 8),
        terminated=jnp.asarray(i % 3 == 0),  # of type bool, as environments give it
    )


def row(transition, k):
    """Transition `k` of a batch as the buffer is to hold it."""
    return np.concatenate([np.ravel(np.asarray(x[k], np.float32)) for x in transition])


def fill(adds, n, capacity, obs_dim, action_dim):
    """A buffer after so many adds of `n` transitions each, and the same as a list of rows."""
    buffer = td3.buffer_init(capacity, 2 * obs_dim + action_dim + 2)
    ring, position = [None] * capacity, 0
    for i in range(adds):
        batch = transitions(i * n, n, obs_dim, action_dim)
        buffer = add(buffer, batch)
        for k in range(n):
            ring[position] = row(batch, k)
            position = (position + 1) % capacity
    return buffer, ring, position


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 8),
    multiple=st.integers(1, 5),
    obs_dim=st.integers(1, 4),
    action_dim=st.integers(1, 3),
    adds=st.integers(0, 17),
)
def test_add_equals_a_plain_ring(n, multiple, obs_dim, action_dim, adds):
    """Also after several times around: rows in their places, where the next goes, how many there are."""
    capacity, width = n * multiple, 2 * obs_dim + action_dim + 2
    buffer, ring, position = fill(adds, n, capacity, obs_dim, action_dim)
    filled = [x for x in ring if x is not None]
    assert (buffer.position, buffer.size) == (position, len(filled)) == (adds * n % capacity, min(adds * n, capacity))
    np.testing.assert_array_equal(buffer.rows[: len(filled)], np.reshape(filled, (len(filled), width)))
    assert not np.any(buffer.rows[len(filled) :])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    dims=st.sampled_from([(1, 1), (3, 2)]),
    shape=st.sampled_from([(), (5,), (2, 3)]),
    adds=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_sample_gives_whole_stored_transitions(dims, shape, adds, seed):
    """Every draw is one stored transition with all its fields, in the shape asked for."""
    buffer, ring, _ = fill(adds, 4, 12, *dims)
    batch = sample(buffer, random.key(seed), shape, dims[1])
    assert [x.shape for x in batch] == [(*shape, dims[0]), (*shape, dims[1]), shape, (*shape, dims[0]), shape]
    stored = {tuple(x) for x in ring if x is not None}
    flat = [x.reshape(-1, *x.shape[len(shape) :]) for x in batch]
    for k in range(len(flat[0])):
        assert tuple(row(flat, k)) in stored
    # the fields are those put in
    number = np.asarray(batch.obs[..., 0])
    expected = transitions(0, 4 * adds, *dims)
    for x, y in zip(batch, expected, strict=True):
        np.testing.assert_array_equal(x, np.asarray(y, np.float32)[number.astype(int)])


@pytest.mark.parametrize(("adds", "filled"), [(1, 4), (7, 28), (16, 64), (23, 64)])
def test_sample_is_uniform_over_the_filled_rows(adds, filled):
    """Chi-square test on a fixed key; with a part of the buffer filled, all of it, and after a wrap-around."""
    buffer, ring, _ = fill(adds, 4, 64, 1, 1)
    draws = np.asarray(sample(buffer, random.key(7), (50, 400), 1).obs).ravel()
    stored = sorted(x[0] for x in ring if x is not None)
    values, counts = np.unique(draws, return_counts=True)
    assert len(stored) == filled
    assert values.tolist() == stored
    assert stats.chisquare(counts).pvalue > 0.01


def test_samples_of_different_keys_differ():
    buffer, _, _ = fill(16, 4, 64, 1, 1)
    draw = functools.partial(td3.buffer_sample, buffer, shape=(64,), action_dim=1)
    assert not np.array_equal(draw(random.key(0)).obs, draw(random.key(1)).obs)
    np.testing.assert_array_equal(draw(random.key(0)).obs, draw(random.key(0)).obs)

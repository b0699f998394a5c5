"""k-means against Lloyd's loop from the same seeds, its seeding probabilities, and clusters without rows."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.ops.clustering import kmeans

rng = np.random.default_rng(0)


def lloyd(x, centroids):
    """Lloyd's algorithm row by row; a cluster without rows keeps its centroid."""
    labels = None
    while True:
        new = [int(np.argmin([np.sum((row - c) ** 2) for c in centroids])) for row in x]
        if new == labels:
            return (
                np.array(labels),
                centroids,
                sum(np.sum((r - centroids[k]) ** 2) for r, k in zip(x, labels, strict=True)),
            )
        labels = new
        means = []
        for k, old in enumerate(centroids):
            rows = [row for row, label in zip(x, labels, strict=True) if label == k]
            means.append(np.mean(rows, axis=0) if rows else old)
        centroids = np.array(means)


def test_the_result_is_a_fixed_point_of_lloyds_loop_and_the_best_of_its_starts():
    x, where = rng.normal(size=(30, 3)) + 50, rng.random(30) > 0.2
    dirty = np.where(where[:, None], x, np.nan)
    run = jax.jit(
        lambda key, starts: kmeans(key, dirty, num_clusters=4, num_starts=starts, where=where), static_argnums=1
    )
    inertias = []
    with jax.enable_x64(True):
        for seed in range(3):
            labels, centroids, inertia = run(jax.random.key(seed), 1)
            expected = lloyd(x[where], np.asarray(centroids))
            np.testing.assert_array_equal(np.asarray(labels)[where], expected[0])
            np.testing.assert_allclose(centroids, expected[1], rtol=1e-12)
            np.testing.assert_allclose(inertia, expected[2], rtol=1e-9)
            assert np.all(np.asarray(labels)[~where] == -1)
        alone = [run(key, 1)[2] for key in jax.random.split(jax.random.key(7), 5)]
        np.testing.assert_allclose(run(jax.random.key(7), 5)[2], min(alone), rtol=1e-9)
        inertias += alone
    assert len(set(np.round(inertias, 6))) > 1, "every start gave the same clustering, so that the choice is not tested"


def test_seeds_are_drawn_by_squared_distance():
    """Two seeds and one Lloyd step on rows 0, 1 and 3: the pairs of seeds come with the probabilities of k-means++."""
    x = np.array([[0.0], [1.0], [3.0]], np.float32)
    squares = (x - x.T) ** 2
    first = np.full(3, 1 / 3)
    second = squares / squares.sum(1, keepdims=True)
    # After one step the partition tells the pair: {0, 1} gives {0} against {1, 3}, both others {0, 1} against {3}.
    alone = first[0] * second[0, 1] + first[1] * second[1, 0]
    keys = jax.random.split(jax.random.key(0), 4000)
    labels = jax.jit(jax.vmap(lambda k: kmeans(k, x, num_clusters=2, max_steps=1)[1]))(keys)
    zero_alone = np.mean(np.min(np.asarray(labels)[..., 0], axis=1) == 0)
    assert abs(zero_alone - alone) < 5 * np.sqrt(alone * (1 - alone) / 4000)


def test_more_clusters_than_distinct_rows():
    x = jnp.asarray([[1.0, 2.0]] * 4 + [[5.0, 5.0]])
    labels, centroids, inertia = jax.jit(lambda key: kmeans(key, x, num_clusters=4))(jax.random.key(0))
    assert len(set(np.asarray(labels[:4]))) == 1 and labels[4] != labels[0] and inertia == 0
    assert {tuple(c) for c in np.asarray(centroids).tolist()} == {(1.0, 2.0), (5.0, 5.0)}
    labels, centroids, inertia = kmeans(jax.random.key(0), x, num_clusters=2, where=jnp.zeros(5, bool))
    assert np.all(labels == -1) and not np.any(centroids) and inertia == 0


def test_refuses():
    key, x = jax.random.key(0), jnp.ones((4, 2))
    with pytest.raises(ValueError, match="x must be"):
        kmeans(key, x[0], num_clusters=2)
    with pytest.raises(ValueError, match="where has shape"):
        kmeans(key, x, num_clusters=2, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="num_clusters=0"):
        kmeans(key, x, num_clusters=0)


def test_the_key_decides_and_is_used_once():
    x = jnp.asarray(rng.normal(size=(40, 2)))
    run = jax.jit(lambda key: kmeans(key, x, num_clusters=5, num_starts=2, max_steps=1))
    with jax.debug_key_reuse(True):
        run.trace(jax.random.key(0)).lower()
    assert np.any(run(jax.random.key(0))[1] != run(jax.random.key(1))[1])


def from_seed(seed, x, where):
    """The keys of the suite cost executables; a number does not."""
    return kmeans(jax.random.key(seed), x, num_clusters=3, where=where)


CASES = [
    Case(
        from_seed,
        {"seed": Arg("index", high=100), "x": Arg("embeddings", (8, 2)), "where": Arg("where", (8,))},
        frozen=("x",),
        reason="labels are integers, and centroids are handed out as constants",
        rows={"x": 0, "where": 0},
        skip={"padding": "the labels of masked rows are part of the result"},
        name="kmeans",
        covers=("ops.kmeans",),
    )
]
test_conformance = conformance.conformance_tests(CASES)

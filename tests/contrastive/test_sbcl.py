"""Subclass-balancing contrastive learning against loops over anchors, pairs, rows and classes."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import (
    assign_subclasses,
    balanced_kmeans,
    class_temperatures,
    ldam_loss,
    long_tail_indices,
    sbcl_loss,
    subclass_counts,
    supervised_contrastive_loss,
)

rng = np.random.default_rng(0)
LABELS = np.array([0, 0, 1, 0, 1, 2, -1, 0], np.int32)
GROUPS = np.array([0, 1, 2, 0, 2, 3, -1, 1], np.int32)
WARMTH = np.float32([0.2, 0.3, 0.5])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def oracle(views, where, temperature=0.25, beta=0.25, base=0.07):
    """The loss of each anchor by the definition of its four sets."""
    z = unit(views)
    num_views, rows, _ = z.shape
    everyone = [(u, j) for u in range(num_views) for j in np.flatnonzero(where)]
    terms = np.zeros((num_views, rows))

    def level(i, positives, counted, t):
        log_sum = np.log(sum(np.exp(z[i] @ z[a] / t) for a in counted))
        return -np.mean([z[i] @ z[p] / t - log_sum for p in positives])

    for i in everyone:
        if LABELS[i[1]] < 0:
            continue
        others = [a for a in everyone if a != i]
        other_views = [a for a in others if a[1] == i[1]]
        same_group = [a for a in others if GROUPS[a[1]] == GROUPS[i[1]]]
        outside = [a for a in others if GROUPS[a[1]] != GROUPS[i[1]]]
        second = [a for a in outside if LABELS[a[1]] == LABELS[i[1]]] + other_views
        terms[i] = level(i, same_group, others, temperature) * temperature / base
        terms[i] += beta * level(i, second, outside + other_views, WARMTH[LABELS[i[1]]])
    return terms


@pytest.mark.parametrize("num_views", [2, 3])
def test_equals_the_loop(num_views):
    views, where = rng.normal(size=(num_views, 8, 4)), np.array([1, 1, 1, 1, 1, 1, 1, 0], bool)
    dirty = np.where(where[None, :, None], views, np.nan).astype(np.float32)
    options = {"where": where, "temperature": 0.25}

    @jax.jit
    def both(views):
        arrays = views, LABELS, GROUPS, WARMTH
        return sbcl_loss(*arrays, reduction="none", **options), sbcl_loss(*arrays, **options)

    terms, mean = both(dirty)
    expected = oracle(views, where)
    np.testing.assert_allclose(terms, expected, rtol=2e-5)
    np.testing.assert_allclose(mean, expected[:, where & (LABELS >= 0)].mean(), rtol=2e-5)


def test_one_subclass_a_class_is_the_supervised_contrastive_loss():
    """Then only the other view is positive on the second level, which beta = 0 leaves out."""
    views = np.float32(rng.normal(size=(2, 8, 4)))
    y = np.maximum(LABELS, 0)

    @jax.jit
    def both(views):
        ours = sbcl_loss(views, y, y, WARMTH, beta=0.0, base_temperature=0.1)
        return ours, supervised_contrastive_loss(views.reshape(16, 4), np.tile(y, 2))

    np.testing.assert_allclose(*both(views), rtol=1e-5)


def test_counts():
    np.testing.assert_array_equal(subclass_counts(np.array([500, 100, 30, 12])), [41, 8, 2, 1])  # the smallest is 12
    np.testing.assert_array_equal(subclass_counts(np.array([500, 39, 5]), delta=20), [25, 1, 1])


def greedy(scores, k):
    """Pairs from the best down; then the rows left over, one more for each centre."""
    labels, size = np.full(len(scores), -1), np.zeros(k, int)
    order = sorted(((i, c) for i in range(len(scores)) for c in range(k)), key=lambda p: -scores[p])
    for room in (len(scores) // k, len(scores) // k + 1):
        for i, c in order:
            if labels[i] < 0 and size[c] < room:
                labels[i], size[c] = c, size[c] + 1
    return labels


def test_balanced_clusters():
    """Sizes differ by at most one, and the result is a fixed point of the naive greedy round."""
    k = 3
    x, where = rng.normal(size=(13, 3)), np.arange(13) < 11
    dirty = np.where(where[:, None], x, np.nan).astype(np.float32)
    labels, centres = jax.jit(lambda key: balanced_kmeans(key, dirty, num_clusters=k, where=where))(jax.random.key(k))
    labels = np.asarray(labels)
    assert np.all(labels[~where] == -1)
    size = np.bincount(labels[where], minlength=k)
    assert size.max() - size.min() <= 1 and size.sum() == 11
    z = unit(x[where])
    expected = np.array([z[labels[where] == c].mean(axis=0) for c in range(k)])
    np.testing.assert_allclose(centres, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(greedy(z @ unit(expected).T, k), labels[where])


@pytest.mark.parametrize("balanced", [False, True])
def test_subclasses_are_clusters_of_their_class(balanced):
    """Class 0 holds two directions, class 1 one, class 2 three; the unlabelled have none."""
    directions = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, 0, -1]])
    labels = np.array([0, 0, 1, 2, 2, 2] * 4 + [-1], np.int32)
    truth = np.array([0, 1, 2, 3, 4, 5] * 4)
    x = np.vstack([directions[truth], np.full((1, 3), np.nan)]) * rng.uniform(0.5, 2, (25, 1))
    x[:24] += 0.01 * rng.normal(size=(24, 3))
    got = np.asarray(
        jax.jit(
            lambda key: assign_subclasses(
                key,
                np.float32(x),
                labels,
                np.array([2, 1, 3]),
                max_subclasses=3,
                max_size=12,
                balanced=balanced,
            )
        )(jax.random.key(3))
    )
    assert got[24] == -1
    for c, numbers in enumerate(({0, 1}, {2}, {3, 4, 5})):
        assert set(got[:24][labels[:24] == c]) == numbers
    assert len(set(zip(truth, got[:24], strict=True))) == 6


def test_temperatures_equal_the_formula():
    """The class 2 has one subclass, the class 3 no example."""
    x, labels = rng.normal(size=(20, 3)), np.array([0] * 9 + [1] * 6 + [2] * 4 + [-1], np.int32)
    x[labels == 1] = x[9] + 0.1 * x[labels == 1]
    x[-1] = np.nan
    z, phi = unit(x), []
    for c in range(3):
        mine = z[labels == c]
        phi.append(np.mean(np.linalg.norm(mine - mine.mean(axis=0), axis=1)) / np.log(len(mine) + 10))
    ratio = np.clip(phi, *np.percentile(phi, (10, 90)))
    ratio = ratio / ratio.mean()

    @jax.jit
    def run(x):
        counts = np.array([3, 2, 1, 2])
        return [class_temperatures(x, labels, counts, temperature=0.2, form=f) for f in ("ratio", "exponential")]

    got = run(np.float32(x))
    np.testing.assert_allclose(got[0], [0.2 * ratio[0], 0.2 * ratio[1], 0.2, 0.2], rtol=1e-5)
    np.testing.assert_allclose(got[1], [0.2 * np.exp(ratio[0]), 0.2 * np.exp(ratio[1]), 0.2, 0.2], rtol=1e-5)


def test_margins():
    logits, labels = rng.normal(size=(5, 3)), np.array([0, 2, 1, -1, 2], np.int32)
    counts, weights = np.array([80, 20, 5]), np.array([0.1, 0.5, 2.0])
    expected = []
    for x, y in zip(logits, labels, strict=True):
        if y >= 0:
            shifted = 30 * (x - np.eye(3)[y] * 0.5 * (5 / counts[y]) ** 0.25)
            expected.append(np.log(np.exp(shifted).sum()) - shifted[y])

    @jax.jit
    def run(logits):
        return [ldam_loss(logits, labels, counts, class_weights=w) for w in (None, np.float32(weights))]

    plain, weighted = run(np.float32(logits))
    np.testing.assert_allclose(plain, np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(weighted, np.average(expected, weights=weights[labels[labels >= 0]]), rtol=1e-5)


def test_long_tails():
    labels = rng.permutation(np.repeat(np.arange(5), 200))
    rows = long_tail_indices(jax.random.key(1), labels, factor=0.01)
    assert len(set(rows)) == len(rows)
    np.testing.assert_array_equal(np.bincount(labels[rows]), [200, 63, 20, 6, 2])
    step = long_tail_indices(jax.random.key(1), labels, factor=0.1, kind="step")
    np.testing.assert_array_equal(np.bincount(labels[step]), [200, 200, 200, 20, 20])
    assert not np.array_equal(rows, long_tail_indices(jax.random.key(2), labels, factor=0.01))


def test_refuses():
    views, y, z = jnp.ones((2, 4, 3)), jnp.zeros(4, int), jnp.ones((4, 3))
    with pytest.raises(ValueError, match="V >= 2"):
        sbcl_loss(views[:1], y, y, jnp.ones(1))
    with pytest.raises(ValueError, match="subclasses has shape"):
        sbcl_loss(views, y, y[:2], jnp.ones(1))
    with pytest.raises(ValueError, match="class_temperatures must be"):
        sbcl_loss(views, y, y, jnp.float32(1))
    with pytest.raises(ValueError, match="beta=-1"):
        sbcl_loss(views, y, y, jnp.ones(1), beta=-1)
    with pytest.raises(ValueError, match="delta at least 1"):
        subclass_counts(y, delta=0)
    with pytest.raises(ValueError, match="embeddings, labels and counts"):
        assign_subclasses(jax.random.key(0), z, y[:2], y, max_subclasses=1)
    with pytest.raises(ValueError, match="max_subclasses=0"):
        assign_subclasses(jax.random.key(0), z, y, y, max_subclasses=0)
    with pytest.raises(ValueError, match="num_clusters=0"):
        balanced_kmeans(jax.random.key(0), z, num_clusters=0)
    with pytest.raises(ValueError, match="form='linear'"):
        class_temperatures(z, y, y, form="linear")
    with pytest.raises(ValueError, match="percentiles="):
        class_temperatures(z, y, y, percentiles=(90, 10))
    with pytest.raises(ValueError, match="class_counts must be"):
        ldam_loss(z, y, jnp.ones(4))
    with pytest.raises(ValueError, match="kind='linear'"):
        long_tail_indices(jax.random.key(0), np.zeros(3, int), kind="linear")


def loss_of(views, labels, warmth, where, axis_name=None):
    """Two subclasses a class, by the parity that the label was drawn with."""
    return sbcl_loss(views, labels // 2, labels, 0.1 + warmth, temperature=0.3, where=where, axis_name=axis_name)


NONE = "no gradient passes"
CASES = [
    Case(
        loss_of,
        {
            "views": Arg("embeddings", (2, 6, 4)),
            "labels": Arg("labels", (6,), high=4),
            "warmth": Arg("weights", (2,)),
            "where": Arg("where", (6,)),
        },
        wrt=("views", "warmth"),
        rows={"views": 1, "labels": 0, "where": 0},
        symmetry="invariant",
        covers=("contrastive.sbcl_loss",),
    ),
    Case(
        assign_subclasses,
        {
            "key": Arg("key"),
            "embeddings": Arg("embeddings", (8, 3)),
            "labels": Arg("labels", (8,), high=2),
            "counts": Arg("labels", (2,), high=3),
        },
        static={"max_subclasses": 3},
        reason=NONE,
        helper=True,
        skip={"dtype": "clusters of rounded numbers may differ"},
    ),
    Case(
        balanced_kmeans,
        {"key": Arg("key"), "x": Arg("embeddings", (6, 3)), "where": Arg("where", (6,))},
        static={"num_clusters": 2, "max_steps": 5},
        reason=NONE,
        helper=True,
        skip={"dtype": "clusters of rounded numbers may differ"},
    ),
    Case(
        class_temperatures,
        {
            "embeddings": Arg("embeddings", (8, 3)),
            "labels": Arg("labels", (8,), high=2),
            "counts": Arg("labels", (2,), high=3),
        },
        reason=NONE,
        helper=True,
        skip={"dtype": "temperatures are in the accumulation dtype"},
    ),
    Case(
        ldam_loss,
        {"logits": Arg("scores", (5, 3)), "labels": Arg("labels", (5,)), "where": Arg("where", (5,))},
        static={"class_counts": np.array([9, 4, 1])},
        wrt=("logits",),
        helper=True,
        bfloat16_tolerance=0.2,
    ),
    Case(subclass_counts, {"class_counts": Arg("index", (4,), high=50)}, helper=True),
    Case(long_tail_indices, {"key": Arg("key"), "labels": Arg("labels", (30,))}, host=True),
]
test_conformance = conformance.conformance_tests(CASES)

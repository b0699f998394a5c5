"""The poolings and the rank AUC against loops over bags, and the two layouts against each other."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import mil
from jaxlab.mil.pooling import group

rng = np.random.default_rng(0)
KEEP = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], bool)
X, SCORES = rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 5)) * 3
X[~KEEP], SCORES[~KEEP] = np.nan, np.nan


def ragged(*arrays):
    """The same bags as one shuffled list with padding in it: the arrays, the ids and the number of bags."""
    order = rng.permutation(KEEP.size)
    ids = np.where(KEEP, np.arange(4)[:, None], -1).reshape(-1)[order].astype(np.int32)
    return [a.reshape(KEEP.size, *a.shape[2:])[order] for a in arrays], {"segment_ids": ids, "num_segments": 4}, order


def softmax(s):
    e = np.exp(s - s.max())
    return e / e.sum()


ORACLES = {
    "mean_pool": lambda x, s: x.mean(0),
    "max_pool": lambda x, s: x.max(0),
    "attention_pool": lambda x, s: softmax(s) @ x,
}


@pytest.mark.parametrize("name", ORACLES)
def test_pools_equal_the_loop_in_both_layouts(name):
    expected = [ORACLES[name](X[b][k], SCORES[b][k]) if k.any() else np.zeros(3) for b, k in enumerate(KEEP)]
    listed, layout, _ = ragged(X, SCORES)
    function = getattr(mil, name)
    for (x, s), options in (((X, SCORES), {"where": KEEP}), (listed, layout)):
        scores = (jnp.float32(s),) if name == "attention_pool" else ()
        got = jax.jit(lambda x, *s, o=options: function(x, *s, **o))(jnp.float32(x), *scores)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_heads_pool_one_by_one():
    scores = rng.normal(size=(4, 5, 2)).astype(np.float32)
    (x, s), layout, _ = ragged(X, scores)

    def every_form(padded, listed):
        one = [mil.attention_pool(padded, scores[..., k], where=KEEP) for k in range(2)]
        both = mil.attention_pool(padded, scores, where=KEEP), mil.attention_pool(listed, s, **layout)
        return jnp.stack(one, 1), *both

    expected, *both = jax.jit(every_form)(jnp.float32(X), jnp.float32(x))
    for got in both:
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_ranks_within_bags():
    (x, s), layout, order = ragged(X, SCORES)
    expected = np.full(KEEP.shape, -1)
    for b in range(4):
        real = np.flatnonzero(KEEP[b])
        for i in real:
            expected[b, i] = sum(SCORES[b, j] > SCORES[b, i] for j in real)
    rank = jax.jit(lambda bags, s: bags.rank(s))
    got = rank(group(X, KEEP, None, None), jnp.float32(SCORES))
    np.testing.assert_array_equal(got[KEEP], expected[KEEP])
    got = rank(group(x, None, **layout), jnp.float32(s))
    real = layout["segment_ids"] >= 0
    np.testing.assert_array_equal(got[real], expected.reshape(-1)[order][real])


def test_auc_equals_sklearn():
    from sklearn.metrics import roc_auc_score

    auc = jax.jit(mil.bag_auc)
    for ties in (3, 1000):
        scores = rng.integers(0, ties, 40).astype(np.float32)
        labels, where = rng.integers(-1, 2, 40).astype(np.int32), rng.random(40) < 0.8
        real = where & (labels >= 0)
        expected = roc_auc_score(labels[real], scores[real])
        scores[~where] = np.nan
        np.testing.assert_allclose(auc(scores, labels, where=where), expected, rtol=1e-6)
    assert auc(scores, np.ones_like(labels), where=where) == 0.5  # nothing to compare with
    extreme = np.full(40, np.inf, np.float32)
    assert auc(extreme, labels, where=where) == 0.5
    np.testing.assert_allclose(auc(np.where(labels == 1, np.inf, -np.inf).astype(np.float32), labels), 1)


def test_refuses():
    x, ids = jnp.ones((4, 5, 3)), jnp.zeros(5, int)
    with pytest.raises(ValueError, match=r"x must be \[B, N, D\]"):
        mil.mean_pool(x[0])
    with pytest.raises(ValueError, match="where has shape"):
        mil.max_pool(x, where=jnp.ones((5, 4), bool))
    with pytest.raises(ValueError, match=r"x must be \[T, D\] and segment_ids \[T\]"):
        mil.mean_pool(x, segment_ids=ids, num_segments=2)
    with pytest.raises(ValueError, match="num_segments=None must be at least 1"):
        mil.mean_pool(x[0], segment_ids=ids)
    with pytest.raises(ValueError, match="num_segments=2 is given without"):
        mil.mean_pool(x, num_segments=2)
    with pytest.raises(ValueError, match="scores has shape"):
        mil.attention_pool(x, jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"must both be \[B\]"):
        mil.bag_auc(jnp.ones(3), jnp.ones(4, int))
    with pytest.raises(ValueError, match="where has shape"):
        mil.bag_auc(jnp.ones(3), jnp.ones(3, int), where=jnp.ones(4, bool))


def in_list(function):
    """The ragged layout of a pooling, with a mask that becomes the ids' padding."""

    def run(x, segment_ids, where, **more):
        ids = jnp.where(where, segment_ids, -1)
        return function(x, **more, segment_ids=ids, num_segments=3)

    return run


PADDED = {"x": Arg("embeddings", (3, 6, 4)), "where": Arg("where", (3, 6))}
LIST = {"x": Arg("embeddings", (8, 4)), "segment_ids": Arg("index", (8,)), "where": Arg("where", (8,))}
LIST_ROWS = {"x": 0, "segment_ids": 0, "where": 0}
CASES = [
    Case(
        mil.attention_pool,
        {"values": Arg("embeddings", (3, 6, 4)), "scores": Arg("scores", (3, 6)), "where": PADDED["where"]},
        wrt=("values", "scores"),
        rows={"values": 1, "scores": 1, "where": 1},
        symmetry="invariant",
    ),
    Case(
        in_list(lambda x, scores, **layout: mil.attention_pool(x, scores, **layout)),
        {**LIST, "scores": Arg("scores", (8,))},
        wrt=("x", "scores"),
        rows={**LIST_ROWS, "scores": 0},
        symmetry="invariant",
        name="attention_pool of a list",
    ),
    Case(mil.mean_pool, PADDED, wrt=("x",), rows={"x": 1, "where": 1}, symmetry="invariant"),
    Case(mil.max_pool, PADDED, wrt=("x",), helper=True),
    Case(in_list(mil.max_pool), LIST, wrt=("x",), rows=LIST_ROWS, symmetry="invariant", name="max_pool of a list"),
    Case(
        mil.bag_auc,
        {"scores": Arg("scores", (6,)), "labels": Arg("labels", (6,), high=2), "where": Arg("where", (6,))},
        reason="ranks have no gradient",
        rows={"scores": 0, "labels": 0, "where": 0},
        symmetry="invariant",
    ),
]
test_conformance = conformance.conformance_tests(CASES)

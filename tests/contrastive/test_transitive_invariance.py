"""Pairs by transitivity and their triplet losses against loops over views, objects and edges."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import ops
from jaxlab.contrastive import (
    batch_hard_triplet_loss,
    cosine_triplet_loss,
    neighbour_edges,
    sample_triplets,
    transitive_pair_list,
    transitive_pairs,
)

rng = np.random.default_rng(0)
OBJECTS = np.array([0, 0, 1, 2, 2, -1, 3, 1], np.int32)
ANCHORS = np.array([1, 0, 1, 0, 1, 1, 1, 0], bool)
INTER = np.zeros((4, 4), bool)
INTER[0, 1] = INTER[1, 0] = INTER[1, 2] = INTER[2, 1] = True  # 0 - 1 - 2, and 3 alone


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pairs_oracle(kind):
    result = np.zeros((8, 8), bool)
    for u in range(8):
        for v in range(8):
            a, b = OBJECTS[u], OBJECTS[v]
            if u == v or min(a, b) < 0:
                continue
            intra, inter = a == b, INTER[a, b]
            at_anchors = inter and ANCHORS[u] and ANCHORS[v]
            found = {"intra": intra, "inter": at_anchors, "both": intra or at_anchors, "transitive": intra or inter}
            result[u, v] = found[kind]
    return result


def test_pairs_equal_the_loop():
    kinds = ("transitive", "both", "inter", "intra")
    got = jax.jit(lambda r: [transitive_pairs(r, OBJECTS, anchors=ANCHORS, kind=k) for k in kinds])(INTER)
    for kind, pairs in zip(kinds, got, strict=True):
        np.testing.assert_array_equal(pairs, pairs_oracle(kind), err_msg=kind)
    # Two objects with two views each: the four cross pairs and the two within, in both orders.
    assert pairs_oracle("transitive")[np.ix_([0, 1, 2, 7], [0, 1, 2, 7])].sum() == 12
    views = np.array([[0, 1], [2, 7], [3, 4], [6, -1]])
    listed = transitive_pair_list(np.array([[1, -1], [2, -1], [1, -1], [-1, -1]]), views)
    np.testing.assert_array_equal(listed, np.argwhere(pairs_oracle("transitive")))


@pytest.mark.parametrize("mutual", [False, True])
def test_edges_equal_the_loop(mutual):
    """Nine objects in two clusters, of which one holds three only; the last is padding."""
    x, clusters = rng.normal(size=(9, 3)), np.array([0, 0, 0, 1, 0, 1, 1, 0, 0], np.int32)
    x[8] = np.nan
    where, z = np.arange(9) < 8, unit(x)
    near = np.zeros((9, 9), bool)
    for i in range(8):
        others = [j for j in range(8) if j != i and clusters[j] == clusters[i]]
        near[i, sorted(others, key=lambda j: -(z[i] @ z[j]))[:3]] = True
    expected = near & near.T if mutual else near | near.T
    options = {"k": 3, "clusters": clusters, "mutual": mutual, "where": where}
    np.testing.assert_array_equal(jax.jit(lambda x: neighbour_edges(x, **options))(np.float32(x)), expected)


def test_triplet_loss():
    a, p, n, many = (rng.normal(size=s) for s in ((5, 3), (5, 3), (5, 3), (5, 4, 3)))
    where = np.array([1, 1, 0, 1, 1], bool)
    hinge = lambda i, x: max(0, unit(a)[i] @ unit(x) - unit(a)[i] @ unit(p)[i] + 0.2)
    one = [hinge(i, n[i]) for i in range(5)]
    mean = [np.mean([hinge(i, x) for x in many[i]]) for i in range(5)]

    @jax.jit
    def run(a, p, n, many):
        loss = lambda n, **options: cosine_triplet_loss(a, p, n, margin=0.2, **options)
        return loss(n, reduction="none"), loss(many, reduction="none"), loss(n, where=where)

    for scale in (1, 30):  # lengths do not matter
        got = run(*(np.float32(scale * x) for x in (a, p, n, many)))
        for value, expected in zip(got, (one, mean, np.mean(np.array(one)[where])), strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top", [2, None])
def test_hard_triplets_equal_the_loop(top):
    """Every positive pair meets the anchor's negatives with the highest loss; object 3 has no pair."""
    z, where = rng.normal(size=(8, 3)), np.array([1, 1, 1, 1, 1, 1, 1, 0], bool)
    positive = pairs_oracle("transitive")
    negative = ~positive & ~np.eye(8, dtype=bool)
    negative[2] = False  # an anchor without negatives
    score, real = unit(z) @ unit(z).T, np.flatnonzero(where)
    expected = np.full(8, np.nan)
    for i in real:
        hardest = sorted((score[i, k] for k in real if negative[i, k]), reverse=True)[:top]
        terms = [np.mean([max(0, s - score[i, p] + 0.5) for s in hardest]) for p in real if positive[i, p] and hardest]
        expected[i] = np.mean(terms) if terms else np.nan

    @jax.jit
    def both(z):
        loss = lambda reduction: batch_hard_triplet_loss(
            z, positive, negative, top=top, where=where, reduction=reduction
        )
        return loss("none"), loss("mean")

    terms, mean = both(np.where(where[:, None], z, np.nan).astype(np.float32))
    np.testing.assert_allclose(terms, np.nan_to_num(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean, np.nanmean(expected), rtol=1e-5)
    assert np.isnan(expected).sum() == 4  # masked, unlabelled, alone, without negatives


def test_triplets_never_hold_a_relative():
    related = pairs_oracle("transitive")
    related[6] = True  # an anchor to which everything is related
    pairs = np.concatenate([np.argwhere(pairs_oracle("transitive")), [[6, 0]]])
    a, p, n = (
        np.asarray(x)
        for x in jax.jit(lambda key: sample_triplets(key, pairs, related, num_triplets=400))(jax.random.key(0))
    )
    assert {tuple(x) for x in zip(a, p, strict=True)} == {tuple(x) for x in pairs}
    free = a != 6
    assert np.all(n[~free] == -1) and np.all(n[free] >= 0)
    assert not np.any(related[a[free], n[free]] | (a[free] == n[free]))
    for view in (0, 3):  # every unrelated view is drawn
        assert set(n[a == view]) == set(np.flatnonzero(~related[view])) - {view}


def test_refuses():
    z, square = jnp.ones((4, 3)), jnp.ones((4, 4), bool)
    with pytest.raises(ValueError, match="positive and negative must both be"):
        batch_hard_triplet_loss(z, square, square[:, :2])
    with pytest.raises(ValueError, match="positive has 2 columns"):
        batch_hard_triplet_loss(z, square[:, :2], square[:, :2])
    with pytest.raises(ValueError, match="top=0"):
        batch_hard_triplet_loss(z, square, square, top=0)
    with pytest.raises(ValueError, match=r"one shape \[B, D\]"):
        cosine_triplet_loss(z, z[:2], z)
    with pytest.raises(ValueError, match="negative has shape"):
        cosine_triplet_loss(z, z, z[:, :2])
    with pytest.raises(ValueError, match="margin=-1"):
        cosine_triplet_loss(z, z, z, margin=-1)
    with pytest.raises(ValueError, match="k=0"):
        neighbour_edges(z, k=0)
    with pytest.raises(ValueError, match="clusters has shape"):
        neighbour_edges(z, k=1, clusters=jnp.zeros(2, int))
    with pytest.raises(ValueError, match="kind='intr'"):
        transitive_pairs(square, jnp.zeros(3, int), kind="intr")
    with pytest.raises(ValueError, match="anchors must be"):
        transitive_pairs(square, jnp.zeros(3, int), kind="inter")
    with pytest.raises(ValueError, match=r"\[n, k\] and \[n, m\]"):
        transitive_pair_list(np.zeros((2, 1), int), np.zeros((3, 1), int))
    with pytest.raises(ValueError, match="pairs must be"):
        sample_triplets(jax.random.key(0), jnp.zeros((0, 2), int), square, num_triplets=1)


def hard_loss_of(embeddings, objects, where, axis_name=None):
    """Views of one object are positive and those of others negative, on all shards."""

    @ops.rows_mixed
    def masks(objects):
        everyone = ops.gather_rows(objects, axis_name)
        same = objects[:, None] == everyone[None, :]
        row = ops.axis_index(axis_name) * len(objects) + jnp.arange(len(objects))
        return same & (row[:, None] != jnp.arange(len(everyone))[None, :]), ~same

    options = {"top": 2, "where": where, "axis_name": axis_name}
    return batch_hard_triplet_loss(embeddings, *masks(objects), **options)


NONE = "no gradient passes"
CASES = [
    Case(
        hard_loss_of,
        {"embeddings": Arg("embeddings", (6, 4)), "objects": Arg("labels", (6,)), "where": Arg("where", (6,))},
        wrt=("embeddings",),
        rows={"embeddings": 0, "objects": 0, "where": 0},
        symmetry="invariant",
        covers=("contrastive.batch_hard_triplet_loss",),
    ),
    Case(
        cosine_triplet_loss,
        {name: Arg("embeddings", (5, 3)) for name in ("anchor", "positive", "negative")},
        wrt=("anchor", "positive", "negative"),
        helper=True,
    ),
    Case(neighbour_edges, {"features": Arg("embeddings", (6, 3))}, static={"k": 2}, reason=NONE, helper=True,
         skip={"dtype": "neighbours among rounded numbers may differ"}),
    Case(transitive_pairs, {"inter": Arg("where", (3, 3)), "objects": Arg("labels", (6,))}, helper=True),
    Case(
        sample_triplets,
        {"key": Arg("key"), "pairs": Arg("index", (5, 2), high=4), "related": Arg("where", (4, 4))},
        static={"num_triplets": 3},
        helper=True,
    ),
    Case(
        transitive_pair_list,
        {"neighbours": Arg("index", (4, 2), high=4), "views": Arg("index", (4, 3), high=9)},
        host=True,
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

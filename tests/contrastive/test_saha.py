"""SaHa against a walk with sets, as the official code goes, and its loss against loops over pairs."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import (
    cluster_info_nce_loss,
    false_negative_rate,
    hierarchical_prompt,
    info_nce_loss,
    last_token_pool,
    prefix_search,
    saha_clusters,
)

rng = np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def walk(query, candidates, positive, k, factor, by_query=True):
    """Both rounds over sets of names, for embeddings of which no two similarities are equal."""
    query, candidates = unit(query), unit(candidates)
    owners = {c: {q for q in range(len(query)) if positive[q] == c} for c in range(len(candidates))}
    used, clusters = set(), []
    for again in (False, True):
        reused = set()
        for q in range(len(query)):
            if q in used:
                continue
            ranked = sorted(owners, key=lambda c, q=q: -float(candidates[c] @ query[q]))[: 2 * k * factor]
            found = []
            for c in ranked:
                free = owners[c] - (reused if again else used)
                if c == positive[q] or not free:
                    continue
                found.append(max(free, key=lambda other, q=q: float(query[q] @ query[other])))
                if len(found) >= k * factor * (2 if again else 1):
                    break
            if not found:
                continue
            if by_query:
                found.sort(key=lambda other, q=q: float(query[q] @ query[other]))
            used |= {q, *found[:k]}
            reused |= set(found[:k])
            clusters.append([q, *found[:k]])
    return clusters


@pytest.mark.parametrize(("k", "factor", "by_query"), [(2, 3, True), (3, 1, False), (7, 5, True)])
def test_clusters_equal_the_walk(k, factor, by_query):
    """Forty queries with thirty candidates, of which some answer several queries and some none."""
    query, candidates = rng.normal(size=(40, 5)), rng.normal(size=(30, 5))
    positive = rng.integers(0, 25, 40)
    clusters, where = saha_clusters(query, candidates, positive, k=k, pool_factor=factor, by_query=by_query)
    got = [row[real].tolist() for row, real in zip(clusters, where, strict=True)]
    assert got == walk(query, candidates, positive, k, factor, by_query)
    assert all(len(set(row)) == len(row) for row in got)
    assert all(positive[row[0]] not in positive[row[1:]] for row in got)
    first, real = saha_clusters(query, candidates, positive, k=k, pool_factor=factor, by_query=by_query, reuse=False)
    members = first[real].tolist()
    assert len(set(members)) == len(members) and got[: len(first)] == [
        r[m].tolist() for r, m in zip(first, real, strict=True)
    ]


def test_without_filter_and_factor_negatives_are_the_nearest_candidates():
    query, candidates = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    clusters, _ = saha_clusters(query, candidates, np.arange(30), k=3, pool_factor=1, by_query=False, reuse=False)
    near = np.asarray(prefix_search(jnp.float32(query[:1]), jnp.float32(candidates), dim=4, k=4))[0]
    assert clusters[0].tolist() == [0, *near[near != 0][:3]]


def test_a_twin_of_the_query_is_left_out_unless_its_positive_is_a_label():
    """Queries come in pairs of twins whose answers are near as well."""
    place = np.repeat(unit(rng.normal(size=(12, 6))), 2, axis=0)
    query, candidates = (place + 0.05 * rng.normal(size=place.shape) for _ in range(2))
    labels = np.repeat(np.arange(12), 2)
    options = {"k": 3, "pool_factor": 3}
    rates = []
    for labelled in (np.zeros(24, bool), np.ones(24, bool)):
        clusters, _ = saha_clusters(query, candidates, np.arange(24), labelled=labelled, **options)
        rates.append(float(false_negative_rate(jnp.asarray(clusters), jnp.asarray(labels))))
        assert (labels[clusters[0, 1:]] == labels[0]).any() == labelled.all()
    assert rates[0] < rates[1]


def test_no_owner_no_cluster():
    """One query alone has no negatives, nor have queries that all share their candidate; nothing is nothing."""
    x = np.ones((3, 2))
    for query, positive in ((x[:1], [0]), (x, [0, 0, 0]), (x[:0], np.zeros(0, int))):
        clusters, where = saha_clusters(query, x, np.array(positive, int), k=2)
        assert clusters.shape == where.shape == (0, 3)


@pytest.mark.parametrize("cross", [True, False])
def test_loss_equals_the_loop(cross):
    q, c = rng.normal(size=(2, 3, 4, 5))
    where, index = rng.uniform(size=(3, 4)) < 0.8, rng.integers(0, 9, (3, 4))
    dirty = [jnp.float32(np.where(where[:, :, None], x, np.nan)) for x in (q, c)]
    options = {"cross_cluster": cross, "where": where, "index": index, "temperature": 0.2}
    run = jax.jit(lambda *x: [cluster_info_nce_loss(*x, reduction=r, **options) for r in ("none", "mean")])
    rows, mean = run(*dirty)
    expected = np.zeros((3, 4))
    q, c = unit(q), unit(c)
    for i, j in np.argwhere(where):
        total = np.exp(q[i, j] @ c[i, j] / 0.2)
        for u, v in np.argwhere(where):
            if index[u, v] != index[i, j] and (cross or u == i):
                total += np.exp(q[i, j] @ c[u, v] / 0.2)
        expected[i, j] = np.log(total) - q[i, j] @ c[i, j] / 0.2
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, expected[where].mean(), rtol=1e-5)


def test_over_all_clusters_it_is_info_nce_of_the_pairs():
    q, c = jnp.float32(rng.normal(size=(2, 3, 4, 5)))
    both = jax.jit(
        lambda q, c: (cluster_info_nce_loss(q, c), info_nce_loss(q.reshape(12, 5), c.reshape(12, 5), temperature=0.02))
    )
    np.testing.assert_allclose(*both(q, c), rtol=1e-6)


def test_pooling_takes_the_last_real_token_and_prompts_have_two_levels():
    hidden = rng.normal(size=(4, 5, 3))
    where = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    dirty = jnp.float32(np.where(where[:, :, None], hidden, np.nan))
    got, raw = jax.jit(lambda h: [last_token_pool(h, where=where, normalize=n) for n in (True, False)])(dirty)
    expected = np.stack([hidden[0, 1], hidden[1, 4], hidden[2, 2], np.zeros(3)])
    np.testing.assert_allclose(raw, expected, rtol=1e-6)
    np.testing.assert_allclose(got[:3], unit(expected[:3]), rtol=1e-5)
    assert not np.any(got[3])
    system, user = hierarchical_prompt("<image>", instruction="Find it.", system="One word.")
    assert system == {"role": "system", "content": "One word."}
    assert user["role"] == "user" and user["content"].split("\n") == ["Find it.", "<image>"]


def test_rate_equals_the_loop():
    clusters, labels = rng.integers(-1, 10, (6, 4)), rng.integers(-1, 3, 10)
    pairs = [
        labels[a] == labels[b]
        for row in clusters
        for i, a in enumerate(row)
        for j, b in enumerate(row)
        if i != j and min(a, b) >= 0 and min(labels[a], labels[b]) >= 0
    ]
    got = false_negative_rate(jnp.asarray(clusters), jnp.asarray(labels))
    np.testing.assert_allclose(got, np.mean(pairs), rtol=1e-6)


def test_refuses():
    x, pairs = np.ones((3, 2)), jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"must be \[N, D\] and \[M, D\]"):
        saha_clusters(x, x[:, :1], np.arange(3))
    with pytest.raises(ValueError, match="positive has shape"):
        saha_clusters(x, x, np.arange(2))
    with pytest.raises(ValueError, match="must number the 3 candidates"):
        saha_clusters(x, x, np.array([0, 1, 3]))
    with pytest.raises(ValueError, match="labelled has shape"):
        saha_clusters(x, x, np.arange(3), labelled=np.ones(2, bool))
    with pytest.raises(ValueError, match="k=0"):
        saha_clusters(x, x, np.arange(3), k=0)
    with pytest.raises(ValueError, match=r"one shape \[C, K, D\]"):
        cluster_info_nce_loss(pairs, pairs[:1])
    with pytest.raises(ValueError, match="index has shape"):
        cluster_info_nce_loss(pairs, pairs, index=jnp.zeros(3, int))
    with pytest.raises(ValueError, match="temperature=0"):
        cluster_info_nce_loss(pairs, pairs, temperature=0)
    with pytest.raises(ValueError, match="hidden and where must be"):
        last_token_pool(pairs, where=jnp.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"must be \[C, K\] and \[N\]"):
        false_negative_rate(jnp.zeros(3, int), jnp.zeros(3, int))


def loss_case(query, candidates, where, axis_name=None):
    """Clusters of two pairs with the mask of whole clusters, which the suite spreads over the rows."""
    pairs = jnp.broadcast_to(where[:, None], query.shape[:2])
    return cluster_info_nce_loss(query, candidates, where=pairs, temperature=0.5, axis_name=axis_name)


CASES = [
    Case(
        loss_case,
        {
            "query": Arg("embeddings", (6, 2, 4)),
            "candidates": Arg("embeddings", (6, 2, 4)),
            "where": Arg("where", (6,)),
        },
        wrt=("query", "candidates"),
        rows={"query": 0, "candidates": 0, "where": 0},
        symmetry="invariant",
        covers=("contrastive.cluster_info_nce_loss",),
    ),
    Case(
        last_token_pool,
        {"hidden": Arg("embeddings", (3, 4, 5)), "where": Arg("where", (3, 4))},
        wrt=("hidden",),
        helper=True,
    ),
    Case(false_negative_rate, {"clusters": Arg("index", (3, 4), 6), "labels": Arg("labels", (6,))}, helper=True),
    Case(
        saha_clusters,
        {
            "query": Arg("embeddings", (8, 3)),
            "candidates": Arg("embeddings", (5, 3)),
            "positive": Arg("index", (8,), 5),
        },
        static={"k": 2},
        host=True,
    ),
    Case(hierarchical_prompt, {}, static={"content": "a", "instruction": "b"}, host=True),
]
test_conformance = conformance.conformance_tests(CASES)

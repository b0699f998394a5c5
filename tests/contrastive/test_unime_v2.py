"""UniME-V2 against loops over queries, candidates and survivors."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import (
    judge_alignment_loss,
    judge_scores,
    listwise_rerank_loss,
    mine_hard_negatives,
    pairwise_rerank_loss,
)

rng = np.random.default_rng(0)
QUERY, CANDIDATES = rng.normal(size=(4, 3)), rng.normal(size=(4, 6, 3))
SCORES, EXIST = rng.uniform(size=(4, 6)), rng.uniform(size=(4, 6)) > 0.3
EXIST[:, 0], EXIST[3] = True, False


def softmax(x):
    return np.exp(x - np.max(x)) / np.sum(np.exp(x - np.max(x)))


def cosine(a, b):
    return float(a @ b) / np.sqrt(float(a @ a)) / np.sqrt(float(b @ b))


def alignment_oracle(b, t, mixture, eps=1e-8):
    real = np.flatnonzero(EXIST[b])
    p = softmax(np.array([SCORES[b, c] for c in real]) / t)
    q = softmax(np.array([cosine(QUERY[b], CANDIDATES[b, c]) for c in real]) / t)
    if mixture:
        m = (p + q) / 2
        return sum(x * np.log(x / y) for x, y in zip([*p, *q], [*m, *m], strict=True)) / 2
    kl = lambda x, y: sum(u * (np.log(u) - np.log(v + eps)) for u, v in zip(x, y, strict=True))
    return (kl(p, q) + kl(q, p)) / 2


def test_alignment_equals_the_loop():
    """Three queries with 3 to 6 candidates of which the others hold NaN, and a query without any."""
    dirty = np.where(EXIST[:, :, None], CANDIDATES, np.nan)
    scores = np.where(EXIST, SCORES, np.nan)

    @jax.jit
    def run(query, candidates, scores):
        call = lambda **options: judge_alignment_loss(query, candidates, scores, kv_where=EXIST, **options)
        rows = [
            call(temperature=t, divergence=kind, reduction="none")
            for t in (0.1, 1.0)
            for kind in ("symmetric_kl", "jensen_shannon")
        ]
        return jnp.stack(rows), call(temperature=1.0)

    got, mean = run(jnp.float32(QUERY), jnp.float32(dirty), jnp.float32(scores))
    expected = [[alignment_oracle(b, t, mixture) for b in range(3)] for t in (0.1, 1.0) for mixture in (False, True)]
    np.testing.assert_allclose(got[:, :3], expected, rtol=1e-4)
    assert not np.any(got[:, 3])
    np.testing.assert_allclose(mean, np.mean(expected[2]), rtol=1e-5)  # a query without candidates is no term


def test_alignment_is_zero_up_to_a_constant_of_the_row_and_symmetric():
    """Queries along the first axis, so that a candidate's first coordinate is its cosine; the last one is zero."""
    a, b = np.array([0.3, 0.9, -0.2]), np.array([0.1, -0.5, 0.7])
    query = np.array([[1, 0], [2, 0], [1, 0], [0, 0]])
    candidates = np.stack([np.stack([s, np.sqrt(1 - s**2)], axis=1) for s in (a, b, a, a)])
    scores = np.stack([b, a, a + 2, np.full(3, 7.0)])
    loss = jax.jit(lambda *x: judge_alignment_loss(*x, temperature=0.5, reduction="none"))
    got = loss(jnp.float32(query), jnp.float32(candidates), jnp.float32(scores))
    assert got[0] > 0.1
    np.testing.assert_allclose(got[0], got[1], rtol=1e-5)
    np.testing.assert_allclose(got[2:], 0, atol=2e-7)


def mine_oracle(scores, positive, n, beta, stride, where):
    result = []
    for s, s_positive, real in zip(scores, positive, where, strict=True):
        hard = sorted((c for c in range(len(s)) if real[c] and s[c] <= s_positive - beta), key=lambda c: -s[c])
        order = [hard[p] for start in range(stride) for p in range(start, len(hard), stride)]
        result.append([order[i % len(order)] if order else -1 for i in range(n)])
    return np.array(result)


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_mining_equals_the_loop(stride):
    """Rows with every number of survivors, ties among them, and one without any."""
    scores, positive = np.round(rng.uniform(size=(9, 12)), 1), np.linspace(0, 1.2, 9)
    where = rng.uniform(size=scores.shape) > 0.2
    run = jax.jit(lambda s: mine_hard_negatives(s, jnp.float32(positive), stride=stride, where=jnp.asarray(where)))
    index, found = run(jnp.float32(np.where(where, scores, np.nan)))
    np.testing.assert_array_equal(index, mine_oracle(scores, positive, 8, 0.01, stride, where))
    np.testing.assert_array_equal(found, index >= 0)
    assert not np.any(found[0]) and np.all(found[-1])


def test_a_query_without_survivors_draws_from_all_its_candidates():
    scores = jnp.asarray(np.full((200, 6), 0.9, np.float32))
    where = np.arange(6)[None, :] < np.where(np.arange(200) < 100, 6, 3)[:, None]
    index, found = mine_hard_negatives(scores, scores[:, 0], num_negatives=3, where=where, key=jax.random.key(0))
    index = np.asarray(index)
    assert np.all(found) and np.all(index[100:] < 3)
    assert np.all(np.diff(np.sort(index, axis=1)) > 0)  # none twice while there are enough
    np.testing.assert_allclose(np.bincount(index[:100].ravel(), minlength=6) / 300, 1 / 6, atol=0.06)


def test_scores_and_rerankers_equal_their_formulas():
    a, b = rng.normal(size=(2, 5, 2)) * 3
    where = np.array([1, 1, 0, 1, 1], bool)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    logits, labels = rng.normal(size=(5, 4)), np.array([0, 3, 1, -1, 2])
    places = np.ones((5, 4), bool)
    places[1, 0] = places[4, 2] = False

    @jax.jit
    def run(a, b, logits):
        score = judge_scores(a[:, 0], a[:, 1]), judge_scores(a[:, 1], a[:, 0])
        pair = pairwise_rerank_loss(a, b, where=where, reduction="none")
        options = {"where": where, "kv_where": places}
        wise = [listwise_rerank_loss(logits, labels, reduction=r, **options) for r in ("none", "mean")]
        return score, pair, wise

    (yes, no), pair, (rows, mean) = run(jnp.float32(a), jnp.float32(b), jnp.float32(logits))
    np.testing.assert_allclose(yes, np.exp(a[:, 0]) / np.exp(a).sum(1), rtol=1e-5)
    np.testing.assert_allclose(yes + no, 1, rtol=1e-6)
    expected = -(np.log(sigmoid(a[:, 0] - a[:, 1])) + np.log(sigmoid(b[:, 1] - b[:, 0]))) / 2
    np.testing.assert_allclose(pair, expected * where, rtol=1e-5)
    expected = np.zeros(5)
    for i in (0, 1):  # masked, unlabelled, and with the positive in an empty place: the others are no terms
        expected[i] = np.log(np.exp(logits[i][places[i]]).sum()) - logits[i, labels[i]]
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    np.testing.assert_allclose(mean, expected[:2].mean(), rtol=1e-5)


def test_refuses():
    x, c = jnp.ones((3, 2)), jnp.ones((3, 4, 2))
    s = jnp.ones((3, 4))
    with pytest.raises(ValueError, match=r"must be \[B, D\] and \[B, C, D\]"):
        judge_alignment_loss(x, x, s)
    with pytest.raises(ValueError, match="scores has shape"):
        judge_alignment_loss(x, c, s[:2])
    with pytest.raises(ValueError, match="kv_where has shape"):
        judge_alignment_loss(x, c, s, kv_where=s[0] > 0)
    with pytest.raises(ValueError, match="divergence='kl'"):
        judge_alignment_loss(x, c, s, divergence="kl")
    with pytest.raises(ValueError, match="eps=-1"):
        judge_alignment_loss(x, c, s, eps=-1)
    with pytest.raises(ValueError, match="temperature=0"):
        judge_alignment_loss(x, c, s, temperature=0)
    with pytest.raises(ValueError, match=r"must be \[Q, K\] and \[Q\]"):
        mine_hard_negatives(s, s)
    with pytest.raises(ValueError, match="stride=0"):
        mine_hard_negatives(s, s[:, 0], stride=0)
    with pytest.raises(ValueError, match="K=0"):
        mine_hard_negatives(s[:, :0], s[:, 0])
    with pytest.raises(ValueError, match="where has shape"):
        mine_hard_negatives(s, s[:, 0], where=s[0] > 0)
    with pytest.raises(ValueError, match="one shape"):
        judge_scores(s, x)
    with pytest.raises(ValueError, match=r"must be \[B, 2\]"):
        pairwise_rerank_loss(s, s)
    with pytest.raises(ValueError, match=r"must be \[B, L\] and \[B\]"):
        listwise_rerank_loss(s, s)
    with pytest.raises(ValueError, match="kv_where has shape"):
        listwise_rerank_loss(s, jnp.zeros(3, int), kv_where=s[0] > 0)


CASES = [
    Case(
        judge_alignment_loss,
        {
            "query": Arg("embeddings", (6, 3)),
            "candidates": Arg("embeddings", (6, 4, 3)),
            "scores": Arg("scores", (6, 4)),
            "where": Arg("where", (6,)),
        },
        static={"temperature": 0.5},
        wrt=("query", "candidates"),
        frozen=("scores",),
        rows={"query": 0, "candidates": 0, "scores": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(
        mine_hard_negatives,
        {"scores": Arg("scores", (4, 6)), "positive_scores": Arg("scores", (4,))},
        static={"num_negatives": 3},
        reason="the result is an index",
        helper=True,
    ),
    Case(
        judge_scores,
        {"yes_logits": Arg("scores", (6,)), "no_logits": Arg("scores", (6,))},
        wrt=("yes_logits", "no_logits"),
        helper=True,
    ),
    Case(
        pairwise_rerank_loss,
        {
            "positive_logits": Arg("scores", (6, 2)),
            "negative_logits": Arg("scores", (6, 2)),
            "where": Arg("where", (6,)),
        },
        wrt=("positive_logits", "negative_logits"),
        helper=True,
    ),
    Case(
        listwise_rerank_loss,
        {"logits": Arg("scores", (6, 3)), "labels": Arg("labels", (6,)), "where": Arg("where", (6,))},
        wrt=("logits",),
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)

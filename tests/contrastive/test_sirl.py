"""Learning from similarity queries against triplets written out, least squares and pairs counted one by one."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import (
    euclidean_triplet_loss,
    feature_prediction_error,
    odd_one_out,
    preference_accuracy,
    preference_loss,
    similarity_query_loss,
)

rng = np.random.default_rng(0)
ODD = np.array([2, 0, 1, -1, 1, 0], np.int32)


def triplet(a, p, n, margin):
    return max(0.0, np.sum((a - p) ** 2) - np.sum((a - n) ** 2) + margin)


def query_oracle(phi, odd, margin):
    first, second = (phi[i] for i in range(3) if i != odd)
    return triplet(first, second, phi[odd], margin) + triplet(second, first, phi[odd], margin)


def test_queries_equal_two_triplets():
    phi, where = 0.6 * rng.normal(size=(6, 3, 4)), np.arange(6) < 5
    dirty = np.where(where[:, None, None], phi, np.nan).astype(np.float32)
    loss = jax.jit(
        lambda phi, odd: [
            similarity_query_loss(phi, odd, margin=0.7, where=where, reduction=r) for r in ("none", "mean")
        ]
    )
    expected = np.array([query_oracle(phi[i], ODD[i], 0.7) if where[i] and ODD[i] >= 0 else 0 for i in range(6)])
    terms, mean = loss(dirty, ODD)
    np.testing.assert_allclose(terms, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean, expected[[0, 1, 2, 4]].mean(), rtol=1e-5)
    # The two that are alike may change places; turning and moving the space changes nothing.
    turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    swapped = dirty[:, [1, 0, 2]]
    np.testing.assert_allclose(loss(swapped, np.array([2, 1, 0, -1, 0, 1], np.int32))[0], terms, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss(dirty @ np.float32(turn) + 3, ODD)[0], terms, rtol=1e-4, atol=1e-4)


def test_triplets_and_their_gradient():
    """Where the hinge is active the gradient is 2 (N - P), 2 (P - A), 2 (A - N); elsewhere it is 0."""
    a, p, n = rng.normal(size=(3, 5, 2))
    n[0] = a[0] + 100

    @jax.jit
    def run(a, p, n):
        loss = lambda *x: jnp.sum(euclidean_triplet_loss(*x, reduction="none"))
        return euclidean_triplet_loss(a, p, n, reduction="none"), jax.grad(loss, (0, 1, 2))(a, p, n)

    terms, grads = run(*(np.float32(x) for x in (a, p, n)))
    np.testing.assert_allclose(terms, [triplet(*x, 1.0) for x in zip(a, p, n, strict=True)], rtol=1e-5, atol=1e-5)
    active = (np.asarray(terms) > 0)[:, None]
    assert active.sum() == 2 and not active[0]
    for grad, expected in zip(grads, (2 * (n - p), 2 * (p - a), 2 * (a - n)), strict=True):
        np.testing.assert_allclose(grad, np.where(active, expected, 0), rtol=1e-4, atol=1e-5)


def test_the_simulated_person():
    features = rng.normal(size=(20, 3, 4))
    expected = []
    for three in features:
        gaps = [np.linalg.norm(np.subtract(*(three[j] for j in range(3) if j != i))) for i in range(3)]
        expected.append(np.argmin(gaps))
    order = np.array([2, 0, 1])
    got, moved = jax.jit(lambda f: (odd_one_out(f), odd_one_out(f[:, order])))(np.float32(features))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(order[np.asarray(moved)], expected)


def test_preferences():
    a, b, labels = rng.normal(size=5), rng.normal(size=5), np.array([1, 0, 1, -1, 0], np.int32)
    p = 1 / (1 + np.exp(b - a))
    expected = -np.where(labels == 1, np.log(p), np.log(1 - p)) * (labels >= 0)
    loss = jax.jit(lambda a, b: [preference_loss(a, b, labels, reduction=r) for r in ("none", "mean")])
    terms, mean = loss(np.float32(a), np.float32(b))
    np.testing.assert_allclose(terms, expected, rtol=1e-5)
    np.testing.assert_allclose(mean, expected.sum() / 4, rtol=1e-5)


def test_feature_prediction_error_is_that_of_least_squares():
    x, x_test = rng.normal(size=(30, 3)), rng.normal(size=(8, 3))
    y, y_test = np.tanh(x @ rng.normal(size=(3, 2))) * [1, 40], rng.normal(size=(8, 2)) * [1, 40]
    solution, *_ = np.linalg.lstsq(np.c_[x, np.ones(30)], y, rcond=None)
    error = (np.c_[x_test, np.ones(8)] @ solution - y_test) ** 2 / y.var(axis=0)
    arrays = [np.float32(v) for v in (x, y, x_test, y_test)]
    measure = jax.jit(lambda *v: feature_prediction_error(*v))
    np.testing.assert_allclose(measure(*arrays), error.mean(), rtol=1e-3)
    # Embeddings that do not vary tell nothing: what is left is the distance from the mean.
    left = ((y.mean(axis=0) - y_test) ** 2 / y.var(axis=0)).mean()
    np.testing.assert_allclose(measure(arrays[0] * 0, arrays[1], arrays[2] * 0, arrays[3]), left, rtol=1e-4)
    itself = jax.jit(lambda v: feature_prediction_error(v, v, v, v))
    assert itself(arrays[0]) < 1e-6


def test_accuracy_counts_pairs():
    rewards, truth = np.array([0.0, 1, 1, 3]), np.array([1.0, 2, 5, 2])
    pairs = np.array([[0, 1], [1, 2], [2, 3], [1, 3], [0, 3]])  # right, undecided, wrong, equal in truth, right
    score = jax.jit(preference_accuracy)
    np.testing.assert_allclose(score(np.float32(rewards), np.float32(truth), pairs), 2.5 / 4)
    masked = score(np.float32(rewards), np.float32(truth), pairs, where=np.arange(5) < 1)
    assert masked == 1 and score(np.float32(truth), np.float32(truth), pairs) == 1
    assert score(np.float32(truth), np.float32(truth * 0), pairs) == 0


def test_refuses():
    z, y = jnp.ones((4, 3)), jnp.zeros(4, int)
    with pytest.raises(ValueError, match=r"\[B, 3, D\] and \[B\]"):
        similarity_query_loss(z, y)
    with pytest.raises(ValueError, match="margin=-1"):
        euclidean_triplet_loss(z, z, z, margin=-1)
    with pytest.raises(ValueError, match=r"one shape \[B, D\]"):
        euclidean_triplet_loss(z, z, z[:2])
    with pytest.raises(ValueError, match=r"one shape \[B\]"):
        preference_loss(z[:, 0], z[:2, 0], y)
    with pytest.raises(ValueError, match=r"features must be \[B, 3, K\]"):
        odd_one_out(z)
    with pytest.raises(ValueError, match="test_embeddings"):
        feature_prediction_error(z, z, z[:, :2], z)
    with pytest.raises(ValueError, match="ridge=0"):
        feature_prediction_error(z, z, z, z, ridge=0)
    with pytest.raises(ValueError, match=r"\[P, 2\]"):
        preference_accuracy(z[:, 0], z[:, 0], z)


NONE = "a measure, behind a stop-gradient"
CASES = [
    Case(
        similarity_query_loss,
        {"embeddings": Arg("embeddings", (6, 3, 4)), "odd": Arg("labels", (6,)), "where": Arg("where", (6,))},
        wrt=("embeddings",),
        rows={"embeddings": 0, "odd": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(
        euclidean_triplet_loss,
        {name: Arg("embeddings", (5, 3)) for name in ("anchor", "positive", "negative")},
        wrt=("anchor", "positive", "negative"),
        helper=True,
    ),
    Case(
        preference_loss,
        {"reward_a": Arg("scores", (5,)), "reward_b": Arg("scores", (5,)), "labels": Arg("labels", (5,), high=2)},
        wrt=("reward_a", "reward_b"),
        helper=True,
    ),
    Case(odd_one_out, {"features": Arg("embeddings", (6, 3, 4))}, reason=NONE, helper=True,
         skip={"dtype": "the nearest two among rounded numbers may differ"}),
    Case(
        feature_prediction_error,
        {
            "embeddings": Arg("embeddings", (9, 3)),
            "features": Arg("activations", (9, 2)),
            "test_embeddings": Arg("embeddings", (5, 3)),
            "test_features": Arg("activations", (5, 2)),
        },
        reason=NONE,
        helper=True,
    ),
    Case(
        preference_accuracy,
        {"rewards": Arg("scores", (5,)), "true_rewards": Arg("scores", (5,)), "pairs": Arg("index", (6, 2), high=5)},
        reason=NONE,
        helper=True,
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

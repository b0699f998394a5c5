"""Contrastive losses with chosen hardness against loops over pairs, and what the temperature does."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import (
    alignment,
    hard_contrastive_loss,
    info_nce_loss,
    penalty_entropy,
    relative_penalty,
    simple_contrastive_loss,
    tolerance,
    uniformity,
)

rng = np.random.default_rng(0)


def cosine(a, b):
    return float(a @ b) / np.sqrt(float(a @ a)) / np.sqrt(float(b @ b))


def kept_oracle(a, b, i, where, alpha):
    """Positive and the kept negatives of anchor i: sort, count, and everything that ties with the last one."""
    negative = [cosine(a[i], b[k]) for k in np.flatnonzero(where) if k != i]
    number = int(np.ceil(np.round(alpha * len(negative), 9)))
    border = sorted(negative, reverse=True)[number - 1] if negative else 0.0
    return cosine(a[i], b[i]), [s for s in negative if s >= border]


def oracle(a, b, where, alpha, temperature=None, weight=None):
    terms = np.zeros(len(a))
    for i in np.flatnonzero(where):
        positive, negative = kept_oracle(a, b, i, where, alpha)
        if temperature is None:
            terms[i] = -positive + weight * sum(negative)
        else:
            total = sum(np.exp(s / temperature) for s in [positive, *negative])
            terms[i] = np.log(total) - positive / temperature
    return terms


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.01])
def test_losses_equal_the_loop(alpha):
    a, b = rng.normal(size=(2, 13, 4))
    where = np.arange(13) != 4  # 11 negatives each: 11, 4 and 1 of them are kept
    options = {"alpha": alpha, "where": where, "reduction": "none"}
    both = jax.jit(
        lambda a, b: (
            hard_contrastive_loss(a, b, temperature=0.2, **options),
            simple_contrastive_loss(a, b, weight=0.3, **options),
        )
    )
    hard, simple = both(jnp.float32(a), jnp.float32(b))
    np.testing.assert_allclose(hard, oracle(a, b, where, alpha, temperature=0.2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(simple, oracle(a, b, where, alpha, weight=0.3), rtol=1e-5, atol=1e-6)


def test_a_tenth_of_ten_is_one_and_ties_stay():
    a, b = np.eye(11), rng.normal(size=(11, 11))
    got = hard_contrastive_loss(jnp.float32(a), jnp.float32(b), alpha=0.1, reduction="none")
    np.testing.assert_allclose(got, oracle(a, b, np.ones(11, bool), 0.1, temperature=0.3), rtol=1e-5)
    same = jnp.ones((5, 3))
    np.testing.assert_allclose(hard_contrastive_loss(same, same, alpha=0.1), np.log(5), rtol=1e-6)


def test_hardness_goes_from_the_plain_loss_down():
    a, b = jnp.float32(rng.normal(size=(2, 12, 4)))
    losses = [float(hard_contrastive_loss(a, b, alpha=alpha, temperature=0.5)) for alpha in (1.0, 0.5, 0.1)]
    assert losses[0] > losses[1] > losses[2]
    np.testing.assert_allclose(losses[0], info_nce_loss(a, b, temperature=0.5), rtol=1e-6)


def test_gradient_is_the_closed_form_and_negatives_balance_the_positive():
    """dL/ds_ii = -(1/t) sum_k P_ik and dL/ds_ij = P_ij / t, seen through anchors that read their scores directly."""
    scores, t = rng.uniform(-0.5, 0.5, (6, 6)), 0.3
    b = np.concatenate([np.eye(6), np.zeros((6, 1))], axis=1)

    def loss(s):
        # A seventh coordinate makes the anchor a unit vector, so that its cosines with b are the scores.
        a = jnp.concatenate([s, jnp.sqrt(1.5 - jnp.sum(s**2, axis=1, keepdims=True))], axis=1) / jnp.sqrt(1.5)
        return jnp.sum(info_nce_loss(a, jnp.asarray(b), temperature=t / np.sqrt(1.5), reduction="none"))

    with jax.enable_x64(True):
        grad = np.asarray(jax.jit(jax.grad(loss))(scores))
        off = ~np.eye(6, dtype=bool)
        penalty = np.asarray(relative_penalty(jnp.asarray(scores), temperature=t, where=off))
    exponential = np.exp(scores / t)
    p = exponential / exponential.sum(1, keepdims=True)
    expected = np.where(off, p / t, -(p * off).sum(1, keepdims=True) / t)
    np.testing.assert_allclose(grad, expected, rtol=1e-8)
    np.testing.assert_allclose(grad.sum(1), 0, atol=1e-12)
    np.testing.assert_allclose(penalty, np.where(off, -grad / np.diag(grad)[:, None], 0), rtol=1e-8)
    np.testing.assert_allclose(penalty.sum(1), 1, rtol=1e-12)


def test_entropy_of_the_penalty_grows_with_the_temperature_between_its_limits():
    scores = jnp.float32(rng.uniform(-1, 1, 9))
    where = np.arange(9) > 0
    temperatures = [1e-3, 0.05, 0.1, 0.3, 1.0, 10.0, 1e4]
    entropies = [float(penalty_entropy(scores, temperature=t, where=where)) for t in temperatures]
    assert np.all(np.diff(entropies) > 0)
    np.testing.assert_allclose(entropies[0], 0, atol=1e-6)
    np.testing.assert_allclose(entropies[-1], np.log(8), rtol=1e-5)


def test_limits_of_the_temperature():
    a, b = rng.normal(size=(2, 6, 4))
    single = jnp.float32(a), jnp.float32(b)
    s = np.array([[cosine(x, y) for y in b] for x in a])
    off = np.where(np.eye(6, dtype=bool), -2, s).max(1)
    small = hard_contrastive_loss(*single, alpha=1.0, temperature=1e-3, reduction="none")
    np.testing.assert_allclose(1e-3 * np.asarray(small), np.maximum(0, off - np.diag(s)), atol=2e-3)
    large = info_nce_loss(*single, temperature=50.0, reduction="none")
    simple = simple_contrastive_loss(*single, weight=1 / 6, reduction="none")  # the positive is one of the N terms
    expected = np.log(6) + (np.asarray(simple) + np.diag(s) / 6) / 50
    np.testing.assert_allclose(large, expected, atol=1 / 50**2)


def test_metrics_equal_the_loop():
    z, labels, where = rng.normal(size=(7, 4)), np.array([0, 0, 1, 1, -1, 0, -1]), np.array([1, 1, 1, 1, 1, 1, 0], bool)
    dirty = jnp.float32(np.where(where[:, None], z, np.nan))
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = np.log(np.mean([np.exp(-2 * np.sum((unit[i] - unit[j]) ** 2)) for i, j in pairs]))
    np.testing.assert_allclose(uniformity(dirty, where=where), expected, rtol=1e-5)
    same = [unit[i] @ unit[j] for i, j in pairs if labels[i] == labels[j] >= 0]
    np.testing.assert_allclose(tolerance(dirty, jnp.asarray(labels), where=where), np.mean(same), rtol=1e-4)
    other = rng.normal(size=(7, 4))
    expected = [2 - 2 * cosine(x, y) for x, y in zip(z[:6], other[:6], strict=True)]
    np.testing.assert_allclose(alignment(dirty, jnp.float32(other), where=where), np.mean(expected), rtol=1e-5)


def test_metrics_of_known_sets():
    collapsed = jnp.ones((4, 3))
    assert abs(float(uniformity(collapsed))) < 1e-5
    np.testing.assert_allclose(tolerance(collapsed, jnp.zeros(4, int)), 1, rtol=1e-6)
    np.testing.assert_allclose(uniformity(jnp.eye(3)), -4, rtol=1e-5)  # every squared distance is 2
    assert uniformity(collapsed[:1]) == 0 and tolerance(collapsed, jnp.arange(4)) == 0


def test_refuses():
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"one shape \[N, D\]"):
        hard_contrastive_loss(x, x[:2])
    with pytest.raises(ValueError, match="alpha=0"):
        hard_contrastive_loss(x, x, alpha=0)
    with pytest.raises(ValueError, match="alpha=2"):
        simple_contrastive_loss(x, x, alpha=2)
    with pytest.raises(ValueError, match="temperature=0"):
        hard_contrastive_loss(x, x, temperature=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        relative_penalty(x, temperature=-1)
    with pytest.raises(ValueError, match="where has shape"):
        penalty_entropy(x, temperature=1.0, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="t=0"):
        uniformity(x, t=0)
    with pytest.raises(ValueError, match="embeddings must be"):
        uniformity(x[0])
    with pytest.raises(ValueError, match="labels has shape"):
        tolerance(x, jnp.zeros(2, int))
    with pytest.raises(ValueError, match="reduction='sum'"):
        alignment(x, x, reduction="sum")


PAIRS = {"a": Arg("embeddings", (6, 4)), "b": Arg("embeddings", (6, 4)), "where": Arg("where", (6,))}
PAIR_ROWS = {"a": 0, "b": 0, "where": 0}
EXAMPLES = {"embeddings": Arg("embeddings", (6, 4)), "where": Arg("where", (6,))}
CASES = [
    Case(hard_contrastive_loss, PAIRS, static={"alpha": 0.4}, wrt=("a", "b"), rows=PAIR_ROWS, symmetry="invariant"),
    Case(simple_contrastive_loss, PAIRS, static={"alpha": 0.4, "weight": 0.5}, wrt=("a", "b"), rows=PAIR_ROWS,
         symmetry="invariant", helper=True),
    Case(alignment, PAIRS, wrt=("a", "b"), rows=PAIR_ROWS, symmetry="invariant", helper=True),
    Case(uniformity, EXAMPLES, wrt=("embeddings",), rows={"embeddings": 0, "where": 0}, symmetry="invariant"),
    Case(
        tolerance,
        {**EXAMPLES, "labels": Arg("labels", (6,))},
        wrt=("embeddings",),
        rows={"embeddings": 0, "where": 0, "labels": 0},
        symmetry="invariant",
        helper=True,
    ),
    *(
        Case(f, {"scores": Arg("scores", (6, 4))}, static={"temperature": 0.2}, wrt=("scores",), rows={"scores": 0},
             symmetry="equivariant", helper=True)
        for f in (relative_penalty, penalty_entropy)
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

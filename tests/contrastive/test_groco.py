"""GroCo against a loop over anchors, comparisons and binary cross entropies."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import groco_loss, groco_multiview_loss

rng = np.random.default_rng(0)


def cosine(a, b):
    return float(a @ b) / np.sqrt(float(a @ a)) / np.sqrt(float(b @ b))


def groups_oracle(positive, negative, k, steepness=1.0):
    """The loss of one anchor as the official code takes it: the mean of two binary cross entropies over n entries."""
    negative = sorted(negative)[-k:]
    x = [*negative, *sorted(positive)]
    n, m = len(x), len(negative)
    P = np.eye(n)
    for layer in range(n):
        for j in range(layer % 2, n - 1, 2):
            alpha = np.arctan(steepness * (x[j + 1] - x[j])) / np.pi + 0.5
            x[j], x[j + 1] = alpha * x[j] + (1 - alpha) * x[j + 1], (1 - alpha) * x[j] + alpha * x[j + 1]
            left, right = P[:, j].copy(), P[:, j + 1].copy()
            P[:, j], P[:, j + 1] = alpha * left + (1 - alpha) * right, (1 - alpha) * left + alpha * right
    q_positive, q_negative = np.clip(P[:, m:].sum(1), 0, 1), np.clip(P[:, :m].sum(1), 0, 1)
    np.testing.assert_allclose(q_positive + q_negative, 1)
    target = np.arange(n) >= m

    def cross_entropy(q, y):
        terms = [-np.log(q[i]) if y[i] else -np.log(1 - q[i]) for i in range(n)]
        return np.mean(np.minimum(terms, 100))

    parts = cross_entropy(q_positive, target), cross_entropy(q_negative, ~target)
    np.testing.assert_allclose(*parts)
    return sum(parts) / 2


def multiview_oracle(views, where, k, positive_views=None):
    terms = np.zeros(views.shape[:2])
    for v in range(len(views)):
        for i in np.flatnonzero(where):
            positive = [cosine(views[v, i], views[w, i]) for w in range(positive_views or len(views)) if w != v]
            negative = [cosine(views[v, i], views[v, j]) for j in np.flatnonzero(where) if j != i]
            terms[v, i] = groups_oracle(positive, negative, k)
    return terms


@pytest.mark.parametrize("k", [1, 3, 50])
def test_equals_the_loop_with_any_number_of_negatives(k):
    """Five anchors with 6, 4, 2, 1 and 0 negatives of 6, of which NaN are those that nobody has."""
    a, p, n = rng.normal(size=(5, 4)), rng.normal(size=(5, 2, 4)), rng.normal(size=(8, 4))
    exist = np.zeros((5, 8), bool)
    for row, number in enumerate([6, 4, 2, 1, 0]):
        exist[row, rng.permutation(6)[:number]] = True
    n[6:] = np.nan
    options = {"kv_where": exist, "k": k, "steepness": 2.0}
    both = jax.jit(lambda *x: (groco_loss(*x, reduction="none", **options), groco_loss(*x, **options)))
    got, mean = both(jnp.float32(a), jnp.float32(p), jnp.float32(n))
    for i in range(4):
        positive, negative = [cosine(a[i], b) for b in p[i]], [cosine(a[i], b) for b in n[exist[i]]]
        np.testing.assert_allclose(got[i], groups_oracle(positive, negative, k, 2.0), rtol=1e-5)
    assert got[4] == 0
    np.testing.assert_allclose(mean, got[:4].mean(), rtol=1e-6)  # an anchor without negatives is no term


@pytest.mark.parametrize("positive_views", [None, 2, 1])
def test_views_equal_the_loop(positive_views):
    views, where = rng.normal(size=(3, 7, 4)), np.array([1, 1, 0, 1, 1, 1, 1], bool)
    for keep in (where, None):
        real = np.ones(7, bool) if keep is None else keep
        options = {"k": 3, "num_positive_views": positive_views, "where": keep, "reduction": "none"}
        got = jax.jit(lambda v, options=options: groco_multiview_loss(v, **options))(jnp.float32(views))
        if positive_views == 1:  # the only full crop has no positive, and is that of the others
            expected = np.zeros((3, 7))
            for v in (1, 2):
                expected[v] = multiview_oracle(views[[v, 0]], real, 3)[0]
        else:
            expected = multiview_oracle(views, real, 3, positive_views)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_order_is_what_counts():
    """Well ordered similarities cost little, but something (Cauchy's tails); swapped ones cost more; length nothing."""
    z, noise = rng.normal(size=(2, 6, 8)).astype(np.float32)
    near, far = z[:, None] + 0.1 * noise[:, None], -z[:, None]
    loss = jax.jit(lambda p, scale: groco_loss(z * scale, p, z, kv_where=~np.eye(6, dtype=bool), k=4))
    one = np.float32(1)
    assert 0 < loss(near, one) < loss(noise[:, None], one) < loss(far, one)
    np.testing.assert_allclose(loss(near, one), loss(near, np.float32(30)), rtol=1e-5)


def test_gradient_reaches_targets_only_on_request():
    a, p, n = (jnp.float32(rng.normal(size=s)) for s in ((4, 3), (4, 1, 3), (5, 3)))
    for stop in (True, False):
        loss = lambda *x, stop=stop: groco_loss(*x, k=2, stop_gradient=stop)
        grads = jax.jit(jax.grad(loss, (0, 1, 2)))(a, p, n)
        assert [bool(np.any(g)) for g in grads] == [True, not stop, not stop]


def test_one_image_and_no_image_have_loss_zero():
    views = jnp.float32(rng.normal(size=(2, 3, 4)))
    both = jax.jit(jax.value_and_grad(lambda v, where: groco_multiview_loss(v, where=where)))
    for where in (np.array([1, 0, 0], bool), np.zeros(3, bool)):
        value, grad = both(views, where)
        assert value == 0 and not np.any(grad)


def test_refuses():
    z, p = jnp.ones((4, 3)), jnp.ones((4, 2, 3))
    with pytest.raises(ValueError, match="k=0 must be"):
        groco_loss(z, p, z, k=0)
    with pytest.raises(ValueError, match="do not fit anchor"):
        groco_loss(z, p[:2], z)
    with pytest.raises(ValueError, match=r"must be \[B, D\], \[B, P, D\] and \[M, D\]"):
        groco_loss(z, z, z)
    with pytest.raises(ValueError, match="kv_where has shape"):
        groco_loss(z, p, z, kv_where=jnp.ones((3, 4), bool))
    with pytest.raises(ValueError, match="steepness=0"):
        groco_loss(z, p, z, steepness=0.0)
    with pytest.raises(ValueError, match="V >= 2"):
        groco_multiview_loss(z[None])
    with pytest.raises(ValueError, match="num_positive_views=3"):
        groco_multiview_loss(jnp.ones((2, 4, 3)), num_positive_views=3)


CASES = [
    Case(  # holds groco_loss, and is the one whose anchors meet across rows and devices
        groco_multiview_loss,
        {"views": Arg("embeddings", (2, 4, 3)), "where": Arg("where", (4,))},
        static={"k": 2},
        wrt=("views",),
        rows={"views": 1, "where": 0},
        symmetry="invariant",
        grad_oracle=lambda views, where: {"views": frozen_targets_gradient(views)},
    ),
    Case(
        groco_loss,
        {
            "anchor": Arg("embeddings", (4, 3)),
            "positives": Arg("embeddings", (4, 1, 3)),
            "negatives": Arg("embeddings", (3, 3)),
            "where": Arg("where", (4,)),
        },
        static={"k": 2},
        wrt=("anchor",),
        frozen=("positives", "negatives"),
        rows={"anchor": 0, "positives": 0, "where": 0},
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)


def frozen_targets_gradient(views, step=1e-6):
    """Central differences of the loop in each anchor while what it is compared with stays where it was."""
    grad = np.zeros_like(views)
    num_views, rows, size = views.shape
    for v, i, d in np.ndindex(num_views, rows, size):
        values = []
        for sign in (1, -1):
            anchor = views[v, i].copy()
            anchor[d] += sign * step
            positive = [cosine(anchor, views[w, i]) for w in range(num_views) if w != v]
            negative = [cosine(anchor, views[v, j]) for j in range(rows) if j != i]
            values.append(groups_oracle(positive, negative, 2))
        grad[v, i, d] = (values[0] - values[1]) / (2 * step) / (num_views * rows)
    return grad

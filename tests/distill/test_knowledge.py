"""Distillation of predictions and of features against loops in float64."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import distill

rng = np.random.default_rng(0)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def test_soft_and_hard_terms_equal_the_loop():
    z, t = rng.normal(size=(7, 4)) * 3, rng.normal(size=(7, 4)) * 3
    y, where = np.array([0, 1, -1, 3, 2, 0, 1]), np.arange(7) != 5
    soft, hard = [], []
    for n in np.flatnonzero(where):
        p, q = softmax(z[n] / 3), softmax(t[n] / 3)
        soft.append(9 * np.sum(q * np.log(q / p)))
        if y[n] >= 0:
            hard.append(-np.log(softmax(z[n])[y[n]]))
    options = {"temperature": 3.0, "soft_weight": 0.7, "where": where}
    dirty = np.where(where[:, None], z, np.nan)
    got = distill.distillation_loss(jnp.float32(dirty), jnp.float32(t), y, **options)
    np.testing.assert_allclose(got, 0.7 * np.mean(soft) + 0.3 * np.mean(hard), rtol=1e-5)
    got = distill.distillation_loss(jnp.float32(dirty), jnp.float32(t), **options)
    np.testing.assert_allclose(got, 0.7 * np.mean(soft), rtol=1e-5)


def test_the_gradient_keeps_its_size_at_high_temperature():
    """For T to infinity it tends to (s - t - their mean difference) / C, whatever T is."""
    z, t = rng.normal(size=(1, 5)), rng.normal(size=(1, 5))
    grad = jax.grad(lambda z: distill.distillation_loss(z, jnp.float32(t), temperature=300.0, soft_weight=1.0))
    expected = (z - t - (z - t).mean()) / 5
    np.testing.assert_allclose(grad(jnp.float32(z)), expected, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("kind", ["mse", "unit", "cosine"])
def test_features_equal_the_loop(kind):
    s, t, P, where = (
        rng.normal(size=(2, 3, 4)),
        rng.normal(size=(2, 3, 5)),
        rng.normal(size=(4, 5)),
        np.ones((2, 3), bool),
    )
    where[1, 2] = False
    s[1, 2] = np.nan
    terms = np.zeros((2, 3))
    for i, j in np.argwhere(where):
        a, b = s[i, j] @ P, t[i, j]
        u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
        terms[i, j] = {"mse": np.mean((a - b) ** 2), "unit": np.sum((u - v) ** 2), "cosine": 1 - u @ v}[kind]
    options = {"projection": jnp.float32(P), "kind": kind, "where": where}
    got = distill.feature_loss(jnp.float32(s), jnp.float32(t), reduction="none", **options)
    np.testing.assert_allclose(got, terms, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        distill.feature_loss(jnp.float32(s), jnp.float32(t), **options), terms.sum() / 5, rtol=2e-5
    )


def test_refuses():
    z = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="soft_weight=2"):
        distill.distillation_loss(z, z, soft_weight=2)
    with pytest.raises(ValueError, match="labels has shape"):
        distill.distillation_loss(z, z, jnp.zeros(3, int))
    with pytest.raises(ValueError, match="temperature=0"):
        distill.distillation_loss(z, z, temperature=0.0)
    with pytest.raises(ValueError, match="kind='l1'"):
        distill.feature_loss(z, z, kind="l1")
    with pytest.raises(ValueError, match="leading dims"):
        distill.feature_loss(z, z[:1])
    with pytest.raises(ValueError, match=r"pass projection=\[3, 2\]"):
        distill.feature_loss(z, z[:, :2])
    with pytest.raises(ValueError, match="projection has shape"):
        distill.feature_loss(z, z[:, :2], projection=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="where has shape"):
        distill.feature_loss(z, z, where=jnp.ones(3, bool))


CASES = [
    Case(
        distill.distillation_loss,
        {
            "logits": Arg("scores", (6, 4)),
            "teacher_logits": Arg("scores", (6, 4)),
            "labels": Arg("labels", (6,)),
            "where": Arg("where", (6,)),
        },
        wrt=("logits",),
        frozen=("teacher_logits",),
        rows={"logits": 0, "teacher_logits": 0, "labels": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(
        distill.feature_loss,
        {
            "features": Arg("embeddings", (6, 4)),
            "teacher_features": Arg("embeddings", (6, 3)),
            "projection": Arg("scores", (4, 3)),
            "where": Arg("where", (6,)),
        },
        static={"kind": "cosine"},
        wrt=("features", "projection"),
        frozen=("teacher_features",),
        rows={"features": 0, "teacher_features": 0, "where": 0},
        symmetry="invariant",
    ),
]
test_conformance = conformance.conformance_tests(CASES)

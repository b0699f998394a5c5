"""Probes against least squares in NumPy."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.information import logistic_probe, ridge_probe

rng = np.random.default_rng(0)


def test_ridge_equals_the_normal_equations_and_least_squares_in_the_limit():
    x, t, q, where = (
        rng.normal(size=(20, 3)) * [1, 50, 0.1] + 7,
        rng.normal(size=(20, 2)),
        rng.normal(size=(4, 3)),
        None,
    )
    where = np.arange(20) < 17
    dirty = np.where(where[:, None], x, np.nan), np.where(where[:, None], t, np.nan)
    with jax.enable_x64(True):
        run = jax.jit(lambda x, t: [ridge_probe(x, t, q, penalty=p, where=where) for p in (0.3, 1e-10)])
        got, limit = run(*dirty)
    x, t = x[:17], t[:17]
    unit, away = (x - x.mean(0)) / x.std(0), (q - x.mean(0)) / x.std(0)
    weights = np.linalg.inv(unit.T @ unit / 17 + 0.3 * np.eye(3)) @ (unit.T @ (t - t.mean(0)) / 17)
    np.testing.assert_allclose(got, away @ weights + t.mean(0), rtol=1e-9)
    solution = np.linalg.lstsq(np.c_[x, np.ones(17)], t, rcond=None)[0]
    np.testing.assert_allclose(limit, np.c_[q, np.ones(4)] @ solution, rtol=1e-6)


def test_logistic_regression_reaches_the_stationary_point():
    """At the minimum the gradient, written out in NumPy, is zero; rows without a label and masked ones take no part."""
    x, labels = rng.normal(size=(30, 2)) * [1, 20] + 3, rng.integers(0, 3, 30)
    labels[5] = -1
    where = np.arange(30) < 27
    query = rng.normal(size=(4, 2)) * [1, 20] + 3
    with jax.enable_x64(True):
        dirty = np.where(where[:, None], x, np.nan)
        fit = jax.jit(
            lambda x, q: logistic_probe(
                x, labels, q, num_classes=3, penalty=0.1, steps=600, learning_rate=0.03, where=where
            )
        )
        # The weights are what the fit says of the origin and the unit vectors, in standardised coordinates.
        kept = where & (labels >= 0)
        centre, scale = x[kept].mean(0), x[kept].std(0)
        told = np.asarray(fit(dirty, np.concatenate([[centre], centre + np.diag(scale), query])))
    bias, weights = told[0], told[1:3] - told[0]
    np.testing.assert_allclose(told[3:], (query - centre) / scale @ weights + bias, rtol=1e-6)
    unit, y = (x[kept] - centre) / scale, np.eye(3)[labels[kept]]
    logits = unit @ weights + bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(unit.T @ (p - y) / len(y) + 0.1 * weights, 0, atol=1e-4)
    np.testing.assert_allclose((p - y).mean(0), 0, atol=1e-4)


def test_refuses():
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="labels has shape"):
        logistic_probe(x, jnp.zeros(3, int), x, num_classes=2)
    with pytest.raises(ValueError, match="steps=0"):
        logistic_probe(x, jnp.zeros(4, int), x, num_classes=2, steps=0)
    with pytest.raises(ValueError, match="penalty=0"):
        ridge_probe(x, x, x, penalty=0.0)
    with pytest.raises(ValueError, match=r"targets must be \[4, K\], got \(3, 2\)"):
        ridge_probe(x, x[:3], x)
    with pytest.raises(ValueError, match="features and query"):
        ridge_probe(x, x, x[:, :1])
    with pytest.raises(ValueError, match="where has shape"):
        ridge_probe(x, x, x, where=jnp.ones(3, bool))


ARGS = {
    "features": Arg("embeddings", (8, 3)),
    "targets": Arg("scores", (8, 2)),
    "query": Arg("embeddings", (5, 3)),
    "where": Arg("where", (8,)),
}
CASES = [
    Case(ridge_probe, ARGS, rows={"features": 0, "targets": 0, "where": 0}, symmetry="invariant",
         reason="features are frozen, as documented"),
    Case(logistic_probe, {"features": ARGS["features"], "labels": Arg("labels", (8,)), "query": ARGS["query"],
         "where": ARGS["where"]}, static={"num_classes": 3, "steps": 5}, helper=True,
         reason="features are frozen, as documented"),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

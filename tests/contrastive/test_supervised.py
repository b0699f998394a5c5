"""The supervised contrastive loss against a loop over anchors and positives."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import nt_xent_loss, supervised_contrastive_loss

rng = np.random.default_rng(0)


def oracle(z, labels, where, temperature):
    """Terms of all anchors, NaN where an anchor has no positive."""
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    terms = np.full(len(z), np.nan)
    for i in np.flatnonzero(where & (labels >= 0)):
        others = [a for a in np.flatnonzero(where) if a != i]
        log_sum = np.log(sum(np.exp(unit[i] @ unit[a] / temperature) for a in others))
        positives = [unit[i] @ unit[p] / temperature - log_sum for p in others if labels[p] == labels[i]]
        if positives:
            terms[i] = -np.mean(positives)
    return terms


def test_equals_the_loop():
    z, labels = rng.normal(size=(9, 4)), np.array([0, 1, 0, -1, 1, 1, 2, -1, 0], np.int32)
    where = np.array([1, 1, 1, 1, 1, 0, 1, 1, 1], bool)
    expected = oracle(z, labels, where, 0.2)
    options = {"temperature": 0.2, "where": where}

    @jax.jit
    def both(z):
        terms = supervised_contrastive_loss(z, labels, reduction="none", **options)
        return terms, *(supervised_contrastive_loss(z, labels, chunk=chunk, **options) for chunk in (None, 2))

    terms, mean, in_chunks = both(np.where(where[:, None], z, np.nan).astype(np.float32))
    np.testing.assert_allclose(in_chunks, mean, rtol=1e-6)
    np.testing.assert_allclose(terms, np.nan_to_num(expected), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(mean, np.nanmean(expected), rtol=2e-5)
    assert np.isnan(expected).sum() == 4  # masked, two unlabelled, alone in its class


def test_two_views_of_examples_without_a_class_mate_are_simclr():
    views = np.float32(rng.normal(size=(2, 5, 3)))
    labels = np.tile(np.arange(5), 2)
    got = jax.jit(lambda v: supervised_contrastive_loss(v.reshape(10, 3), labels) - nt_xent_loss(v))(views)
    assert abs(got) < 1e-5


def test_refuses():
    z, y = jnp.ones((4, 3)), jnp.zeros(4, int)
    with pytest.raises(ValueError, match=r"embeddings must be \[N, D\]"):
        supervised_contrastive_loss(z[0], y)
    with pytest.raises(ValueError, match="labels has shape"):
        supervised_contrastive_loss(z, y[:2])
    with pytest.raises(ValueError, match="temperature=0"):
        supervised_contrastive_loss(z, y, temperature=0)


CASES = [
    Case(
        supervised_contrastive_loss,
        {"embeddings": Arg("embeddings", (6, 4)), "labels": Arg("labels", (6,)), "where": Arg("where", (6,))},
        static={"temperature": 0.3},
        wrt=("embeddings",),
        rows={"embeddings": 0, "labels": 0, "where": 0},
        symmetry="invariant",
    )
]
test_conformance = conformance.conformance_tests(CASES)

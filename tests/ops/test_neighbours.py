"""Weighted nearest neighbours against a loop."""

import conformance
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.ops.neighbours import weighted_knn

rng = np.random.default_rng(0)


def oracle(query, bank, labels, classes, k, temperature, where):
    result = np.zeros((len(query), classes))
    for i, q in enumerate(query):
        found = []
        for b, label, real in zip(bank, labels, where, strict=True):
            if real and label >= 0:
                found.append((float(q @ b / np.sqrt(q @ q) / np.sqrt(b @ b)), label))
        for similarity, label in sorted(found, reverse=True)[:k]:
            result[i, label] += np.exp(similarity / temperature)
        result[i] /= max(result[i].sum(), 1e-300)
    return result


@pytest.mark.parametrize("k", [1, 4, 50])
def test_equals_the_loop(k):
    query, bank = rng.normal(size=(5, 6)), rng.normal(size=(12, 6))
    labels, where = rng.integers(-1, 3, 12), rng.random(12) > 0.3
    dirty = np.where((where & (labels >= 0))[:, None], bank, np.nan)
    got = weighted_knn(jnp.float32(query), jnp.float32(dirty), labels, num_classes=3, k=k, temperature=0.3, where=where)
    np.testing.assert_allclose(got, oracle(query, bank, labels, 3, k, 0.3, where), atol=2e-6)


def test_an_empty_bank_gives_zeros():
    got = weighted_knn(jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.full(4, -1), num_classes=2)
    np.testing.assert_array_equal(got, 0)


def test_refuses():
    q, b, labels = jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.zeros(4, int)
    with pytest.raises(ValueError, match="query and bank"):
        weighted_knn(q, jnp.ones((4, 5)), labels, num_classes=2)
    with pytest.raises(ValueError, match="labels has shape"):
        weighted_knn(q, b, labels[:2], num_classes=2)
    with pytest.raises(ValueError, match="where has shape"):
        weighted_knn(q, b, labels, num_classes=2, where=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="k=0"):
        weighted_knn(q, b, labels, num_classes=2, k=0)
    with pytest.raises(ValueError, match="temperature=0"):
        weighted_knn(q, b, labels, num_classes=2, temperature=0)


CASES = [
    Case(
        weighted_knn,
        {
            "query": Arg("embeddings", (4, 5)),
            "bank": Arg("embeddings", (8, 5)),
            "labels": Arg("labels", (8,)),
            "where": Arg("where", (8,)),
        },
        static={"num_classes": 3, "k": 3, "temperature": 0.5},
        wrt=("query", "bank"),
        rows={"bank": 0, "labels": 0, "where": 0},
        symmetry="invariant",
        name="weighted_knn",
    )
]
test_conformance = conformance.conformance_tests(CASES)

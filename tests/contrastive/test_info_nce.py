"""InfoNCE against a float64 loop."""

import conformance
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import contrastive

rng = np.random.default_rng(0)


def oracle(a, p, temperature, where):
    losses = []
    for i in range(len(a)):
        if not where[i]:
            losses.append(0.0)
            continue
        cos = [a[i] @ p[j] / np.linalg.norm(a[i]) / np.linalg.norm(p[j]) for j in range(len(p)) if where[j]]
        own = a[i] @ p[i] / np.linalg.norm(a[i]) / np.linalg.norm(p[i])
        losses.append(np.log(np.sum(np.exp(np.array(cos) / temperature))) - own / temperature)
    return np.array(losses)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_loop(temperature):
    a, p = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    where = np.array([1, 1, 0, 1, 1, 0], bool)
    losses = oracle(a, p, temperature, where)
    args = (jnp.float32(a), jnp.float32(p))
    each = contrastive.info_nce_loss(*args, temperature=temperature, where=where, reduction="none")
    np.testing.assert_allclose(each, losses, rtol=2e-5, atol=2e-5)
    mean = contrastive.info_nce_loss(*args, temperature=temperature, where=where)
    np.testing.assert_allclose(mean, losses[where].mean(), rtol=2e-5)


def test_one_row_has_no_negative():
    x = jnp.ones((1, 3))
    assert abs(float(contrastive.info_nce_loss(x, x))) < 1e-6


def test_refuses():
    x = jnp.ones((2, 3))
    for args, options, message in (
        ((x, x[:1]), {}, "must both be"),
        ((x, x), {"temperature": 0.0}, "temperature=0.0"),
        ((x, x), {"reduction": "sum"}, "reduction='sum'"),
        ((x, x), {"where": jnp.ones(3, bool)}, "where must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            contrastive.info_nce_loss(*args, **options)


CASES = [
    Case(
        contrastive.info_nce_loss,
        {"anchors": Arg("embeddings", (6, 4)), "positives": Arg("embeddings", (6, 4)), "where": Arg("where", (6,))},
        wrt=("anchors", "positives"),
        rows={"anchors": 0, "positives": 0, "where": 0},
        symmetry="invariant",
    )
]
test_conformance = conformance.conformance_tests(CASES)

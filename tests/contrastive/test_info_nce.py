"""InfoNCE and NT-Xent against loops over pairs."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import info_nce_loss, nt_xent_loss

rng = np.random.default_rng(0)


def cosine(a, b):
    return float(a @ b) / np.sqrt(float(a @ a)) / np.sqrt(float(b @ b))


def info_nce_oracle(a, b, temperature, where):
    terms = np.zeros(len(a))
    for i in np.flatnonzero(where):
        total = sum(np.exp(cosine(a[i], b[j]) / temperature) for j in np.flatnonzero(where))
        terms[i] = np.log(total) - cosine(a[i], b[i]) / temperature
    return terms


def nt_xent_oracle(views, temperature, where):
    num_views, rows = views.shape[:2]
    terms = np.zeros((num_views, rows))
    everyone = [(u, j) for u in range(num_views) for j in np.flatnonzero(where)]
    for v, i in everyone:
        total = sum(np.exp(cosine(views[v, i], views[o]) / temperature) for o in everyone if o != (v, i))
        terms[v, i] = np.mean(
            [np.log(total) - cosine(views[v, i], views[w, i]) / temperature for w in range(num_views) if w != v]
        )
    return terms


def test_info_nce_equals_the_loop():
    a, b, where = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), np.array([1, 1, 0, 1, 1, 0], bool)
    for keep in (where, np.ones(6, bool)):
        expected = info_nce_oracle(a, b, 0.3, keep)
        got = info_nce_loss(jnp.float32(a), jnp.float32(b), temperature=0.3, where=keep, reduction="none")
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        mean = info_nce_loss(jnp.float32(a), jnp.float32(b), temperature=0.3, where=keep)
        np.testing.assert_allclose(mean, expected.sum() / keep.sum(), rtol=1e-5)


@pytest.mark.parametrize("num_views", [2, 3])
def test_nt_xent_equals_the_loop(num_views):
    views, where = rng.normal(size=(num_views, 5, 4)), np.array([1, 1, 0, 1, 1], bool)
    expected = nt_xent_oracle(views, 0.5, where)
    got = nt_xent_loss(jnp.float32(views), temperature=0.5, where=where, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_pair_without_negatives_has_loss_zero_and_no_gradient():
    x = jnp.float32(rng.normal(size=(1, 4)))
    value, grad = jax.jit(jax.value_and_grad(info_nce_loss))(x, -x)
    assert value == 0 and not np.any(grad)
    value, grad = jax.jit(jax.value_and_grad(nt_xent_loss))(jnp.stack([x, -x]))
    assert value == 0 and not np.any(grad)


def test_lengths_do_not_matter_and_random_pairs_cost_the_logarithm_of_their_number():
    a, b = jnp.float32(rng.normal(size=(2, 64, 512)))
    scale = jnp.float32(rng.uniform(0.1, 9, (64, 1)))
    np.testing.assert_allclose(info_nce_loss(a, b), info_nce_loss(a * scale, b), rtol=1e-5)
    np.testing.assert_allclose(info_nce_loss(a, b, temperature=1.0), np.log(64), rtol=0.01)


LOSSES = {"info_nce": lambda v, **options: info_nce_loss(*v, **options), "nt_xent": nt_xent_loss}


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_change_nothing(name):
    views, where = jnp.float32(rng.normal(size=(2, 7, 4))), np.array([0, 1, 1, 1, 0, 1, 1], bool)
    forms = [lambda v, c=c: LOSSES[name](v, where=where, temperature=0.3, chunk=c) for c in (None, 1, 3)]
    whole, *chunked = jax.jit(lambda v: [jax.value_and_grad(form)(v) for form in forms])(views)
    for part in chunked:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), part, whole)


@pytest.mark.optimised
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_need_memory_linear_in_the_batch(name):
    """65,536 embeddings of width 256 train within 4 GiB, where all pairs at once would take 16 GiB a copy."""

    def temporary(rows):
        step = jax.jit(jax.value_and_grad(lambda v: LOSSES[name](v, chunk=256)))
        compiled = step.lower(jax.ShapeDtypeStruct((2, rows, 256), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(2**13), temporary(2**16)
    assert many < 4 * 2**30 and many < 8.5 * few


def test_refuses():
    with pytest.raises(ValueError, match="chunk=0"):
        info_nce_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), chunk=0)
    with pytest.raises(ValueError, match=r"one shape \[N, D\]"):
        info_nce_loss(jnp.ones((2, 3)), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="temperature=0"):
        info_nce_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), temperature=0)
    with pytest.raises(ValueError, match="where has shape"):
        info_nce_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="reduction='sum'"):
        info_nce_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), reduction="sum")
    with pytest.raises(ValueError, match="V >= 2"):
        nt_xent_loss(jnp.ones((1, 2, 3)))


CASES = [
    Case(
        info_nce_loss,
        {"a": Arg("embeddings", (6, 4)), "b": Arg("embeddings", (6, 4)), "where": Arg("where", (6,))},
        wrt=("a", "b"),
        rows={"a": 0, "b": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(
        nt_xent_loss,
        {"views": Arg("embeddings", (3, 6, 4)), "where": Arg("where", (6,))},
        wrt=("views",),
        rows={"views": 1, "where": 0},
        symmetry="invariant",
    ),
]
test_conformance = conformance.conformance_tests(CASES)

"""MLC against eigenvalues and Sinkhorn written out in NumPy; spectral clustering on graphs whose parts are known."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import information

rng = np.random.default_rng(0)


def unit(z):
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def membership(c, eta, iterations, absolute=True):
    """Columns and rows of the kernel scaled in turn, rows last."""
    s = unit(c) @ unit(c).T
    plan = np.exp((np.abs(s) if absolute else s) / eta)
    for _ in range(iterations):
        plan = plan / plan.sum(0, keepdims=True) / len(c)
        plan = plan / plan.sum(1, keepdims=True) / len(c)
    return plan * len(c)


def log_det(gram):
    return np.linalg.slogdet(np.eye(len(gram)) + gram)[1]


def oracle(z, c, eps, weight, penalty, eta, iterations):
    z, (n, d) = unit(z), z.shape
    member = membership(c, eta, iterations)
    whole = log_det(d / (n * eps) * z.T @ z) / 2
    parts = 0
    for column in member.T:
        gram = sum(g * np.outer(row, row) for g, row in zip(column, z, strict=True))
        parts += column.sum() / (2 * n) * log_det(d / (column.sum() * eps) * gram)
    return -whole + weight * parts + penalty / 2 * (member**2).sum()


def test_equals_the_definition():
    z, c, where = rng.normal(size=(7, 3)), rng.normal(size=(7, 4)), np.array([1, 1, 0, 1, 1, 1, 0], bool)

    @jax.jit
    def run(z, c):
        options = {"eta": 0.3, "iterations": 4, "where": where}
        loss = information.mlc_loss(z, c, eps=0.2, weight=0.8, penalty=0.1, **options)
        return loss, information.mlc_membership(c, **options), information.mlc_membership(c, absolute=False, **options)

    with jax.enable_x64(True):
        loss, both, signed = run(*(np.where(where[:, None], v, np.nan) for v in (z, c)))
    np.testing.assert_allclose(loss, oracle(z[where], c[where], 0.2, 0.8, 0.1, 0.3, 4), rtol=1e-9)
    for got, absolute in ((both, True), (signed, False)):
        expected = np.zeros((7, 7))
        expected[np.ix_(where, where)] = membership(c[where], 0.3, 4, absolute)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(np.asarray(got).sum(1), where, atol=1e-9)


def test_entropy_decides_how_many_a_sample_is_with():
    c = np.float32(rng.normal(size=(6, 3)))
    run = jax.jit(lambda c: [information.mlc_membership(c, eta=eta, iterations=60) for eta in (100.0, 0.005)])
    wide, narrow = run(c)
    np.testing.assert_allclose(wide, 1 / 6, atol=2e-3)
    np.testing.assert_allclose(narrow, np.eye(6), atol=0.05)  # nobody is nearer than oneself


def test_spectral_clustering_finds_the_parts_of_a_graph():
    truth = np.array([0, 2, 1, 0, 1, 2, 0, 1, 2, 2])
    w = (truth[:, None] == truth[None]) + 0.05 * rng.random((10, 10))
    where = np.arange(10) < 9
    labels = np.asarray(
        jax.jit(lambda w: information.spectral_clustering(w, num_clusters=3, key=jax.random.key(0), where=where))(
            np.float32(np.where(where[:, None] & where[None], w, np.nan))
        )
    )
    same = labels[:9, None] == labels[None, :9]
    np.testing.assert_array_equal(same, truth[:9, None] == truth[None, :9])
    assert labels[9] == -1


def test_refuses():
    z = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="features and codes must be"):
        information.mlc_loss(z, z[:3])
    with pytest.raises(ValueError, match="epsilon=0"):
        information.mlc_loss(z, z, eta=0.0)
    with pytest.raises(ValueError, match="where has shape"):
        information.mlc_membership(z, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"affinity must be \[N, N\]"):
        information.spectral_clustering(z, num_clusters=2, key=jax.random.key(0))
    with pytest.raises(ValueError, match="num_clusters=5"):
        information.spectral_clustering(jnp.ones((4, 4)), num_clusters=5, key=jax.random.key(0))


def clusters(w, where, seed):
    return information.spectral_clustering(w, num_clusters=2, key=jax.random.key(seed), num_starts=1, where=where)


def member(codes, where):
    return information.mlc_membership(codes, where=where)


WHERE = Arg("where", (6,))
ARGS = {"features": Arg("embeddings", (6, 3)), "codes": Arg("embeddings", (6, 4)), "where": WHERE}
CASES = [
    Case(information.mlc_loss, ARGS, static={"iterations": 1}, wrt=("features", "codes"), rows=dict.fromkeys(ARGS, 0),
         symmetry="invariant"),
    Case(member, {"codes": ARGS["codes"], "where": WHERE}, wrt=("codes",), helper=True,
         covers=("information.mlc_membership",)),
    Case(clusters, {"w": Arg("weights", (6, 6)), "where": WHERE, "seed": Arg("index", (), high=9)}, helper=True,
         reason="labels", covers=("information.spectral_clustering",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

"""Coding rates against eigenvalues, whole and in parts."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import information

rng = np.random.default_rng(0)


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def rate(z, eps=0.1):
    """Of rows of unit length, by the singular values."""
    n, d = z.shape
    return 0.5 * np.log1p(d / (n * eps) * np.linalg.svd(z, compute_uv=False) ** 2).sum()


def parts(z, member, eps=0.1):
    n, d = z.shape
    total = 0
    for column in member.T:
        gram = sum(g * np.outer(row, row) for g, row in zip(column, z, strict=True))
        total += column.sum() * np.linalg.slogdet(np.eye(d) + d / (column.sum() * eps) * gram)[1]
    return total / (2 * n)


def test_equal_the_definitions_in_float64():
    z, where = rng.normal(size=(9, 4)), np.arange(9) < 7
    member, labels = rng.dirichlet(np.ones(3), size=9), np.array([0, 1, 0, -1, 1, 1, 0, 2, 2])
    views = rng.normal(size=(3, 9, 4))

    @jax.jit
    def run(z, member, views):
        return {
            "rate": information.coding_rate(z, where=where),
            "parts": information.class_coding_rate(z, member, where=where),
            "loss": information.rate_reduction_loss(z, member, weight=0.7, eps=0.3, where=where),
            "views": information.total_coding_rate_loss(views, weight=2.0, where=where),
            "length": information.coding_length(z, labels, num_clusters=3, where=where),
        }

    dirty = [np.where(where[:, None], v, np.nan) for v in (z, member)]
    with jax.enable_x64(True):
        got = run(*dirty, np.where(where[None, :, None], views, np.nan))
    member, u, v = member[:7], unit(z[:7]), unit(views[:, :7])
    mean = unit(v.mean(0))
    length, kept = 0, labels[:7] >= 0
    for j in range(3):
        own = u[labels[:7] == j]
        if len(own):
            length += (len(own) + 4) * rate(own) + len(own) * np.log(kept.sum() / len(own))
    expected = {
        "rate": rate(u),
        "parts": parts(u, member),
        "loss": 0.7 * parts(u, member, 0.3) - rate(u, 0.3),
        "views": -rate(mean) - 2 * (v * mean).sum(-1).mean(),
        "length": length,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, err_msg=name)


def test_reduction_is_zero_without_parts_and_never_negative():
    z = np.float32(rng.normal(size=(8, 3)))
    turn = np.float32(np.linalg.qr(rng.normal(size=(3, 3)))[0])
    members = np.float32([np.full((8, 8), 1 / 8), np.eye(8), rng.dirichlet(np.ones(8), size=8)])
    losses, rates = jax.jit(
        lambda m: (
            jax.vmap(lambda m: information.rate_reduction_loss(z, m))(m),
            [information.coding_rate(v) for v in (z, z @ turn)],
        )
    )(members)
    np.testing.assert_allclose(losses[0], 0, atol=1e-5)
    assert np.all(losses < 1e-5) and losses[1] < -0.05
    np.testing.assert_allclose(*rates, rtol=1e-5)


def test_refuses():
    z = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="eps=0"):
        information.coding_rate(z, eps=0.0)
    with pytest.raises(ValueError, match=r"membership must be \[4, K\]"):
        information.class_coding_rate(z, z[:3])
    with pytest.raises(ValueError, match=r"views must be \[V, N, D\]"):
        information.total_coding_rate_loss(z)
    with pytest.raises(ValueError, match="labels has shape"):
        information.coding_length(z, jnp.zeros(3, int), num_clusters=2)
    with pytest.raises(ValueError, match="where has shape"):
        information.rate_reduction_loss(z, z, where=jnp.ones(3, bool))


def reduced(z, member, where, axis_name=None):
    return information.rate_reduction_loss(z, member, where=where, axis_name=axis_name)


def others(views, labels, where):
    told = information.total_coding_rate_loss(views, where=where)
    return told, information.coding_length(views[0], labels, num_clusters=3, where=where)


WHERE = Arg("where", (6,))
ARGS = {"z": Arg("embeddings", (6, 3)), "member": Arg("probabilities", (6, 2)), "where": WHERE}
CASES = [
    Case(reduced, ARGS, wrt=("z", "member"), rows=dict.fromkeys(ARGS, 0), symmetry="invariant",
         name="rate_reduction_loss", covers=("information.rate_reduction_loss", "information.coding_rate",
                                             "information.class_coding_rate")),
    Case(others, {"views": Arg("embeddings", (2, 6, 3)), "labels": Arg("labels", (6,)), "where": WHERE}, wrt=("views",),
         helper=True, covers=("information.total_coding_rate_loss", "information.coding_length")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

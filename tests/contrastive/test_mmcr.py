"""MMCR against NumPy's singular values in float64, image by image."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import effective_rank, manifold_statistics, mmcr_loss, nuclear_norm

rng = np.random.default_rng(0)
loss_of = jax.jit(mmcr_loss, static_argnames="local_weight")
with_grad = jax.jit(jax.value_and_grad(nuclear_norm))


def norm(x):
    return np.linalg.svd(x, compute_uv=False).sum()


def centres_of(views, where):
    rows = []
    for p in np.flatnonzero(where):
        rows.append(np.mean([view[p] / np.sqrt(view[p] @ view[p]) for view in views], axis=0))
    return np.array(rows)


def oracle(views, where, targets=None, local_weight=0.0):
    centres = centres_of(views, where)
    if targets is not None:
        centres = (centres + centres_of(targets, where)) / 2
    local = [norm([view[p] / np.sqrt(view[p] @ view[p]) for view in views]) for p in np.flatnonzero(where)]
    return -norm(centres) + local_weight * np.mean(local)


@pytest.mark.parametrize("momentum", [False, True])
def test_equals_numpy(momentum):
    """Two of seven images are masked and hold NaN; the averaged encoder has another number of views."""
    views, targets = rng.normal(size=(3, 7, 4)), rng.normal(size=(2, 7, 4))
    where = np.array([1, 0, 1, 1, 1, 0, 1], bool)
    dirty, dirty_targets = (np.where(where[None, :, None], x, np.nan).astype(np.float32) for x in (views, targets))
    for weight in (0.0, 0.7):
        options = {"targets": dirty_targets} if momentum else {}
        got = loss_of(dirty, where=where, local_weight=weight, **options)
        np.testing.assert_allclose(got, oracle(views, where, targets if momentum else None, weight), rtol=1e-5)


def test_known_values():
    """Collapsed: sqrt(P). Orthogonal images with equal views: P, the bound. V orthogonal views have local norm V."""
    same = np.broadcast_to(np.float32([3, 4, 0, 0]), (4, 4))
    spread = np.broadcast_to(5 * np.eye(4, dtype=np.float32), (4, 4, 4))
    collapsed = np.broadcast_to(same, (4, 4, 4))
    across = np.swapaxes(np.stack([np.roll(spread[0], i, axis=0) for i in range(4)]), 0, 1)  # each image: all axes
    for views, centre, local in ((collapsed, 2, 2), (spread, 4, 2), (across, 1, 4)):
        np.testing.assert_allclose(loss_of(views, local_weight=0.5), -centre + 0.5 * local, rtol=1e-5)
    assert loss_of(spread * 0, local_weight=0.5) == 0


def test_is_bounded_and_turns_with_the_space():
    """`-sqrt(P min(P, D))` bounds the loss; rotations, scales, the order of images and that of views change nothing."""
    views = rng.normal(size=(3, 6, 4))
    turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    scales = rng.uniform(0.1, 9, (3, 6, 1))
    batch = [views, views @ turn, views * scales, views[:, rng.permutation(6)], views[::-1]]
    losses = jax.jit(jax.vmap(lambda v: mmcr_loss(v, local_weight=0.3)))(np.float32(batch))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    assert -np.sqrt(6 * 4) < losses[0] < 0


def test_gradient_of_the_norm_where_the_decomposition_has_none():
    """Equal singular values, rank one, a repeated row, zero: the polar factor over what is not 0, never NaN."""
    u, s, v = np.linalg.svd(rng.normal(size=(4, 3)), full_matrices=False)
    column, row = rng.normal(size=(2, 4))[:, :, None]
    rank_one = column @ row[:3].T
    repeated = np.repeat(np.eye(3)[:2], 2, axis=0)
    cases = [
        (u @ np.diag(s) @ v, u @ v),
        (5 * np.eye(4)[:, :3], np.eye(4)[:, :3]),
        (1e-3 * u @ v, u @ v),
        (rank_one, rank_one / np.linalg.norm(rank_one)),
        (repeated, repeated / np.sqrt(2)),
        (np.zeros((4, 3)), np.zeros((4, 3))),
    ]
    for x, expected in cases:
        value, grad = with_grad(np.float32(x))
        np.testing.assert_allclose(value, norm(x), rtol=1e-5)
        np.testing.assert_allclose(grad, expected, atol=1e-5)


def test_matrices_in_a_batch():
    x = rng.normal(size=(2, 3, 4, 2))
    got = jax.jit(lambda x: nuclear_norm(x, eps=0.5))(np.float32(x))
    np.testing.assert_allclose(got, [[norm(m) for m in row] for row in x], rtol=1e-5)  # eps touches the gradient only
    u, s, v = np.linalg.svd(x[0, 0], full_matrices=False)
    large = s > 0.9 * s[0]
    grad = jax.jit(jax.grad(lambda x: nuclear_norm(x, eps=0.9)))(np.float32(x[0, 0]))
    np.testing.assert_allclose(grad, u[:, large] @ v[large], atol=1e-5)
    assert large.sum() == 1


def test_statistics_equal_numpy():
    views, where = rng.normal(size=(2, 5, 3)), np.array([1, 1, 1, 0, 1], bool)
    got = jax.jit(manifold_statistics)(np.where(where[None, :, None], views, np.nan).astype(np.float32), where=where)
    centres = centres_of(views, where)
    share = np.linalg.svd(centres, compute_uv=False)
    share = share / share.sum()
    expected = {
        "capacity": norm(centres) / np.sqrt(4 * 3),
        "compactness": np.mean([c @ c for c in centres]),
        "effective_rank": np.exp(-np.sum(share * np.log(share))),
        "local_norm": (oracle(views, where, local_weight=1.0) - oracle(views, where)),
    }
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_effective_rank_of_known_matrices():
    batch = np.float32([np.eye(4) * 7, np.ones((4, 4)), np.zeros((4, 4)), np.diag([1, 1, 0, 0])])
    np.testing.assert_allclose(jax.jit(jax.vmap(effective_rank))(batch), [4, 1, 0, 2], rtol=1e-4)


def test_refuses():
    views = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"views must be \[V >= 1, B, D\]"):
        mmcr_loss(views[0])
    with pytest.raises(ValueError, match="targets has shape"):
        mmcr_loss(views, targets=views[:, :2])
    with pytest.raises(ValueError, match="local_weight=-1"):
        mmcr_loss(views, local_weight=-1)
    with pytest.raises(ValueError, match="where has shape"):
        manifold_statistics(views, where=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="x must be"):
        nuclear_norm(views[0, 0])
    with pytest.raises(ValueError, match="eps=-1"):
        nuclear_norm(views, eps=-1)
    with pytest.raises(ValueError, match=r"embeddings must be \[N, D\]"):
        effective_rank(views)


CASES = [
    Case(
        mmcr_loss,
        {
            "views": Arg("embeddings", (2, 6, 4)),
            "targets": Arg("embeddings", (2, 6, 4)),
            "where": Arg("where", (6,)),
        },
        static={"local_weight": 0.5},
        wrt=("views",),
        frozen=("targets",),
        rows={"views": 1, "targets": 1, "where": 0},
        symmetry="invariant",
    ),
    Case(nuclear_norm, {"x": Arg("activations", (5, 3))}, wrt=("x",), helper=True),
    Case(
        effective_rank,
        {"embeddings": Arg("embeddings", (5, 3)), "where": Arg("where", (5,))},
        wrt=("embeddings",),
        helper=True,
    ),
    Case(
        manifold_statistics,
        {"views": Arg("embeddings", (2, 5, 3)), "where": Arg("where", (5,))},
        reason="to watch, behind a stop-gradient",
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)

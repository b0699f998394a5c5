"""Token relations against a loop over pairs."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import distill

rng = np.random.default_rng(0)
H, T = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 4, 6))
cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def oracle(h, t, where, margin, mode):
    """The mean over the pairs of each video."""
    means = []
    for b in range(len(h)):
        tokens = [(f, s) for f in range(h.shape[1]) for s in range(h.shape[2]) if where[b, f, s]]
        terms = []
        for f, s in tokens:
            for g, r in tokens:
                if mode == "full" or (f == g) == (mode == "spatial"):
                    apart = abs(cosine(h[b, f, s], h[b, g, r]) - cosine(t[b, f, s], t[b, g, r]))
                    terms.append(max(apart - margin, 0.0))
        means.append(np.mean(terms))
    return np.array(means)


@pytest.mark.parametrize("mode", ["full", "spatial", "temporal"])
def test_equals_the_loop_over_pairs(mode):
    where = np.ones((2, 3, 4), bool)
    where[0, 1, 2:], where[1, 2] = False, False
    dirty = [jnp.float32(np.where(where[..., None], x, np.nan)) for x in (H, T)]
    for margin in (0.0, 0.1):
        options = {"margin": margin, "mode": mode}
        got = distill.token_relation_loss(*dirty, where=where, reduction="none", **options)
        np.testing.assert_allclose(got, oracle(H, T, where, **options), rtol=1e-5)
        got = distill.token_relation_loss(jnp.float32(H), jnp.float32(T), **options)
        np.testing.assert_allclose(got, oracle(H, T, np.ones_like(where), **options).mean(), rtol=1e-5)


def test_full_is_the_weighted_sum_of_space_and_time():
    full, spatial, temporal = (
        float(distill.token_relation_loss(jnp.float32(H), jnp.float32(T), mode=m))
        for m in ("full", "spatial", "temporal")
    )
    np.testing.assert_allclose(full, spatial / 3 + temporal * 2 / 3, rtol=1e-5)
    one = jnp.float32(H[:, :1]), jnp.float32(T[:, :1])
    np.testing.assert_allclose(
        distill.token_relation_loss(*one), distill.token_relation_loss(*one, mode="spatial"), rtol=1e-6
    )
    assert distill.token_relation_loss(*one, mode="temporal") == 0


def test_rotations_lengths_and_small_differences_are_free():
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    turned = H @ rotation * rng.uniform(0.1, 9, (2, 3, 4, 1))
    assert distill.token_relation_loss(jnp.float32(turned), jnp.float32(H), margin=0.0) < 1e-6
    near = H + 0.01 * rng.normal(size=H.shape)
    value, grad = jax.value_and_grad(distill.token_relation_loss)(jnp.float32(near), jnp.float32(H))
    assert value == 0 and not np.any(grad)
    assert distill.token_relation_loss(jnp.float32(near), jnp.float32(H), margin=0.0) > 0


def test_relation_matrix_equals_the_loop():
    x = H[0, 0]
    expected = [[cosine(a, b) for b in x] for a in x]
    np.testing.assert_allclose(distill.relation_matrix(jnp.float32(x)), expected, atol=1e-6)
    where = np.array([True, False, True, True])
    got = distill.relation_matrix(jnp.float32(np.where(where[:, None], x, np.nan)), where=where)
    np.testing.assert_allclose(got, np.where(where[:, None] & where[None], expected, 0), atol=1e-6)


def test_match_grid_equals_the_loops():
    """Two frames become three: at times -1/6 (clamped), 1/2 and 7/6 of the two; then patches of 2 x 2."""
    layer = distill.match_grid(4, frames=3, stride=2)
    params = layer.init(jax.random.key(0), 5)
    x = rng.normal(size=(1, 3, 4, 2, 5))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    hidden = x[:, 1:] @ p["hidden"]["w"]
    y = (hidden / (1 + np.exp(-hidden))) @ p["project"]["w"]
    y = np.stack([y[:, 0], (y[:, 0] + y[:, 1]) / 2, y[:, 1]], axis=1)
    kernel = p["convolve"]["w"].reshape(2, 2, 4, 4)
    expected = np.zeros((1, 3, 2, 4))
    for f, i, a, b in np.ndindex(3, 2, 2, 2):
        expected[0, f, i] += y[0, f, 2 * i + a, b] @ kernel[a, b]
    np.testing.assert_allclose(jax.jit(layer.apply)(params, jnp.float32(x)), expected, rtol=1e-4, atol=1e-5)


def test_refuses():
    x = jnp.ones((1, 2, 3, 4))
    with pytest.raises(ValueError, match="tokens and teacher_tokens"):
        distill.token_relation_loss(x, x[:, :1])
    with pytest.raises(ValueError, match="where has shape"):
        distill.token_relation_loss(x, x, where=jnp.ones((1, 2), bool))
    with pytest.raises(ValueError, match="margin=-1"):
        distill.token_relation_loss(x, x, margin=-1)
    with pytest.raises(ValueError, match="mode='time'"):
        distill.token_relation_loss(x, x, mode="time")
    with pytest.raises(ValueError, match=r"x must be \[..., N, C\]"):
        distill.relation_matrix(x, where=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="frames=0"):
        distill.match_grid(2, frames=0)
    layer = distill.match_grid(2, frames=2, stride=2)
    with pytest.raises(ValueError, match="divisible by 2"):
        layer.apply(layer.init(jax.random.key(0), 4), x[None])


def of_videos(tokens, teacher_tokens, where, axis_name=None):
    """The suite masks whole videos."""
    where = jnp.broadcast_to(where[:, None, None], tokens.shape[:3])
    return distill.token_relation_loss(tokens, teacher_tokens, where=where, axis_name=axis_name)


def grid(x):
    layer = distill.match_grid(3, frames=2, stride=2)
    params = jax.tree.map(lambda a: a.astype(x.dtype), GRID)
    return layer.apply(params, x)


GRID = distill.match_grid(3, frames=2, stride=2).init(jax.random.key(0), 3)
TOKENS = {"tokens": Arg("embeddings", (6, 2, 2, 4)), "teacher_tokens": Arg("embeddings", (6, 2, 2, 3))}
CASES = [
    Case(
        of_videos,
        {**TOKENS, "where": Arg("where", (6,))},
        wrt=("tokens",),
        frozen=("teacher_tokens",),
        rows={**dict.fromkeys(TOKENS, 0), "where": 0},
        symmetry="invariant",
        name="token_relation_loss",
        covers=("distill.token_relation_loss",),
    ),
    Case(
        distill.relation_matrix,
        {"x": Arg("embeddings", (6, 4))},
        wrt=("x",),
        rows={"x": 0},
        helper=True,
    ),
    Case(
        grid,
        {"x": Arg("activations", (3, 2, 2, 4, 3))},
        wrt=("x",),
        rows={"x": 0},
        symmetry="equivariant",
        helper=True,
        name="match_grid",
        covers=("distill.match_grid",),
    ),
]
test_conformance = conformance.conformance_tests(CASES)

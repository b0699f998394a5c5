"""Bounds of mutual information against loops over pairs, and against Gaussians whose information is known."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import information, ops

rng = np.random.default_rng(0)
BOUNDS = {
    "dv": information.donsker_varadhan_bound,
    "nwj": information.nwj_bound,
    "nce": information.info_nce_bound,
    "js": information.jensen_shannon_bound,
    "smile": information.smile_estimate,
}


def oracle(name, f, where):
    kept = np.flatnonzero(where)
    if len(kept) < 2:
        return 0.0
    own = [f[i, i] for i in kept]
    others = np.array([f[i, j] for i in kept for j in kept if i != j])
    if name == "dv":
        return np.mean(own) - np.log(np.mean(np.exp(others)))
    if name == "nwj":
        return np.mean(own) - np.mean(np.exp(others - 1))
    if name == "nce":
        return np.mean([f[i, i] - np.log(np.mean([np.exp(f[i, j]) for j in kept])) for i in kept])
    if name == "js":
        return -np.mean([np.log1p(np.exp(-v)) for v in own]) - np.mean([np.log1p(np.exp(v)) for v in others])
    return np.mean(own) - np.log(np.mean(np.exp(np.clip(others, -5, 5))))


@pytest.mark.parametrize("name", BOUNDS)
def test_equals_the_loop(name):
    f = rng.normal(size=(6, 6)) * 4
    run = jax.jit(lambda f, w: BOUNDS[name](f, where=w))
    for where in (np.ones(6, bool), np.array([1, 0, 1, 1, 0, 1], bool), np.eye(6, dtype=bool)[2], np.zeros(6, bool)):
        dirty = np.where(where[:, None] & where[None, :], f, np.nan)
        np.testing.assert_allclose(run(jnp.float32(dirty), where), oracle(name, f, where), rtol=2e-5, atol=1e-6)


def test_smile_learns_as_jensen_shannon_does_and_reports_another_value():
    f = jnp.float32(rng.normal(size=(5, 5)) * 6)
    grads = [jax.grad(BOUNDS[name])(f) for name in ("smile", "js")]
    np.testing.assert_allclose(*grads, rtol=1e-6)
    unclipped = information.smile_estimate(f, clip=None)
    np.testing.assert_allclose(unclipped, information.donsker_varadhan_bound(f), rtol=1e-5)


def best_scores(key, rho, count, size):
    """The logarithm of p(y | x) / p(y) for all pairs of draws from correlated Gaussians."""
    x, noise = jax.random.normal(key, (2, count, size))
    y = rho * x + jnp.sqrt(1 - rho**2) * noise
    inside = -((y[None] - rho * x[:, None]) ** 2) / (2 * (1 - rho**2)) + y[None] ** 2 / 2
    return jnp.sum(inside - 0.5 * jnp.log(1 - rho**2), axis=-1)


def test_the_best_critic_finds_the_information_of_gaussians():
    """Bounds are tight at the best critic: means over 64 draws lie within four standard errors of the truth."""
    rho, size, count = 0.6, 2, 128
    truth = float(information.gaussian_mutual_information(jnp.full(size, rho)))
    keys = jax.random.split(jax.random.key(0), 64)

    @jax.jit
    @jax.vmap
    def estimates(key):
        f = best_scores(key, rho, count, size)
        return {
            "dv": BOUNDS["dv"](f),
            "nwj": BOUNDS["nwj"](f + 1),
            "nce": BOUNDS["nce"](f),
            "smile": BOUNDS["smile"](f),
        }

    for name, values in estimates(keys).items():
        values = np.asarray(values, np.float64)
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - truth) <= 4 * error + 0.02, (name, values.mean(), truth, error)
    np.testing.assert_allclose(truth, -np.log(1 - rho**2), rtol=1e-5)


def test_info_nce_saturates_at_the_logarithm_of_the_batch():
    f = 60 * jnp.eye(8) + jnp.float32(rng.normal(size=(8, 8)))
    assert float(information.info_nce_bound(f)) <= np.log(8) + 1e-6
    assert float(information.donsker_varadhan_bound(f)) > 50


def test_refuses():
    with pytest.raises(ValueError, match=r"scores must be \[N, N\], got \(2, 3\)"):
        information.nwj_bound(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="where has shape"):
        information.info_nce_bound(jnp.ones((2, 2)), where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="clip=0"):
        information.smile_estimate(jnp.ones((2, 2)), clip=0.0)
    with pytest.raises(ValueError, match="correlation must be"):
        information.gaussian_mutual_information(jnp.float32(0.5))


def embedded(name):
    """A bound over rows: the critic is the product of embeddings."""

    def bound(x, y, *, where=None):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x, y = (ops.zero_where_false(a, where) for a in (x, y))  # the critic's part of the mask
        product = lambda x, y: jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
        scores = ops.rows_mixed(product)(x.astype(wide), y.astype(wide))
        scores = 5 * jnp.tanh(scores / 5) if name in ("nwj", "smile") else scores
        return BOUNDS[name](scores, where=where)

    bound.__name__ = BOUNDS[name].__name__
    return bound


ARGS = {"x": Arg("probabilities", (6, 4)), "y": Arg("probabilities", (6, 4)), "where": Arg("where", (6,))}
SMILE = {"gradient": "the gradient is that of the Jensen-Shannon bound"}
CASES = [
    Case(embedded(name), ARGS, wrt=("x", "y"), rows=dict.fromkeys(ARGS, 0), symmetry="invariant",
         covers=(f"information.{function.__name__}",), skip=SMILE if name == "smile" else {})
    for name, function in BOUNDS.items()
] + [
    Case(BOUNDS[name], {"scores": Arg("scores", (5, 5))}, wrt=("scores",), helper=True, name=f"{name} of scores")
    for name in BOUNDS
] + [
    Case(information.gaussian_mutual_information, {"correlation": Arg("probabilities", (3, 4))},
         wrt=("correlation",), helper=True,
         skip={"extremes": "a correlation of 1 has infinite information, as documented"}),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

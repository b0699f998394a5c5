"""Known information against other routes to it, maps against their formulas, KSG against loops over rows."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from scipy import integrate, special, stats

from jaxlab import information

rng = np.random.default_rng(0)


def test_gaussian_and_student_information():
    rho = np.array([0.8, -0.3])
    cov = np.block([[np.eye(2), np.diag(rho)], [np.diag(rho), np.eye(2)]])
    told = jax.jit(lambda c: [information.covariance_information(c, 2, degrees=d) for d in (None, 1e5, 2.0)])
    with jax.enable_x64(True):
        gauss, nearly, heavy = told(cov)
    np.testing.assert_allclose(gauss, -0.5 * np.log(1 - rho**2).sum(), rtol=1e-9)
    np.testing.assert_allclose(nearly, gauss, atol=1e-4)
    # By sampling: the mean of the log of the density over the product of the marginals'.
    z = stats.multivariate_t(shape=cov, df=2, seed=1).rvs(200_000)
    parts = [stats.multivariate_t(shape=np.eye(2), df=2).logpdf(v) for v in (z[:, :2], z[:, 2:])]
    terms = stats.multivariate_t(shape=cov, df=2).logpdf(z) - sum(parts)
    assert abs(terms.mean() - float(heavy)) < 4 * terms.std() / len(terms) ** 0.5


def test_additive_noise_information_by_integration():
    """I = H(Y) - log(2 eps), with the density of a sum of two uniform numbers."""
    for eps in (0.2, 0.5, 1.3):
        density = lambda y, e=eps: max(0.0, min(1, y + e) - max(0, y - e)) / (2 * e)
        surprise = lambda y, f=density: -special.xlogy(f(y), f(y))
        entropy = integrate.quad(surprise, -eps, 1 + eps, points=(eps, 1 - eps), limit=200)[0]
        got = information.additive_noise_information(np.float32(eps))
        np.testing.assert_allclose(got, entropy - np.log(2 * eps), atol=1e-5)


def test_maps_rise_and_keep_the_order():
    x = np.linspace(-5, 5, 2001)
    run = jax.jit(
        lambda x: {name: information.monotone_map(x, name) for name in ("base", "halfcube", "asinh", "wigglify")}
    )
    with jax.enable_x64(True):
        got = run(x)
    expected = {"base": x, "halfcube": np.sign(x) * np.abs(x) ** 1.5, "asinh": np.arcsinh(x)}
    expected["wigglify"] = x + 0.4 * np.sin(x) + 0.2 * np.sin(1.7 * x + 1) + 0.03 * np.sin(3.3 * x - 2.5)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=1e-12)
        assert np.all(np.diff(got[name]) > 0)


def ksg(x, y, k):
    n = len(x)
    d = lambda a: np.array([[np.abs(a[i] - a[j]).max() if i != j else np.inf for j in range(n)] for i in range(n)])
    dx, dy = d(x), d(y)
    total = 0
    for i in range(n):
        eps = np.sort(np.maximum(dx[i], dy[i]))[k - 1]
        total += special.digamma((dx[i] < eps).sum() + 1) + special.digamma((dy[i] < eps).sum() + 1)
    return special.digamma(k) + special.digamma(n) - total / n


def test_ksg_equals_the_loop_and_finds_the_information():
    x, y, where = rng.normal(size=(12, 2)), rng.normal(size=(12, 3)), np.arange(12) < 10
    y[:, :2] += x
    run = jax.jit(lambda x, y, w: information.ksg_information(x, y, k=3, where=w))
    dirty = [np.where(where[:, None], v, np.nan).astype(np.float32) for v in (x, y)]
    np.testing.assert_allclose(run(*dirty, where), ksg(x[:10], y[:10], 3), rtol=1e-4)
    assert run(*dirty, np.arange(12) < 3) == 0
    z = rng.normal(size=(2, 8, 400, 1)).astype(np.float32)
    rho = 0.9
    told = jax.jit(jax.vmap(lambda a, b: information.ksg_information(a, rho * a + (1 - rho**2) ** 0.5 * b)))(*z)
    np.testing.assert_allclose(np.mean(told), -0.5 * np.log(1 - rho**2), rtol=0.08)


def test_sampled_tasks_have_the_information_they_claim():
    """KSG on large samples of each family, whose maps change nothing."""
    options = [("normal", "halfcube"), ("student", "asinh"), ("additive_noise", "base")]

    @jax.jit
    def run(key):
        told = []
        for family, transform in options:
            draw = lambda key, family=family, transform=transform: information.sample_information_task(
                key, rows=600, size=1, family=family, transform=transform, strength=2.0
            )
            x, y, truth = jax.vmap(draw)(jax.random.split(key, 6))
            told.append(jnp.stack([truth, jax.vmap(information.ksg_information)(x, y)]))
        return jnp.stack(told)

    truth, found = np.moveaxis(np.asarray(run(jax.random.key(2))), 1, 0)
    assert np.abs(truth - found).max() < 0.25 and np.abs((truth - found).mean()) < 0.08
    assert truth.std(axis=1).min() > 0.02


def test_refuses():
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="k=4 must be between 1 and 3"):
        information.ksg_information(x, x, k=4)
    with pytest.raises(ValueError, match="x and y must be"):
        information.ksg_information(x, x[:3])
    with pytest.raises(ValueError, match="size_x=2"):
        information.covariance_information(jnp.eye(2), 2)
    with pytest.raises(ValueError, match="covariance must be"):
        information.covariance_information(x, 1)
    with pytest.raises(ValueError, match="name='cube'"):
        information.monotone_map(x, "cube")
    with pytest.raises(ValueError, match="family='cauchy'"):
        information.sample_information_task(jax.random.key(0), rows=4, size=2, family="cauchy")
    with pytest.raises(ValueError, match="strength=0"):
        information.sample_information_task(jax.random.key(0), rows=4, size=2, strength=0.0)


def dispersion(a):
    return information.covariance_information(a @ a.T / 9 + jnp.eye(4, dtype=a.dtype), 2, degrees=3.0)


def mapped(x):
    noise = information.additive_noise_information(jnp.abs(x) + jnp.asarray(0.1, x.dtype))
    return information.monotone_map(x, "wigglify"), information.monotone_map(x, "halfcube"), noise


def drawn(seed):
    return information.sample_information_task(jax.random.key(seed), rows=5, size=2)


SMALL, WHERE = Arg("embeddings", (6, 2)), Arg("where", (6,))
CASES = [
    Case(information.ksg_information, {"x": SMALL, "y": SMALL, "where": WHERE}, reason="it counts", helper=True),
    Case(dispersion, {"a": Arg("probabilities", (4, 3))}, wrt=("a",), helper=True,
         covers=("information.covariance_information",)),
    Case(mapped, {"x": SMALL}, wrt=("x",), helper=True,
         covers=("information.monotone_map", "information.additive_noise_information")),
    Case(drawn, {"seed": Arg("index", (), high=9)}, helper=True, covers=("information.sample_information_task",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

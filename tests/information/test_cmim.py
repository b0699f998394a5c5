"""cMIM against loops over pairs and densities written out, and against a VAE's loss on the same draw."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import information

rng = np.random.default_rng(0)


def density(x, mean, log_std):
    return sum(
        -0.5 * ((a - m) / np.exp(s)) ** 2 - s - 0.5 * np.log(2 * np.pi)
        for a, m, s in zip(x, mean, log_std, strict=True)
    )


def contrast(z, mu, kept, t, negatives):
    cosine = lambda a, b: a @ b / np.sqrt((a @ a) * (b @ b))
    terms = np.zeros(len(z))
    for i in kept:
        others = [np.exp(cosine(z[i], mu[j]) / t) for j in kept if j != i]
        own = np.exp(cosine(z[i], mu[i]) / t)
        if others:
            terms[i] = -np.log(own / (own + (np.mean(others) if negatives == "mean" else np.sum(others))))
    return terms


def test_equals_the_loop():
    z, mu, spread = rng.normal(size=(3, 6, 4))
    spread[0] = -9  # below the floor
    told = rng.normal(size=6)
    where = np.array([1, 1, 0, 1, 1, 0], bool)

    @jax.jit
    def run(told, z, mu, spread):
        options = {"temperature": 0.3, "where": where}
        return [
            information.cmim_loss(told, z, mu, spread, weight=0.7, beta=0.5, reduction="none", **options),
            information.cmim_loss(told, z, mu, spread, weight=0.7, beta=0.5, **options),
            information.cmim_contrastive_loss(z, mu, negatives="sum", reduction="none", **options),
        ]

    with jax.enable_x64(True):
        dirty = [np.where(where.reshape(-1, *[1] * (v.ndim - 1)), v, np.nan) for v in (told, z, mu, spread)]
        terms, mean, summed = run(*dirty)
    kept = np.flatnonzero(where)
    expected = np.zeros(6)
    for i in kept:
        log_q = density(z[i], mu[i], np.maximum(spread[i], -6))
        log_prior = density(z[i], np.zeros(4), np.zeros(4))
        expected[i] = -(told[i] + log_prior + 0.5 * (log_q + told[i])) / 2
    expected += 0.7 * contrast(z, mu, kept, 0.3, "mean")
    np.testing.assert_allclose(terms, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mean, expected[kept].mean(), rtol=1e-9)
    np.testing.assert_allclose(summed, contrast(z, mu, kept, 0.3, "sum"), rtol=1e-9, atol=1e-12)


def test_forms_of_the_mim_loss():
    """Tied, with the data's marginal, without the encoder's joint; and a VAE's loss differs by known terms."""
    told, prior, posterior, marginal = np.float32(rng.normal(size=(4, 5)))
    forms = [
        (information.mim_loss(told, prior, posterior), told + (posterior + prior) / 2),
        (information.mim_loss(told, prior, posterior, tied=False), (told + prior + posterior) / 2),
        (
            information.mim_loss(told, prior, posterior, log_marginal=marginal, tied=False, beta=0.3),
            (told + prior + 0.3 * (posterior + marginal)) / 2,
        ),
        (information.mim_loss(told, prior, posterior, beta=0.0), (told + prior) / 2),
    ]
    for got, expected in forms:
        np.testing.assert_allclose(got, -expected.mean(), rtol=1e-5)
    vae = -(told + prior - posterior).mean()
    np.testing.assert_allclose(vae - forms[0][0], (1.5 * posterior - 0.5 * prior).mean(), rtol=1e-4)


def test_contrastive_term_does_not_see_the_batch():
    """Equal codes: 1/2 for any batch, 1/N with the sum. Orthogonal ones: known. Each negative twice: the same."""
    run = jax.jit(
        lambda z, mu: [
            information.cmim_contrastive_loss(z, mu, temperature=t, negatives=n, reduction="none")
            for t, n in ((0.1, "mean"), (0.1, "sum"), (0.01, "mean"))
        ]
    )
    ones = np.ones((6, 4), np.float32)
    mean, summed, _ = run(ones, ones)
    np.testing.assert_allclose(mean, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(summed, np.log(6), rtol=1e-6)
    z = np.eye(6, dtype=np.float32)
    mean, _, sharp = run(z, z)
    np.testing.assert_allclose(mean, np.log1p(np.exp(-10)), rtol=1e-2)
    assert np.all(np.isfinite(sharp)) and np.all(sharp < 1e-6)
    z, mu = np.float32(rng.normal(size=(2, 6, 4)))
    twice = jax.jit(lambda z, mu: information.cmim_contrastive_loss(z, mu, reduction="none"))
    again = lambda v: np.concatenate([v[:1], v[1:], v[1:]])
    np.testing.assert_allclose(twice(again(z), again(mu))[0], run(z, mu)[0][0], rtol=1e-5)


def test_draws_have_the_encoders_moments():
    mean, log_std = jnp.full((4000, 2), 3.0), jnp.tile(jnp.array([[-9.0, 0.5]]), (4000, 1))
    z = np.asarray(information.draw_codes(mean, log_std, key=jax.random.key(0), min_log_std=-2.0))
    np.testing.assert_allclose(z.mean(0), 3, atol=0.1)
    np.testing.assert_allclose(z.std(0), [np.exp(-2), np.exp(0.5)], rtol=0.05)


def test_embeddings_pool_the_real_tokens():
    h, x = rng.normal(size=(3, 5, 4)).astype(np.float32), np.float32(rng.normal(size=(3, 5)))
    where = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    dirty = np.where(where[..., None], h, np.nan)
    expected = {
        "mean": [h[0].mean(0), h[1][[0, 2]].mean(0), np.zeros(4)],
        "max": [h[0].max(0), h[1][[0, 2]].max(0), np.zeros(4)],
        "last": [h[0, 4], h[1, 2], np.zeros(4)],
    }
    run = jax.jit(
        lambda z: {
            pool: information.informative_embedding(lambda z, x: z * 1.0, z, x, where=where, pool=pool)
            for pool in expected
        }
    )
    for pool, got in run(dirty).items():
        np.testing.assert_allclose(got, expected[pool], rtol=1e-5, atol=1e-6)
    flat = information.informative_embedding(lambda z: z, h[:, 0], normalize=True)
    np.testing.assert_allclose(
        flat, (h[:, 0] - h[:, 0].mean(1, keepdims=True)) / h[:, 0].std(1, keepdims=True), rtol=1e-4
    )


def test_refuses():
    z, told = jnp.ones((4, 3)), jnp.ones(4)
    with pytest.raises(ValueError, match="temperature=0"):
        information.cmim_contrastive_loss(z, z, temperature=0.0)
    with pytest.raises(ValueError, match="negatives='max'"):
        information.cmim_contrastive_loss(z, z, negatives="max")
    with pytest.raises(ValueError, match="codes and mean must have one shape"):
        information.cmim_contrastive_loss(z, z[:3])
    with pytest.raises(ValueError, match="must have the shape of codes"):
        information.cmim_loss(told, z, z, z[:, :2])
    with pytest.raises(ValueError, match="log_likelihood has shape"):
        information.cmim_loss(told[:3], z, z, z)
    with pytest.raises(ValueError, match="log_marginal is given"):
        information.mim_loss(told, told, told, log_marginal=told)
    with pytest.raises(ValueError, match=r"log_prior must be \[N\]"):
        information.mim_loss(told, z, told)
    with pytest.raises(ValueError, match="log_std has shape"):
        information.draw_codes(z, z[:2], key=jax.random.key(0))
    with pytest.raises(ValueError, match="hidden must return"):
        information.informative_embedding(lambda z: z[0], z)
    with pytest.raises(ValueError, match="pool='sum'"):
        information.pool_hidden(z[None], pool="sum")


def densities(x, log_std, a, where):
    return information.gaussian_log_density(x, x * 0.5, log_std * 0.1).astype(x.dtype), information.mim_loss(
        a, a * 2, a * 3, where=where
    )


def drawn(mean, log_std, seed):
    return information.draw_codes(mean, jnp.tanh(log_std), key=jax.random.key(seed))


def embedded(hidden, where):
    both = [information.pool_hidden(hidden, where=where, pool=pool) for pool in ("max", "last")]
    return information.informative_embedding(lambda z: z, hidden, where=where), *both


def loss(log_likelihood, codes, mean, log_std, where, axis_name=None):
    return information.cmim_loss(log_likelihood, codes, mean, log_std, where=where, axis_name=axis_name)


CODES, WHERE, SCORES = Arg("embeddings", (6, 4)), Arg("where", (6,)), Arg("scores", (6,))
ARGS = {"log_likelihood": SCORES, "codes": CODES, "mean": CODES, "log_std": CODES, "where": WHERE}
CASES = [
    Case(loss, ARGS, wrt=("log_likelihood", "codes", "mean", "log_std"), rows=dict.fromkeys(ARGS, 0),
         symmetry="invariant", name="cmim_loss", covers=("information.cmim_loss",
                                                         "information.cmim_contrastive_loss")),
    Case(densities, {"x": CODES, "log_std": Arg("probabilities", (6, 4)), "a": SCORES, "where": WHERE},
         wrt=("x", "a"), helper=True, covers=("information.gaussian_log_density", "information.mim_loss")),
    Case(drawn, {"mean": CODES, "log_std": CODES, "seed": Arg("index", (), high=9)}, wrt=("mean", "log_std"),
         helper=True, covers=("information.draw_codes",)),
    Case(embedded, {"hidden": Arg("embeddings", (3, 5, 4)), "where": Arg("where", (3, 5))}, wrt=("hidden",),
         helper=True, covers=("information.informative_embedding", "information.pool_hidden")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

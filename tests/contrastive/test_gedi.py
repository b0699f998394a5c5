"""GEDI against the formulas in float64, its bound, and Langevin dynamics whose variance is known."""

import itertools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import (
    clustering_scores,
    draw_from_buffer,
    energy,
    gedi_loss,
    langevin,
    sum_log_likelihood,
)

rng = np.random.default_rng(0)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def parts_oracle(logits, augmented, sampled, prior):
    p, q = softmax(logits), softmax(augmented)
    log_z = lambda x: np.mean([np.log(np.sum(np.exp(row))) for row in x])
    invariance = np.mean([-sum(p[i, y] * np.log(q[i, y]) for y in range(p.shape[1])) for i in range(len(p))])
    balance = -sum(prior[y] * np.log(np.mean(p[:, y])) for y in range(p.shape[1]))
    return log_z(sampled) - log_z(logits), invariance, balance


def test_terms_equal_the_formulas():
    """Seven images, of which two are padding with NaN, and five samples."""
    logits, augmented, sampled = (3 * rng.normal(size=(n, 4)) for n in (7, 7, 5))
    where, prior = np.arange(7) < 5, np.array([0.4, 0.3, 0.2, 0.1])
    dirty = [jnp.float32(np.where(where[:, None], x, np.nan)) for x in (logits, augmented)]

    @jax.jit
    def run(logits, augmented, sampled):
        weigh = lambda *w: dict(zip(("generative", "invariance", "balance"), w, strict=True))
        call = lambda s, weights, p: gedi_loss(logits, augmented, s, where=where, prior=p, **weights)
        single = [call(sampled, weigh(*w), jnp.float32(prior)) for w in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
        return single, call(sampled, {}, None), call(None, {}, None)

    single, whole, clustering = run(*dirty, jnp.float32(sampled))
    np.testing.assert_allclose(single, parts_oracle(logits[:5], augmented[:5], sampled, prior), rtol=1e-5)
    parts = parts_oracle(logits[:5], augmented[:5], sampled, np.full(4, 0.25))
    np.testing.assert_allclose(whole, parts[0] + 50 * parts[1] + 10 * parts[2], rtol=1e-5)
    np.testing.assert_allclose(clustering, 50 * parts[1] + 10 * parts[2], rtol=1e-5)


def test_the_bound_is_log_k_and_collapse_is_far_from_it():
    sure = 200.0 * np.eye(3)[[0, 1, 2, 0, 1, 2]]
    cases = {
        "certain and balanced": (sure, sure),
        "undecided": (np.zeros((6, 3)), np.zeros((6, 3))),
        "one cluster": (sure[[0] * 6], sure[[0] * 6]),
        "not invariant": (sure, sure[::-1]),
    }
    many = [rng.normal(size=(2, 6, 3)) * scale for scale in (0.1, 1, 10, 100)]
    stacked = jnp.float32(np.stack([*cases.values(), *many]))
    bound = jax.jit(jax.vmap(lambda x: gedi_loss(x[0], x[1], invariance=1, balance=1)))(stacked)
    np.testing.assert_allclose(bound[0], np.log(3), rtol=1e-5)
    np.testing.assert_allclose(bound[1], 2 * np.log(3), rtol=1e-5)
    assert bound[2] > 100 and bound[3] > 100
    assert np.all(bound[4:] > np.log(3))


def test_a_constant_shifts_the_energy_alone_and_the_generative_gradient_is_a_difference_of_two():
    logits, augmented, sampled = (jnp.float32(rng.normal(size=(5, 3))) for _ in range(3))

    @jax.jit
    def run(logits, augmented, sampled):
        both = gedi_loss(logits, augmented), gedi_loss(logits + 7, augmented + 7)
        only = lambda a, b: gedi_loss(a, augmented, b, invariance=0, balance=0)
        return both, energy(logits + 7) - energy(logits), jax.grad(only, (0, 1))(logits, sampled)

    both, shift, (data, model) = run(logits, augmented, sampled)
    np.testing.assert_allclose(*both, rtol=1e-5)
    np.testing.assert_allclose(shift, -7, rtol=1e-5)
    np.testing.assert_allclose(data, -softmax(np.asarray(logits, np.float64)) / 5, rtol=1e-4)
    np.testing.assert_allclose(model, softmax(np.asarray(sampled, np.float64)) / 5, rtol=1e-4)


def test_chains_in_a_bowl_have_the_variance_of_their_recursion():
    """x <- (1 - step / 2) x + noise: the variance tends to noise^2 / (1 - (1 - step / 2)^2)."""
    bowl = lambda x: jnp.sum(x**2, axis=1) / 2
    run = jax.jit(lambda x, key: langevin(bowl, x, key, steps=60, step_size=0.3, noise=0.2))
    samples = np.asarray(run(jnp.full((4000, 2), 3.0), jax.random.key(0)))
    np.testing.assert_allclose(samples.var(0), 0.2**2 / (1 - 0.85**2), rtol=0.08)
    np.testing.assert_allclose(samples.mean(0), 3 * 0.85**60, atol=0.02)


def test_the_buffer_gives_its_rows_and_some_fresh_ones():
    buffer = jnp.asarray(np.arange(400, dtype=np.float32)[:, None] + 10)
    start, index = jax.jit(lambda b, key: draw_from_buffer(b, key, count=300, fresh=0.3))(buffer, jax.random.key(1))
    start, index = np.asarray(start)[:, 0], np.asarray(index)
    assert index.min() < 20 and index.max() > 380 and len(set(index.tolist())) > 150
    new = start < 5
    np.testing.assert_array_equal(start[~new], index[~new] + 10)
    assert np.all(np.abs(start[new]) <= 1) and 0.2 < new.mean() < 0.4


def test_sums_equal_the_count_of_pairs():
    a, b = np.log(rng.dirichlet(np.ones(4), 9)), np.log(rng.dirichlet(np.ones(4), 9))
    total = np.array([0, 1, 2, 3, 4, 5, 6, 7, -1])
    run = jax.jit(
        lambda a, b: (sum_log_likelihood(a, b, total), jax.grad(lambda a: sum_log_likelihood(a, b, total)[7])(a))
    )
    got, impossible = run(jnp.float32(a), jnp.float32(b))
    for i, s in enumerate(total[:7]):
        expected = sum(np.exp(a[i, x] + b[i, y]) for x in range(4) for y in range(4) if x + y == s)
        np.testing.assert_allclose(got[i], np.log(expected), rtol=1e-5)
    np.testing.assert_allclose(got[7:], np.log(np.finfo(np.float32).tiny), rtol=1e-6)
    assert not np.any(impossible)


def test_scores_equal_a_count_over_all_maps():
    clusters, labels = rng.integers(0, 4, 40), rng.integers(0, 3, 40)
    clusters[:25] = (labels[:25] + 1) % 3
    labels[38:] = -1
    where = np.arange(40) >= 2
    run = jax.jit(lambda c, y: clustering_scores(c, y, num_clusters=4, num_classes=3, where=where))
    got = run(jnp.asarray(clusters), jnp.asarray(labels))
    c, y = clusters[2:38], labels[2:38]
    table = np.array([[np.sum((c == i) & (y == j)) for j in range(3)] for i in range(4)])
    p = table / table.sum()
    entropy = lambda p: -sum(v * np.log(v) for v in p.ravel() if v)
    parts = entropy(p.sum(1)), entropy(p.sum(0))
    np.testing.assert_allclose(got["nmi"], 2 * (sum(parts) - entropy(p)) / sum(parts), rtol=1e-4)
    best = max(sum(table[i, j] for j, i in enumerate(chosen)) for chosen in itertools.permutations(range(4), 3))
    np.testing.assert_allclose(got["accuracy"], best / 36, rtol=1e-6)
    one = run(jnp.zeros(40, int), jnp.zeros(40, int))
    assert one["nmi"] == 1 and one["accuracy"] == 1


def test_refuses():
    x, index = jnp.ones((3, 2)), jnp.zeros(3, int)
    with pytest.raises(ValueError, match=r"one shape \[N, K\]"):
        gedi_loss(x, x[:2])
    with pytest.raises(ValueError, match="sampled has shape"):
        gedi_loss(x, x, x[:, :1])
    with pytest.raises(ValueError, match="prior has shape"):
        gedi_loss(x, x, prior=jnp.ones(3))
    with pytest.raises(ValueError, match="steps=-1"):
        langevin(energy, x, jax.random.key(0), steps=-1)
    with pytest.raises(ValueError, match="count=0 and the 3 rows"):
        draw_from_buffer(x, jax.random.key(0), count=0)
    with pytest.raises(ValueError, match="log_probs_a, log_probs_b and total"):
        sum_log_likelihood(x, x, index[:2])
    with pytest.raises(ValueError, match=r"one shape \[N\]"):
        clustering_scores(index, index[:2], num_clusters=2, num_classes=2)


def sampler_case(buffer, key):
    key_draw, key_move = jax.random.split(key)
    start, index = draw_from_buffer(buffer, key_draw, count=3, fresh=0.5)
    bowl = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1) / 2
    return langevin(bowl, start, key_move, steps=2), index


def images_case(logits, augmented, where, axis_name=None):
    """Images against two fixed samples, which have no rows of their own to spread."""
    sampled = jnp.ones((2, logits.shape[1]), logits.dtype)
    return gedi_loss(logits, augmented, sampled, where=where, axis_name=axis_name)


CASES = [
    Case(
        images_case,
        {"logits": Arg("scores", (6, 3)), "augmented": Arg("scores", (6, 3)), "where": Arg("where", (6,))},
        wrt=("logits", "augmented"),
        rows={"logits": 0, "augmented": 0, "where": 0},
        symmetry="invariant",
        covers=("contrastive.gedi_loss",),
    ),
    Case(energy, {"logits": Arg("scores", (6, 3))}, wrt=("logits",), helper=True),
    Case(
        sampler_case,
        {"buffer": Arg("embeddings", (6, 2)), "key": Arg("key")},
        reason="samples are constants",
        helper=True,
        covers=("contrastive.langevin", "contrastive.draw_from_buffer"),
    ),
    Case(
        sum_log_likelihood,
        {"log_probs_a": Arg("scores", (6, 3)), "log_probs_b": Arg("scores", (6, 3)), "total": Arg("labels", (6,), 5)},
        wrt=("log_probs_a", "log_probs_b"),
        helper=True,
    ),
    Case(
        clustering_scores,
        {"clusters": Arg("labels", (6,)), "labels": Arg("labels", (6,))},
        static={"num_clusters": 3, "num_classes": 3},
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)

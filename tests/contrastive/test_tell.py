"""TELL against k-means written out in float64, its layer and its alternation."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import ops
from jaxlab.contrastive import (
    adjusted_rand_index,
    centres_to_layer,
    layer_to_centres,
    tell,
    tell_assign,
    tell_cluster_loss,
    tell_fit,
    tell_kmeans_loss,
)
from jaxlab.ops.layers import dense, mlp

rng = np.random.default_rng(0)


def distances(z, c):
    return np.array([[np.sum((a - b) ** 2) for b in c] for a in z])


def test_the_layer_is_the_soft_assignment():
    z, c = rng.normal(size=(7, 3)), rng.normal(size=(4, 3))

    @jax.jit
    def run(z, c):
        layer = centres_to_layer(c, alpha=0.7)
        back = layer_to_centres(layer["w"].T, alpha=0.7)
        scores = z @ layer["w"] + layer["b"][None]
        soft = [tell_assign(z, c, alpha=a) for a in (0.7, 1e4)]
        return jax.nn.softmax(scores), back, *soft, tell_assign(z, c, hard=True)

    by_layer, back, soft, sharp, hard = run(np.float32(z), np.float32(c))
    expected = np.exp(-0.7 * distances(z, c))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(by_layer, expected, rtol=1e-5)
    np.testing.assert_allclose(soft, expected, rtol=1e-5)
    np.testing.assert_allclose(back, c, rtol=1e-6)
    np.testing.assert_array_equal(hard, np.eye(4)[distances(z, c).argmin(axis=1)])
    np.testing.assert_allclose(sharp, hard, atol=1e-6)


def test_the_loss_is_that_of_kmeans_and_its_gradient_leads_to_the_means():
    z, c, where = rng.normal(size=(9, 2)), rng.normal(size=(3, 2)), np.arange(9) < 8
    dirty = np.where(where[:, None], z, np.nan).astype(np.float32)

    @jax.jit
    def run(c):
        loss = lambda c, soft: tell_kmeans_loss(c, dirty, alpha=0.7, soft=soft, where=where)
        return jax.value_and_grad(lambda c: loss(c, False))(c), jax.value_and_grad(lambda c: loss(c, True))(c)

    (hard, grad), (soft, soft_grad) = run(np.float32(c))
    d = distances(z[:8], c)
    label = d.argmin(axis=1)
    p = np.exp(-0.7 * d)
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(hard, d.min(axis=1).mean(), rtol=1e-5)
    np.testing.assert_allclose(soft, (p * d).sum(axis=1).mean(), rtol=1e-5)
    for j in range(3):
        mine = z[:8][label == j]
        np.testing.assert_allclose(grad[j], -2 * (mine - c[j]).sum(axis=0) / 8, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(soft_grad[j], -2 * (p[:, j : j + 1] * (z[:8] - c[j])).sum(axis=0) / 8, rtol=1e-4)
        if len(mine):  # a step of 1 / (2 n_j) on the sum of the losses is an update of Lloyd's
            np.testing.assert_allclose(c[j] - 8 * grad[j] / (2 * len(mine)), mine.mean(axis=0), rtol=1e-4, atol=1e-5)
    means = np.array([z[:8][label == j].mean(axis=0) if np.any(label == j) else c[j] for j in range(3)])
    if np.array_equal(distances(z[:8], means).argmin(axis=1), label):  # a fixed point
        assert np.abs(run(np.float32(means))[0][1]).max() < 1e-6


def test_the_normalised_loss():
    """The mean over all pairs, of which those not assigned count 2 alpha."""
    z, layer, where = rng.normal(size=(6, 3)), rng.normal(size=(4, 3)), np.arange(6) != 2
    options = {"alpha": 0.2, "weight": 0.03, "where": where}
    got = jax.jit(lambda w, z: [tell_cluster_loss(w, z, reduction=r, **options) for r in ("none", "mean")])
    terms, mean = got(np.float32(layer), np.where(where[:, None], z, np.nan).astype(np.float32))
    expected = 0.03 / 0.2 * (2 * 0.2 - (z @ layer.T).max(axis=1) / 4)
    np.testing.assert_allclose(terms, np.where(where, expected, 0), rtol=1e-5)
    np.testing.assert_allclose(mean, expected[where].mean(), rtol=1e-5)


ALPHA, RATE = 1e-3, 0.5
OPTIONS = {"num_clusters": 3, "size": 2, "steps_per_epoch": 1, "alpha": ALPHA}


def test_layer_and_encoder_take_turns():
    x, where = np.float32(rng.normal(size=(8, 4))), np.arange(8) < 6
    learners = [tell(mlp([5, 2]), mlp([4]), optax.sgd(RATE), weight=w, **OPTIONS) for w in (0.01, 0.0)]
    batch = {"x": np.where(where[:, None], x, np.nan), "where": where}

    @jax.jit
    def run(key):
        first = learners[0].init(key, batch)
        z = learners[0].predict(first, {"x": x[:6]})
        even = [learner.update(first, batch, key) for learner in learners]
        odd = [learner.update(even[0][0], batch, key) for learner in learners]
        return first, z, even, odd, learners[0].predict(even[0][0], {"x": x[:6]})

    first, seen, even, odd, later = run(jax.random.key(0))
    layer, z = np.float64(first.params["layer"]), np.float64(seen["embeddings"])
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(layer, axis=1), 2 * ALPHA, rtol=1e-5)
    np.testing.assert_array_equal(seen["clusters"], (z @ layer.T).argmax(axis=1))
    # Even: each row of the layer turns towards the sum of its rows, by 0.2 alpha times the rate.
    expected = layer.copy()
    for j in range(3):
        pull = z[seen["clusters"] == j].sum(axis=0)
        if np.any(pull):
            expected[j] += RATE * 0.2 * ALPHA * pull / np.linalg.norm(pull)
        expected[j] *= 2 * ALPHA / np.linalg.norm(expected[j])
    np.testing.assert_allclose(even[0][0].params["layer"], expected, rtol=1e-4)
    assert not np.allclose(expected, layer, rtol=1e-3)
    same = lambda a, b: all(
        np.allclose(u, v, atol=1e-7) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert same(even[0][0].params["encoder"], even[1][0].params["encoder"])  # as if there were no clustering
    # Odd: the layer rests, the encoder follows both losses.
    np.testing.assert_allclose(odd[0][0].params["layer"], even[0][0].params["layer"], rtol=1e-6)
    assert not same(odd[0][0].params["encoder"], odd[1][0].params["encoder"])
    assert odd[0][0].step == 2
    clustering = 0.01 / ALPHA * (2 * ALPHA - (z @ layer.T).max(axis=1).mean() / 3)
    np.testing.assert_allclose(even[0][1]["clustering"], clustering, rtol=1e-4)
    np.testing.assert_allclose(even[0][1]["loss"], even[0][1]["clustering"] + even[0][1]["reconstruction"], rtol=1e-6)
    assert later["probs"].shape == (6, 3)


def test_shards_learn_as_one():
    x = np.float32(rng.normal(size=(6, 4)))
    key = jax.random.key(1)
    one, spread = (tell(dense(2), dense(4), optax.sgd(1.0), axis_name=name, **OPTIONS) for name in (None, "data"))

    @jax.jit
    def run(x):
        state = one.init(key, {"x": x})
        whole = one.update(state, {"x": x}, key)
        parts = {"x": x.reshape(2, 3, 4)}
        return whole, jax.vmap(spread.update, in_axes=(None, 0, None), axis_name="data")(state, parts, key)

    (whole, metrics), (parts, part_metrics) = run(x)
    for a, b in zip(
        jax.tree.leaves((whole.params, metrics)), jax.tree.leaves((parts.params, part_metrics)), strict=True
    ):
        np.testing.assert_allclose(b, np.broadcast_to(a, b.shape), rtol=1e-4, atol=1e-6)


def test_descent_finds_what_lloyd_finds():
    centres = rng.normal(size=(4, 3)) * 6
    x = np.float32(np.repeat(centres, 25, axis=0) + rng.normal(size=(100, 3)))

    @jax.jit
    def run(key):
        ours = tell_fit(key, x, num_clusters=4, steps=40, batch_size=50, num_starts=8)
        return ours, ops.kmeans(key, x, num_clusters=4, num_starts=8)

    (labels, found, inertia), (truth, _, best) = run(jax.random.key(0))
    assert best <= inertia < 1.02 * best
    np.testing.assert_allclose(inertia, distances(x, np.asarray(found)).min(axis=1).sum(), rtol=1e-4)
    assert len(set(zip(np.asarray(labels), np.asarray(truth), strict=True))) == 4


def rand_oracle(a, b):
    """By counting pairs."""
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    rows, columns = sum(a[i] == a[j] for i, j in pairs), sum(b[i] == b[j] for i, j in pairs)
    expected = rows * columns / len(pairs)
    return (both - expected) / ((rows + columns) / 2 - expected)


def test_rand_index_equals_the_count_of_pairs():
    a, b, where = rng.integers(0, 4, 30), rng.integers(0, 3, 30), np.arange(30) != 4
    b[:20] = np.minimum(a[:20], 2)
    b[7] = -1
    score = jax.jit(lambda a, b, where: adjusted_rand_index(a, b, num_clusters=4, num_classes=3, where=where))
    kept = where & (b >= 0)
    np.testing.assert_allclose(score(a, b, where), rand_oracle(a[kept], b[kept]), rtol=1e-5)
    assert score(a * 0, b * 0, where) == 1 and score(a, b, where & False) == 0


def test_refuses():
    z, c = jnp.ones((4, 3)), jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"\[K, D\] and \[N, D\]"):
        tell_kmeans_loss(c, z[:, :2])
    with pytest.raises(ValueError, match="alpha=0"):
        tell_assign(z, c, alpha=0)
    with pytest.raises(ValueError, match="where has shape"):
        tell_cluster_loss(c, z, where=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="steps_per_epoch=0"):
        tell(mlp([2]), mlp([3]), num_clusters=2, steps_per_epoch=0)
    with pytest.raises(ValueError, match="weight=-1"):
        tell(mlp([2]), mlp([3]), num_clusters=2, steps_per_epoch=1, weight=-1)
    with pytest.raises(ValueError, match="N >= 5"):
        tell_fit(jax.random.key(0), z, num_clusters=5)
    with pytest.raises(ValueError, match="steps=0"):
        tell_fit(jax.random.key(0), z, num_clusters=2, steps=0)
    with pytest.raises(ValueError, match="clusters and labels"):
        adjusted_rand_index(jnp.zeros(3, int), jnp.zeros(2, int), num_clusters=1, num_classes=1)


def learn(key, x, where):
    learner = tell(dense(2), dense(3), optax.sgd(1.0), **OPTIONS)
    batch = {"x": x, "where": where}
    key_init, key_update = jax.random.split(key)
    state, metrics = learner.update(learner.init(key_init, batch), batch, key_update)
    return learner.predict(state, batch)["probs"], metrics["loss"]


PAIR = {"centres": Arg("embeddings", (3, 4)), "z": Arg("embeddings", (6, 4))}
CASES = [
    Case(
        tell_kmeans_loss,
        {**PAIR, "where": Arg("where", (6,))},
        wrt=("centres", "z"),
        rows={"z": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(
        tell_cluster_loss,
        {"layer": Arg("embeddings", (3, 4)), "z": Arg("embeddings", (6, 4)), "where": Arg("where", (6,))},
        static={"alpha": 0.3, "weight": 1.0},
        wrt=("layer", "z"),
        helper=True,
    ),
    Case(tell_assign, PAIR, static={"alpha": 0.3}, wrt=("centres", "z"), helper=True),
    Case(centres_to_layer, {"centres": Arg("embeddings", (3, 4))}, wrt=("centres",), helper=True),
    Case(layer_to_centres, {"layer": Arg("embeddings", (3, 4))}, wrt=("layer",), helper=True),
    Case(
        tell_fit,
        {"key": Arg("key"), "x": Arg("embeddings", (8, 3))},
        static={"num_clusters": 2, "steps": 3, "batch_size": 4, "num_starts": 2},
        reason="no gradient passes",
        helper=True,
        skip={"dtype": "the inertia and the labels of rounded numbers may differ"},
    ),
    Case(
        adjusted_rand_index,
        {"clusters": Arg("labels", (6,)), "labels": Arg("labels", (6,)), "where": Arg("where", (6,))},
        static={"num_clusters": 3, "num_classes": 3},
        helper=True,
    ),
    Case(
        learn,
        {"key": Arg("key"), "x": Arg("activations", (6, 3)), "where": Arg("where", (6,))},
        reason="a learner",
        covers=("contrastive.tell",),
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)

"""Conditional mutual information against loops, the argmin property, centroids and subsets."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import distill

rng = np.random.default_rng(0)
N, C = 12, 4
Z = rng.normal(size=(N, C)) * 2
Y = np.where(np.arange(N) % 5 == 4, -1, rng.integers(0, 3, N))  # class 3 is empty
WHERE = np.arange(N) != 0
KEPT = [i for i in range(N) if WHERE[i] and Y[i] >= 0]


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


P = np.array([softmax(z) for z in Z])
MEANS = np.array([P[[i for i in KEPT if Y[i] == c]].mean(0) if c in Y[KEPT] else np.full(C, 1 / C) for c in range(C)])
DIRTY = jnp.float32(np.where(WHERE[:, None], Z, np.nan))


def test_information_equals_the_loop_and_the_difference_of_entropies():
    terms = {i: np.sum(P[i] * np.log(P[i] / MEANS[Y[i]])) for i in KEPT}
    got = distill.conditional_mutual_information(DIRTY, Y, where=WHERE, reduction="none")
    np.testing.assert_allclose(got, [terms.get(i, 0.0) for i in range(N)], rtol=1e-4, atol=1e-6)
    got = distill.conditional_mutual_information(DIRTY, Y, where=WHERE)
    np.testing.assert_allclose(got, np.mean(list(terms.values())), rtol=1e-5)
    entropy = lambda p: -np.sum(p * np.log(p))
    np.testing.assert_allclose(got, np.mean([entropy(MEANS[Y[i]]) - entropy(P[i]) for i in KEPT]), rtol=1e-5)


def test_class_means_are_the_argmin():
    best = float(distill.conditional_mutual_information(DIRTY, Y, where=WHERE))
    for _ in range(20):
        q = MEANS * np.exp(rng.normal(size=(C, C)) * 0.1)
        q = jnp.float32(q / q.sum(1, keepdims=True))
        assert distill.conditional_mutual_information(DIRTY, Y, centroids=q, where=WHERE) > best
    alike = jnp.broadcast_to(jnp.float32(Z[:1]), (N, C))
    np.testing.assert_allclose(distill.conditional_mutual_information(alike, Y), 0, atol=1e-6)


def test_loss_equals_the_loop():
    q = np.array([softmax(rng.normal(size=C)) for _ in range(C)])
    ce = np.mean([-np.log(P[i, Y[i]]) for i in KEPT])
    kl = np.mean([np.sum(P[i] * np.log(P[i] / q[Y[i]])) for i in KEPT])
    got = distill.mcmi_loss(DIRTY, Y, jnp.float32(q), weight=0.3, where=WHERE)
    np.testing.assert_allclose(got, ce - 0.3 * kl, rtol=1e-5)


def test_centroids_equal_the_loops(mesh8):
    got = distill.class_centroids(jnp.float32(P), Y, num_classes=C, where=WHERE)
    np.testing.assert_allclose(got, MEANS, rtol=1e-5)
    old = np.array([softmax(rng.normal(size=C)) for _ in range(C)])
    new = np.array([0.9 * old[c] + 0.1 * MEANS[c] if c in Y[KEPT] else old[c] for c in range(C)])
    got = distill.update_centroids(jnp.float32(old), jnp.float32(P), Y, decay=0.9, where=WHERE)
    np.testing.assert_allclose(got, new / new.sum(1, keepdims=True), rtol=1e-5)
    p, y = jnp.float32(np.tile(P, (2, 1))), jnp.tile(Y, 2)
    run = lambda axis: lambda p, y: distill.class_centroids(p, y, num_classes=C, axis_name=axis)
    axis = jax.sharding.PartitionSpec("data")
    spread = jax.jit(jax.shard_map(run("data"), mesh=mesh8, in_specs=axis, out_specs=jax.sharding.PartitionSpec()))(
        p, y
    )
    np.testing.assert_allclose(spread, run(None)(p, y), rtol=1e-5)


def test_subsets_are_balanced():
    y = np.repeat([0, 1, 2, -1], [20, 10, 7, 5])
    chosen = jax.jit(lambda key: distill.few_shot_subset(key, y, fraction=0.1, num_classes=3))
    sets = [np.asarray(chosen(jax.random.key(i))) for i in range(3)]
    for keep in sets:
        assert [keep[y == c].sum() for c in (0, 1, 2, -1)] == [2, 1, 1, 0]
    assert any(np.any(a != sets[0]) for a in sets[1:])
    assert distill.few_shot_subset(jax.random.key(0), y, fraction=1.0, num_classes=3).sum() == 37


def test_refuses():
    z, y = jnp.ones((3, 2)), jnp.zeros(3, int)
    with pytest.raises(ValueError, match="weight=-1"):
        distill.mcmi_loss(z, y, jnp.ones((2, 2)), weight=-1)
    with pytest.raises(ValueError, match="logits and labels"):
        distill.conditional_mutual_information(z, y[:2])
    with pytest.raises(ValueError, match="centroids has shape"):
        distill.conditional_mutual_information(z, y, centroids=z)
    with pytest.raises(ValueError, match="where has shape"):
        distill.conditional_mutual_information(z, y, where=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="probs and labels"):
        distill.class_centroids(z, y[:2], num_classes=2)
    with pytest.raises(ValueError, match="num_classes=0"):
        distill.class_centroids(z, y, num_classes=0)
    with pytest.raises(ValueError, match="decay=2"):
        distill.update_centroids(z, z, y, decay=2)
    with pytest.raises(ValueError, match="centroids and probs"):
        distill.update_centroids(z, z[:, :1], y)
    with pytest.raises(ValueError, match="fraction=2"):
        distill.few_shot_subset(jax.random.key(0), y, fraction=2, num_classes=2)


def subset(seed, labels):
    return distill.few_shot_subset(jax.random.key(seed), labels, fraction=0.5, num_classes=3)


def alone(logits, labels, where, axis_name=None):
    """Class means of the same examples, whose derivative is 0 there."""
    return distill.conditional_mutual_information(logits, labels, where=where, axis_name=axis_name)


ROWS = {"labels": Arg("labels", (6,)), "where": Arg("where", (6,))}
CASES = [
    Case(
        distill.mcmi_loss,
        {"logits": Arg("scores", (6, 3)), "centroids": Arg("probabilities", (3, 3)), **ROWS},
        wrt=("logits",),
        frozen=("centroids",),
        rows={"logits": 0, "labels": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(
        alone,
        {"logits": Arg("scores", (6, 3)), **ROWS},
        wrt=("logits",),
        rows={"logits": 0, "labels": 0, "where": 0},
        symmetry="invariant",
        name="conditional_mutual_information",
        covers=("distill.conditional_mutual_information",),
    ),
    Case(
        distill.class_centroids,
        {"probs": Arg("probabilities", (6, 3)), **ROWS},
        static={"num_classes": 3},
        frozen=("probs",),
        reason="centroids are constants",
        helper=True,
    ),
    Case(
        distill.update_centroids,
        {"centroids": Arg("probabilities", (3, 3)), "probs": Arg("probabilities", (6, 3)), **ROWS},
        frozen=("centroids", "probs"),
        reason="centroids are constants",
        helper=True,
    ),
    Case(
        subset,
        {"seed": Arg("index", high=9), "labels": Arg("labels", (8,))},
        helper=True,
        name="few_shot_subset",
        covers=("distill.few_shot_subset",),
    ),
]
test_conformance = conformance.conformance_tests(CASES)

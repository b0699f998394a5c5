"""Class relations, equipartitioned targets and swapped prediction against loops in float64."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from jax.sharding import PartitionSpec as P

from jaxlab import distill

rng = np.random.default_rng(0)
N, K, U = 8, 3, 2
Z, OLD = rng.uniform(-1, 1, (N, K + U)), rng.uniform(-1, 1, (N, K))
WHERE = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def test_relations_equal_the_loop():
    weights, terms = [], []
    for i in np.flatnonzero(WHERE):
        n, o = Z[i] / 0.1, OLD[i] / 0.1
        weights.append(softmax(n / 4)[:K].sum())
        terms.append(-16 * np.sum(softmax(o / 4) * np.log(softmax(n[:K] / 4))))
    weights = np.array(weights) / np.mean(weights)
    np.testing.assert_allclose(weights.mean(), 1)
    dirty = [jnp.float32(np.where(WHERE[:, None], x, np.nan)) for x in (Z, OLD)]
    got = distill.class_relation_loss(*dirty, where=WHERE, reduction="none")
    np.testing.assert_allclose(np.asarray(got)[WHERE], weights * terms, rtol=2e-5)
    np.testing.assert_allclose(distill.class_relation_loss(*dirty, where=WHERE), np.mean(weights * terms), rtol=2e-5)


def test_equal_relations_have_no_gradient_but_for_the_weight():
    """With a constant weight nothing pulls on the known logits of a student that equals the frozen network."""
    z = jnp.float32(Z)
    grad = lambda learn: jax.grad(lambda z: distill.class_relation_loss(z, jnp.float32(Z[:, :K]), learn_weight=learn))(
        z
    )
    np.testing.assert_allclose(grad(False), 0, atol=1e-5)
    assert np.abs(grad(True)).max() > 1e-3 and np.abs(grad(True)[:, K:]).max() > 1e-3


def sinkhorn(logits, iterations=3):
    q = np.exp(logits / 0.05).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def test_targets_equal_the_loop_and_use_every_class():
    logits, labels = rng.uniform(-1, 1, (N, U)), np.array([-1, 0, -1, 2, -1, -1, 1, -1])
    real = np.arange(N) != 7
    dirty = jnp.float32(np.where(real[:, None], logits, np.nan))
    got = np.asarray(distill.discovery_targets(dirty, labels, num_known=K, where=jnp.asarray(real)))
    new = real & (labels < 0)
    np.testing.assert_allclose(got[new, K:], sinkhorn(logits[new]), rtol=2e-4, atol=1e-6)
    assert not np.any(got[new, :K]) and not np.any(got[7])
    np.testing.assert_array_equal(got[[1, 3, 6]], np.eye(K + U)[[0, 2, 1]])
    even = distill.discovery_targets(dirty, labels, num_known=K, where=jnp.asarray(real), epsilon=0.5, iterations=20)
    np.testing.assert_allclose(np.asarray(even)[:, K:].sum(0), new.sum() / U, rtol=1e-4)


def test_targets_are_equal_on_a_mesh(mesh8):
    logits, labels = jnp.float32(rng.uniform(-1, 1, (16, U))), np.where(np.arange(16) % 3 == 0, 1, -1)
    run = lambda axis: lambda z, y: distill.discovery_targets(z, y, num_known=K, axis_name=axis)
    spread = jax.jit(jax.shard_map(run("data"), mesh=mesh8, in_specs=P("data"), out_specs=P("data")))
    np.testing.assert_allclose(spread(logits, labels), run(None)(logits, labels), rtol=1e-5, atol=1e-6)


def test_swapped_prediction_equals_the_loop():
    logits, targets = rng.uniform(-1, 1, (3, N, 4)), rng.uniform(0, 1, (2, N, 4))
    terms = np.zeros(N)
    for n in np.flatnonzero(WHERE):
        for v in range(2):
            for w in range(3):
                if w != v:
                    terms[n] -= targets[v, n] @ np.log(softmax(logits[w, n] / 0.1)) / 4
    dirty = jnp.float32(np.where(WHERE[None, :, None], logits, np.nan))
    got = distill.swapped_prediction_loss(dirty, jnp.float32(targets), where=WHERE, reduction="none")
    np.testing.assert_allclose(got, terms, rtol=1e-5)
    got = distill.swapped_prediction_loss(dirty, jnp.float32(targets), where=WHERE)
    np.testing.assert_allclose(got, terms.sum() / WHERE.sum(), rtol=1e-5)


def test_refuses():
    z, y = jnp.ones((4, 3)), jnp.zeros(4, int)
    with pytest.raises(ValueError, match="logits and known_logits"):
        distill.class_relation_loss(z, z[:2])
    with pytest.raises(ValueError, match="K=3 classes"):
        distill.class_relation_loss(z[:, :2], z)
    with pytest.raises(ValueError, match="tau=0"):
        distill.class_relation_loss(z, z, tau=0)
    with pytest.raises(ValueError, match="where has shape"):
        distill.class_relation_loss(z, z, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="novel_logits and labels"):
        distill.discovery_targets(z, y[:2], num_known=2)
    with pytest.raises(ValueError, match="num_known=0"):
        distill.discovery_targets(z, y, num_known=0)
    with pytest.raises(ValueError, match="epsilon=0"):
        distill.discovery_targets(z, y, num_known=2, epsilon=0)
    with pytest.raises(ValueError, match="V >= 2"):
        distill.swapped_prediction_loss(z[None], z[None])
    with pytest.raises(ValueError, match="targets must be"):
        distill.swapped_prediction_loss(jnp.stack([z, z]), jnp.stack([z, z, z]))
    with pytest.raises(ValueError, match="prototypes must be"):
        distill.normalize_prototypes(z[0])


def swapped(first, second, targets, where, axis_name=None):
    targets = jnp.stack([targets, 1 - targets])
    return distill.swapped_prediction_loss(jnp.stack([first, second]), targets, where=where, axis_name=axis_name)


VIEW = Arg("scores", (6, 4))
CASES = [
    Case(
        distill.class_relation_loss,
        {"logits": VIEW, "known_logits": Arg("scores", (6, 3)), "where": Arg("where", (6,))},
        wrt=("logits",),
        frozen=("known_logits",),
        rows={"logits": 0, "known_logits": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(
        swapped,
        {"first": VIEW, "second": VIEW, "targets": Arg("probabilities", (6, 4)), "where": Arg("where", (6,))},
        wrt=("first", "second"),
        frozen=("targets",),
        rows={"first": 0, "second": 0, "targets": 0, "where": 0},
        symmetry="invariant",
        name="swapped_prediction_loss",
        covers=("distill.swapped_prediction_loss",),
    ),
    Case(
        distill.discovery_targets,
        {"novel_logits": Arg("scores", (6, 3)), "labels": Arg("labels", (6,)), "where": Arg("where", (6,))},
        static={"num_known": 3},
        frozen=("novel_logits",),
        reason="targets are constants",
        rows={"novel_logits": 0, "labels": 0, "where": 0},
        helper=True,
    ),
    Case(distill.normalize_prototypes, {"prototypes": Arg("embeddings", (4, 3))}, wrt=("prototypes",), helper=True),
]
test_conformance = conformance.conformance_tests(CASES)

"""Contrastive learning of arbitrary pairs of classes against loops over anchors, positives and negatives."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import (
    class_relations,
    filtered_similarity,
    gate_entropy,
    pair_contrastive_loss,
    pair_gate,
    sample_partners,
)

rng = np.random.default_rng(0)
LABELS = np.array([0, 1, 0, 2, 1, 3, -1, 2], np.int32)
PARTNERS = np.array([1, 1, 2, 0, 9, 1, 0, -1], np.int32)  # the class 9 is absent


def similarity_oracle(a, b, gates, normalize=True):
    s = np.zeros((len(a), len(b)))
    for i in range(len(a)):
        for k in range(len(b)):
            x, y = a[i] / np.linalg.norm(a[i]) * gates[i], b[k] / np.linalg.norm(b[k]) * gates[i]
            s[i, k] = x @ y / (np.linalg.norm(x) * np.linalg.norm(y) if normalize else 1)
    return s


def loss_oracle(s, labels, partners, where):
    """Terms of all anchors from the scaled similarities, NaN where an anchor has no positive."""
    terms = np.full(len(labels), np.nan)
    for i in np.flatnonzero(where & (labels >= 0) & (partners >= 0)):
        real = np.flatnonzero(where)
        negatives = sum(np.exp(s[i, k]) for k in real if labels[k] not in (labels[i], partners[i]))
        positives = [np.log(np.exp(s[i, p]) + negatives) - s[i, p] for p in real if labels[p] == partners[i]]
        if positives:
            terms[i] = np.mean(positives)
    return terms


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_loop(normalize):
    a, b = rng.normal(size=(2, 8, 5))
    gates, where = rng.uniform(0.05, 1, (8, 5)), np.array([1, 1, 1, 1, 1, 0, 1, 1], bool)
    expected = loss_oracle(similarity_oracle(a, b, gates, normalize) / 0.3, LABELS, PARTNERS, where)
    dirty = (np.where(where[:, None], x, np.nan).astype(np.float32) for x in (a, b, gates))
    options = {"temperature": 0.3, "normalize": normalize, "where": where}

    @jax.jit
    def both(a, b, gates):
        arrays = a, b, LABELS, PARTNERS, gates
        return pair_contrastive_loss(*arrays, **options, reduction="none"), pair_contrastive_loss(*arrays, **options)

    terms, mean = both(*dirty)
    np.testing.assert_allclose(terms, np.nan_to_num(expected), rtol=2e-5, atol=1e-6)
    assert np.isnan(expected).sum() == 4  # masked, unlabelled, without a partner, whose class is absent
    np.testing.assert_allclose(mean, np.nanmean(expected), rtol=2e-5)


def test_similarity_equals_gate_normalise_and_multiply():
    a, b, gates = rng.normal(size=(4, 3)), rng.normal(size=(5, 3)), rng.uniform(0.1, 1, (4, 3))
    gates[1, 0] = 0
    tiny = gates * np.array([1, 1e-30, 1e20, 7])[:, None]
    run = jax.jit(lambda g: filtered_similarity(np.float32(a), np.float32(b), g))
    for g in (gates, tiny):  # its scale is nothing, even where its square is no float32
        np.testing.assert_allclose(run(np.float32(g)), similarity_oracle(a, b, gates), rtol=1e-4, atol=1e-6)


def test_a_closed_gate_hides_its_dimension():
    a, b = (np.float32(x) for x in rng.normal(size=(2, 8, 5)))
    gates = np.float32(rng.uniform(0.1, 1, (8, 5)))
    gates[:, 2] = 0
    other = a.copy(), b.copy()
    for x in other:
        x[:, 2] = x[:, 2] * -3 + 1
    loss = jax.jit(
        jax.value_and_grad(lambda a, b: pair_contrastive_loss(a, b, LABELS, PARTNERS, gates, normalize=True), (0, 1))
    )
    unit = lambda x: np.delete(x, 2, axis=1)
    value, grads = loss(a, b)
    assert value > 0
    np.testing.assert_allclose(loss(*other)[0], value, rtol=1e-5)
    for grad in grads:
        # Lengths are taken before the gate; they cancel in the cosine, so what is left there is rounding.
        assert np.abs(grad[:, 2]).max() < 1e-6 < 1e-3 < np.abs(unit(grad)).max()


def test_gates_of_pairs():
    """Symmetric, those of one class with itself by default, and equal to the formula written out."""
    net = pair_gate(4, embedding=6, hidden=5)
    params = jax.jit(lambda key: net.init(key, 3))(jax.random.key(1))
    params = jax.tree.map(lambda x: np.float32(x + rng.normal(size=x.shape) * 0.1), params)  # gains and biases count
    got, own, table = jax.jit(
        lambda p: (
            net.apply(p, np.array([0, 3, -1]), np.array([3, 0, -1])),
            net.apply(p, np.array([2])),
            class_relations(net, p, num_classes=4),
        )
    )(params)

    def norm(x, p):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * p["gain"] + p["bias"]

    def gate(i, j):
        x = norm(np.maximum((params["table"][i] + params["table"][j]) / 2, 0), params["norm_in"])
        x = norm(np.maximum(x @ params["first"]["w"] + params["first"]["b"], 0), params["norm_hidden"])
        return 1 / (1 + np.exp(-(x @ params["last"]["w"] + params["last"]["b"])))

    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_allclose(got, [gate(0, 3), gate(0, 3), gate(0, 0)], rtol=1e-5)
    np.testing.assert_allclose(own[0], gate(2, 2), rtol=1e-5)
    np.testing.assert_allclose(table, [[gate(i, j).mean() for j in range(4)] for i in range(4)], rtol=1e-5)


def test_partners():
    y = np.array([0, 0, 1, 2, 2, 2, -1, 3] * 8, np.int32)
    arbitrary, identical, distinct = jax.jit(
        lambda key: tuple(
            sample_partners(key, y, kind=k, num_classes=4) for k in ("arbitrary", "identical", "distinct")
        )
    )(jax.random.key(0))
    np.testing.assert_array_equal(np.sort(arbitrary), np.sort(y))
    assert np.any(arbitrary != y)
    np.testing.assert_array_equal(identical, y)
    assert np.all((distinct != y) | (y < 0)) and np.all(distinct[y < 0] == -1) and distinct.max() == 3


def test_entropy():
    p, where = rng.uniform(size=(4, 3)), np.array([1, 1, 0, 1], bool)
    p[0] = [0, 1, 0.5]
    expected = [-x * np.log(x) - (1 - x) * np.log(1 - x) if 0 < x < 1 else 0 for x in p[where].ravel()]
    got = jax.jit(lambda p: gate_entropy(p, where=where))(np.where(where[:, None], p, np.nan).astype(np.float32))
    np.testing.assert_allclose(got, np.mean(expected), rtol=1e-5)


def test_refuses():
    z, y = jnp.ones((4, 3)), jnp.zeros(4, int)
    with pytest.raises(ValueError, match=r"one shape \[N, D\]"):
        pair_contrastive_loss(z, z[:2], y, y, z)
    with pytest.raises(ValueError, match="partners has shape"):
        pair_contrastive_loss(z, z, y, y[:2], z)
    with pytest.raises(ValueError, match="gates has shape"):
        filtered_similarity(z, z, z[:1])
    with pytest.raises(ValueError, match=r"\[N, D\] and \[M, D\]"):
        filtered_similarity(z, z[:, :2], z)
    with pytest.raises(ValueError, match="temperature=0"):
        pair_contrastive_loss(z, z, y, y, z, temperature=0)
    with pytest.raises(ValueError, match="hidden=0"):
        pair_gate(3, hidden=0)
    with pytest.raises(ValueError, match="kind='random'"):
        sample_partners(jax.random.key(0), y, kind="random")
    with pytest.raises(ValueError, match="num_classes=None"):
        sample_partners(jax.random.key(0), y, kind="distinct")
    with pytest.raises(ValueError, match="gates and where"):
        gate_entropy(z, where=jnp.ones(3, bool))


def gates_of(key, a, b):
    net = pair_gate(3, embedding=4, hidden=4)
    params = net.init(key, 5)
    return net.apply(params, a, b), class_relations(net, params, num_classes=3)


CASES = [
    Case(
        pair_contrastive_loss,
        {
            "a": Arg("embeddings", (6, 4)),
            "b": Arg("embeddings", (6, 4)),
            "labels": Arg("labels", (6,), high=3),
            "partners": Arg("labels", (6,), high=3),
            "gates": Arg("probabilities", (6, 4)),
            "where": Arg("where", (6,)),
        },
        wrt=("a", "b", "gates"),
        rows={"a": 0, "b": 0, "labels": 0, "partners": 0, "gates": 0, "where": 0},
        symmetry="invariant",
        bfloat16_tolerance=0.2,
    ),
    Case(
        filtered_similarity,
        {"a": Arg("embeddings", (4, 3)), "b": Arg("embeddings", (5, 3)), "gates": Arg("probabilities", (4, 3))},
        wrt=("a", "b", "gates"),
        helper=True,
    ),
    Case(sample_partners, {"key": Arg("key"), "labels": Arg("labels", (6,))}, helper=True),
    Case(
        gate_entropy, {"gates": Arg("probabilities", (4, 3)), "where": Arg("where", (4,))}, wrt=("gates",), helper=True
    ),
    Case(
        gates_of,
        {"key": Arg("key"), "a": Arg("labels", (6,)), "b": Arg("labels", (6,))},
        covers=("contrastive.pair_gate", "contrastive.class_relations"),
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)

"""Matryoshka losses against the loop over prefixes, the cascade of classifiers, and search from coarse to fine."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import (
    adaptive_classify,
    funnel_search,
    matryoshka_contrastive_loss,
    matryoshka_head,
    matryoshka_loss,
    mean_average_precision,
    nesting_dims,
    prefix_search,
    retrieval_cost,
    tune_thresholds,
)

rng = np.random.default_rng(0)
DIMS = (1, 2, 4)


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True))


def info_nce_oracle(a, b, temperature, where):
    terms, rows = np.zeros(len(a)), np.flatnonzero(where)
    for i in rows:
        scores = [unit(a[i]) @ unit(b[j]) / temperature for j in rows]
        terms[i] = np.log(np.sum(np.exp(scores))) - unit(a[i]) @ unit(b[i]) / temperature
    return terms


def test_contrastive_loss_equals_the_loop_over_prefixes():
    a, b, where = rng.normal(size=(7, 4)), rng.normal(size=(7, 4)), np.array([1, 1, 0, 1, 1, 1, 1], bool)
    weights = (0.5, 1.0, 2.0)
    expected = sum(c * info_nce_oracle(a[:, :m], b[:, :m], 0.3, where) for c, m in zip(weights, DIMS, strict=True))
    options = {"dims": DIMS, "weights": weights, "temperature": 0.3, "where": where}
    single = jnp.float32(a), jnp.float32(b)
    got = matryoshka_contrastive_loss(*single, reduction="none", **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(matryoshka_contrastive_loss(*single, **options), expected.sum() / 6, rtol=1e-5)
    # The length of a prefix of one example leaves the term of this prefix alone.
    scaled = a.copy()
    scaled[:, :2] *= rng.uniform(0.5, 2, (7, 1))
    one = [matryoshka_contrastive_loss(jnp.float32(x), single[1], dims=(2,)) for x in (a, scaled)]
    np.testing.assert_allclose(*one, rtol=1e-5)


def test_any_loss_of_any_number_of_embeddings():
    x, y = rng.normal(size=(2, 3, 4))
    loss = lambda a, b: jnp.mean((a - b) ** 2)
    got = matryoshka_loss(loss, jnp.float32(x), jnp.float32(y), dims=DIMS, weights=jnp.float32([1, 0, 3]))
    expected = np.mean((x[:, :1] - y[:, :1]) ** 2) + 3 * np.mean((x - y) ** 2)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    got = matryoshka_loss(loss, jnp.float32(x), jnp.float32(y), dims=(2,), normalize=True)
    np.testing.assert_allclose(got, np.mean((unit(x[:, :2]) - unit(y[:, :2])) ** 2), rtol=1e-5)
    np.testing.assert_allclose(matryoshka_loss(jnp.sum, jnp.float32(x), dims=(4,)), x.sum(), rtol=1e-5)


def test_a_coordinate_learns_from_the_prefixes_that_hold_it_only():
    z = jnp.float32(rng.normal(size=(3, 4)))
    grad = jax.grad(lambda z, c: matryoshka_loss(lambda p: jnp.sum(p**3), z, dims=DIMS, weights=c))
    only = grad(z, jnp.float32([0, 1, 0]))
    assert np.all(only[:, :2] != 0) and not np.any(only[:, 2:])
    np.testing.assert_allclose(grad(z, jnp.ones(3)), 3 * z**2 * jnp.array([[3.0, 2.0, 1.0, 1.0]]), rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_equal_their_slices(tied):
    head = matryoshka_head(3, dims=DIMS, tied=tied)
    params = jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape)), head.init(jax.random.key(0), 4))
    z = rng.normal(size=(5, 4))
    got = head.apply(params, jnp.float32(z))
    for i, m in enumerate(DIMS):
        own = {"w": params["w"][:m], "b": params["b"]} if tied else params[f"head_{m}"]
        np.testing.assert_allclose(got[i], z[:, :m] @ np.asarray(own["w"]) + np.asarray(own["b"]), atol=1e-5)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cascade_oracle(logits, thresholds, dims):
    labels, used = [], []
    for n in range(logits.shape[1]):
        m = 0
        while m < len(dims) - 1 and softmax(logits[m, n]).max() < thresholds[m]:
            m += 1
        labels.append(logits[m, n].argmax())
        used.append(dims[m])
    return labels, used


def test_cascade_equals_the_loop_and_its_thresholds_keep_the_accuracy():
    labels = rng.integers(0, 4, 200)
    signal = np.eye(4)[labels]
    logits = np.stack([c * signal + rng.normal(size=(200, 4)) for c in (1.0, 2.0, 4.0)])
    for thresholds in ([0.6, 0.8], [0.0, 0.5], [1.1, 1.1]):
        got = adaptive_classify(jnp.float32(logits), jnp.float32(thresholds), dims=DIMS)
        expected = cascade_oracle(logits, thresholds, DIMS)
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_array_equal(got[1], expected[1])
    assert np.all(adaptive_classify(jnp.float32(logits), jnp.zeros(2), dims=DIMS)[1] == 1)
    assert np.all(adaptive_classify(jnp.float32(logits), jnp.full(2, 1.1), dims=DIMS)[1] == 4)
    full = np.mean(logits[-1].argmax(-1) == labels)
    tuned = tune_thresholds(logits, labels)
    predicted, used = cascade_oracle(logits, tuned, DIMS)
    assert np.mean(predicted == labels) >= full and np.mean(used) < 4
    loose = tune_thresholds(logits, labels, target=0.5)
    assert np.mean(cascade_oracle(logits, loose, DIMS)[1]) < np.mean(used)
    assert tune_thresholds(logits, labels, target=1.1).tolist() == [2.0, 2.0]


def search_oracle(query, rows, schedule):
    found = []
    for q in query:
        chosen = list(range(len(rows)))
        for k, m in schedule:
            chosen = sorted(chosen, key=lambda j, m=m: -float(unit(q[:m]) @ unit(rows[j, :m])))[:k]
        found.append(chosen)
    return found


@pytest.mark.parametrize("schedule", [((6, 2), (3, 4)), ((5, 4), (5, 4)), ((12, 1), (4, 4)), ((8, 1), (4, 2), (2, 4))])
def test_search_equals_the_loop(schedule):
    query, rows = rng.normal(size=(5, 4)), rng.normal(size=(12, 4))
    got = funnel_search(jnp.float32(query), jnp.float32(rows), schedule=schedule)
    np.testing.assert_array_equal(got, search_oracle(query, rows, schedule))
    if schedule[0][0] == 12:  # nothing is lost by a shortlist of everything
        exact = prefix_search(jnp.float32(query), jnp.float32(rows), dim=4, k=4)
        np.testing.assert_array_equal(got, exact)


def test_rows_that_do_not_exist_are_not_found():
    query, rows = rng.normal(size=(3, 4)), rng.normal(size=(6, 4))
    where = np.array([0, 1, 1, 0, 0, 0], bool)
    dirty = jnp.float32(np.where(where[:, None], rows, np.nan))
    got = np.asarray(funnel_search(jnp.float32(query), dirty, schedule=((5, 2), (3, 4)), where=where))
    assert np.all(got[:, 2] == -1) and np.all(np.sort(got[:, :2]) == [1, 2])
    assert np.all(prefix_search(jnp.float32(query), dirty, dim=2, k=2, where=np.zeros(6, bool)) == -1)


def test_sizes_costs_and_precision():
    assert nesting_dims(2048) == (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert nesting_dims(100, smallest=30) == (30, 60, 100) and nesting_dims(5, smallest=5) == (5,)
    assert retrieval_cost(10, ((4, 2),)) == 20 and retrieval_cost(10, ((4, 2), (3, 8), (1, 16))) == 20 + 32 + 48
    found, labels = rng.integers(0, 2, (5, 4)), rng.integers(0, 2, 5)
    expected = []
    for row, label in zip(found, labels, strict=True):
        hits = [int(v == label) for v in row]
        expected.append(np.mean([hits[j] * np.mean(hits[: j + 1]) for j in range(4)]))
    np.testing.assert_allclose(
        mean_average_precision(jnp.asarray(found), jnp.asarray(labels)), np.mean(expected), rtol=1e-6
    )
    assert mean_average_precision(jnp.ones((2, 3), int), jnp.ones(2, int)) == 1
    assert mean_average_precision(jnp.full((1, 3), -1), jnp.array([-1])) == 0


def test_refuses():
    x = jnp.ones((3, 4))
    with pytest.raises(ValueError, match=r"dims=\(2, 5\)"):
        matryoshka_loss(jnp.sum, x, dims=(2, 5))
    with pytest.raises(ValueError, match="embeddings are missing"):
        matryoshka_loss(jnp.sum, dims=(2,))
    with pytest.raises(ValueError, match="weights has shape"):
        matryoshka_contrastive_loss(x, x, dims=(2, 4), weights=(1.0,))
    with pytest.raises(ValueError, match="one shape"):
        matryoshka_contrastive_loss(x, x[:2], dims=(2,))
    with pytest.raises(ValueError, match="smallest=9"):
        nesting_dims(8, smallest=9)
    with pytest.raises(ValueError, match="must ascend"):
        matryoshka_head(3, dims=(4, 2))
    with pytest.raises(ValueError, match="logits has shape"):
        adaptive_classify(jnp.ones((2, 3, 4)), jnp.ones(2), dims=DIMS)
    with pytest.raises(ValueError, match="thresholds has shape"):
        adaptive_classify(jnp.ones((3, 3, 4)), jnp.ones(3), dims=DIMS)
    with pytest.raises(ValueError, match="must be"):
        tune_thresholds(np.ones((2, 3, 4)), np.ones(2))
    with pytest.raises(ValueError, match=r"\(5, 2\)"):
        prefix_search(x, x, dim=2, k=5)
    with pytest.raises(ValueError, match="never more than before"):
        funnel_search(x, x, schedule=((1, 2), (2, 4)))
    with pytest.raises(ValueError, match="where has shape"):
        funnel_search(x, x, schedule=((1, 2),), where=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="found"):
        mean_average_precision(jnp.ones((2, 3), int), jnp.ones(3, int))


def loss_case(z, targets):
    return matryoshka_loss(lambda a, b: jnp.mean((a - b) ** 2, dtype=jnp.promote_types(a.dtype, jnp.float32)),
                           z, targets, dims=DIMS, normalize=True)  # fmt: skip


def head_case(z):
    head = matryoshka_head(3, dims=DIMS, tied=True)
    params = jax.tree.map(lambda a: a.astype(z.dtype), head.init(jax.random.key(0), 4))
    return jnp.moveaxis(head.apply(params, z), 1, 0)


def precision_case(found, labels):
    return mean_average_precision(found, labels)


def sizes_case(x):
    dims = nesting_dims(4, smallest=1)
    return np.append(x, [*dims, retrieval_cost(10, ((4, 2),))])


SEARCH = {"query": Arg("embeddings", (5, 4)), "database": Arg("embeddings", (6, 4)), "where": Arg("where", (6,))}
CASES = [
    Case(
        matryoshka_contrastive_loss,
        {"a": Arg("embeddings", (6, 4)), "b": Arg("embeddings", (6, 4)), "where": Arg("where", (6,))},
        static={"dims": (2, 4)},
        wrt=("a", "b"),
        rows={"a": 0, "b": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(
        loss_case,
        {"z": Arg("embeddings", (6, 4)), "targets": Arg("embeddings", (6, 4))},
        wrt=("z", "targets"),
        rows={"z": 0, "targets": 0},
        symmetry="invariant",
        name="matryoshka_loss",
        covers=("contrastive.matryoshka_loss",),
        helper=True,
    ),
    Case(head_case, {"z": Arg("embeddings", (6, 4))}, wrt=("z",), rows={"z": 0}, symmetry="equivariant",
         name="matryoshka_head", covers=("contrastive.matryoshka_head",), helper=True),
    Case(
        adaptive_classify,
        {"logits": Arg("scores", (3, 6, 4)), "thresholds": Arg("probabilities", (2,))},
        static={"dims": DIMS},
        reason="labels and sizes have no gradient",
        helper=True,
    ),
    Case(prefix_search, SEARCH, static={"dim": 2, "k": 3}, reason="indices have no gradient", helper=True),
    Case(funnel_search, SEARCH, static={"schedule": ((4, 2), (3, 4))}, reason="indices have no gradient", helper=True),
    Case(precision_case, {"found": Arg("labels", (6, 4)), "labels": Arg("labels", (6,))},
         name="mean_average_precision", covers=("contrastive.mean_average_precision",), helper=True),
    Case(tune_thresholds, {"logits": Arg("scores", (3, 6, 4)), "labels": Arg("labels", (6,), 4)}, host=True),
    Case(sizes_case, {"x": Arg("scores", (2,))}, host=True, name="nesting_dims",
         covers=("contrastive.nesting_dims", "contrastive.retrieval_cost")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

"""FACILE: set losses against loops, sets and episodes against their definitions, classifiers against scikit-learn."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import mil
from jaxlab.ops.layers import mlp

rng = np.random.default_rng(0)
S, A, D = 3, 4, 5
KEEP = np.arange(A)[None, :] < np.array([4, 2, 1])[:, None]
X = np.where(KEEP[..., None], rng.normal(size=(S, A, D)), np.nan).astype(np.float32)
ENCODER = mlp([6])


def softmax(s):
    e = np.exp(s - s.max())
    return e / e.sum()


def drawn(layer, size):
    """Parameters of the right shapes, away from their start, where biases are 0."""
    shapes = jax.eval_shape(lambda key: layer.init(key, size), jax.random.key(0))
    return jax.tree.map(lambda v: np.float32(0.6 * rng.normal(size=v.shape)), shapes)


def linear(p, x):
    return x @ p["w"] + p["b"]


def set_oracle(p, x, pool):
    h = np.array([linear(p["inner"]["dense_0"], linear(p["encoder"]["dense_0"], row)) for row in x])
    if pool == "mean":
        z = h.mean(0)
    elif pool == "max":
        z = h.max(0)
    else:
        z = softmax(np.array([linear(p["score"], row)[0] for row in h])) @ h
    z = linear(p["outer"]["dense_1"], np.maximum(linear(p["outer"]["dense_0"], z), 0))
    return z, linear(p["head"], z)


@pytest.mark.parametrize("pool", ["mean", "max", "attention"])
def test_loss_equals_the_loop_in_both_layouts(pool):
    model = mil.deepsets(3, inner=[4], outer=[4, 3], pool=pool)
    params = {"encoder": drawn(ENCODER, D), "model": drawn(model, 6)}
    y = np.array([2, 0, -1])
    order = rng.permutation(S * A)
    ids = np.where(KEEP, np.arange(S)[:, None], -1).reshape(-1)[order]
    padded = {"x": X, "y": y, "where": KEEP}
    listed = {"x": X.reshape(-1, D)[order], "y": y, "segment_ids": ids}
    got = jax.jit(lambda p: [mil.facile_loss(p, b, encoder=ENCODER, model=model) for b in (padded, listed)])(params)
    wide = jax.tree.map(np.float64, {**params["model"], "encoder": params["encoder"]})
    terms = [-np.log(softmax(set_oracle(wide, X[s][KEEP[s]].astype(np.float64), pool)[1]))[y[s]] for s in range(2)]
    np.testing.assert_allclose(got, [np.mean(terms)] * 2, rtol=1e-5)


def supcon_oracle(z, labels, t):
    z = z / np.sqrt((z * z).sum(1, keepdims=True))
    terms = []
    for i in range(len(z)):
        same = [a for a in range(len(z)) if a != i and labels[a] == labels[i]]
        if labels[i] >= 0 and same:
            log_sum = np.log(sum(np.exp(z[i] @ z[b] / t) for b in range(len(z)) if b != i))
            terms.append(-np.mean([z[i] @ z[a] / t - log_sum for a in same]))
    return np.mean(terms)


def test_contrastive_loss_of_two_views_equals_the_loop():
    model = mil.deepsets(3)
    params = {"encoder": drawn(ENCODER, D), "model": drawn(model, 6)}
    x, other = rng.normal(size=(2, 4, A, D)).astype(np.float32)
    labels = np.array([0, 1, 0, -1])
    nets = {"encoder": ENCODER, "model": model, "objective": "supcon", "temperature": 0.3}
    batch = {"x": x, "x_other": other, "y": labels}
    got = jax.jit(lambda p: mil.facile_loss(p, batch, **nets))(params)
    encode = lambda v: linear(jax.tree.map(np.float64, params["encoder"]["dense_0"]), v.astype(np.float64)).mean(1)
    z = np.concatenate([encode(x), encode(other)])
    np.testing.assert_allclose(got, supcon_oracle(z, np.tile(labels, 2), 0.3), rtol=1e-5)


def test_sets_follow_their_rule_and_ties_are_even():
    labels = rng.integers(0, 5, 60)
    coarse = [0, 0, 1, 2, 2]
    draw = jax.jit(lambda key, rule: mil.make_sets(key, labels, coarse, num_sets=3000, set_size=3, rule=rule),
                   static_argnums=1)  # fmt: skip
    index, got = (np.asarray(a) for a in draw(jax.random.key(0), "majority"))
    tied = []
    for row, label in zip(index, got, strict=True):
        counts = np.bincount(np.array(coarse)[labels[row]], minlength=3)
        assert counts[label] == counts.max()
        if (counts == 1).all():
            tied.append(label)
    assert np.abs(np.bincount(tied, minlength=3) / len(tied) - 1 / 3).max() < 0.08
    index, got = (np.asarray(a) for a in draw(jax.random.key(1), "distinct"))
    assert [len(set(np.array(coarse)[labels[row]])) - 1 for row in index] == got.tolist()


def test_episodes_are_disjoint_and_of_one_class_a_row():
    labels = np.concatenate([np.repeat(np.arange(5), 8), np.full(3, 5), [-1] * 4])  # class 5 has too few
    options = {"num_classes": 6, "ways": 3, "shots": 2, "queries": 4}
    draw = jax.jit(jax.vmap(lambda key: mil.few_shot_episode(key, labels, **options)))
    support, query = (np.asarray(a) for a in draw(jax.random.split(jax.random.key(0), 100)))
    seen = set()
    for s, q in zip(support, query, strict=True):
        both = np.concatenate([s, q], axis=1)
        assert len(np.unique(both)) == both.size
        classes = labels[both]
        assert (classes == classes[:, :1]).all() and len(set(classes[:, 0])) == 3
        seen |= set(classes[:, 0])
    assert seen == set(range(5))


def test_classifiers_equal_scikit_learn():
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neighbors import NearestCentroid

    x, q, y = rng.normal(size=(12, 6)), rng.normal(size=(9, 6)), np.repeat(np.arange(3), 4)
    unit = lambda a: a / np.sqrt((a * a).sum(1, keepdims=True))
    fit = jax.jit(
        lambda x, q: {
            kind: mil.few_shot_logits(x, y, q, num_classes=3, classifier=kind, strength=0.5)
            for kind in ("mean", "ridge", "logistic")
        }
    )
    got = jax.tree.map(np.asarray, fit(jnp.float32(5 * x), jnp.float32(q)))
    np.testing.assert_array_equal(got["mean"].argmax(1), NearestCentroid().fit(unit(x), y).predict(unit(q)))
    ridge = Ridge(alpha=0.5).fit(unit(x), np.eye(3)[y]).predict(unit(q))
    np.testing.assert_allclose(got["ridge"], ridge, rtol=1e-3, atol=1e-4)
    probs = LogisticRegression(C=2.0, tol=1e-10, max_iter=1000).fit(unit(x), y).predict_proba(unit(q))
    np.testing.assert_allclose([softmax(z) for z in got["logistic"]], probs, rtol=1e-2, atol=1e-3)


def test_accuracy_and_slope():
    labels = np.repeat(np.arange(4), 10)
    features = (np.eye(4)[labels] * 3 + rng.normal(size=(40, 4))).astype(np.float32)
    options = {"num_classes": 4, "ways": 3, "shots": 3, "queries": 5, "episodes": 50}
    key = jax.random.key(0)
    mean, half = jax.jit(lambda f: mil.evaluate_few_shot(key, f, labels, **options))(features)
    right = []
    sizes = {n: options[n] for n in ("num_classes", "ways", "shots", "queries")}
    draw = jax.vmap(lambda k: mil.few_shot_episode(k, labels, **sizes))
    unit = features / np.sqrt((features**2).sum(1, keepdims=True))
    for s, q in zip(*map(np.asarray, jax.jit(draw)(jax.random.split(key, 50))), strict=True):
        centres = unit[s].mean(1)
        hits = [np.argmin(((v - centres) ** 2).sum(1)) == w for w in range(3) for v in unit[q[w]]]
        right.append(np.mean(hits))
    np.testing.assert_allclose(mean, np.mean(right), rtol=1e-5)
    np.testing.assert_allclose(half, 1.96 * np.std(right) / 50**0.5, rtol=1e-4)
    n, risk = np.array([10.0, 30.0, 90.0]), np.array([0.5, 0.2, 0.04])
    slope = mil.rate_slope(jnp.float32(n), jnp.float32(risk))
    np.testing.assert_allclose(slope, np.polyfit(np.log(n), np.log(risk), 1)[0], rtol=1e-5)


def test_refuses():
    z, y = jnp.ones((4, 3)), jnp.zeros(4, int)
    with pytest.raises(ValueError, match="pool='sum'"):
        mil.deepsets(2, pool="sum")
    with pytest.raises(ValueError, match="objective='simclr'"):
        mil.facile_loss({}, {}, encoder=ENCODER, model=mil.deepsets(2), objective="simclr")
    with pytest.raises(ValueError, match="embeddings and labels must be"):
        mil.set_supcon_loss(z, y[:2])
    with pytest.raises(ValueError, match="rule='mean'"):
        mil.make_sets(jax.random.key(0), y, [0], num_sets=2, set_size=2, rule="mean")
    with pytest.raises(ValueError, match="ways=3 must be at most num_classes=2"):
        mil.few_shot_episode(jax.random.key(0), y, num_classes=2, ways=3, shots=1, queries=1)
    with pytest.raises(ValueError, match="classifier='svm'"):
        mil.few_shot_logits(z, y, z, num_classes=2, classifier="svm")
    with pytest.raises(ValueError, match="M >= 2"):
        mil.rate_slope(jnp.ones(1), jnp.ones(1))
    with pytest.raises(ValueError, match="episodes=0"):
        mil.evaluate_few_shot(jax.random.key(0), z, y, num_classes=2, episodes=0)


MODEL = mil.deepsets(3, outer=[4], pool="attention")
PARAMS = {"encoder": drawn(ENCODER, D), "model": drawn(MODEL, 6)}


def set_case(x, where):
    return MODEL.apply(PARAMS["model"], x, where=where)


def loss_case(x, where, labels):
    return mil.facile_loss(PARAMS, {"x": x, "where": where, "y": labels}, encoder=ENCODER, model=MODEL)


ONLY_A_KEY = dict.fromkeys(("extremes", "dtype"), "the only input is a key")
SHARED_CASTS = {"dtype": "the casts are outside of the classifiers, and tested with the first"}
CASES = [
    Case(set_case, {"x": Arg("embeddings", (3, 6, 6)), "where": Arg("where", (3, 6))}, wrt=("x",), name="deepsets",
         helper=True, covers=("mil.deepsets",)),
    Case(loss_case, {"x": Arg("embeddings", (3, 6, D)), "where": Arg("where", (3, 6)),
         "labels": Arg("labels", (3,))}, wrt=("x",), rows={"x": 1, "where": 1}, symmetry="invariant",
         name="facile_loss", covers=("mil.facile_loss",)),
    Case(mil.set_supcon_loss, {"embeddings": Arg("embeddings", (6, 4)), "labels": Arg("labels", (6,), high=2),
         "where": Arg("where", (6,))}, static={"temperature": 0.5}, wrt=("embeddings",),
         rows={"embeddings": 0, "labels": 0, "where": 0}, symmetry="invariant"),
    Case(lambda key: mil.make_sets(key, np.arange(9) % 3, [0, 1, 1], num_sets=4, set_size=3), {"key": Arg("key")},
         helper=True, name="make_sets", covers=("mil.make_sets",), skip=ONLY_A_KEY),
    Case(lambda key: mil.few_shot_episode(key, np.arange(9) % 3, num_classes=3, ways=2, shots=1, queries=2),
         {"key": Arg("key")}, helper=True, name="few_shot_episode", covers=("mil.few_shot_episode",), skip=ONLY_A_KEY),
    *(Case(mil.few_shot_logits, {"support": Arg("embeddings", (6, 4)), "labels": Arg("labels", (6,)),
           "query": Arg("embeddings", (5, 4))}, static={"num_classes": 3, "classifier": kind}, helper=True,
           wrt=("support", "query"), name=f"few_shot_logits, {kind}", skip=skip) for kind, skip in (
               ("mean", {}), ("ridge", SHARED_CASTS), ("logistic", SHARED_CASTS))),
    Case(lambda key, features: mil.evaluate_few_shot(key, features, np.arange(12) % 3, num_classes=3, ways=2, shots=1,
         queries=3, episodes=4), {"key": Arg("key"), "features": Arg("embeddings", (12, 3))}, helper=True,
         reason="an accuracy has no gradient", name="evaluate_few_shot", covers=("mil.evaluate_few_shot",),
         skip={"dtype": "an accuracy has the dtype of accumulation, and bfloat16 features may be judged otherwise"}),
    Case(mil.rate_slope, {"sizes": Arg("weights", (4,)), "excess": Arg("weights", (4,))}, wrt=("excess",),
         helper=True),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

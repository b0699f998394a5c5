"""The bag classifiers against loops over bags, and their two layouts against each other."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import mil
from jaxlab.ops.layers import mlp

rng = np.random.default_rng(0)
D = 4
KEEP = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], bool)
X = rng.normal(size=(4, 5, D)).astype(np.float32)
MODELS = {
    "abmil": mil.abmil(2, hidden=6),
    "gated": mil.abmil(2, hidden=6, gated=True),
    "mean_mil": mil.mean_mil(2),
    "max_mil": mil.max_mil(2),
    "mi_net": mil.mi_net(2),
    "dsmil": mil.dsmil(2, hidden=6),
    "transmil": mil.transmil(2, heads=2),
    "hopfield_mil": mil.hopfield_mil(2, hidden=6, beta=1.5, steps=2),
    "encoded": mil.with_encoder(mlp([5, 3]), mil.abmil(2, hidden=4)),
}


def started(name):
    """Parameters of the right shapes, away from their start, where biases are 0."""
    shapes = jax.eval_shape(lambda key: MODELS[name].init(key, D), jax.random.key(0))
    return jax.tree.map(lambda v: np.float32(0.6 * rng.normal(size=v.shape)), shapes)


def softmax(s):
    e = np.exp(s - s.max())
    return e / e.sum()


def linear(p, x):
    return x @ p["w"] + p.get("b", 0.0)


def layer_norm(p, u):
    return (u - u.mean()) / np.sqrt(u.var() + 1e-5) * p["gain"] + p["bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def attention_oracle(p, x, gated=False):
    scores = []
    for h in x:
        inner = np.tanh(linear(p["hidden"], h)) * (sigmoid(linear(p["gate"], h)) if gated else 1.0)
        scores.append(linear(p["score"], inner)[0])
    z = softmax(np.array(scores)) @ x if len(x) else np.zeros(x.shape[1])
    return linear(p["head"], z)


def dsmil_oracle(p, x):
    scores = x @ p["instance"]["w"]
    top = scores.max(0) if len(x) else np.zeros(2)
    q = np.array([np.tanh(linear(p["outer"], np.maximum(linear(p["inner"], h), 0))) for h in x])
    z = np.zeros((2, x.shape[1]))
    for c in range(2):
        if len(x):
            critical = q[scores[:, c].argmax()]
            z[c] = softmax(np.array([a @ critical / np.sqrt(6) for a in q])) @ x
    return (top + p["instance"]["b"] + linear(p["head"], z.reshape(-1))) / 2


def transmil_oracle(p, x):
    u = [p["token"], *x]
    for i in range(2):
        layer = p[f"layer_{i}"]
        qkv = [linear(layer["qkv"], layer_norm(layer["norm"], a)).reshape(3, 2, D // 2) for a in u]
        new = []
        for a in range(len(u)):
            heads = []
            for h in range(2):
                s = softmax(np.array([qkv[a][0, h] @ b[1, h] for b in qkv]) / np.sqrt(D // 2))
                heads.append(sum(w * b[2, h] for w, b in zip(s, qkv, strict=True)))
            new.append(u[a] + linear(layer["out"], np.concatenate(heads)))
        u = new
    return linear(p["head"], layer_norm(p["norm"], u[0]))


def hopfield_oracle(p, x):
    keys, values, q = x @ p["keys"]["w"], x @ p["values"]["w"], p["query"]
    if not len(x):
        return p["head"]["b"]
    q = softmax(1.5 * keys @ q) @ keys
    return linear(p["head"], softmax(1.5 * keys @ q) @ values)


def encoded_oracle(p, x):
    e = p["encoder"]
    h = [linear(e["dense_1"], np.maximum(linear(e["dense_0"], a), 0)) for a in x]
    return attention_oracle(p["model"], np.array(h).reshape(-1, 3))


ORACLES = {
    "abmil": attention_oracle,
    "gated": lambda p, x: attention_oracle(p, x, gated=True),
    "mean_mil": lambda p, x: linear(p["head"], x.mean(0) if len(x) else np.zeros(D)),
    "max_mil": lambda p, x: linear(p["head"], x.max(0) if len(x) else np.zeros(D)),
    "mi_net": lambda p, x: (np.max([h @ p["head"]["w"] for h in x], 0) if len(x) else 0.0) + p["head"]["b"],
    "dsmil": dsmil_oracle,
    "transmil": transmil_oracle,
    "hopfield_mil": hopfield_oracle,
    "encoded": encoded_oracle,
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_loop_and_both_layouts_agree(name):
    """With NaN under the padding; parameters' gradients agree as well, and weights sum to 1."""
    params, model = started(name), MODELS[name]
    dirty = np.where(KEEP[..., None], X, np.float32(np.nan))
    order = rng.permutation(KEEP.size)
    ids = np.where(KEEP, np.arange(4)[:, None], -1).reshape(-1)[order].astype(np.int32)

    def both(params):
        def loss(params, x, **layout):
            out = model.apply(params, x, **layout)
            return jnp.sum(jnp.sin(out["logits"])), out

        forms = jax.value_and_grad(loss, has_aux=True)
        listed = forms(params, dirty.reshape(-1, D)[order], segment_ids=ids, num_segments=4)
        return forms(params, dirty, where=KEEP), listed

    ((_, padded), grads), ((_, listed), listed_grads) = jax.jit(both)(params)
    wide = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    expected = [ORACLES[name](wide, X[b][KEEP[b]].astype(np.float64)) for b in range(4)]
    np.testing.assert_allclose(padded["logits"], expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(listed["logits"], expected, rtol=2e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, listed_grads)
    if "attention" in padded:
        weights = np.asarray(padded["attention"])
        assert not weights[~KEEP].any()
        np.testing.assert_allclose(np.asarray(listed["attention"]), weights.reshape(20, -1).squeeze()[order], atol=1e-6)
        if name != "transmil":  # whose class token attends to itself as well
            np.testing.assert_allclose(weights.sum(1)[KEEP.any(1)], 1, rtol=1e-5)


def test_attention_of_the_class_token_is_that_of_its_first_layer():
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), started("transmil"))
    x = X[0, :3]
    start = jax.tree.map(np.float32, p)
    got = np.asarray(jax.jit(lambda x: MODELS["transmil"].apply(start, x))(x[None])["attention"][0])
    qkv = [linear(p["layer_0"]["qkv"], layer_norm(p["layer_0"]["norm"], a)).reshape(3, 2, 2) for a in (p["token"], *x)]
    for h in range(2):
        expected = softmax(np.array([qkv[0][0, h] @ b[1, h] for b in qkv]) / np.sqrt(2))[1:]
        np.testing.assert_allclose(got[:, h], expected, rtol=1e-4)


def test_equal_instances_pool_to_themselves_and_a_cold_hopfield_network_takes_the_best():
    x = np.broadcast_to(X[0, :1], (1, 5, D))
    equal = jax.jit(MODELS["abmil"].apply)(started("abmil"), x)
    np.testing.assert_allclose(equal["embedding"], x[:, 0], rtol=1e-5)
    params, model = started("hopfield_mil"), mil.hopfield_mil(2, hidden=6, beta=1e4)
    best = int(np.argmax(X[1] @ np.asarray(params["keys"]["w"]) @ np.asarray(params["query"])))
    out = jax.jit(model.apply)(params, X[1:2])
    np.testing.assert_allclose(out["attention"][0], np.eye(5)[best], atol=1e-6)
    np.testing.assert_allclose(out["embedding"][0], X[1, best] @ params["values"]["w"], rtol=1e-5)


def test_dropout_of_the_encoder():
    layer = mil.instance_encoder(400, dropout=0.25)
    model = mil.with_encoder(layer, mil.abmil(2))

    def run(key):
        params = model.init(key, D)
        plain = layer.apply(params["encoder"], X)
        noisy = layer.apply(params["encoder"], X, key=jax.random.key(1), train=True)
        twice = [model.apply(params, X, train=True, key=jax.random.key(i))["logits"] for i in range(2)]
        return params, plain, noisy, twice

    params, plain, noisy, twice = jax.tree.map(np.asarray, jax.jit(run)(jax.random.key(0)))
    assert abs(np.mean(noisy[plain > 0] == 0) - 0.25) < 0.03
    np.testing.assert_allclose(noisy[noisy > 0], plain[noisy > 0] / 0.75, rtol=1e-6)
    assert abs(params["encoder"]["w"].std() / (2 / (400 + D)) ** 0.5 - 1) < 0.1
    assert np.any(twice[0] != twice[1])
    with pytest.raises(ValueError, match="dropout in training needs a key"):
        model.apply(params, X, train=True)


def test_refuses():
    with pytest.raises(ValueError, match="num_classes=0 must be"):
        mil.abmil(0)
    with pytest.raises(ValueError, match="hidden=0 must be"):
        mil.dsmil(2, hidden=0)
    with pytest.raises(ValueError, match="beta=0"):
        mil.hopfield_mil(2, beta=0.0)
    with pytest.raises(ValueError, match="heads=3 must divide"):
        mil.transmil(2, heads=3).init(jax.random.key(0), 4)
    with pytest.raises(ValueError, match=r"dropout=1.0 must be in \[0, 1\)"):
        mil.instance_encoder(dropout=1.0)
    with pytest.raises(ValueError, match="where has shape"):
        MODELS["abmil"].apply(started("abmil"), X, where=KEEP[:2])


def padded_case(name, **options):
    params = started(name)

    def run(x, where):
        out = MODELS[name].apply(params, x, where=where)
        return {n: v for n, v in out.items() if n in ("logits", "embedding")}

    return Case(run, {"x": Arg("embeddings", (3, 6, D)), "where": Arg("where", (3, 6))}, wrt=("x",), name=name,
                rows={"x": 1, "where": 1}, symmetry="invariant", **options)  # fmt: skip


def list_case(name, **options):
    params = started(name)

    def run(x, segment_ids, where):
        out = MODELS[name].apply(params, x, segment_ids=segment_ids, where=where, num_segments=3)
        return {n: v for n, v in out.items() if n in ("logits", "embedding")}

    args = {"x": Arg("embeddings", (8, D)), "segment_ids": Arg("index", (8,)), "where": Arg("where", (8,))}
    return Case(run, args, wrt=("x",), name=f"{name} of a list", rows=dict.fromkeys(args, 0), symmetry="invariant",
                **options)  # fmt: skip


def encoder_case(x, key):
    layer = mil.instance_encoder(3)
    return layer.apply(layer.init(jax.random.key(0), D), x, key=key, train=True)


CASES = [
    padded_case("abmil", covers=("mil.abmil",)),
    padded_case("mean_mil", covers=("mil.mean_mil",), helper=True),
    padded_case("max_mil", covers=("mil.max_mil",), helper=True),
    padded_case("mi_net", covers=("mil.mi_net",), helper=True),
    padded_case("dsmil", covers=("mil.dsmil",), helper=True),
    padded_case("transmil", covers=("mil.transmil",), helper=True),
    padded_case("hopfield_mil", covers=("mil.hopfield_mil",), helper=True),
    list_case("encoded", covers=("mil.with_encoder",)),
    Case(encoder_case, {"x": Arg("embeddings", (5, D)), "key": Arg("key")}, wrt=("x",), helper=True,
         covers=("mil.instance_encoder",), name="instance_encoder"),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

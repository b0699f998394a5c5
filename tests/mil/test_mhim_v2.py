"""MHIM v2: scores, split and recycling against loops, the loss with nothing or everything recycled, the learner."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import mil
from jaxlab.mil.mhim_v2 import _score
from jaxlab.mil.pooling import group
from jaxlab.types import LearnerState

rng = np.random.default_rng(0)
B, N, D, K = 3, 10, 4, 2
KEEP = np.arange(N)[None, :] < np.array([10, 5, 1])[:, None]
X = np.where(KEEP[..., None], rng.normal(size=(B, N, D)), np.nan).astype(np.float32)
ORDER = rng.permutation(B * N)
LIST = {
    "segment_ids": np.where(KEEP, np.arange(B)[:, None], -1).reshape(-1)[ORDER].astype(np.int32),
    "num_segments": B,
}


def softmax(s):
    e = np.exp(s - s.max())
    return e / e.sum()


def drawn(init, *sizes):
    """Parameters of the right shapes, away from their start, where biases are 0."""
    shapes = jax.eval_shape(lambda key: init(key, *sizes), jax.random.key(0))
    return jax.tree.map(lambda v: np.float32(0.6 * rng.normal(size=v.shape)), shapes)


def test_scores_equal_the_loop():
    attention, h, w = rng.random((B, N)), rng.normal(size=(B, N, D)), rng.normal(size=(D, 3))
    expected = np.zeros((B, N))
    for b, i in np.argwhere(KEEP):
        expected[b, i] = softmax(attention[b, i] * h[b, i] @ w).max()
    score = jax.jit(mil.class_aware_score)
    got = score(jnp.float32(attention), jnp.float32(h), jnp.float32(w), where=KEEP)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got[KEEP].min() >= 1 / 3
    # A constant on every class's weights cancels.
    shifted = score(jnp.float32(attention), jnp.float32(h), jnp.float32(w + rng.normal(size=(D, 1))), where=KEEP)
    np.testing.assert_allclose(shifted, got, rtol=1e-4)
    heads, values = rng.random((N, 2)), rng.normal(size=(N, 2, 3))
    out = {"w": np.float32(rng.normal(size=(6, D))), "b": np.float32(rng.normal(size=D))}
    got = jax.jit(mil.class_aware_score_multihead)(jnp.float32(heads), jnp.float32(values), out, jnp.float32(w))
    for i in range(N):
        share = np.concatenate([heads[i, h] * values[i, h] for h in range(2)]) @ out["w"] + out["b"]
        np.testing.assert_allclose(got[i], softmax(share @ w).max(), rtol=1e-5)


def test_split_covers_and_counts():
    flat = KEEP.reshape(-1)[ORDER]

    def every_form(key):
        padded = [mil.recycle_split(KEEP, keep_ratio=ratio, key=key) for ratio in (0.8, 0.0, 1.0)]
        listed = mil.recycle_split(flat, keep_ratio=0.8, key=key, **LIST)
        return padded, listed, mil.recycle_split(np.ones((1, 100), bool), keep_ratio=0.29, key=key)[0]

    padded, (kept, rest), half = jax.tree.map(np.asarray, jax.jit(every_form)(jax.random.key(0)))
    for (first, second), number in zip(padded, ([8, 4, 0], [0, 0, 0], [10, 5, 1]), strict=True):
        assert not np.any(first & second)
        np.testing.assert_array_equal(first | second, KEEP)
        np.testing.assert_array_equal(first.sum(1), number)
    np.testing.assert_array_equal(kept | rest, flat)
    np.testing.assert_array_equal(np.bincount(LIST["segment_ids"][kept], minlength=3), [8, 4, 0])
    assert half.sum() == 29  # 100 * 0.29 is below 29 in binary


RECYCLING = mil.global_recycling(K, heads=2, head_size=3, dropout=0.0)
MERGE, QUERY = drawn(RECYCLING.init, D)


def layer_norm(p, u):
    return (u - u.mean()) / np.sqrt(u.var() + 1e-5) * p["gain"] + p["bias"]


def recycle_oracle(p, query, x):
    tokens = []
    for q in query:
        q = layer_norm(p["norm"], q) @ p["query"]["w"]
        pairs = [layer_norm(p["norm"], u) @ p["pair"]["w"] for u in x]
        heads = []
        for h in range(2):
            part = slice(3 * h, 3 * h + 3)
            if not len(x):
                heads.append(np.zeros(3))
                continue
            a = softmax(np.array([q[part] @ pair[:6][part] for pair in pairs]) / np.sqrt(3))
            heads.append(sum(w * pair[6:][part] for w, pair in zip(a, pairs, strict=True)))
        tokens.append(np.concatenate(heads) @ p["out"]["w"] + p["out"]["b"])
    return np.array(tokens)


def test_recycling_equals_the_loop_and_its_query_has_no_gradient():
    keep = KEEP.copy()
    keep[2] = False

    def run(params, query):
        padded, _ = RECYCLING.apply(params, query, X, where=keep)
        flat = X.reshape(-1, D)[ORDER]
        listed, _ = RECYCLING.apply(params, query, flat, where=keep.reshape(-1)[ORDER], **LIST)
        return jnp.sum(padded**2), (padded, listed)

    (_, got), grads = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(MERGE, QUERY)
    wide, query = (jax.tree.map(np.float64, t) for t in (MERGE, QUERY["query"]))
    expected = [recycle_oracle(wide, query, X[b][keep[b]].astype(np.float64)) for b in range(B)]
    for form in got:
        np.testing.assert_allclose(form, expected, rtol=1e-4, atol=1e-5)
    assert not np.any(grads[1]["query"]) and np.any(grads[0]["query"]["w"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(got[0][2], np.broadcast_to(MERGE["out"]["b"], (K, D)))  # nothing to recycle
    with pytest.raises(ValueError, match="dropout in training needs a key"):
        mil.global_recycling(K).apply(MERGE, QUERY, X, train=True)


def test_query_follows_the_mean_of_the_bags_that_have_tokens(mesh8):
    from jax.sharding import PartitionSpec as P

    tokens, where = rng.normal(size=(8, K, D)).astype(np.float32), np.arange(8) < 5
    expected = 0.9 * QUERY["query"] + 0.1 * tokens[:5].mean(0)

    def spread(tokens, where):
        return mil.update_query(QUERY, tokens, where, decay=0.9, axis_name="data")

    mapped = jax.shard_map(spread, mesh=mesh8, in_specs=P("data"), out_specs=P())
    one, many, none = jax.jit(
        lambda t, w: (mil.update_query(QUERY, t, w, decay=0.9), mapped(t, w), mil.update_query(QUERY, t, w & False))
    )(tokens, where)
    np.testing.assert_allclose(one["query"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(many["query"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(none["query"], QUERY["query"])


ENCODER, MODEL = mil.instance_encoder(D, dropout=0.0), mil.abmil(2, hidden=3)
NETS = {"encoder": ENCODER, "model": MODEL, "recycling": RECYCLING}
STUDENT, TEACHER = ({"encoder": drawn(ENCODER.init, D), "model": drawn(MODEL.init, D)} for _ in range(2))
BATCH = {"x": X, "y": np.array([1, 0, -1], np.int32), "where": KEEP}


def attend(p, h):
    a = softmax(np.array([np.tanh(u @ p["hidden"]["w"]) @ p["score"]["w"][:, 0] for u in h]))
    return a, a @ h


@pytest.mark.parametrize("keep_ratio", [1.0, 0.0])
def test_loss_equals_the_loop(keep_ratio):
    """The highest fifth masked; the others all kept, or, as a list, recycled, so that the student sees tokens alone."""
    student, teacher, merge = (jax.tree.map(np.float64, p) for p in (STUDENT, TEACHER, MERGE))
    losses, ties = [], []
    for b in range(B):
        x = X[b][KEEP[b]].astype(np.float64)
        h = np.maximum(x @ teacher["encoder"]["w"] + teacher["encoder"]["b"], 0)
        a, z_t = attend(teacher["model"], h)
        score = [softmax(w * u @ teacher["model"]["head"]["w"]).max() for w, u in zip(a, h, strict=True)]
        number = int(np.ceil(len(x) * 0.2 - 1e-9)) if len(x) > 1 else 0
        hidden = set(np.argsort(-np.array(score), kind="stable")[:number])
        rest = x[[i for i in range(len(x)) if i not in hidden]]
        h = np.maximum(rest @ student["encoder"]["w"] + student["encoder"]["b"], 0)
        h = h if keep_ratio == 1 else recycle_oracle(merge, np.float64(QUERY["query"]), h)
        _, z_s = attend(student["model"], h)
        ties.append(-(softmax(z_t / 0.1) * np.log(softmax(z_s))).sum())
        if BATCH["y"][b] >= 0:
            head = student["model"]["head"]
            losses.append(-np.log(softmax(z_s @ head["w"] + head["b"]))[BATCH["y"][b]])
    flat = {"x": X.reshape(-1, D)[ORDER], "y": BATCH["y"], "segment_ids": LIST["segment_ids"]}
    options = {**NETS, "ratio_high": 0.2, "keep_ratio": keep_ratio, "weight": 0.7, "key": jax.random.key(0)}

    batch = BATCH if keep_ratio else flat
    loss, (metrics, (_, some)) = jax.jit(
        lambda params: mil.mhim_v2_loss({**params, "recycling": MERGE}, TEACHER, QUERY, batch, **options)
    )(STUDENT)
    np.testing.assert_allclose(loss, np.mean(losses) + 0.7 * np.mean(ties), rtol=1e-4)
    assert metrics["kept"] == 0 if keep_ratio == 0 else metrics["kept"] > 0.7
    np.testing.assert_array_equal(some, [keep_ratio == 0] * 3)


def test_learner_advances_student_teacher_and_query():
    learner = mil.mhim_v2(
        ENCODER, MODEL, optax.sgd(0.1), recycling=RECYCLING, keep_ratio=0.5, decay=0.9, query_decay=0.5
    )

    def run(key):
        state = learner.init(key, BATCH)
        new, metrics = learner.update(state, BATCH, key)
        return state, new, metrics, learner.predict(new, BATCH)

    state, new, metrics, outputs = jax.tree.map(np.asarray, jax.jit(run)(jax.random.key(0)))
    assert all(np.isfinite(v) for v in metrics.values()) and 0.2 < metrics["kept"] < 0.6
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((new.params, new.net_state)))
    assert new.step == 1 and np.any(new.net_state["query"]["query"] != state.net_state["query"]["query"])
    own = {n: new.params[n] for n in ("encoder", "model")}
    expected = jax.tree.map(lambda t, s: 0.9 * t + 0.1 * s, state.net_state["teacher"], own)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.net_state["teacher"], expected)
    assert np.any(new.params["recycling"]["query"]["w"] != state.params["recycling"]["query"]["w"])
    np.testing.assert_allclose(outputs["probs"].sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["dsmil", "transmil"])
def test_other_models_are_scored_by_what_they_give(name):
    """The largest instance logit of a dual-stream model; values through the first layer's projection otherwise."""
    model = mil.dsmil(2, hidden=3) if name == "dsmil" else mil.transmil(2, heads=2, depth=1)
    params = drawn(model.init, D)
    h = np.float32(rng.normal(size=(1, 4, D)))
    bags = group(h, None, None, None)

    def run(params, h):
        seen = model.apply(params, h)
        return seen, _score(seen, h, params, bags)

    seen, got = jax.tree.map(np.asarray, jax.jit(run)(params, h))
    for i in range(4):
        if name == "dsmil":
            expected = seen["instance_logits"][0, i].max()
        else:
            share = (seen["attention"][0, i][:, None] * seen["values"][0, i]).reshape(-1)
            out = params["layer_0"]["out"]
            expected = softmax((share @ out["w"] + out["b"]) @ params["head"]["w"]).max()
        np.testing.assert_allclose(got[0, i], expected, rtol=1e-5)
    learner = mil.mhim_v2(ENCODER, model, optax.sgd(0.1), recycling=RECYCLING)
    state, metrics = jax.eval_shape(lambda k: learner.update(learner.init(k, BATCH), BATCH, k), jax.random.key(0))
    assert metrics["loss"].shape == () and state.params["model"].keys() == params.keys()


def test_refuses():
    with pytest.raises(ValueError, match="keep_ratio=2 must be"):
        mil.mhim_v2(ENCODER, MODEL, optax.sgd(0.1), keep_ratio=2)
    with pytest.raises(ValueError, match="num_tokens=0 must be"):
        mil.global_recycling(0)
    with pytest.raises(ValueError, match="dropout=1 must be"):
        mil.global_recycling(2, dropout=1)
    with pytest.raises(ValueError, match="do not fit"):
        mil.class_aware_score(jnp.ones((2, 3)), jnp.ones((2, 3, 4)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="tokens has shape"):
        mil.update_query(QUERY, jnp.ones((2, 3, D)))
    with pytest.raises(ValueError, match=r"expected \[..., H\]"):
        mil.class_aware_score_multihead(jnp.ones((2, 3)), jnp.ones((2, 4, 4)), {}, jnp.ones((3, 2)))


def recycling_case(x, where):
    return RECYCLING.apply(MERGE, QUERY, x, where=where)[0]


LEARNER = mil.mhim_v2(ENCODER, MODEL, optax.sgd(0.1), recycling=RECYCLING)


def learner_case(x, where, labels, key):
    """A step: the metrics of the loss, and parameters that its gradient has moved."""
    student, net_state = {**STUDENT, "recycling": MERGE}, {"teacher": TEACHER, "query": QUERY}
    state = LearnerState(student, net_state, optax.sgd(0.1).init(student), jnp.zeros((), jnp.int32))
    state, metrics = LEARNER.update(state, {"x": x, "where": where, "y": labels}, key)
    return metrics, state.params["model"]["head"], state.params["recycling"]["query"]


def loss_case(x, where, labels, head):
    model = {**STUDENT["model"], "head": {**STUDENT["model"]["head"], "w": head}}
    student = {"encoder": STUDENT["encoder"], "model": model, "recycling": MERGE}
    batch = {"x": x, "where": where, "y": labels}
    return mil.mhim_v2_loss(student, TEACHER, QUERY, batch, **NETS, ratio_high=0.2, key=jax.random.key(0))[0]


OUT = {"w": np.float32(rng.normal(size=(6, D))), "b": np.zeros(D, np.float32)}
CASES = [
    Case(recycling_case, {"x": Arg("embeddings", (3, 6, D)), "where": Arg("where", (3, 6))}, wrt=("x",),
         name="global_recycling", covers=("mil.global_recycling",)),
    Case(mil.class_aware_score, {"attention": Arg("weights", (6,)), "features": Arg("embeddings", (6, D)),
         "head": Arg("activations", (D, 3)), "where": Arg("where", (6,))}, wrt=("attention", "features", "head"),
         rows={"attention": 0, "features": 0, "where": 0}, symmetry="equivariant"),
    Case(lambda attention, values, head: mil.class_aware_score_multihead(attention, values, OUT, head),
         {"attention": Arg("weights", (5, 2)), "values": Arg("embeddings", (5, 2, 3)),
          "head": Arg("activations", (D, 3))}, wrt=("values",), helper=True, name="class_aware_score_multihead",
         covers=("mil.class_aware_score_multihead",)),
    Case(lambda where, key: mil.recycle_split(where, keep_ratio=0.5, key=key),
         {"where": Arg("where", (3, 6)), "key": Arg("key")}, helper=True, name="recycle_split",
         covers=("mil.recycle_split",)),
    Case(lambda query, tokens, where: mil.update_query({"query": query}, tokens, where)["query"],
         {"query": Arg("embeddings", (K, D)), "tokens": Arg("embeddings", (3, K, D)), "where": Arg("where", (3,))},
         frozen=("query", "tokens"), reason="a moving average has no gradient", helper=True, name="update_query",
         covers=("mil.update_query",)),
    Case(loss_case, {"x": Arg("embeddings", (3, 8, D)), "where": Arg("where", (3, 8)),
         "labels": Arg("labels", (3,), high=2), "head": Arg("activations", (D, 2))}, wrt=("head",),
         rows={"x": 1, "where": 1}, covers=("mil.mhim_v2_loss",), name="mhim_v2_loss",
         skip={"dtype": "scores that round differently mask another instance"}),
    Case(learner_case, {"x": Arg("embeddings", (3, 8, D)), "where": Arg("where", (3, 8)),
         "labels": Arg("labels", (3,), high=2), "key": Arg("key")}, reason="metrics", helper=True,
         covers=("mil.mhim_v2",), name="mhim_v2", skip={
         "dtype": "metrics are float32 whatever the data are, and scores that round differently mask others"}),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

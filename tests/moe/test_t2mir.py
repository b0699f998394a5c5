"""The two mixtures and the contrast of routers against loops."""

import math

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe

rng = np.random.default_rng(0)
T, D, E = 7, 6, 4


def test_two_mixtures_side_by_side_equal_the_loop():
    layer = moe.t2mir_ffn(token_experts=3, task_experts=4, token_k=1, task_k=2, token_width=6, task_width=8)
    shapes = jax.eval_shape(lambda key: layer.init(key, D), jax.random.key(0))
    params = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), shapes)
    x = rng.normal(size=(T, D)).astype(np.float32)
    y, plans = jax.jit(layer.apply)(params, x)
    halves = []
    for name in ("token", "task"):
        dense, out = np.asarray(moe.dense_weights(plans[name])), np.zeros((T, D // 2))
        p = jax.tree.map(np.float64, params[name]["experts"])
        for t, e in zip(*np.nonzero(dense), strict=True):
            h = x[t] @ p["up"][e] + p["up_bias"][e]
            out[t] += dense[t, e] * (np.where(h > 0, h, 0.01 * h) @ p["down"][e] + p["down_bias"][e])
        halves.append(out)
    np.testing.assert_allclose(y, np.concatenate(halves, 1), rtol=1e-4, atol=1e-4)


def contrast_oracle(queries, keys, weights, where):
    terms = []
    for v in (0, 1):
        for i in np.flatnonzero(where):
            scores = np.array([queries[v, i] @ weights @ keys[1 - v, j] for j in np.flatnonzero(where)])
            own = queries[v, i] @ weights @ keys[1 - v, i]
            terms.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - own)
    return np.mean(terms) if terms else 0.0


def test_contrast_and_representation_equal_the_loops():
    queries, keys, weights = rng.normal(size=(2, 5, E)), rng.normal(size=(2, 5, E)), rng.normal(size=(E, E))
    loss = jax.jit(moe.router_contrastive_loss)
    for where in (np.ones(5, bool), np.arange(5) < 3, np.zeros(5, bool)):
        dirty = [np.where(where[None, :, None], a, np.nan).astype(np.float32) for a in (queries, keys)]
        got = loss(*dirty, np.float32(weights), where=where)
        np.testing.assert_allclose(got, contrast_oracle(queries, keys, weights, where), rtol=1e-4)
    same = np.ones((2, 5, E), np.float32)
    np.testing.assert_allclose(loss(same, same, np.float32(weights), where=np.ones(5, bool)), math.log(5), rtol=1e-4)
    logits, where = rng.normal(size=(3, 5, E)), rng.random((3, 5)) < 0.7
    where[2] = False
    got = jax.jit(moe.router_representation)(
        np.where(where[:, :, None], logits, np.nan).astype(np.float32), where=where
    )
    for i in range(3):
        rows = [np.exp(z) / np.exp(z).sum() for z in logits[i][where[i]]]
        np.testing.assert_allclose(got[i], np.mean(rows, axis=0) if rows else np.zeros(E), rtol=1e-5)


def test_refuses():
    three = jnp.ones((2, 3, 4))
    for make, match in (
        (lambda: moe.t2mir_ffn(token_k=7), "token_k=7"),
        (lambda: moe.t2mir_ffn(task_width=100), "task_width=100"),
        (lambda: moe.t2mir_ffn().init(jax.random.key(0), 5), "d=5 must be even"),
        (lambda: moe.t2mir_ffn().apply({}, jnp.ones((2, 4)), train=True), "key is needed"),
        (lambda: moe.router_representation(jnp.ones(3)), "logits and where must be"),
        (lambda: moe.router_contrastive_loss(three, three[:1], jnp.eye(4)), "queries and keys must both"),
        (lambda: moe.router_contrastive_loss(three, three, jnp.eye(3)), "weights has shape"),
        (lambda: moe.router_contrastive_loss(three, three, jnp.eye(4), where=jnp.ones(2, bool)), "where has shape"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def contrast(queries, keys, weights, where, axis_name=None):
    return moe.router_contrastive_loss(queries, keys, weights, where=where, axis_name=axis_name)


FFN = moe.t2mir_ffn(token_experts=2, task_experts=3, token_k=1, token_width=4, task_width=6)
PARAMS = jax.tree.map(
    lambda a: np.float32(np.random.default_rng(a.size).normal(size=a.shape)),
    jax.eval_shape(lambda key: FFN.init(key, D), jax.random.key(0)),
)


def both_mixtures(x, where):
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.promote_types(x.dtype, jnp.float32)), PARAMS)
    y, plans = FFN.apply(params, x, where=where)
    return y, moe.router_representation(plans["task"].logits[None], where=where[None]).astype(x.dtype)


VIEW = Arg("embeddings", (2, 6, E))
CASES = [
    Case(contrast, {"queries": VIEW, "keys": VIEW, "weights": Arg("scores", (E, E)), "where": Arg("where", (6,))},
         wrt=("queries", "weights"), frozen=("keys",), rows={"queries": 1, "keys": 1, "where": 0},
         symmetry="invariant", covers=("moe.router_contrastive_loss",)),
    Case(both_mixtures, {"x": Arg("activations", (6, D)), "where": Arg("where", (6,))}, helper=True,
         reason="the gradient is that of layer_experts", covers=("moe.t2mir_ffn", "moe.router_representation")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

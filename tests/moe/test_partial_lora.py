"""Partial updates, couplings and measures of redundancy against loops."""

import math

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe

rng = np.random.default_rng(0)
T, D, E, F, R = 7, 4, 3, 5, 2


def silu(x):
    return x / (1 + np.exp(-x))


def test_text_stays_to_the_bit_and_new_tokens_get_the_update():
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    params = {n: np.float32(rng.normal(size=(E, *s))) for n, s in shapes.items()}
    lora = {
        n: {"a": np.float32(rng.normal(size=(E, s[0], R))), "b": np.float32(rng.normal(size=(E, R, s[1])))}
        for n, s in shapes.items()
    }
    x, new = rng.normal(size=(T, D)).astype(np.float32), np.arange(T) % 2 == 1
    logits = rng.normal(size=(T, E)).astype(np.float32)

    def run(params, lora, x, new):
        plan = moe.plan_from_weights(jax.nn.softmax(logits), max_active=2)
        y = moe.partial_lora_moe(params, lora, x, plan, new, alpha=3.0)
        return jnp.sum(jnp.sin(y)), (y, moe.dense_weights(plan))

    graded = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    (_, (y, weights)), (frozen, trained) = graded(params, lora, x, new)
    (_, (text, _)), (_, nothing) = graded(params, lora, x, np.zeros(T, bool))
    still = {n: {"a": p["a"], "b": 0 * p["b"]} for n, p in lora.items()}
    (_, (start, _)), _ = graded(params, still, x, new)
    expected = np.zeros((T, D))
    for t, e in np.ndindex(T, E):
        w = {n: p[e] + 3.0 / R * new[t] * lora[n]["a"][e] @ lora[n]["b"][e] for n, p in params.items()}
        expected[t] += weights[t, e] * ((silu(x[t] @ w["gate"]) * (x[t] @ w["up"])) @ w["down"])
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(y[~new], text[~new])
    np.testing.assert_array_equal(start, text)
    assert not any(np.any(g) for g in jax.tree.leaves((frozen, nothing)))
    assert all(np.any(g) for g in jax.tree.leaves(trained))
    huge = {n: {m: np.full_like(v, np.inf) for m, v in p.items()} for n, p in lora.items()}
    np.testing.assert_array_equal(graded(params, huge, x, np.zeros(T, bool))[0][1][0], text)


def gw_value(c1, c2, coupling):
    total = 0.0
    for i, k in np.ndindex(c1.shape):
        for j, m in np.ndindex(c2.shape):
            total += (c1[i, k] - c2[j, m]) ** 2 * coupling[i, j] * coupling[k, m]
    return total


def distances(x):
    c = np.linalg.norm(x[:, None] - x[None], axis=2)
    return np.float32(c / c.max())


def test_the_gradient_is_that_of_the_sum_over_all_pairs():
    c1, c2 = distances(rng.normal(size=(4, 2))), distances(rng.normal(size=(3, 2)))
    coupling = rng.random((4, 3)).astype(np.float32)
    got = jax.jit(moe.gw_gradient)(c1, c2, coupling)
    np.testing.assert_allclose(np.sum(got * coupling) / 2, gw_value(c1, c2, coupling), rtol=1e-5)
    for i, j in np.ndindex(4, 3):
        moved = [coupling.astype(np.float64).copy() for _ in range(2)]
        moved[0][i, j] += 1e-4
        moved[1][i, j] -= 1e-4
        numeric = (gw_value(c1, c2, moved[0]) - gw_value(c1, c2, moved[1])) / 2e-4
        np.testing.assert_allclose(got[i, j], numeric, rtol=1e-3)


def test_a_rotated_and_shuffled_copy_is_recognised():
    x = rng.normal(size=(9, 3))
    order, turn = rng.permutation(9), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    z = (x @ turn + 5.0)[order]

    def run(c1, c2):
        coupling, value = moe.entropic_gw(c1, c2)
        return coupling, value, moe.barycentric_embedding(coupling, jnp.float32(x))

    coupling, value, new = jax.jit(run)(distances(x), distances(z))
    np.testing.assert_allclose(np.asarray(coupling).sum(0), 1 / 9, atol=1e-4)
    np.testing.assert_allclose(np.asarray(coupling).sum(1), 1 / 9, atol=1e-4)
    assert np.array_equal(np.asarray(coupling).argmax(0), order)
    np.testing.assert_allclose(value, gw_value(distances(x), distances(z), np.asarray(coupling)), atol=1e-5)
    assert value < 1e-2
    length = np.linalg.norm(x, axis=1).mean()
    expected = x[order] / np.linalg.norm(x[order], axis=1, keepdims=True) * length
    np.testing.assert_allclose(new, expected, atol=0.2)
    np.testing.assert_allclose(np.linalg.norm(new, axis=1), length, rtol=1e-4)


def test_redundancy_and_pathways_equal_loops():
    outputs, where = rng.normal(size=(E, T, D)), np.arange(T) < 5
    pairs = [
        outputs[a, t] @ outputs[b, t] / np.linalg.norm(outputs[a, t]) / np.linalg.norm(outputs[b, t])
        for a in range(E) for b in range(E) for t in range(5) if a != b
    ]  # fmt: skip
    dirty = np.where(where[None, :, None], outputs, np.nan).astype(np.float32)
    gates, kind = np.float32(rng.normal(size=(T, E))), np.array([0, 1, 1, 0, -1, 2, 5])

    def run(outputs, gates):
        plan = moe.plan_from_weights(jax.nn.relu(gates))
        return moe.expert_output_similarity(outputs, where=where), moe.modality_routing(plan, kind, 4)

    similarity, routing = jax.jit(run)(dirty, gates)
    np.testing.assert_allclose(similarity, np.mean(pairs), rtol=1e-4, atol=1e-6)
    counts = np.stack([(gates[kind == m] > 0).sum(0) for m in range(4)])
    np.testing.assert_allclose(routing, counts / np.maximum(counts.sum(1, keepdims=True), 1), rtol=1e-6)
    p, q = rng.random((2, 5, E))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    middle = (p + q) / 2
    expected = (np.sum(p * np.log(p / middle), 1) + np.sum(q * np.log(q / middle), 1)) / 2
    divergence = jax.jit(moe.js_divergence)
    np.testing.assert_allclose(divergence(np.float32(p), np.float32(q)), expected, rtol=1e-4, atol=1e-6)
    eye = np.eye(5, E, dtype=np.float32)[:2]
    np.testing.assert_allclose(divergence(eye, eye[::-1].copy()), math.log(2), rtol=1e-5)
    np.testing.assert_allclose(divergence(eye, eye), 0, atol=1e-7)


def test_refuses():
    w, lora = jnp.ones((2, 3)), {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 3))}
    plan = moe.plan_from_weights(jnp.ones((2, 3)))
    for make, match in (
        (lambda: moe.init_lora(jax.random.key(0), 2, 3, rank=0), "rank=0"),
        (lambda: moe.partial_lora(jnp.ones((4, 2)), w, lora, jnp.ones(3, bool)), "new has shape"),
        (lambda: moe.partial_lora(jnp.ones((4, 3)), w, lora, jnp.ones(4, bool)), "x must be"),
        (lambda: moe.partial_lora_moe({}, {}, w, plan, jnp.ones(2, bool)), "must have gate, up and down"),
        (lambda: moe.entropic_gw(w, w), "c1 must be square"),
        (lambda: moe.entropic_gw(jnp.eye(2), jnp.eye(2), eps=0.0), "eps=0.0"),
        (lambda: moe.gw_gradient(jnp.eye(2), jnp.eye(2), w), "c1, c2 and coupling must be"),
        (lambda: moe.barycentric_embedding(w, jnp.ones((3, 2))), "coupling and x must be"),
        (lambda: moe.expert_output_similarity(w), "outputs must be"),
        (lambda: moe.modality_routing(plan, jnp.zeros(3, int), 2), "modality has shape"),
        (lambda: moe.modality_routing(plan, jnp.zeros(2, int), 0), "num_modalities=0"),
        (lambda: moe.js_divergence(jnp.ones(2), jnp.ones(3)), "one shape"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def partial_lora(x, w, a, b, new):
    return moe.partial_lora(x, w, {"a": a, "b": b}, new)


def adapted(x, where):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    draw = lambda *s: jnp.cos(jnp.arange(math.prod(s), dtype=dtype)).reshape(s)
    params = {"gate": draw(2, D, 3), "up": draw(2, D, 3), "down": draw(2, 3, D)}
    lora = {n: {"a": draw(2, w.shape[1], 1), "b": draw(2, 1, w.shape[2])} for n, w in params.items()}
    plan = moe.plan_from_weights(jnp.full((x.shape[0], 2), 0.5, dtype))
    return moe.partial_lora_moe(params, lora, x, plan, where)


def coupled(x, y):
    c = lambda a: jnp.abs(a[:, :1] - a[:, :1].T) / (1 + jnp.max(jnp.abs(a)))
    coupling, value = moe.entropic_gw(c(x), c(y), steps=2, iterations=5)
    return moe.barycentric_embedding(coupling, x), moe.gw_gradient(c(x), c(y), coupling.astype(x.dtype)), value


def measures(outputs, p, q):
    plan = moe.plan_from_weights(p)
    routing = moe.modality_routing(plan, jnp.arange(p.shape[0]) % 2, 2)
    return moe.expert_output_similarity(outputs), moe.js_divergence(p, q), jnp.sum(routing[0])


CASES = [
    Case(partial_lora, {"x": Arg("activations", (6, D)), "w": Arg("activations", (D, 3)), "a": Arg("scores", (D, R)),
                        "b": Arg("scores", (R, 3)), "new": Arg("where", (6,))}, wrt=("x", "a", "b"), frozen=("w",),
         covers=("moe.partial_lora",)),
    Case(adapted, {"x": Arg("activations", (5, D)), "where": Arg("where", (5,))}, helper=True,
         reason="the gradient is compared with the loop's shapes above", covers=("moe.partial_lora_moe",)),
    Case(coupled, {"x": Arg("activations", (4, 2)), "y": Arg("activations", (3, 2))}, helper=True,
         reason="a choice before training", bfloat16_tolerance=0.6,
         covers=("moe.entropic_gw", "moe.barycentric_embedding", "moe.gw_gradient")),
    Case(measures, {"outputs": Arg("activations", (3, 4, 2)), "p": Arg("probabilities", (4, 3)),
                    "q": Arg("probabilities", (4, 3))}, reason="measures", helper=True,
         covers=("moe.expert_output_similarity", "moe.js_divergence", "moe.modality_routing")),
    Case(lambda key: moe.init_lora(key, 3, 2, rank=2)["a"], {"key": Arg("key")}, helper=True, name="init_lora",
         covers=("moe.init_lora",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

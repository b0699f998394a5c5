"""Quantisation by buckets against loops, its gradients, and both ways of training."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import distill
from jaxlab.ops.layers import mlp

rng = np.random.default_rng(0)
W = rng.normal(size=(5, 7))


def buckets(w, size):
    flat = w.reshape(-1)
    return [flat] if size is None else [flat[i : i + size] for i in range(0, len(flat), size)]


def oracle(w, bucket, rounded):
    """Every weight of every bucket rounded by `rounded(u)` in the scaled domain."""
    out = []
    for row in buckets(w, bucket):
        alpha, beta = row.max() - row.min(), row.min()
        alpha = alpha if alpha > 1e-10 else 1.0
        out += [alpha * rounded((v - beta) / alpha) + beta for v in row]
    return np.reshape(out, w.shape)


@pytest.mark.parametrize("bucket", [None, 4, 300])
def test_uniform_equals_the_loop(bucket):
    for levels in (2, 5):
        got = distill.uniform_quantize(jnp.float32(W), levels=levels, bucket=bucket)
        expected = oracle(W, bucket, lambda u, n=levels: np.round((n - 1) * u) / (n - 1))
        np.testing.assert_allclose(got, expected, atol=1e-6)
        for row, before in zip(buckets(np.asarray(got), bucket), buckets(W, bucket), strict=True):
            assert len(np.unique(row.round(5))) <= levels
            np.testing.assert_allclose([row.min(), row.max()], [before.min(), before.max()], rtol=1e-6)
            assert np.abs(row - before).max() <= np.ptp(before) / 2 / (levels - 1) + 1e-6
        again = distill.uniform_quantize(got, levels=levels, bucket=bucket)
        np.testing.assert_allclose(again, got, atol=1e-6)


def test_rounding_at_random_has_no_bias():
    keys = jax.random.split(jax.random.key(0), 3000)
    run = jax.jit(jax.vmap(lambda key: distill.uniform_quantize(jnp.float32(W), levels=3, bucket=8, key=key)))
    drawn = np.asarray(run(keys), np.float64)
    error = np.abs(drawn.mean(0) - W)
    assert np.all(error < 5 * drawn.std(0) / np.sqrt(3000) + 1e-6)
    assert np.any(drawn.std(0) > 0)


def test_gradients():
    """Identity; with the ends of the bucket; and the segment sums of the points."""
    w, weight = jnp.float32(W), rng.normal(size=W.shape)
    total = lambda f: jax.grad(lambda x: jnp.sum(f(x) * jnp.float32(weight)))
    plain = total(lambda w: distill.uniform_quantize(w, levels=4, bucket=8))(w)
    np.testing.assert_allclose(plain, weight, rtol=1e-6)
    got = np.asarray(total(lambda w: distill.uniform_quantize(w, levels=4, bucket=8, gradient="bucket"))(w))
    flat_grad, at = weight.reshape(-1).copy(), 0
    for row in buckets(W, 8):
        u = (row - row.min()) / np.ptp(row)
        pull = np.sum(weight.reshape(-1)[at : at + len(row)] * (np.round(3 * u) / 3 - u))
        flat_grad[at + row.argmax()] += pull
        flat_grad[at + row.argmin()] -= pull
        at += len(row)
    np.testing.assert_allclose(got.reshape(-1), flat_grad, atol=1e-5)

    points = np.array([0.0, 0.2, 0.7, 1.0])
    run = lambda w, p: distill.point_quantize(w, p, bucket=8)
    np.testing.assert_allclose(
        run(w, jnp.float32(points)), oracle(W, 8, lambda u: points[np.abs(u - points).argmin()]), atol=1e-6
    )
    got, none = (
        total(lambda p: run(w, p))(jnp.float32(points)),
        total(lambda w: run(w, jnp.float32(points)))(w),
    )
    expected, at = np.zeros(4), 0
    for row in buckets(W, 8):
        for i, v in enumerate(row):
            nearest = np.abs((v - row.min()) / np.ptp(row) - points).argmin()
            expected[nearest] += np.ptp(row) * weight.reshape(-1)[at + i]
        at += len(row)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert not np.any(none)


def test_points():
    even = distill.point_quantize(jnp.float32(W), jnp.linspace(0.0, 1.0, 5), bucket=8)
    np.testing.assert_allclose(even, distill.uniform_quantize(jnp.float32(W), levels=5, bucket=8), atol=1e-6)
    u = oracle(W, 8, lambda u: u)
    scaled = np.concatenate([(r - r.min()) / np.ptp(r) for r in buckets(W, 8)])
    assert u.shape == W.shape
    got = distill.quantile_points(jnp.float32(W), levels=4, bucket=8)
    np.testing.assert_allclose(got, np.percentile(scaled, np.linspace(0, 100, 4)), atol=1e-6)
    assert distill.allocate_points(np.array([0.0, 0.0]), average=5).tolist() == [5, 5]
    for average in (3, 8):
        norms = rng.uniform(size=6)
        given = distill.allocate_points(norms, average=average)
        assert given.sum() == 6 * average
        share = (average - average // 2) * 6 * norms / norms.sum() + average // 2
        others = np.arange(6) != norms.argmax()
        assert np.abs(given - share)[others].max() <= 0.5


def test_size_lies_between_entropy_and_one_bit_more():
    w = {"a": rng.normal(size=1000), "b": np.ones(3)}
    bits = distill.compressed_bits(w, levels=8, bucket=100)
    counts = np.zeros(8)
    for row in buckets(w["a"], 100):
        counts += np.bincount(np.round((row - row.min()) / np.ptp(row) * 7).astype(int), minlength=8)
    p = counts[counts > 0] / 1000
    entropy = -np.sum(p * np.log2(p))
    code = (bits - 64 * 11 - 3) / 1000
    assert entropy <= code < entropy + 1


BATCH = {
    "x": rng.normal(size=(16, 4)).astype(np.float32),
    "y": np.where(np.arange(16) % 4 == 3, -1, rng.integers(0, 3, 16)).astype(np.int32),
    "teacher_logits": rng.normal(size=(16, 3)).astype(np.float32),
    "where": np.arange(16) < 14,
}


def test_one_step_is_taken_at_the_quantised_weights():
    net = mlp([6, 3])
    chosen = lambda path, leaf: leaf.ndim == 2
    learner = distill.quantized_distillation(net, optax.sgd(0.1), levels=4, bucket=8, select=chosen)
    state = learner.init(jax.random.key(0), BATCH)

    def loss(params):
        z = net.apply(params, BATCH["x"])
        return distill.distillation_loss(
            z, BATCH["teacher_logits"], BATCH["y"], temperature=2.0, soft_weight=0.7, where=BATCH["where"]
        )

    rounded = jax.tree.map(
        lambda a: (
            jnp.float32(oracle(np.asarray(a, np.float64), 8, lambda u: np.round(3 * u) / 3)) if a.ndim == 2 else a
        ),
        state.params,
    )
    grads = jax.grad(loss)(rounded)
    new, metrics = jax.jit(learner.update)(state, BATCH, jax.random.key(1))
    np.testing.assert_allclose(metrics["loss"], loss(rounded), rtol=1e-4)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new.params, expected)
    np.testing.assert_allclose(learner.predict(state, BATCH)["logits"], net.apply(rounded, BATCH["x"]), atol=1e-5)


def test_points_learn_and_stay_sorted_and_weights_stay():
    net = mlp([3])
    weights = net.init(jax.random.key(0), 4)
    learner = distill.differentiable_quantization(net, weights, optax.sgd(0.3), levels=3, bucket=8)
    batch = {**BATCH, "teacher_logits": np.asarray(net.apply(weights, BATCH["x"])), "where": np.ones(16, bool)}
    state, losses = learner.init(jax.random.key(0), batch), []
    update = jax.jit(learner.update)
    for i in range(30):
        state, metrics = update(state, batch, jax.random.key(i))
        losses.append(float(metrics["loss"]))
        assert all(np.all(np.diff(p) >= 0) for p in jax.tree.leaves(state.params))
    assert losses[-1] < losses[0] and state.step == 30
    rounded = jax.tree.map(lambda w, p: distill.point_quantize(w, p, bucket=8), weights, state.params)
    np.testing.assert_allclose(learner.predict(state, batch)["logits"], net.apply(rounded, batch["x"]), atol=1e-6)


def test_refuses():
    w = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="levels=1"):
        distill.uniform_quantize(w, levels=1)
    with pytest.raises(ValueError, match="bucket=0"):
        distill.uniform_quantize(w, levels=2, bucket=0)
    with pytest.raises(ValueError, match="gradient='none'"):
        distill.uniform_quantize(w, levels=2, gradient="none")
    with pytest.raises(ValueError, match="points must be"):
        distill.point_quantize(w, w)
    with pytest.raises(ValueError, match="norms must be"):
        distill.allocate_points(np.ones((2, 2)), average=4)
    with pytest.raises(ValueError, match="average=1"):
        distill.allocate_points(np.ones(2), average=1)


def learner_case(make, name):
    @jax.jit
    def one_step(x, teacher_logits, y, where):
        learner = make(x.dtype)
        batch = {"x": x, "teacher_logits": teacher_logits, "y": y, "where": where}
        return learner.update(learner.init(jax.random.key(0), batch), batch, jax.random.key(1))[1]["loss"]

    return Case(
        one_step,
        {
            "x": Arg("embeddings", (6, 4)),
            "teacher_logits": Arg("scores", (6, 3)),
            "y": Arg("labels", (6,)),
            "where": Arg("where", (6,)),
        },
        reason="the loss of a step before its update; the terms have cases of their own",
        rows={"x": 0, "teacher_logits": 0, "y": 0, "where": 0},
        helper=True,
        name=name,
        covers=(f"distill.{name}",),
    )


def bucketed(w):
    return distill.uniform_quantize(w, levels=4, bucket=8, gradient="bucket")


def size(w):
    return np.float32(distill.compressed_bits({"w": w}, levels=4, bucket=8))


CASES = [
    Case(
        bucketed,
        {"w": Arg("activations", (6, 4))},
        wrt=("w",),
        skip={"gradient": "rounding is straight-through; the loop has the gradient"},
        name="uniform_quantize",
        covers=("distill.uniform_quantize",),
    ),
    Case(
        distill.point_quantize,
        {"w": Arg("activations", (6, 4)), "points": Arg("weights", (1,))},
        static={"bucket": 8},
        wrt=("points",),
        frozen=("w",),
        helper=True,
    ),
    Case(
        distill.quantile_points,
        {"w": Arg("activations", (6, 4))},
        static={"levels": 3},
        frozen=("w",),
        reason="a start, without gradient",
        helper=True,
    ),
    learner_case(
        lambda dtype: distill.quantized_distillation(mlp([3]), optax.sgd(0.1), levels=4), "quantized_distillation"
    ),
    learner_case(
        lambda dtype: distill.differentiable_quantization(
            mlp([3]), {"dense_0": {"w": jnp.arange(12, dtype=dtype).reshape(4, 3), "b": jnp.zeros(3, dtype)}},
            optax.sgd(0.1), levels=4,
        ),
        "differentiable_quantization",
    ),
    Case(
        distill.allocate_points,
        {"norms": Arg("weights", (4,))},
        static={"average": 4},
        host=True,
    ),
    Case(size, {"w": Arg("embeddings", (20,))}, host=True, covers=("distill.compressed_bits",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

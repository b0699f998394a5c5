"""Attention against explicit loops in float64: the dense form and the block form at small block sizes."""

import functools
import sys

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from jax.sharding import PartitionSpec as P

from jaxlab.kernels import attention

rng = np.random.default_rng()
B, T, S, N, K, H = 2, 11, 13, 4, 2, 5
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal_longer_queries": {"causal": True, "swap": True},
    "window": {"causal": True, "window": 3},
    "window_longer_queries": {"causal": True, "window": 6, "swap": True},
    "segments": {"segments": True, "soft_cap": 1.5},
    "everything": {"causal": True, "window": 5, "segments": True, "soft_cap": 2.0, "scale": 0.7},
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(sys.modules["jaxlab.kernels.attention"], "_BLOCK", 4)


def oracle(q, k, v, q_ids=None, kv_ids=None, bias=None, causal=False, window=None, scale=None, soft_cap=None):
    """Returns out, lse and the keys that each query sees, one query at a time."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    batch, queries, heads, size = q.shape
    keys, ratio = k.shape[1], heads // k.shape[2]
    scale = size**-0.5 if scale is None else scale
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, t, n in np.ndindex(lse.shape):
        seen, scores = [], []
        for s in range(keys):
            position = t + keys - queries
            ok = not causal or s <= position
            ok = ok and (window is None or s > position - window)
            ok = ok and (q_ids is None or (q_ids[b, t] >= 0 and q_ids[b, t] == kv_ids[b, s]))
            extra = 0.0
            if bias is not None:
                extra = float(np.broadcast_to(bias, (batch, heads, queries, keys))[b, n, t, s])
            if ok and extra > -np.inf:
                score = scale * float(q[b, t, n] @ k[b, s, n // ratio])
                score = score if soft_cap is None else soft_cap * np.tanh(score / soft_cap)
                seen.append(s)
                scores.append(score + extra)
        if seen:
            top = max(scores)
            e = np.exp(np.array(scores) - top)
            lse[b, t, n] = np.log(e.sum()) + top
            out[b, t, n] = sum(w * v[b, s, n // ratio] for w, s in zip(e / e.sum(), seen, strict=True))
    return out, lse


def draw(option):
    options = dict(OPTIONS[option])
    queries, keys = (S, T) if options.pop("swap", False) else (T, S)
    q = rng.normal(size=(B, queries, N, H)).astype(np.float32)
    k, v = (rng.normal(size=(B, keys, K, H)).astype(np.float32) for _ in range(2))
    ids = (None, None)
    if options.pop("segments", False):
        q_ids = np.sort(rng.integers(0, 3, (B, queries)), axis=1).astype(np.int32)
        kv_ids = np.sort(rng.integers(0, 3, (B, keys)), axis=1).astype(np.int32)
        q_ids[0, :2], q_ids[1, -3:], kv_ids[0, :3], kv_ids[1] = -1, -1, -1, 2
        kv_ids[1, -2:] = -1
        ids = (q_ids, kv_ids)
    return (q, k, v), ids, options


@functools.partial(jax.jit, static_argnames=("block", "implementation", "options"))
def run(q, k, v, q_ids, kv_ids, d_out, d_lse, block, implementation, options):
    del block  # only part of the key of the cache
    call = functools.partial(
        attention, q_segment_ids=q_ids, kv_segment_ids=kv_ids, implementation=implementation, return_lse=True
    )

    def loss(q, k, v):
        out, lse = call(q, k, v, **dict(options))
        finite = jnp.where(lse == -jnp.inf, 0.0, lse)
        return (jnp.where(d_out == 0, 0.0, out * d_out)).sum() + (finite * d_lse).sum(), (out, lse)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)


def poison(x, ids):
    return x if ids is None else np.where((ids >= 0)[:, :, None, None], x, np.float32(np.nan))


@pytest.mark.parametrize("block", [512, 4])
@pytest.mark.parametrize("option", OPTIONS)
def test_values_and_gradients_match_loops(option, block, monkeypatch):
    monkeypatch.setattr(sys.modules["jaxlab.kernels.attention"], "_BLOCK", block)
    (q, k, v), ids, options = draw(option)
    d_out = rng.normal(size=q.shape)
    d_lse = rng.normal(size=q.shape[:3])
    poisoned = poison(q, ids[0]), poison(k, ids[1]), poison(v, ids[1])
    cotangents = d_out.astype(np.float32), d_lse.astype(np.float32)
    grads, (out, lse) = run(*poisoned, *ids, *cotangents, block, "xla", tuple(options.items()))
    exact_out, exact_lse = oracle(q, k, v, *ids, **options)
    np.testing.assert_allclose(out, exact_out, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(lse, exact_lse, rtol=2e-5, atol=2e-6)
    empty = exact_lse == -np.inf
    assert not np.any(np.asarray(out)[empty]) and not np.any(np.asarray(grads[0])[empty])
    if option in ("causal_longer_queries", "segments", "everything"):
        assert empty.any()

    # The gradient along random directions, by central differences of the loops.
    for _ in range(2):
        step = [rng.normal(size=x.shape) for x in (q, k, v)]

        def shifted(h, step=step):
            o, ls = oracle(*(x + h * s for x, s in zip((q, k, v), step, strict=True)), *ids, **options)
            return (o * d_out).sum() + (np.where(empty, 0.0, ls) * d_lse).sum()

        expected = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
        got = sum((np.asarray(g, np.float64) * s).sum() for g, s in zip(grads, step, strict=True))
        scale = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads))
        assert abs(got - expected) < 2e-5 * scale
    if ids[0] is not None:
        for g, i in zip(grads, (ids[0], ids[1], ids[1]), strict=True):
            assert not np.any(np.asarray(g)[i < 0])
    # Every entry, against the definition.
    if block != 512:
        reference = run(*poisoned, *ids, *cotangents, block, "reference", tuple(options.items()))[0]
        for a, b in zip(grads, reference, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_bias_and_its_gradient():
    (q, k, v), _, _ = draw("plain")
    bias = rng.normal(size=(1, N, T, S)).astype(np.float32)
    bias[:, 1, 2] = -np.inf  # one row of one head sees nothing
    bias[:, :, :, 5] = -np.inf
    d_out = rng.normal(size=q.shape).astype(np.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(bias, q):
        return (attention(q, k, v, bias=bias) * d_out).sum()

    value, (d_bias, dq) = loss(bias, q)
    np.testing.assert_allclose(value, (oracle(q, k, v, bias=bias)[0] * d_out).sum(), rtol=1e-4, atol=1e-4)
    assert not np.any(np.asarray(d_bias)[bias == -np.inf]) and not np.any(np.asarray(dq)[:, 2, 1])
    for index in [(0, 0, 0, 0), (0, 1, 3, 7), (0, 3, 10, 12)]:
        step = np.zeros(bias.shape)
        step[index] = 1e-5
        ends = [(oracle(q, k, v, bias=bias + sign * step)[0] * d_out).sum() for sign in (1, -1)]
        np.testing.assert_allclose(d_bias[index], (ends[0] - ends[1]) / 2e-5, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("block", [512, 4])
def test_bfloat16(block, monkeypatch):
    monkeypatch.setattr(sys.modules["jaxlab.kernels.attention"], "_BLOCK", block)
    (q, k, v), _, _ = draw("causal")
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = attention(*low, causal=True)
    assert out.dtype == jnp.bfloat16
    exact, _ = oracle(*(np.asarray(x, np.float32) for x in low), causal=True)
    # Weights and output are rounded once each to 8 bits: relative 2^-8 of a convex combination of values.
    assert np.max(np.abs(np.asarray(out, np.float64) - exact)) <= 2 * 2**-8 * np.abs(v).max()
    grads = jax.grad(lambda *a: attention(*a, causal=True).astype(jnp.float32).sum(), argnums=(0, 1, 2))(*low)
    assert all(g.dtype == jnp.bfloat16 and jnp.isfinite(g).all() for g in grads)


@pytest.mark.usefixtures("small_blocks")
def test_poisoned_cotangents_of_padding_stay_out():
    (q, k, v), (q_ids, kv_ids), _ = draw("segments")
    weight = np.where((q_ids >= 0)[:, :, None, None], np.float32(1), np.float32(np.nan))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def loss(q, k, v):
        return (attention(q, k, v, q_segment_ids=q_ids, kv_segment_ids=kv_ids) * weight).sum()

    assert all(jnp.isfinite(g).all() for g in loss(q, k, v))


@pytest.mark.usefixtures("small_blocks")
def test_transformations_and_no_retrace(mesh8):
    traces = []
    members = 8
    q = rng.normal(size=(members, 1, 6, 2, 3)).astype(np.float32)
    k, v = (rng.normal(size=(members, 1, 6, 1, 3)).astype(np.float32) for _ in range(2))

    def f(q, k, v):
        traces.append(None)
        return jax.grad(lambda *a: jnp.sin(attention(*a, causal=True)).sum(), argnums=(0, 1, 2))(q, k, v)

    jitted = jax.jit(f)
    loop = [jitted(*args) for args in zip(q, k, v, strict=True)]
    assert len(traces) == 1
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    compare = functools.partial(jax.tree.map, lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6))
    compare(jax.jit(jax.vmap(f))(q, k, v), expected)

    def local(q, k, v):
        return jax.tree.map(lambda leaf: leaf[None], f(q[0], k[0], v[0]))

    compare(jax.jit(jax.shard_map(local, mesh=mesh8, in_specs=P("data"), out_specs=P("data")))(q, k, v), expected)

    # Replicated keys and values: their gradient is the sum over the shards.
    def total(q, k, v):
        g = jax.grad(lambda k: jnp.sin(attention(q[0], k, v, causal=True)).sum())(k)
        return g

    shard = jax.jit(jax.shard_map(total, mesh=mesh8, in_specs=(P("data"), P(), P()), out_specs=P()))
    one = jax.jit(lambda q, k, v: sum(f(x, k, v)[1] for x in q))
    np.testing.assert_allclose(shard(q, k[0], v[0]), one(q, k[0], v[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [512, 4])
def test_explicit_mesh(block, monkeypatch):
    monkeypatch.setattr(sys.modules["jaxlab.kernels.attention"], "_BLOCK", block)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    q = rng.normal(size=(2, 6, 2, 3)).astype(np.float32)

    def f(q):
        return jax.grad(lambda q: jnp.sin(attention(q, q, q, causal=True)).sum())(q)

    with jax.set_mesh(mesh):
        got = jax.jit(f)(jax.device_put(q, P("data")))
    np.testing.assert_allclose(got, jax.jit(f)(q), rtol=1e-4, atol=1e-6)


def test_memory_is_linear_in_the_length():
    def bytes_at(length):
        q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        f = jax.jit(jax.grad(lambda q: attention(q, q, q, causal=True).sum()))
        return f.lower(q).compile().memory_analysis().temp_size_in_bytes

    assert bytes_at(8192) < bytes_at(2048) + 6144 * 1024  # at most 1 KiB for a position of 32 bytes


def test_errors():
    q, k = jnp.zeros((1, 3, 4, 2)), jnp.zeros((1, 5, 2, 2))
    ids = jnp.zeros((1, 3), jnp.int32)
    cases = [
        (r"q must be \[B, T, N, H\]", (q[0], k, k), {}),
        (r"must agree in their first and last dimension", (q[..., :1], k, k), {}),
        (r"the 2 key heads must divide the 3 query heads", (q[:, :, :3], k, k), {}),
        (r"q_segment_ids and kv_segment_ids must be given together", (q, k, k), {"q_segment_ids": ids}),
        (r"segment ids have shapes \(1, 3\) and \(1, 3\)", (q, k, k), {"q_segment_ids": ids, "kv_segment_ids": ids}),
        (r"window needs causal=True", (q, k, k), {"window": 2}),
        (r"window=0 must be at least 1", (q, k, k), {"window": 0, "causal": True}),
        (r"soft_cap=0.0 must be positive", (q, k, k), {"soft_cap": 0.0}),
        (r"bias has shape \(3, 5\), expected \(1, 4, 3, 5\)", (q, k, k), {"bias": jnp.zeros((3, 5))}),
        (r"no pallas implementation of attention yet on any platform", (q, k, k), {"implementation": "pallas"}),
        (r"implementation='fast' of attention must be one of 'auto'", (q, k, k), {"implementation": "fast"}),
    ]
    for message, args, keywords in cases:
        with pytest.raises(ValueError, match=message):
            attention(*args, **keywords)


CASES = [
    Case(
        attention,
        {"q": Arg("activations", (6, 5, 4, 4)), "k": Arg("activations", (6, 3, 2, 4)),
         "v": Arg("activations", (6, 3, 2, 4))},
        wrt=("q", "k", "v"),
        rows={"q": 0, "k": 0, "v": 0},
        symmetry="equivariant",
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

"""Backbones against float64 loops, and the bridges to and from other libraries."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from flax import nnx

from jaxlab import moe, nn
from jaxlab.ops.layers import feature_norm
from jaxlab.ops.layers import mlp as plain_mlp
from jaxlab.types import Layer, as_stateful

rng = np.random.default_rng(0)
KEY = jax.random.key(0)


def wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def noisy(tree):
    """Other parameters than those at the start, so that gains of 1 and biases of 0 hide nothing."""
    return jax.tree.map(lambda a: jnp.float32(np.asarray(a) + 0.3 * rng.normal(size=a.shape)), tree)


def convolve(x, kernel, stride):
    """Convolution with SAME padding, one output pixel at a time."""
    n, h, w, _ = x.shape
    size = kernel.shape[0]
    out_h, out_w = -(-h // stride), -(-w // stride)
    pad_h, pad_w = (max((o - 1) * stride + size - i, 0) for o, i in ((out_h, h), (out_w, w)))
    x = np.pad(x, ((0, 0), (pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2), (0, 0)))
    y = np.zeros((n, out_h, out_w, kernel.shape[-1]))
    for i, j in np.ndindex(out_h, out_w):
        patch = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
        y[:, i, j] = np.tensordot(patch, kernel, axes=3)
    return y


def batch_normalise(x, p, s, train):
    axes = tuple(range(x.ndim - 1))
    mean, var = (x.mean(axes), x.var(axes)) if train else (s["mean"], s["var"])
    new = {"mean": 0.9 * s["mean"] + 0.1 * mean, "var": 0.9 * s["var"] + 0.1 * var} if train else s
    return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"], new


def resnet_oracle(p, s, x, strides, train):
    new = {"blocks": {}}
    relu = lambda a: np.maximum(a, 0)
    x, new["norm"] = batch_normalise(convolve(x, p["stem"]["kernel"], 1), p["norm"], s["norm"], train)
    x = relu(x)
    for i, stride in enumerate(strides):
        b, t, record = p["blocks"][i], s["blocks"][i], {}
        y = convolve(x, b["conv_1"]["kernel"], stride)
        y, record["norm_1"] = batch_normalise(y, b["norm_1"], t["norm_1"], train)
        y = convolve(relu(y), b["conv_2"]["kernel"], 1)
        y, record["norm_2"] = batch_normalise(y, b["norm_2"], t["norm_2"], train)
        x = relu(y + (convolve(x, b["shortcut"]["kernel"], stride) if "shortcut" in b else x))
        new["blocks"][i] = record
    features = x.mean((1, 2))
    return features @ p["head"]["kernel"] + p["head"]["bias"], features, new


@pytest.mark.parametrize("train", [True, False])
def test_resnet_equals_the_loop(train):
    net = nn.resnet(3, width=2, blocks=(1, 1))
    params, state = net.init(KEY, jax.ShapeDtypeStruct((4, 6, 1), jnp.float32))
    params = noisy(params)
    state = jax.tree.map(lambda a: jnp.float32(np.abs(np.asarray(a) + 0.2 * rng.normal(size=a.shape))), state)
    x = rng.normal(size=(3, 4, 6, 1))
    out, new = jax.jit(lambda p, s, x: net.apply(p, s, x, train=train))(params, state, jnp.float32(x))
    logits, features, expected = resnet_oracle(wide(params), wide(state), x, (1, 2), train)
    np.testing.assert_allclose(out["logits"], logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out["features"], features, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new, expected)


def test_a_resnet_starts_as_its_shortcuts():
    net = nn.resnet(3, width=2, blocks=(2,))
    params, _ = net.init(KEY, (4, 4, 1))
    assert all(not np.any(block["norm_2"]["scale"]) for block in params["blocks"].values())


def mlp_oracle(p, s, x, train):
    for i in range(len(p["dense"])):
        x = x @ p["dense"][i]["kernel"] + p["dense"][i]["bias"]
        if i + 1 < len(p["dense"]):
            x = np.maximum(batch_normalise(x, p["norms"][i], s["norms"][i], train)[0], 0)
    return x


def test_mlp_equals_the_loop_and_drops_in_training_only():
    net = nn.mlp([5, 4, 2], batch_norm=True)
    params, state = net.init(KEY, 3)
    params, x = noisy(params), rng.normal(size=(6, 3))
    for train in (True, False):
        y, _ = jax.jit(lambda p, s, x, train=train: net.apply(p, s, x, train=train))(params, state, jnp.float32(x))
        np.testing.assert_allclose(y, mlp_oracle(wide(params), wide(state), x, train), rtol=1e-4, atol=1e-5)
    net = nn.mlp([64, 2], dropout=0.5)
    params, state = net.init(KEY, 3)
    run = jax.jit(lambda key, x: net.apply(params, state, x, key=key, train=True)[0])
    one, two = (run(jax.random.key(i), jnp.float32(x)) for i in (1, 2))
    assert np.any(one != two)
    np.testing.assert_array_equal(one, run(jax.random.key(1), jnp.float32(x)))
    many = jax.jit(jax.vmap(lambda key: run(key, jnp.float32(x))))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(many.mean(0), net.apply(params, state, jnp.float32(x))[0], atol=0.1)
    with pytest.raises(ValueError, match="key is needed"):
        net.apply(params, state, jnp.float32(x), train=True)


def norm_oracle(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["gain"] + p["bias"]


def block_oracle(p, x, heads, segments, causal, rotary):
    """One block of one sequence [T, D], one query at a time."""
    length, width = x.shape
    size = width // heads
    normed = norm_oracle(p["norm_attention"]["params"], x)
    q, k, v = (normed @ p["qkv"]["kernel"]).reshape(length, 3, heads, size).transpose(1, 0, 2, 3)
    if rotary:
        q, k = (np.stack([[turn(a[t, n], t) for n in range(heads)] for t in range(length)]) for a in (q, k))
    out = np.zeros((length, heads, size))
    for t, n in np.ndindex(length, heads):
        seen = [s for s in range(length) if (s <= t or not causal) and segments[s] == segments[t] >= 0]
        if seen:
            weight = np.exp([q[t, n] @ k[s, n] / np.sqrt(size) for s in seen])
            out[t, n] = weight / weight.sum() @ v[seen, n]
    x = x + out.reshape(length, width) @ p["out"]["kernel"] + p["out"]["bias"]
    first, second = p["ff"]["params"]["dense_0"], p["ff"]["params"]["dense_1"]
    hidden = norm_oracle(p["norm_ff"]["params"], x) @ first["w"] + first["b"]
    return x + np.maximum(hidden, 0) @ second["w"] + second["b"]


def turn(a, position):
    """Rotates the complex numbers a_i + i a_{i + half} by position * 10000^(-i / half)."""
    half = len(a) // 2
    z = (a[:half] + 1j * a[half:]) * np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag])


def test_causal_transformer_equals_the_loop_and_keeps_documents_apart():
    feed_forward = lambda: plain_mlp([12, 8])
    net = nn.causal_transformer(7, width=8, depth=2, heads=2, feed_forward=feed_forward)
    params, _ = net.init(KEY)
    params = noisy(params)
    tokens = rng.integers(0, 7, (2, 6))
    segments = np.array([[0, 0, 0, 1, 1, -1], [0] * 6])
    got = jax.jit(net.apply)(params, {}, jnp.asarray(tokens), segment_ids=jnp.asarray(segments))[0]["logits"]
    p = wide(params)
    for b in range(2):
        x = p["embed"][tokens[b]]
        for i in range(2):
            x = block_oracle(p["blocks"][i], x, 2, segments[b], True, True)
        expected = norm_oracle(p["norm"]["params"], x) @ p["head"]["kernel"]
        np.testing.assert_allclose(got[b], expected, rtol=2e-4, atol=2e-4)


def test_vit_equals_the_loop():
    net = nn.vit(3, patch=2, width=8, depth=1, heads=2, feed_forward=lambda: plain_mlp([12, 8]))
    params, _ = net.init(KEY, (4, 6, 1))
    params = noisy(params)
    x = rng.normal(size=(2, 4, 6, 1))
    got = jax.jit(net.apply)(params, {}, jnp.float32(x))[0]["logits"]
    p = wide(params)
    for b in range(2):
        patches = [x[b, i : i + 2, j : j + 2].reshape(-1) for i in (0, 2) for j in (0, 2, 4)]
        y = np.stack(patches) @ p["embed"]["kernel"] + p["embed"]["bias"] + p["position"]
        y = norm_oracle(p["norm"]["params"], block_oracle(p["blocks"][0], y, 2, [0] * 6, False, False)).mean(0)
        np.testing.assert_allclose(got[b], y @ p["head"]["kernel"] + p["head"]["bias"], rtol=2e-4, atol=2e-4)


def test_a_mixture_of_experts_plugs_into_both_transformers():
    sparse = lambda: moe.moe_layer(moe.top_k_router(4, 2), moe.swiglu_experts(4, 8))
    penalty = moe.load_balancing_loss
    language = nn.causal_transformer(7, width=8, depth=2, heads=2, feed_forward=sparse, penalty=penalty)
    out, _ = language.apply(*language.init(KEY), jnp.ones((2, 3), jnp.int32))
    assert out["expert_counts"].shape == (2, 4) and int(out["expert_counts"].sum()) == 2 * 6 * 2
    assert out["penalty"].shape == () and out["penalty"] >= 1 - 1e-5


def test_nnx_and_our_layers_fit_both_ways():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.drop = nnx.Linear(3, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.dense(x))

    net = nn.from_nnx(lambda rngs: Net(rngs))
    params, state = net.init(KEY)
    x = jnp.float32(rng.normal(size=(4, 3)))
    np.testing.assert_allclose(net.apply(params, state, x)[0], x @ params["dense"]["kernel"], rtol=1e-6)
    grads = jax.grad(lambda p: net.apply(p, state, x, key=KEY, train=True)[0].sum())(params)
    assert grads["dense"]["kernel"].shape == (3, 2)

    layer = moe.moe_layer(moe.top_k_router(4, 2, noise=1.0), moe.swiglu_experts(4, hidden=8))
    module = nn.to_nnx(layer, 3, rngs=nnx.Rngs(params=0, dropout=1))
    y, plan = module(x)
    assert y.shape == x.shape and plan.num_experts == 4
    assert np.any(module(x, train=True)[0] != module(x, train=True)[0])
    grads = nnx.grad(lambda m: m(x)[0].sum())(module)
    names = jax.tree.structure(layer.init(KEY, 3))
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(module, nnx.Param))["params"]) == names
    assert len(jax.tree.leaves(grads)) == names.num_leaves


def test_equinox_fits_in_one_line():
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(3, 2, 8, 1, key=KEY)
    params, static = equinox.partition(model, equinox.is_inexact_array)
    net = as_stateful(lambda params, x: jax.vmap(equinox.combine(params, static))(x))
    x = jnp.float32(rng.normal(size=(4, 3)))
    y, state = net.apply(params, {}, x, train=True)
    np.testing.assert_array_equal(y, jax.vmap(model)(x))
    assert state == {}


def test_refuses():
    with pytest.raises(ValueError, match="heads=3 must divide"):
        nn.causal_transformer(5, width=8, heads=3)
    with pytest.raises(ValueError, match="odd size 1"):
        nn.causal_transformer(5, width=8, heads=8)
    with pytest.raises(ValueError, match="tokens must be integers"):
        nn.causal_transformer(5).apply({}, {}, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="sizes must name"):
        nn.mlp([])
    with pytest.raises(ValueError, match="dropout=1"):
        nn.mlp([2], dropout=1.0)
    with pytest.raises(ValueError, match="width=0"):
        nn.resnet(3, width=0)


def at_rest(net, *dims):
    """A network in evaluation as a function of its input, at fixed parameters in the input's dtype."""
    net = as_stateful(net)

    def run(x):
        params, state = net.init(KEY, *dims)
        cast = lambda tree: jax.tree.map(lambda a: a.astype(x.dtype), tree)
        y = net.apply(cast(params), cast(state), x)[0]
        return y["logits"] if isinstance(y, dict) else y

    return run


def block_layer():
    block = nn.transformer_block(4, 2, feed_forward=plain_mlp([6, 4]), norm=feature_norm())
    return Layer(lambda key: block.init(key)[0], lambda params, x: block.apply(params, {}, x)[0][0])


def bridged(x):
    params = {"w": jnp.ones((3, 2), x.dtype)}
    return nn.to_nnx(Layer(lambda key: params, lambda p, x: x @ p["w"]), rngs=nnx.Rngs(0))(x)


def computed(x):
    wide = "float64" if x.dtype == jnp.float64 else "float32"
    net = nn.with_compute_dtype(Layer(lambda key: {}, lambda p, x: x @ p["w"]), wide)
    return net.apply({"w": jnp.ones((3, 2), x.dtype)}, {}, x)[0]


def language(x, tokens):
    """The token embedding of the causal transformer carries the gradient."""
    net = nn.causal_transformer(5, width=4, depth=1, heads=1, feed_forward=lambda: plain_mlp([6, 4]))
    params = jax.tree.map(lambda a: a.astype(x.dtype), net.init(KEY)[0])
    return net.apply({**params, "embed": x}, {}, tokens)[0]["logits"]


IMAGES = {"x": Arg("activations", (6, 4, 4, 1))}
ROWS = {"wrt": ("x",), "rows": {"x": 0}, "symmetry": "equivariant", "helper": True}
CASES = [
    Case(at_rest(nn.vit(3, patch=2, width=4, depth=1, heads=1), (4, 4, 1)), IMAGES, covers=("nn.vit",), name="vit",
         **ROWS),
    Case(at_rest(nn.resnet(3, width=2, blocks=(1,)), (4, 4, 1)), IMAGES, covers=("nn.resnet", "nn.from_nnx"),
         name="resnet", **ROWS),
    Case(at_rest(nn.mlp([5, 2], batch_norm=True), 3), {"x": Arg("activations", (6, 3))}, covers=("nn.mlp",), name="mlp",
         **ROWS),
    Case(at_rest(block_layer()), {"x": Arg("activations", (6, 3, 4))}, covers=("nn.transformer_block",),
         name="transformer_block", **ROWS),
    Case(bridged, {"x": Arg("activations", (6, 3))}, covers=("nn.to_nnx",), name="to_nnx", **ROWS),
    Case(language, {"x": Arg("activations", (5, 4)), "tokens": Arg("index", (2, 3), high=5)}, wrt=("x",),
         covers=("nn.causal_transformer",), name="causal_transformer", helper=True),
    Case(computed, {"x": Arg("activations", (6, 3))}, covers=("nn.with_compute_dtype",), name="computed", **ROWS),
    Case(nn.random_shift, {"key": Arg("key"), **IMAGES}, wrt=("x",), helper=True),
    Case(nn.random_affine, {"key": Arg("key"), **IMAGES}, wrt=("x",), helper=True),
    Case(lambda key, x: nn.with_augmentation(Layer(lambda key: {}, lambda p, x: x), nn.random_shift).apply(
            {}, {}, x, key=key, train=True)[0],
         {"key": Arg("key"), **IMAGES}, wrt=("x",), covers=("nn.with_augmentation",), name="with_augmentation",
         helper=True),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

"""IBN-Net: the layer and the residual blocks against loops, what they are invariant to, and where each variant acts."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import norm

rng = np.random.default_rng(0)


def instance_oracle(x, eps=1e-5):
    y = np.zeros_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[-1]):
            part = x[n, ..., c]
            y[n, ..., c] = (part - part.mean()) / np.sqrt(np.mean((part - part.mean()) ** 2) + eps)
    return y


def batch_oracle(x, eps=1e-5):
    y = np.zeros_like(x)
    for c in range(x.shape[-1]):
        part = x[..., c]
        y[..., c] = (part - part.mean()) / np.sqrt(np.mean((part - part.mean()) ** 2) + eps)
    return y


def convolve_oracle(x, w, stride):
    n, height, width, _ = x.shape
    k = w.shape[0]
    pad = k // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = range(0, height + 2 * pad - k + 1, stride)
    columns = range(0, width + 2 * pad - k + 1, stride)
    y = np.zeros((n, len(rows), len(columns), w.shape[-1]))
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            for a in range(k):
                for b in range(k):
                    y[:, i, j] += padded[:, r + a, c + b] @ w[a, b]
    return y


def noisy(tree):
    """Gains and biases away from 1 and 0."""
    return jax.tree.map(lambda a: jnp.float32(a + 0.3 * rng.normal(size=a.shape)), tree)


def affine(x, params):
    return x * np.asarray(params["gain"], np.float64) + np.asarray(params["bias"], np.float64)


def test_the_layer_equals_the_loop_and_ignores_images_that_do_not_exist():
    layer = norm.instance_batch_norm(ratio=0.4)
    params, state = layer.init(jax.random.key(0), 5)
    params = noisy(params)
    x, where = rng.normal(size=(4, 3, 2, 5)) * 3 + 1, np.array([1, 1, 0, 1], bool)
    dirty = jnp.float32(np.where(where[:, None, None, None], x, np.nan))
    y, new = jax.jit(lambda x: layer.apply(params, state, x, where=where, train=True))(dirty)
    real = x[where]
    expected = np.concatenate(
        [
            affine(instance_oracle(real[..., :2]), params["instance"]),
            affine(batch_oracle(real[..., 2:]), params["batch"]),
        ],
        axis=-1,
    )
    np.testing.assert_allclose(np.asarray(y)[where], expected, atol=2e-5)
    assert not np.any(y[2])
    moments = {"mean": 0.1 * real[..., 2:].mean((0, 1, 2)), "var": 0.9 + 0.1 * real[..., 2:].var((0, 1, 2))}
    for name, value in moments.items():
        np.testing.assert_allclose(new[name], value, rtol=1e-5)
    tested, same = layer.apply(params, new, jnp.float32(x))
    unit = (x[..., 2:] - moments["mean"]) / np.sqrt(moments["var"] + 1e-5)
    np.testing.assert_allclose(tested[..., 2:], affine(unit, params["batch"]), atol=2e-5)
    np.testing.assert_allclose(tested[..., :2], affine(instance_oracle(x[..., :2]), params["instance"]), atol=2e-5)
    assert same is new


@pytest.mark.parametrize(("ratio", "oracle"), [(0.0, batch_oracle), (1.0, instance_oracle)])
def test_the_ends_are_batch_and_instance_normalisation(ratio, oracle):
    layer = norm.instance_batch_norm(ratio=ratio)
    x = rng.normal(size=(3, 4, 2))
    y, state = layer.apply(*layer.init(jax.random.key(0), 2), jnp.float32(x), train=True)
    np.testing.assert_allclose(y, oracle(x), atol=1e-5)
    assert jax.tree.map(jnp.shape, state) == {"mean": (2 - int(2 * ratio),), "var": (2 - int(2 * ratio),)}


def test_instance_normalisation_takes_contrast_and_brightness_out():
    x = rng.normal(size=(3, 4, 4, 2))
    changed = x * rng.uniform(0.5, 3, (3, 1, 1, 2)) + rng.normal(size=(3, 1, 1, 2))
    with jax.enable_x64(True):
        y = norm.instance_norm(jnp.asarray(x), eps=1e-12)
        np.testing.assert_allclose(norm.instance_norm(jnp.asarray(changed), eps=1e-12), y, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(np.mean(y, (1, 2)), 0, atol=1e-12)
        np.testing.assert_allclose(np.var(y, (1, 2)), 1, rtol=1e-9)
    point = norm.instance_norm(jnp.full((2, 1, 1, 3), 7.0), None, jnp.arange(3.0))
    np.testing.assert_array_equal(point[:, 0, 0], np.broadcast_to(np.arange(3.0), (2, 3)))


@pytest.mark.parametrize(("bottleneck", "after"), [(True, "addition"), (False, "branch"), (False, "none")])
def test_blocks_equal_the_loop(bottleneck, after):
    mixed = norm.instance_batch_norm()
    block = norm.ibn_block(4, norm=mixed, after=after, stride=2, bottleneck=bottleneck)
    params, state = block.init(jax.random.key(1), 3)
    params = noisy(params)
    x = rng.normal(size=(3, 6, 4, 3))
    y, new = jax.jit(lambda x: block.apply(params, state, x, train=True))(jnp.float32(x))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    strides = (1, 2, 1) if bottleneck else (2, 1)
    h = x
    for i, stride in enumerate(strides):
        h = convolve_oracle(np.maximum(h, 0) if i else h, p[f"conv_{i}"], stride)
        if i == 0:
            h = np.concatenate(
                [affine(instance_oracle(h[..., :2]), p["norm_0"]["instance"]),
                 affine(batch_oracle(h[..., 2:]), p["norm_0"]["batch"])], axis=-1,
            )  # fmt: skip
        else:
            h = affine(batch_oracle(h), p[f"norm_{i}"])
    identity = affine(batch_oracle(convolve_oracle(x, p["conv_identity"], 2)), p["norm_identity"])
    if after == "branch":
        h = affine(instance_oracle(h), p["norm_after"]) + identity
    else:
        h = h + identity
        h = affine(instance_oracle(h), p["norm_after"]) if after == "addition" else h
    np.testing.assert_allclose(y, np.maximum(h, 0), atol=1e-4)
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_each_variant_acts_where_the_paper_says():
    """Of four stages: IBN-a in the first three, IBN-b at the end of the first two and in the stem."""

    def places(variant):
        net = norm.ibn_net(num_classes=None, variant=variant, layers=(2, 1, 1, 1), width=2)
        params, state = jax.eval_shape(lambda key: net.init(key, 3), jax.random.key(0))
        blocks = sorted(name for name in params if name.startswith("block"))
        assert ("norm" in state) == (variant not in ("b", "d"))
        mixed = [name for name in blocks if "instance" in params[name]["norm_0"]]
        return mixed, [name for name in blocks if "norm_after" in params[name]]

    shallow = ["block_0_0", "block_0_1", "block_1_0", "block_2_0"]
    ends = ["block_0_1", "block_1_0"]
    assert places("none") == ([], [])
    assert places("a") == (shallow, [])
    assert places("b") == places("c") == ([], ends)
    assert places("d") == (shallow, ends)


def test_the_network_learns_its_shapes_and_statistics():
    net = norm.ibn_net(num_classes=3, layers=(1, 1), width=4)
    params, state = net.init(jax.random.key(0), 3)
    x = jnp.float32(rng.normal(size=(2, 16, 16, 3)))
    (y, stages), new = jax.jit(lambda x: net.apply(params, state, x, train=True, stages=True))(x)
    assert y.shape == (2, 3) and [s.shape for s in stages] == [(2, 4, 4, 16), (2, 2, 2, 32)]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), state, new)))
    # He's initialisation by the fan out.
    np.testing.assert_allclose(np.std(params["stem"]), np.sqrt(2 / (49 * 4)), rtol=0.1)


def test_divergence():
    a, b = rng.normal(size=(6, 2, 2, 3)), rng.normal(size=(5, 2, 2, 3)) * 2 + 1

    def oracle(a, b):
        total = 0.0
        for c in range(3):
            u, v = a[..., c].mean((1, 2)), b[..., c].mean((1, 2))
            m, n, s, t = u.mean(), v.mean(), u.std(), v.std()
            kl = lambda m, s, n, t: np.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5
            total += kl(m, s, n, t) + kl(n, t, m, s)
        return total / 3

    single = lambda x: jnp.float32(x)
    got = norm.feature_divergence(single(a), single(b), eps=0.0)
    np.testing.assert_allclose(got, oracle(a, b), rtol=1e-4)
    np.testing.assert_allclose(norm.feature_divergence(single(b), single(a), eps=0.0), got, rtol=1e-6)
    assert norm.feature_divergence(single(a), single(a)) == 0
    where = np.array([1, 1, 0, 1, 1, 0], bool)
    dirty = single(np.where(where[:, None, None, None], a, np.nan))
    masked = norm.feature_divergence(dirty, single(b), where=where, eps=0.0)
    np.testing.assert_allclose(masked, oracle(a[where], b), rtol=1e-4)
    assert norm.feature_divergence(dirty, single(b), where=np.zeros(6, bool)) == 0


def test_refuses():
    x = jnp.ones((2, 3, 3, 4))
    with pytest.raises(ValueError, match="positions"):
        norm.instance_norm(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="gain has shape"):
        norm.instance_norm(x, jnp.ones(3))
    with pytest.raises(ValueError, match="where has shape"):
        norm.instance_norm(x, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="ratio=2"):
        norm.instance_batch_norm(ratio=2)
    layer = norm.instance_batch_norm()
    params, state = layer.init(jax.random.key(0), 6)
    with pytest.raises(ValueError, match="x has shape"):
        layer.apply(params, state, x)
    with pytest.raises(ValueError, match="stride=0"):
        norm.ibn_block(4, stride=0)
    with pytest.raises(ValueError, match="after='end'"):
        norm.ibn_block(4, after="end")
    with pytest.raises(ValueError, match="variant='e'"):
        norm.ibn_net(variant="e")
    with pytest.raises(ValueError, match="layers="):
        norm.ibn_net(layers=())
    with pytest.raises(ValueError, match=r"must be \[N, H, W, channels\]"):
        net = norm.ibn_net(num_classes=2, layers=(1,), width=2, large_stem=False)
        net.apply(*net.init(jax.random.key(0), 3), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="a and b must be"):
        norm.feature_divergence(x, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="kv_where has shape"):
        norm.feature_divergence(x, x, kv_where=jnp.ones(3, bool))


def layer_case(x, where, axis_name=None):
    layer = norm.instance_batch_norm(axis_name=axis_name)
    params, state = layer.init(jax.random.key(0), 4)
    return layer.apply(params, state, x, where=where, train=True)[0]


def net_case(x, where):
    net = norm.ibn_net(num_classes=3, variant="d", layers=(1,), width=2, bottleneck=False, large_stem=False)
    params, state = net.init(jax.random.key(0), 2)
    return net.apply(params, state, x, where=where, train=True)[0]


IMAGES = {"x": Arg("activations", (6, 3, 3, 2)), "where": Arg("where", (6,))}
ROWS = {"x": 0, "where": 0}
CASES = [
    Case(
        layer_case,
        {"x": Arg("activations", (6, 5, 4)), "where": Arg("where", (6,))},
        wrt=("x",),
        rows=ROWS,
        symmetry="equivariant",
        name="instance_batch_norm",
        covers=("norm.instance_batch_norm",),
    ),
    Case(
        norm.instance_norm,
        {
            "x": Arg("activations", (6, 5, 4)),
            "where": Arg("where", (6,)),
            "gain": Arg("scores", (4,)),
            "bias": Arg("scores", (4,)),
        },
        wrt=("x", "gain", "bias"),
        rows=ROWS,
        symmetry="equivariant",
        helper=True,
    ),
    Case(net_case, IMAGES, wrt=("x",), rows=ROWS, symmetry="equivariant", name="ibn_net",
         covers=("norm.ibn_net", "norm.ibn_block"), helper=True, bfloat16_tolerance=0.3),
    Case(
        norm.feature_divergence,
        {
            "a": Arg("activations", (6, 3, 4)),
            "b": Arg("activations", (6, 3, 4)),
            "where": Arg("where", (6,)),
            "kv_where": Arg("where", (6,)),
        },
        wrt=("a", "b"),
        rows={"a": 0, "b": 0, "where": 0, "kv_where": 0},
        symmetry="invariant",
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)

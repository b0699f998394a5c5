"""The shapes: what `as_stateful` accepts, and that networks of other libraries fit in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import nn
from jaxlab.types import Layer, StatefulLayer, as_stateful


def test_as_stateful_passes_on_what_the_network_declares():
    seen = []

    def apply(params, x, *, train=False):
        seen.append(train)
        return params * x

    net = as_stateful(Layer(lambda key, d: jnp.ones(d), apply))
    params, state = net.init(jax.random.key(0), 3)
    y, state = net.apply(params, state, jnp.ones(3), key=jax.random.key(1), train=True)
    assert state == {} and seen == [True] and y.shape == (3,)


def test_as_stateful_keeps_memory_and_passes_bare_functions():
    net = as_stateful(StatefulLayer(lambda key, d: (1.0, 0), lambda p, s, x: (x, s + 1)))
    assert net.apply(1.0, 0, 2.0, key=None, train=True) == (2.0, 1)
    bare = as_stateful(lambda params, x: params * x)
    assert bare.apply(2.0, {}, 3.0, key=None) == (6.0, {})
    with pytest.raises(ValueError, match="bare apply function"):
        bare.init(jax.random.key(0), 3)
    with pytest.raises(TypeError, match="net must be a Layer"):
        as_stateful(3)


def test_flax_linen_and_nnx_fit_in_one_line():
    import flax.linen as linen
    from flax import nnx

    module = linen.Dense(2)
    net = as_stateful(Layer(lambda key, d: module.init(key, jnp.zeros((1, d))), module.apply))
    params, _ = net.init(jax.random.key(0), 3)
    assert net.apply(params, {}, jnp.ones((4, 3)), train=False)[0].shape == (4, 2)

    graph, params = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    net = as_stateful(lambda params, x: nnx.merge(graph, params)(x))
    assert net.apply(params, {}, jnp.ones((4, 3)))[0].shape == (4, 2)


def test_vit_penalty_and_errors():
    net = nn.vit(3, patch=2, width=8, depth=1, heads=2)
    params, state = net.init(jax.random.key(0), jax.ShapeDtypeStruct((4, 4, 1), jnp.float32))
    assert net.apply(params, state, jnp.ones((2, 4, 4, 1)))[0]["logits"].shape == (2, 3)
    with pytest.raises(ValueError, match="patch=2 must divide"):
        net.init(jax.random.key(0), (5, 4, 1))
    with pytest.raises(ValueError, match="heads=3"):
        nn.vit(3, width=8, heads=3)


def test_augmentation_moves_images_in_training_only():
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 1)).astype(np.float32)
    shifted = np.asarray(nn.random_shift(jax.random.key(0), x, pixels=1))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i in range(3):
        crops = [padded[i, a : a + 6, b : b + 6] for a in range(3) for b in range(3)]
        assert any(np.array_equal(shifted[i], crop) for crop in crops)
    still = nn.random_affine(jax.random.key(0), x, degrees=0.0, scale=0.0, pixels=0.0)
    np.testing.assert_allclose(still, x, atol=1e-6)
    assert np.any(np.asarray(nn.random_affine(jax.random.key(0), x)) != x)
    net = nn.with_augmentation(Layer(lambda key, d: {}, lambda p, x: x), nn.random_shift)
    np.testing.assert_array_equal(net.apply({}, {}, x)[0], x)
    with pytest.raises(ValueError, match="key is needed"):
        net.apply({}, {}, x, train=True)

"""A small residual network with batch normalisation for small images, in Flax NNX."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlab.nn.bridges import from_nnx
from jaxlab.types import StatefulLayer


def resnet(num_classes: int, *, width: int = 16, blocks: Sequence[int] = (1, 1, 1)) -> StatefulLayer:
    """Returns a residual network of basic blocks, as He et al. (arXiv 1512.03385) build it for CIFAR.

    A 3x3 convolution, then stages of blocks; each stage after the first halves the image and doubles the channels. The
    shortcut is the identity, or a 1x1 convolution where the shape changes. Convolutions start as He normal, and the
    second normalisation of each block with gain 0, so that it starts as its shortcut.

    Args:
        num_classes: C.
        width: channels of the first stage.
        blocks: number of blocks of each stage; (3, 3, 3) is ResNet-20.

    Returns:
        A `StatefulLayer`: `init(key, image)` with `image` a `jax.ShapeDtypeStruct` or shape `[..., H, W, channels]`,
        `apply(params, state, x [N, H, W, channels], train=False)` gives a dict: `logits [N, C]` and `features
        [N, width * 2 ** (stages - 1)]`, the mean over the last feature map. In training the statistics are those of the
        batch, and the running ones move by 0.1.

    Raises:
        ValueError: `width` or a number of blocks is below 1.

    Example:
        >>> net = resnet(10, width=4, blocks=(1, 1))
        >>> params, state = net.init(jax.random.key(0), (8, 8, 1))
        >>> net.apply(params, state, jnp.ones((2, 8, 8, 1)))[0]["logits"].shape
        (2, 10)
    """
    if width < 1 or not blocks or min(blocks) < 1:
        raise ValueError(f"width={width} and every number in blocks={tuple(blocks)} must be at least 1")

    def make(rngs, channels):
        return _ResNet(channels, num_classes, width, tuple(blocks), rngs)

    net = from_nnx(make, dims_of=lambda x: (x.shape[-1],))
    return StatefulLayer(lambda key, image: net.init(key, getattr(image, "shape", image)[-1]), net.apply)


def _conv(inputs, outputs, size, stride, rngs):
    he = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nnx.Conv(inputs, outputs, (size, size), stride, use_bias=False, kernel_init=he, rngs=rngs)


def _norm(features, rngs, gain=1.0):
    return nnx.BatchNorm(features, momentum=0.9, scale_init=nnx.initializers.constant(gain), rngs=rngs)


class _Block(nnx.Module):
    def __init__(self, inputs, outputs, stride, rngs):
        self.conv_1, self.norm_1 = _conv(inputs, outputs, 3, stride, rngs), _norm(outputs, rngs)
        self.conv_2, self.norm_2 = _conv(outputs, outputs, 3, 1, rngs), _norm(outputs, rngs, gain=0.0)
        same = inputs == outputs and stride == 1
        self.shortcut = nnx.data(None if same else _conv(inputs, outputs, 1, stride, rngs))

    def __call__(self, x):
        y = self.norm_2(self.conv_2(jax.nn.relu(self.norm_1(self.conv_1(x)))))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class _ResNet(nnx.Module):
    def __init__(self, channels, num_classes, width, blocks, rngs):
        self.stem, self.norm = _conv(channels, width, 3, 1, rngs), _norm(width, rngs)
        layers, inputs = [], width
        for stage, number in enumerate(blocks):
            for i in range(number):
                stride = 2 if stage and i == 0 else 1
                layers.append(_Block(inputs, width * 2**stage, stride, rngs))
                inputs = width * 2**stage
        self.blocks = nnx.List(layers)
        self.head = nnx.Linear(inputs, num_classes, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        features = jnp.mean(x, axis=(1, 2))
        return {"logits": self.head(features), "features": features}

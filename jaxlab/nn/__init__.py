"""Small backbones that recipes and claims train, and bridges to and from Flax NNX.

`mlp` and `resnet` are Flax NNX modules behind `from_nnx`; `vit` and `causal_transformer` are composed of `Layer`s, so
that any feed-forward layer (a mixture of experts) can be plugged in.
"""

from jaxlab.nn.augment import random_affine, random_shift, with_augmentation
from jaxlab.nn.blocks import transformer_block
from jaxlab.nn.bridges import from_nnx, to_nnx
from jaxlab.nn.mlp import mlp
from jaxlab.nn.resnet import resnet
from jaxlab.nn.transformer import causal_transformer
from jaxlab.nn.vit import vit

__all__ = [
    "causal_transformer",
    "from_nnx",
    "mlp",
    "random_affine",
    "random_shift",
    "resnet",
    "to_nnx",
    "transformer_block",
    "vit",
    "with_augmentation",
]

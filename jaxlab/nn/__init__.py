"""Small backbones that recipes and claims train, and bridges to and from Flax NNX.

All of them are Flax NNX modules behind `from_nnx`. The transformers take any `Layer` as feed-forward (a mixture of
experts), which `to_nnx` makes a part of the module.
"""

from jaxlab.nn.augment import random_affine, random_shift, with_augmentation
from jaxlab.nn.blocks import transformer_block
from jaxlab.nn.bridges import from_nnx, to_nnx
from jaxlab.nn.mlp import mlp
from jaxlab.nn.precision import with_compute_dtype
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
    "with_compute_dtype",
]

"""Small backbones that recipes and claims train."""

from jaxlab.nn.augment import random_affine, random_shift, with_augmentation
from jaxlab.nn.vit import vit

__all__ = ["random_affine", "random_shift", "vit", "with_augmentation"]

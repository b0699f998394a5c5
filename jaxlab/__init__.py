"""jaxlab: the methods of 218 research papers as pure JAX functions."""

import importlib
from typing import TYPE_CHECKING

__version__: str

_FAMILIES = ("contrastive", "distill", "information", "mil", "moe", "mutual", "norm")
_MODULES = (*_FAMILIES, "kernels", "nn", "ops", "types")
__all__ = [
    "contrastive",
    "distill",
    "information",
    "kernels",
    "mil",
    "moe",
    "mutual",
    "nn",
    "norm",
    "ops",
    "types",
]

if TYPE_CHECKING:
    from jaxlab import contrastive, distill, information, kernels, mil, moe, mutual, nn, norm, ops, types


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"jaxlab.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("jaxlab")
    raise AttributeError(f"module 'jaxlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

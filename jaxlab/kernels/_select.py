"""Which implementation of a kernel runs: the argument, else the environment, else the best that always works."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType

CHOICES = ("auto", "reference", "xla", "pallas")
VARIABLE = "JAXLAB_KERNELS"


def choose(name: str, implementation: str = "auto", available: Sequence[str] = ("reference", "xla")) -> str:
    """Returns the implementation of kernel `name` that is to run.

    An `implementation` other than `"auto"` overrides the environment variable `JAXLAB_KERNELS`, which overrides
    `"auto"`; what is still `"auto"` then is `"xla"` for a kernel without a Pallas form.

    Args:
        name: public name of the kernel, for messages.
        implementation: "auto", "reference", "xla" or "pallas".
        available: the implementations that the kernel has.

    Returns:
        One of `available`, or "auto" if "pallas" is one of them: `by_platform` then chooses as the program is lowered.

    Raises:
        ValueError: the name is unknown, or the kernel has no such implementation.

    Example:
        >>> choose("attention", "reference")
        'reference'
    """
    source = f"implementation={implementation!r}"
    if implementation == "auto":
        implementation = os.environ.get(VARIABLE) or "auto"
        source = f"{VARIABLE}={implementation!r}"
    if implementation not in CHOICES:
        raise ValueError(f"{source} of {name} must be one of {', '.join(map(repr, CHOICES))}")
    if implementation == "auto":
        return "auto" if "pallas" in available else "xla"
    if implementation not in available:
        usable = [repr(choice) for choice in CHOICES if choice == "auto" or choice in available]
        raise ValueError(
            f"no {implementation} implementation of {name} yet on any platform; "
            f"use {', '.join(usable[:-1])} or {usable[-1]}"
        )
    return implementation


def by_platform(chosen: str, xla: Callable[..., Any], tpu: Callable[..., Any], cuda: Callable[..., Any]):
    """Returns the function that runs `xla`, or the kernel of the platform that the program is lowered for.

    With "pallas" there is no way around the kernels: lowering for another platform raises. Nothing is asked of the
    devices that are present, so a program can be compiled for a platform that is not.

    The compiler can spread operations over the devices of a mesh by itself, but no hand-written kernel: there "auto" is
    `xla`. That is known only of a mesh that is set (`jax.set_mesh`, an Explicit mesh); inside `shard_map` over all of
    its axes each device runs the kernel on its own part.
    """
    if chosen == "xla" or (chosen == "auto" and _spread_by_the_compiler()):
        return xla
    others = {"default": xla} if chosen == "auto" else {}
    return lambda *args: jax.lax.platform_dependent(*args, tpu=tpu, cuda=cuda, **others)


def _spread_by_the_compiler() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return any(
        size > 1 and kind != AxisType.Manual for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )

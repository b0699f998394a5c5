"""The device mesh of a run, from `--mesh data=2,expert=4`."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.engine.errors import InputError, did_you_mean

AXES = ("data", "expert", "peer", "model")


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the axis sizes of `data=2,expert=4`; the empty string is no mesh.

    Raises:
        InputError: an unknown axis, a size that is no positive number, or an axis given twice.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in AXES:
            raise InputError(f"mesh axis {name!r} is not one of {', '.join(AXES)}{did_you_mean(name, AXES)}")
        if not size.isdigit() or int(size) < 1:
            raise InputError(f"mesh axis {name} needs a size of at least 1, got {size!r}: write {name}=2")
        if name in sizes:
            raise InputError(f"mesh axis {name} is given twice in {text!r}")
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str) -> Mesh | None:
    """Returns the mesh that the text describes, None for the empty string.

    Raises:
        InputError: the mesh is larger than the devices, or the text is wrong.
    """
    sizes = parse_mesh(text)
    if not sizes:
        return None
    needed = 1
    for size in sizes.values():
        needed *= size
    if needed > len(jax.devices()):
        raise InputError(f"mesh {text} needs {needed} devices, this machine has {len(jax.devices())}")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[:needed])


def check_divides(mesh: Mesh | None, axis: str, name: str, value: int) -> None:
    """Raises an InputError with the nearest values that fit, if the mesh axis does not divide `value`."""
    size = 1 if mesh is None else dict(mesh.shape).get(axis, 1)
    if value % size:
        below = value // size * size
        near = f"{below} or {below + size}" if below else f"{size}"
        raise InputError(f"{name}={value} is not divisible by the mesh axis {axis}={size}: use {near}")


# A leaf below this size is cheaper to keep whole on every device than to gather.
SMALL = 1024


def state_shardings(state: Any, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """Returns the sharding of every leaf: peers over `peer`, stacked experts over `expert`, the rest replicated.

    Args:
        state: pytree of arrays or shapes.
        mesh: the mesh of the run.
        fsdp: whether parameters and optimiser state are also spread over `data`, each leaf along its longest axis that
            is still free and divisible; the compiler gathers a leaf where it is used.
    """
    axes = dict(mesh.shape)

    def of(path, leaf):
        text = jax.tree_util.keystr(path)
        spec: list[str | None] = [None] * leaf.ndim
        if leaf.ndim and "peer" in axes and leaf.shape[0] % axes["peer"] == 0:
            spec[0] = "peer"
        if "'experts'" in text and leaf.ndim > 1 and "expert" in axes and leaf.shape[1] % axes["expert"] == 0:
            spec[1] = "expert"
        if fsdp and "data" in axes and leaf.size >= SMALL:
            free = [i for i in range(leaf.ndim) if spec[i] is None and leaf.shape[i] % axes["data"] == 0]
            if free:
                spec[max(free, key=lambda i: leaf.shape[i])] = "data"
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(of, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: examples over `data`."""
    return NamedSharding(mesh, P("data") if "data" in mesh.shape else P())

"""The only file that may name a JAX version or a private or experimental JAX name."""

from __future__ import annotations

import jax


def varying_axes(x) -> frozenset[str]:
    """Returns the manual mesh axes over which `x` differs between devices (empty outside `shard_map`)."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # JAX 0.10; newer and older releases call the set itself `vma`
    return frozenset(getattr(kind, "vma", frozenset()) if manual is None else manual.varying)


def make_varying(x, axes: frozenset[str]):
    """Marks `x` as varying over `axes`; its cotangent is summed over those it did not vary over before."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def tpu_devices(topology: str) -> list:
    """Returns the devices of a TPU slice such as `v5e:2x2` to compile for, on a machine that may have none.

    Raises:
        RuntimeError: libtpu is not installed, or does not know the slice.
    """
    import os

    from jax.experimental import topologies

    # Two processes may compile at once; without the accelerator's metadata service nothing has to be asked.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # whatever the plugin raises
        raise RuntimeError(f"cannot compile for {topology}: pip install 'jaxlab[aot]' ({error})") from error


def pallas():
    """Returns the Pallas module."""
    from jax.experimental import pallas

    return pallas


def pallas_tpu():
    """Returns Pallas for TPU (Mosaic)."""
    from jax.experimental.pallas import tpu

    return tpu


def pallas_triton():
    """Returns Pallas for GPU (Triton)."""
    from jax.experimental.pallas import triton

    return triton


def tpu_interpreter(*, detect_races: bool = False):
    """Returns what `interpret=` takes to run a TPU kernel on the CPU, memory spaces and copies included."""
    return pallas_tpu().InterpretParams(detect_races=detect_races)


def races_found() -> bool:
    """Tells whether the last interpreted TPU kernel read or wrote memory while a copy was under way there."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found


def shape_like(shape: tuple[int, ...], dtype, *arrays) -> jax.ShapeDtypeStruct:
    """Returns the shape of a kernel's result, which varies over the mesh axes over which any of `arrays` does."""
    axes = frozenset().union(*(varying_axes(x) for x in arrays))
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    kind = next(getattr(jax.typeof(x), "manual_axis_type", None) for x in arrays if varying_axes(x))
    if kind is None:
        return jax.ShapeDtypeStruct(shape, dtype, vma=axes)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kind)(varying=axes))


def gpu_devices(config: str) -> list:
    """Returns the device of a GPU that is described by a target configuration in text form, to compile for.

    Raises:
        RuntimeError: JAX's CUDA plugin is not installed, or JAX was not told to run on the CPU.
    """
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=config, topology="1x1x1"
        )
        return list(topology.devices)
    except Exception as error:  # whatever the plugin raises
        raise RuntimeError(
            f"cannot compile for a GPU: pip install 'jaxlab[aot]', JAX_PLATFORMS=cpu ({error})"
        ) from error


def multihost():
    """Returns JAX's helpers for values that all processes exchange on the host."""
    from jax.experimental import multihost_utils

    return multihost_utils

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

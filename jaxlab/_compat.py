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

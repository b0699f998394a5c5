"""Compiles a recipe's whole train step for a TPU slice that is not here, and says what it needs.

    python tpu/aot.py --target tpu:v5e:4x4 [--recipe mutual_moe] [--json] --mesh data=8,peer=2 [flags of the recipe]

Needs the extra `aot`, and JAX_PLATFORMS=cpu where there is no accelerator. Nothing is run: that it compiles and fits
says nothing about its speed. Cost figures are the compiler's own; it counts the body of a loop once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab._compat import tpu_devices
from jaxlab.cli import recipe_parser
from jaxlab.engine import guard
from jaxlab.engine.mesh import batch_sharding, check_divides, parse_mesh, state_shardings
from jaxlab.engine.recipes import find_recipe

# Memory of one chip in GiB, as its maker states it.
HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}


def report(recipe, target: str, image: tuple[int, ...], classes: int) -> dict:
    """Returns FLOPs, bytes and memory per device of one train step on the slice `tpu:KIND:TOPOLOGY`.

    Raises:
        ValueError: the target is no TPU that is known, or the mesh does not fit its devices or the recipe.
    """
    platform, _, rest = target.partition(":")
    kind, _, topology = rest.partition(":")
    if platform != "tpu" or kind not in HBM or not topology:
        raise ValueError(f"target {target!r} must be like tpu:v5e:4x4, with one of {', '.join(HBM)}")
    devices = tpu_devices(f"{kind}:{topology}")
    sizes = parse_mesh(recipe.mesh) or {"data": len(devices)}
    needed = 1
    for size in sizes.values():
        needed *= size
    if needed > len(devices):
        raise ValueError(f"mesh {recipe.mesh} needs {needed} devices, {target} has {len(devices)}")
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:needed]
    )
    recipe.validate()
    for axis, name, value in recipe.divisions():
        check_divides(mesh, axis, name, value)
    learner = recipe.learner(classes, recipe.steps)
    shapes = {
        "x": jax.ShapeDtypeStruct((recipe.batch, *image), jnp.float32),
        "y": jax.ShapeDtypeStruct((recipe.batch,), jnp.int32),
        "where": jax.ShapeDtypeStruct((recipe.batch,), jnp.bool_),
        "index": jax.ShapeDtypeStruct((recipe.batch,), jnp.int32),
    }
    carry = jax.eval_shape(
        lambda key: guard.start(learner.init(key, shapes)), jax.eval_shape(lambda: jax.random.key(0))
    )
    places = state_shardings(carry, mesh, fsdp=recipe.shard == "fsdp")

    def placed(tree, where):
        return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), tree, where)

    step = guard.train_step(learner, seed=recipe.seed, limit=recipe.bad_steps, mesh=mesh)
    whole = NamedSharding(mesh, P())
    lowered = jax.jit(step, donate_argnums=0, out_shardings=(places, whole)).lower(
        placed(carry, places),
        placed(shapes, jax.tree.map(lambda _: batch_sharding(mesh), shapes)),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )
    compiled = lowered.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return {
        "recipe": recipe.name,
        "target": target,
        "mesh": dict(mesh.shape),
        "flops_per_device": cost.get("flops"),
        "hbm_bytes_per_device": cost.get("bytes accessed"),
        "state_and_batch_bytes": arguments,
        "temporary_bytes": temporaries,
        "memory_bytes": HBM[kind] * 2**30,
        "fits": arguments + temporaries <= HBM[kind] * 2**30,
    }


def main(argv: list[str]) -> int:
    """Prints the report; exit code 2 for bad input, 1 where the step does not fit."""
    own = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    own.add_argument("--recipe", default="mutual_moe")
    own.add_argument("--target", required=True, help="tpu:v5e:4x4, tpu:v6e:2x2, tpu:tpu7x:2x2x1, ...")
    own.add_argument("--image", default="8,8,1", help="height, width and channels of one example")
    own.add_argument("--classes", type=int, default=10)
    own.add_argument("--json", action="store_true")
    args, rest = own.parse_known_args(argv)
    try:
        kind = find_recipe(args.recipe)
        flags = recipe_parser(kind).parse_args(rest)
        recipe = kind(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(kind)})
        found = report(recipe, args.target, tuple(int(n) for n in args.image.split(",")), args.classes)
    except ValueError as error:
        print(f"tpu/aot.py: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found))
    else:
        mib = {name: found[name] / 2**20 for name in ("state_and_batch_bytes", "temporary_bytes", "memory_bytes")}
        flops, moved = ((found[name] or 0) / 1e9 for name in ("flops_per_device", "hbm_bytes_per_device"))
        fits = "fits" if found["fits"] else "does not fit"
        print(f"{found['recipe']} for {found['target']}, mesh {found['mesh']}")
        print(f"per device and step: {flops:.2f} GFLOP, {moved:.2f} GB between memory and core")
        print(
            f"{mib['state_and_batch_bytes']:.1f} MiB of state and batch and {mib['temporary_bytes']:.1f} MiB of "
            f"temporaries: {fits} into {mib['memory_bytes'] / 1024:.0f} GiB"
        )
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

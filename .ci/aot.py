"""Compiles the flagship's train step for a TPU v5e on a machine that has none; run by .ci/run."""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxlab._compat import tpu_devices
from jaxlab.engine.recipes import MutualMoE

recipe = MutualMoE()
learner = recipe.learner(num_classes=10, steps=recipe.steps)
sharding = SingleDeviceSharding(tpu_devices("v5e:2x2")[0])


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


batch = {
    "x": jax.ShapeDtypeStruct((recipe.batch, 8, 8, 1), jnp.float32),
    "y": jax.ShapeDtypeStruct((recipe.batch,), jnp.int32),
    "where": jax.ShapeDtypeStruct((recipe.batch,), jnp.bool_),
}
key = jax.eval_shape(lambda: jax.random.key(0))
state = jax.eval_shape(learner.init, key, batch)
step = jax.jit(lambda state, batch: learner.update(state, batch, jax.random.key(0)))
compiled = step.lower(shapes(state), shapes(batch)).compile()
memory = compiled.memory_analysis()
print(f"flagship train step compiled for tpu:v5e: {memory.temp_size_in_bytes / 2**20:.1f} MiB of temporaries")

# %% [markdown]
# # A loss in your own loop, then over eight devices
#
# A contrastive loss is a function of arrays. Here it goes into an optax loop that knows nothing of jaxlab, then the
# same line runs over eight devices with negatives from all of them, and then in chunks, for batches whose pairs would
# not fit into memory. Everything runs on a CPU, which pretends to be eight devices.

# %% [install]

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # before anything else touches JAX; on a TPU or GPU box it changes nothing

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from jaxlab.contrastive import nt_xent_loss
from jaxlab.ops import weighted_knn

print(jax.devices())
pixels, labels = load_digits(return_X_y=True)
pixels, labels = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels)

# %% [markdown]
# ## Your loop
#
# Two noisy views of each picture, an encoder of your own, any optax optimiser. `nt_xent_loss` wants the views stacked:
# `[views, examples, features]`.


# %%
def encode(params, x):
    return jax.nn.relu(x @ params["hidden"]) @ params["out"]


def views_of(x, key):
    keep, noise = jax.random.split(key)
    return x[None] * jax.random.bernoulli(keep, 0.8, (2, *x.shape)) + 0.1 * jax.random.normal(noise, (2, *x.shape))


def loss(params, views, axis_name=None, chunk=None):
    z = jax.vmap(lambda view: encode(params, view))(views)
    return nt_xent_loss(z, temperature=0.2, axis_name=axis_name, chunk=chunk)


keys = jax.random.split(jax.random.key(0))
params = {"hidden": jax.random.normal(keys[0], (64, 128)) / 8, "out": jax.random.normal(keys[1], (128, 32)) / 11}
optimizer = optax.adam(3e-3)


@jax.jit
def step(params, opt_state, key):
    key_rows, key_views = jax.random.split(key)
    x = pixels[jax.random.randint(key_rows, (256,), 0, len(pixels))]
    value, grads = jax.value_and_grad(loss)(params, views_of(x, key_views))
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


opt_state, curve = optimizer.init(params), []
for i in range(200):
    params, opt_state, value = step(params, opt_state, jax.random.key(i))
    curve.append(float(value))
z = encode(params, pixels)
votes = weighted_knn(z[1200:], z[:1200], labels[:1200], num_classes=10)
print(f"loss {curve[0]:.2f} to {curve[-1]:.2f}; neighbours right: {np.mean(votes.argmax(-1) == labels[1200:]):.1%}")

# %% [markdown]
# ## The same over eight devices
#
# Each device holds an eighth of the examples. With `axis_name="data"` the loss gathers the other devices' embeddings
# and returns the global value, so value and gradient are those of one device. Take the gradient outside of the map.

# %%
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
spread = jax.shard_map(
    lambda params, views: loss(params, views, axis_name="data"),
    mesh=mesh,
    in_specs=(P(), P(None, "data")),
    out_specs=P(),
)
views = views_of(pixels[:256], jax.random.key(9))
one, grads_one = jax.jit(jax.value_and_grad(loss))(params, views)
eight, grads_eight = jax.jit(jax.value_and_grad(spread))(params, views)
worst = max(
    float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (grads_one, grads_eight)), strict=True)
)
print(f"one device {one:.6f}, eight devices {eight:.6f}, largest difference of a gradient {worst:.1e}")

# %% [markdown]
# ## In chunks, for large batches
#
# All pairs of a large batch do not fit into memory. `chunk=` compares so many examples at a time and computes them
# again in the backward pass; the numbers stay the same. The compiler says what each form needs.


# %%
def mebibytes(size, chunk):
    shape = jax.ShapeDtypeStruct((2, size, 64), jnp.float32)
    form = jax.jit(jax.value_and_grad(lambda params, views: loss(params, views, chunk=chunk)))
    return form.lower(params, shape).compile().memory_analysis().temp_size_in_bytes / 2**20


sizes = [1024, 2048, 4096, 8192]
whole, chunked = ([mebibytes(size, chunk) for size in sizes] for chunk in (None, 256))
plt.figure(figsize=(5, 2.6))
plt.loglog(sizes, whole, "o-", label="all pairs at once")
plt.loglog(sizes, chunked, "o-", label="chunk=256")
plt.xlabel("examples in the batch")
plt.ylabel("MiB of temporaries")
plt.legend()
plt.tight_layout()
plt.show()
same = [float(jax.jit(lambda v, c=c: loss(params, v, chunk=c))(views)) for c in (None, 32)]
print(f"all at once {same[0]:.6f}, in chunks {same[1]:.6f}; MiB at {sizes[-1]}: {whole[-1]:.0f} and {chunked[-1]:.0f}")

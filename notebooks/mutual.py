# %% [markdown]
# # Networks that teach each other, with your own Flax network
#
# Four copies of a network of yours learn at once: from the labels, and from what the others say. They are one program
# with a leading axis of peers, and only predictions pass between them. Less than a minute on a CPU is enough.

# %% [install]

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from jaxlab import mutual, nn

# %% [markdown]
# ## The network
#
# Any NNX module. `from_nnx` turns it into the pair of functions that every method here takes: how to draw parameters,
# and how to use them.


# %%
class Digits(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.hidden(x)))))


net = nn.from_nnx(lambda rngs: Digits(rngs))

# %% [markdown]
# ## Four peers
#
# The hyper-parameters may differ: here every peer has a learning rate of its own. Two hundred labelled digits have to
# do; the mutual term starts gently.

# %%
pixels, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = np.float32(pixels / 16)[order], labels[order].astype(np.int32)
train, test = {"x": x[:200], "y": y[:200]}, {"x": x[800:], "y": y[800:]}


def learner_of(weight):
    return mutual.peers(
        net,
        lambda hyper: optax.adam(hyper["rate"]),
        num_peers=4,
        hyper={"rate": jnp.array([1e-3, 2e-3, 3e-3, 5e-3])},
        mutual=mutual.mutual_objective(direction="symmetric"),
        weight=lambda step: weight * mutual.ramp_up(step, length=100),
    )


def fit(learner, steps=300):
    state = jax.jit(learner.init)(jax.random.key(0), train)

    @jax.jit
    def step(state, key):
        rows = jax.random.randint(key, (64,), 0, len(train["y"]))
        return learner.update(state, {n: jnp.asarray(v)[rows] for n, v in train.items()}, key)

    curve = []
    for i in range(steps):
        state, metrics = step(state, jax.random.key(i))
        curve.append(jax.device_get(metrics))
    outputs = jax.jit(learner.predict)(state, test)
    alone = np.mean(np.argmax(outputs["logits"], -1) == test["y"][None], axis=1)
    return curve, alone, np.mean(np.argmax(outputs["probs"], -1) == test["y"])


results = {}
for name, weight in (("alone", 0.0), ("together", 1.0)):
    curve, each, ensemble = results[name] = fit(learner_of(weight))
    print(f"{name}: peers {np.round(each, 3)}, mean of their predictions {ensemble:.3f}")

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 2.8))
for name, (curve, _, _) in results.items():
    panels[0].plot([row["agreement"] for row in curve], label=name)
    panels[1].plot([row["loss"].mean() for row in curve], label=name)
for axes, title in zip(panels, ("batches on which all agree", "mean loss"), strict=True):
    axes.set(title=title, xlabel="step")
    axes.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# Whether the peers gain from each other depends on the task: with well-tuned networks and many labels the authors' own
# users found little. What they surely do is agree more often.
#
# ## One peer leaves
#
# A mask says who takes part in a step. Who is away neither learns nor teaches.

# %%
learner = learner_of(1.0)
state = jax.jit(learner.init)(jax.random.key(0), train)
away = {**train, "peers": np.array([True, True, True, False])}
new, _ = jax.jit(learner.update)(state, away, jax.random.key(1))
moved = jax.tree.map(lambda a, b: np.abs(a - b).max(axis=tuple(range(1, a.ndim))), new.params, state.params)
print("largest change of the hidden weights, by peer:", np.round(moved["hidden"]["kernel"], 4))

# %% [markdown]
# On several devices the same `learner.update` runs in `shard_map` over a mesh with an axis `peer`
# (`mutual.peers(..., axis_name="peer")`), and `jaxlab train mutual --peers 4 --objective symmetric_kl` does all of this
# from a terminal.

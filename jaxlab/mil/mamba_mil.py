"""MambaMIL: Enhancing Long Sequence Modeling with Sequence Reordering in Computational Pathology (2024).

arXiv 2403.06800. Instances of a bag are read one after the other by selective state-space models, at linear cost; a
second one reads them in a strided order, in which those that are far apart become neighbours.

    h      <- dropout(relu(W_1 x + b_1));    h <- h + SRMamba(norm(h)), L times;    h <- norm(h)
    a       = softmax_i(w . tanh(V h_i + b) + c),    z = sum_i a_i h_i,    logits = W_c z + b_c
    SRMamba (x, g) = split(u W_in);   result = (y_1 + y_2) W_out
    branch  x' = silu(conv(x)), causal, 4 taps, each channel by itself;   (d, B, C) = x' W_x
            D_t = softplus(d W_d + b_d);   s_t = exp(D_t A) s_{t-1} + D_t B_t x'_t;   y = (C_t s_t + D x'_t) silu(g)
    order   branch 1: as they come.   Branch 2: n instances and zeros up to n' = ceil(n / R) R, written into rows of R
            and read by columns: place k R + r becomes r n' / R + k

`kind="mamba"` has branch 1 alone, `kind="bi"` lets branch 2 read backwards. Order matters: that of the slide's tiles.

The zeros of branch 2 pass the bias of its convolution and so move the state; `mask_padding=True` passes over them.
Initialisation "official" is what the code arrives at: it draws all dense weights Xavier-normal and zeroes all dense
biases, which overwrites Mamba's step sizes; "mamba" keeps these. Reconstructed: bags of a list are one sequence with
empty places between them, at which the state is forgotten, so that memory is linear in the list.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels.selective_scan import selective_scan
from jaxlab.mil.models import at_least_one, instance_encoder, xavier_dense
from jaxlab.mil.pooling import Bags, group
from jaxlab.ops.layers import feature_norm
from jaxlab.ops.masked import compute_dtype, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer

_KINDS = ("sr", "mamba", "bi")


def mamba_mil(
    num_classes: int,
    *,
    features: int = 512,
    layers: int = 2,
    kind: str = "sr",
    rate: int = 10,
    states: int = 16,
    expand: int = 2,
    taps: int = 4,
    hidden: int = 128,
    dropout: float = 0.25,
    activation: Callable[[Array], Array] = jax.nn.relu,
    init: str = "official",
    mask_padding: bool = False,
) -> Layer:
    """Returns the bag classifier MambaMIL.

    Args:
        num_classes: C (or the time bins of `survival_outputs`).
        features: size of the projected instances.
        layers: L, number of blocks.
        kind: see `sr_mamba`, as are `rate`, `states`, `expand`, `taps`, `init` and `mask_padding`.
        rate: R.
        states: N.
        expand: channels of a block per feature.
        taps: of the convolution.
        hidden: size of the attention's hidden layer.
        dropout: of the projected instances in training, in [0, 1).
        activation: after the projection.
        init: "official" or "mamba".
        mask_padding: whether the zeros of the reordering are passed over.

    Returns:
        A `Layer` over instances [B, N, D] or [T, D], in order; `apply` also takes `key` and `train`. Its dict has
        `logits` [B, C], `embedding` [B, features] and `attention` [B, N] or [T]. An empty bag has the logits' bias.

    Raises:
        ValueError: an option is out of range; in `apply`, shapes do not fit or the key is missing.

    Example:
        >>> model = mamba_mil(2, features=8, layers=1)
        >>> out = jax.eval_shape(lambda key: model.apply(model.init(key, 3), jnp.ones((4, 5, 3))), jax.random.key(0))
        >>> out["attention"].shape
        (4, 5)

    Source:
        Yang et al., arXiv 2403.06800; code isyangshu/MambaMIL, `models/MambaMIL.py` (its defaults; its scripts also
        take R = 5; AdamW or Adam at 2e-4, one bag a step).
    """
    at_least_one(num_classes=num_classes, layers=layers, hidden=hidden)
    project = instance_encoder(features, activation=activation, dropout=dropout)
    options = {"states": states, "expand": expand, "taps": taps, "init": init, "mask_padding": mask_padding}
    block, norm = sr_mamba(kind=kind, rate=rate, **options), feature_norm(eps=1e-5)
    to_hidden, to_score, head = (xavier_dense(n) for n in (hidden, 1, num_classes))

    def start(key, size):
        keys = jax.random.split(key, layers + 4)
        params = {"project": project.init(keys[0], size), "norm": norm.init(keys[0], features)}
        for i in range(layers):
            params[f"layer_{i}"] = {"norm": norm.init(keys[0], features), "block": block.init(keys[i + 4], features)}
        params["hidden"], params["score"] = to_hidden.init(keys[1], features), to_score.init(keys[2], hidden)
        return {**params, "head": head.init(keys[3], features)}

    def apply(params, x, *, where=None, segment_ids=None, num_segments=None, key=None, train=False):
        bags = group(x, where, segment_ids, num_segments)
        layout = {"where": where, "segment_ids": segment_ids, "num_segments": num_segments}
        h = project.apply(params["project"], zero_where_false(x, bags.keep), key=key, train=train)
        for i in range(layers):
            p = params[f"layer_{i}"]
            h = h + block.apply(p["block"], norm.apply(p["norm"], h), **layout)
        return rows_mixed(classify)(params, h, bags)

    def classify(params, h, bags):
        h = zero_where_false(norm.apply(params["norm"], h), bags.keep)
        inner = jnp.tanh(to_hidden.apply(params["hidden"], h))
        pooled, weights = bags.pool(h, to_score.apply(params["score"], inner)[..., 0])
        return {"logits": head.apply(params["head"], pooled), "embedding": pooled, "attention": weights}

    return Layer(start, apply)


def sr_mamba(
    *,
    kind: str = "sr",
    rate: int = 10,
    states: int = 16,
    expand: int = 2,
    taps: int = 4,
    init: str = "official",
    mask_padding: bool = False,
) -> Layer:
    """Returns the block of selective state-space models in two orders, features in and features out.

    Args:
        kind: "sr" (as they come, and reordered), "bi" (as they come, and backwards) or "mamba" (as they come).
        rate: R, distance of those that become neighbours; 1 leaves the order as it is.
        states: N, size of the state of a channel.
        expand: channels per feature.
        taps: of the convolution.
        init: "official" or "mamba", see the module.
        mask_padding: whether the zeros of the reordering are passed over.

    Returns:
        A `Layer`: `params = init(key, D)`; `apply(params, u, where=, segment_ids=, num_segments=)`, u [B, N, D] or
        [T, D], gives the same shape, 0 on padding. There is no norm and no residual. In `params` all leaves of
        `branches` have the branches as their first axis.

    Raises:
        ValueError: an option is out of range; in `apply`, shapes do not fit.

    Example:
        >>> block = sr_mamba(rate=2)
        >>> jax.eval_shape(lambda key: block.apply(block.init(key, 4), jnp.ones((1, 5, 4))), jax.random.key(0)).shape
        (1, 5, 4)

    Source:
        Yang et al., arXiv 2403.06800, section 2.2; code isyangshu/MambaMIL, `srmamba.py`. The step sizes, the
        convolution and A are Mamba's, arXiv 2312.00752.
    """
    at_least_one(rate=rate, states=states, expand=expand, taps=taps)
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(_KINDS)}")
    if init not in ("official", "mamba"):
        raise ValueError(f"init={init!r} must be 'official' or 'mamba'")
    branches, width = 1 if kind == "mamba" else 2, rate if kind == "sr" else 1

    def start_branch(key, channels, rank):
        keys = jax.random.split(key, 4)
        conv = jax.random.uniform(keys[0], (taps + 1, channels), minval=-(taps**-0.5), maxval=taps**-0.5)
        if init == "mamba":
            size = jnp.exp(jax.random.uniform(keys[3], (channels,), minval=math.log(1e-3), maxval=math.log(1e-1)))
            uniform = jax.random.uniform(keys[2], (rank, channels), minval=-(rank**-0.5), maxval=rank**-0.5)
            steps = {"w": uniform, "b": size + jnp.log(-jnp.expm1(-size))}  # softplus of it is the size
        else:
            steps = xavier_dense(channels).init(keys[2], rank)
        return {
            "conv": {"w": conv[1:], "b": conv[0]},
            "in": xavier_dense(rank + 2 * states, bias=False).init(keys[1], channels),
            "steps": steps,
            "log_decay": jnp.broadcast_to(jnp.log(jnp.arange(1.0, states + 1))[None], (channels, states)) + 0.0,
            "skip": jnp.ones(channels),
        }

    def start(key, size):
        channels, rank = expand * size, math.ceil(size / 16)
        keys = jax.random.split(key, 2 + branches)
        return {
            "in": xavier_dense(2 * channels, bias=False).init(keys[0], size),
            "out": xavier_dense(size, bias=False).init(keys[1], channels),
            "branches": jax.vmap(lambda key: start_branch(key, channels, rank))(keys[2:]),
        }

    def apply(params, u, *, where=None, segment_ids=None, num_segments=None):
        bags = group(u, where, segment_ids, num_segments)
        return rows_mixed(run)(params, zero_where_false(u, bags.keep), bags)

    def run(params, u, bags):
        both = xavier_dense(2 * expand * u.shape[-1], bias=False).apply(params["in"], u)
        x, gate = jnp.split(both, 2, axis=-1)
        sequence = _Sequence(bags, width, taps - 1)
        places = [sequence.place]
        if kind != "mamba":
            places.append(sequence.reordered() if kind == "sr" else sequence.backwards())
        live = [sequence.filled(place) for place in places]
        if kind == "sr" and not mask_padding:
            live[1] = sequence.exists
        read = jax.vmap(lambda branch, place, live: _branch(branch, x, sequence, place, live))
        y = jnp.sum(read(params["branches"], jnp.stack(places), jnp.stack(live)), axis=0)
        y = (y * jax.nn.silu(gate).astype(y.dtype)).astype(u.dtype)
        return zero_where_false(xavier_dense(u.shape[-1], bias=False).apply(params["out"], y), bags.keep)

    return Layer(start, apply)


def reorder(x: Array, rate: int) -> Array:
    """Returns the rows in the order of the second branch: padded with zeros to a multiple of R, then every R-th.

    Args:
        x: [..., n, C].
        rate: R.

    Returns:
        [..., n', C] with `n' = ceil(n / R) R`; row `k R + r` stands at `r n' / R + k`.

    Raises:
        ValueError: `rate` is below 1 or `x` has fewer than two axes.

    Example:
        >>> jax.jit(lambda x: reorder(x[:, None], 3)[:, 0])(jnp.arange(1, 8)).tolist()
        [1, 4, 7, 2, 5, 0, 3, 6, 0]

    Source:
        Yang et al., arXiv 2403.06800, section 2.2.
    """
    at_least_one(rate=rate)
    if x.ndim < 2:
        raise ValueError(f"x must be [..., n, C], got shape {x.shape}")
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % rate), (0, 0)])
    rows = padded.reshape(*x.shape[:-2], -1, rate, x.shape[-1])
    return jnp.swapaxes(rows, -2, -3).reshape(padded.shape)


def inverse_reorder(y: Array, rate: int, length: int) -> Array:
    """Returns the rows whose `reorder` is `y`.

    Args:
        y: [..., n', C].
        rate: R.
        length: n, with `n' = ceil(n / R) R`.

    Returns:
        [..., n, C].

    Raises:
        ValueError: the sizes do not fit.

    Example:
        >>> jax.jit(lambda x: inverse_reorder(reorder(x[:, None], 3), 3, 7)[:, 0])(jnp.arange(1, 8)).tolist()
        [1, 2, 3, 4, 5, 6, 7]

    Source:
        Yang et al., arXiv 2403.06800, section 2.2.
    """
    at_least_one(rate=rate)
    if y.ndim < 2 or y.shape[-2] != length + -length % rate:
        raise ValueError(f"y must be [..., {length + -length % rate}, C] for length={length}, got shape {y.shape}")
    rows = y.reshape(*y.shape[:-2], rate, -1, y.shape[-1])
    return jnp.swapaxes(rows, -2, -3).reshape(y.shape)[..., :length, :]


def survival_outputs(logits: Array) -> tuple[Array, Array]:
    """Returns the hazard of each time bin and the probability of living through it.

    `hazard_k = sigmoid(logits_k)`, `S_k = prod_{j <= k} (1 - hazard_j)`.

    Args:
        logits: float [B, K], bins in order of time.

    Returns:
        Two arrays [B, K] in the dtype of `logits`.

    Raises:
        ValueError: `logits` is not [B, K].

    Example:
        >>> jax.jit(survival_outputs)(jnp.zeros((1, 2)))[1].tolist()
        [[0.5, 0.25]]

    Source:
        Code isyangshu/MambaMIL, `MambaMIL.forward` with `survival`.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [B, K], got shape {logits.shape}")
    z = logits.astype(compute_dtype(logits))
    alive = jnp.exp(jnp.cumsum(jax.nn.log_sigmoid(-z), axis=1))
    return jax.nn.sigmoid(z).astype(logits.dtype), alive.astype(logits.dtype)


def nll_survival_loss(
    logits: Array,
    labels: Array,
    censored: Array,
    *,
    alpha: float = 0.0,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the negative log-likelihood of discrete survival times, some of which are censored.

    The event in bin y: `-log S_{y-1} - log hazard_y`, with `S_{-1} = 1`. Censored in bin y: `(1 - alpha)` times
    `-log S_y`.

    Args:
        logits: float [B, K], see `survival_outputs`.
        labels: int [B], bin 0 to K - 1; -1 = unknown, no term.
        censored: bool or int [B], 1 = the event had not come by the end of the bin.
        alpha: in [0, 1], how much less censored bags count.
        where: bool [B], real bags.
        axis_name: mapped axis over which the bags are spread.
        reduction: "mean" (over all shards) or "none", [B].

    Returns:
        Scalar in the accumulation dtype, or [B] in the dtype of `logits`; no bag gives 0.

    Raises:
        ValueError: shapes do not fit or `alpha` is out of range.

    Example:
        >>> loss = jax.jit(nll_survival_loss)
        >>> round(float(loss(jnp.zeros((1, 3)), jnp.array([1]), jnp.array([0]))), 3)  # -log 1/2 - log 1/2
        1.386

    Source:
        Zadeh, Schmid, Bias in cross-entropy-based training of deep survival networks, 2020, as in the code of
        isyangshu/MambaMIL (which clips probabilities at 1e-7; here logarithms are exact).
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or censored.shape != labels.shape:
        raise ValueError(
            f"logits, labels and censored must be [B, K], [B] and [B], got {logits.shape}, {labels.shape} and "
            f"{censored.shape}"
        )
    if where is not None and where.shape != labels.shape:
        raise ValueError(f"where has shape {where.shape}, expected {labels.shape}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be in [0, 1]")
    keep = (labels >= 0) & (labels < logits.shape[1])
    keep = keep if where is None else keep & where
    z = zero_where_false(logits, keep).astype(compute_dtype(logits))
    bins, own = jnp.arange(logits.shape[1])[None, :], labels[:, None]
    past = jnp.sum(jnp.where(bins < own, jax.nn.log_sigmoid(-z), 0.0), axis=1)
    event = jnp.sum(jnp.where(bins == own, jax.nn.log_sigmoid(z), 0.0), axis=1)
    beyond = jnp.sum(jnp.where(bins == own, jax.nn.log_sigmoid(-z), 0.0), axis=1)
    terms = -jnp.where(censored.astype(bool), (1 - alpha) * (past + beyond), past + event)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=logits.dtype)


class _Sequence:
    """Bags as rows of places to be scanned: each padded bag is a row; a list is one row, with gaps between bags.

    `place` is where an instance stands in its own bag. The places of a bag are a multiple of R, and those above its
    number of instances stay empty. In the gaps the convolution sees zeros and the state is forgotten.
    """

    def __init__(self, bags: Bags, multiple: int, gap: int):
        self._bags, self._multiple = bags, multiple
        self.place = bags.rank(jnp.zeros(bags.keep.shape, jnp.float32))
        self._size = bags.count + -bags.count % multiple
        if bags.segment_ids is None:
            length = bags.keep.shape[1]
            self.shape = (bags.size, length + -length % multiple)
            self._first = jnp.arange(bags.size)[:, None] * self.shape[1]
            place = jnp.broadcast_to(jnp.arange(self.shape[1])[None, :], self.shape)
            own = self._size[:, None]
        else:
            self.shape = (1, bags.keep.shape[0] + bags.size * (gap + multiple - 1))
            ends = jnp.cumsum(gap + self._size)
            first = ends - self._size
            self._first = bags.spread(first)
            bag = jnp.minimum(jnp.searchsorted(ends, jnp.arange(self.shape[1]), side="right"), bags.size - 1)
            place, own = (jnp.arange(self.shape[1]) - first[bag])[None, :], self._size[bag][None, :]
        self.exists, self.gap = (place >= 0) & (place < own), place < 0

    def reordered(self) -> Array:
        """Returns the place of each instance when every R-th is read."""
        columns = self._bags.spread(self._size // self._multiple)
        return self.place % self._multiple * columns + self.place // self._multiple

    def backwards(self) -> Array:
        """Returns the place of each instance when they are read from the last to the first."""
        return self._bags.spread(self._bags.count) - 1 - self.place

    def filled(self, place: Array) -> Array:
        """Returns bool like the rows: which places an instance has."""
        flat = jnp.zeros(math.prod(self.shape), bool)
        return flat.at[self._index(place)].set(True, mode="drop").reshape(self.shape)

    def fill(self, x: Array, place: Array) -> Array:
        """Returns the instances at their places, 0 elsewhere."""
        flat = jnp.zeros((math.prod(self.shape), x.shape[-1]), x.dtype)
        flat = flat.at[self._index(place)].set(x.reshape(-1, x.shape[-1]), mode="drop")
        return flat.reshape(*self.shape, -1)

    def take(self, y: Array, place: Array) -> Array:
        """Returns what stands at each instance's place, in the layout of the instances."""
        flat = y.reshape(-1, y.shape[-1]).at[self._index(place)].get(mode="fill", fill_value=0)
        return flat.reshape(*self._bags.keep.shape, -1)

    def _index(self, place: Array) -> Array:
        return jnp.where(self._bags.keep, self._first + place, math.prod(self.shape)).reshape(-1)


def _branch(params: dict, x: Array, sequence: _Sequence, place: Array, live: Array) -> Array:
    """Returns what one branch reads from the instances in the given order, in the dtype of accumulation."""
    wide = compute_dtype(x)
    u = _causal_conv(params["conv"], sequence.fill(x, place))
    rank, states = params["steps"]["w"].shape[0], params["log_decay"].shape[1]
    low, into, out = jnp.split(
        xavier_dense(rank + 2 * states, bias=False).apply(params["in"], u), (rank, rank + states), axis=-1
    )
    delta = jax.nn.softplus(xavier_dense(u.shape[-1]).apply(params["steps"], low).astype(wide))
    # A step so long forgets everything, whatever the decay; nothing enters there.
    forget = sequence.gap[..., None]
    delta, u = jnp.where(forget, jnp.asarray(1e30, wide), delta), jnp.where(forget, 0.0, u.astype(wide))
    decay = -jnp.exp(params["log_decay"].astype(wide))
    y = selective_scan(u, delta, decay, into, out, params["skip"], where=live | sequence.gap)
    return sequence.take(y, place)


def _causal_conv(params: dict, x: Array) -> Array:
    """Returns silu of the convolution along axis 1, each channel by itself: the last tap is the place itself."""
    weights, count = params["w"].astype(compute_dtype(x)), params["w"].shape[0]
    padded = jnp.pad(x, ((0, 0), (count - 1, 0), (0, 0))).astype(weights.dtype)
    taps = (weights[i][None, None] * padded[:, i : i + x.shape[1]] for i in range(count))
    return jax.nn.silu(sum(taps) + params["b"].astype(weights.dtype)[None, None]).astype(x.dtype)

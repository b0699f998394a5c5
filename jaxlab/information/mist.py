"""MIST: Mutual Information Via Supervised Training.

2025, arXiv 2511.18945. The estimator itself is learnt: a network that takes a whole sample {(x_i, y_i)} and returns
I(X; Y), trained on samples of many synthetic distributions whose information is known. An estimate is one forward
pass; a level tau as a further input makes it the tau-quantile of the information, hence intervals.

    h_i    = embed([x_i, y_i, 0 ...])                    rows padded with zeros to `max_size` columns
    h      = feature_layers x [ dropout(LN(SAB(h))) ],  encoder_layers x ISAB(h)
    r      = linear(PMA_1(decoder_layers x SAB(PMA_seeds(h))))
    I_tau  = rho([r, tau])
    loss   = mean max(tau u, (tau - 1) u),  u = I - I_tau,  tau ~ U(0, 1)     (or the mean of u^2, without tau)

with the set transformer's post-norm blocks (arXiv 1810.00825): MAB(a, b) = LN(h + FF(h)), h = LN(a + attention(a, b,
b)); SAB(h) = MAB(h, h); ISAB(h) = MAB(h, MAB(seeds, h)); PMA(h) = MAB(seeds, h). The result does not depend on the
order of the rows; it does on that of the columns. Defaults are those of the released MIST_QR network. Its training:
AdamW, rate 1.1e-4, eps 8e-9, decay 8.7e-6, gradient norm at most 1, batches of 256 samples of 10 to 500 rows.

The abstract speaks of attention in two dimensions; the released network embeds whole rows, which is what is here.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels.attention import attention
from jaxlab.ops.layers import dense, feature_norm, mlp
from jaxlab.ops.masked import compute_dtype, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer, PyTree


def mist(
    *,
    max_size: int = 64,
    width: int = 256,
    heads: int = 16,
    feed_forward: int = 1024,
    feature_layers: int = 2,
    encoder_layers: int = 2,
    decoder_layers: int = 1,
    num_inducing: int = 32,
    num_seeds: int = 10,
    head_width: int = 256,
    quantile: bool = True,
    dropout: tuple[float, float] = (0.1, 0.3),
) -> Layer:
    """Returns the network that reads a sample and estimates its mutual information.

    Args:
        max_size: largest number of columns of x and y together; fewer are padded with zeros.
        width: of the tokens; `heads` must divide it.
        heads: of every attention.
        feed_forward: hidden width of the encoder's blocks; the other blocks have `width`.
        feature_layers: blocks of full attention between rows, each with normalisation and dropout.
        encoder_layers: blocks of attention through inducing points.
        decoder_layers: blocks between the seeds.
        num_inducing: inducing points of each encoder block.
        num_seeds: vectors that the sample is pooled to first.
        head_width: of the final network's two hidden layers.
        quantile: whether the network takes a level tau.
        dropout: rates in the embedding and after the feature layers, in training.

    Returns:
        A `Layer`: `init(key)`; `apply(params, x [B, N, D], y [B, N, E], tau=None [B], where=None [B, N], key=None,
        train=False)` gives the estimates [B] in nats. `tau` in (0, 1) is needed with `quantile` and refused without.

    Raises:
        ValueError: `heads` does not divide `width`; in `apply`, shapes do not fit, there are more than `max_size`
            columns, or `tau` or a key is missing.

    Example:
        >>> net = mist(max_size=4, width=8, heads=2, feed_forward=8, num_inducing=3, num_seeds=2, head_width=8)
        >>> x, tau = jnp.ones((5, 7, 2)), jnp.full(5, 0.5)
        >>> jax.eval_shape(lambda key: net.apply(net.init(key), x, x, tau=tau), jax.random.key(0)).shape
        (5,)

    Source:
        arXiv 2511.18945; code grgera/mist (src/mist_statinf/model). Reconstructed: initial values; a sample without
        rows, which pools to the seeds alone.
    """
    if width % heads:
        raise ValueError(f"heads={heads} must divide width={width}")
    embed = [dense(2 * width), dense(width)]
    norms = [feature_norm(), feature_norm()]
    features = [_block(width, heads, width) for _ in range(feature_layers)]
    encoder = [(_block(width, heads, feed_forward), _block(width, heads, feed_forward)) for _ in range(encoder_layers)]
    pool, last = _block(width, heads, width), _block(width, heads, width)
    decoder = [_block(width, heads, width) for _ in range(decoder_layers)]
    output, head = dense(width), mlp([head_width, head_width, 1])

    def init(key):
        keys = iter(jax.random.split(key, 8 + 2 * feature_layers + 3 * encoder_layers + decoder_layers))

        def seeds(number):
            bound = (6 / (number + width)) ** 0.5
            return jax.random.uniform(next(keys), (number, width), minval=-bound, maxval=bound)

        def encoder_layer(pair):
            return {"seeds": seeds(num_inducing), **{n: b.init(next(keys)) for n, b in zip("ab", pair, strict=True)}}

        norm = feature_norm().init(key, width)
        return {
            "embed": [embed[0].init(next(keys), max_size), embed[1].init(next(keys), 2 * width)],
            "embed_norm": [feature_norm().init(key, 2 * width), norm],
            "features": [{"block": block.init(next(keys)), "norm": norm} for block in features],
            "encoder": [encoder_layer(pair) for pair in encoder],
            "pool": {"seeds": seeds(num_seeds), "block": pool.init(next(keys))},
            "decoder": [block.init(next(keys)) for block in decoder],
            "last": {"seeds": seeds(1), "block": last.init(next(keys))},
            "output": output.init(next(keys), width),
            "head": head.init(next(keys), width + quantile),
        }

    def apply(params, x, y, *, tau=None, where=None, key=None, train=False):
        keep = _checked(x, y, tau, where, max_size, quantile)
        if train and any(dropout) and key is None:
            raise ValueError("a key is needed in training with dropout, got None")
        return rows_mixed(forward)(params, x, y, tau, keep, key if train else None)

    def forward(params, x, y, tau, keep, key):
        drop = _dropout(key, dropout, feature_layers)
        rows = jnp.concatenate([zero_where_false(v, keep) for v in (x, y)], axis=-1)
        h = jnp.pad(rows, ((0, 0), (0, 0), (0, max_size - rows.shape[-1])))
        for i, layer in enumerate(embed):
            h = norms[i].apply(params["embed_norm"][i], _gelu(layer.apply(params["embed"][i], h)))
            h = h if i else drop(h, 0)
        for i, block in enumerate(features):
            layer = params["features"][i]
            h = drop(norms[1].apply(layer["norm"], block.apply(layer["block"], h, h, keep)), 1 + i)
        spread = lambda seeds: jnp.broadcast_to(seeds.astype(h.dtype)[None], (h.shape[0], *seeds.shape))
        for (a, b), layer in zip(encoder, params["encoder"], strict=True):
            points = a.apply(layer["a"], spread(layer["seeds"]), h, keep)
            h = b.apply(layer["b"], h, points, None)
        pooled = pool.apply(params["pool"]["block"], spread(params["pool"]["seeds"]), h, keep)
        for block, layer in zip(decoder, params["decoder"], strict=True):
            pooled = block.apply(layer, pooled, pooled, None)
        pooled = last.apply(params["last"]["block"], spread(params["last"]["seeds"]), pooled, None)[:, 0]
        told = output.apply(params["output"], pooled)
        if quantile:
            told = jnp.concatenate([told, tau.astype(told.dtype)[:, None]], axis=-1)
        return head.apply(params["head"], told)[:, 0]

    return Layer(init, apply)


def mist_loss(
    predictions: Array,
    information: Array,
    *,
    tau: Array | None = None,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the pinball loss of predicted quantiles, or without levels the squared error.

    `mean max(tau u, (tau - 1) u)` with `u = information - prediction`; its minimiser is the tau-quantile.

    Args:
        predictions: float [B], of the network.
        information: float [B], the truth, in nats.
        tau: float [B] in (0, 1), the levels the predictions were made for; None = squared error.
        where: bool [B], real samples.
        axis_name: mapped axis over which the samples are spread.
        reduction: "mean" (over all shards) or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[B]` in the dtype of `predictions`; 0 without
        any sample.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> loss = lambda prediction: mist_loss(jnp.array([prediction]), jnp.array([1.0]), tau=jnp.array([0.75]))
        >>> float(loss(0.0)), float(loss(2.0))
        (0.75, 0.25)

    Source:
        arXiv 2511.18945; Koenker, Bassett, Regression quantiles (1978).
    """
    if predictions.ndim != 1 or information.shape != predictions.shape:
        raise ValueError(f"predictions and information must be [B], got {predictions.shape} and {information.shape}")
    for name, array in (("tau", tau), ("where", where)):
        if array is not None and array.shape != predictions.shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {predictions.shape}")
    keep = jnp.ones(predictions.shape, bool) if where is None else where
    wide = compute_dtype(predictions, information)
    away = zero_where_false(information, keep).astype(wide) - zero_where_false(predictions, keep).astype(wide)
    if tau is None:
        terms = away * away
    else:
        level = zero_where_false(tau, keep).astype(wide)
        terms = jnp.maximum(level * away, (level - 1) * away)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=predictions.dtype)


def mist_interval(
    net: Layer, params: PyTree, x: Array, y: Array, *, level: float = 0.9, where: Array | None = None
) -> tuple[Array, Array, Array]:
    """Returns an interval for the information of each sample and its median, by three levels of the network.

    Args:
        net: `mist(quantile=True)`.
        params: trained.
        x: float [B, N, D].
        y: float [B, N, E].
        level: in (0, 1), how often the truth is to lie inside.
        where: bool [B, N], real rows.

    Returns:
        `low`, `median`, `high`, each [B]: sorted, where the network's quantiles cross.

    Raises:
        ValueError: `level` is out of range.

    Example:
        >>> net = Layer(None, lambda params, x, y, tau, where: tau + x[:, 0, 0])  # quantiles that are known
        >>> x = jnp.zeros((1, 2, 1))
        >>> [round(float(v[0]), 2) for v in mist_interval(net, {}, x, x)]
        [0.05, 0.5, 0.95]

    Source:
        arXiv 2511.18945.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1")
    levels = ((1 - level) / 2, 0.5, (1 + level) / 2)
    told = [net.apply(params, x, y, tau=jnp.full(x.shape[:1], tau, x.dtype), where=where) for tau in levels]
    low, median, high = jnp.sort(jnp.stack(told), axis=0)
    return low, median, high


def bootstrap_interval(
    estimate: Callable[[Array, Array], Array], x: Array, y: Array, *, key: Array, level: float = 0.9, draws: int = 100
) -> tuple[Array, Array]:
    """Returns the interval of an estimate over resampled rows, which MIST's intervals are compared with.

    Args:
        estimate: `estimate(x, y)`, a scalar.
        x: float [N, D].
        y: float [N, E].
        key: draws the rows, with replacement.
        level: in (0, 1).
        draws: >= 2, number of resamples, all at once.

    Returns:
        `low` and `high`, the quantiles (1 - level) / 2 and (1 + level) / 2 of the estimates.

    Raises:
        ValueError: an option is out of range or shapes do not fit.

    Example:
        >>> x = jnp.arange(6.0)[:, None]
        >>> run = jax.jit(lambda x, key: bootstrap_interval(lambda x, y: jnp.mean(x), x, x, key=key))
        >>> low, high = run(x, jax.random.key(0))
        >>> bool(low < 2.5 < high)
        True

    Source:
        Efron, Bootstrap methods (1979).
    """
    if not 0 < level < 1 or draws < 2:
        raise ValueError(f"level={level} must be between 0 and 1 and draws={draws} at least 2")
    if x.shape[:1] != y.shape[:1]:
        raise ValueError(f"x and y must have the same rows, got {x.shape} and {y.shape}")
    x, y = jnp.asarray(x), jnp.asarray(y)
    index = jax.random.randint(key, (draws, x.shape[0]), 0, x.shape[0])
    values = jax.vmap(lambda rows: estimate(x[rows], y[rows]))(index)
    low, high = jnp.quantile(values, jnp.array([(1 - level) / 2, (1 + level) / 2], values.dtype))
    return low, high


def _block(width: int, heads: int, feed_forward: int) -> Layer:
    """Returns MAB: `apply(params, a [B, Q, width], b [B, K, width], where of b or None)`."""
    project, out, ff, norm = dense(width), dense(width), mlp([feed_forward, width], activation=_gelu), feature_norm()

    def init(key):
        keys = jax.random.split(key, 5)
        params = {name: project.init(k, width) for name, k in zip(("q", "k", "v", "out"), keys[:4], strict=True)}
        norms = {name: norm.init(key, width) for name in ("norm_1", "norm_2")}
        return {**params, "ff": ff.init(keys[4], width), **norms}

    def apply(params, a, b, where):
        split = lambda v: v.reshape(*v.shape[:2], heads, width // heads)
        q, k, v = (split(project.apply(params[n], u)) for n, u in (("q", a), ("k", b), ("v", b)))
        ids = {}
        if where is not None:
            ids = {"q_segment_ids": jnp.zeros(a.shape[:2], jnp.int32), "kv_segment_ids": jnp.where(where, 0, -1)}
        mixed = attention(q, k, v, **ids).reshape(a.shape)
        h = norm.apply(params["norm_1"], a + out.apply(params["out"], mixed))
        return norm.apply(params["norm_2"], h + ff.apply(params["ff"], h))

    return Layer(init, apply)


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


def _dropout(key, rates, layers):
    """Returns `drop(x, number)`, the identity without a key; number 0 is the embedding's."""
    if key is None or not any(rates):
        return lambda x, number: x
    keys = jax.random.split(key, 1 + layers)

    def drop(x, number):
        kept = 1 - rates[min(number, 1)]
        return jnp.where(jax.random.bernoulli(keys[number], kept, x.shape), x / kept, jnp.zeros((), x.dtype))

    return drop


def _checked(x, y, tau, where, max_size, quantile):
    if x.ndim != 3 or y.ndim != 3 or x.shape[:2] != y.shape[:2]:
        raise ValueError(f"x and y must be [B, N, D] and [B, N, E], got {x.shape} and {y.shape}")
    if x.shape[2] + y.shape[2] > max_size:
        raise ValueError(f"x and y have {x.shape[2] + y.shape[2]} columns, at most max_size={max_size} fit")
    if quantile != (tau is not None):
        raise ValueError(f"tau is {'needed with' if quantile else 'refused without'} quantile=True")
    if tau is not None and tau.shape != x.shape[:1]:
        raise ValueError(f"tau has shape {tau.shape}, expected {x.shape[:1]}")
    if where is not None and where.shape != x.shape[:2]:
        raise ValueError(f"where has shape {where.shape}, expected {x.shape[:2]}")
    return jnp.ones(x.shape[:2], bool) if where is None else where

"""Learning More with Less: A Generalizable, Self-Supervised Framework for Privacy-Preserving Capacity Estimation.

The title ends: with EV Charging Data (2025, arXiv 2510.05172). Short snippets of a time series say little each; so a
snippet is reconstructed not from its own visible part but from OTHER snippets and masked views, weighed by how similar
a contrastive loss finds them. Fine-tuned, the encoder tells a battery's capacity from a snippet of its charging.

    views   : the snippet and M masked copies; masked runs and visible runs have geometric lengths
    z, s    = encoder(view) [L, D] and projector(z) [D'], of all V = M + 1 views of all N snippets
    w_i,v   = softmax over all views v but snippet i itself of cos(s_i, s_v) / t
    x^_i    = decoder(sum_v w_i,v z_v),   L_rec = mean |x_i - x^_i|^2
    L_con   = NT-Xent between the views (`nt_xent_loss`)
    loss    = L_rec + weight L_con, or sum of L / (2 p^2) + log(1 + p^2) with learnt scales p

The paper adapts SimMTM; first only L_con is trained, then both.

Reconstructed: everything but the idea, from SimMTM (arXiv 2302.00861): ratio 0.5, mean run 3, t = 0.2, scales; M = 2; a
mean over the positives of L_con, where SimMTM sums; masks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.contrastive._pairs import checked_where, own_columns, unit_rows
from jaxlab.contrastive.info_nce import nt_xent_loss
from jaxlab.ops.collectives import gather_rows
from jaxlab.ops.layers import dense
from jaxlab.ops.masked import compute_dtype, masked_softmax, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer


def snippet_reconstruction_loss(
    x: Array,
    reconstructed: Array,
    embeddings: Array,
    *,
    contrastive_weight: float = 1.0,
    scales: Array | None = None,
    temperature: float | Array = 0.2,
    where: Array | None = None,
    kv_where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the squared error of the reconstruction plus the contrastive loss between the views.

    Args:
        x: float [N, L, C], the snippets, each channel standardised.
        reconstructed: float [N, L, C], the decoder's output for `aggregate_by_similarity` of the features.
        embeddings: float [V, N, D], of the views, V >= 2 (first the snippets themselves); need not be normalised.
        contrastive_weight: of the contrastive loss; without `scales`.
        scales: float [2], learnt p of the two losses, from 1: `uncertainty_weighted_sum` instead of the weight.
        temperature: t > 0, of the contrastive loss.
        where: bool [N], real snippets.
        kv_where: bool [N, L], real points.
        axis_name: mapped axis over which the snippets are spread: negatives come from all shards.

    Returns:
        Scalar in the accumulation dtype; 0 without snippets (with `scales`, what these add).

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> x, views = jnp.ones((3, 4, 1)), jnp.stack([jnp.eye(3), jnp.eye(3)])
        >>> loss = jax.jit(snippet_reconstruction_loss)
        >>> bool(loss(x, x, views) < loss(x, 0 * x, views))
        True

    Source:
        arXiv 2510.05172; losses of Dong et al., SimMTM, arXiv 2302.00861 (t = 0.2).
    """
    if x.ndim != 3 or reconstructed.shape != x.shape:
        raise ValueError(f"x and reconstructed must have one shape [N, L, C], got {x.shape} and {reconstructed.shape}")
    if embeddings.ndim != 3 or embeddings.shape[1] != x.shape[0]:
        raise ValueError(f"embeddings has shape {embeddings.shape}, expected [V, {x.shape[0]}, D]")
    if kv_where is not None and kv_where.shape != x.shape[:2]:
        raise ValueError(f"kv_where has shape {kv_where.shape}, expected {x.shape[:2]}, a flag for each point")
    if scales is not None and scales.shape != (2,):
        raise ValueError(f"scales has shape {scales.shape}, expected (2,), one for each loss")
    keep = checked_where(where, x.shape[0], temperature)
    real = jnp.broadcast_to(keep[:, None], x.shape[:2]) if kv_where is None else keep[:, None] & kv_where
    dtype = compute_dtype(x, reconstructed, embeddings)
    away = jnp.square(zero_where_false(x, real).astype(dtype) - zero_where_false(reconstructed, real).astype(dtype))
    error = reduce_terms(jnp.mean(away, axis=-1), real, axis_name=axis_name)
    contrast = nt_xent_loss(embeddings, temperature=temperature, where=keep, axis_name=axis_name)
    if scales is None:
        return error + contrastive_weight * contrast
    return uncertainty_weighted_sum(jnp.stack([error, contrast]), scales)


def aggregate_by_similarity(
    embeddings: Array,
    features: Array,
    *,
    temperature: float | Array = 0.2,
    stop_gradient: bool = False,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns for each snippet the mean of the features of all other views, weighed by similarity.

    `sum_v w_iv z_v`, w = softmax of cos(s_i, s_v) / t over all views v of all snippets but snippet i itself.

    Args:
        embeddings: float [V, N, D], of V views, first the snippets themselves; need not be normalised.
        features: float [V, N, ...], what is averaged.
        temperature: t > 0.
        stop_gradient: whether the weights are constants; in the paper they learn from the reconstruction.
        where: bool [N], real snippets.
        axis_name: mapped axis over which the snippets are spread: views of all shards are averaged.

    Returns:
        float [N, ...] in the dtype of `features`; 0 where there is no other view, and for masked snippets.

    Raises:
        ValueError: shapes do not fit, or `temperature` is not positive.

    Example:
        >>> views = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
        >>> mean = jax.jit(lambda s, z: aggregate_by_similarity(s, z, temperature=0.01))
        >>> mean(views, jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()  # its masked view, not itself
        [3.0, 4.0]

    Source:
        arXiv 2510.05172; Dong et al., SimMTM, arXiv 2302.00861.
    """
    if embeddings.ndim != 3 or features.shape[:2] != embeddings.shape[:2]:
        raise ValueError(
            f"embeddings and features must be [V, N, D] and [V, N, ...], got {embeddings.shape} and {features.shape}"
        )
    keep = checked_where(where, embeddings.shape[1], temperature)
    options = {"temperature": temperature, "stop": stop_gradient, "axis_name": axis_name}
    return rows_mixed(_aggregate)(embeddings, features, keep, **options)


def masked_views(
    x: Array, key: Array, *, num_views: int = 2, ratio: float = 0.5, mean_length: float = 3.0, shared: bool = False
) -> Array:
    """Returns each snippet and its masked copies, in which runs of points are 0.

    Args:
        x: float [N, L, C], snippets.
        key: draws the masks.
        num_views: M, masked copies of each.
        ratio: share of the points that are masked, as in `geometric_mask`.
        mean_length: of masked runs.
        shared: whether all channels of a snippet have one mask.

    Returns:
        float [M + 1, N, L, C] in the dtype of `x`, first `x` itself.

    Raises:
        ValueError: a shape or an option is out of range.

    Example:
        >>> views = lambda x, key: masked_views(x, key, num_views=3)
        >>> jax.eval_shape(views, jnp.ones((2, 5, 1)), jax.random.key(0)).shape
        (4, 2, 5, 1)

    Source:
        arXiv 2510.05172; masks of Zerveas et al., arXiv 2010.02803, by way of SimMTM.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be [N, L, C], got {x.shape}")
    if num_views < 1:
        raise ValueError(f"num_views={num_views} must be at least 1")
    count, length, channels = x.shape
    masks = num_views * count * (1 if shared else channels)
    visible = geometric_mask(key, masks, length, ratio=ratio, mean_length=mean_length)
    visible = visible.reshape(num_views, count, -1, length).swapaxes(2, 3)
    return jnp.concatenate([x[None], jnp.where(visible, x[None], jnp.zeros((), x.dtype))])


def geometric_mask(key: Array, count: int, length: int, *, ratio: float = 0.5, mean_length: float = 3.0) -> Array:
    """Returns masks whose masked and visible runs have geometric lengths.

    A chain of two states: a masked run ends with probability `1 / mean_length` at each point, a visible one with that
    times `ratio / (1 - ratio)`, so that `ratio` of all points are masked. The first point is masked with probability
    `ratio`.

    Args:
        key: draws the masks.
        count: number of masks.
        length: points of a mask.
        ratio: in [0, 1), share of the points that are masked.
        mean_length: >= 1, mean number of points of a masked run; at least `ratio / (1 - ratio)`.

    Returns:
        bool [count, length], True = visible.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> geometric_mask(jax.random.key(0), 1, 3, ratio=0.0).tolist()
        [[True, True, True]]

    Source:
        Zerveas et al., arXiv 2010.02803 (ratio 0.15 there, 0.5 in SimMTM; mean run 3).
    """
    if count < 1 or length < 1:
        raise ValueError(f"count={count} and length={length} must be at least 1")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} must be at least 0 and below 1")
    if mean_length < max(1.0, ratio / (1 - ratio)):
        raise ValueError(
            f"mean_length={mean_length} must be at least 1 and ratio / (1 - ratio) = {ratio / (1 - ratio)}"
        )
    key_first, key_rest = jax.random.split(key)
    ends = jnp.array([ratio / (1 - ratio), 1.0], jnp.float32) / mean_length  # of a visible and of a masked run

    def step(masked, draw):
        masked = masked ^ (draw < jnp.where(masked, ends[1], ends[0]))
        return masked, masked

    first = jax.random.uniform(key_first, (count,)) < ratio
    _, rest = jax.lax.scan(step, first, jax.random.uniform(key_rest, (length - 1, count)))
    return jnp.logical_not(jnp.concatenate([first[None], rest]).T)


def uncertainty_weighted_sum(losses: Array, scales: Array) -> Array:
    """Returns the sum of several losses with learnt weights: `sum_i losses_i / (2 p_i^2) + log(1 + p_i^2)`.

    Args:
        losses: float [K].
        scales: float [K], p, learnt, from 1; at 0 it has no meaning, and the square is kept above the smallest number.

    Returns:
        Scalar in the accumulation dtype.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> round(jax.jit(uncertainty_weighted_sum)(jnp.array([2.0, 4.0]), jnp.ones(2)).item(), 4)
        4.3863

    Source:
        Liebel and Koerner, arXiv 1805.06334, as in the code of SimMTM.
    """
    if losses.ndim != 1 or scales.shape != losses.shape:
        raise ValueError(f"losses and scales must have one shape [K], got {losses.shape} and {scales.shape}")
    dtype = compute_dtype(losses, scales)
    square = jnp.square(scales.astype(dtype))
    return jnp.sum(losses.astype(dtype) / (2 * jnp.maximum(square, 1e-12)) + jnp.log1p(square))


def bilstm(hidden: int = 64, *, num_layers: int = 2) -> Layer:
    """Returns a bidirectional LSTM: `features = apply(params, x, where=None)`.

    `init(key, channels)`; x is float [..., L, C] and the result [..., L, 2 hidden], of the two directions. `where`,
    bool [..., L], tells the real points: the others leave the states as they are and come out as 0.

    Args:
        hidden: size of a state.
        num_layers: number of layers.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> layer = bilstm(3, num_layers=1)
        >>> run = lambda key, x: layer.apply(layer.init(key, 2), x)
        >>> jax.eval_shape(run, jax.random.key(0), jnp.ones((4, 5, 2))).shape
        (4, 5, 6)

    Source:
        Hochreiter and Schmidhuber, Long Short-Term Memory, 1997, both ways and with forget gates as in PyTorch; sizes
        reconstructed.
    """
    if min(hidden, num_layers) < 1:
        raise ValueError(f"hidden={hidden} and num_layers={num_layers} must be at least 1")
    inputs, states = dense(4 * hidden), dense(4 * hidden, bias=False)

    def init(key, channels):
        keys = jax.random.split(key, 2 * num_layers).reshape(num_layers, 2)

        def direction(key, size):
            key_input, key_state = jax.random.split(key)
            return {"input": inputs.init(key_input, size), "state": states.init(key_state, hidden)}

        sizes = [channels] + [2 * hidden] * (num_layers - 1)
        return {
            f"layer_{i}": {"forward": direction(keys[i, 0], size), "backward": direction(keys[i, 1], size)}
            for i, size in enumerate(sizes)
        }

    def run(params, x, keep, reverse):
        gates = jnp.moveaxis(inputs.apply(params["input"], x), -2, 0).astype(compute_dtype(x))

        def step(carry, now):
            h, c = carry
            gate, real = now
            i, f, g, o = jnp.split(gate + states.apply(params["state"], h), 4, axis=-1)
            new_c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            new_h = jax.nn.sigmoid(o) * jnp.tanh(new_c)
            real = real[..., None]
            h, c = jnp.where(real, new_h, h), jnp.where(real, new_c, c)
            return (h, c), jnp.where(real, h, 0.0)

        zero = jnp.zeros_like(gates[0, ..., :hidden])
        _, out = jax.lax.scan(step, (zero, zero), (gates, jnp.moveaxis(keep, -1, 0)), reverse=reverse)
        return jnp.moveaxis(out, 0, -2).astype(x.dtype)

    def apply(params, x, *, where=None):
        if x.ndim < 2 or (where is not None and where.shape != x.shape[:-1]):
            shape = None if where is None else where.shape
            raise ValueError(f"x and where must be [..., L, C] and [..., L], got {x.shape} and {shape}")
        keep = jnp.ones(x.shape[:-1], bool) if where is None else where
        x = zero_where_false(x, keep)
        for i in range(num_layers):
            layer = params[f"layer_{i}"]
            both = run(layer["forward"], x, keep, False), run(layer["backward"], x, keep, True)
            x = jnp.concatenate(both, axis=-1)
        return x

    return Layer(init, apply)


def _aggregate(embeddings, features, keep, *, temperature, stop, axis_name):
    views, rows = embeddings.shape[:2]
    unit = unit_rows(jnp.moveaxis(embeddings, 1, 0), keep)
    others, exist = gather_rows(unit, axis_name), gather_rows(keep, axis_name)
    total = others.shape[0]
    wide = zero_where_false(jnp.moveaxis(features, 1, 0), keep).astype(compute_dtype(features))
    wide = gather_rows(wide, axis_name).reshape(total * views, -1)
    logits = jnp.einsum("id,jvd->ijv", unit[:, 0], others, precision=jax.lax.Precision.HIGHEST) / temperature
    itself = own_columns(rows, total, axis_name)[:, :, None] & (jnp.arange(views) == 0)[None, None, :]
    counted = keep[:, None, None] & exist[None, :, None] & jnp.logical_not(itself)
    weights = masked_softmax(logits.reshape(rows, -1), counted.reshape(rows, -1))
    weights = jax.lax.stop_gradient(weights) if stop else weights
    mean = jnp.matmul(weights.astype(wide.dtype), wide, precision=jax.lax.Precision.HIGHEST)
    return mean.reshape(rows, *features.shape[2:]).astype(features.dtype)

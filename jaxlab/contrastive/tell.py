"""XAI Beyond Classification: Interpretable Neural Clustering (2018, arXiv 1808.07292; TELL, JMLR 2022).

k-means is a network of one layer, whose weights are the centres: what decides can be read off, and it learns online, in
batches, together with an encoder.

    |z - c_j|^2 = |z|^2 - s_j / alpha,   s = W z + b,   W_j = 2 alpha c_j,   b_j = -alpha |c_j|^2
    softmax(s) = softmax(-alpha |z - c|^2),   argmax s = the nearest centre
    k-means loss = mean_i sum_j delta_ij |z_i - c_j|^2,   delta = one_hot(argmax s), constant
    TELL: |z| = |c_j| = 1 (no bias),   loss = MSE(x, decode(z)) + (0.01 / alpha) mean_ij (2 alpha - delta_ij W_j z_i)

In even epochs the layer learns and z is constant in the second term; in odd epochs the encoder learns and W rests. The
gradient of W_j is brought to length 0.2 alpha before the optimiser sees it, and after every step W_j to 2 alpha. (With
Adadelta, which rescales it, this is no fixed angle.) The mean runs over all N K entries, as in the code.

Reconstructed: masks; the encoder and decoder are the caller's (the code's are convolutional, without or with dropout);
`tell_fit` takes the step size 1 / (2 n_j) of its convergence theorem, n_j the rows that centre j has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.contrastive._pairs import checked_where
from jaxlab.ops.collectives import value_and_grad
from jaxlab.ops.masked import compute_dtype, safe_divide, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer, Learner, LearnerState, StatefulLayer, as_stateful


def tell(
    encoder: Layer | StatefulLayer | Callable[..., Any],
    decoder: Layer | StatefulLayer | Callable[..., Any],
    optimizer: optax.GradientTransformation | None = None,
    *,
    num_clusters: int,
    size: int = 10,
    steps_per_epoch: int,
    alpha: float = 1e-3,
    weight: float | Array = 0.01,
    step: float = 0.2,
    axis_name: str | None = None,
) -> Learner:
    """Returns a learner that clusters while it learns to reconstruct.

    Args:
        encoder: network from examples [N, ...] to embeddings [N, size]; they are brought to length 1 here.
        decoder: network from embeddings to reconstructions of the shape of `x`.
        optimizer: None = Adadelta with rate 1.
        num_clusters: K.
        size: D of the embeddings.
        steps_per_epoch: after how many steps layer and encoder take turns; the layer begins.
        alpha: > 0, sharpness of the soft assignment; also the scale of the layer.
        weight: of the clustering loss (its factor is weight / alpha).
        step: length of the layer's gradient rows, in units of alpha.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        A `Learner`. `init(key, batch, params=None)`; `params` are `encoder`, `decoder` and `layer` [K, D], whose rows
        over `2 alpha` are the centres. `batch`: `x [N, ...]`, optional `where [N]`. `update` gives metrics `loss`,
        `reconstruction`, `clustering`. `predict` gives `clusters` int32 [N], `probs` [N, K] and `embeddings` [N, D].

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> from jaxlab.ops.layers import mlp
        >>> learner = tell(mlp([2]), mlp([3]), num_clusters=2, size=2, steps_per_epoch=5)
        >>> batch = {"x": jnp.eye(3)}
        >>> run = lambda key: learner.predict(learner.update(learner.init(key, batch), batch, key)[0], batch)
        >>> jax.eval_shape(run, jax.random.key(0))["clusters"].shape
        (3,)

    Source:
        Peng et al., arXiv 1808.07292; code XLearning-SCU/2022-JMLR-TELL (its values are the defaults).
    """
    for name, value in {"num_clusters": num_clusters, "size": size, "steps_per_epoch": steps_per_epoch}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not alpha > 0 or step < 0 or (isinstance(weight, int | float) and weight < 0):
        raise ValueError(f"alpha={alpha} must be positive, weight={weight} and step={step} not negative")
    encode, decode = as_stateful(encoder), as_stateful(decoder)
    optimizer = optax.adadelta(1.0) if optimizer is None else optimizer

    def init(key, batch, *, params=None):
        key_encoder, key_decoder, key_layer = jax.random.split(key, 3)
        x = batch["x"]
        dims = x.shape[1] if x.ndim == 2 else jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        net_state = {"encoder": {}, "decoder": {}}
        if params is None:
            made, net_state["encoder"] = encode.init(key_encoder, dims)
            undo, net_state["decoder"] = decode.init(key_decoder, size)
            rows = jax.random.uniform(key_layer, (num_clusters, size), minval=-1.0)
            params = {"encoder": made, "decoder": undo, "layer": 2 * alpha * safe_normalize(rows)}
        return LearnerState(params, net_state, optimizer.init(params), jnp.zeros((), jnp.int32))

    def embed(params, net_state, x, **options):
        z, net_state = encode.apply(params["encoder"], net_state["encoder"], x, **options)
        return safe_normalize(z), net_state

    def update(state, batch, key):
        key_encoder, key_decoder = jax.random.split(key)
        where = batch.get("where")
        where = jnp.ones(batch["x"].shape[:1], bool) if where is None else where
        x = zero_where_false(batch["x"], where)
        layer_learns = (state.step // steps_per_epoch) % 2 == 0

        def loss(params):
            z, encoder_state = embed(params, state.net_state, x, key=key_encoder, train=True)
            back, decoder_state = decode.apply(
                params["decoder"], state.net_state["decoder"], z, key=key_decoder, train=True
            )
            square = jnp.square(back - x).astype(compute_dtype(x))
            terms = jnp.mean(square, axis=tuple(range(1, x.ndim)))
            reconstruction = reduce_terms(terms, where, axis_name=axis_name)
            fixed = jnp.where(layer_learns, jax.lax.stop_gradient(z), z)
            clustering = tell_cluster_loss(
                params["layer"], fixed, alpha=alpha, weight=weight, where=where, axis_name=axis_name
            )
            metrics = {"reconstruction": reconstruction, "clustering": clustering}
            return reconstruction + clustering, (metrics, {"encoder": encoder_state, "decoder": decoder_state})

        run = value_and_grad(loss, axis_name=axis_name, has_aux=True)
        (value, (metrics, net_state)), grads = run(state.params)
        turned = jnp.where(layer_learns, step * alpha * safe_normalize(grads["layer"]), jnp.zeros_like(grads["layer"]))
        updates, opt_state = optimizer.update({**grads, "layer": turned}, state.opt_state, state.params)
        # An optimiser with momentum or decay would move the layer out of its turn as well.
        updates = {**updates, "layer": jnp.where(layer_learns, updates["layer"], jnp.zeros_like(updates["layer"]))}
        params = optax.apply_updates(state.params, updates)
        params = {**params, "layer": 2 * alpha * safe_normalize(params["layer"])}
        return LearnerState(params, net_state, opt_state, state.step + 1), {"loss": value, **metrics}

    def predict(state, batch):
        z, _ = embed(state.params, state.net_state, batch["x"], key=None, train=False)
        probs = tell_assign(z, layer_to_centres(state.params["layer"], alpha=alpha), alpha=alpha)
        return {"clusters": jnp.argmax(probs, axis=1).astype(jnp.int32), "probs": probs, "embeddings": z}

    return Learner(init, update, predict)


def tell_cluster_loss(
    layer: Array,
    z: Array,
    *,
    alpha: float = 1e-3,
    weight: float | Array = 0.01,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns TELL's clustering loss for unit embeddings and unit centres.

    `(weight / alpha) (2 alpha - max_j W_j z / K)`, the mean over all pairs of row and cluster, of which those that are
    not assigned count 2 alpha.

    Args:
        layer: float [K, D], rows of length 2 alpha.
        z: float [N, D], rows of length 1.
        alpha: > 0.
        weight: of the loss.
        where: bool [N], real rows.
        axis_name: mapped axis over which the rows are spread, for the mean.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `z`; no row gives 0.

    Raises:
        ValueError: shapes do not fit or `alpha` is not positive.

    Example:
        >>> loss = jax.jit(lambda layer, z: tell_cluster_loss(layer, z, alpha=0.5, weight=0.5))
        >>> float(loss(jnp.eye(2), jnp.array([[1.0, 0.0]])))  # 1 - 1 / 2
        0.5

    Source:
        Peng et al., arXiv 1808.07292; code XLearning-SCU/2022-JMLR-TELL.
    """
    keep = _checked(layer, z, where, alpha)
    dtype = compute_dtype(layer, z)
    wide = zero_where_false(z, keep).astype(dtype)
    scores = jnp.matmul(wide, layer.astype(dtype).T, precision=jax.lax.Precision.HIGHEST)
    delta = jax.nn.one_hot(jnp.argmax(scores, axis=1), layer.shape[0], dtype=dtype)
    terms = weight / alpha * (2 * alpha - jnp.mean(delta * scores, axis=1))
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=z.dtype)


def tell_kmeans_loss(
    centres: Array,
    z: Array,
    *,
    alpha: float = 1e-3,
    soft: bool = False,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the k-means loss as the loss of a layer: `mean_i sum_j delta_ij |z_i - c_j|^2`, delta constant.

    Its gradient is 0 exactly where every centre is the mean of its rows.

    Args:
        centres: float [K, D].
        z: float [N, D].
        alpha: > 0, of the soft assignment.
        soft: whether delta is `tell_assign`, and not the nearest centre.
        where: bool [N], real rows.
        axis_name: mapped axis over which the rows are spread, for the mean.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `z`; no row gives 0.

    Raises:
        ValueError: shapes do not fit or `alpha` is not positive.

    Example:
        >>> loss = jax.jit(tell_kmeans_loss)
        >>> float(loss(jnp.array([[0.0], [4.0]]), jnp.array([[1.0], [4.0]])))
        0.5

    Source:
        Peng et al., arXiv 1808.07292, section 3.
    """
    keep = _checked(centres, z, where, alpha)
    distance = rows_mixed(_distances)(z, centres, keep)
    delta = rows_mixed(_assigned)(jax.lax.stop_gradient(distance), alpha=alpha, hard=not soft)
    terms = jnp.sum(delta * distance, axis=1)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=z.dtype)


def tell_assign(z: Array, centres: Array, *, alpha: float = 1e-3, hard: bool = False) -> Array:
    """Returns the share of each centre in each row: `softmax_j(-alpha |z - c_j|^2)`, one-hot as alpha grows.

    Args:
        z: float [N, D].
        centres: float [K, D].
        alpha: > 0.
        hard: whether the nearest centre takes all (the lower number on a tie).

    Returns:
        float [N, K] in the dtype of `z`, rows of sum 1.

    Raises:
        ValueError: shapes do not fit or `alpha` is not positive.

    Example:
        >>> centres = jnp.array([[0.0], [2.0]])
        >>> jax.jit(lambda z: tell_assign(z, centres, alpha=1.0))(jnp.array([[1.0], [2.0]])).round(2).tolist()[0]
        [0.5, 0.5]

    Source:
        Peng et al., arXiv 1808.07292, section 3.
    """
    keep = _checked(centres, z, None, alpha)
    distance = rows_mixed(_distances)(z, centres, keep)
    return rows_mixed(_assigned)(distance, alpha=alpha, hard=hard).astype(z.dtype)


def tell_fit(
    key: Array,
    x: Array,
    *,
    num_clusters: int,
    steps: int = 200,
    batch_size: int = 256,
    num_starts: int = 10,
) -> tuple[Array, Array, Array]:
    """Returns the clusters that stochastic gradient descent on the k-means loss finds in features as they are.

    Each step draws rows with replacement and moves centre j by `-1 / (2 n_j)` times the gradient of the sum, n_j the
    rows that it has seen so far: every centre is the mean of the rows that were ever given to it.

    Args:
        key: draws first centres (rows of `x`) and batches.
        x: float [N, D], N >= num_clusters.
        num_clusters: K >= 1.
        steps: gradient steps.
        batch_size: rows of a step.
        num_starts: sets of first centres; the result with the lowest inertia is returned.

    Returns:
        As `ops.kmeans`: `labels` int32 [N], `centres` [K, D] in the dtype of `x`, and `inertia` [] in the accumulation
        dtype. No gradient.

    Raises:
        ValueError: `x` is not [N >= num_clusters, D] or a number is below 1.

    Example:
        >>> x = jnp.array([[0.0], [0.2], [5.0], [5.2]])
        >>> run = jax.jit(lambda key: tell_fit(key, x, num_clusters=2, steps=4, batch_size=4, num_starts=2))
        >>> labels, _, _ = run(jax.random.key(0))
        >>> bool(labels[0] == labels[1]) and bool(labels[1] != labels[2])
        True

    Source:
        Peng et al., arXiv 1808.07292, section 3.3; step size of Bottou, Bengio, Convergence Properties of the K-Means
        Algorithms, 1994. Reconstructed: several starts.
    """
    if x.ndim != 2 or x.shape[0] < num_clusters:
        raise ValueError(f"x must be [N >= {num_clusters}, D], got {x.shape}")
    if min(num_clusters, steps, batch_size, num_starts) < 1:
        raise ValueError(
            f"num_clusters={num_clusters}, steps={steps}, batch_size={batch_size} and num_starts={num_starts} must be "
            "at least 1"
        )
    options = {"clusters": num_clusters, "steps": steps, "batch": batch_size, "starts": num_starts}
    return rows_mixed(_fit)(key, jax.lax.stop_gradient(x), **options)


def centres_to_layer(centres: Array, *, alpha: float = 1e-3) -> dict[str, Array]:
    """Returns the layer whose softmax is the soft assignment: `w = 2 alpha c`, `b = -alpha |c|^2`.

    Args:
        centres: float [K, D].
        alpha: > 0.

    Returns:
        `w` [D, K] and `b` [K], as `ops.layers.dense` has them, in the dtype of `centres`: scores are `z @ w + b`.

    Raises:
        ValueError: `centres` is not [K, D] or `alpha` is not positive.

    Example:
        >>> layer = centres_to_layer(jnp.array([[1.0, 2.0]]), alpha=0.5)
        >>> layer["w"].tolist(), layer["b"].tolist()
        ([[1.0], [2.0]], [-2.5])

    Source:
        Peng et al., arXiv 1808.07292, section 3.
    """
    _checked(centres, centres, None, alpha)
    wide = centres.astype(compute_dtype(centres))
    bias = -alpha * jnp.sum(jnp.square(wide), axis=1)
    return {"w": (2 * alpha * wide).T.astype(centres.dtype), "b": bias.astype(centres.dtype)}


def layer_to_centres(layer: Array, *, alpha: float = 1e-3) -> Array:
    """Returns the centres that a layer's rows stand for: `c_j = W_j / (2 alpha)`.

    Args:
        layer: float [K, D].
        alpha: > 0.

    Returns:
        float [K, D] in the dtype of `layer`.

    Raises:
        ValueError: `layer` is not [K, D] or `alpha` is not positive.

    Example:
        >>> layer_to_centres(jnp.array([[1.0, 2.0]]), alpha=0.5).tolist()
        [[1.0, 2.0]]

    Source:
        Peng et al., arXiv 1808.07292, section 3.
    """
    _checked(layer, layer, None, alpha)
    return (layer.astype(compute_dtype(layer)) / (2 * alpha)).astype(layer.dtype)


def adjusted_rand_index(
    clusters: Array, labels: Array, *, num_clusters: int, num_classes: int, where: Array | None = None
) -> Array:
    """Returns how many pairs clusters and classes agree on, corrected for chance: 1 if equal, about 0 if unrelated.

    `(I - E) / (M - E)` with I the pairs that share cluster and class, M the mean of the numbers of pairs that share a
    cluster and that share a class, E the expectation of I.

    Args:
        clusters: int [N] in 0..K - 1.
        labels: int [N] in 0..C - 1; -1 = unlabelled, takes no part.
        num_clusters: K.
        num_classes: C.
        where: bool [N], real examples.

    Returns:
        float32 []; 1 where both are one group or all groups are single, 0 with fewer than two examples.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> score = jax.jit(lambda c: adjusted_rand_index(c, jnp.array([0, 0, 1, 1]), num_clusters=2, num_classes=2))
        >>> [round(float(score(jnp.array(clusters))), 3) for clusters in ([1, 1, 0, 0], [0, 1, 0, 1])]
        [1.0, -0.5]

    Source:
        Hubert, Arabie, Comparing Partitions, Journal of Classification 2 (1985), as in the evaluation of TELL's code.
    """
    if clusters.ndim != 1 or labels.shape != clusters.shape:
        raise ValueError(f"clusters and labels must have one shape [N], got {clusters.shape} and {labels.shape}")
    keep = checked_where(where, clusters.shape[0]) & (labels >= 0)
    return rows_mixed(_rand)(clusters, labels, keep, num_clusters=num_clusters, num_classes=num_classes)


def _checked(centres, z, where, alpha):
    if centres.ndim != 2 or z.ndim != 2 or centres.shape[1] != z.shape[1]:
        raise ValueError(f"centres and z must be [K, D] and [N, D], got {centres.shape} and {z.shape}")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be positive")
    return checked_where(where, z.shape[0])


def _distances(z, centres, keep):
    """Returns squared distances [N, K], in the accumulation dtype, one by one: nothing cancels."""
    dtype = compute_dtype(z, centres)
    z = zero_where_false(z, keep).astype(dtype)
    return jnp.sum(jnp.square(z[:, None, :] - centres.astype(dtype)[None, :, :]), axis=2)


def _assigned(distance, *, alpha, hard):
    if hard:
        return jax.nn.one_hot(jnp.argmin(distance, axis=1), distance.shape[1], dtype=distance.dtype)
    return jax.nn.softmax(-alpha * distance, axis=1)


def _fit(key, x, *, clusters, steps, batch, starts):
    wide = x.astype(compute_dtype(x))
    real = jnp.ones(batch, bool)

    def step(state, key):
        centres, seen = state
        rows = wide[jax.random.randint(key, (batch,), 0, wide.shape[0])]
        member = _assigned(_distances(rows, centres, real), alpha=1.0, hard=True)
        number = jnp.sum(member, axis=0)
        total = jnp.matmul(member.T, rows, precision=jax.lax.Precision.HIGHEST)
        # The gradient of the sum is 2 (number c - total); the first rows replace the row that a centre began as.
        moved = safe_divide(total - number[:, None] * centres, (seen + number)[:, None])
        return (centres + moved, seen + number), None

    def run(key):
        key_rows, key_steps = jax.random.split(key)
        first = wide[jax.random.permutation(key_rows, wide.shape[0])[:clusters]]
        (centres, _), _ = jax.lax.scan(step, (first, jnp.zeros_like(first[:, 0])), jax.random.split(key_steps, steps))
        distance = _distances(wide, centres, jnp.ones(wide.shape[0], bool))
        return jnp.argmin(distance, axis=1).astype(jnp.int32), centres, jnp.sum(jnp.min(distance, axis=1))

    labels, centres, inertia = jax.vmap(run)(jax.random.split(key, starts))
    best = jnp.argmin(inertia)
    return labels[best], centres[best].astype(x.dtype), inertia[best]


def _rand(clusters, labels, keep, *, num_clusters, num_classes):
    first = jax.nn.one_hot(clusters, num_clusters) * keep[:, None].astype(jnp.float32)
    table = jnp.matmul(first.T, jax.nn.one_hot(labels, num_classes), precision=jax.lax.Precision.HIGHEST)
    pairs = lambda count: jnp.sum(count * (count - 1)) / 2
    total = pairs(jnp.sum(table))
    both, rows, columns = pairs(table), pairs(jnp.sum(table, axis=1)), pairs(jnp.sum(table, axis=0))
    expected, most = safe_divide(rows * columns, total), (rows + columns) / 2
    trivial = jnp.where(total > 0, 1.0, 0.0)
    return jnp.where(most == expected, trivial, safe_divide(both - expected, most - expected))

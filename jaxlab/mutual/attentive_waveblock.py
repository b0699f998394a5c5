"""Attentive WaveBlock (AWB, 2020, arXiv 2006.06525).

Full title: Attentive WaveBlock: Complementarity-enhanced Mutual Networks for Unsupervised Domain Adaptation in Person
Re-identification and Beyond.

Networks that teach each other grow alike. WaveBlock keeps their features apart without a parameter: in training each
network leaves a random horizontal block of a feature map as it is and enlarges the rest. Attention before it (Pre-A, a
channel and spatial gate) or after it (Post-A, a non-local block) enlarges the difference.

    y[:, h] = x[:, h] if s <= h < s + r else scale * x[:, h],   r = round(rate H),   s ~ uniform {0, .., H - r}

It is built into mutual mean-teaching (arXiv 2001.01526): every epoch the averaged networks' features are clustered into
pseudo-labels y; with T = exp(d_n) / (exp(d_p) + exp(d_n)) of the hardest positive and negative in the batch,

    L_k = (1 - w) CE(y, p_k) + w CE(p_teacher, p_k) + (1 - v) (-log T_k) + v BCE(T_teacher, T_k),   w = 0.5, v = 0.8

The block is drawn once a forward pass, and averaged networks draw one too; a test has none, without rescaling. The
scale is 1.5 in the newest version of the code and 2 in the first one.

Reconstructed: anchors without a positive or a negative (no term; the official sampler never makes one), masks, more
than two networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.mutual.mean_teacher import consistency_loss, mean_teacher
from jaxlab.norm import batch_norm
from jaxlab.ops.clustering import kmeans
from jaxlab.ops.collectives import axis_index, gather_rows, global_mean
from jaxlab.ops.layers import dense, mlp
from jaxlab.ops.masked import compute_dtype, masked_mean, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer, Learner, StatefulLayer


def waveblock(
    x: Array, *, key: Array | None = None, train: bool = False, rate: float = 0.3, scale: float = 1.5, axis: int = 1
) -> Array:
    """Returns the features times `scale`, but for one random block of `round(rate * H)` rows, which stays as it is.

    One block serves the whole batch. Give every network a key of its own, so that their blocks differ.

    Args:
        x: float [N, H, W, C], or any shape with the waved axis `axis`.
        key: draws where the block starts.
        train: False returns `x`.
        rate: in [0, 1], share of the rows that stay.
        scale: of the others.
        axis: the waved axis, height.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: training without a key, `rate` is out of range, or `axis` is not an axis of `x`.

    Example:
        >>> wave = jax.jit(lambda key, x: waveblock(x, key=key, train=True))
        >>> y = jax.device_get(wave(jax.random.key(0), jnp.ones((1, 10, 1, 1))))
        >>> int((y == 1).sum()), int((y == 1.5).sum())
        (3, 7)

    Source:
        Wang et al., arXiv 2006.06525, section 3.2; code WangWenhao0716/Attentive-WaveBlock (rate 0.3, scale 1.5).
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} must be between 0 and 1")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis={axis} is not an axis of x, which has shape {x.shape}")
    if not train:
        return x
    if key is None:
        raise ValueError("key=None: waveblock draws where its block starts, pass a key in training")
    height = x.shape[axis]
    block = round(rate * height)
    start = jnp.floor(jax.random.uniform(key) * (height - block + 1))  # far shorter than randint's program
    row = jnp.arange(height)
    factor = jnp.where((row >= start) & (row < start + block), 1.0, scale).astype(x.dtype)
    shape = [1] * x.ndim
    shape[axis] = height
    return x * factor.reshape(shape)


def cbam(*, reduction: int = 16, size: int = 7) -> StatefulLayer:
    """Returns the channel and spatial gate that stands before a WaveBlock (Pre-A).

    `x <- x sig(MLP(mean_hw x) + MLP(max_hw x))`, then `x <- x sig(BN(conv([max_c x, mean_c x])))`.

    Args:
        reduction: the MLP has `C / reduction` hidden units, at least one.
        size: side of the spatial kernel, odd.

    Returns:
        A `StatefulLayer`: `params, state = init(key, channels)`, `y, state = apply(params, state, x, train=False)` with
        x float [N, H, W, C].

    Raises:
        ValueError: an option is out of range; in `apply`, a shape does not fit.

    Example:
        >>> layer = cbam()
        >>> params, state = jax.jit(layer.init, static_argnums=1)(jax.random.key(0), 4)
        >>> jax.jit(layer.apply)(params, state, jnp.ones((2, 8, 8, 4)))[0].shape
        (2, 8, 8, 4)

    Source:
        Woo et al., CBAM, arXiv 1807.06521; the order of the pooled maps and the normalisation as in the code that AWB
        uses (running statistics with momentum 0.99).
    """
    if reduction < 1:
        raise ValueError(f"reduction={reduction} must be at least 1")
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size={size} must be odd and positive")
    norm = batch_norm(momentum=0.99)

    def gate(channels):
        return mlp([max(channels // reduction, 1), channels])

    def init(key, channels):
        key_gate, key_conv = jax.random.split(key)
        norm_params, state = norm.init(None, 1)
        conv = jax.random.normal(key_conv, (size, size, 2, 1)) / size
        return {"gate": gate(channels).init(key_gate, channels), "conv": conv, "norm": norm_params}, state

    def apply(params, state, x, *, train=False):
        _check_channels(x, params["gate"]["dense_1"]["b"].shape[0], 4)
        wide = x.astype(compute_dtype(x))
        layer = gate(x.shape[-1])
        pooled = layer.apply(params["gate"], jnp.mean(wide, axis=(1, 2)))
        pooled = pooled + layer.apply(params["gate"], jnp.max(wide, axis=(1, 2)))
        wide = wide * jax.nn.sigmoid(pooled)[:, None, None, :]
        maps = jnp.stack([jnp.max(wide, axis=-1), jnp.mean(wide, axis=-1)], axis=-1)
        layout = ("NHWC", "HWIO", "NHWC")
        kernel = params["conv"].astype(wide.dtype)
        spatial = jax.lax.conv_general_dilated(maps, kernel, (1, 1), "SAME", dimension_numbers=layout)
        spatial, state = norm.apply(params["norm"], state, spatial, train=train)
        return (wide * jax.nn.sigmoid(spatial)).astype(x.dtype), state

    return StatefulLayer(init, apply)


def nonlocal_block(*, features: int | None = None) -> StatefulLayer:
    """Returns the attention that stands after a WaveBlock (Post-A): all positions look at all, by plain products.

    `y = x + BN(W ((theta x)(phi x)^T / P) (g x))` over the P positions of an example. The normalisation's gain starts
    at 0, so that the block starts as the identity.

    Args:
        features: width of theta, phi and g; None = half the channels.

    Returns:
        A `StatefulLayer`: `params, state = init(key, channels)`, `y, state = apply(params, state, x, train=False)` with
        x float [N, ..., C].

    Raises:
        ValueError: `features` is below 1; in `apply`, a shape does not fit.

    Example:
        >>> layer = nonlocal_block()
        >>> params, state = jax.jit(layer.init, static_argnums=1)(jax.random.key(0), 4)
        >>> x = jnp.arange(32.0).reshape(1, 2, 4, 4)
        >>> bool(jnp.all(jax.jit(layer.apply)(params, state, x)[0] == x))
        True

    Source:
        Wang et al., Non-local Neural Networks, arXiv 1711.07971 (dot product, no subsampling), as AWB's code uses it.
    """
    if features is not None and features < 1:
        raise ValueError(f"features={features} must be at least 1")
    norm = batch_norm()

    def init(key, channels):
        inner = max(channels // 2, 1) if features is None else features
        keys = jax.random.split(key, 4)
        params = {n: dense(inner).init(keys[i], channels) for i, n in enumerate(("theta", "phi", "g"))}
        norm_params, state = norm.init(None, channels)
        norm_params = {**norm_params, "gain": jnp.zeros_like(norm_params["gain"])}
        return {**params, "out": dense(channels).init(keys[3], inner), "norm": norm_params}, state

    def apply(params, state, x, *, train=False):
        _check_channels(x, params["norm"]["gain"].shape[0], 3)
        flat = x.reshape(x.shape[0], -1, x.shape[-1]).astype(compute_dtype(x))
        layer = dense(params["theta"]["w"].shape[1])
        theta, phi, g = (layer.apply(params[name], flat) for name in ("theta", "phi", "g"))
        # No softmax between, so the product of positions by positions is never needed.
        context = jnp.einsum("npc,npd->ncd", phi, g) / flat.shape[1]
        y = dense(x.shape[-1]).apply(params["out"], jnp.einsum("npc,ncd->npd", theta, context))
        y, state = norm.apply(params["norm"], state, y, train=train)
        return (flat + y).reshape(x.shape).astype(x.dtype), state

    return StatefulLayer(init, apply)


def mutual_mean_teaching(
    net: Layer | StatefulLayer | Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    num_peers: int = 2,
    decay: float = 0.999,
    soft_weight: float = 0.5,
    soft_triplet_weight: float = 0.8,
    smoothing: float = 0.1,
    augment: Callable[[Array, Array], Array] | None = None,
    axis_name: str | None = None,
    data_axis_name: str | None = None,
) -> Learner:
    """Returns a learner of K networks that fit pseudo-labels and the averages of each other, by logits and triplets.

    Between epochs, `cluster_pseudo_labels` renews the labels; the caller then puts the centroids into the classifiers
    (`params` and `teacher_params`) and starts a new optimiser state, as the official code does.

    Args:
        net: network whose `apply` gives a dict with `logits` [N, C] and `features` [N, D] (before the last
            normalisation).
        optimizer: applied to each peer on its own.
        num_peers: K >= 1.
        decay: of the averaged networks.
        soft_weight: w of the module's docstring.
        soft_triplet_weight: v.
        smoothing: of the pseudo-labels, in [0, 1].
        augment: `augment(key, x)`; each peer draws its own view, which its average shares.
        axis_name: mapped axis over which the peers are spread.
        data_axis_name: mapped axis over which the examples are spread; triplets are mined among all of them.

    Returns:
        A `Learner` as `mean_teacher` describes it (`batch["y"]` are pseudo-labels, -1 = none), with the metrics `loss`,
        `accuracy`, `hard`, `soft`, `triplet`, `soft_triplet`.

    Raises:
        ValueError: an option is out of range, or the network's output lacks an entry.

    Example:
        >>> from jaxlab.types import Layer
        >>> net = Layer(dense(3).init, lambda p, x: {"logits": dense(3).apply(p, x), "features": x})
        >>> learner = mutual_mean_teaching(net, optax.sgd(0.1))
        >>> batch = {"x": jax.random.normal(jax.random.key(0), (6, 2)), "y": jnp.array([0, 1, 2, 0, 1, 2])}
        >>> state = jax.jit(learner.init)(jax.random.key(1), batch)
        >>> jax.jit(learner.update)(state, batch, jax.random.key(2))[1]["soft_triplet"].shape
        (2,)

    Source:
        Ge, Chen, Li, Mutual Mean-Teaching, arXiv 2001.01526; weights of the code yxgeee/MMT.
    """
    for name, value in (
        ("soft_weight", soft_weight),
        ("soft_triplet_weight", soft_triplet_weight),
        ("smoothing", smoothing),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be between 0 and 1")

    def objective(outputs, teachers, batch, teach, step):
        del step
        missing = {"logits", "features"} - set(outputs)
        if missing:
            raise ValueError(f"net gives {sorted(outputs)}, but no {sorted(missing)}")
        where, y = batch["where"], batch["y"]
        z = zero_where_false(outputs["logits"], where)
        log_p = jax.nn.log_softmax(z.astype(compute_dtype(z)))
        own = jnp.take_along_axis(log_p, jnp.maximum(y, 0)[:, None], axis=-1)[:, 0]
        hard = -(1 - smoothing) * own - smoothing * jnp.mean(log_p, axis=-1)
        hard = global_mean(hard, where & (y >= 0), axis_name=data_axis_name)
        options = {"where": where, "axis_name": data_axis_name}
        triplet = soft_triplet_loss(outputs["features"], y, **options)

        def of_teacher(teacher):
            soft = consistency_loss(outputs["logits"], teacher["logits"], kind="cross_entropy", **options)
            return soft, soft_triplet_loss(outputs["features"], y, teacher_features=teacher["features"], **options)

        share = teach.astype(hard.dtype) / jnp.sum(teach, dtype=hard.dtype)
        soft, soft_triplet = (jnp.sum(share * terms) for terms in jax.vmap(of_teacher)(teachers))
        loss = (1 - soft_weight) * hard + soft_weight * soft
        loss = loss + (1 - soft_triplet_weight) * triplet + soft_triplet_weight * soft_triplet
        return loss, {"hard": hard, "soft": soft, "triplet": triplet, "soft_triplet": soft_triplet}

    return mean_teacher(
        net,
        optimizer,
        num_peers=num_peers,
        decay=decay,
        objective=objective,
        augment=augment,
        axis_name=axis_name,
        data_axis_name=data_axis_name,
    )


def soft_triplet_loss(
    features: Array,
    labels: Array,
    *,
    teacher_features: Array | None = None,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how unsurely the hardest positive lies nearer than the hardest negative.

    `-q log T - (1 - q) log (1 - T)`, `T = exp(d_n) / (exp(d_p) + exp(d_n))`; q = 1, or the T of the teacher's features
    for the same pair of rows (constant). d are Euclidean distances: d_p is the largest to a row of the same label, d_n
    the smallest to a row of another.

    Args:
        features: float [N, D].
        labels: int [N]; -1 = unlabelled, takes no part.
        teacher_features: float [N, E]; no gradient reaches them.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread; pairs are mined among all of them.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `features`. An anchor
        without a positive or a negative is no term; no term gives 0.

    Raises:
        ValueError: shapes do not fit or `reduction` is unknown.

    Example:
        >>> x = jnp.array([[0.0], [1.0], [9.0], [10.0]])
        >>> loss = jax.jit(soft_triplet_loss)
        >>> [round(float(loss(x, jnp.array(y))), 4) for y in ([0, 0, 1, 1], [0, 1, 0, 1])]
        [0.0006, 8.0003]

    Source:
        Ge, Chen, Li, arXiv 2001.01526, eqs. 7 and 8; code yxgeee/MMT.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features and labels must be [N, D] and [N], got {features.shape} and {labels.shape}")
    if teacher_features is not None and (teacher_features.ndim != 2 or len(teacher_features) != len(features)):
        raise ValueError(f"teacher_features must be [{len(features)}, E], got {teacher_features.shape}")
    if where is not None and where.shape != labels.shape:
        raise ValueError(f"where has shape {where.shape}, expected {labels.shape}")
    labels = jnp.asarray(labels)
    keep = labels >= 0 if where is None else where & (labels >= 0)
    teacher = None if teacher_features is None else jax.lax.stop_gradient(teacher_features)
    terms, exist = rows_mixed(_triplet_terms)(features, labels, keep, teacher, axis_name=axis_name)
    return reduce_terms(terms, exist, reduction=reduction, axis_name=axis_name, dtype=features.dtype)


def cluster_pseudo_labels(
    key: Array, features: Array, *, num_clusters: int, num_starts: int = 10, where: Array | None = None
) -> tuple[Array, Array]:
    """Returns pseudo-labels by k-means of the networks' mean features, and weights for their classifiers.

    `k-means over rows of mean_k f_k / ||f_k||`; classifier c is its centroid divided by its length.

    Args:
        key: draws the seeds.
        features: float [K, N, D], features of the K averaged networks for the whole data set.
        num_clusters: C.
        num_starts: sets of seeds tried.
        where: bool [N], real examples.

    Returns:
        `labels` int32 [N], -1 where masked; `centroids` [C, D] of length 1, in the dtype of `features`.

    Raises:
        ValueError: `features` is not [K, N, D], or see `ops.kmeans`.

    Example:
        >>> f = jnp.array([[[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]])
        >>> labels, _ = jax.jit(lambda key, f: cluster_pseudo_labels(key, f, num_clusters=2))(jax.random.key(0), f)
        >>> bool(labels[0] == labels[1]), bool(labels[0] == labels[2])
        (True, False)

    Source:
        Ge, Chen, Li, arXiv 2001.01526; code yxgeee/MMT.
    """
    if features.ndim != 3:
        raise ValueError(f"features must be [K, N, D], got {features.shape}")
    wide = jax.lax.stop_gradient(features).astype(compute_dtype(features))
    wide = wide if where is None else jnp.where(where[None, :, None], wide, 0.0)
    mean = jnp.mean(safe_normalize(wide), axis=0)
    labels, centroids, _ = kmeans(key, mean, num_clusters=num_clusters, num_starts=num_starts, where=where)
    return labels, safe_normalize(centroids).astype(features.dtype)


def complementarity(a: Array, b: Array, *, where: Array | None = None) -> Array:
    """Returns how different two networks' features are: 1 - mean cosine of the features of the same example.

    Args:
        a: float [N, D].
        b: float [N, D].
        where: bool [N], real examples.

    Returns:
        Scalar in [0, 2] in the accumulation dtype; 1 without any example.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> float(jax.jit(complementarity)(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0]])))
        1.0

    Source:
        Wang et al., arXiv 2006.06525 (reconstructed: the paper argues about it without a formula).
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must both be [N, D], got {a.shape} and {b.shape}")
    dtype = compute_dtype(a, b)
    a, b = (safe_normalize(zero_where_false(x, where).astype(dtype)) for x in (a, b))
    return 1 - masked_mean(jnp.sum(a * b, axis=-1), where)


def _triplet_terms(features, labels, keep, teacher, *, axis_name):
    """Returns the term [N] of every anchor and whether it has one."""
    dtype = compute_dtype(features)
    features = zero_where_false(features, keep).astype(dtype)
    everyone, every_label = gather_rows(features, axis_name), gather_rows(labels, axis_name)
    real = gather_rows(keep, axis_name)
    rows = axis_index(axis_name) * len(labels) + jnp.arange(len(labels))
    # Rows are mined without gradient; the distances of the pairs found are then taken anew, one by one.
    own, others = jax.lax.stop_gradient((features, everyone))
    product = jnp.matmul(own, others.T, precision=jax.lax.Precision.HIGHEST)
    square = jnp.sum(own * own, -1)[:, None] + jnp.sum(others * others, -1)[None] - 2 * product
    pair = keep[:, None] & real[None] & (rows[:, None] != jnp.arange(len(real))[None])
    same = labels[:, None] == every_label[None]
    positive = jnp.argmax(jnp.where(pair & same, square, -jnp.inf), axis=1)
    negative = jnp.argmin(jnp.where(pair & jnp.logical_not(same), square, jnp.inf), axis=1)
    exist = jnp.any(pair & same, axis=1) & jnp.any(pair & jnp.logical_not(same), axis=1)

    def gap(x, everyone):
        away = lambda index: jnp.sum(jnp.square(x - everyone[index]), axis=-1)
        return jnp.sqrt(jnp.maximum(away(negative), 1e-12)) - jnp.sqrt(jnp.maximum(away(positive), 1e-12))

    margin = gap(features, everyone)
    target = jnp.ones_like(margin)
    if teacher is not None:
        teacher = zero_where_false(teacher, keep).astype(dtype)
        target = jax.nn.sigmoid(gap(teacher, gather_rows(teacher, axis_name)))
    return -target * jax.nn.log_sigmoid(margin) - (1 - target) * jax.nn.log_sigmoid(-margin), exist


def _check_channels(x, channels, axes):
    if x.ndim < axes or x.shape[-1] != channels or (axes == 4 and x.ndim != 4):
        dims = "[N, H, W" if axes == 4 else "[N, ..."
        raise ValueError(f"x has shape {x.shape}, expected {dims}, {channels}]")

"""Subclass-balancing Contrastive Learning for Long-tailed Recognition (2023, arXiv 2306.15925).

Large classes are split into clusters about as large as the small classes, again and again during training, and the loss
attracts on two levels: examples of one subclass against all others, and the rest of the class against what lies outside
the subclass, at the class's own temperature. No example is drawn more often than others, yet tails are not drowned.

    K_c  = max(1, n_c // max(min n, delta))                                         subclasses of class c
    A_i  = -mean over j in one subclass with i of [s_ij / t - log sum_{a != i} exp(s_ia / t)]
    B_i  = -mean over j in R_i of [s_ij / t_c - log sum_{a outside the subclass, or another view of i} exp(s_ia / t_c)]
    R_i  = class of i outside its subclass, and the other views of i
    loss = mean_i (t / base) A_i + beta B_i,    t_c = t phi_c / mean(phi),    t_c = t where K_c = 1
    phi_c = mean distance of the class's embeddings to their mean / log(n_c + 10), clipped to percentiles

Training starts with `supervised_contrastive_loss`; after that, clusters and temperatures are renewed every few epochs.
Stage two trains a linear classifier on the frozen encoder with classes drawn alike, or with `ldam_loss`.

Reconstructed: masks, more than two views, empty clusters. In the balanced k-means the release divides each centre's
similarities by their sum, which reverses the order where the sum is negative, and weighs its seeds by 1 / similarity;
here the order is that of the cosines and the weights are 1 - cosine.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.contrastive._pairs import checked_where, unit_rows
from jaxlab.contrastive.supervised import _positive_terms
from jaxlab.ops.collectives import axis_index, gather_rows
from jaxlab.ops.masked import compute_dtype, masked_mean, safe_divide, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed


def sbcl_loss(
    views: Array,
    labels: Array,
    subclasses: Array,
    class_temperatures: Array,
    *,
    temperature: float | Array = 0.1,
    beta: float | Array = 0.25,
    base_temperature: float = 0.07,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the two-level contrastive loss: within the subclass, and within the class outside the subclass.

    Args:
        views: float [V, B, D], V >= 2 views of each example; need not be normalised.
        labels: int [B]; -1 = unlabelled: neither anchor nor positive, but a negative of all.
        subclasses: int [B], from `assign_subclasses`; no two classes share one.
        class_temperatures: float > 0 [C], of the second level, from `class_temperatures`.
        temperature: t > 0, of the first level (0.1 with large batches, 0.07 with a queue).
        beta: >= 0, weight of the second level (0.25; 0.2 with a queue).
        base_temperature: the first level is multiplied by `temperature / base_temperature`.
        where: bool [B], real examples.
        axis_name: mapped axis over which the examples are spread: positives and negatives come from all shards.
        reduction: "mean" over anchors (of all shards) or "none", `[V, B]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[V, B]` in the dtype of `views`; no labelled
        example gives 0.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> views, y = jnp.stack([jnp.eye(4), jnp.eye(4)]), jnp.array([0, 0, 1, 1])
        >>> loss = jax.jit(lambda subclasses: sbcl_loss(views, y, subclasses, jnp.full(2, 0.1)))
        >>> round(float(loss(y)), 2), round(float(loss(jnp.array([0, 1, 2, 3]))), 2)
        (9.52, 1.67)

    Source:
        Hou et al., arXiv 2306.15925, section 3; code JackHck/SBCL (which keeps the other view in the second level).
    """
    if views.ndim != 3 or views.shape[0] < 2:
        raise ValueError(f"views must be [V >= 2, B, D], got {views.shape}")
    keep = checked_where(where, views.shape[1], temperature)
    for name, value in {"labels": labels, "subclasses": subclasses}.items():
        if value.shape != keep.shape:
            raise ValueError(f"{name} has shape {value.shape}, expected {keep.shape}, one for each example")
    if class_temperatures.ndim != 1:
        raise ValueError(f"class_temperatures must be [C], got {class_temperatures.shape}")
    if not base_temperature > 0 or (isinstance(beta, int | float) and beta < 0):
        raise ValueError(f"base_temperature={base_temperature} must be positive and beta={beta} not negative")
    terms = rows_mixed(_terms)(
        views,
        *map(jnp.asarray, (labels, subclasses, class_temperatures)),
        keep,
        temperature=temperature,
        beta=beta,
        base=base_temperature,
        axis_name=axis_name,
    )
    anchors = jnp.broadcast_to((keep & (labels >= 0))[None, :], terms.shape)
    return reduce_terms(terms, anchors, reduction=reduction, axis_name=axis_name, dtype=views.dtype)


def subclass_counts(class_counts: Array, *, delta: int = 10) -> Array:
    """Returns into how many subclasses to split each class: `max(1, n_c // max(min n, delta))`.

    Args:
        class_counts: int [C], examples of each class, at least 1.
        delta: smallest size wanted of a subclass (10 for CIFAR-100, 20 for ImageNet).

    Returns:
        int32 [C].

    Raises:
        ValueError: `class_counts` is not [C] or `delta` is below 1.

    Example:
        >>> subclass_counts(jnp.array([100, 25, 4])).tolist()
        [10, 2, 1]

    Source:
        Hou et al., arXiv 2306.15925, section 3; code JackHck/SBCL.
    """
    if class_counts.ndim != 1 or delta < 1:
        raise ValueError(f"class_counts must be [C] and delta at least 1, got {class_counts.shape} and {delta}")
    counts = jnp.asarray(class_counts, jnp.int32)
    return jnp.maximum(counts // jnp.maximum(jnp.min(counts), delta), 1)


def assign_subclasses(
    key: Array,
    embeddings: Array,
    labels: Array,
    counts: Array,
    *,
    max_subclasses: int,
    max_size: int | None = None,
    balanced: bool = False,
    max_steps: int = 35,
) -> Array:
    """Returns the subclass of each example, by clustering every class on its own by the cosine.

    Args:
        key: draws the seeds.
        embeddings: float [N, D], of the whole data set, one view, encoder in evaluation mode.
        labels: int [N]; -1 = unlabelled or padding.
        counts: int [C], subclasses of each class, from `subclass_counts`.
        max_subclasses: at least the largest of `counts`.
        max_size: at least the size of the largest class, so that a class is clustered alone and not the whole data set
            with a mask; None = N. Examples of a class beyond it are left out (-1).
        balanced: whether the clusters of a class have equal sizes, by `balanced_kmeans`; otherwise plain k-means (the
            code's default).
        max_steps: of the clustering (35 in the code).

    Returns:
        int32 [N]: numbers of class c start at `counts[:c].sum()`; -1 where the label is.

    Raises:
        ValueError: shapes do not fit or a number is below 1.

    Example:
        >>> x, y = jnp.eye(4), jnp.array([0, 0, 0, 1])
        >>> run = lambda key: assign_subclasses(key, x, y, jnp.array([2, 1]), max_subclasses=2)
        >>> jax.eval_shape(run, jax.random.key(0))
        ShapeDtypeStruct(shape=(4,), dtype=int32)

    Source:
        Hou et al., arXiv 2306.15925, section 3; code JackHck/SBCL.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or counts.ndim != 1:
        raise ValueError(
            f"embeddings, labels and counts must be [N, D], [N] and [C], got {embeddings.shape}, {labels.shape} and "
            f"{counts.shape}"
        )
    size = embeddings.shape[0] if max_size is None else max_size
    if min(max_subclasses, size, max_steps) < 1:
        raise ValueError(
            f"max_subclasses={max_subclasses}, max_size={size} and max_steps={max_steps} must be at least 1"
        )
    options = {"most": max_subclasses, "size": min(size, embeddings.shape[0]), "balanced": balanced, "steps": max_steps}
    embeddings = jax.lax.stop_gradient(embeddings)
    return rows_mixed(_assign)(key, embeddings, jnp.asarray(labels), jnp.asarray(counts, jnp.int32), **options)


def balanced_kmeans(
    key: Array, x: Array, *, num_clusters: int, max_steps: int = 100, where: Array | None = None
) -> tuple[Array, Array]:
    """Returns clusters by the cosine whose sizes differ by at most one.

    Pairs of row and centre are visited from the largest cosine down, and a row joins a centre that has room for it:
    first with `N // K` places each, then, for the `N mod K` rows left over, with one more. Centres are then the means
    of their rows, until no row moves.

    Args:
        key: draws the seeds (k-means++ with weights 1 - cosine).
        x: float [N, D]; need not be normalised.
        num_clusters: K >= 1.
        max_steps: rounds at most.
        where: bool [N], rows to cluster; N counts these.

    Returns:
        `labels` int32 [N], -1 where masked; `centroids` [K, D] in the dtype of `x`, means of unit rows. No gradient.

    Raises:
        ValueError: `x` is not [N, D], `where` does not fit, or a number is below 1.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> labels, _ = jax.jit(lambda key: balanced_kmeans(key, x, num_clusters=2))(jax.random.key(0))
        >>> labels.sum().item(), bool(labels[0] == labels[1])
        (2, True)

    Source:
        Hou et al., arXiv 2306.15925, section 3; code JackHck/SBCL (100 rounds).
    """
    if x.ndim != 2 or (where is not None and where.shape != x.shape[:1]):
        raise ValueError(f"x and where must be [N, D] and [N], got {x.shape} and {getattr(where, 'shape', None)}")
    if min(num_clusters, max_steps) < 1:
        raise ValueError(f"num_clusters={num_clusters} and max_steps={max_steps} must be at least 1")
    keep = jnp.asarray(checked_where(where, x.shape[0]))
    options = {"most": num_clusters, "balanced": True, "steps": max_steps}
    labels, centres = rows_mixed(_cluster)(
        key, jax.lax.stop_gradient(x), keep, jnp.full((), num_clusters, jnp.int32), **options
    )
    return labels, centres.astype(x.dtype)


def class_temperatures(
    embeddings: Array,
    labels: Array,
    counts: Array,
    *,
    temperature: float | Array = 0.1,
    form: str = "ratio",
    percentiles: tuple[float, float] = (10.0, 90.0),
) -> Array:
    """Returns the second level's temperature of each class: higher for classes that are wide for their size.

    `phi_c = mean_i |v_i - mean| / log(n_c + 10)`, clipped; `t_c = t phi_c / mean(phi)`, or `t exp(phi_c / mean(phi))`.

    Args:
        embeddings: float [N, D], of the whole data set; brought to length 1 here.
        labels: int [N]; -1 = unlabelled or padding.
        counts: int [C], subclasses of each class; a class with one keeps `temperature`.
        temperature: t > 0.
        form: "ratio" (the code) or "exponential" (the paper).
        percentiles: between which phi is clipped (10 and 90 in one of the scripts, 20 and 80 in another).

    Returns:
        float [C] in the accumulation dtype, without gradient; `temperature` for classes without examples, or if all
        classes have width 0.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.2], [1.0, 0.0]])
        >>> run = jax.jit(lambda x: class_temperatures(x, jnp.array([0, 0, 1, 1]), jnp.array([2, 2])))
        >>> wide, narrow = run(x)
        >>> bool(wide > 0.1 > narrow)
        True

    Source:
        Hou et al., arXiv 2306.15925, section 3; code JackHck/SBCL.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or counts.ndim != 1:
        raise ValueError(
            f"embeddings, labels and counts must be [N, D], [N] and [C], got {embeddings.shape}, {labels.shape} and "
            f"{counts.shape}"
        )
    if form not in ("ratio", "exponential"):
        raise ValueError(f"form={form!r} must be 'ratio' or 'exponential'")
    checked_where(None, 1, temperature)
    if not 0 <= percentiles[0] <= percentiles[1] <= 100:
        raise ValueError(f"percentiles={percentiles} must ascend within 0 to 100")
    options = {"temperature": temperature, "form": form, "percentiles": tuple(percentiles)}
    return rows_mixed(_temperatures)(
        jax.lax.stop_gradient(embeddings), jnp.asarray(labels), jnp.asarray(counts), **options
    )


def ldam_loss(
    logits: Array,
    labels: Array,
    class_counts: Array,
    *,
    max_margin: float = 0.5,
    scale: float = 30.0,
    class_weights: Array | None = None,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the cross-entropy in which small classes have to win by a larger margin (label-distribution-aware).

    `CE(scale (logits - margin_y one_hot(y)))`, `margin_c = max_margin (min n / n_c)^(1/4)`.

    Args:
        logits: float [N, C], cosines of normalised features and normalised class weights.
        labels: int [N]; -1 = unlabelled, no term.
        class_counts: number of examples [C] of each class, at least 1.
        max_margin: of the smallest class.
        scale: of the logits.
        class_weights: float >= 0 [C]; the mean is then weighted by them, as deferred re-weighting does.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread, for the mean.
        reduction: "mean" (over all shards) or "none", `[N]`, of which the mean is that of "mean".

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `logits`; no term
        gives 0.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> loss = jax.jit(lambda y: ldam_loss(jnp.full((1, 2), 0.5), y, jnp.array([1600, 100])))
        >>> [round(float(loss(jnp.array([y]))), 2) for y in (0, 1)]  # margins 0.25 and 0.5, thirtyfold
        [7.5, 15.0]

    Source:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, arXiv 1906.07413; the second
        stage of SBCL's code.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or class_counts.shape != logits.shape[1:]:
        raise ValueError(
            f"logits, labels and class_counts must be [N, C], [N] and [C], got {logits.shape}, {labels.shape} and "
            f"{class_counts.shape}"
        )
    if class_weights is not None and class_weights.shape != class_counts.shape:
        raise ValueError(f"class_weights has shape {class_weights.shape}, expected {class_counts.shape}")
    if not scale > 0 or max_margin < 0:
        raise ValueError(f"scale={scale} must be positive and max_margin={max_margin} not negative")
    keep = checked_where(where, logits.shape[0], 1.0) & (labels >= 0)
    dtype = compute_dtype(logits)
    counts = class_counts.astype(dtype)
    margins = max_margin * (jnp.min(counts) / counts) ** 0.25
    true = jax.nn.one_hot(labels, logits.shape[1], dtype=dtype)
    wide = zero_where_false(logits, keep).astype(dtype)
    log_probs = jax.nn.log_softmax(scale * (wide - true * margins[None, :]), axis=1)
    terms = -jnp.sum(true * log_probs, axis=1)
    if class_weights is not None:
        weights = zero_where_false(jnp.sum(true * class_weights.astype(dtype)[None, :], axis=1), keep)
        mean = reduce_terms(weights, keep, axis_name=axis_name)
        terms = terms * safe_divide(weights, mean)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=logits.dtype)


def long_tail_indices(key: Array, labels: np.ndarray, *, factor: float = 0.01, kind: str = "exponential") -> np.ndarray:
    """Returns the rows of a long-tailed subset of a data set (host): class 0 keeps most, the last class least.

    "exponential": class c of C keeps `n factor^(c / (C - 1))` rows, n the size of the smallest class; "step": the
    second half of the classes keeps `n factor`.

    Args:
        key: draws the rows.
        labels: int [N], 0 to C - 1.
        factor: smallest over largest class, in (0, 1].
        kind: "exponential" or "step".

    Returns:
        NumPy int64 rows, ascending; at least one of each class.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import numpy as np
        >>> y = np.repeat(np.arange(3), 100)
        >>> np.bincount(y[long_tail_indices(jax.random.key(0), y)]).tolist()
        [100, 10, 1]

    Source:
        Cui et al., arXiv 1901.05555, as in SBCL's code (factor 0.01).
    """
    if not 0 < factor <= 1 or kind not in ("exponential", "step"):
        raise ValueError(f"factor={factor} must be in (0, 1] and kind={kind!r} 'exponential' or 'step'")
    labels = np.asarray(labels)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    sizes = np.bincount(labels)
    classes, largest = len(sizes), sizes.min()
    rows = []
    for c in range(classes):
        share = factor ** (c / max(classes - 1, 1)) if kind == "exponential" else (factor if 2 * c >= classes else 1.0)
        number = max(int(round(largest * share, 6)), 1)
        rows.append(rng.permutation(np.flatnonzero(labels == c))[:number])
    return np.sort(np.concatenate(rows))


def _terms(views, labels, subclasses, class_temperatures, keep, *, temperature, beta, base, axis_name):
    """Returns the loss of each anchor [V, B]."""
    num_views, rows, size = views.shape
    # All views of all examples in one list; what they compare with is the list of all shards.
    example = axis_index(axis_name) * rows + jnp.arange(rows)
    real, example, labels, subclasses = (jnp.tile(x, num_views) for x in (keep, example, labels, subclasses))
    view = jnp.repeat(jnp.arange(num_views), rows)
    unit = unit_rows(views.reshape(num_views * rows, size), real)

    def same(x):
        return x[:, None] == gather_rows(x, axis_name)[None, :]

    exist = gather_rows(real, axis_name)[None, :]
    own, itself = same(example), same(example) & same(view)
    own_views, anchor = own & jnp.logical_not(itself), (real & (labels >= 0))[:, None]
    group = own | (anchor & exist & same(subclasses))
    outside = exist & jnp.logical_not(group)
    logits = jnp.matmul(unit, gather_rows(unit, axis_name).T, precision=jax.lax.Precision.HIGHEST)
    # A masked anchor counts its own views, so that its logarithms are finite.
    first = _positive_terms(
        logits / temperature, group & jnp.logical_not(itself), (exist & jnp.logical_not(itself)) | own_views
    )
    warmth = jnp.where(labels >= 0, class_temperatures.astype(logits.dtype)[jnp.maximum(labels, 0)], 1.0)
    second = _positive_terms(
        logits / warmth[:, None], (anchor & outside & same(labels)) | own_views, outside | own_views
    )
    return (first * temperature / base + beta * second).reshape(num_views, rows)


def _temperatures(embeddings, labels, counts, *, temperature, form, percentiles):
    keep, classes = labels >= 0, counts.shape[0]
    unit = unit_rows(embeddings, keep)
    member = zero_where_false(jax.nn.one_hot(labels, classes, dtype=unit.dtype), keep)
    number = jnp.sum(member, axis=0)
    centre = safe_divide(jnp.matmul(member.T, unit, precision=jax.lax.Precision.HIGHEST), number[:, None])
    square = jnp.sum(jnp.square(unit - centre[jnp.maximum(labels, 0)]), axis=1)
    width = safe_divide(member.T @ jnp.sqrt(square), number) / jnp.log(number + 10)
    some = number > 0
    low, high = jnp.nanpercentile(jnp.where(some, width, jnp.nan), jnp.asarray(percentiles, width.dtype))
    ratio = jnp.clip(width, low, high)
    mean = masked_mean(ratio, some)
    ratio = safe_divide(ratio, mean)
    warm = ratio if form == "ratio" else jnp.exp(ratio)
    return temperature * jnp.where(some & (counts > 1) & (mean > 0), warm, jnp.ones_like(warm))


def _assign(key, embeddings, labels, counts, *, most, size, balanced, steps):
    classes, rows = counts.shape[0], labels.shape[0]
    # Rows in order of their class, the unlabelled last, so that each class is a slice.
    order = jnp.argsort(jnp.where(labels >= 0, labels, classes), stable=True)
    number = jnp.sum(labels[:, None] == jnp.arange(classes)[None, :], axis=0)
    start, offset = jnp.cumsum(number) - number, jnp.cumsum(counts) - counts

    def one(c):
        slot = jnp.arange(size)
        members = order[jnp.minimum(start[c] + slot, rows - 1)]
        inside = slot < number[c]
        k = jnp.clip(counts[c], 1, most)
        found, _ = _cluster(
            jax.random.fold_in(key, c), embeddings[members], inside, k, most=most, balanced=balanced, steps=steps
        )
        return jnp.where(inside, members, rows), jnp.where(inside, offset[c] + found, -1)

    members, found = jax.lax.map(one, jnp.arange(classes))
    result = jnp.full(rows + 1, -1, jnp.int32).at[members.ravel()].set(found.ravel().astype(jnp.int32))
    return result[:rows]


def _cluster(key, x, keep, k, *, most, balanced, steps):
    """Returns labels [N] and centres [most, D] of k <= most clusters by the cosine, k known at run time only."""
    unit = safe_normalize(zero_where_false(x, keep).astype(compute_dtype(x)))
    live = jnp.arange(most) < k
    centres = _seeds(key, unit, keep, most)

    def assign(centres):
        scores = jnp.matmul(unit, safe_normalize(centres).T, precision=jax.lax.Precision.HIGHEST)
        scores = jnp.where(keep[:, None] & live[None, :], scores, -2.0)  # cosines are at least -1
        if balanced:
            return _fill(scores, keep, k)
        return jnp.argmax(scores, axis=1).astype(jnp.int32)

    def update(labels, centres):
        member = zero_where_false(jax.nn.one_hot(labels, most, dtype=unit.dtype), keep)
        number = jnp.sum(member, axis=0)[:, None]
        mean = safe_divide(jnp.matmul(member.T, unit, precision=jax.lax.Precision.HIGHEST), number)
        return jnp.where(number > 0, mean, centres)  # a centre without rows stays where it was

    def body(state):
        step, labels, centres, _ = state
        centres = update(labels, centres)
        new = assign(centres)
        return step + 1, new, centres, jnp.any(keep & (new != labels))

    labels = assign(centres)
    start = (jnp.zeros_like(labels[0]), labels, centres, jnp.any(keep))
    _, labels, centres, _ = jax.lax.while_loop(lambda s: (s[0] < steps) & s[3], body, start)
    return jnp.where(keep, labels, -1), centres


def _seeds(key, unit, keep, count):
    """Returns k-means++ seeds [count, D]: each next row is drawn in proportion to 1 - cosine to its nearest seed."""
    uniform = keep.astype(unit.dtype)

    def draw(weights, u):
        weights = jnp.where(jnp.sum(weights) > 0, weights, uniform)
        total = jnp.cumsum(weights)
        return unit[jnp.minimum(jnp.sum(total <= u * total[-1]), unit.shape[0] - 1)]

    def step(nearest, u):
        seed = draw(nearest, u)
        away = jnp.where(keep, jnp.maximum(1 - jnp.sum(unit * seed[None, :], axis=1), 0.0), 0.0)
        return jnp.minimum(nearest, away), seed

    # No distance exceeds 2, so that the first row is drawn uniformly.
    _, seeds = jax.lax.scan(step, 2 * uniform, jax.random.uniform(key, (count,), unit.dtype))
    return seeds


def _fill(scores, keep, k):
    """Returns the centre of each row when pairs are taken from the best down and centres have equal room."""
    rows, most = scores.shape
    order = jnp.argsort(-scores.ravel(), stable=True)
    room = jnp.sum(keep, dtype=jnp.int32) // k

    def visit(state, pair):
        labels, size = state
        index, extra = pair
        row, centre = index // most, index % most
        takes = keep[row] & (centre < k) & (labels[row] < 0) & (size[centre] < room + extra)
        labels = labels.at[row].set(jnp.where(takes, centre, labels[row]))
        return (labels, size.at[centre].add(takes.astype(size.dtype))), None

    start = jnp.full_like(order[:rows], -1), jnp.zeros_like(order[:most])
    pairs = jnp.concatenate([order, order]), jnp.repeat(jnp.arange(2, dtype=order.dtype), rows * most)
    (labels, _), _ = jax.lax.scan(visit, start, pairs)
    return jnp.maximum(labels, 0).astype(jnp.int32)

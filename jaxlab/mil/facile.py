"""Enhancing Instance-Level Image Classification with Set-Level Labels (FACILE, 2023, arXiv 2311.05659).

Pre-train an encoder of instances from coarse labels of SETS of instances, freeze it, and solve fine-grained few-shot
classification of instances with a simple classifier on its features.

    set feature   phi(s) = rho(pool_i psi(e(x_i))),    pool: mean, max or attention; rho, psi small networks or none
    FSP           min over e, rho, psi, g of CE(g(phi(s)), coarse label)
    SupCon        min of the supervised contrastive loss of normalised phi(s), positives: same coarse label
    few shots     classifier on e(x) / |e(x)|: nearest class mean, logistic regression or ridge regression

Sets are drawn from a labelled set of instances: the coarse label is the commonest superclass in the set, ties at
random, or how many superclasses it has. `rate_slope` measures the exponent of an excess risk.

Reconstructed: sizes of the networks, the solver of the logistic regression, and the sampling of sets and episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.mil.mhim import layout_of
from jaxlab.mil.models import at_least_one, bag_model, xavier_dense
from jaxlab.mil.pooling import group
from jaxlab.ops.collectives import axis_index, gather_rows, global_mean
from jaxlab.ops.layers import mlp
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, safe_divide, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer, accepted


def facile_loss(
    params: Mapping[str, Any],
    batch: Mapping[str, Array],
    *,
    encoder: Layer,
    model: Layer,
    objective: str = "fsp",
    temperature: float = 0.07,
    key: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the loss of sets with coarse labels: cross-entropy ("fsp") or the supervised contrastive loss ("supcon").

    Args:
        params: `encoder` and `model`.
        batch: `x` [S, A, ...] with `where` [S, A], or `x` [T, ...] with `segment_ids`; `y` int [S], -1 = unlabelled.
            For "supcon" a second view of every set may come as `x_other`, of the same layout.
        encoder: network over single instances, what is kept afterwards.
        model: bag model with `logits` and `embedding`, such as `deepsets(C)`.
        objective: "fsp" or "supcon".
        temperature: of "supcon".
        key: for dropout; None = none.
        axis_name: mapped axis over which the sets are spread.

    Returns:
        Scalar in the accumulation dtype.

    Raises:
        ValueError: `objective` is unknown or shapes do not fit.

    Example:
        >>> encoder, model = mlp([8]), deepsets(3)
        >>> batch = {"x": jnp.ones((5, 2, 4)), "y": jnp.array([0, 1, 2, 0, 1])}
        >>> def loss(key):
        ...     params = {"encoder": encoder.init(key, 4), "model": model.init(key, 8)}
        ...     return facile_loss(params, batch, encoder=encoder, model=model)
        >>> jax.eval_shape(loss, jax.random.key(0)).shape
        ()

    Source:
        FACILE, arXiv 2311.05659, section 3 (FSP and SupCon; temperature of Khosla et al.).
    """
    if objective not in ("fsp", "supcon"):
        raise ValueError(f"objective={objective!r} must be 'fsp' or 'supcon'")
    layout = layout_of(batch)
    views = [batch["x"], *([batch["x_other"]] if objective == "supcon" and "x_other" in batch else [])]
    keys = (None,) * len(views) if key is None else jax.random.split(key, len(views))
    outputs = []
    for x, own in zip(views, keys, strict=True):
        flat = x.reshape(*x.shape[: 2 if layout["segment_ids"] is None else 1], -1)
        x = zero_where_false(x, group(flat, **layout).keep)
        h = encoder.apply(params["encoder"], x, **accepted(encoder.apply, key=own, train=own is not None))
        outputs.append(model.apply(params["model"], h, **layout))
    labels = jnp.asarray(batch["y"])
    if objective == "supcon":
        embeddings = jnp.concatenate([out["embedding"] for out in outputs])
        both = jnp.concatenate([labels] * len(views))
        return set_supcon_loss(embeddings, both, temperature=temperature, axis_name=axis_name)
    logits = outputs[0]["logits"]
    z = logits.astype(compute_dtype(logits))
    terms = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(labels, 0))
    return global_mean(terms, labels >= 0, axis_name=axis_name)


def deepsets(num_classes: int, *, inner: Sequence[int] = (), outer: Sequence[int] = (), pool: str = "mean") -> Layer:
    """Returns a classifier of sets: `rho(pool_i psi(h_i))` and a linear head.

    Args:
        num_classes: C.
        inner: layer sizes of psi, with ReLU between; none = psi is the identity.
        outer: layer sizes of rho, with ReLU between; none = rho is the identity.
        pool: "mean", "max" or "attention" (one linear score).

    Returns:
        A `Layer` over instances [S, A, D] or [T, D]; its dict has `logits` [S, C] and `embedding` [S, E], rho's
        result. An empty set is pooled to 0.

    Raises:
        ValueError: `num_classes` is below 1 or `pool` is unknown; in `apply`, shapes do not fit.

    Example:
        >>> model = deepsets(3, inner=[8], outer=[6])
        >>> out = jax.eval_shape(lambda key: model.apply(model.init(key, 4), jnp.ones((5, 2, 4))), jax.random.key(0))
        >>> out["embedding"].shape
        (5, 6)

    Source:
        Zaheer et al., Deep Sets, arXiv 1703.06114, theorem 2, as FACILE's set-input map.
    """
    at_least_one(num_classes=num_classes)
    if pool not in ("mean", "max", "attention"):
        raise ValueError(f"pool={pool!r} must be 'mean', 'max' or 'attention'")
    psi, rho, head, to_score = mlp(inner), mlp(outer), xavier_dense(num_classes), xavier_dense(1)

    def init(key, size):
        keys = jax.random.split(key, 4)
        params, width = {}, inner[-1] if inner else size
        if inner:
            params["inner"] = psi.init(keys[0], size)
        if pool == "attention":
            params["score"] = to_score.init(keys[3], width)
        if outer:
            params["outer"] = rho.init(keys[1], width)
        return {**params, "head": head.init(keys[2], outer[-1] if outer else width)}

    def run(params, x, bags):
        h = psi.apply(params["inner"], x) if inner else x
        if pool == "mean":
            pooled = bags.mean(h).astype(x.dtype)
        elif pool == "max":
            pooled = bags.max(h)
        else:
            pooled = bags.attend(h, to_score.apply(params["score"], h)[..., 0])
        embedding = rho.apply(params["outer"], pooled) if outer else pooled
        return {"logits": head.apply(params["head"], embedding), "embedding": embedding}

    return bag_model(init, run)


def set_supcon_loss(
    embeddings: Array,
    labels: Array,
    *,
    temperature: float = 0.07,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the supervised contrastive loss of embeddings whose positives share a label.

    `-mean over a != i of the same label of [s_ia - log sum_{b != i} exp s_ib]`, s the cosine over the temperature.

    Args:
        embeddings: float [N, D].
        labels: int [N]; -1 is no anchor and no positive, but a negative of all.
        temperature: > 0.
        where: bool [N], real rows.
        axis_name: mapped axis over which the rows are spread: they meet the rows of all shards.
        reduction: "mean" (over all shards) or "none", [N].

    Returns:
        Scalar in the accumulation dtype, or [N] in the dtype of `embeddings`; an anchor without a positive is no term.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> z = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> loss = jax.jit(set_supcon_loss)
        >>> float(loss(z, jnp.array([0, 0, 1, 1]))) < float(loss(z, jnp.array([0, 1, 0, 1])))
        True

    Source:
        Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362, eq. 2.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"embeddings and labels must be [N, D] and [N], got {embeddings.shape} and {labels.shape}")
    if where is not None and where.shape != labels.shape:
        raise ValueError(f"where has shape {where.shape}, expected {labels.shape}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    keep = jnp.ones(labels.shape, bool) if where is None else where

    def run(embeddings, labels, keep, *, axis_name):
        unit = safe_normalize(zero_where_false(embeddings, keep).astype(compute_dtype(embeddings)))
        others, classes, there = (gather_rows(a, axis_name) for a in (unit, labels, keep))
        similar = jnp.matmul(unit, others.T, precision=jax.lax.Precision.HIGHEST) / temperature
        own = axis_index(axis_name) * labels.shape[0] + jnp.arange(labels.shape[0])
        itself = jnp.arange(classes.shape[0])[None, :] == own[:, None]
        counted = there[None, :] & jnp.logical_not(itself)
        positive = counted & (classes[None, :] == labels[:, None]) & (labels >= 0)[:, None] & keep[:, None]
        some = jnp.any(positive, axis=1)
        # An anchor that is no term sees itself, so that its logarithm is finite.
        log_sum = masked_logsumexp(similar, counted | (itself & jnp.logical_not(some)[:, None]))
        total = jnp.sum(jnp.where(positive, similar - log_sum[:, None], 0.0), axis=1)
        return -safe_divide(total, jnp.sum(positive, axis=1).astype(similar.dtype)), some

    terms, some = rows_mixed(run)(embeddings, jnp.asarray(labels), keep, axis_name=axis_name)
    return reduce_terms(terms, some, reduction=reduction, axis_name=axis_name, dtype=embeddings.dtype)


def make_sets(
    key: Array,
    labels: Array,
    coarse_of_class: Sequence[int],
    *,
    num_sets: int,
    set_size: int,
    rule: str = "majority",
) -> tuple[Array, Array]:
    """Returns random sets of instances, and the coarse label of each.

    Args:
        key: decides members and ties.
        labels: int [N], fine classes of the instances.
        coarse_of_class: superclass of every class, from 0.
        num_sets: number of sets S.
        set_size: A, drawn with replacement.
        rule: "majority", the commonest superclass, ties at random; or "distinct", how many there are, less one.

    Returns:
        int32 [S, A], rows of the instances, and int32 [S].

    Raises:
        ValueError: a size is below 1 or `rule` is unknown.

    Example:
        >>> draw = lambda key: make_sets(key, jnp.array([0, 1, 2]), [0, 0, 1], num_sets=4, set_size=3)
        >>> index, coarse = jax.eval_shape(draw, jax.random.key(0))
        >>> index.shape, coarse.shape
        ((4, 3), (4,))

    Source:
        FACILE, arXiv 2311.05659, section 5 (sets of natural images).
    """
    at_least_one(num_sets=num_sets, set_size=set_size)
    if rule not in ("majority", "distinct"):
        raise ValueError(f"rule={rule!r} must be 'majority' or 'distinct'")
    key_rows, key_ties = jax.random.split(key)
    index = jax.random.randint(key_rows, (num_sets, set_size), 0, labels.shape[0])
    number = max(coarse_of_class) + 1
    superclass = jnp.asarray(coarse_of_class, jnp.int32)[jnp.asarray(labels)[index]]
    counts = jnp.sum(jax.nn.one_hot(superclass, number), axis=1)
    if rule == "distinct":
        return index, jnp.sum(counts > 0, axis=1).astype(jnp.int32) - 1
    ties = jax.random.uniform(key_ties, counts.shape)  # below 1, the gap between two counts
    return index, jnp.argmax(counts + ties, axis=1).astype(jnp.int32)


def few_shot_episode(
    key: Array, labels: Array, *, num_classes: int, ways: int, shots: int, queries: int
) -> tuple[Array, Array]:
    """Returns the rows of a few-shot task: some classes, a few examples of each to learn from and others to test on.

    Args:
        key: decides classes and examples.
        labels: int [N], 0 to `num_classes - 1`, or -1. At least `ways` classes need `shots + queries` examples each;
            those that have fewer are not drawn unless there is no other.
        num_classes: C.
        ways: classes of the task.
        shots: examples of each class to learn from.
        queries: examples of each class to test on.

    Returns:
        int32 [ways, shots] and int32 [ways, queries], rows, without overlap; row w belongs to class w of the task.

    Raises:
        ValueError: a size is out of range.

    Example:
        >>> labels = jnp.repeat(jnp.arange(3), 4)
        >>> draw = lambda key: few_shot_episode(key, labels, num_classes=3, ways=2, shots=1, queries=3)
        >>> jax.eval_shape(draw, jax.random.key(0))[1].shape
        (2, 3)
    """
    at_least_one(ways=ways, shots=shots, queries=queries)
    if ways > num_classes or shots + queries > labels.shape[0]:
        raise ValueError(
            f"ways={ways} must be at most num_classes={num_classes}, and shots + queries={shots + queries} at most "
            f"{labels.shape[0]}"
        )
    key_classes, key_rows = jax.random.split(key)
    member = jnp.asarray(labels)[None, :] == jnp.arange(num_classes)[:, None]
    enough = jnp.sum(member, axis=1) >= shots + queries
    order = jax.random.uniform(key_classes, (num_classes,)) + enough
    _, chosen = jax.lax.top_k(order, ways)
    noise = jnp.where(member[chosen], jax.random.uniform(key_rows, (ways, labels.shape[0])), -1.0)
    _, rows = jax.lax.top_k(noise, shots + queries)
    return rows[:, :shots], rows[:, shots:]


def few_shot_logits(
    support: Array, labels: Array, query: Array, *, num_classes: int, classifier: str = "mean", strength: float = 1.0
) -> Array:
    """Returns logits of queries from a classifier fitted to a few labelled features, all scaled to unit length.

    "mean": `-|q - mean of class c|^2`. "ridge": `q W + b` with `|X W + b - onehot|^2 + strength |W|^2` least.
    "logistic": `q W + b` with `sum CE + strength |W|^2 / 2` least (500 accelerated gradient steps; scikit-learn's C is
    1 / strength).

    Args:
        support: float [N, D], features to learn from.
        labels: int [N], 0 to C - 1.
        query: float [Q, D].
        num_classes: C.
        classifier: "mean", "ridge" or "logistic".
        strength: > 0, of the penalty.

    Returns:
        [Q, C] in the dtype of `query`.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> x, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
        >>> jax.jit(lambda x: few_shot_logits(x, y, x, num_classes=2).argmax(1))(x).tolist()
        [0, 1]
    """
    if support.ndim != 2 or query.ndim != 2 or support.shape[1] != query.shape[1] or labels.shape != support.shape[:1]:
        raise ValueError(
            f"support, labels and query must be [N, D], [N] and [Q, D], got {support.shape}, {labels.shape} and "
            f"{query.shape}"
        )
    if classifier not in _CLASSIFIERS:
        raise ValueError(f"classifier={classifier!r} must be one of {sorted(_CLASSIFIERS)}")
    if not strength > 0:
        raise ValueError(f"strength={strength} must be positive")
    dtype = compute_dtype(support, query)

    def run(support, labels, query):
        x, q = (safe_normalize(a.astype(dtype)) for a in (support, query))
        targets = jax.nn.one_hot(labels, num_classes, dtype=dtype)
        return _CLASSIFIERS[classifier](x, targets, q, strength)

    return rows_mixed(run)(support, jnp.asarray(labels), query).astype(query.dtype)


def evaluate_few_shot(
    key: Array,
    features: Array,
    labels: Array,
    *,
    num_classes: int,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 600,
    classifier: str = "mean",
) -> tuple[Array, Array]:
    """Returns the mean accuracy over few-shot tasks, and half the width of its 95% interval.

    Args:
        key: decides the tasks.
        features: float [N, D], of frozen instances.
        labels: int [N].
        num_classes: C.
        ways: see `few_shot_episode`, as are `shots` and `queries`.
        shots: examples of each class to learn from.
        queries: examples of each class to test on.
        episodes: number of tasks.
        classifier: see `few_shot_logits`.

    Returns:
        Two scalars in the accumulation dtype.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> sizes = {"num_classes": 3, "ways": 2, "shots": 1, "queries": 2, "episodes": 10}
        >>> labels = jnp.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
        >>> accuracy = jax.jit(lambda key, x: evaluate_few_shot(key, x, labels, **sizes))
        >>> [float(v) for v in accuracy(jax.random.key(0), jax.nn.one_hot(labels, 3))]
        [1.0, 0.0]

    Source:
        The protocol of few-shot papers (600 tasks); FACILE, arXiv 2311.05659, section 5.
    """
    at_least_one(episodes=episodes)

    def one(key, features, labels):
        support, query = few_shot_episode(key, labels, num_classes=num_classes, ways=ways, shots=shots, queries=queries)
        task = jnp.repeat(jnp.arange(ways), shots)
        logits = few_shot_logits(
            features[support.reshape(-1)], task, features[query.reshape(-1)], num_classes=ways, classifier=classifier
        )
        right = jnp.argmax(logits, axis=1) == jnp.repeat(jnp.arange(ways), queries)
        return jnp.mean(right.astype(compute_dtype(features)))

    def run(features, labels, keys):
        return jax.vmap(lambda k: one(k, features, labels))(keys)

    accuracy = rows_mixed(run)(jnp.asarray(features), jnp.asarray(labels), jax.random.split(key, episodes))
    return jnp.mean(accuracy), 1.96 * jnp.std(accuracy) / episodes**0.5


def rate_slope(sizes: Array, excess: Array) -> Array:
    """Returns the exponent of a power law: the slope of `log excess` against `log size` by least squares.

    Args:
        sizes: float [M], > 0, sample sizes, M >= 2.
        excess: float [M], > 0, excess risks.

    Returns:
        Scalar in the accumulation dtype; -1 is the fast rate.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> float(jax.jit(rate_slope)(jnp.array([1.0, 10.0, 100.0]), jnp.array([1.0, 0.1, 0.01])).round(3))
        -1.0

    Source:
        FACILE, arXiv 2311.05659, section 4 (rates), as a diagnostic.
    """
    if sizes.ndim != 1 or sizes.shape != excess.shape or sizes.shape[0] < 2:
        raise ValueError(f"sizes and excess must both be [M >= 2], got {sizes.shape} and {excess.shape}")
    dtype = compute_dtype(sizes, excess)
    tiny = jnp.finfo(dtype).tiny
    x, y = (jnp.log(jnp.maximum(a.astype(dtype), tiny)) for a in (sizes, excess))
    x, y = x - jnp.mean(x), y - jnp.mean(y)
    return safe_divide(jnp.sum(x * y), jnp.sum(x * x))


def _by_mean(x: Array, targets: Array, q: Array, strength: float) -> Array:
    del strength
    count = jnp.sum(targets, axis=0)[:, None]
    centre = safe_divide(targets.T @ x, jnp.broadcast_to(count, (targets.shape[1], x.shape[1])))
    return -jnp.sum(jnp.square(q[:, None] - centre[None]), axis=-1)


def _by_ridge(x: Array, targets: Array, q: Array, strength: float) -> Array:
    centre, level = jnp.mean(x, axis=0, keepdims=True), jnp.mean(targets, axis=0, keepdims=True)
    off = x - centre
    # The dual form, because there are fewer examples than features.
    kernel = off @ off.T + strength * jnp.eye(x.shape[0], dtype=x.dtype)
    return (q - centre) @ (off.T @ jnp.linalg.solve(kernel, targets - level)) + level


def _by_logistic(x: Array, targets: Array, q: Array, strength: float) -> Array:
    ones = lambda a: jnp.concatenate([a, jnp.ones((a.shape[0], 1), a.dtype)], axis=1)
    x, q = ones(x), ones(q)
    penalty = jnp.full((x.shape[1], 1), strength, x.dtype).at[-1].set(0.0)
    # Rows have squared length 2, the Hessian of a softmax at most 1/2.
    rate = 1 / (jnp.asarray(x.shape[0], x.dtype) + strength)

    def step(state, i):
        weights, ahead = state
        slope = x.T @ (jax.nn.softmax(x @ ahead) - targets) + penalty * ahead
        new = ahead - rate * slope
        return (new, new + i / (i + 3) * (new - weights)), None

    zero = x.T @ jnp.zeros_like(targets)
    (weights, _), _ = jax.lax.scan(step, (zero, zero), jnp.arange(500).astype(x.dtype))
    return q @ weights


_CLASSIFIERS: dict[str, Callable[..., Array]] = {"mean": _by_mean, "ridge": _by_ridge, "logistic": _by_logistic}

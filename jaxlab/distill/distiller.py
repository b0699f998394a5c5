"""Distiller: A Systematic Study of Model Distillation Methods in Natural Language Processing (2021, arXiv 2109.11105).

A pipeline of distillation is a choice of augmentation, of layers, and of losses for predictions and for hidden states.
The losses for hidden states are bounds of the mutual information between student and teacher; MI-alpha lies between
InfoNCE (small variance, at most log K) and NWJ (no such limit, large variance):

    F_ij = critic(s_i, t_j),  m_dj = mean_{i != d} e^F_ij,  D_dj = alpha m_dj + (1 - alpha) e^a_j
    I_alpha = 1 + mean_{j, d != j} (F_jj - log D_dj) - mean_{j, i != j} e^(F_ij - log D_jj)

Each d leaves one candidate out, so that partner and strangers meet equally many: at alpha = 1 it is InfoNCE with K - 1
candidates, at alpha = 0 the bound of NWJ with the baseline a (a = 1: as `information.nwj_bound`).

    loss = w_h CE(y, s) + w_p prediction(s, t) + w_i sum_{l, m} W_lm intermediate(s_l, t_m)

W maps the student's layers to the teacher's. The paper also finds a good pipeline for a new data set from the results
of earlier ones. Reconstructed: that recommender (ridge regression on features of data set and pipeline and their
products), masks, alpha = 0.5 by default (the paper searches it), the weights of the sum. Token edits as augmentation
are replaced by mixup.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.distill.knowledge import distillation_loss, feature_loss
from jaxlab.ops.collectives import axis_index, gather_rows
from jaxlab.ops.layers import dense
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, safe_divide, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.transport import sinkhorn
from jaxlab.types import Layer, PyTree

_LARGEST_EXPONENT = 80.0  # e^80 is finite in float32


def mi_alpha_loss(
    features: Array,
    teacher_features: Array,
    critic: PyTree,
    *,
    alpha: float = 0.5,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns minus the MI-alpha bound of the information that a student's features hold about the teacher's.

    `-I_alpha` of `F_ij = <P s_i, Q t_j> / sqrt(size)`, see the module's docstring, with a = 1.

    Args:
        features: float [N, D], the student's.
        teacher_features: float [N, E]; no gradient reaches them.
        critic: parameters of a `bilinear_critic`, trained with the student.
        alpha: in [0, 1]; 1 is InfoNCE.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread; all shards' students are candidates.
        reduction: "mean" (over all shards) or "none", `[N]`, of each teacher.

    Returns:
        Scalar in nats in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `features`; 0
        with fewer than two examples.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> critic = {"student": {"w": jnp.eye(3)}, "teacher": {"w": 40 * jnp.eye(3)}}
        >>> loss = jax.jit(mi_alpha_loss)
        >>> float(loss(jnp.eye(3), jnp.eye(3), critic)) < float(loss(jnp.eye(3), jnp.eye(3)[::-1], critic))
        True

    Source:
        He et al., arXiv 2109.11105, section 3; Poole et al., arXiv 1905.06922, eq. 16 (the bound).
    """
    if features.ndim != 2 or teacher_features.ndim != 2 or len(teacher_features) != len(features):
        raise ValueError(
            f"features and teacher_features must be [N, D] and [N, E], got {features.shape}, {teacher_features.shape}"
        )
    _check(alpha, where, features.shape[:1])
    keep = jnp.ones(len(features), bool) if where is None else where

    def run(features, teacher, keep):
        dtype = compute_dtype(features, teacher)
        s, t = (zero_where_false(x, keep).astype(dtype) for x in (features, jax.lax.stop_gradient(teacher)))
        everyone, real = gather_rows(s, axis_name), gather_rows(keep, axis_name)
        own = axis_index(axis_name) * len(t) + jnp.arange(len(t))
        scores = bilinear_critic(critic["student"]["w"].shape[1]).apply(critic, everyone, t)
        return _mi_alpha_terms(scores, own, real, keep, jnp.ones(len(t), dtype), alpha)

    terms, exist = rows_mixed(run)(features, teacher_features, keep)
    return reduce_terms(-terms, exist, reduction=reduction, axis_name=axis_name, dtype=features.dtype)


def mi_alpha_bound(
    scores: Array, *, alpha: float = 0.5, log_baseline: Array | None = None, where: Array | None = None
) -> Array:
    """Returns the MI-alpha lower bound of the mutual information, from a critic's scores of all pairs.

    See the module's docstring. Exponents are cut at 80 (reconstructed; only alpha = 0 can reach them).

    Args:
        scores: float [K, K], F_ij of candidate i and j; pairs (j, j) belong together.
        alpha: in [0, 1].
        log_baseline: float [K], a; None = 1.
        where: bool [K], real pairs.

    Returns:
        Scalar in nats in the accumulation dtype; 0 with fewer than two pairs.

    Raises:
        ValueError: shapes do not fit or `alpha` is out of range.

    Example:
        >>> bound = jax.jit(mi_alpha_bound, static_argnames="alpha")
        >>> round(float(bound(30 * jnp.eye(4), alpha=1.0)), 4)  # at most log(K - 1)
        1.0986

    Source:
        Poole et al., On Variational Bounds of Mutual Information, arXiv 1905.06922, eq. 16; He et al.,
        arXiv 2109.11105.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"scores must be [K, K], got {scores.shape}")
    count = len(scores)
    _check(alpha, where, (count,))
    if log_baseline is not None and log_baseline.shape != (count,):
        raise ValueError(f"log_baseline has shape {log_baseline.shape}, expected ({count},)")
    keep = jnp.ones(count, bool) if where is None else where
    baseline = jnp.ones(count, scores.dtype) if log_baseline is None else log_baseline

    def run(scores, keep, baseline):
        f = scores.astype(compute_dtype(scores))
        return _mi_alpha_terms(f, jnp.arange(count), keep, keep, baseline.astype(f.dtype), alpha)

    terms, exist = rows_mixed(run)(scores, keep, baseline)
    return reduce_terms(terms, exist)


def bilinear_critic(size: int) -> Layer:
    """Returns the critic `F_ij = <P s_i, Q t_j> / sqrt(size)`.

    Args:
        size: of the space in which student and teacher meet.

    Returns:
        A `Layer`: `init(key, D, E)`, `apply(params, s, t)` with s [N, D] and t [M, E] gives [N, M].

    Raises:
        ValueError: `size` is below 1.

    Example:
        >>> critic = {"student": {"w": jnp.ones((2, 4))}, "teacher": {"w": jnp.ones((1, 4))}}
        >>> jax.jit(bilinear_critic(4).apply)(critic, jnp.ones((3, 2)), jnp.ones((2, 1))).tolist()
        [[4.0, 4.0], [4.0, 4.0], [4.0, 4.0]]
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    project = dense(size, bias=False)

    def init(key, student, teacher):
        key_student, key_teacher = jax.random.split(key)
        return {"student": project.init(key_student, student), "teacher": project.init(key_teacher, teacher)}

    def apply(params, s, t):
        s, t = project.apply(params["student"], s), project.apply(params["teacher"], t)
        return jnp.matmul(s, t.T, precision=jax.lax.Precision.HIGHEST) / size**0.5

    return Layer(init, apply)


def gaussian_information_loss(
    features: Array,
    teacher_features: Array,
    projection: Array,
    log_variance: Array,
    *,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns minus the log likelihood of the teacher's features under a Gaussian about the projected student's.

    `mean_n 1/2 sum_e ((t_ne - (P s_n)_e)^2 e^(-v_e) + v_e)`, which bounds minus the information up to a constant.

    Args:
        features: float [N, D], the student's.
        teacher_features: float [N, E]; no gradient reaches them.
        projection: float [D, E], P.
        log_variance: float [E], v, learnt.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        Scalar in nats in the accumulation dtype, 0 without any example.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> loss = jax.jit(gaussian_information_loss)
        >>> float(loss(jnp.ones((1, 2)), jnp.array([[3.0]]), jnp.ones((2, 1)), jnp.zeros(1)))
        0.5

    Source:
        Barber, Agakov (2003); Ahn et al., Variational Information Distillation, arXiv 1904.05835, eq. 5, without the
        softplus of its variance; as one of the bounds in He et al., arXiv 2109.11105.
    """
    expected = (features.shape[-1], teacher_features.shape[-1])
    if features.ndim != 2 or teacher_features.ndim != 2 or len(features) != len(teacher_features):
        raise ValueError(
            f"features and teacher_features must be [N, D] and [N, E], got {features.shape}, {teacher_features.shape}"
        )
    if projection.shape != expected or log_variance.shape != expected[1:]:
        raise ValueError(
            f"projection and log_variance must be {expected} and {expected[1:]}, got {projection.shape}, "
            f"{log_variance.shape}"
        )
    dtype = compute_dtype(features, teacher_features)
    s = zero_where_false(features, where).astype(dtype)
    t = zero_where_false(jax.lax.stop_gradient(teacher_features), where).astype(dtype)
    v = log_variance.astype(dtype)[None, :]
    apart = t - jnp.matmul(s, projection.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    terms = 0.5 * jnp.sum(jnp.square(apart) * jnp.exp(-v) + v, axis=1)
    return reduce_terms(terms, where, axis_name=axis_name)


def distiller_loss(
    outputs: dict[str, PyTree],
    teacher: dict[str, PyTree],
    labels: Array | None,
    params: PyTree,
    layers: Array,
    *,
    intermediate: str = "mi_alpha",
    prediction: str = "kl",
    temperature: float = 1.0,
    alpha: float = 0.5,
    hard_weight: float = 1.0,
    prediction_weight: float = 1.0,
    intermediate_weight: float = 1.0,
    where: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss of a pipeline, and its parts.

    `w_h CE(y, s) + w_p prediction + w_i sum_lm W_lm intermediate(s_l, t_m)`.

    Args:
        outputs: the student's `logits [N, C]` and `features`, one float [N, D_l] a layer.
        teacher: the teacher's, one float [N, E_m] a layer; no gradient reaches them.
        labels: int [N], -1 = unlabelled; None = none.
        params: for each pair of layers that W joins, `params[f"{l}_{m}"]`: the parameters of a `bilinear_critic` for
            "mi_alpha", a projection [D_l, E_m] or None for the losses of `feature_loss`.
        layers: float [L, M], W, constants (see `layer_weights`); pairs of weight 0 are not computed.
        intermediate: "mi_alpha", or "mse", "unit", "cosine" of `feature_loss`.
        prediction: "kl" (softened by the temperature) or "mse" of the logits.
        temperature: of "kl".
        alpha: of "mi_alpha".
        hard_weight: w_h.
        prediction_weight: w_p.
        intermediate_weight: w_i.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        The loss, a scalar in the accumulation dtype, and its parts `hard`, `prediction`, `intermediate`.

    Raises:
        ValueError: an option is unknown or W does not fit the layers.

    Example:
        >>> z, h = jnp.array([[2.0, 0.0]]), (jnp.ones((1, 3)),)
        >>> run = jax.jit(lambda s: distiller_loss(s, s, None, {"0_0": None}, [[1.0]], intermediate="mse"))
        >>> float(run({"logits": z, "features": h})[0])
        0.0

    Source:
        He et al., arXiv 2109.11105, section 3.
    """
    if prediction not in ("kl", "mse"):
        raise ValueError(f"prediction={prediction!r} must be 'kl' or 'mse'")
    expected = (len(outputs["features"]), len(teacher["features"]))
    weights = [[float(w) for w in row] for row in layers]
    if (len(weights), len(weights[0])) != expected:
        raise ValueError(f"layers has shape {(len(weights), len(weights[0]))}, expected {expected}")
    options = {"where": where, "axis_name": axis_name}
    s, t = outputs["logits"], teacher["logits"]
    parts = {"hard": distillation_loss(s, t, labels, soft_weight=0.0, **options)}
    if prediction == "kl":
        parts["prediction"] = distillation_loss(s, t, soft_weight=1.0, temperature=temperature, **options)
    else:
        parts["prediction"] = feature_loss(s, t, **options)
    parts["intermediate"] = jnp.zeros_like(parts["hard"])
    for i, row in enumerate(weights):
        for j, weight in enumerate(row):
            if weight:
                a, b, own = outputs["features"][i], teacher["features"][j], params[f"{i}_{j}"]
                if intermediate == "mi_alpha":
                    term = mi_alpha_loss(a, b, own, alpha=alpha, **options)
                else:
                    term = feature_loss(a, b, projection=own, kind=intermediate, **options)
                parts["intermediate"] += weight * term
    shares = {"hard": hard_weight, "prediction": prediction_weight, "intermediate": intermediate_weight}
    return sum(shares[name] * parts[name] for name in parts), parts


def layer_weights(kind: str, num_layers: int, num_teacher_layers: int) -> list[list[float]]:
    """Returns which of the teacher's layers each of the student's learns from.

    With L and M layers: `skip`: layer l from (l + 1) M / L, rounded up; `last`: from the last L in order; `all`: from
    all alike.

    Args:
        kind: "skip", "last" or "all".
        num_layers: L.
        num_teacher_layers: M >= L.

    Returns:
        [L][M], rows of sum 1.

    Raises:
        ValueError: `kind` is unknown or a number is out of range.

    Example:
        >>> layer_weights("skip", 2, 4), layer_weights("last", 2, 4)
        ([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])

    Source:
        He et al., arXiv 2109.11105, section 3; skip and last are those of Sun et al., arXiv 1908.09355.
    """
    if kind not in ("skip", "last", "all"):
        raise ValueError(f"kind={kind!r} must be 'skip', 'last' or 'all'")
    if not 1 <= num_layers <= num_teacher_layers:
        raise ValueError(f"num_layers={num_layers} must be between 1 and num_teacher_layers={num_teacher_layers}")
    if kind == "all":
        return [[1 / num_teacher_layers] * num_teacher_layers for _ in range(num_layers)]
    if kind == "skip":
        chosen = [-(-(i + 1) * num_teacher_layers // num_layers) - 1 for i in range(num_layers)]
    else:
        chosen = list(range(num_teacher_layers - num_layers, num_teacher_layers))
    return [[float(j == c) for j in range(num_teacher_layers)] for c in chosen]


def emd_layer_weights(cost: Array, *, epsilon: float = 0.05) -> Array:
    """Returns how much each of the student's layers learns from each of the teacher's: an optimal transport.

    `L sinkhorn(cost)`, every layer of either side with the same mass.

    Args:
        cost: float [L, M], the losses between layers; no gradient reaches them.
        epsilon: > 0, smoothing in units of the cost.

    Returns:
        float [L, M] in the dtype of `cost`, rows of sum 1.

    Raises:
        ValueError: `cost` is not [L, M] or `epsilon` is not positive.

    Example:
        >>> jax.jit(emd_layer_weights)(1 - jnp.eye(2)).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Source:
        He et al., arXiv 2109.11105, section 3; Li et al., BERT-EMD, arXiv 2010.06133 (without its own layer weights).
    """
    if cost.ndim != 2:
        raise ValueError(f"cost must be [L, M], got {cost.shape}")
    return sinkhorn(jax.lax.stop_gradient(cost), epsilon=epsilon) * len(cost)


def mixup(
    key: Array, x: Array, targets: Array, *, concentration: float = 0.4, share: float | None = None
) -> tuple[Array, Array]:
    """Returns examples mixed with others of the batch, and their targets mixed alike.

    `u x + (1 - u) x_permuted` with one `u ~ Beta(c, c)` for every example.

    Args:
        key: draws partners and shares.
        x: float [N, ...].
        targets: float [N, C].
        concentration: c > 0.
        share: u in [0, 1] for all examples instead of draws.

    Returns:
        Mixed examples and targets, shapes and dtypes as given.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> mix = jax.jit(lambda key, x: mixup(key, x, x, share=0.75))
        >>> x, y = mix(jax.random.key(0), jnp.eye(2))
        >>> y.sum(axis=1).tolist()
        [1.0, 1.0]

    Source:
        Zhang et al., mixup, arXiv 1710.09412; one of the augmentations of He et al., arXiv 2109.11105.
    """
    if targets.ndim != 2 or len(targets) != len(x):
        raise ValueError(f"targets must be [{len(x)}, C], got {targets.shape}")
    if not concentration > 0:
        raise ValueError(f"concentration={concentration} must be positive")
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"share={share} must be between 0 and 1")
    dtype = compute_dtype(x, targets)
    key_share, key_partner = jax.random.split(key)
    if share is None:
        drawn = jax.random.beta(key_share, concentration, concentration, (len(x),), dtype)
    else:
        drawn = jnp.full(len(x), share, dtype)

    def run(u, order, a):
        u = u.reshape(-1, *[1] * (a.ndim - 1))
        return (u * a.astype(dtype) + (1 - u) * a[order].astype(dtype)).astype(a.dtype)

    order = jax.random.permutation(key_partner, len(x))
    return rows_mixed(run)(drawn, order, x), rows_mixed(run)(drawn, order, targets)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PipelineRecommender:
    """What `fit_recommender` learnt.

    Attributes:
        weights: float [1 + F + G + F G], of the regression.
    """

    weights: Array


def fit_recommender(datasets: Array, pipelines: Array, scores: Array, *, ridge: float = 1.0) -> PipelineRecommender:
    """Returns a ridge regression of scores on data set, pipeline and their products, which recommends pipelines.

    `score ~ <w, (1, z, c, z c^T)>`; the constant is not penalised.

    Args:
        datasets: float [R, F], features of each run's data set (log of its size, number of classes, ...).
        pipelines: float [R, G], of each run's pipeline, one-hot choices.
        scores: float [R].
        ridge: > 0, penalty.

    Returns:
        A `PipelineRecommender`.

    Raises:
        ValueError: shapes do not fit or `ridge` is not positive.

    Example:
        >>> z, c = jnp.array([[0.0], [0.0], [1.0], [1.0]]), jnp.array([[0.0], [1.0], [0.0], [1.0]])
        >>> model = jax.jit(fit_recommender)(z, c, jnp.array([1.0, 0.0, 0.0, 1.0]))
        >>> model.weights.shape
        (4,)

    Source:
        He et al., arXiv 2109.11105, section 5, AutoDistiller (reconstructed).
    """
    if datasets.ndim != 2 or pipelines.ndim != 2 or not len(datasets) == len(pipelines) == len(scores):
        raise ValueError(
            f"datasets, pipelines and scores must be [R, F], [R, G] and [R], got {datasets.shape}, {pipelines.shape} "
            f"and {scores.shape}"
        )
    if not ridge > 0:
        raise ValueError(f"ridge={ridge} must be positive")

    def run(datasets, pipelines, scores):
        dtype = compute_dtype(datasets, pipelines, scores)
        rows, y = _runs(datasets.astype(dtype), pipelines.astype(dtype)), scores.astype(dtype)
        penalty = jnp.diag(jnp.where(jnp.arange(rows.shape[1]) == 0, 1e-6, ridge).astype(dtype))
        product = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return jnp.linalg.solve(product(rows.T, rows) + penalty, product(rows.T, y)).astype(scores.dtype)

    return PipelineRecommender(rows_mixed(run)(datasets, pipelines, scores))


def recommend_pipeline(model: PipelineRecommender, dataset: Array, pipelines: Array) -> tuple[Array, Array]:
    """Returns the pipeline with the best predicted score for a data set, and all predictions.

    Args:
        model: of `fit_recommender`.
        dataset: float [F], features of the new data set.
        pipelines: float [M, G], the choices.

    Returns:
        int32 [], the row of the best, and float [M].

    Raises:
        ValueError: shapes do not fit the model.

    Example:
        >>> model = PipelineRecommender(jnp.array([0.0, 1.0, 2.0, 0.0]))
        >>> best, scores = jax.jit(recommend_pipeline)(model, jnp.ones(1), jnp.array([[0.0], [3.0]]))
        >>> int(best), scores.tolist()
        (1, [1.0, 7.0])

    Source:
        He et al., arXiv 2109.11105, section 5 (reconstructed).
    """
    size = (1 + dataset.shape[0]) * (1 + pipelines.shape[1])
    if model.weights.shape != (size,):
        raise ValueError(f"the model has {model.weights.shape[0]} weights, dataset and pipelines ask for {size}")
    rows = _runs(jnp.broadcast_to(dataset[None, :], (len(pipelines), len(dataset))), pipelines)
    scores = jnp.matmul(rows, model.weights.astype(rows.dtype), precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(scores).astype(jnp.int32), scores


def _runs(datasets: Array, pipelines: Array) -> Array:
    """Returns (1, z, c, z c^T) of every run."""
    products = (datasets[:, :, None] * pipelines[:, None, :]).reshape(len(datasets), -1)
    return jnp.concatenate([jnp.ones((len(datasets), 1), datasets.dtype), datasets, pipelines, products], axis=1)


def _mi_alpha_terms(scores, own, rows, columns, baseline, alpha):
    """Returns each column's term [K] and whether it is one.

    scores [M, K], own [K] the row of each column's partner, rows [M] and columns [K] which exist, baseline [K].
    """
    pair = rows[:, None] & columns[None, :]
    f = jnp.where(pair, scores, 0.0)
    partner = jnp.arange(len(rows))[:, None] == own[None, :]
    count = jnp.sum(rows, dtype=f.dtype)
    exist = columns & (count > 1)
    others = jnp.maximum(count - 1, 1)
    # log sum_{i != d} e^F_id: from the sum over all, minus e^F_dj, which is safe but for the largest entry; without
    # that one, the sum is taken anew.
    total = _finite(masked_logsumexp(f, pair, axis=0))
    largest = jnp.arange(len(rows))[:, None] == jnp.argmax(jnp.where(pair, f, -jnp.inf), axis=0)[None, :]
    rest = _finite(masked_logsumexp(f, pair & ~largest, axis=0))
    share = jnp.where(largest | ~pair, 0.0, jnp.exp(f - total[None, :]))
    # Two equal largest entries have a half each; rounding must not bring the logarithm to that of 0.
    without = jnp.where(largest, rest[None, :], total[None, :] + jnp.log1p(-jnp.minimum(share, 0.75)))
    log_mean = without - jnp.log(others)
    if alpha == 1:
        log_d = log_mean
    elif alpha == 0:
        log_d = jnp.broadcast_to(baseline[None, :], f.shape)
    else:
        log_d = jnp.logaddexp(jnp.log(alpha) + log_mean, jnp.log(1 - alpha) + baseline[None, :])
    at = lambda x: jnp.sum(jnp.where(partner, x, 0.0), axis=0)
    strangers = pair & ~partner
    joint = at(f) - safe_divide(jnp.sum(jnp.where(strangers, log_d, 0.0), axis=0), others)
    exponent = jnp.minimum(f - at(log_d)[None, :], _LARGEST_EXPONENT)
    marginal = jnp.sum(jnp.where(strangers, jnp.exp(jnp.where(strangers, exponent, 0.0)), 0.0), axis=0) / others
    return jnp.where(exist, 1 + joint - marginal, 0.0), exist


def _finite(lse: Array) -> Array:
    return jnp.where(jnp.isfinite(lse), lse, 0.0)


def _check(alpha: float, where: Array | None, shape: Sequence[int]) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be between 0 and 1")
    if where is not None and where.shape != tuple(shape):
        raise ValueError(f"where has shape {where.shape}, expected {tuple(shape)}")

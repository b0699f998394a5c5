"""Cauchy-Schwarz Divergence Information Bottleneck for Regression.

CS-IB, 2024, arXiv 2404.17951. The information bottleneck without variational bounds and without Gaussian assumptions:
prediction and compression are Cauchy-Schwarz divergences, which kernel density estimates give in closed form from Gram
matrices of one batch.

    G(a, b)    = exp(-||a - b||^2 / (2 sigma^2)),  K = G(x, x),  Q = G(t, t),  L = G of targets y and predictions yh
    D(p; q)    = log mean G(a, a') + log mean G(b, b') - 2 log mean G(a, b)
    D(y | x)   = log sum_ji K_ji L(y_j, y_i) / w_j + log sum_ji K_ji L(yh_j, yh_i) / w_j
                 - 2 log sum_ji K_ji L(yh_j, y_i) / w_j,    w_j = (sum_i K_ji)^2
    I(x; t)    = log sum_ij K_ij Q_ij + log(sum_ij K_ij sum_ij Q_ij) - 2 log sum_j (sum_i K_ij)(sum_i Q_ij)
    loss       = D(y | x) + beta I(x; t) / sqrt(I(x; x) I(t; t))

I(x; t) is the divergence between joint and product of the marginals, hence >= 0; the counts cancel in it. All sums are
taken in the log domain, so that predictions far off do not underflow to a loss without gradient.

The official code divides by w_j = sum_i K_ji^2 (`norm="code"`) where the paper has the square of the sum, and takes
logarithms to base 2, which only scales the loss; here they are natural. Reconstructed: what is 0 (a constant t, a
single row) and the threshold `eps` below which I(t; t) is taken for it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import all_mean, gather_rows
from jaxlab.ops.layers import dense, mlp
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, zero_where_false
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer


def cs_ib_loss(
    x: Array,
    y: Array,
    predictions: Array,
    codes: Array,
    *,
    beta: float | Array = 0.01,
    sigma_x: float | Array = 1.0,
    sigma_y: float | Array = 1.0,
    sigma_t: float | Array = 1.0,
    norm: str = "paper",
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the loss of a regression whose code says as little as possible about the input.

    `D(y | x) + beta I(x; t) / sqrt(I(x; x) I(t; t))`, see `conditional_cs_divergence` and `cs_mutual_information`.

    Args:
        x: float [N, D], inputs, standardised; no gradient is needed here.
        y: float [N] or [N, K], true values.
        predictions: like `y`.
        codes: float [N, T], the bottleneck t.
        beta: >= 0, weight of the compression (the paper tries 0 and 1e-4 to 1).
        sigma_x: kernel width of x. In many dimensions multiply it by their square root, or no two inputs are alike.
        sigma_y: kernel width of y and predictions.
        sigma_t: kernel width of the codes.
        norm: "paper" or "code", the weight w_j.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread: pairs of all shards.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input); 0 without any example.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 2.0])
        >>> loss = jax.jit(lambda predictions: cs_ib_loss(x, y, predictions, x, beta=0.0))
        >>> bool(loss(y) < loss(y[::-1]))
        True

    Source:
        Yu, Yu, Lokse, Jenssen, Principe, arXiv 2404.17951; code SJYuCNEL/Cauchy-Schwarz-Information-Bottleneck
        (sigma 1, beta 0.01).
    """
    if isinstance(beta, int | float) and not beta >= 0:
        raise ValueError(f"beta={beta} must not be negative")
    options = {"where": where, "axis_name": axis_name}
    fit = conditional_cs_divergence(x, y, predictions, sigma_x=sigma_x, sigma_y=sigma_y, norm=norm, **options)
    kept = cs_mutual_information(x, codes, sigma_x=sigma_x, sigma_y=sigma_t, normalized=True, **options)
    return fit + beta * kept


def conditional_cs_divergence(
    x: Array,
    y: Array,
    predictions: Array,
    *,
    sigma_x: float | Array = 1.0,
    sigma_y: float | Array = 1.0,
    norm: str = "paper",
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the Cauchy-Schwarz divergence between p(y | x) and what the predictions say, D(y | x) of the module.

    It is 0 for perfect predictions and not there alone: with unequal w_j the estimate can fall slightly below 0 (as in
    the official code). With inputs far apart compared with `sigma_x` it compares each prediction with its
    own target alone, like a regression loss that grows as the square of the error.

    Args:
        x: float [N, D], inputs.
        y: float [N] or [N, K], true values.
        predictions: like `y`.
        sigma_x: kernel width of x, > 0.
        sigma_y: kernel width of y and predictions, > 0.
        norm: "paper", w_j = (sum_i K_ji)^2, or "code", w_j = sum_i K_ji^2.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        Scalar in nats, in the accumulation dtype; 0 without any example.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> x = jnp.array([[0.0], [1.0]])
        >>> float(jax.jit(conditional_cs_divergence)(x, x[:, 0], x[:, 0]))
        0.0

    Source:
        Yu et al., arXiv 2404.17951; code loss_cs.py (CS_Div).
    """
    if norm not in ("paper", "code"):
        raise ValueError(f"norm={norm!r} must be 'paper' or 'code'")
    if y.shape != predictions.shape:
        raise ValueError(f"predictions has shape {predictions.shape}, expected {y.shape}, as y")
    x, y, predictions = (_matrix(a) for a in (x, y, predictions))
    keep = _checked({"x": x, "y": y}, where, {"sigma_x": sigma_x, "sigma_y": sigma_y})

    def run(x, y, predictions, keep):
        (x, xs), (y, ys), (h, hs), exist = _spread((x, y, predictions), keep, axis_name)
        log_k = _log_gram(x, xs, sigma_x)
        pairs = [log_k + _log_gram(a, b, sigma_y) for a, b in ((y, ys), (h, hs), (h, ys))]
        rows = _row_sums([*pairs, log_k if norm == "paper" else 2 * log_k], exist)
        log_w = 2 * rows[3:] if norm == "paper" else rows[3:]
        own, other, cross = _total(rows[:3] - log_w, keep, exist, axis_name)
        return all_mean(own + other - 2 * cross, axis_name)

    return rows_mixed(run)(x, y, predictions, keep)


def cs_mutual_information(
    x: Array,
    y: Array,
    *,
    sigma_x: float | Array = 1.0,
    sigma_y: float | Array = 1.0,
    normalized: bool = False,
    eps: float = 1e-6,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the Cauchy-Schwarz quadratic mutual information, the divergence of joint and product distribution.

    `I = log sum_ij K_ij Q_ij + log(sum K sum Q) - 2 log sum_j (sum_i K_ij)(sum_i Q_ij) >= 0`; normalised it is
    `I(x; y) / sqrt(I(x; x) I(y; y))`, 1 for y = x.

    Args:
        x: float [N, D].
        y: float [N, T].
        sigma_x: kernel width of x, > 0.
        sigma_y: kernel width of y, > 0.
        normalized: whether to divide.
        eps: normalised, the result is 0 where the denominator is not above it: nothing there but rounding.
        where: bool [N], real pairs.
        axis_name: mapped axis over which the pairs are spread.

    Returns:
        Scalar in nats (a ratio, normalised), in the accumulation dtype; 0 without any pair.

    Raises:
        ValueError: shapes do not fit or a width is not positive.

    Example:
        >>> x = jnp.array([[0.0], [1.0], [3.0]])
        >>> round(float(jax.jit(lambda x: cs_mutual_information(x, x, normalized=True))(x)), 4)
        1.0

    Source:
        Yu et al., arXiv 2404.17951; code loss_cs.py (CS_QMI, CS_QMI_normalized).
    """
    x, y = _matrix(x), _matrix(y)
    keep = _checked({"x": x, "y": y}, where, {"sigma_x": sigma_x, "sigma_y": sigma_y})

    def run(x, y, keep):
        (x, xs), (y, ys), exist = _spread((x, y), keep, axis_name)
        log_k, log_q = _log_gram(x, xs, sigma_x), _log_gram(y, ys, sigma_y)
        itself = [2 * log_k, 2 * log_q] if normalized else []
        k, q, *joint = _row_sums([log_k, log_q, log_k + log_q, *itself], exist)
        cross = [k + q, 2 * k, 2 * q][: len(joint)]
        k, q, *sums = _total(jnp.stack([k, q, *joint, *cross]), keep, exist, axis_name)
        joint, cross = sums[: len(joint)], sums[len(joint) :]
        own = [k + q, 2 * k, 2 * q]
        value, *norms = (j + s - 2 * c for j, s, c in zip(joint, own, cross, strict=False))
        if normalized:
            square = jnp.maximum(norms[0], 0) * jnp.maximum(norms[1], 0)
            some = square > eps**2
            value = jnp.where(some, value / jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)
        return all_mean(value, axis_name)

    return rows_mixed(run)(x, y, keep)


def cs_divergence(
    a: Array, b: Array, *, sigma: float | Array = 1.0, where: Array | None = None, kv_where: Array | None = None
) -> Array:
    """Returns the Cauchy-Schwarz divergence between the distributions that two samples come from.

    `log mean G(a, a') + log mean G(b, b') - 2 log mean G(a, b) >= 0`, 0 for equal samples, symmetric.

    Args:
        a: float [N, D].
        b: float [M, D].
        sigma: kernel width, > 0.
        where: bool [N], real rows of a.
        kv_where: bool [M], real rows of b.

    Returns:
        Scalar in nats, in the accumulation dtype; 0 where a sample is empty.

    Raises:
        ValueError: shapes do not fit or `sigma` is not positive.

    Example:
        >>> a = jnp.array([[0.0], [1.0]])
        >>> float(jax.jit(cs_divergence)(a, a))
        0.0

    Source:
        Jenssen et al., The Cauchy-Schwarz divergence and Parzen windowing (2006), as in Yu et al., arXiv 2404.17951.
    """
    a, b = _matrix(a), _matrix(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be [N, D] and [M, D], got {a.shape} and {b.shape}")
    first, second = _checked({"a": a}, where, {"sigma": sigma}), _checked({"b": b}, kv_where, {}, "kv_where")

    def run(a, b, first, second):
        a, b = (zero_where_false(v, k).astype(compute_dtype(a, b)) for v, k in ((a, first), (b, second)))

        def mean(v, w, rows, columns):
            keep = (rows[:, None] & columns[None, :]).reshape(-1)
            total = _finite(masked_logsumexp(_log_gram(v, w, sigma).reshape(-1), keep))
            return total - jnp.log(jnp.maximum(jnp.sum(keep, dtype=v.dtype), 1))

        value = mean(a, a, first, first) + mean(b, b, second, second) - 2 * mean(a, b, first, second)
        return jnp.where(jnp.any(first) & jnp.any(second), value, 0.0)

    return rows_mixed(run)(a, b, first, second)


def median_bandwidth(x: Array, *, squared: bool = True, where: Array | None = None) -> Array:
    """Returns the median distance between rows, from which kernel widths are taken (the paper estimates with 10 times).

    Args:
        x: float [N, D].
        squared: whether it is the median of SQUARED distances, which the official code takes for a width.
        where: bool [N], real rows.

    Returns:
        Scalar in the accumulation dtype, without gradient: the median over pairs i < j; their mean where the median is
        0, and at least 0.01. With fewer than two rows, 0.01.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> float(jax.jit(lambda x: median_bandwidth(x, squared=False))(jnp.array([[0.0], [1.0], [3.0]])))
        2.0

    Source:
        Code SJYuCNEL/Cauchy-Schwarz-Information-Bottleneck, loss_cs.py (which counts every row twice).
    """
    x = _matrix(x)
    keep = _checked({"x": x}, where, {})

    def run(x, keep):
        rows = x.shape[0]
        x = zero_where_false(x, keep).astype(compute_dtype(x))
        pairs = (keep[:, None] & keep[None, :] & (jnp.arange(rows)[:, None] < jnp.arange(rows)[None, :])).reshape(-1)
        away = _squares(x, x).reshape(-1)
        away = away if squared else jnp.sqrt(away)
        ordered, count = jnp.sort(jnp.where(pairs, away, jnp.inf)), jnp.sum(pairs)
        middle = [ordered[jnp.maximum(count + shift, 0) // 2] for shift in (-1, 0)]
        median = jnp.where(count > 0, (middle[0] + middle[1]) / 2, 0.0)
        mean = jnp.sum(jnp.where(pairs, away, 0.0)) / jnp.maximum(count, 1)
        return jnp.maximum(jnp.where(median > 0, median, mean), 0.01)

    return jax.lax.stop_gradient(rows_mixed(run)(jax.lax.stop_gradient(x), keep))


def cs_ib_network(*, hidden: int = 128, code: int = 128, outputs: int = 1, noise: bool = False) -> Layer:
    """Returns the paper's regression network: an encoder of two hidden layers, a code, a decoder of one.

    Args:
        hidden: width of the hidden layers.
        code: size of the code t.
        outputs: number of predicted values.
        noise: whether the code is drawn from a Gaussian in training; the paper's runs use its mean.

    Returns:
        A `Layer`: `init(key, size)`; `t, predictions = apply(params, x [N, size], key=None, train=False)`, `[N, code]`
        and `[N]` (`[N, outputs]` for more than one). With `noise` and `train=True` a key is needed.

    Raises:
        ValueError: in `apply`, a needed key is missing.

    Example:
        >>> net = cs_ib_network(hidden=4, code=2)
        >>> both = lambda key, x: net.apply(net.init(key, 3), x)
        >>> t, predictions = jax.eval_shape(both, jax.random.key(0), jnp.ones((5, 3)))
        >>> t.shape, predictions.shape
        ((5, 2), (5,))

    Source:
        Code SJYuCNEL/Cauchy-Schwarz-Information-Bottleneck, CS_IB_Housing.py.
    """
    encoder, mean, spread, decoder = mlp([hidden, hidden, code]), dense(code), dense(code), mlp([hidden, outputs])

    def init(key, size):
        keys = jax.random.split(key, 4)
        params = {"encoder": encoder.init(keys[0], size), "mean": mean.init(keys[1], code)}
        params["decoder"] = decoder.init(keys[2], code)
        return {**params, "log_var": spread.init(keys[3], code)} if noise else params

    def apply(params, x, *, key=None, train=False):
        inside = encoder.apply(params["encoder"], x)
        t = mean.apply(params["mean"], inside)
        if noise and train:
            if key is None:
                raise ValueError("a key is needed in training with noise=True, got None")
            deviation = jnp.exp(spread.apply(params["log_var"], inside) / 2)
            t = t + deviation * jax.random.normal(key, t.shape, t.dtype)
        predictions = decoder.apply(params["decoder"], t)
        return t, predictions[..., 0] if outputs == 1 else predictions

    return Layer(init, apply)


def fgsm(loss: Callable[[Array], Array], x: Array, *, eps: float | Array) -> Array:
    """Returns the inputs moved by `eps` in every coordinate to where the loss rises (fast gradient sign method).

    `x + eps sign(d loss / d x)`; a coordinate without gradient stays.

    Args:
        loss: a scalar of the inputs (mean squared error in the paper).
        x: float [N, ...].
        eps: >= 0, in units of the inputs.

    Returns:
        Shape and dtype of `x`, without gradient.

    Raises:
        ValueError: `eps` is negative.

    Example:
        >>> fgsm(lambda x: jnp.sum(x * x), jnp.array([1.0, -2.0, 0.0]), eps=0.5).tolist()
        [1.5, -2.5, 0.0]

    Source:
        Goodfellow et al., arXiv 1412.6572; code loss_cs.py (no clipping of inputs).
    """
    if isinstance(eps, int | float) and not eps >= 0:
        raise ValueError(f"eps={eps} must not be negative")
    x = jax.lax.stop_gradient(x)
    return jax.lax.stop_gradient(x + jnp.asarray(eps, x.dtype) * jnp.sign(jax.grad(loss)(x)))


def pgd(
    loss: Callable[[Array], Array], x: Array, *, eps: float = 0.3, step_size: float = 0.05, steps: int = 5
) -> Array:
    """Returns the inputs after several signed gradient steps to where the loss rises, each at most `eps` away.

    `x' <- x + clip(x' + step_size sign(d loss / d x') - x, -eps, eps)`.

    Args:
        loss: a scalar of the inputs.
        x: float [N, ...].
        eps: >= 0, in units of the inputs.
        step_size: >= 0.
        steps: >= 1.

    Returns:
        Shape and dtype of `x`, without gradient.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> moved = jax.jit(lambda x: pgd(lambda x: jnp.sum(x * x), x, eps=0.25, step_size=0.125))(jnp.ones(2))
        >>> moved.tolist()
        [1.25, 1.25]

    Source:
        Madry et al., arXiv 1706.06083; code loss_cs.py (5 steps of 0.05 within 0.3, no random start).
    """
    if not (eps >= 0 and step_size >= 0 and steps >= 1):
        raise ValueError(f"eps={eps} and step_size={step_size} must not be negative, steps={steps} be at least 1")
    x = jax.lax.stop_gradient(x)

    def step(moved, _):
        ahead = moved + jnp.asarray(step_size, x.dtype) * jnp.sign(jax.grad(loss)(moved))
        limit = jnp.asarray(eps, x.dtype)
        return x + jnp.clip(ahead - x, -limit, limit), None

    return jax.lax.stop_gradient(jax.lax.scan(step, x, None, length=steps)[0])


def _matrix(a: Array) -> Array:
    if a.ndim not in (1, 2):
        raise ValueError(f"samples must be [N] or [N, D], got {a.shape}")
    return a[:, None] if a.ndim == 1 else a


def _checked(arrays, where, widths, mask_name="where") -> Array:
    rows = next(iter(arrays.values())).shape[:1]
    for name, array in arrays.items():
        if array.shape[:1] != rows:
            raise ValueError(f"{name} has {array.shape[0]} rows, expected {rows[0]}")
    if where is not None and where.shape != rows:
        raise ValueError(f"{mask_name} has shape {where.shape}, expected {rows}")
    for name, width in widths.items():
        if isinstance(width, int | float) and not width > 0:
            raise ValueError(f"{name}={width} must be positive")
    return jnp.ones(rows, bool) if where is None else where


def _spread(arrays, keep, axis_name):
    """Returns for each array its own rows and those of all shards, and which of the latter exist."""
    dtype = compute_dtype(*arrays)
    own = [zero_where_false(a, keep).astype(dtype) for a in arrays]
    return *((a, gather_rows(a, axis_name)) for a in own), gather_rows(keep, axis_name)


def _squares(a, b):
    """Returns the squared distances of all pairs of rows; the product cancels least about the mean."""
    centre = jax.lax.stop_gradient(jnp.mean(b, axis=0, keepdims=True))
    a, b = a - centre, b - centre
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1)[None, :] - 2 * product, 0)


def _log_gram(a, b, sigma):
    return -_squares(a, b) / (2 * sigma**2)


def _row_sums(logs, exist):
    """Returns log sum_i exp(log_ji) for each of P arrays [n, N], [P, n]."""
    return masked_logsumexp(jnp.stack(logs), exist[None, None, :])


def _total(parts, keep, exist, axis_name):
    """Returns log sum_j exp(part_j) over the rows of all shards for each of P parts [P, n], 0 where there is none."""
    rows = jnp.where(keep[:, None], parts.T, 0.0)
    return _finite(masked_logsumexp(gather_rows(rows, axis_name), exist[:, None], axis=0))


def _finite(log):
    return jnp.where(jnp.isfinite(log), log, 0.0)

"""What this machine has, and whether the implementations of every kernel agree on it."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import kernels

PALLAS = ("grouped_matmul",)
PACKAGES = ("jaxlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def examine() -> dict[str, Any]:
    """Returns versions, devices, and for each kernel errors against `reference` and times.

    The error is the largest difference of values and gradients, relative to the largest entry; implementations agree
    below 1e-4 in float32 (1e-2 on devices that multiply float32 in fewer bits). A Pallas form runs where the default
    device is one that it is written for.
    """
    devices = jax.devices()
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in devices],
        "kernels": [_compare(name, run, 1e-4 if devices[0].platform == "cpu" else 1e-2) for name, run in _cases()],
    }


def render(report: dict[str, Any]) -> str:
    """Returns the report as text."""
    lines = [f"Python {report['python']}, {report['cores']} cores, devices: {', '.join(report['devices'])}"]
    lines.append(", ".join(f"{name} {v}" for name, v in report["versions"].items()))
    for row in report["kernels"]:
        verdict = "agrees" if row["agrees"] else "DIFFERS"
        pallas = {None: "no pallas form yet", False: "pallas form not for this device"}.get(row["pallas"])
        pallas = pallas or f"pallas {row['pallas_ms']:.2f} ms"
        lines.append(
            f"{row['kernel']:<16} {verdict} with reference (error {row['error']:.1e}); forward and backward "
            f"{row['xla_ms']:.2f} ms against {row['reference_ms']:.2f} ms; {pallas}"
        )
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cases():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1024, 4, 32)), jnp.float32) for _ in range(3))
    yield (
        "attention",
        lambda form: (
            lambda q, k, v: jnp.sum(jnp.sin(kernels.attention(q, k, v, causal=True, implementation=form))),
            (q, k, v),
        ),
    )
    scores = jnp.asarray(rng.normal(size=(2048, 32)), jnp.float32)
    yield (
        "top_k_routing",
        lambda form: (
            lambda s: jnp.sum(jnp.sin(kernels.top_k_routing(s, 2, renormalize=True, implementation=form).weights)),
            (scores,),
        ),
    )
    x = jnp.asarray(rng.normal(size=(512, 64)), jnp.float32)
    w = {n: jnp.asarray(rng.normal(size=(8, 64, 64)) / 8, jnp.float32) for n in ("gate", "up", "down")}
    logits = scores[:512, :8]
    plan = kernels.plan_from_top_k(kernels.top_k_routing(logits, 2, renormalize=True), logits)
    yield (
        "expert_ffn",
        lambda form: (
            lambda x, w: jnp.sum(jnp.sin(kernels.expert_ffn(x, w, plan, implementation=form))),
            (x, w),
        ),
    )
    sizes = jnp.asarray(np.bincount(rng.integers(0, 8, 500), minlength=8), jnp.int32)
    yield (
        "grouped_matmul",
        lambda form: (
            lambda x, w: jnp.sum(jnp.sin(kernels.grouped_matmul(x, w, sizes, implementation=form))),
            (x, w["up"]),
        ),
    )
    u, delta = (jnp.asarray(rng.normal(size=(2, 512, 32)), jnp.float32) for _ in range(2))
    into, out = (jnp.asarray(rng.normal(size=(2, 512, 8)), jnp.float32) for _ in range(2))
    decay = -jnp.exp(jnp.asarray(rng.normal(size=(32, 8)), jnp.float32))
    yield (
        "selective_scan",
        lambda form: (
            lambda u, d: jnp.sum(
                jnp.sin(kernels.selective_scan(u, jax.nn.softplus(d), decay, into, out, implementation=form))
            ),
            (u, delta),
        ),
    )
    values = jnp.asarray(rng.normal(size=(8192, 64)), jnp.float32)
    ids = jnp.sort(jnp.asarray(rng.integers(0, 16, 8192)))
    yield (
        "attention_pool",
        lambda form: (
            lambda v, s: jnp.sum(jnp.sin(kernels.attention_pool(v, s, ids, 16, implementation=form))),
            (values, values[:, 0]),
        ),
    )


def _compare(name: str, make, tolerance: float) -> dict[str, Any]:
    results, times = {}, {}
    # Whether there is a Pallas form (None: no), and whether it runs on the default device.
    pallas = jax.default_backend() in ("tpu", "gpu") if name in PALLAS else None
    for form in ("reference", "xla", *(["pallas"] if pallas else [])):
        function, args = make(form)
        run = jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(args)))))
        results[form] = jax.block_until_ready(run(*args))
        samples = []
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(run(*args))
            samples.append(time.perf_counter() - began)
        times[form] = 1e3 * float(np.median(samples))
    right = jax.tree.leaves(results.pop("reference"))
    pairs = [pair for result in results.values() for pair in zip(jax.tree.leaves(result), right, strict=True)]
    error = max(float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-6)) for a, b in pairs)
    return {
        "kernel": name,
        "error": error,
        "agrees": error < tolerance,
        "xla_ms": times["xla"],
        "reference_ms": times["reference"],
        "pallas": pallas,
        "pallas_ms": times.get("pallas"),
    }

"""Compiles a function for a TPU or GPU that is not here, and reports what the compiler says about it.

Needs `pip install 'jaxlab[aot]'` and `JAX_PLATFORMS=cpu`. A program that compiles fits its target; that its numbers are
right is for the interpreters, and that it is fast for the hardware to show.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from jaxlab._compat import gpu_devices, tpu_devices

# The smallest slice of each generation that its compiler accepts.
TPU_SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# Public limits of the devices: name, compute capability, multiprocessors.
GPUS = {"h100": ("NVIDIA H100 80GB HBM3", (9, 0), 132), "b200": ("NVIDIA B200", (10, 0), 148)}
TARGETS = (*(f"tpu:{name}" for name in TPU_SLICES), *(f"gpu:{name}" for name in GPUS))
CUSTOM_CALLS = {"tpu": "tpu_custom_call", "gpu": "triton"}


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """What compiling gave.

    Attributes:
        target: as in `TARGETS`.
        kernels: number of custom calls of hand-written kernels in the compiled program.
        flops: as the compiler counts them, with what kernels state; None where it does not say.
        bytes_accessed: likewise.
        temp_bytes: temporary memory on the device; None where the compiler does not say.
        text: the compiled program.
    """

    target: str
    kernels: int
    flops: float | None
    bytes_accessed: float | None
    temp_bytes: int | None
    text: str = dataclasses.field(repr=False)


def compile_report(
    function: Callable[..., Any], args: Sequence[Any], target: str, *, expect_kernel: bool = True
) -> CompileReport:
    """Returns what compiling `function(*args)` for a target gives.

    Args:
        function: to be jitted.
        args: arrays or `jax.ShapeDtypeStruct`s.
        target: one of `TARGETS`, such as "tpu:v5e" or "gpu:h100".
        expect_kernel: whether the program must hold a hand-written kernel.

    Raises:
        ValueError: the target is unknown.
        RuntimeError: it cannot be compiled for here, or the program fell back to no kernel at all.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} must be one of {', '.join(TARGETS)}")
    platform, name = target.split(":")
    device = (tpu_devices(TPU_SLICES[name]) if platform == "tpu" else gpu_devices(gpu_config(name)))[0]
    sharding = SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tuple(args))
    compiled = jax.jit(function).lower(*shapes).compile()
    text = compiled.as_text() or ""
    kernels = sum(CUSTOM_CALLS[platform] in line for line in re.findall(r"custom_call_target=\"[^\"]*\"", text))
    if expect_kernel and not kernels:
        raise RuntimeError(f"the program for {target} holds no hand-written kernel")
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    temp = int(memory.temp_size_in_bytes) if memory else None
    return CompileReport(target, kernels, cost.get("flops"), cost.get("bytes accessed"), temp, text)


def gpu_config(name: str) -> str:
    """Returns a GPU's limits in the text form that XLA reads."""
    description, (major, minor), cores = GPUS[name]
    limits = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": 3352000000000,
        "l2_cache_size": 52428800,
        "clock_rate_ghz": 1.98,
        "device_memory_size": 84942979072,
        "shared_memory_per_block_optin": 232448,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = [f"  {field}: {value}" for field, value in limits.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    inner = "\n".join(lines)
    return (
        f'gpu_device_info {{\n{inner}\n}}\nplatform_name: "CUDA"\n'
        f'dnn_version_info {{ major: 9 minor: 10 patch: 0 }}\ndevice_description_str: "{description}"\n'
    )

"""How fast a machine does what a run consists of: measured on this one in a few seconds, or looked up for a device that is named.

Knows no model: the caller says of which sizes its products and eigendecompositions are.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from influence.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one worker does in a second, and what it has. A multiplication and its addition are two operations."""

    device: str
    kind: str
    """cpu or cuda: which of torch's devices."""
    half_products: float
    """Operations in products of matrices in bfloat16 and float16."""
    products: float
    """The same in float32."""
    eigen: float
    """n³ of the eigendecompositions, in float32, of matrices n × n."""
    elementwise: float
    """Numbers whose log-softmax is taken, with its derivative: what stands for all that is neither a product nor a long stream."""
    stream: float
    """Bytes of large arrays that are read or written."""
    memory_bytes: int | None
    """Of the device; of a CPU, of the machine, whose workers share it. None where it is not known."""
    host_bytes: int | None
    """Of the machine."""


# Of vendors' peak rates, what is counted on: .6 of the tensor cores' and .75 of the others', as well-tuned products reach; .75 of the memory's.
TENSOR_SHARE, PLAIN_SHARE, MEMORY_SHARE = 0.6, 0.75, 0.75

ELEMENTWISE_BYTES = 40
"""What a GPU moves for one number of `Rates.elementwise`."""

HOST_BYTES = 2 * 10**12
"""Of a machine of eight such GPUs, as NVIDIA's DGX."""

GB, TERA = 10**9, 10**12


def _gpu(device: str, half: float, single: float, bandwidth: float, memory: float, eigen: float) -> Rates:
    """From peaks in TFLOP/s of bfloat16 tensor cores (dense) and of float32, in GB/s and in GB."""
    return Rates(
        device=device,
        kind="cuda",
        half_products=TENSOR_SHARE * half * TERA,
        products=PLAIN_SHARE * single * TERA,
        eigen=eigen,
        elementwise=MEMORY_SHARE * bandwidth * GB / ELEMENTWISE_BYTES,
        stream=MEMORY_SHARE * bandwidth * GB,
        memory_bytes=int(memory * GB),
        host_bytes=HOST_BYTES,
    )


# Peaks: NVIDIA's data sheets of the SXM (A100, H100, H200) and PCIe (L4, L40S) boards. Products in float32 do not use tensor cores in torch
# unless TF32 is allowed. Eigendecompositions: not a vendor's figure. 1e11 n³/s in float64 follows from kronfluence's 8 s for GPT-2 on an A100;
# in float32 they are counted at twice that, on other boards in proportion to the memory's bandwidth.
_DEVICES = (
    _gpu("a100", half=312, single=19.5, bandwidth=2039, memory=80, eigen=2e11),
    _gpu("h100", half=989, single=67, bandwidth=3350, memory=80, eigen=3.3e11),
    _gpu("h200", half=989, single=67, bandwidth=4800, memory=141, eigen=4.7e11),
    _gpu("l40s", half=362, single=91.6, bandwidth=864, memory=48, eigen=0.85e11),
    _gpu("l4", half=121, single=30.3, bandwidth=300, memory=24, eigen=0.3e11),
    # One core of an AMD EPYC with 256-bit vectors, as measured for benchmarks/NOTES.md.
    Rates(
        device="cpu",
        kind="cpu",
        half_products=20e9,
        products=80e9,
        eigen=5e9,
        elementwise=0.3e9,
        stream=15e9,
        memory_bytes=None,
        host_bytes=None,
    ),
)


def rates_of(device: str) -> Rates:
    """The rates of a device of the table. Raises RequestError for one that is not in it."""
    known = {rates.device: rates for rates in _DEVICES}
    if device.lower() not in known:
        raise RequestError(f"--device: {device!r} is not known; there are: {', '.join(known)}; left out, this machine is measured")
    return known[device.lower()]


def measure(product: tuple[int, int], eigen_size: int, dtype: str) -> Rates:
    """The rates of this machine, from products [1024, I] @ [I, O] for `product` (I, O) and an eigendecomposition of about that size.

    Takes a few seconds, and tells how fast the machine is when nobody else uses it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    inputs, outputs = (min(size, 8192 if on_gpu else 2048) for size in product)
    plain = _product_rate(inputs, outputs, torch.float32, device)
    half = _product_rate(inputs, outputs, getattr(torch, dtype), device) if dtype in ("bfloat16", "float16") else plain
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rates = Rates(
        device="this machine's GPU" if on_gpu else f"this machine, {torch.get_num_threads()} threads",
        kind=device.type,
        half_products=half,
        products=plain,
        eigen=_eigen_rate(min(eigen_size, 4096 if on_gpu else 1024), device),
        elementwise=_elementwise_rate(device),
        stream=_stream_rate(device),
        memory_bytes=torch.cuda.mem_get_info()[1] if on_gpu else host,
        host_bytes=host,
    )
    return replace(rates, device=rates.device.replace(" 1 threads", " one thread"))


def _product_rate(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = torch.ones((1024, inputs), dtype=dtype, device=device), torch.ones((inputs, outputs), dtype=dtype, device=device)
    return 2 * 1024 * inputs * outputs / _seconds(lambda: left @ right, device)


def _eigen_rate(size: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    some = torch.randn((size, size), generator=generator).to(device)
    covariance = some @ some.T
    return float(size**3 / _seconds(lambda: torch.linalg.eigh(covariance), device))


def _elementwise_rate(device: torch.device) -> float:
    logits = torch.linspace(-1, 1, 256 * 4096, device=device).reshape(256, 4096).requires_grad_()
    weights = torch.full_like(logits, 0.5)

    def work() -> None:
        torch.autograd.grad(torch.log_softmax(logits, 1), logits, weights)

    return logits.numel() / _seconds(work, device)


def _stream_rate(device: torch.device) -> float:
    """Of squares that are summed: three accesses a number, and new memory for a third of them, as corrected eigenvalues are made."""
    block = torch.ones((16, 2**18 if device.type == "cpu" else 2**24), device=device)
    return 3 * 4 * block.numel() / _seconds(lambda: (block**2).sum(0), device)


MEASURING_SECONDS, LEAST_TRIES, MOST_TRIES = 0.8, 3, 200


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of the times that `work` took, after a first one. On a CPU it is this thread's own time, without that of others."""
    clock = time.perf_counter if device.type == "cuda" else time.thread_time

    def once() -> float:
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    once()
    times = [once() for _ in range(LEAST_TRIES)]
    while sum(times) < MEASURING_SECONDS and len(times) < MOST_TRIES:
        times.append(once())
    return statistics.median(times)

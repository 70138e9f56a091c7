"""What a GPU can compute at most."""

from __future__ import annotations

import torch

# Dense 16-bit matrix products with fp32 sums, in 10^12 operations a second, from NVIDIA's data sheets, which give those
# of H100 and later with sparsity: half of it. Keys are what the driver calls the GPU; no other name counts, so that a
# slice of a GPU or a slower board of the same name is not taken for it.
_TERAFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A30": 165.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250.0,
}
_HALF = ("bfloat16", "float16")


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Operations a second of ``device`` in products of ``dtype``; None where it is not known, and for float32, whose
    peak depends on what its products are rounded to."""
    if device.type != "cuda" or dtype not in _HALF:
        return None
    tera = _TERAFLOPS.get(torch.cuda.get_device_name(device))
    return None if tera is None else tera * 1e12

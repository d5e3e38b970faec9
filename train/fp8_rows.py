"""Rows in FP8 by one kernel of a GPU, which reads each value once.

What torch's compiler makes of the same reads them twice, and each call goes through its guards: together a tenth of a step in FP8. Knows
Triton, which is where torch has a GPU. Does not know what the rows are.
"""

import torch
import triton
import triton.language as tl

from train.fp8 import FP8, LARGEST, SMALLEST_ROW, Quantised

VALUES_A_WARP = 512  # 16 of each thread: two of its widest reads


@triton.jit  # type: ignore[untyped-decorator]
def _quantise(
    values: tl.tensor,
    stride: int,
    tokens: tl.tensor,
    scales: tl.tensor,
    width: int,
    largest_fp8: tl.constexpr,
    smallest_row: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, block)
    found = tl.load(values + row * stride + places, mask=places < width, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(found), 0), smallest_row)
    tl.store(tokens + row * width + places, (found * tl.div_rn(largest_fp8, largest)).to(tl.float8e4nv), mask=places < width)
    tl.store(scales + row, tl.div_rn(largest, largest_fp8))


def quantise_rows(values: torch.Tensor) -> Quantised:
    """Return (rows, width) in FP8, and (rows, 1) scales in fp32, for rows on a GPU: the numbers of `train.fp8.quantise_rows`."""
    if values.stride(-1) != 1:
        values = values.contiguous()
    num_rows, width = values.shape
    tokens = torch.empty((num_rows, width), dtype=FP8, device=values.device)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=values.device)
    block = triton.next_power_of_2(width)
    num_warps = min(max(block // VALUES_A_WARP, 1), 16)
    _quantise[(num_rows,)](values, values.stride(0), tokens, scales, width, LARGEST, SMALLEST_ROW, block, num_warps=num_warps)
    return tokens, scales

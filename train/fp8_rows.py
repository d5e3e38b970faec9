"""Rows to FP8 on a GPU, by a kernel that reads each value once; eager torch writes fp32 between four kernels.

Knows Triton. Does not know what the rows are, or what is multiplied. Without Triton, as on a CPU, `train.fp8.quantise_rows` does the same.
"""

import torch
import triton
import triton.language as tl

FP8 = torch.float8_e4m3fn
VALUES_PER_WARP = 1024  # 32 a thread: enough loads under way, and few enough registers
MAX_WARPS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _quantise(values, rows, scales, width, LARGEST: tl.constexpr, SMALLEST_ROW: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    found = tl.load(values + row * width + places, mask=places < width, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(found), 0), SMALLEST_ROW)
    tl.store(scales + row, tl.div_rn(largest, LARGEST))
    small = (found * tl.div_rn(LARGEST, largest)).to(tl.float8e4nv)
    tl.store(rows + row * width + places, small, mask=places < width)


def quantise_rows(values: torch.Tensor, largest: float, smallest_row: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rows, width) on a GPU in FP8, and (rows, 1) scales in fp32 that make it the values again.

    Args:
        values: Each row lies in registers whole.
        largest: What a row's largest value becomes.
        smallest_row: A row with no larger value than this has the scale of one that has it.
    """
    values = values.contiguous()
    num_rows, width = values.shape
    rows = torch.empty_like(values, dtype=FP8)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=values.device)
    block = triton.next_power_of_2(width)
    num_warps = min(max(block // VALUES_PER_WARP, 1), MAX_WARPS)
    _quantise[(num_rows,)](values, rows, scales, width, largest, smallest_row, block, num_warps=num_warps)
    return rows, scales

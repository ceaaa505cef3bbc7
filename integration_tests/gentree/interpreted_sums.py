"""Runs the kernel of sums; fails where it differs from the mathematics by a single bit.

On a GPU, or without one in Triton's interpreter.
"""

from __future__ import annotations

import torch

from trimtab.kernels.sums import add_rows, launch, naive

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(0, 5), (1, 1), (2, 1023), (3, 1025), (16, 100), (21, 300), (3, 0)]


def check(dtype: torch.dtype, count: int, length: int) -> None:
    generator = torch.Generator().manual_seed(count + length)
    # From an odd place on, in a wider frame: neither side is aligned, and what is beside stays.
    frame = 50 * torch.randn(count + 1, length + 7, generator=generator)
    frame = frame.to(dtype).to(DEVICE)
    expected = frame.clone()
    naive.add_rows(expected[0, 3 : 3 + length], expected[1:, 3 : 3 + length])
    add_rows(frame[0, 3 : 3 + length], frame[1:, 3 : 3 + length])
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts off, no GPU does
        torch.testing.assert_close(frame[0], expected[0], rtol=2**-7, atol=0)
        frame[0] = expected[0]
    assert torch.equal(frame, expected), (dtype, count, length)


def main() -> None:
    called = []
    by_triton = launch._by_triton
    launch._by_triton = lambda *pair: (called.append(1), by_triton(*pair))[1]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for count, length in SIZES:
            check(dtype, count, length)
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64):
        check(dtype, 18, 200)
    assert len(called) == 4 * (len(SIZES) - 2) + 4, "the kernel was not called"
    print("right")


if __name__ == "__main__":
    main()

"""3 x 3 convolutions of small pictures in bf16: `layers.Conv3x3` against torch's, forward and backward pass.

    python -m benchmarks.convolution
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m benchmarks.convolution    # as on a CPU without AMX

Says up to which side products are worth it; `Conv3x3` takes them with AMX alone, here they are always taken.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import measure
from unclip.models.layers import Conv3x3

WIDTHS = (128, 256, 512)


def step(layer: nn.Module, batch_size: int, width: int, side: int) -> Callable[[], float]:
    """Pictures a second of a forward and backward pass."""
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(batch_size, width, side, side).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)

    def run() -> float:
        started = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], gradient)
        return batch_size / (time.monotonic() - started)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[2, 4, 8, 16], help="of the pictures, in pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures")
    parser.add_argument("--rounds", type=int, default=30, help="passes of both, in turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    Conv3x3.HAS_TILES = True
    print(measure.machine("torch"))
    print(vars(arguments), flush=True)
    print(f"{'side':>4} {'width':>6} {'ours, pictures/s':>24} {'torch, pictures/s':>24}  ours is faster by")
    for side in arguments.sides:
        for width in WIDTHS:
            sides = {
                "ours": step(Conv3x3(width, width), arguments.batch_size, width, side),
                "torch": step(nn.Conv2d(width, width, 3, padding=1), arguments.batch_size, width, side),
            }
            speeds = measure.interleave(sides, arguments.rounds)
            ratio = measure.median_ratio(speeds["ours"], speeds["torch"])
            ours, theirs = (measure.describe(speeds[name]) for name in ("ours", "torch"))
            print(f"{side:4} {width:6} {ours:>24} {theirs:>24}  {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()

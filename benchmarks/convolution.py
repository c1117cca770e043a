"""3 x 3 convolutions of small images in bf16: `layers.Conv3x3` against torch's, forward and backward pass.

    python -m benchmarks.convolution
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m benchmarks.convolution    # as on a CPU without AMX

Shows up to which image size matrix products are faster. `Conv3x3` uses them only with AMX, this benchmark always.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import measure
from unclip.background import usable_cpus
from unclip.models.layers import Conv3x3

WIDTHS = (128, 256, 512)


def step(layer: nn.Module, batch_size: int, width: int, image_size: int) -> Callable[[], float]:
    """Return a function that runs a forward and backward pass and returns images per second."""
    layer = layer.to(memory_format=torch.channels_last)
    x = (
        torch.randn(batch_size, width, image_size, image_size)
        .bfloat16()
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
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
    parser.add_argument("--sides", type=int, nargs="+", default=[2, 4, 8, 16], help="image sizes in pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="images per pass")
    parser.add_argument("--rounds", type=int, default=30, help="passes of each, in turns")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="CPU threads")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    Conv3x3.HAS_TILES = True
    print(measure.machine("torch"))
    print(vars(arguments), flush=True)
    print(f"{'size':>4} {'width':>6} {'ours, images/s':>24} {'torch, images/s':>24}  ours is faster by")
    for size in arguments.sides:
        for width in WIDTHS:
            contenders = {
                "ours": step(Conv3x3(width, width), arguments.batch_size, width, size),
                "torch": step(nn.Conv2d(width, width, 3, padding=1), arguments.batch_size, width, size),
            }
            speeds = measure.interleave(contenders, arguments.rounds)
            ratio = measure.median_ratio(speeds["ours"], speeds["torch"])
            ours, theirs = (measure.describe(speeds[name]) for name in ("ours", "torch"))
            print(f"{size:4} {width:6} {ours:>24} {theirs:>24}  {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()

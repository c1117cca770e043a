"""Accuracy and speed of image downscaling methods, compared with the ideal low-pass filter.

    python -m benchmarks.resize

The ideal keeps only the low frequencies of the image's discrete cosine transform; errors are root mean squares from it
in grey levels. A zone plate isolates aliasing. Times are CPU times of the process on one thread.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks import measure

Resize = Callable[[np.ndarray, tuple[int, int]], np.ndarray]
"""(pixels [H, W, 3] uint8, (width, height)) -> pixels [height, width, 3] uint8."""


def resizers() -> dict[str, Resize]:
    """Return the methods by name."""
    import cv2
    from PIL import Image

    from tasks.untrusted.decode import shrink

    cv2.setNumThreads(1)

    def pillow(resample: Image.Resampling) -> Resize:
        return lambda pixels, size: np.asarray(Image.fromarray(pixels).resize(size, resample, reducing_gap=2.0))

    return {
        "unclip": lambda pixels, size: np.asarray(shrink(Image.fromarray(pixels), size)),
        "Pillow, Hamming": pillow(Image.Resampling.HAMMING),
        "Pillow, Lanczos": pillow(Image.Resampling.LANCZOS),
        "OpenCV, area": lambda pixels, size: cv2.resize(pixels, size, interpolation=cv2.INTER_AREA),
    }


def ideal(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Downscale [H, W, 3] to [height, width, 3] float64, keeping exactly the frequencies that fit."""
    from scipy.fft import dctn, idctn

    width, height = size
    low = dctn(pixels.astype(np.float64), axes=(0, 1), norm="ortho")[:height, :width]
    shrunk: np.ndarray = (idctn(low, axes=(0, 1), norm="ortho") * np.sqrt(width * height / pixels[..., 0].size)).clip(
        0, 255
    )
    return shrunk


def zone_plate(width: int, height: int) -> np.ndarray:
    """Return rings that get finer outwards, up to the limit of the pixels; [height, width, 3] uint8."""
    y, x = np.mgrid[:height, :width]
    rings = 127.5 + 127.5 * np.cos(np.pi * ((x - width / 2) ** 2 + (y - height / 2) ** 2) * 2 / (width + height) * 0.7)
    return np.repeat(rings.astype(np.uint8)[..., None], 3, axis=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10, help="photographs of 640x480")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[384, 256, 192, 128, 64],
        help="lengths of the shorter side after resizing",
    )
    arguments = parser.parse_args()
    from PIL import Image

    encoded = measure.photographs(arguments.pictures)
    photographs = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded]
    height, width = photographs[0].shape[:2]
    rings = zone_plate(width, height)

    def error(resize: Resize, pixels: np.ndarray, size: tuple[int, int]) -> float:
        return float(np.sqrt(np.mean((resize(pixels, size) - ideal(pixels, size)) ** 2)))

    print(measure.machine("pillow", "opencv-python-headless"))
    print(f"{'':10} {'':16} {'photographs':>12} {'zone plate':>11} {'ms':>6}")
    for shorter in arguments.sizes:
        size = (round(width * shorter / height), shorter)
        for name, resize in resizers().items():
            photographic = statistics.mean(error(resize, pixels, size) for pixels in photographs)
            started = time.process_time()
            for pixels in photographs * 5:
                resize(pixels, size)
            milliseconds = (time.process_time() - started) / len(photographs) / 5 * 1000
            plate = error(resize, rings, size)
            print(f"{size[0]:4} x {size[1]:3} {name:16} {photographic:12.2f} {plate:11.2f} {milliseconds:6.2f}")


if __name__ == "__main__":
    main()

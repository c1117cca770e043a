"""Decoding, resizing and encoding in images per second and core: our decoder, Pillow, OpenCV, img2dataset's resizer.

    python -m benchmarks.decode

Times are CPU seconds of the process on one thread, so other load on the machine hardly matters.
"""

import argparse
import functools
import io
import os
import time
from collections.abc import Callable

import numpy as np

from benchmarks import measure

Decoder = Callable[[bytes], int]
"""JPEG -> number of bytes of the smaller JPEG."""


def decoders(image_size: int, jpeg_quality: int) -> dict[str, Decoder]:
    """Return all decoders by name. Each resizes the shorter side to `image_size` and keeps the aspect ratio."""
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    import cv2
    from img2dataset.resizer import Resizer
    from PIL import Image

    from tasks.untrusted.decode import decode

    cv2.setNumThreads(1)
    resizer = Resizer(image_size, "keep_ratio", resize_only_if_bigger=True, encode_quality=jpeg_quality)
    scale = image_size / measure.PHOTO_HEIGHT
    size = (round(measure.PHOTO_WIDTH * scale), image_size)

    def ours(data: bytes) -> int:
        return len(decode(data, image_size, jpeg_quality, max_pixels=50_000_000).jpg)

    def pillow(data: bytes) -> int:
        image = Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=jpeg_quality)
        return buffer.tell()

    def opencv(data: bytes) -> int:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert image is not None
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return len(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])[1])

    def img2dataset(data: bytes) -> int:
        jpg, *_, error = resizer(io.BytesIO(data))
        assert error is None, error
        return len(jpg)

    return {"unclip": ours, "Pillow": pillow, "OpenCV": opencv, "img2dataset": img2dataset}


def speed(decoder: Decoder, images: list[bytes]) -> float:
    """Return images per CPU second."""
    started = time.process_time()
    for data in images:
        decoder(data)
    return len(images) / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=150, help="images in one round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all decoders")
    parser.add_argument(
        "--image-size", type=int, default=256, help="length of the shorter side after resizing, in pixels"
    )
    parser.add_argument("--jpeg-quality", type=int, default=95, help="JPEG quality of the result")
    arguments = parser.parse_args()

    images = measure.photographs(arguments.pictures)
    candidates = decoders(arguments.image_size, arguments.jpeg_quality)
    sizes = {name: decoder(images[0]) for name, decoder in candidates.items()}  # warms up, too
    contenders = {name: functools.partial(speed, decoder, images) for name, decoder in candidates.items()}
    figures = measure.interleave(contenders, arguments.rounds)
    print(measure.machine("pillow", "opencv-python-headless", "img2dataset"))
    print(f"{arguments.pictures} JPEGs of 640x480 to {arguments.image_size} px, {arguments.rounds} rounds\n")
    print(f"{'':12} {'images/s and core':>26}  {'KB':>5}  unclip is faster by")
    for name, rounds in figures.items():
        ratio = measure.median_ratio(figures["unclip"], rounds)
        print(f"{name:12} {measure.describe(rounds):>26}  {sizes[name] / 1024:5.0f}  {ratio:.2f}")


if __name__ == "__main__":
    main()

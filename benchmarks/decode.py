"""Pictures a second and core, decoded, shrunk and encoded: our decoder, plain Pillow, plain OpenCV, img2dataset's resizer.

    python -m benchmarks.decode

Seconds are the process' own CPU seconds on one thread, so other load on the machine hardly counts.
"""

import argparse
import io
import os
import time
from collections.abc import Callable

import numpy as np

from benchmarks import measure

Decoder = Callable[[bytes], int]
"""From a JPEG to the number of bytes of the smaller JPEG."""


def decoders(image_size: int, jpeg_quality: int) -> dict[str, Decoder]:
    """All ways, by name. All make the smaller side `image_size` and keep the ratio."""
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    import cv2
    from img2dataset.resizer import Resizer
    from PIL import Image

    from tasks.untrusted.decode import decode

    cv2.setNumThreads(1)
    resizer = Resizer(image_size, "keep_ratio", resize_only_if_bigger=True, encode_quality=jpeg_quality)
    scale = image_size / measure.PICTURE_HEIGHT
    size = (round(measure.PICTURE_WIDTH * scale), image_size)

    def ours(data: bytes) -> int:
        return len(decode(data, image_size, jpeg_quality, max_pixels=50_000_000).jpg)

    def pillow(data: bytes) -> int:
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=jpeg_quality)
        return buffer.tell()

    def opencv(data: bytes) -> int:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        return len(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])[1])

    def img2dataset(data: bytes) -> int:
        jpg, *_, error = resizer(io.BytesIO(data))
        assert error is None, error
        return len(jpg)

    return {"unclip": ours, "Pillow": pillow, "OpenCV": opencv, "img2dataset": img2dataset}


def speed(decoder: Decoder, pictures: list[bytes]) -> float:
    """Pictures in a CPU second."""
    started = time.process_time()
    for data in pictures:
        decoder(data)
    return len(pictures) / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=150, help="pictures in one round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all decoders")
    parser.add_argument("--image-size", type=int, default=256, help="smaller side afterwards, in pixels")
    parser.add_argument("--jpeg-quality", type=int, default=95, help="of the result")
    arguments = parser.parse_args()

    pictures = measure.photographs(arguments.pictures)
    ways = decoders(arguments.image_size, arguments.jpeg_quality)
    sizes = {name: decoder(pictures[0]) for name, decoder in ways.items()}  # the first picture warms up
    figures = measure.interleave(
        {name: lambda decoder=decoder: speed(decoder, pictures) for name, decoder in ways.items()}, arguments.rounds
    )
    print(measure.machine("pillow", "opencv-python-headless", "img2dataset"))
    print(f"{arguments.pictures} JPEGs of 640x480 to {arguments.image_size} px, {arguments.rounds} rounds\n")
    print(f"{'':12} {'pictures/s and core':>26}  {'KB':>5}  unclip is faster by")
    for name, rounds in figures.items():
        ratio = measure.median_ratio(figures["unclip"], rounds)
        print(f"{name:12} {measure.describe(rounds):>26}  {sizes[name] / 1024:5.0f}  {ratio:.2f}")


if __name__ == "__main__":
    main()

"""Rates, shares and sizes for what a storage has not measured yet, with their sources."""

from collections.abc import Mapping

SIZES = (1_000_000, 10_000_000, 100_000_000, 650_000_000)
"""Numbers of pairs that are estimated by default; the last is the paper's (Ramesh et al. 2022, appendix C)."""

RATES: Mapping[str, float] = {
    "ingest": 150_000,
    "download": 59,
    "filter": 130_000,
    "dedup": 140_000,
    "curate": 40_000,
    "report": 130_000,
}
"""Shipped rows per second of one CPU.

download: LAION-5B, 9,500 images/s on 160 CPUs. The others are the CPU time of a million rows in `python -m benchmarks.scaling`
(docs/benchmarks.md); curate, measured with 64 dimensions, has half its rate for the covariance of 768, 1.2 MFLOP a row.
"""
SHARES: Mapping[str, float] = {
    "ingest": 0.98,
    "download": 0.85,
    "filter": 0.95,
    "dedup": 0.9,
    "embed": 1.0,
    "curate": 1.0,
}
"""Shipped share of its rows that a stage keeps. download: 75 to 95 % of the links of published lists answer. ingest, filter and
dedup are assumptions; curate keeps all rows if it has no thresholds."""

GPU_FLOPS = 400e12
"""Shipped FLOPs per second that a GPU achieves in bf16: 40 % of an H100's 989 TFLOP/s."""
CPU_FLOPS = 100e9
"""Shipped FLOPs per second that a CPU achieves when it trains or embeds: benchmarks/RESULTS.md has 80 to 125 GFLOP/s."""
DECODE_SECONDS = 1 / 2_164
"""CPU seconds to decode a stored image of 256 pixels; proportional to its area. Measured with OpenCV."""
FLOAT32_SPEED: Mapping[str, float] = {"convolution": 495 / 989, "matrix product": 67 / 989}
"""Speed of float32 on a GPU relative to bf16, from the peaks of an H100: PyTorch computes convolutions in TF32, matrix products
not."""
PREPROCESS_SECONDS = 0.75e-3
"""CPU seconds to resize and standardise an image for CLIP; 0.5 to 1 ms."""
CPUS_PER_GPU = 16
"""CPUs beside each GPU if none are given."""

PAIR_BYTES = 150
"""URL, caption and key of a row, compressed."""
SELECTION_BYTES = 30
"""Key, status and reason of a row, compressed."""
ORIGINAL_BYTES = 130_000
"""Image as it is fetched from the web: 130 MB per 1,000 images (img2dataset)."""
JPEG_BYTES = 30_000
"""Stored image of 256 pixels at quality 95 with 4:2:0 subsampling: 30 GB per million. Proportional to its area."""
CHROMA: Mapping[str, float] = {"4:2:0": 1.0, "4:2:2": 1.2, "4:4:4": 1 / 0.7}
"""Bytes by chroma subsampling, relative to 4:2:0."""
COLUMN_BYTES: Mapping[str, float] = {"caption": 60, "tokens": 40}
"""Bytes a row of other columns that trainings read; those of encodings follow from the models, others have 4."""
HALF_BYTES = 2
"""Bytes of a stored latent or text state; they hardly compress."""
CODE_BYTES = 2.3
"""Bytes of a stored code: an int32, compressed. Measured with random codes of 8,192."""
CAPTION_TOKENS = 20
"""Tokens of a caption on average; an assumption, as lists have from 10 to some 30."""
T5_SIZES: Mapping[int, tuple[int, int, int]] = {
    512: (8, 6, 1024),
    768: (12, 12, 2048),
    1024: (24, 16, 2816),
    2048: (24, 32, 5120),
    4096: (24, 64, 10240),
}
"""Width -> layers, heads and inner width of the encoders of T5 v1.1, for a T5 that is not on this machine. Heads have 64
channels."""
PARAMETER_BYTES = 4
"""Bytes of a float32 parameter. A checkpoint has four values for each: weights, EMA weights and two moments."""

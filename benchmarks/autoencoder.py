"""Training steps of autoencoders with a codebook: ours against diffusers' networks with vector-quantize-pytorch.

    python -m benchmarks.autoencoder
    python -m benchmarks.autoencoder --precision fp32 --threads 1

`codebook` measures the quantiser alone: nearest codes, straight-through gradients, moving averages and restarts of dead codes.
`autoencoder` measures a complete step: forward and backward pass of l1 and commitment loss, clipping, fused AdamW and EMA. The
networks have the same layers, weights of equal shapes, batch and precision; ours takes the trainer's own steps. The sides take
turns, and a ratio is the median of the rounds' own ratios.

Letters: B batch, D latent channels, s latent size, K codes.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from unclip.background import usable_cpus
from unclip.models.autoencoder import AutoencoderConfig
from unclip.models.quantisers import VectorQuantiser
from unclip.systems.autoencoder import AutoencoderStageConfig
from unclip.systems.autoencoder.part import AutoencoderObjective, PerceptualConfig
from unclip.training.codebooks import CodebookConfig, CodebookLearner
from unclip.training.precision import Precision, autocast
from unclip.training.settings import TrainerConfig
from unclip.training.state import TrainingState

CPU = torch.device("cpu")
GOAL = 1.3
PEERS = {"vector_quantize_pytorch": "vector-quantize-pytorch", "diffusers": "diffusers"}
"""Module -> its name for pip."""
CODEBOOK = CodebookConfig(decay=0.99)
LEARNING_RATE, CLIP_NORM, EMA_DECAY = 1e-4, 1.0, 0.999

Step = Callable[[], float]
"""Takes a step; returns images per second."""


def timed(batch_size: int, step: Callable[[], None]) -> Step:
    def run() -> float:
        started = time.monotonic()
        step()
        return batch_size / (time.monotonic() - started)

    return run


def their_quantiser(model: AutoencoderConfig) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize

    quantiser: nn.Module = VectorQuantize(
        model.latent_channels,
        model.codebook_size,
        decay=CODEBOOK.decay,
        commitment_weight=CODEBOOK.commitment_weight,
        threshold_ema_dead_code=CODEBOOK.restart_below,
        accept_image_fmap=True,
        rotation_trick=False,
    )
    return quantiser.train()


def quantisers(model: AutoencoderConfig, batch_size: int) -> dict[str, Step]:
    """Steps of the quantisers alone, on encodings [B, D, s, s]."""
    size = model.latent_size
    encodings = torch.randn(batch_size, model.latent_channels, size, size)
    encodings = encodings.to(memory_format=torch.channels_last).requires_grad_()
    gradient, generator = torch.randn_like(encodings), torch.Generator().manual_seed(0)
    ours = VectorQuantiser(model.codebook_size, model.latent_channels, CODEBOOK.commitment_weight).requires_grad_(False)
    learner = CodebookLearner(CODEBOOK, model.codebook_size, model.latent_channels, CPU)
    theirs = their_quantiser(model)

    def our_step() -> None:
        found = ours(encodings)
        torch.autograd.backward([found.latents, found.penalty.mean()], [gradient, torch.ones(())])
        assert found.codes is not None and found.errors is not None
        learner.add(found.encodings.detach(), found.codes, found.errors, generator)
        learner.learn(True, ours.codebook)
        encodings.grad = None

    def their_step() -> None:
        latents, _, loss = theirs(encodings)
        torch.autograd.backward([latents, loss.sum()], [gradient, torch.ones(())])
        encodings.grad = None

    return {"unclip": timed(batch_size, our_step), "vector-quantize-pytorch": timed(batch_size, their_step)}


class Theirs(nn.Module):
    """Encoder and decoder of diffusers' VQModel around the peer's quantiser."""

    def __init__(self, model: AutoencoderConfig) -> None:
        from diffusers import VQModel

        super().__init__()
        levels = len(model.channel_mult)
        whole: Any = VQModel(
            block_out_channels=tuple(model.widths),
            layers_per_block=model.num_res_blocks,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=model.latent_channels,
            norm_num_groups=model.norm_groups,
            num_vq_embeddings=2,
            mid_block_add_attention=model.middle_attention,
        )
        self.encoder, self.quant_conv = whole.encoder, whole.quant_conv
        self.post_quant_conv, self.decoder = whole.post_quant_conv, whole.decoder
        self.quantiser = their_quantiser(model)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents, _, loss = self.quantiser(self.quant_conv(self.encoder(images)).float())
        return self.decoder(self.post_quant_conv(latents)), loss.sum()


def autoencoders(model: AutoencoderConfig, batch_size: int, precision: Precision) -> dict[str, Step]:
    """Complete training steps, on images [B, 3, S, S]."""
    images = torch.rand(batch_size, 3, model.image_size, model.image_size) * 2 - 1
    stage = AutoencoderStageConfig(model, PerceptualConfig(0.0), codebook=CODEBOOK)
    trainer = TrainerConfig(10**9, batch_size, learning_rate=LEARNING_RATE, ema_decay=EMA_DECAY, precision=precision)
    objective = AutoencoderObjective(stage, {"jpg": [_jpeg(model.image_size)]})
    network = objective.model.train()
    state = TrainingState(network, objective.state, trainer)
    generator = torch.Generator().manual_seed(0)

    def our_step() -> None:
        with autocast(precision, CPU):
            loss = objective.loss(network, {"images": images}, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = state.gradient_norm().item()
        objective.learn(True)
        state.apply(0, norm)

    from diffusers.training_utils import EMAModel

    theirs = Theirs(model).to(memory_format=torch.channels_last).train()
    learned = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, LEARNING_RATE, fused=True)
    ema = EMAModel(learned, EMA_DECAY, foreach=True)
    laid_out = images.to(memory_format=torch.channels_last)

    def their_step() -> None:
        with autocast(precision, CPU):
            reconstructed, commitment = theirs(laid_out)
            loss = (reconstructed.float() - laid_out).abs().mean() + commitment
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(learned)

    counts = [sum(each.numel() for each in state.parameters.values()), sum(each.numel() for each in learned)]
    print(f"\n{counts[0]:,} learned parameters, theirs {counts[1]:,}")
    assert abs(counts[0] / counts[1] - 1) < 0.01, "the networks are not equal"
    return {"unclip": timed(batch_size, our_step), "diffusers, vector-quantize-pytorch": timed(batch_size, their_step)}


def _jpeg(image_size: int) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (image_size, image_size)).save(buffer, "JPEG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--channels", type=int, default=64, help="channels of the first of three levels")
    parser.add_argument("--latent-channels", type=int, default=64, help="length of a code's vector")
    parser.add_argument("--codes", type=int, default=1024, help="codes")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each, in turns")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="precision of all")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="CPU threads")
    arguments = parser.parse_args()

    missing = [name for module, name in PEERS.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.exit(1, f"missing; to measure them: pip install {' '.join(missing)}\n")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(measure.machine("torch", *PEERS.values()))
    print(vars(arguments), flush=True)
    model = AutoencoderConfig(
        arguments.image_size,
        channels=arguments.channels,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        latent_channels=arguments.latent_channels,
        bottleneck="vq",
        codebook_size=arguments.codes,
    )
    for part in ("codebook", "autoencoder"):
        if part == "codebook":
            steps, rounds = quantisers(model, arguments.batch_size), 10 * arguments.rounds
        else:
            steps, rounds = autoencoders(model, arguments.batch_size, arguments.precision), arguments.rounds
        for step in steps.values():
            step(), step()  # warm
        speeds = measure.interleave(steps, rounds)
        print(f"{part}, goal {GOAL}\n{'':36} {'images/s':>26}  unclip is faster by")
        for name, figures in speeds.items():
            ratio = measure.median_ratio(speeds["unclip"], figures)
            print(f"{name:36} {measure.describe(figures):>26}  {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()

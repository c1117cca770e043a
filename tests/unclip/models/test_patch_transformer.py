"""Autoencoders of Vision Transformers."""

import dataclasses
import io

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unclip.errors import ConfigError, ShapeError
from unclip.models.autoencoder import Autoencoder, AutoencoderConfig
from unclip.models.discriminator import DiscriminatorConfig
from unclip.models.patch_transformer import PatchTransformerConfig
from unclip.systems.autoencoder.part import (
    AdversarialConfig,
    AutoencoderObjective,
    AutoencoderStageConfig,
    PerceptualConfig,
)

CONFIG = AutoencoderConfig(
    image_size=16,
    latent_channels=4,
    bottleneck="vq",
    codebook_size=16,
    transformer=PatchTransformerConfig(patch_size=4, width=32, depth=2, num_heads=2),
)


def build(**changes: object) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("bottleneck", ["kl", "vq", "gumbel"])
@torch.no_grad()
def test_it_has_the_interface_of_an_autoencoder(bottleneck: str) -> None:
    model, images = build(bottleneck=bottleneck).eval(), torch.rand(2, 3, 16, 16) * 2 - 1
    assert (model.config.factor, model.config.latent_size) == (4, 4)
    latents = model.encode(images)
    assert latents.shape == (2, 4, 4, 4)
    reconstruction = model(images)
    assert reconstruction.last_hidden.shape == (2, 32, 4, 4)
    torch.testing.assert_close(model.decode(latents), reconstruction.images)
    if bottleneck != "kl":
        assert torch.equal(model.decode_tokens(model.tokens(images)), model.decode(latents))


def test_every_patch_is_encoded_at_its_place() -> None:
    """An untrained encoder reads its patches mostly by themselves; the residual path keeps them apart."""
    model, images = build(bottleneck="kl").eval(), torch.zeros(1, 3, 16, 16)
    changed = images.clone()
    changed[:, :, 4:8, 8:12] = 1  # row 1, column 2
    with torch.no_grad():
        difference = (model.encode(changed) - model.encode(images)).abs().sum(dim=1)[0]  # [s, s]
    assert difference.argmax().item() == 1 * 4 + 2


def test_it_learns_to_reconstruct_images() -> None:
    model, generator = build(bottleneck="kl"), torch.Generator().manual_seed(1)
    images = F.interpolate(torch.rand(8, 3, 4, 4, generator=generator) * 2 - 1, size=16)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(images).images - images).abs().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.15  # a constant image has 0.5


def test_it_trains_against_a_discriminator() -> None:
    torch.manual_seed(0)
    config = AutoencoderStageConfig(
        model=dataclasses.replace(CONFIG, image_size=32),
        perceptual=PerceptualConfig(weight=0.0),
        discriminator=AdversarialConfig(0.5, model=DiscriminatorConfig(channels=8, num_layers=1)),
    )
    jpeg = io.BytesIO()
    Image.effect_noise((32, 32), 80).convert("RGB").save(jpeg, "JPEG")
    objective = AutoencoderObjective(config, {"jpg": [jpeg.getvalue()]})
    tensors = {"images": torch.rand(2, 3, 32, 32) * 2 - 1}
    loss = objective.loss(objective.model.train(), tensors, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite() and objective.metrics(training=True)["adversarial_weight"] > 0
    for name, parameter in objective.model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


def test_vit_vqgan_small_has_the_published_widths_and_depths() -> None:
    """Yu et al. 2022 (ViT-VQGAN), Table 1: 8 blocks, 8 heads, width 512 and hidden width 2,048 on 1,024 tokens.

    The paper counts 32 M for an encoder or decoder of this size, 64 M for both; Yu et al. 2022 (Parti), section 2.1, counts about
    30 M. The blocks of that table have 25.2 M, as here, so that the papers' numbers do not follow from its row alone.
    """
    config = AutoencoderConfig(
        image_size=256, latent_channels=32, bottleneck="vq", codebook_size=8192, transformer=PatchTransformerConfig()
    )
    with torch.device("meta"):
        model = Autoencoder(config)
    assert config.latent_size == 32
    half = 8 * (12 * 512**2 + 13 * 512)  # weights, then biases and norms, of a block
    half += 1024 * 512 + 2 * 512  # positions, last norm
    patches, head = 3 * 8 * 8 * 512, 512 * 512 + 512  # layers between pixels and width, and before the tanh
    ends = 2 * patches + 512 + 192 + 2 * head + 2 * 512 * 32 + 32 + 512
    codes = 8192 * 32 + 2 * (32 * 32 + 32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2 * half + ends + codes == 52_508_960


def test_images_of_another_size_are_refused() -> None:
    for size in ((8, 8), (8, 32)):  # the second has as many patches
        with pytest.raises(ShapeError, match="expected 4 x 4, as its Transformers learn a position for each"):
            build(bottleneck="kl").encode(torch.zeros(1, 3, *size))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="image_size: got 18"):
        dataclasses.replace(CONFIG, image_size=18)
    with pytest.raises(ConfigError, match="num_heads: got 3, expected a divisor of width 512"):
        PatchTransformerConfig(num_heads=3)

"""Convolutional autoencoders of images: continuous latents (KL), or tokens of a codebook (VQ, Gumbel-softmax).

Sources: Kingma & Welling 2014, "Auto-Encoding Variational Bayes"; van den Oord et al. 2017, "Neural Discrete Representation
Learning"; Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation" (the discrete VAE); Esser et al. 2021, "Taming Transformers
for High-Resolution Image Synthesis" (the networks); Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion
Models" (the KL autoencoder). The order of layers is that of the published networks, so that weights convert one to one
(`unclip.interop.autoencoder`).

Letters: B batch, C channels, H height, W width, S image size, p patch size, s latent size, D latent channels, K codes.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import added, require
from unclip.errors import ConfigError, ShapeError
from unclip.models.discriminator import Discriminator, DiscriminatorConfig
from unclip.models.layers import Conv3x3, GroupNorm, attention
from unclip.models.patch_transformer import PatchDecoder, PatchEncoder, PatchTransformerConfig
from unclip.models.quantisers import GumbelQuantiser, KlBottleneck, VectorQuantiser

Bottleneck = Literal["kl", "vq", "gumbel"]
NORM_EPS = 1e-6
"""Epsilon of every group norm, as in the published networks."""


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    image_size: int = 256
    """S, size of the square training image, pixels; attention_resolutions are relative to it."""
    patch_size: int = 1
    """Pixels in each direction that the first and the last convolution take as channels of one position: a cheap way to a lower
    resolution, for small networks. 1 in the published networks."""
    channels: int = 128
    """Channels of the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level, in multiples of `channels`; each level but the last halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    attention_resolutions: tuple[int, ...] = ()
    """Resolutions in pixels at which attention follows each residual block."""
    middle_attention: bool = True
    """Attention at the lowest resolution, between two residual blocks."""
    norm_groups: int = 32
    """Groups of every group norm."""
    latent_channels: int = 4
    """D, channels of the latents; of vq and gumbel, the length of a code's vector."""
    bottleneck: Bottleneck = "kl"
    """Kind of latents: kl, continuous ones from a diagonal Gaussian; vq, the nearest of K learned vectors; gumbel, one of K
    vectors by logits, relaxed in training by the Gumbel-softmax."""
    codebook_size: int = 8192
    """K, number of codes of vq and gumbel."""
    transformer: PatchTransformerConfig | None = added(None)
    """Vision Transformers as encoder and decoder, instead of convolutional networks, whose settings then have no effect. Source:
    Yu et al. 2022 (ViT-VQGAN), section 3.1."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "channels", "num_res_blocks", "norm_groups", "latent_channels"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(len(self.channel_mult) >= 1, "channel_mult", self.channel_mult, "at least one level")
        for multiple in self.channel_mult:
            width = self.channels * multiple
            fits = multiple >= 1 and width % self.norm_groups == 0
            expected = f"positive multiples whose channels are multiples of norm_groups, {self.norm_groups}"
            require(fits, "channel_mult", self.channel_mult, expected)
        fits = self.image_size % self.factor == 0
        expected = f"a multiple of {self.factor}, so that every level but the last halves the resolution evenly"
        require(fits, "image_size", self.image_size, expected)
        resolutions = [self.image_size // self.patch_size // 2**level for level in range(len(self.channel_mult))]
        for resolution in self.attention_resolutions:
            expected = f"resolutions of the levels, {resolutions}"
            require(resolution in resolutions, "attention_resolutions", resolution, expected)
        require(self.codebook_size >= 2, "codebook_size", self.codebook_size, "at least 2")

    @property
    def factor(self) -> int:
        """f, ratio of the image's resolution to that of the latents."""
        if self.transformer is not None:
            return self.transformer.patch_size
        return int(self.patch_size * 2 ** (len(self.channel_mult) - 1))

    @property
    def latent_size(self) -> int:
        """s, resolution of the latents."""
        return self.image_size // self.factor

    @property
    def has_codes(self) -> bool:
        """True if images can be written as tokens."""
        return self.bottleneck != "kl"

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.channels * multiple for multiple in self.channel_mult]


class Reconstruction(NamedTuple):
    """Result of a forward pass in training."""

    images: Tensor
    """[B, 3, S, S]."""
    penalty: Tensor
    """[B] float32, term of the loss that shapes the latents; see the bottlenecks."""
    encodings: Tensor
    """[B, D, s, s] float32, detached: mean of the posterior (kl), the encoder's output before a code is chosen (vq), or the
    vectors of the likeliest codes (gumbel)."""
    codes: Tensor | None
    """[B, s * s] int64, chosen or likeliest codes; None for kl."""
    errors: Tensor | None
    """[B, s * s] float32, detached: squared distance of each encoding to its code (vq); None of the others."""
    last_hidden: Tensor
    """[B, C, S / p, S / p], detached: input of the decoder's last convolution."""


class Autoencoder(nn.Module):
    """Encoder, bottleneck and decoder."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        depth = config.latent_channels
        moments = 2 * depth if config.bottleneck == "kl" else depth
        vision = config.transformer
        self.encoder = Encoder(config, moments) if vision is None else PatchEncoder(vision, config.latent_size, moments)
        self.bottleneck: KlBottleneck | VectorQuantiser | GumbelQuantiser
        if config.bottleneck == "kl":
            self.to_bottleneck, self.bottleneck = nn.Conv2d(moments, moments, 1), KlBottleneck()
        elif config.bottleneck == "vq":
            self.to_bottleneck = nn.Conv2d(depth, depth, 1)
            self.bottleneck = VectorQuantiser(config.codebook_size, depth)
        else:
            self.to_bottleneck = nn.Conv2d(depth, config.codebook_size, 1)
            self.bottleneck = GumbelQuantiser(config.codebook_size, depth)
        self.from_bottleneck = nn.Conv2d(depth, depth, 1)
        self.decoder = Decoder(config) if vision is None else PatchDecoder(vision, config.latent_size, depth)

    def forward(self, images: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> Reconstruction:
        """Encode and decode images, for training.

        Args:
            images: [B, 3, S, S] in [-1, 1].
            noise: [B, D, s, s] standard normal for kl; [B, K, s, s] standard Gumbel for gumbel; see `draw_noise`. None uses the
                mean, or the likeliest code without relaxation.
            temperature: of the Gumbel-softmax; ignored by the others.
        """
        encoded = self.to_bottleneck(self.encoder(images))  # [B, 2 D or D or K, s, s]
        squeezed = self.bottleneck(encoded, noise, temperature)
        hidden = self.decoder.hidden(self.from_bottleneck(squeezed.latents))  # [B, C, S / p, S / p]
        reconstructed = self.decoder.images(hidden)  # [B, 3, S, S]
        _, penalty, encodings, codes, errors = squeezed
        return Reconstruction(reconstructed, penalty, encodings.detach(), codes, errors, hidden.detach())

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, D, s, s] of images [B, 3, S, S] in [-1, 1]: the mean of the posterior (kl), or the vectors of the chosen
        codes. Deterministic.

        Raises:
            ShapeError: the images are no multiples of f in size.
        """
        return self.bottleneck(self._encode(images)).latents  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, S, S], in [-1, 1] but for small errors, of latents [B, D, s, s] as from `encode`.

        Raises:
            ShapeError: the latents have other channels.
        """
        depth = self.config.latent_channels
        if latents.dim() != 4 or latents.shape[1] != depth:
            raise ShapeError(f"decode: got latents {tuple(latents.shape)}, expected [B, {depth}, s, s].")
        return self.decoder(self.from_bottleneck(latents))  # type: ignore[no-any-return]

    def tokens(self, images: Tensor) -> Tensor:
        """Codes [B, s * s] int64 of images [B, 3, S, S] in [-1, 1], row by row.

        Raises:
            ConfigError: the bottleneck is kl, which has no codes.
            ShapeError: the images are no multiples of f in size.
        """
        self._check_codes("tokens")
        codes: Tensor | None = self.bottleneck(self._encode(images)).codes
        assert codes is not None
        return codes

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Images [B, 3, S, S] of codes [B, s * s] int64, row by row; of a square image.

        Raises:
            ConfigError: the bottleneck is kl, which has no codes.
            ShapeError: the number of codes is no square, or a code is not in [0, K).
        """
        self._check_codes("decode_tokens")
        assert not isinstance(self.bottleneck, KlBottleneck)
        size = round(tokens.shape[-1] ** 0.5)
        if tokens.dim() != 2 or size * size != tokens.shape[1]:
            raise ShapeError(f"decode_tokens: got {tuple(tokens.shape)}, expected [B, s * s] codes of square images.")
        largest = self.config.codebook_size - 1
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) <= largest:
            raise ShapeError(
                f"decode_tokens: got codes from {int(tokens.min())} to {int(tokens.max())}, expected 0 to {largest}."
            )
        vectors = self.bottleneck.vectors(tokens)  # [B, ss, D]
        return self.decode(vectors.transpose(1, 2).reshape(len(tokens), -1, size, size))

    def draw_noise(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """Noise for `forward`, on the generator's device; None for vq, which needs none."""
        config, size = self.config, self.config.latent_size
        if config.bottleneck == "kl":
            shape = (batch, config.latent_channels, size, size)
            return torch.randn(shape, generator=generator, device=generator.device)
        if config.bottleneck == "gumbel":
            shape = (batch, config.codebook_size, size, size)
            uniform = torch.rand(shape, generator=generator, device=generator.device)
            tiny = torch.finfo(uniform.dtype).tiny
            return -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
        return None

    def _encode(self, images: Tensor) -> Tensor:
        factor = self.config.factor
        fits = images.dim() == 4 and images.shape[1] == 3 and not any(size % factor for size in images.shape[2:])
        if not fits:
            raise ShapeError(
                f"encode: got images {tuple(images.shape)}, expected [B, 3, H, W] with H and W multiples of {factor}."
            )
        return self.to_bottleneck(self.encoder(images))  # type: ignore[no-any-return]

    def _check_codes(self, where: str) -> None:
        if not self.config.has_codes:
            raise ConfigError(
                f"{where}: got an autoencoder with bottleneck = 'kl', which has no codes. Train one with 'vq' or 'gumbel'."
            )


class Judged(NamedTuple):
    """Result of a forward pass in training together with a discriminator."""

    reconstruction: Reconstruction
    copies: Tensor | None = None
    """[B, 3, S, S], the reconstructions as the discriminator read them: without the autoencoder's graph, so that gradients with
    respect to them end here. None if the discriminator did not judge."""
    logits: Tensor | None = None
    """[2 B, 1, h, h], logits of the images, then of the copies."""


class AdversarialAutoencoder(Autoencoder):
    """Autoencoder and the discriminator that it is trained with, as one network for the trainer."""

    def __init__(self, config: AutoencoderConfig, discriminator: DiscriminatorConfig) -> None:
        """Raises:
        ConfigError: the images are too small for the discriminator.
        """
        super().__init__(config)
        smallest = discriminator.smallest_image
        expected = f"fewer layers, as {smallest} pixels are the smallest images of so many and image_size is {config.image_size}"
        require(config.image_size >= smallest, "discriminator.num_layers", discriminator.num_layers, expected)
        self.discriminator = Discriminator(discriminator)

    def forward(  # type: ignore[override]
        self, images: Tensor, noise: Tensor | None = None, temperature: float = 1.0, judges: bool = False
    ) -> Judged:
        """Args: as for `Autoencoder`; judges: let the discriminator read the images and their reconstructions."""
        found = super().forward(images, noise, temperature)
        if judges:
            copies = found.images.detach().float().requires_grad_(torch.is_grad_enabled())
            return Judged(found, copies, self.discriminator(torch.cat([images, copies])))
        if self.training:
            # All weights must get gradients on all ranks: those of the discriminator get zeros, for the price of one small image.
            size = self.discriminator.config.smallest_image
            nothing = self.discriminator(images.new_zeros(1, 3, size, size)).sum() * 0
            found = found._replace(penalty=found.penalty + nothing)
        return Judged(found)


class Encoder(nn.Module):
    """Network from images [B, 3, S, S] to [B, out_channels, s, s]."""

    def __init__(self, config: AutoencoderConfig, out_channels: int) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        resolution, width = config.image_size // config.patch_size, widths[0]
        self.patch_size = config.patch_size
        self.input = nn.Conv2d(3 * config.patch_size**2, width, 3, padding=1)
        self.blocks = nn.ModuleList()
        for level, level_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                attend = resolution in config.attention_resolutions
                self.blocks.append(Block(width, level_width, groups, attend))
                width = level_width
            if level < len(widths) - 1:
                self.blocks.append(Downsample(width))
                resolution //= 2
        self.middle = nn.ModuleList(
            [Block(width, width, groups, config.middle_attention), Block(width, width, groups, False)]
        )
        self.output = nn.Sequential(
            GroupNorm(groups, width, NORM_EPS), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1)
        )

    def forward(self, images: Tensor) -> Tensor:
        # convolutions are fastest in this layout, even if the weights are not stored in it, as in shards
        patches = F.pixel_unshuffle(images, self.patch_size)  # [B, 3 p p, S / p, S / p]
        h = self.input(patches.contiguous(memory_format=torch.channels_last))  # [B, C, S / p, S / p]
        for block in (*self.blocks, *self.middle):
            h = block(h)
        return self.output(h)  # type: ignore[no-any-return]  # [B, out_channels, s, s]


class Decoder(nn.Module):
    """Network from latents [B, D, s, s] to images [B, 3, S, S]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        resolution, width = config.latent_size, widths[-1]
        self.input = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.middle = nn.ModuleList(
            [Block(width, width, groups, config.middle_attention), Block(width, width, groups, False)]
        )
        self.blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                attend = resolution in config.attention_resolutions
                self.blocks.append(Block(width, level_width, groups, attend))
                width = level_width
            if level > 0:
                self.blocks.append(Upsample(width))
                resolution *= 2
        self.patch_size = config.patch_size
        self.norm = GroupNorm(groups, width, NORM_EPS)
        self.output = nn.Conv2d(width, 3 * config.patch_size**2, 3, padding=1)

    def hidden(self, latents: Tensor) -> Tensor:
        """Input [B, C, S / p, S / p] of the last convolution."""
        h = self.input(latents.contiguous(memory_format=torch.channels_last))  # [B, C, s, s]
        for block in (*self.middle, *self.blocks):
            h = block(h)
        return F.silu(self.norm(h)).to(h.dtype)  # [B, C, S / p, S / p]

    def images(self, hidden: Tensor) -> Tensor:
        """Images [B, 3, S, S] from the input [B, C, S / p, S / p] of the last convolution."""
        patches: Tensor = self.output(hidden)  # [B, 3 p p, S / p, S / p]
        return patches if self.patch_size == 1 else F.pixel_shuffle(patches, self.patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.images(self.hidden(latents))  # [B, 3, S, S]


class Block(nn.Module):
    """Residual block and, if wanted, attention over all pixels: [B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(self, in_width: int, out_width: int, groups: int, attend: bool) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_width, NORM_EPS)
        self.conv1 = Conv3x3(in_width, out_width)
        self.norm2 = GroupNorm(groups, out_width, NORM_EPS)
        self.conv2 = Conv3x3(out_width, out_width)
        self.skip = nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, 1)
        self.attend = PixelAttention(out_width, groups) if attend else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)).to(x.dtype))  # [B, C_out, H, W]
        h = self.conv2(F.silu(self.norm2(h)).to(h.dtype))  # [B, C_out, H, W]
        h = self.skip(x) + h
        return h if self.attend is None else self.attend(h)  # type: ignore[no-any-return]


class PixelAttention(nn.Module):
    """Self-attention over pixels with one head and a residual connection. Source: Esser et al. 2021, Table 7."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, width, NORM_EPS)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = self.to_qkv(pixels).unsqueeze(1).chunk(3, dim=3)  # 3 x [B, 1, HW, C]
        attended = self.to_out(attention(q, k, v)[:, 0])  # [B, HW, C]
        return x + attended.transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Convolution of stride 2, padded below and at the right only: [B, C, H, W] -> [B, C, H / 2, W / 2]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Pixels repeated twice in both directions, then a convolution: [B, C, H, W] -> [B, C, 2 H, 2 W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv3x3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # type: ignore[no-any-return]

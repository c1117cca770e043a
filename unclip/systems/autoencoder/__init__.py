"""Autoencoders of images, for systems that sample latents or tokens instead of pixels; see `unclip.models.autoencoder`."""

from unclip.systems.autoencoder.part import AUTOENCODER, AutoencoderStageConfig

__all__ = ["AUTOENCODER", "AutoencoderStageConfig"]

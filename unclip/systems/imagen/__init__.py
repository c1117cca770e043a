"""Imagen: a base network turns captions, read by a frozen text encoder, into small images; upsamplers that read them too enlarge
these.

Source: Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding".
"""

from unclip.systems.imagen.stack import SYSTEM

__all__ = ["SYSTEM"]

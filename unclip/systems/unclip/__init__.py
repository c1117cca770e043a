"""unCLIP: a prior from captions to CLIP image embeddings, a decoder to small images, upsamplers to large ones.

Source: Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents".
"""

from unclip.systems.unclip.stack import SYSTEM

__all__ = ["SYSTEM"]

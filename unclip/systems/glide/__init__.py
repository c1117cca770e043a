"""GLIDE: a text-conditional diffusion model turns captions into small images; upsamplers enlarge them.

Source: Nichol et al. 2022, "GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models".
"""

from unclip.systems.glide.stack import SYSTEM

__all__ = ["SYSTEM"]

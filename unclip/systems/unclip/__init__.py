"""unCLIP: a prior turns captions into CLIP image embeddings, a decoder these into small images; upsamplers enlarge them.

Source: Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents".
"""

from unclip.systems.unclip.stack import SYSTEM

__all__ = ["SYSTEM"]

"""Guided diffusion (ADM): a class-conditional denoiser, and a classifier of noised images that guides it to the class.

Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis".
"""

from unclip.systems.image_stack import PARTS, SHORTCUTS, ImageStackSampling, ImageStack
from unclip.systems.system import SystemSpec

SYSTEM = SystemSpec("guided_diffusion", PARTS, ImageStackSampling, ImageStack.load, SHORTCUTS)

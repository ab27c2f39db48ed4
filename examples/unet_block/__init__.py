"""A residual block of Stable Diffusion's UNet in Flax, its two GroupNorm + SiLU being one jaxnorm call each.

Run it with ``python -m examples.unet_block``: forward and gradient beside the same block with ``flax.linen.GroupNorm``.

    model       the block; the norm is a choice, the parameters are the same
    comparison  outputs and gradients of the two against float32, and what a call takes
    cli         the command line
"""

"""LiT, the linear diffusion transformer (arXiv 2501.12976): a DiT that inherits everything but its self-attention."""

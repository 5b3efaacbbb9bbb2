"""Linear attention written for one kind of device: `tpu` (Mosaic) and `hopper` (Mosaic GPU). `lit_jax.linear_attention` is the way in."""

"""TinyCLIP (arXiv 2309.12314): affinity mimicking and weight inheritance for CLIP models."""

"""Weights from a data set (D2NWG, arXiv 2402.18153): a zoo of trained networks, latent diffusion over weights."""

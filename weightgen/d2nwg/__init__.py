"""The system that D2NWG (arXiv 2402.18153) released, to compare with: a VAE of weight vectors and a UNet."""

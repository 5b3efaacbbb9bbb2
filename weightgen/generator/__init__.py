"""The generator of weights: latent diffusion over tokens, given a condition."""

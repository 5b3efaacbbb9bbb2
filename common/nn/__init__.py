"""Building blocks of the models: each layer declares the axes of its parameters."""

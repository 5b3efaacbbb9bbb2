"""Code that all methods share: surgery, layers, checkpoints, training, data, evaluation."""

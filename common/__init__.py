"""What every method of heirloom stands on: surgery, models, training, data, evaluation."""

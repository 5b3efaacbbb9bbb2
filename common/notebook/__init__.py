"""What the packages share for use from Python: loaded models and runs that show themselves in a notebook."""

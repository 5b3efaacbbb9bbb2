"""Image-text sources, transforms, tokenizer and the input pipeline."""

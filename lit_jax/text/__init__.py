"""Text encoders: what turns prompts into the features that a text-to-image transformer attends to."""

"""The Vision Transformer of timm and DeiT, with its options, genes, and foreign names: of classifiers and of CLIPs."""

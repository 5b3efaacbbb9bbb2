"""SWS (arXiv 2404.16897): one auxiliary ViT is trained with a few shared blocks, which then start ViTs of any depth."""

"""Live references: models that transformers makes and reads; skipped where torch is not installed."""

import pytest


@pytest.fixture(scope="session")
def seeded():
    """Draw every parameter away from its tiny initial value, so that a wrong activation or epsilon shows."""
    import torch

    def draw(model: torch.nn.Module, seed: int) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim == 1 and name.endswith("bias"):
                    p.normal_(0, 0.1, generator=generator)
                elif p.ndim == 1 and name.endswith("weight"):
                    p.normal_(1, 0.1, generator=generator)
                elif p.ndim >= 2:
                    p.mul_(2.0)
        return model.eval()

    return draw


@pytest.fixture(scope="session")
def small(seeded):
    """A CLIP of two layers with heads of 64, as the bare formats want it."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    shared = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, hidden_act="gelu")
    text = shared | dict(vocab_size=99, max_position_embeddings=16, eos_token_id=98)
    image = shared | dict(image_size=64, patch_size=32)
    torch.manual_seed(0)
    return seeded(CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=32)), 0)


@pytest.fixture(scope="session")
def drawn():
    """`drawn(cfg, folder)`: a weights folder of our ViT with numbers far from their initial values."""
    import numpy as np

    from heirloom.common.checkpoint import weights
    from heirloom.common.nn.functional import functional
    from heirloom.common.vit.model import Vit

    def draw(cfg, folder):
        rng, spec = np.random.default_rng(0), functional(Vit, cfg).spec
        scale = {p: leaf.extent("read") ** -0.5 if p.endswith("kernel") else 0.2 for p, leaf in spec.items()}
        folder.mkdir()
        weights.write_params(
            folder, {p: (scale[p] * rng.standard_normal(leaf.shape)).astype(np.float32) for p, leaf in spec.items()}
        )
        weights.write_config(folder, "learngene", cfg)
        return folder

    return draw

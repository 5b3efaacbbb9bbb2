"""Writes a small PixArtSigmaPipeline with random weights, as diffusers saves it."""

import json
from pathlib import Path

WORDS = "a red apple on the table two dogs and cats in snow with blue sky green tree house photo of painting old man"


def write_pipeline(folder: Path) -> Path:
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=3,
        cross_attention_dim=96,
        sample_size=32,
        caption_channels=40,
        use_additional_conditions=False,
        interpolation_scale=0.5,
    )
    with torch.no_grad():
        for name, value in transformer.named_parameters():
            value.copy_(torch.randn(value.shape) * (0.3 if "table" in name else 0.08))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.13025,
        sample_size=256,
    )
    sizes = dict(vocab_size=384, d_model=40, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    text_encoder = transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))
    diffusers.PixArtSigmaPipeline(
        tokenizer=transformers.T5Tokenizer(vocab=small_vocabulary(), extra_ids=100),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)
    return folder


def small_vocabulary() -> list[tuple[str, float]]:
    """A unigram vocabulary of some words, with T5's three special tokens first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    metaspace = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    words = WORDS.split()
    lines = [" ".join(words[i:] + words[:i]) for i in range(len(words))] * 3
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        lines, trainers.UnigramTrainer(vocab_size=180, special_tokens=special, unk_token="<unk>")
    )
    return [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]

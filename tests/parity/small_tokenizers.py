"""Small tokenizers of SigLIP's, SigLIP 2's and MetaCLIP 2's kind, as the folders that transformers reads."""

import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from heirloom.common.data.sentencepiece import read_sentencepiece

SPIECE = Path(__file__).parents[1] / "golden" / "t5_tokenizer" / "spiece.model"
CAPTIONS = [
    "", "  ", "a photo of a cat", "A PHOTO of two Dogs!", " a red fox", "- a dog", "a_b more-or-less", "!!!", "\u2026",
    "caf\u00e9 CAFE\u0301", "a cat\U0001f600 dog", "\u4e2d\u6587 a \u4e2d cat", "<strong>red</strong> &amp; blue",
    "fox " * 60, "\u039f\u0394\u039f\u03a3 \u03a3\u0391\u03a3", "\u3000wide", "a\u00a0b\tc\x1cd", "\u2581\u2581cat",
    "cat \u2581", "\ufb01re", "\uff21", "\u0130stanbul", "it's 10 o'clock", "caf\u00c3\u00a9",
]  # fmt: skip
SPECIAL = ["</s>", "a </s> cat", "<unk> cat", "<pad>", "<eos> dog"]


def siglip(folder: Path) -> Path:
    """A spiece.model, which SiglipTokenizer reads."""
    shutil.copy(SPIECE, folder)
    return _about(folder, tokenizer_class="SiglipTokenizer", pad_token="</s>", model_input_names=["input_ids"])


def siglip2(folder: Path, kind: str = "Siglip2Tokenizer", **about: object) -> Path:
    """Gemma's kind: BPE that falls back to bytes."""
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    ends = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    names = [*ends, *(f"<0x{i:02X}>" for i in range(256))]
    captions = ["a photo of a cat", "two dogs and a red fox", "A PHOTO of two Dogs", "CAFE"] * 4
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=names, show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    whole = json.loads(bpe.to_str())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] in ends]
    bpe = tokenizers.Tokenizer.from_str(json.dumps(whole))
    bpe.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    bpe.save(str(folder / "tokenizer.json"))
    return _about(folder, **(dict(tokenizer_class=kind, padding_side="right", pad_token="<pad>") | about))


def metaclip2(folder: Path) -> Path:
    """XLM-R's kind: Unigram, a start token, and other ids for the special ones."""
    spiece = read_sentencepiece(SPIECE)
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*((name, 0.0) for name in names), *spiece.pieces[3:], ("<mask>", 0.0)]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    unigram.normalizer = normalizers.Precompiled(spiece.charsmap)
    words = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    unigram.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    unigram.decoder = decoders.Metaspace()
    unigram.add_special_tokens([*names, tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    ends = [("<s>", 0), ("</s>", 2)]
    unigram.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    unigram.save(str(folder / "tokenizer.json"))
    return _about(folder, tokenizer_class="XLMRobertaTokenizer", pad_token="<pad>")


def _about(folder: Path, **about: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(about | dict(model_max_length=64)))
    return folder

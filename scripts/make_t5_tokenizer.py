"""Write tests/golden/t5_tokenizer: a small SentencePiece vocabulary as T5's are, and what SentencePiece makes of texts.

    pip install sentencepiece==0.2.3
    python scripts/make_t5_tokenizer.py
"""

import json
import random
import tempfile
from pathlib import Path

import sentencepiece

GOLDENS = Path(__file__).parent.parent / "tests" / "golden" / "t5_tokenizer"
WORDS = "a an the red blue small big old photo painting drawing of in on with cat dog fox house tree snow Rain Moon 85"
RULES = {"\ufb01": "fi", "\u00a0": " ", "\t": " ", "\n": " ", "\u3000": " ", "e\u0301": "\u00e9", "\uff21": "A"}
TEXTS = [
    "", " ", "a photo of a cat", "A PHOTO OF A CAT", "  a  red   fox ", "fox\tin\nsnow", "\ufb01re in the house",
    "\u4e2d\u6587", "a \u4e2d cat", "cat\U0001f600dog", "caf\u00e9 cafe\u0301", "zebra quiz", "no\u00a0break",
    "\u3000wide", "\uff21", "85mm, f/1.8!", "-", "...", "unbelievablylongwordwithoutspaces" * 4,
]  # fmt: skip


def main() -> None:
    """Trains on seeded captions, with few pieces and few rules of normalisation, so that the file is small."""
    rng, words = random.Random(0), WORDS.split()
    captions = [" ".join(rng.choices(words, k=8)) for _ in range(400)]
    GOLDENS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "captions.txt").write_text("\n".join(captions))
        rows = ("\t".join(" ".join(f"{ord(c):x}" for c in side) for side in rule) for rule in RULES.items())
        (Path(folder) / "rules.tsv").write_text("\n".join(rows) + "\n")
        sentencepiece.SentencePieceTrainer.train(
            input=f"{folder}/captions.txt", model_prefix=f"{folder}/spiece", vocab_size=110, model_type="unigram",
            normalization_rule_tsv=f"{folder}/rules.tsv", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            hard_vocab_limit=False, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", minloglevel=2,
        )  # fmt: skip
        model = (Path(folder) / "spiece.model").read_bytes()
    (GOLDENS / "spiece.model").write_bytes(model)
    spiece = sentencepiece.SentencePieceProcessor(model_proto=model)
    expected = [[text, [*spiece.encode(text), spiece.eos_id()]] for text in TEXTS]
    found = {"size": spiece.get_piece_size(), "ids": expected}
    (GOLDENS / "expected.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

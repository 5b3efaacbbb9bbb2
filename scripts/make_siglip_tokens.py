"""Write tests/golden/t5_tokenizer/siglip.json: the ids that transformers' SiglipTokenizer makes of captions.

    pip install sentencepiece==0.2.3 transformers==5.23.0
    python scripts/make_siglip_tokens.py
"""

import json
import sys
import tempfile
from pathlib import Path

from transformers import SiglipTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "parity"))
from small_tokenizers import CAPTIONS, SPECIAL, SPIECE, siglip

LENGTH = 24


def main() -> None:
    """Special tokens in a caption are read as text (`split_special_tokens`), as heirloom does."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = SiglipTokenizer.from_pretrained(siglip(Path(folder)))
        captions = [*CAPTIONS, *SPECIAL]
        made = theirs(captions, padding="max_length", max_length=LENGTH, truncation=True, split_special_tokens=True)
    rows = [[caption, ids] for caption, ids in zip(captions, made["input_ids"], strict=True)]
    SPIECE.with_name("siglip.json").write_text(json.dumps(rows, indent=None).replace("], [\"", "],\n[\"") + "\n")


if __name__ == "__main__":
    main()

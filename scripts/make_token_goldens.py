"""Write tests/golden/clip_tokens.json: what open_clip's own tokenizer makes of strings chosen to be awkward.

    pip download --no-deps open-clip-torch==3.3.0 && unzip open_clip_torch-*.whl
    python scripts/make_token_goldens.py open_clip/tokenizer.py

Needs torch, ftfy and regex; loads that one file alone, with its vocabulary beside it.
"""

import importlib.util
import json
import sys
from pathlib import Path

GOLDENS = Path(__file__).parent.parent / "tests" / "golden" / "clip_tokens.json"

TEXTS = [
    "",
    " ",
    "\t \n  ",
    "a photo of a cat",
    "A Photo Of A CAT.",
    "  leading,   inner\tand trailing\nwhite space \r\n ",
    "it's they're we've I'm she'll he'd don't",
    "IT'S THEY'RE WE'VE",
    "'s 't 're 've 'm 'll 'd",
    "rock 'n' roll, dogs' bowls, ''quoted'' it''s",
    "it\u2019s a \u201cquoted\u201d \u2018phrase\u2019",
    "'\u017f and '\u017ft",
    "1234567890",
    "3.14159 x 10^-8, 50% off, $1,299.00",
    "route66 mp3 4k b2b h2o",
    "\u0661\u0662\u0663 \u2160\u2161 \u00bd \u00b2 \u2460",
    "snake_case kebab-case camelCase path/to/file.png",
    "http://www.example.com/?q=a&b=c#frag",
    "user@example.com #hashtag @mention",
    "!!! ??? ... --- *** ~~~",
    "!?!?;:,.-_=+()[]{}<>|\\/`'\"",
    "wow!!!s 'stop' !!'s",
    "salt &amp; pepper",
    "salt &amp;amp; pepper",
    "&lt;b&gt;bold&lt;/b&gt; &quot;x&quot; &#39;y&#39; &nbsp; &eacute; &#x1F600;",
    "&amp;lt;tag&amp;gt; &notanentity; &copy 2021",
    "caf\u00e9 na\u00efve r\u00e9sum\u00e9 \u00fcber \u00c5ngstr\u00f6m",
    "cafe\u0301 decomposed",
    "schÃ¶n mojibake â€œquoteâ€\x9d",
    "Stra\u00dfe STRASSE \u1e9e",
    "\u0130stanbul I\u0131 \u0130\u0130",
    "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u039f\u0394\u039f\u03a3",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \uff76\uff80\uff76\uff85",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\U0001f600\U0001f602\U0001f923",
    "a \U0001f44d\U0001f3fd thumbs up",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "flag \U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea \u2764\ufe0f #\ufe0f\u20e3",
    "\ufb01ne \ufb02ow \uff26\uff55\uff4c\uff4c\uff57\uff49\uff44\uff54\uff48",
    "\u212a\u212b \u2126 \u00b5 \u03bc",
    "zero\u200bwidth non\u00a0breaking thin\u2009space ideographic\u3000space",
    "soft\u00adhyphen bom\ufeff word\u2060joiner",
    "control \x00\x01\x07 bytes \x1b[31mred\x1b[0m",
    "\x1c\x1d\x1e\x1f \x85 \u2028 \u2029 separators",
    "\ufffd replacement",
    "math \u2211\u222b\u2202 \u2260 \u2264 \u221e \U0001d54f \U0001d4d0",
    "\u20ac\u00a3\u00a5 \u00a9\u00ae\u2122 \u00a7\u00b6\u2020",
    "arrows \u2190\u2191\u2192\u2193 box \u2500\u2502\u250c",
    "floccinaucinihilipilification pneumonoultramicroscopicsilicovolcanoconiosis",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "hahahahahahaha nananananananana abababab",
    "x" * 300,
    "the quick brown fox jumps over the lazy dog " * 20,
    "a, b, c, " * 40,
    "\u65e5" * 120,
    " ".join(str(i) for i in range(75)),
    "one two three " * 25,
    "\U0001f600" * 90,
]


def main(tokenizer_file: str) -> None:
    spec = importlib.util.spec_from_file_location("reference", tokenizer_file)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    rows = [
        {"text": text, "context": context, "ids": reference.tokenize(text, context)[0].tolist()}
        for context, texts in ((77, TEXTS), (16, TEXTS[::4]))
        for text in texts
    ]
    for row in rows:  # trailing zeros are implied by the context
        while row["ids"][-1] == 0:
            row["ids"].pop()
    GOLDENS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} rows to {GOLDENS}")


if __name__ == "__main__":
    main(sys.argv[1])

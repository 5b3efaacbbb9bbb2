"""Builds HTML in which every text is escaped: only `Html` is not, and only `tag` and `picture` make it."""

import base64
import html
import io
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

LARGE = 300_000  # bytes from which a picture is scaled down and written as JPEG
WIDEST = 1200  # pixels, of a large picture
SMALL = 320  # pixels: a narrower picture is enlarged by a whole factor, up to this width


class Html(str):
    """A piece of finished HTML."""


Child = str | Iterable[str]


def tag(name: str, *children: Child, **attributes: str) -> Html:
    """Returns an element; `class_` is the attribute class. Children that are not `Html` are escaped."""
    given = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Returns children, and the children of lists among them, in order; those that are not `Html` are escaped."""
    out = []
    for child in children:
        if isinstance(child, Html):
            out.append(str(child))
        elif isinstance(child, str):
            out.append(html.escape(child))
        else:
            out.append(join(child))
    return Html("".join(out))


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> Html:
    """Returns a table that scrolls by itself where it is wider than the page. numbers: headers aligned to the right."""
    sides = ["n" if header in numbers else "" for header in headers]
    head = tag("tr", [tag("th", header, class_=side) for header, side in zip(headers, sides, strict=True)])
    body = [tag("tr", [tag("td", x, class_=side) for x, side in zip(row, sides, strict=True)]) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="wide")


def folded(summary: str, *children: Child) -> Html:
    """Returns what opens with a click."""
    return tag("details", tag("summary", summary), *children)


def picture(file: Path, caption: str) -> Html:
    """Returns a figure with the picture in it. A large one is scaled down, a small one enlarged without blur."""
    data, kind = file.read_bytes(), "png"
    width = struct.unpack(">I", data[16:20])[0] if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 20 else 0
    if not width:
        return tag("figure", tag("p", "this picture cannot be read", class_="none"), tag("figcaption", caption))
    if len(data) > LARGE:
        data, kind = _scaled(data), "jpeg"
    zoom = max(1, SMALL // width)
    return tag(
        "figure",
        _image(data, f"image/{kind}", caption, f"width:{width * zoom}px" + (";image-rendering:pixelated" * (zoom > 1))),
        tag("figcaption", caption),
    )


def drawing(svg: bytes, alt: str) -> Html:
    """Returns a picture in SVG; as a picture, nothing in it can run."""
    return _image(svg, "image/svg+xml", alt, "width:100%")


def _image(data: bytes, kind: str, alt: str, style: str) -> Html:
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return Html(f'<img alt="{html.escape(alt)}" style="{style}" src="{source}">')


def _scaled(png: bytes) -> bytes:
    from PIL import Image

    image, out = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    image.thumbnail((WIDEST, 8 * WIDEST))
    image.save(out, format="JPEG", quality=88)
    return out.getvalue()


def document(title: str, *children: Child) -> str:
    """Returns a whole page."""
    start = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    view = '<meta name="viewport" content="width=device-width,initial-scale=1">'
    return f"{start}{view}{tag('title', title)}{STYLE}</head>\n<body>{join(children)}</body></html>\n"


STYLE = """<style>
:root{color-scheme:light}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color:#1f2328;
background:#fff;max-width:1200px;margin:0 auto;padding:1.5rem 1rem 3rem;overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2rem 0 .6rem;padding-bottom:.25rem;border-bottom:1px solid #d8dee4}
p{margin:.3rem 0}.lead{color:#57606a}.none{color:#8a4b08}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,10.5rem),1fr));gap:.6rem 1.5rem;margin:1rem 0}
dl>div{min-width:0}dl>.all{grid-column:1/-1}
dt{color:#57606a;font-size:.8rem}dd{margin:0;overflow-wrap:anywhere}
code,pre{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{background:#f6f8fa;padding:.75rem;overflow-x:auto;margin:.5rem 0;border-radius:6px}
.command{white-space:pre-wrap;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.93rem}
th{text-align:left;font-weight:600;color:#57606a;white-space:nowrap}
th,td{padding:.25rem .9rem .25rem 0;vertical-align:top}
td{border-top:1px solid #eaeef2}.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1rem}
figure{margin:0;min-width:0}img{max-width:100%;height:auto;display:block}figcaption{color:#57606a;font-size:.87rem}
.grid.pictures{grid-template-columns:repeat(auto-fill,minmax(min(100%,16rem),1fr))}
.chart{display:flex;flex-direction:column;border:1px solid #d8dee4;border-radius:6px;padding:.6rem .6rem .3rem}
.chart img{margin-top:auto}.chart h3{font-size:.95rem;margin:0;overflow-wrap:anywhere}
.keys{display:flex;flex-wrap:wrap;gap:0 .9rem;font-size:.83rem;color:#57606a;margin:.1rem 0 .3rem}
.keys span{overflow-wrap:anywhere}
.keys i{display:inline-block;width:.9rem;height:.2rem;margin-right:.3rem;vertical-align:middle;
border-radius:2px}
.keys b{color:#1f2328;font-weight:600}
details{margin:.6rem 0}summary{cursor:pointer;color:#0b5cad}
ol{margin:.4rem 0;padding-left:1.6rem;columns:14rem}
</style>"""

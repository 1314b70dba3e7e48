"""A document as one HTML file that needs nothing else: no script, no network, no second file.

Names in a model come from outside, so every text is escaped, and a content security policy forbids everything but the
page's own style sheet, in case that something is missed.
"""

from __future__ import annotations

from html import escape

from onnxcompress.pages.document import Block, Code, Details, Document, Figure, Section, Table, Text, Tiles
from onnxcompress.units import printable

__all__ = ["to_html"]

_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #fff; --tint: #f6f8fa;
  --good: #005f73; --bad: #9b2226; --warn: #7a4f01; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 60rem; overflow-wrap: anywhere; }
.soft, figcaption, .caption { color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); } .warning { color: var(--warn); }
p.good, p.bad, p.warning { border-left: 4px solid currentColor; padding: .3rem .75rem; background: var(--tint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.2rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; background: var(--tint); }
.tile .label { color: var(--soft); font-size: .85rem; }
.tile .value { font-size: 1.35rem; font-weight: 650; line-height: 1.3; overflow-wrap: anywhere; }
.tile .note { font-size: .85rem; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 36rem)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .75rem; break-inside: avoid; }
figure h3 { font-size: 1rem; margin: 0 0 .25rem; }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: .85rem; margin-top: .25rem; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
.caption { font-size: .85rem; margin-top: -.4rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
th { border-bottom: 2px solid var(--line); font-weight: 600; white-space: nowrap; }
th.text, td.text { text-align: left; }
td.text { min-width: 5rem; max-width: 34rem; overflow-wrap: break-word; }
td.text + td.text:last-child { overflow-wrap: anywhere; min-width: 11rem; }
tbody tr:nth-child(even) { background: var(--tint); }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: .75rem; overflow-x: auto;
  font-size: .85rem; }
details { margin: .5rem 0; } summary { cursor: pointer; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .85rem; border-top: 1px solid var(--line); }
@media (max-width: 40rem) {
  body { padding: .8rem; font-size: 15px; } h1 { font-size: 1.3rem; }
  th, td { padding: .3rem .45rem; } .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tile .value { font-size: 1.2rem; } figure { padding: .4rem; border: 0; }
}
@media print {
  @page { margin: 14mm; } body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2 { break-after: avoid; } .tile, figure, tr { break-inside: avoid; } .scroll { overflow: visible; }
  .tile, p.good, p.bad, p.warning, tbody tr:nth-child(even), pre { background: none; }
  .figures { grid-template-columns: 1fr 1fr; } table { font-size: 8.5pt; } pre { white-space: pre-wrap; }
  th, td { padding: .2rem .4rem; } th { white-space: normal; } td.text { min-width: 0; }
}
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def to_html(document: Document, footer: str) -> str:
    """``document`` as one HTML file, with ``footer`` below it."""
    body = "\n".join(_section(section) for section in document.sections)
    return (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(document.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{_text(document.title)}</h1>\n<p class="soft">{_text(document.subtitle)}</p>\n</header>\n'
        f"<main>\n{body}\n</main>\n<footer><p>{_text(footer)}</p></footer>\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _section(section: Section) -> str:
    return f"<section>\n<h2>{_text(section.title)}</h2>\n{_blocks(section.blocks)}\n</section>"


def _blocks(blocks: tuple[Block, ...]) -> str:
    """Figures that follow each other stand side by side where there is room."""
    parts: list[str] = []
    figures: list[str] = []
    for block in (*blocks, None):
        if isinstance(block, Figure):
            figures.append(_figure(block))
            continue
        if figures:
            parts.append('<div class="figures">\n' + "\n".join(figures) + "\n</div>")
            figures = []
        if block is not None:
            parts.append(_block(block))
    return "\n".join(parts)


def _block(block: Block) -> str:
    match block:
        case Text():
            return f'<p class="{block.tone}">{_text(block.text)}</p>'
        case Tiles():
            tiles = "\n".join(
                f'<div class="tile"><div class="label">{_text(tile.label)}</div>'
                f'<div class="value {tile.tone}">{_text(tile.value)}</div>'
                f'<div class="note">{_text(tile.note)}</div></div>'
                for tile in block.tiles
            )
            return f'<div class="tiles">\n{tiles}\n</div>'
        case Table():
            return _table(block)
        case Code():
            return f"<pre>{escape(_lines(block.text))}</pre>"
        case Details():
            return f"<details><summary>{_text(block.summary)}</summary>\n{_blocks(block.blocks)}\n</details>"
        case Figure():
            return _figure(block)


def _lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{_text(figure.caption)}</figcaption>" if figure.caption else ""
    return f"<figure><h3>{_text(figure.title)}</h3>\n{figure.svg()}\n{caption}</figure>"


def _table(table: Table) -> str:
    def cells(tag: str, row: tuple[str, ...]) -> str:
        kinds = ("text" if index in table.text_columns else "number" for index in range(len(row)))
        return "".join(f'<{tag} class="{kind}">{_text(cell)}</{tag}>' for kind, cell in zip(kinds, row, strict=True))

    caption = f'\n<p class="caption">{_text(table.caption)}</p>' if table.caption else ""
    rows = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    head = f"<thead><tr>{cells('th', table.columns)}</tr></thead>"
    return f'<div class="scroll"><table>{head}\n<tbody>\n{rows}\n</tbody></table></div>{caption}'

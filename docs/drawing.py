"""What the scripts that draw pictures share: an SVG, written without a library."""

from __future__ import annotations

from html import escape

MONO = 'font-family="ui-monospace, monospace" font-size="13"'
PLAIN, DATA, PAD, HEAD = "#fff", "#fff3d6", "#e5e7eb", "#eef4ff"


class Drawing:
    """Boxes, text and arrows on white: legible on a dark page, too."""

    def __init__(self, title: str, text: str, width: int, height: int) -> None:
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-labelledby="title desc" '
            'font-family="system-ui, sans-serif" font-size="14">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(text)}</desc>',
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0 10 5 0 10z" fill="#334"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
        ]

    def box(self, x: int, y: int, width: int, text: str, fill: str = PLAIN, height: int = 26) -> None:
        self.lines.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="#667"/>'
        )
        middle = y + height // 2 + 5
        self.lines.append(f'<text x="{x + 8}" y="{middle}" {MONO}>{escape(text)}</text>')

    def text(self, x: int, y: int, text: str, small: bool = False, bold: bool = False) -> None:
        style = ' font-size="12" fill="#445"' if small else ""
        style += ' font-weight="600"' if bold else ""
        self.lines.append(f'<text x="{x}" y="{y}"{style}>{escape(text)}</text>')

    def arrow(self, path: str) -> None:
        self.lines.append(
            f'<path d="{path}" fill="none" stroke="#334" stroke-width="1.5" marker-end="url(#arrow)"/>'
        )

    def svg(self) -> str:
        return "\n".join([*self.lines, "</svg>"]) + "\n"

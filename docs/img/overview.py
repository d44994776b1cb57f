"""Draws system.svg and deploy.svg again: python docs/img/overview.py"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from drawing import DATA, HEAD, PAD, Drawing  # noqa: E402

GREEN = "#dcf5e3"


def frame(svg: Drawing, x: int, y: int, width: int, height: int, fill: str, dashed: bool = False) -> None:
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    svg.lines.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" '
        f'stroke="#667"{dash}/>'
    )


def system() -> str:
    svg = Drawing(
        "The whole system",
        "A program registers its listening socket at the server under the name web and ends. The "
        "server holds the descriptor, and a keeper has a copy. Workers fetch web by name. Beside it, "
        "a pool passes sockets to its workers through its own queues.",
        780,
        400,
    )
    frame(svg, 20, 30, 190, 92, "#fff", dashed=True)
    svg.text(34, 54, "listener.py", bold=True)
    svg.text(34, 76, 'register("web", socket)', small=True)
    svg.text(34, 94, "may end; the socket stays", small=True)
    svg.arrow("M210 72 L286 72")
    svg.text(214, 62, "register", small=True)

    frame(svg, 290, 30, 210, 160, HEAD)
    svg.text(304, 54, "fdshare server", bold=True)
    svg.box(304, 66, 60, "web", DATA)
    svg.box(364, 66, 122, "socket  :8080")
    svg.box(304, 92, 60, "log", DATA)
    svg.box(364, 92, 122, "file  app.log")
    svg.box(304, 118, 60, "data", DATA)
    svg.box(364, 118, 122, "memory  64 MiB")
    svg.text(304, 164, "open descriptors under names,", small=True)
    svg.text(304, 180, "at the path of a UNIX socket", small=True)
    frame(svg, 330, 206, 130, 40, PAD)
    svg.text(344, 231, "keeper: a copy")
    svg.arrow("M395 190 L395 204")

    for number, (name, call) in enumerate(
        (("worker.py", 'fetch("web")'), ("worker.py", 'fetch("web")'), ("gunicorn", "fdshare run web --"))
    ):
        top = 30 + 62 * number
        frame(svg, 590, top, 170, 52, GREEN)
        svg.text(604, top + 22, name, bold=True)
        svg.text(604, top + 41, call, small=True)
        svg.arrow(f"M500 {100 + 6 * number} L586 {top + 26}")
    svg.text(590, 234, "any program, at any time", small=True)

    svg.lines.append('<path d="M20 272 H760" stroke="#c9ced6" stroke-width="1"/>')
    frame(svg, 20, 294, 190, 84, "#fff")
    svg.text(34, 318, "parent", bold=True)
    svg.text(34, 340, "connection, _ = accept()", small=True)
    svg.text(34, 358, "apply_async(f, [connection])", small=True)
    frame(svg, 290, 294, 210, 84, HEAD)
    svg.text(304, 318, "queue of get_context()", bold=True)
    svg.text(304, 340, "the pickle, and the descriptor", small=True)
    svg.text(304, 358, "beside it", small=True)
    svg.arrow("M210 336 L286 336")
    for number in range(2):
        top = 294 + 44 * number
        frame(svg, 590, top, 170, 38, GREEN)
        svg.text(604, top + 24, "worker  f(connection)")
        svg.arrow(f"M500 336 L586 {top + 19}")
    return svg.svg()


# A renderer that moves nothing, and a reader who wants nothing to move, see the end.
STYLE = """<style>
.v1 { opacity: 0.15 } .to1, .step1, .step2, .step3 { opacity: 0 }
.v1 { animation: v1 12s infinite; } .v2 { animation: v2 12s infinite; }
.to1 { animation: to1 12s infinite linear; } .to2 { animation: to2 12s infinite linear; }
@keyframes v1 { 0%, 60% { opacity: 1 } 70%, 100% { opacity: 0.15 } }
@keyframes v2 { 0%, 25% { opacity: 0.15 } 35%, 100% { opacity: 1 } }
@keyframes to1 { 0%, 42% { opacity: 1 } 44%, 100% { opacity: 0 } }
@keyframes to2 { 0%, 42% { opacity: 0 } 44%, 100% { opacity: 1 } }
.client { animation: come 2s infinite linear; }
@keyframes come { from { transform: translateX(0) } to { transform: translateX(168px) } }
.step1 { animation: step1 12s infinite } .step2 { animation: step2 12s infinite }
.step3 { animation: step3 12s infinite } .step4 { animation: step4 12s infinite }
@keyframes step1 { 0%, 24% { opacity: 1 } 25%, 100% { opacity: 0 } }
@keyframes step2 { 0%, 24% { opacity: 0 } 25%, 43% { opacity: 1 } 44%, 100% { opacity: 0 } }
@keyframes step3 { 0%, 43% { opacity: 0 } 44%, 60% { opacity: 1 } 61%, 100% { opacity: 0 } }
@keyframes step4 { 0%, 60% { opacity: 0 } 61%, 100% { opacity: 1 } }
@media (prefers-reduced-motion: reduce) { * { animation: none !important; } }
</style>"""


def deploy() -> str:
    svg = Drawing(
        "A deploy without a refused connection",
        "Clients connect to one listening socket all the time. Version 1 accepts. Version 2 starts "
        "beside it with the same socket; when it is ready, version 1 stops accepting, finishes what "
        "it has, and ends. The socket is never closed.",
        780,
        270,
    )
    svg.lines.insert(1, STYLE)

    def moving(cls: str, count: int) -> None:
        """The last *count* lines get a class."""
        part = svg.lines[-count:]
        del svg.lines[-count:]
        svg.lines.append(f'<g class="{cls}">{"".join(part)}</g>')

    svg.text(20, 34, "clients", bold=True)
    for number in range(4):
        delay = -0.5 * number
        svg.lines.append(
            f'<circle class="client" style="animation-delay:{delay}s" cx="40" cy="{78 + 26 * number}" '
            'r="7" fill="#0072b2"/>'
        )
    frame(svg, 230, 50, 180, 132, HEAD)
    svg.text(246, 76, "listening socket", bold=True)
    svg.text(246, 100, "web, tcp :8080", small=True)
    svg.text(246, 122, "held by fdshare:", small=True)
    svg.text(246, 140, "it is never closed", small=True)
    frame(svg, 560, 40, 190, 56, GREEN)
    svg.text(576, 64, "version 1", bold=True)
    svg.text(576, 84, "accepts", small=True)
    moving("v1", 3)
    frame(svg, 560, 136, 190, 56, GREEN)
    svg.text(576, 160, "version 2", bold=True)
    svg.text(576, 180, "the same socket, by name", small=True)
    moving("v2", 3)
    svg.arrow("M410 104 L556 70")
    moving("to1", 1)
    svg.arrow("M410 128 L556 162")
    moving("to2", 1)
    for number, words in enumerate(
        (
            "1. Version 1 serves.",
            "2. fdshare deploy starts version 2 beside it.",
            "3. Version 2 is ready: it accepts. Version 1 finishes what it has.",
            "4. Version 1 has ended. Connections refused: 0.",
        )
    ):
        svg.text(20, 240, words)
        moving(f"step{number + 1}", 1)
    return svg.svg()


PICTURES = {"system.svg": system, "deploy.svg": deploy}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw())

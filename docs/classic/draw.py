"""Draws message.svg and status.svg again: python docs/classic/draw.py

Offsets and lengths are those of this machine's C compiler as Python knows them (CMSG_LEN,
CMSG_SPACE), so the drawings and the programs cannot differ.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from drawing import DATA, HEAD, PAD, Drawing  # noqa: E402


def message() -> str:
    rights, credentials = 4, 12  # bytes: an int, a struct ucred
    header = socket.CMSG_LEN(0)
    second = socket.CMSG_SPACE(credentials)
    whole = second + socket.CMSG_SPACE(rights)
    svg = Drawing(
        "A message with credentials and one descriptor",
        "struct msghdr points to an iovec, which points to one byte of data, and to a control buffer "
        f"of {whole} bytes with two headers, each with its data and padding.",
        780,
        480,
    )
    svg.text(20, 32, "struct msghdr", bold=True)
    for number, field in enumerate(
        ("msg_name", "msg_namelen", "msg_iov", "msg_iovlen = 1", "msg_control")
    ):
        svg.box(20, 42 + 26 * number, 180, field)
    svg.box(20, 172, 180, f"msg_controllen = {whole}")
    svg.box(20, 198, 180, "msg_flags")

    svg.text(300, 32, "struct iovec", bold=True)
    svg.box(300, 42, 150, "iov_base")
    svg.box(300, 68, 150, "iov_len = 1")
    svg.text(560, 32, "data: one byte at least", bold=True)
    svg.box(560, 42, 60, "0xab", DATA)
    svg.arrow("M200 107 C250 107 250 55 298 55")
    svg.arrow("M450 55 L558 55")

    x, width = 310, 225
    svg.text(x, 142, f"control buffer, {whole} bytes", bold=True)
    svg.arrow(f"M200 159 L{x - 30} 159")
    rows = [
        (0, f"cmsg_len = {socket.CMSG_LEN(credentials)}", HEAD, 26),
        (8, "cmsg_level SOL_SOCKET", HEAD, 26),
        (12, "cmsg_type SCM_CREDENTIALS", HEAD, 26),
        (header, "pid", DATA, 26),
        (header + 4, "uid", DATA, 26),
        (header + 8, "gid", DATA, 26),
        (header + credentials, f"{second - header - credentials} bytes of padding", PAD, 26),
        (second, f"cmsg_len = {socket.CMSG_LEN(rights)}", HEAD, 26),
        (second + 8, "cmsg_level SOL_SOCKET", HEAD, 26),
        (second + 12, "cmsg_type SCM_RIGHTS", HEAD, 26),
        (second + header, "the descriptor, an int", DATA, 26),
        (second + header + rights, f"{whole - second - header - rights} bytes of padding", PAD, 26),
    ]
    y = 150
    tops: dict[int, int] = {}
    for offset, words, fill, height in rows:
        svg.box(x, y, width, words, fill, height)
        svg.text(x - 26, y + 17, str(offset), small=True)
        tops[offset] = y
        y += height
    svg.text(x - 26, y + 6, str(whole), small=True)

    def span(first: int, last: int, at: int, words: str) -> None:
        top, bottom = first + 2, last - 2
        svg.lines.append(
            f'<path d="M{at} {top} h6 V{bottom} h-6" fill="none" stroke="#445" stroke-width="1.2"/>'
        )
        svg.text(at + 12, (top + bottom) // 2 + 4, words, small=True)

    padding = header + credentials
    span(tops[0], tops[padding], 539, f"CMSG_LEN({credentials}) = {socket.CMSG_LEN(credentials)}")
    span(tops[0], tops[second], 676, f"SPACE = {second}")
    last = second + header + rights
    span(tops[second], tops[last], 539, f"CMSG_LEN({rights}) = {socket.CMSG_LEN(rights)}")
    span(tops[second], y, 676, f"SPACE = {whole - second}")
    svg.text(20, 300, "CMSG_FIRSTHDR: offset 0", small=True)
    svg.text(20, 322, f"CMSG_DATA: {header} bytes after a header", small=True)
    svg.text(20, 344, f"CMSG_NXTHDR: offset {second}, the", small=True)
    svg.text(20, 360, "next that is a multiple of 8", small=True)
    return svg.svg()


def status() -> str:
    svg = Drawing(
        "The bytes of send_fd and send_err",
        "send_fd sends NUL and 0 with a descriptor. send_err sends a text, NUL and a status from 1 "
        "to 255.",
        780,
        190,
    )
    svg.text(20, 34, "send_fd", bold=True)
    svg.box(130, 16, 60, "00")
    svg.box(190, 16, 60, "00", DATA)
    svg.text(262, 34, "with the descriptor, in the control buffer of the same message")
    svg.text(137, 58, "NUL", small=True)
    svg.text(197, 58, "status", small=True)
    svg.text(20, 122, "send_err", bold=True)
    for number, letter in enumerate("not you"):
        svg.box(130 + 60 * number, 104, 60, f"{ord(letter):02x} {letter}", HEAD)
    svg.box(550, 104, 60, "00")
    svg.box(610, 104, 60, "0d", DATA)
    svg.text(137, 146, "text for people: any bytes but NUL", small=True)
    svg.text(557, 146, "NUL", small=True)
    svg.text(617, 146, "status 13 (-13)", small=True)
    return svg.svg()


PICTURES = {"message.svg": message, "status.svg": status}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw())

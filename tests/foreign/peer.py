"""A peer of the rendezvous that knows nothing of fdshare but docs/protocol.md.

    python peer.py PATH VERB NAME [AUTHKEY]

Verbs: `register` (a TCP listener, whose port is printed; ends when stdin does), `fetch` (something
to write to, and writes a line to it), `take` (the same, and confirms), `take-and-drop`, `names`.
Prints one line a result; the code of a refusal after "refused".

It uses sockets, struct and array; hashlib and hmac for the authkey. The msgpack is its own.
"""

import array
import hashlib
import hmac
import os
import socket
import struct
import sys

HEADER = struct.Struct(">IHBBI")
VERSION = 1


# As much of msgpack as the protocol needs: nil, bool, int, float, str, bin, array, map.


def pack(value):
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        raw = value.encode()
        return b"\xdb" + struct.pack(">I", len(raw)) + raw
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, list):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(pack, value))
    if isinstance(value, dict):
        pairs = b"".join(pack(key) + pack(each) for key, each in value.items())
        return b"\xdf" + struct.pack(">I", len(value)) + pairs
    raise TypeError(value)


SIZED = {  # first byte -> (format of the number that follows, what it says)
    0xC4: (">B", "bin"), 0xC5: (">H", "bin"), 0xC6: (">I", "bin"),
    0xCA: (">f", "number"), 0xCB: (">d", "number"),
    0xCC: (">B", "number"), 0xCD: (">H", "number"), 0xCE: (">I", "number"), 0xCF: (">Q", "number"),
    0xD0: (">b", "number"), 0xD1: (">h", "number"), 0xD2: (">i", "number"), 0xD3: (">q", "number"),
    0xD9: (">B", "str"), 0xDA: (">H", "str"), 0xDB: (">I", "str"),
    0xDC: (">H", "array"), 0xDD: (">I", "array"),
    0xDE: (">H", "map"), 0xDF: (">I", "map"),
}  # fmt: skip


def unpack(data, at=0):
    """(value, where the next one starts)"""
    first = data[at]
    at += 1
    if first <= 0x7F:
        return first, at
    if first >= 0xE0:
        return first - 0x100, at
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at
    if first <= 0x8F:
        size, what = first & 0x0F, "map"
    elif first <= 0x9F:
        size, what = first & 0x0F, "array"
    elif first <= 0xBF:
        size, what = first & 0x1F, "str"
    else:
        form, what = SIZED[first]
        (size,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
    if what == "number":
        return size, at
    if what in ("str", "bin"):
        raw = bytes(data[at : at + size])
        return (raw.decode() if what == "str" else raw), at + size
    items = []
    for _ in range(size * (2 if what == "map" else 1)):
        item, at = unpack(data, at)
        items.append(item)
    if what == "array":
        return items, at
    return dict(zip(items[::2], items[1::2], strict=True)), at


# Frames.


class Peer:
    def __init__(self, path, authkey=b""):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(path)
        self.bytes = b""
        self.descriptors = []
        self.last_id = 0
        nonce = os.urandom(32) if authkey else b""
        hello = {"type": "hello", "magic": "fdshare", "version": VERSION, "nonce": nonce}
        self.send(0, {**hello, "session": os.urandom(8).hex()})
        if authkey:
            self.prove(authkey, nonce)

    def prove(self, authkey, nonce):
        _, welcome, _ = self.receive()
        theirs = welcome["nonce"]
        assert theirs, "the server asks for no authkey"

        def mac(role):
            return hmac.new(authkey, role + nonce + theirs, hashlib.sha256).digest()

        self.send(0, {"type": "prove", "mac": mac(b"client")})
        _, proved, _ = self.receive()
        if proved["type"] == "refused":
            raise SystemExit(f"refused {proved['code']}")
        assert hmac.compare_digest(proved["mac"], mac(b"server")), "the server has another key"

    def send(self, id, message, fds=()):
        body = pack(message)
        data = HEADER.pack(len(body), len(fds), VERSION, 0, id) + body
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.sock.sendmsg([data], rights)
        if sent < len(data):
            self.sock.sendall(data[sent:])

    def receive(self):
        """(id, message, descriptors) of the next frame"""
        while True:
            if len(self.bytes) >= HEADER.size:
                length, count, version, _, id = HEADER.unpack_from(self.bytes)
                assert version == VERSION
                end = HEADER.size + length
                if len(self.bytes) >= end:
                    message, used = unpack(self.bytes[HEADER.size : end])
                    assert used == length
                    mine, self.descriptors = self.descriptors[:count], self.descriptors[count:]
                    assert len(mine) == count
                    self.bytes = self.bytes[end:]
                    return id, message, mine
            data, control, flags, _ = self.sock.recvmsg(
                65536, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC
            )
            assert data, "the server closed the connection"
            assert not flags & socket.MSG_CTRUNC
            self.bytes += data
            for level, kind, raw in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self.descriptors += array.array("i", raw)

    def ask(self, message, fds=()):
        """(message, descriptors) of the answer"""
        self.last_id += 1
        self.send(self.last_id, message, fds)
        while True:
            id, answer, descriptors = self.receive()
            if answer["type"] == "refused" and id in (0, self.last_id):
                raise SystemExit(f"refused {answer['code']}: {answer['message']}")
            if id == self.last_id:
                return answer, descriptors


# Verbs.


def register(peer, name):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kind = {
            "tag": "socket",
            "spec": [int(listener.family), int(listener.type), listener.proto, None],
        }
        answer, _ = peer.ask(
            {"type": "register", "name": name, "kind": kind, "metadata": {"by": "a stranger"}},
            [listener.fileno()],
        )
        assert answer["type"] == "registered"
        assert answer["name"] == name
        print("port", listener.getsockname()[1], flush=True)


def fetch(peer, name):
    answer, (fd,) = peer.ask({"type": "fetch", "name": name, "wait": 10})
    assert answer["type"] == "given"
    os.write(fd, b"a line of a stranger\n")
    os.close(fd)
    print("fetched", answer["kind"]["tag"], flush=True)


def take(peer, name, confirm=True):
    answer, (fd, lease) = peer.ask({"type": "take", "name": name})
    assert answer["lease"] is True
    if confirm:
        os.write(lease, b"\1")
        os.write(fd, b"a line of its owner\n")
    os.close(lease)
    os.close(fd)
    print("taken" if confirm else "dropped", flush=True)


def names(peer, pattern):
    more = True
    peer.last_id += 1
    peer.send(peer.last_id, {"type": "names", "pattern": pattern})
    while more:
        id, answer, _ = peer.receive()
        if id == peer.last_id:
            print("names", *answer["names"], flush=True)
            more = answer.get("more", False)


def main():
    path, verb, name, *authkey = sys.argv[1:]
    peer = Peer(path, *(key.encode() for key in authkey))
    if verb == "register":
        register(peer, name)
        sys.stdin.read()
    elif verb == "fetch":
        fetch(peer, name)
    elif verb == "take":
        take(peer, name)
    elif verb == "take-and-drop":
        take(peer, name, confirm=False)
    else:
        names(peer, name)


if __name__ == "__main__":
    main()

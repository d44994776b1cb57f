"""files: what arrives reads and writes on at the same place."""

from __future__ import annotations

import io
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare.errors import ClosedDescriptor, UnreadData, UnsupportedKind
from fdshare.kinds import describe
from fdshare.kinds import files as module
from fdshare.kinds.files import newline_of
from kinds.common import same_file, through

OPENED: dict[str, tuple[str, dict[str, Any]]] = {
    "raw": ("rb", {"buffering": 0}),
    "raw-random": ("r+b", {"buffering": 0}),
    "reader": ("rb", {}),
    "writer": ("wb", {}),
    "random": ("r+b", {}),
    "append": ("ab", {}),
    "append-random": ("a+b", {}),
    "text": ("r", {"encoding": "utf-8"}),
    "text-write": ("w", {"encoding": "latin-1", "errors": "replace"}),
    "text-random": ("r+", {"encoding": "utf-8", "newline": ""}),
    "text-append": ("a", {"encoding": "utf-8", "newline": "\r\n"}),
    "text-line-buffered": ("w", {"encoding": "utf-8", "buffering": 1}),
}


@pytest.mark.parametrize(("mode", "options"), OPENED.values(), ids=OPENED)
def test_a_file_keeps_class_mode_and_text_settings(
    path: Path, mode: str, options: dict[str, Any]
) -> None:
    with open(path, mode, **options) as file, through(file) as other:
        assert type(other) is type(file)
        assert other.mode == file.mode
        assert same_file(file, other)
        assert other.name == str(path)
        assert not os.get_inheritable(other.fileno())
        if isinstance(file, io.TextIOWrapper):
            assert other.encoding == file.encoding
            assert other.errors == file.errors
            assert other.line_buffering == file.line_buffering
            assert other.write_through == file.write_through
            assert newline_of(other) == options.get("newline")


@pytest.mark.parametrize("mode", ["r", "rb", "r+", "r+b"])
def test_a_reader_is_where_tell_says(path: Path, mode: str) -> None:
    with open(path, mode) as file:
        file.readline()
        file.readline()
        with through(file) as other:
            assert other.tell() == file.tell() == 14
            assert other.readline() in ("line 2\n", b"line 2\n")
        # One offset for both: the sender goes on where the receiver's buffer ended.
        assert file.seek(0) == 0
        assert file.readline() in ("line 0\n", b"line 0\n")


def test_a_writer_is_flushed(path: Path) -> None:
    with open(path, "w") as file:
        file.write("first ")
        with through(file) as other:
            other.write("second")
        assert path.read_text() == "first second"


def test_a_random_file_written_and_read(path: Path) -> None:
    with open(path, "r+b") as file:
        file.readline()
        file.write(b"LINE")
        with through(file) as other:
            assert other.read(3) == b" 1\n"
    assert path.read_bytes().startswith(b"line 0\nLINE 1\n")


def test_an_appending_file_keeps_its_position(path: Path) -> None:
    with open(path, "a+b") as file:
        file.seek(7)
        with through(file) as other:
            assert other.tell() == 7
            assert file.tell() == 7


def test_an_unlinked_file_and_a_renamed_one(path: Path) -> None:
    with open(path) as file:
        path.unlink()
        path.write_text("somebody else's")
        with through(file) as other:
            assert other.readline() == "line 0\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "shift_jis", "iso2022_jp"])
def test_text_in_the_middle_of_a_stateful_encoding(folder: Path, encoding: str) -> None:
    path = folder / "text"
    path.write_text("あいう\nえおa\nbcか\n" * 50, encoding=encoding)
    with open(path, encoding=encoding) as file:
        file.readline()
        file.read(2)
        with through(file) as other:
            assert other.read(5) == "a\nbcか"


def test_text_in_the_middle_of_a_run_is_refused(folder: Path) -> None:
    """The receiver would have to read the file to go on there, and a fetch reads no file."""
    path = folder / "text"
    path.write_text("あいうえお\nab\n" * 50, encoding="utf-7")
    with open(path, encoding="utf-7") as file:
        file.read(2)
        with pytest.raises(UnsupportedKind, match="end of a line"):
            through(file)


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300),
    st.integers(0, 300),
    st.sampled_from([None, "", "\n", "\r", "\r\n"]),
    st.sampled_from(["utf-8", "utf-16", "utf-8-sig"]),
)
def test_any_text_is_continued_where_it_was_left(
    content: str, position: int, newline: str | None, encoding: str
) -> None:
    with tempfile.TemporaryFile("w+b") as plain:
        plain.write(content.encode(encoding))
        plain.seek(0)
        file = io.TextIOWrapper(plain, encoding=encoding, newline=newline)
        expected = file.read()
        file.seek(0)
        head = file.read(position)
        with through(file) as other:
            assert head + other.read() == expected
        file.detach()


@pytest.mark.parametrize("newline", [None, ""])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("rest", ["", "c", "\xe9", "\r\n", "\rc"])
def test_a_position_behind_a_carriage_return(
    path: Path, rest: str, encoding: str, newline: str | None
) -> None:
    path.write_bytes(f"ab\r{rest}".encode(encoding))
    with open(path, encoding=encoding, newline=newline) as file:
        expected = file.read()[3:]
        file.seek(0)
        file.read(3)
        with through(file) as other:
            assert other.read() == expected


def test_iterating_leaves_no_known_position(path: Path) -> None:
    with open(path) as file:
        next(file)
        with pytest.raises(UnsupportedKind, match="readline"):
            describe(file)


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
def test_newline_is_known(newline: str | None) -> None:
    with tempfile.TemporaryFile("w+", newline=newline) as file:
        assert newline_of(file.file if hasattr(file, "file") else file) == newline
        with through(file) as other:
            assert newline_of(other) == newline


@pytest.mark.parametrize("mode", ["r", "rb"])
def test_read_ahead_of_a_pipe_is_an_error_with_the_count(pipe: tuple[int, int], mode: str) -> None:
    os.write(pipe[1], b"one\ntwo\n")
    with open(pipe[0], mode, closefd=False) as file:
        file.readline()
        for _ in range(2):
            with pytest.raises(UnreadData) as refusal:
                describe(file)
            assert refusal.value.count == 4
        assert file.readline() in ("two\n", b"two\n")
        with through(file) as other:
            os.write(pipe[1], b"three\n")
            assert other.readline() in ("three\n", b"three\n")


def test_threads_may_share_one_reader(pipe: tuple[int, int]) -> None:
    """To look whether it has read ahead reads nothing, whoever else looks."""
    os.write(pipe[1], b"x")
    with open(pipe[0], "rb", closefd=False) as reader:
        assert raised_by_two(lambda: [describe(reader) for _ in range(10_000)]) == []
        assert reader.read(1) == b"x"


def test_threads_that_are_refused_leave_all_that_was_read_ahead(pipe: tuple[int, int]) -> None:
    text = "".join(map(str, range(2000)))  # less than it reads at once
    for _ in range(5):
        os.write(pipe[1], text.encode())
        with open(pipe[0], encoding="utf-8", closefd=False) as reader:
            assert reader.read(1) == text[0]
            errors = raised_by_two(lambda: describe(reader))
            assert [type(error) for error in errors] == [UnreadData] * 2
            assert reader.read(len(text) - 1) == text[1:]


def raised_by_two(call: Callable[[], object]) -> list[BaseException]:
    """What *call* raises in two threads at the same time."""
    errors: list[BaseException] = []
    together = threading.Barrier(2)

    def make() -> None:
        together.wait(20)
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return errors


def test_a_child_reads_what_a_thread_of_its_parent_shared_when_it_was_forked(path: Path) -> None:
    with open(path, "rb") as reader:
        raw: Any = reader.raw
        module._peeks[object()] = raw  # as that thread does
        raw.readinto = module._nothing_now
        pid = os.fork()
        if not pid:
            os._exit(reader.read(4) != b"line")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        module._peeks.clear()
        del raw.readinto


def test_refused_read_ahead_is_there_for_read_all(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"one\ntwo\nthr")
    with open(pipe[0], closefd=False) as file:
        file.readline()
        with pytest.raises(UnreadData):
            describe(file)
        os.write(pipe[1], b"ee")
        os.close(pipe[1])
        assert file.read() == "two\nthree"


def test_an_empty_pipe_is_not_read(pipe: tuple[int, int]) -> None:
    with open(pipe[0], closefd=False) as reader, through(reader) as reader2:
        with open(pipe[1], "w", closefd=False) as writer, through(writer) as writer2:
            print("hello", file=writer2, flush=True)
        assert reader2.readline() == "hello\n"


@pytest.mark.parametrize("mode", ["r", "rb", "w", "wb"])
def test_files_of_makefile_bring_their_socket(mode: str) -> None:
    near, far = socket.socketpair()
    with far:
        near.settimeout(5)
        file = near.makefile(mode)
        near.close()
        with file, through(file) as other:
            assert type(other) is type(file)
            if "w" in mode:
                other.write(b"out" if "b" in mode else "out")
                other.flush()
                assert far.recv(9) == b"out"
            if "r" in mode:
                far.send(b"in\n")
                assert other.readline() in ("in\n", b"in\n")


@pytest.mark.parametrize("mode", ["rw", "rwb"])
def test_a_pair_of_reader_and_writer_is_refused_with_the_reason(mode: str) -> None:
    near, far = socket.socketpair()
    with near, far, near.makefile(mode) as file:
        with pytest.raises(UnsupportedKind, match="which two files") as refusal:
            describe(file)
        assert refusal.value.type_name == "BufferedRWPair"


def test_a_temporary_file_stays_with_its_creator() -> None:
    with tempfile.NamedTemporaryFile("w+") as file:
        file.write("x")
        with through(file) as other:
            assert type(other) is io.TextIOWrapper
            assert other.name == file.name
        assert os.path.exists(file.name)


def test_a_spooled_file_leaves_memory() -> None:
    with tempfile.SpooledTemporaryFile(mode="w+b") as file:
        file.write(b"abc")
        file.seek(1)
        with through(file) as other:
            assert other.read() == b"bc"


def test_a_file_in_memory_is_refused() -> None:
    for file in (io.BytesIO(), io.TextIOWrapper(io.BytesIO()), io.BufferedReader(io.BytesIO())):
        with pytest.raises(UnsupportedKind):
            describe(file)


def test_a_closed_file_is_an_error(path: Path) -> None:
    file = open(path)
    file.close()
    with pytest.raises(ClosedDescriptor):
        describe(file)

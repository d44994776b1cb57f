"""The programs that use a context of ours run as real processes, and do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from ending import terminated
from lambdas import needs_lambdas

PROGRAMS = Path(__file__).parents[2] / "examples"
METHODS = ("fork", "spawn", "forkserver")


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def ask(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        text: str = answer.read().decode()
        return text


@pytest.mark.parametrize("method", METHODS)
def test_prefork_server(method: str) -> None:
    program = [sys.executable, str(PROGRAMS / "prefork_server.py"), "--port", "0"]
    with subprocess.Popen(
        [*program, "--workers", "2", "--method", method],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            match = re.fullmatch(r"127\.0\.0\.1:(\d+): pid (\d+) accepts, 2 workers answer\n", said)
            assert match, said
            answers = [ask(int(match[1]), f"/{number}") for number in range(10)]
            for number, answer in enumerate(answers):
                assert re.fullmatch(rf"GET /{number} was answered by worker \d+\n", answer)
            rest, _ = terminated(server)
        finally:
            server.kill()
    assert server.returncode == 0, rest
    assert "stopping" in rest
    assert sum(map(int, re.findall(r"answered (\d+) requests", rest))) == 10


@needs_lambdas
@pytest.mark.parametrize("method", METHODS)
def test_dill_pool(method: str) -> None:
    *reads, last = run("dill_pool.py", "--method", method).splitlines()
    assert last == "the file was unlinked before the workers saw it"
    for number, line in enumerate(reads):
        expected = rf"worker \d+ read 8 bytes at {9 * number}: b'line 00{number}'"
        assert re.fullmatch(expected, line), line
    assert len(reads) == 4


@pytest.mark.parametrize("method", METHODS)
def test_pipeline(method: str, folder: Path) -> None:
    reports = [folder / "one.txt", folder / "two.txt"]
    lines = run("pipeline.py", "--method", method, *reports).splitlines()
    pids = set()
    for report, start in zip(reports, (0, 4), strict=True):
        for line, stage in zip(lines[start:], ("collect", "sort", "sign"), strict=False):
            match = re.fullmatch(rf"{stage} \(pid (\d+)\) wrote \d lines?", line)
            assert match, line
            pids.add(match[1])
        assert lines[start + 3] == f"{report} has 7 lines"
        assert report.read_text() == (
            "measured 3\nmeasured 1\nmeasured 2\nsorted 1\nsorted 2\nsorted 3\nsigned\n"
        )
    assert len(pids) == 3

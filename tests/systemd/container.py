"""A container that runs tests, each when it is asked for, and hands back pytest's reports."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
BOOT: Final = Path(__file__).with_name("boot.sh")
INSIDE: Final = "FDSHARE_TESTS_IN_CONTAINER"  # the socket to whoever asks for tests
_WORK: Final = "/mnt/work"  # where a container sees the folder that it shares with us
_START: Final = 60.0  # seconds
_TEST: Final = 150.0  # seconds; the timeout of the suite ends a test before
_END: Final = 20.0
# What of / a container covers with something else.
_COVERED: Final = ("/tmp/", "/run/", "/var/tmp/")


def why_not() -> str | None:
    """Why no container can be booted here; None where it can."""
    if os.geteuid() != 0:
        return "a container is for root"
    for program, package in (("systemd-nspawn", "systemd-container"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: {package})"
    if not os.path.exists("/lib/systemd/systemd"):
        return "systemd is not installed"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        return "no mount namespace may be made here"
    group = _own_group()
    if group is None:
        return "cgroup2 is not mounted"
    if not os.access(group, os.W_OK):
        return "cgroup2 may not be written to"
    return None


def _own_group() -> Path | None:
    """The folder of our cgroup, of version 2."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found = [fields[1] for fields in map(str.split, mounts) if fields[2] == "cgroup2"]
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    ours = [line.removeprefix("0::/") for line in groups if line.startswith("0::/")]
    return Path(found[0], ours[0]) if found and ours else None


class Container:
    """Boots when made."""

    def __init__(self) -> None:
        self._work = Path(tempfile.mkdtemp(prefix="fds-systemd-"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(self._work / "asks"))
            listener.listen()
            listener.settimeout(_START)
            self._write("fdshare", f'exec {sys.executable} -m fdshare "$@"')
            tests = "tests/systemd -q -p no:cacheprovider -p no:xdist"
            self._write("inside", f"exec {sys.executable} -m pytest {tests}")
            self._process = subprocess.Popen(["bash", BOOT, self._work, *_hidden()])
            try:
                self._asks, _ = listener.accept()
            except TimeoutError:
                self._kill()
                raise ConnectionError(f"the container does not answer:\n{self.log()}") from None
        self._asks.settimeout(_TEST)
        self._answers = self._asks.makefile("r")

    def _write(self, name: str, command: str) -> None:
        """A program in the container, of the code that is tested here."""
        variables = f"export PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={ROOT}"
        if name == "inside":
            chaos = os.environ.get("FDSHARE_CHAOS", "")
            variables += f" {INSIDE}={_WORK}/asks FDSHARE_CHAOS={chaos}\ncd {ROOT}"
            # Other users run it, too; in here nothing is anybody's own.
            folders = {str(folder) for path in used_folders() for folder in (path, *path.parents)}
            variables += f"\nchmod a+rx {' '.join(sorted(folders))}"
        path = self._work / name
        path.write_text(f"#!/bin/sh\n{variables}\n{command}\n")
        path.chmod(0o755)

    def run(self, nodeid: str, following: str | None) -> list[dict[str, Any]]:
        """The reports of one test, serialized; *following* comes after it. Raises: OSError: the
        container has died."""
        self._asks.sendall(json.dumps([nodeid, following]).encode() + b"\n")
        answer = self._answers.readline()
        if not answer:
            raise ConnectionError(f"the container has died:\n{self.log()}")
        reports: list[dict[str, Any]] = json.loads(answer)
        return reports

    def log(self) -> str:
        """What it said last."""
        found = [self._work / name for name in ("nspawn.txt", "console.txt", "journal.txt")]
        return "\n".join(f"{p.name}: {p.read_text()[-5000:]}" for p in found if p.exists())

    def close(self) -> None:
        """Powers it off."""
        self._answers.close()
        self._asks.close()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._kill()
        shutil.rmtree(self._work, ignore_errors=True)

    def _kill(self) -> None:
        """Kills all of it, if it has not ended; the script that booted it sees to the rest."""
        group = _own_group()
        assert group is not None
        with contextlib.suppress(FileNotFoundError):
            (group / f"fdshare-test-{self._process.pid}" / "cgroup.kill").write_text("1")
        self._process.wait()


def used_folders() -> set[Path]:
    """The folders that the tests and the interpreter need."""
    used = {ROOT, Path(sys.prefix), Path(sys.base_prefix), *map(Path, filter(None, sys.path))}
    return {path for path in used if path.is_dir()}


def _hidden() -> list[Path]:
    """Those of them that an overlay of / does not show."""
    # A mount may be one of the device of / itself.
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    found: list[Path] = []
    for path in sorted(used_folders()):
        mounted = any(path.is_relative_to(mount) for mount in mounts - {"/"})
        hidden = mounted or f"{path}/".startswith(_COVERED)
        if hidden and not any(path.is_relative_to(other) for other in found):
            found.append(path)
    return found


def serve(run: Any) -> None:
    """Inside: has *run* make the reports of each test that is asked for, until nobody asks."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asks:
        asks.connect(os.environ[INSIDE])
        with asks.makefile("r") as lines:
            for line in lines:
                asks.sendall(json.dumps(run(*json.loads(line))).encode() + b"\n")

"""A copy of fdshare that a server runs, and that a test changes: new code, good and bad."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import wait_until

import fdshare
from fdshare.client.blocking.client import Client
from fdshare.errors import FdshareError
from fdshare.kernel.endpoint import connect

HANGS = "import select; select.select([], [], [])"


def of_other_pythons(folder: str, names: list[str]) -> list[str]:
    """What they have compiled."""
    ours = f".{sys.implementation.cache_tag}.pyc"
    return [name for name in names if name.endswith(".pyc") and not name.endswith(ours)]


class Installed:
    """A copy of fdshare, and a server that runs it."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "code" / "fdshare"
        self.path = folder / "s"
        self.log = folder / "log"
        shutil.copytree(Path(fdshare.__file__).parent, self.package, ignore=of_other_pythons)
        self.process: subprocess.Popen[bytes] | None = None

    def change(self, file: str, old: str, new: str) -> None:
        path = self.package / file
        text, count = re.subn(old, lambda match: new, path.read_text(), count=1)
        assert count == 1, f"{old} is not in {file}"
        path.write_text(text)
        self.forget_compiled(path)

    def forget_compiled(self, path: Path) -> None:
        """Of a file that was changed: what was compiled before goes by the second of the change."""
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()

    def wait_less(self, *, trial: float = 20.0, silence: float = 15.0) -> None:
        """Before the start: the old code waits so many seconds for the trial of the new, and for
        its first word after the exec, in this copy of it. Good code needs some on a machine at
        work."""
        for file, name, seconds in (
            ("server/failover/upgrade.py", "_TRIAL: Final", trial),
            ("server/failover/journal.py", "_SILENCE", silence),
        ):
            self.change(file, rf"{name} = [\d.]+", f"{name} = {seconds}")

    def begin(self, file: str, code: str) -> None:
        """Puts *code* in front of what *file* does."""
        first = "from __future__ import annotations\n"
        self.change(file, first, f"{first}{code}\n")

    def name_it(self, word: str) -> None:
        """stats().notes["code"] says *word* once this code serves."""
        self.change(
            "server/loop/server.py",
            r"self\.notes: dict\[str, str\] = \{.*?\}",
            f"self.notes: dict[str, str] = {{'code': '{word}'}}",
        )

    def start(self, **environment: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(self.package.parent), **environment}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # an upgrade compiles what has changed, no more
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fdshare", "serve", str(self.path)],
                env=env,
                cwd=self.package.parent,
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        wait_until(self.path.exists, "the socket")

        def answers() -> bool:
            try:
                connect(self.path).close()
            except FdshareError:
                return False
            return True

        wait_until(answers, "the server answers")

    def end(self) -> None:
        if self.path.exists():
            with Client(self.path) as client:
                client.shutdown()
        if self.process is not None:
            wait_until(lambda: not self.path.exists(), "the server ends")
            self.process.kill()
            self.process.wait()

"""Builds sdist and wheel, and says what is wrong with them: `python tests/distribution.py FOLDER`.

Needs the package `build`. `tox -e package` runs it.
"""

from __future__ import annotations

import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
EPOCH = "1700000000"


def build(source: Path, folder: Path, umask: int) -> dict[str, str]:
    """Builds both, under *umask*; file -> hash."""
    command = [sys.executable, "-m", "build", "--quiet", "--outdir", folder, source]
    env = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
    subprocess.run(command, env=env, umask=umask, check=True)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def copy_of_the_source(to: Path) -> Path:
    """What the repository has, at another place, of another time, for a group that may write."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.rstrip("\0").split("\0"):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, to / name)
        os.chmod(to / name, 0o664 | (ROOT / name).stat().st_mode & 0o111)
        os.utime(to / name, (1, 1_000_000_000))
    return to


def faults(folder: Path) -> Iterator[str]:
    """What is wrong with the files in *folder*."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    if not wheel.name.endswith("-py3-none-any.whl"):
        yield f"{wheel.name}: it is Python alone, and says more"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        page = email.message_from_bytes(archive.read(metadata)).get_payload()
    for wanted in ("fdshare/py.typed", "fdshare/cli/units/fdshare.service"):
        if wanted not in names:
            yield f"{wheel.name} has no {wanted}"
    for name in names:
        if not name.startswith(("fdshare/", "fdshare-")):
            yield f"{wheel.name} has {name}"
    for link in re.findall(r"\]\(([^)]*)\)", str(page)):
        if not link.startswith(("https://", "#")):
            yield f"the page of an index has a link to {link}"
    with tarfile.open(sdist) as files:
        sent = {name.partition("/")[2] for name in files.getnames()}
    for wanted in ("tox.ini", "CHANGELOG.md", "docs/design.md", "tests/conftest.py", "setup.py"):
        if wanted not in sent:
            yield f"{sdist.name} has no {wanted}"


def main(folder: Path) -> int:
    """Builds into *folder*, and once more elsewhere; the exit status."""
    with tempfile.TemporaryDirectory() as place:
        first = build(ROOT, folder, 0o022)
        second = build(copy_of_the_source(Path(place, "source")), Path(place, "built"), 0o077)
    found = list(faults(folder))
    if first != second:
        found.append(f"two builds differ: {first} and {second}")
    for fault in found:
        print(fault)
    if not found:
        print("\n".join(f"{hash}  {name}" for name, hash in sorted(first.items())))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

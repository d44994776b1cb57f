"""What setup.cfg cannot say: the page of a package index, and an sdist that can be built again."""

from __future__ import annotations

import gzip
import os
import re
import tarfile
import time
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent
# A wheel has the modes of files that are made here, whatever they are in the sdist.
os.umask(0o022)


def index_page() -> str:
    """README.md where no files are beside it: their names in place of links and images."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[([^]]*)\]\((?!https://)([^)]*)\)", r"*\2: \1*", text)
    text = re.sub(r"\[([^]]*)\]\(\1\)", r"\1", text)
    text = re.sub(r"\[([^]]*)\]\((?!https://|#)([^)]*)\)", r"\1 (\2)", text)
    text = text.replace("pip install .\n", "pip install fdshare\n")
    return f"{text}\nThe files that this page names are in the source distribution.\n"


class ReproducibleSdist(sdist):
    """Makes an archive whose bytes depend on the files and SOURCE_DATE_EPOCH alone."""

    def make_archive(self, base_name: str, format: str, *, base_dir: str, **others: object) -> str:
        """The name of the archive, which is a .tar.gz."""
        epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())

        def same(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = epoch
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        name = f"{base_name}.tar.gz"
        with (
            open(name, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=epoch) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=same)  # it sorts what is in a folder
        return name


setup(long_description=index_page(), cmdclass={"sdist": ReproducibleSdist})

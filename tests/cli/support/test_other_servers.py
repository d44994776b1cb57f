"""Where a server answers, if not at the default path."""

from __future__ import annotations

from pathlib import Path

from commandline import Shell


def test_the_message_names_where_one_answers(shell: Shell, folder: Path) -> None:
    there = folder / "user"
    there.mkdir()
    shell.serve(there / "fdshare.sock")
    env = {"FDSHARE_PATH": "", "XDG_RUNTIME_DIR": str(there)}
    assert "answered" in shell("ping", env=env)
    # As root with a runtime folder of its own, or a user under sudo.
    shell.environment["TMPDIR"] = str(folder)
    (folder / "fdshare-4321").mkdir()
    (folder / "fdshare-4321" / "fdshare.sock").symlink_to(there / "fdshare.sock")
    elsewhere = {"FDSHARE_PATH": "", "SUDO_UID": "4321", "XDG_RUNTIME_DIR": str(folder)}
    line = shell.fails("ping", env=elsewhere, status=69)
    assert f"no server at {folder}/fdshare.sock" in line
    assert f"{folder}/fdshare-4321/fdshare.sock: give --path" in line
    # A path that was given is the one that was meant.
    assert "give --path" not in shell.fails("ping", "--path", "/nope", env=elsewhere, status=69)
    shell("stop", "--path", there / "fdshare.sock")

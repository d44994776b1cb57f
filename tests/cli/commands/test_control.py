"""stats, ping, explain, reload, upgrade, stop."""

from __future__ import annotations

import os
from pathlib import Path

from commandline import Shell


def test_ping_and_stats(fdshare: Shell) -> None:
    assert fdshare("ping").startswith(f"{fdshare.path} answered in ")
    found = fdshare.json("stats")
    assert found["names"] == 0
    assert found["keeper_pid"] is None
    assert Path(f"/proc/{found['server_pid']}").exists()
    said = fdshare("stats")
    assert f"pid {found['server_pid']}" in said
    assert all(len(line) <= 80 for line in said.splitlines())


def test_stats_for_prometheus(fdshare: Shell) -> None:
    said = fdshare("stats", "--prometheus").splitlines()
    assert "# TYPE fdshare_names gauge" in said
    assert "fdshare_names 0" in said


def test_explain(shell: Shell, folder: Path) -> None:
    policy = folder / "policy.toml"
    policy.write_text(
        '[[rule]]\neffect = "allow"\nusers = [4321]\nverbs = ["fetch"]\nnames = ["web"]\n'
    )
    shell.serve("--no-keeper", "--policy", policy)
    may = shell.run("explain", "fetch", "web", "--uid", "4321")
    assert (may.returncode, may.stderr) == (0, "")
    assert may.stdout.startswith("uid 4321 may fetch 'web': ")
    mayn = shell.run("explain", "take", "web", "--uid", "4321")
    assert mayn.returncode == 1
    assert "may not take 'web'" in mayn.stdout
    assert shell.json("explain", "fetch", "web")["allowed"] is True
    assert "no user 'nobody-of-that-name'" in shell.fails(
        "explain", "fetch", "web", "--uid", "nobody-of-that-name", status=2
    )


def test_reload(shell: Shell, folder: Path) -> None:
    policy = folder / "policy.toml"
    policy.write_text("")
    shell.serve("--no-keeper", "--policy", policy)
    question = ["explain", "fetch", "web", "--uid", "4321", "--json"]
    assert shell.run(*question).returncode == 1
    policy.write_text('[[rule]]\neffect = "allow"\nusers = [4321]\nverbs = ["fetch"]\n')
    shell("reload")
    assert shell.run(*question).returncode == 0
    policy.write_text(policy.read_text().replace("4321", "4321, 'alcie'"))
    assert "no user 'alcie'" in shell.run("reload").stderr
    assert shell.run(*question).returncode == 0
    policy.write_text("nonsense")
    assert str(policy) in shell.fails("reload")
    assert shell.run(*question).returncode == 0


def test_upgrade_keeps_what_is_held(shell: Shell) -> None:
    process = shell.serve()
    shell("register", "data", "--memory", "/dev/null")
    before = shell.json("stats")
    shell("upgrade")
    after = shell.json("stats")
    assert after["keeper_pid"] == before["keeper_pid"] == process.pid
    assert shell.json("info", "data")["generation"] == 1


def test_stop(shell: Shell) -> None:
    process = shell.serve()
    shell("stop")
    assert process.wait(30) == 0
    assert not os.path.exists(shell.path)
    assert "no server" in shell.fails("stop", status=69)

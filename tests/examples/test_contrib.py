"""What contrib/ offers to others is what they accept, and names what there is."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from commandline import ROOT
from nursery import Manager

from fdshare.cli.main import commands
from fdshare.protocol.messages import StoreStats
from fdshare.server.metrics import render

CONTRIB = ROOT / "contrib"
SYSTEMD = CONTRIB / "systemd"
UNITS = ["fdshare.service", "fdshare.socket", "example-web/example-web.service"]


def test_systemd_accepts_the_units(folder: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    for unit in UNITS:
        # It looks whether the program is there; here it may be anywhere.
        text = (SYSTEMD / unit).read_text().replace("/usr/bin/fdshare", sys.executable)
        (folder / Path(unit).name).write_text(text)
    done = subprocess.run(
        [program, "verify", *(str(folder / Path(unit).name) for unit in UNITS)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    # Units of the machine itself may have faults of their own.
    ours = [line for line in done.stderr.splitlines() if str(folder) in line or "fdshare" in line]
    assert ours == []


def test_what_the_promises_stand_on() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.read(SYSTEMD / "fdshare.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "all"
    assert service["ExitType"] == "cgroup"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert service["SuccessExitStatus"] == "SIGKILL"
    assert service["OOMPolicy"] == "continue"
    assert int(service["FileDescriptorStoreMax"]) > 0
    assert "--fdstore" in service["ExecStart"]


def words_of(command: str | list[str]) -> list[str]:
    return command.split() if isinstance(command, str) else [str(word) for word in command]


def documents(path: Path) -> list[Any]:
    """What a YAML file says."""
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all(path.read_text()))


def of_units() -> list[list[str]]:
    units = [*(SYSTEMD / unit for unit in UNITS), CONTRIB / "supervisord" / "fdshare.conf"]
    lines = [line.partition("=") for unit in units for line in unit.read_text().splitlines()]
    keys = ("ExecStart", "ExecReload", "command")
    return [value.lstrip("+").split() for key, _, value in lines if key in keys]


def of_compose() -> list[list[str]]:
    (file,) = documents(CONTRIB / "compose" / "compose.yaml")
    services = file["services"].values()
    checks = [service["healthcheck"]["test"] for service in services if "healthcheck" in service]
    return list(map(words_of, [*(service["command"] for service in services), *checks]))


def of_kubernetes() -> list[list[str]]:
    (file,) = documents(CONTRIB / "kubernetes" / "sidecar.yaml")
    pod = file["spec"]["template"]["spec"]
    (sidecar,), (web,) = pod["initContainers"], pod["containers"]
    probe = sidecar["startupProbe"]["exec"]
    return [words_of(each["command"]) for each in (sidecar, web, probe)]


def of_ansible() -> list[list[str]]:
    ((play,),) = documents(CONTRIB / "ansible" / "deploy.yml")
    tasks = [task.get("ansible.builtin.command", {}).get("argv") for task in play["tasks"]]
    found = list(map(words_of, filter(None, tasks)))
    return [words[words.index("fdshare") :] for words in found]


@pytest.mark.parametrize("commands_of", [of_units, of_compose, of_kubernetes, of_ansible])
def test_the_commands_are_ones_of_ours(commands_of: Callable[[], list[list[str]]]) -> None:
    found = commands_of()
    assert len(found) > 1
    for program, name, *rest in found:
        assert program.endswith("fdshare")
        command = commands.get_command(click.Context(commands), name)
        assert command is not None, name
        command.make_context(name, rest).close()  # UsageError where it has no such option


def test_what_shares_a_socket_shares_the_folder_and_the_user() -> None:
    (file,) = documents(CONTRIB / "compose" / "compose.yaml")
    services = file["services"].values()
    assert len({service["user"] for service in services}) == 1
    assert all("run:/run/fdshare" in service["volumes"] for service in services)
    assert "run" in file["volumes"]
    (pod,) = documents(CONTRIB / "kubernetes" / "sidecar.yaml")
    spec = pod["spec"]["template"]["spec"]
    containers = [*spec["initContainers"], *spec["containers"]]
    assert all("securityContext" not in container for container in containers)
    assert [c["volumeMounts"] for c in containers] == [
        [{"name": "run", "mountPath": "/run/fdshare"}]
    ] * 2
    assert spec["initContainers"][0]["restartPolicy"] == "Always"


CHECKS = {
    "docker": ["docker", "compose", "-f", "compose/compose.yaml", "config", "--quiet"],
    "ansible-playbook": ["ansible-playbook", "--syntax-check", "ansible/deploy.yml"],
    "promtool": ["promtool", "check", "config", "prometheus/prometheus.yml"],
}


@pytest.mark.parametrize("program", CHECKS)
def test_others_accept_their_files(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    if program == "docker" and subprocess.run(["docker", "compose", "version"]).returncode:
        pytest.skip("docker has no compose")
    subprocess.run(CHECKS[program], cwd=CONTRIB, check=True, timeout=60)


def test_the_metrics_exist() -> None:
    """Each that a dashboard or an alert names is one that a server with a store has."""
    with Manager(keeper=False) as manager:
        stats = manager.stats()
    there = render(msgspec.structs.replace(stats, store=StoreStats(0, None, 0)))
    known = set(re.findall(r"^(fdshare_\w+)", there, re.MULTILINE))
    limits = set(re.findall(r'fdshare_limit\{name="(\w+)"', there))
    for file in ("grafana/fdshare.json", "prometheus/alerts.yml"):
        text = (CONTRIB / file).read_text().replace('\\"', '"')
        named = set(re.findall(r"\bfdshare_\w+", text))
        assert named
        assert named <= known, file
        assert set(re.findall(r'\bname="(\w+)"', text)) <= limits
    dashboard = json.loads((CONTRIB / "grafana" / "fdshare.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    documents(CONTRIB / "prometheus" / "alerts.yml")

"""As root: users against file modes, the default policy, a policy file and the registrant rule.

Every case is generated, and judged by a model of the rules; `explain` must say what happens.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until

from fdshare.client.blocking.client import Client, connect
from fdshare.errors import AccessDenied, EndpointError, FdshareError, UntrustedServer
from fdshare.server import logs
from fdshare.server.core.policy import SERVER_VERBS
from fdshare.server.serve import serve
from fdshare.server.settings import Settings

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")

STAFF = 3000


@dataclass(frozen=True)
class User:
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = User(0, 0)
OWNER = User(1001, 1001)
ALICE = User(2001, 2001)
BOB = User(2002, 2002, (STAFF,))
CAROL = User(2003, STAFF)
DAVE = User(2004, 2004)
USERS = [ROOT, OWNER, ALICE, BOB, CAROL, DAVE]

# (effect, users, groups, verbs, names, addresses): the model of the file below.
RULES: list[tuple[bool, list[int], list[int], list[str], list[str], list[str]]] = [
    (False, [BOB.uid], [], ["*"], ["web/private/*"], []),
    (True, [], [STAFF], ["fetch", "info"], ["web/*"], []),
    (True, [ALICE.uid], [], ["register", "fetch", "take", "unregister", "info"], ["own/*"], []),
    (True, [ALICE.uid], [], ["bind"], [], ["tcp://127.0.0.1:*"]),
    (True, [CAROL.uid], [], ["list", "watch", "stats"], [], []),
    (True, [CAROL.uid], [], ["take", "unregister"], ["web/*", "own/*"], []),
    (False, [DAVE.uid], [], ["*"], [], []),
    (True, [], [], ["explain"], [], []),
]


def as_toml() -> str:
    lines = []
    for effect, users, groups, verbs, names, addresses in RULES:
        lines += ["[[rule]]", f'effect = "{"allow" if effect else "deny"}"']
        lists = {"users": users, "groups": groups, "names": names, "addresses": addresses}
        lines += [f"verbs = {json.dumps(verbs)}"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in lists.items() if value]
    return "\n".join(lines)


@dataclass(frozen=True)
class Setting:
    """One server: whose it is, who may connect, and who may do what."""

    server: User
    mode: int
    group: int
    rules: bool

    def id(self) -> str:
        return f"uid{self.server.uid}-{self.mode:o}-{'file' if self.rules else 'default'}"

    def may_connect(self, who: User) -> bool:
        """What the kernel says of the socket's file."""
        if who.uid == 0:
            return True
        if who.uid == self.server.uid:
            return bool(self.mode & 0o200)
        if self.group in (who.gid, *who.groups):
            return bool(self.mode & 0o020)
        return bool(self.mode & 0o002)

    def may(self, who: User, verb: str, what: str = "") -> bool:
        """The first rule that matches decides."""
        if who.uid in (0, self.server.uid) or verb == "ping":
            return True
        for effect, users, groups, verbs, names, addresses in RULES if self.rules else []:
            ours = who.uid in users or set(groups) & {who.gid, *who.groups}
            if (users or groups) and not ours:
                continue
            if "*" not in verbs and verb not in verbs:
                continue
            if names or addresses:
                patterns = addresses if verb == "bind" else names
                if verb in SERVER_VERBS or not any(fnmatchcase(what, p) for p in patterns):
                    continue
            return effect
        return False

    def may_remove(self, who: User, registrant: int) -> bool:
        return who.uid in (0, self.server.uid, registrant)


MODES = [(0o600, 0), (0o660, STAFF), (0o666, 0)]
SETTINGS = [
    Setting(server, mode, group or server.gid, rules)
    for server, (mode, group), rules in itertools.product([ROOT, OWNER], MODES, [False, True])
]


def fork(who: User, task: Callable[[], Any]) -> Any:
    """What *task* returns, run by *who*: JSON."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            become(who)
            os.write(write, json.dumps(task()).encode())
            status = 0
        except BaseException:
            os.write(write, json.dumps(traceback.format_exc()).encode())
        finally:
            os._exit(status)
    os.close(write)
    with open(read) as pipe:
        said = json.loads(pipe.read())
    _, status = os.waitpid(pid, 0)
    assert status == 0, said
    return said


def become(who: User) -> None:
    os.setgroups(who.groups)
    os.setresgid(who.gid, who.gid, who.gid)
    os.setresuid(who.uid, who.uid, who.uid)


@pytest.fixture(params=SETTINGS, ids=lambda s: s.id())
def setting(request: pytest.FixtureRequest) -> Setting:
    setting: Setting = request.param
    return setting


@pytest.fixture
def path(setting: Setting, folder: Path) -> Iterator[Path]:
    yield from run(setting, folder)


def run(setting: Setting, folder: Path) -> Iterator[Path]:
    """Where a server of *setting* listens, while it does."""
    folder.chmod(0o755)
    home = folder / "home"
    home.mkdir(0o755)
    os.chown(home, setting.server.uid, setting.server.gid)
    (folder / "policy.toml").write_text(as_toml())
    policy = str(folder / "policy.toml") if setting.rules else None
    settings = Settings(path=str(home / "s"), mode=setting.mode, policy=policy, log_level="ERROR")
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            logs.configure(settings)
            become(setting.server)
            serve(settings, lambda: os.close(write))
        finally:
            os._exit(0)
    os.close(write)
    os.read(read, 1)  # its end: the server is ready
    os.close(read)
    if setting.group != setting.server.gid:
        os.chown(home / "s", -1, setting.group)
    yield home / "s"
    with Client(home / "s", trust={0, setting.server.uid}) as admin:
        admin.shutdown()
    os.waitpid(pid, 0)
    wait_until(lambda: not (home / "s").exists(), "the socket is removed")


# What each verb is asked about, and what it needs. "theirs" was registered by root, "mine" by the
# user, where that was allowed.
GROUPS = ["web/", "web/private/", "own/", "else/"]
ADDRESSES = ["tcp://127.0.0.1:0", "tcp://0.0.0.0:0"]


def attempt(client: Client, verb: str, name: str, more: str) -> str:
    """Empty if it is allowed, else the rule that refuses."""
    try:
        if verb in ("register", "replace"):
            client.register(name, 0, replace=verb == "replace")
        elif verb == "fetch":
            client.fetch_raw(name)[0].close()
        elif verb == "fetch_many":
            for descriptor in client.fetch_many([name]).values():
                descriptor.close()
        elif verb == "take":
            client.take_raw(name)[0].close()
        elif verb == "rename":
            client.rename(name, more)
        elif verb == "bind":
            client.bind(name, more).close()
        elif verb == "watch":
            with client.watch(timeout=20) as watch:
                next(watch)
        elif verb == "explain":
            client.explain("fetch", name, 1, 1)
        else:
            arguments = {"unregister": [name], "info": [name]}.get(verb, [])
            getattr(client, verb)(*arguments)
    except AccessDenied as error:
        return error.rule
    return ""


def cases(who: User, setting: Setting) -> Iterator[tuple[str, str, str, bool]]:
    """(verb, name, more, allowed)."""
    for group in GROUPS:
        base = f"{group}{who.uid}"

        def may(verb: str, name: str) -> bool:
            return setting.may(who, verb, name)

        for whose, registrant in (("theirs", 0), ("mine", who.uid)):
            if whose == "mine" and not may("register", f"{base}/mine"):
                continue
            remove = setting.may_remove(who, registrant)
            name = f"{base}/{whose}/"
            yield "fetch", f"{name}f", "", may("fetch", f"{name}f")
            yield "fetch_many", f"{name}f", "", may("fetch", f"{name}f")
            yield "info", f"{name}f", "", may("info", f"{name}f")
            yield "replace", f"{name}p", "", may("register", f"{name}p") and remove
            yield "take", f"{name}t", "", may("take", f"{name}t")
            yield "unregister", f"{name}u", "", may("unregister", f"{name}u") and remove
            new = f"{name}new"
            both = may("unregister", f"{name}r") and may("register", new)
            yield "rename", f"{name}r", new, both and remove
        yield "explain", f"{base}/x", "", may("explain", f"{base}/x")
        yield "register", f"{base}/new", "", may("register", f"{base}/new")
        for number, address in enumerate(ADDRESSES):
            name = f"{base}/bound{number}"
            needs = [("fetch", name), ("bind", address), ("register", name)]
            yield "bind", name, address, all(may(*need) for need in needs)
    for verb in ("names", "infos"):
        yield verb, "", "", setting.may(who, "list")
    for verb in ("watch", "stats", "reload", "ping"):
        yield verb, "", "", setting.may(who, verb)


def prepare(client: Client, who: User, whose: str) -> None:
    """The entries that the cases are about."""
    for group in GROUPS:
        for last in "fptur":
            try:
                client.register(f"{group}{who.uid}/{whose}/{last}", 0)
            except AccessDenied:
                pass


@pytest.mark.timeout(300)
def test_users(setting: Setting, path: Path, counted: dict[str, Any]) -> None:
    total = refused = unreachable = 0
    trust = {0, setting.server.uid}
    with Client(path, trust=trust) as admin:
        for who in USERS:
            said = fork(who, lambda: can_connect(path, trust))
            if not setting.may_connect(who):
                assert said == "EndpointError", who
                unreachable += 1
                continue
            # A server of somebody else's is not believed, unless one says so.
            doubts = setting.server.uid not in (0, who.uid)
            assert said == "", who
            assert doubts == (fork(who, lambda: can_connect(path)) == "UntrustedServer"), who
            prepare(admin, who, "theirs")
            asked = list(cases(who, setting))
            explained = [explain(admin, who, *case[:3]) for case in asked]

            def ask(who: User = who, asked: Any = asked) -> list[str]:
                with Client(path, trust=trust) as client:
                    prepare(client, who, "mine")
                    return [attempt(client, *case[:3]) for case in asked]

            rules = fork(who, ask)
            for (verb, name, more, allowed), rule, said in zip(
                asked, rules, explained, strict=True
            ):
                total += 1
                refused += not allowed
                assert allowed == (not rule), (who, verb, name, more, rule)
                if said is not None:
                    assert said[0] == allowed, (who, verb, name, said)
                    assert allowed or said[1] == rule, (who, verb, name, said, rule)
    counted.update(cases=total, refused=refused, unreachable=unreachable)
    assert total > 50


def can_connect(path: Path, trust: Any = None) -> str:
    """Empty, or the error's name."""
    try:
        connect(path, trust=trust).close()
    except UntrustedServer:
        return "UntrustedServer"
    except EndpointError as error:
        return "EndpointError" if error.errno == errno.EACCES else str(error)
    return ""


def explain(admin: Client, who: User, verb: str, name: str, more: str) -> Any:
    """What `explain` says of it: (allowed, rule). None for what is several things at once, and for
    entries that the user has not registered yet."""
    if verb in ("rename", "ping") or "/mine/" in name:
        return None
    if verb == "bind":
        verbs = [("fetch", name), ("bind", more), ("register", name)]
    else:
        words = {"replace": "register", "fetch_many": "fetch", "names": "list", "infos": "list"}
        verbs = [(words.get(verb, verb), name)]
    said = [admin.explain(v, n, who.uid, who.gid, who.groups) for v, n in verbs]
    first = next((s for s in said if not s.allowed), said[0])
    return first.allowed, first.rule


def test_a_broken_policy_changes_nothing(folder: Path, counted: dict[str, Any]) -> None:
    """It is refused with its place and reason, the rules that were there stay, and nobody is
    dropped; they stay for a successor, too."""
    setting = Setting(ROOT, 0o666, 0, rules=True)
    for path in run(setting, folder):
        with Client(path) as admin:
            admin.register("web/a", 0)
            accepted = admin.stats().counters["accepted"]
            policy = folder / "policy.toml"
            policy.write_text(as_toml() + "\n[[rule]]\neffect = 'perhaps'\nverbs = ['*']\n")
            with pytest.raises(FdshareError, match=r"rule 9 .*effect") as caught:
                admin.reload()
            assert str(policy) in str(caught.value)
            assert admin.stats().counters["accepted"] == accepted
            os.kill(admin.stats().server_pid, signal.SIGKILL)
            assert allowed(path, CAROL)
            assert not allowed(path, DAVE)
            policy.write_text("[[rule]]\neffect = 'allow'\nusers = [2004]\nverbs = ['fetch']\n")
            assert not allowed(path, DAVE)
            admin.reload()
            assert allowed(path, DAVE)
            assert not allowed(path, CAROL)
            policy.unlink()
            for half in ("server_pid", "keeper_pid", "server_pid"):
                before = getattr(admin.stats(), half)
                os.kill(before, signal.SIGKILL)
                wait_until(lambda half=half, b=before: getattr(admin.stats(), half) != b)
                wait_until(lambda: admin.stats().redundant)
                assert allowed(path, DAVE)
                assert not allowed(path, CAROL)
    counted["deaths"] = 4


def allowed(path: Path, who: User) -> bool:
    def ask() -> str:
        with Client(path) as client:
            return attempt(client, "fetch", "web/a", "")

    return fork(who, ask) == ""

"""Settings: how to serve, as plain data; and the policy that they name."""

from __future__ import annotations

import errno
import grp
import os
import pwd
from typing import Final, Literal

import msgspec

from fdshare.errors import EndpointError, PolicyError
from fdshare.server.core.policy import Policy
from fdshare.server.core.policy_file import policy_from_toml
from fdshare.server.limits import refuse_too_large

__all__ = ["MAX_POLICY", "Settings", "policy_of", "read_policy"]

MAX_POLICY: Final = 1 << 16  # bytes; it is sent to the keeper in one message
_NOT_UTF8: Final = "the path is not UTF-8, so it cannot be handed to another process of the server"


class Settings(msgspec.Struct, kw_only=True):
    """Only data that can be encoded: it is sent to a new process, and to new code in an upgrade."""

    path: str
    mode: int = 0o600
    owner: tuple[int, int] | None = None  # uid and gid of the socket's file, -1 to keep one
    backlog: int = 4096
    keeper: bool = True
    limits: dict[str, float | int] = {}  # fields of Limits, by name
    authkey: bytes | None = None
    policy: str | None = None  # path of a TOML file
    policy_text: bytes | None = None  # the last valid text that was read there
    log_format: Literal["text", "json"] = "text"
    log_level: str = "INFO"
    audit_strict: bool = False  # refuse what the audit log has no room for
    metrics: str | None = None  # HOST:PORT for Prometheus text over HTTP
    closed: str = ""  # why nobody is served
    private: bool = False  # the folder of the path is the server's alone, and goes with it

    def __post_init__(self) -> None:
        self.refuse_what_cannot_be_sent()

    def refuse_what_cannot_be_sent(self) -> None:
        """Raises: EndpointError, PolicyError: a path that is not UTF-8; InvalidArgument: a limit
        that is too large."""
        if not _is_utf8(self.path):
            raise EndpointError(self.path, f"{_NOT_UTF8}; choose another path", errno.EILSEQ)
        if self.policy is not None and not _is_utf8(self.policy):
            raise PolicyError(self.policy, "the file", f"{_NOT_UTF8}; give it another name")
        refuse_too_large(self.limits)


def read_policy(settings: Settings) -> tuple[Policy, bytes | None]:
    """The policy in the file that *settings* name, and its text; the default policy if they name
    none. Raises: PolicyError."""
    if settings.policy is None:
        return Policy(os.geteuid()), None
    try:
        with open(settings.policy, "rb") as stream:
            text = stream.read(MAX_POLICY + 1)
    except OSError as error:
        raise PolicyError(settings.policy, "the file", error.strerror or str(error)) from None
    if len(text) > MAX_POLICY:
        raise PolicyError(settings.policy, "the file", f"it has more than {MAX_POLICY} bytes")
    return _parse(settings.policy, text), text


def policy_of(settings: Settings) -> Policy:
    """The policy of the text that *settings* remember: a successor decides as its predecessor did,
    even if the file has changed since.

    Raises: PolicyError: its users and groups are looked up again, and one may be gone.
    """
    if settings.policy is None or settings.policy_text is None:
        return read_policy(settings)[0]
    return _parse(settings.policy, settings.policy_text)


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # os.fsdecode made surrogates of its bytes
        return False
    return True


def _parse(file: str, text: bytes) -> Policy:
    return policy_from_toml(
        text,
        file=file,
        own_uid=os.geteuid(),
        uid_of=lambda name: pwd.getpwnam(name).pw_uid,
        gid_of=lambda name: grp.getgrnam(name).gr_gid,
    )

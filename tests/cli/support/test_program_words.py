"""NAME[=ADDRESS]... [--] CMD..., as run and deploy read it."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from fdshare.cli.support.program_words import Wanted, WithCommand, parse_wanted, split_words
from fdshare.errors import InvalidArgument


@click.command(cls=WithCommand, context_settings={"allow_interspersed_args": False})
@click.option("--flag", is_flag=True)
@click.argument("words", nargs=-1)
def command(words: tuple[str, ...], flag: bool) -> None:
    click.echo(f"{split_words(words)} {flag}")


@pytest.mark.parametrize(
    ("words", "names", "program", "flag"),
    [
        ("web -- prog --flag", [Wanted("web")], ["prog", "--flag"], False),
        ("web --flag -- prog -- x", [Wanted("web")], ["prog", "--", "x"], True),
        ("web prog --flag", [Wanted("web")], ["prog", "--flag"], False),
        (
            "a=tcp://[::1]:0 b=unix:///x y=1",
            [Wanted("a", "tcp://[::1]:0"), Wanted("b", "unix:///x")],
            ["y=1"],
            False,
        ),
        ("-- prog", [], ["prog"], False),
    ],
)
def test_words(words: str, names: list[Wanted], program: list[str], flag: bool) -> None:
    done = CliRunner().invoke(command, words.split())
    assert done.output == f"{(names, program)} {flag}\n"


def test_addresses_are_read_before_anything_is_bound() -> None:
    with pytest.raises(InvalidArgument):
        parse_wanted(["a=tcp://127.0.0.1:0", "b=nonsense://1"])


def test_there_must_be_a_command() -> None:
    assert "there is no CMD" in CliRunner().invoke(command, ["web", "--"]).output

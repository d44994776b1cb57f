"""The directive `command-line`: a section for each command, from its click definition."""

from __future__ import annotations

import inspect
from typing import Any

import click
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from fdshare.cli.main import commands


class CommandLine(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        context = click.Context(commands, info_name="fdshare")
        sections = []
        for name in commands.list_commands(context):
            command = commands.get_command(context, name)
            assert command is not None
            sections.append(self._section(command, click.Context(command, context, name)))
        return sections

    def _section(self, command: click.Command, context: click.Context) -> nodes.section:
        section = nodes.section(ids=[f"fdshare-{command.name}"])
        self.state.document.note_explicit_target(section)
        section += nodes.title(text=f"fdshare {command.name}")
        usage = " ".join(["fdshare", str(command.name), *command.collect_usage_pieces(context)])
        section += nodes.literal_block(usage, usage, language="text")
        for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
            if paragraph.startswith("\b\n"):
                text = paragraph.removeprefix("\b\n")
                section += nodes.literal_block(text, text, language="text")
            else:
                section += nodes.paragraph("", "", *_inline(" ".join(paragraph.split())))
        options = nodes.definition_list()
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is None or "--help" in record[0]:
                continue
            item = nodes.definition_list_item()
            item += nodes.term("", "", nodes.literal(text=record[0]))
            item += nodes.definition("", nodes.paragraph("", "", *_inline(record[1])))
            options += item
        if options.children:
            section += options
        return section


def _inline(text: str) -> list[nodes.Node]:
    """*text*, with what stands between backquotes as code."""
    parts = text.split("`")
    return [nodes.literal(text=p) if at % 2 else nodes.Text(p) for at, p in enumerate(parts)]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True}

"""Control characters are escaped in text for people, and unchanged in JSON."""

from __future__ import annotations

import json
import logging

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from infexport.cli import cli
from infexport.cli.console import ErrorGroup, Output, printable
from infexport.errors import InfexportError

NAME = "erase\x1b[2J\u202e\x9b.png"


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / NAME)
    return tmp_path / NAME


def test_names_of_files_move_no_cursor(zoo_bundle, image):
    # in colour: otherwise click itself removes some of it
    result = CliRunner().invoke(cli, ["run-engine", str(zoo_bundle("digits-linear")), str(image)], color=True)
    assert result.exit_code == 0
    assert r"erase\x1b[2J\u202e\x9b.png" in result.stdout
    assert result.stdout.isprintable() or "\x1b" not in result.stdout


def test_a_name_with_a_new_line_is_one_line(infexport, zoo_bundle, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a\nerror: all is lost.png")
    shown = infexport("run-engine", zoo_bundle("digits-linear"), tmp_path / "a\nerror: all is lost.png").stdout
    assert not any(line.startswith("error") for line in shown.splitlines())


def test_machines_get_the_name_as_it_is(infexport, zoo_bundle, image):
    result = infexport("run-engine", zoo_bundle("digits-linear"), image, "--json")
    assert json.loads(result.stdout)["images"][0]["file"] == str(image)


@pytest.mark.parametrize("arguments", [["--\x1b[2J"], ["inspect", "x", "--sizes", "\x1b[2J"], ["inspect", "\x1b[2J"]])
def test_errors_say_what_was_typed_harmlessly(arguments):
    result = CliRunner().invoke(cli, arguments, color=True)
    assert result.exit_code == 2
    assert "\x1b[2J" not in result.stderr
    assert r"\x1b[2J" in result.stderr


def test_a_name_with_a_new_line_forges_no_message():
    @click.group(cls=ErrorGroup)
    def group() -> None:
        pass

    @group.command()
    def fails() -> None:
        raise InfexportError("no file: a\nerror: all is lost", "received a\nb", "see a\nhint: run rm")

    result = CliRunner().invoke(group, ["fails"])
    assert result.stderr.splitlines() == [
        r"error: no file: a\nerror: all is lost",
        "  received a",
        "  b",
        r"hint: see a\nhint: run rm",
    ]


def test_what_stages_log_is_a_warning(capsys):
    @click.group(cls=ErrorGroup)
    def group() -> None:
        pass

    @group.command()
    def logs() -> None:
        logging.getLogger("infexport").warning("%s: odd", NAME)

    result = CliRunner().invoke(group, ["logs"], color=True)
    assert r"erase\x1b[2J\u202e\x9b.png: odd" in result.stderr
    assert "warning: " in result.stderr


def test_text_is_left_as_it_is():
    text = "Größe 日本語 مرحبا 🦀\n\ttab"
    assert printable(text) == text
    Output().status(text)

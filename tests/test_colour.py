"""Colour is added where a terminal shows it, and takes nothing away."""

import io
import re

import pytest

from tbptt_props.colour import STYLES, ansi, coloured, is_wanted

TEXT = """\
graph_crosses_no_boundary                                        broken for test_lit_rnn
  A claim.

  time steps 2-3, incoming state: attached to the graph, but should be detached

  gradients reach   01 23
  the loss of 0-1   -#
  the loss of 2-3   !! ##
  # as due, ! too far

  at                rnn.py:41   h = h
  smallest case     Case(steps=4, chunk=2)
  likely cause      The state is not detached
  try               h = h.detach()
  replay            pytest 'test_rnn.py'"""


def tagged(text: str, style: str) -> str:
    return f"<{style} {text}>"


def test_each_part_of_a_failure_has_its_colour() -> None:
    assert (
        coloured(TEXT, tagged)
        == """\
<broken graph_crosses_no_boundary>                                        \
<broken broken for test_lit_rnn>
  A claim.

  time steps 2-3, incoming state: attached to the graph, but should be <due detached>

  gradients reach   01 23
  the loss of 0-1   <found -><due #>
  the loss of 2-3   <found !!> <due ##>
  # as due, ! too far

<label   at                >rnn.py:41   h = h
<label   smallest case     >Case(steps=4, chunk=2)
<label   likely cause      >The state is not detached
<label   try               ><fix h = h.detach()>
<label   replay            >pytest 'test_rnn.py'"""
    )


def test_a_line_on_a_broken_property_stands_out_among_those_that_hold() -> None:
    lines = "  holds       one\n  BROKEN      two\n  not judged  three"

    assert coloured(lines, tagged) == (
        "  holds       one\n<broken   BROKEN>      two\n  not judged  three"
    )


def test_without_its_colours_a_text_is_as_it_was() -> None:
    painted = coloured(TEXT, ansi)

    assert painted != TEXT
    assert re.sub("\033\\[[0-9;]*m", "", painted) == TEXT


def test_every_style_is_one_that_terminals_know() -> None:
    assert [ansi("x", style) for style in ("due", "broken")] == [
        "\033[32mx\033[0m",
        "\033[1;31mx\033[0m",
    ]
    assert all(re.fullmatch("[0-9;]+", code) for code in STYLES.values())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "stream", "due"),
    [
        ({}, Terminal(), True),
        ({}, io.StringIO(), False),
        ({"NO_COLOR": "1"}, Terminal(), False),
        ({"NO_COLOR": ""}, Terminal(), True),
        ({"TERM": "dumb"}, Terminal(), False),
    ],
)
def test_colour_is_wanted_at_a_terminal_unless_somebody_asks_for_none(
    environment: dict[str, str], stream: io.StringIO, due: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert is_wanted(stream) is due

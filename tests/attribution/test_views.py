"""What an attribution looks like: numbers, no trust in the prompt."""

import io
import json
import re

import numpy as np
import pytest

from memhook.attribution.gradient import TokenAttribution
from memhook.attribution.tokens import tokens_of

EVIL = '<script>alert("x")</script>'
ESCAPE = "\x1b[31mred\u202e"


def attribution(*words, prompt="", cut_off=""):
    tokens = tokens_of(["<s>", *words, "</s>"], special=[True, *[False] * len(words), True], marks="none", prompt=prompt, cut_off=cut_off)
    gradients = np.linspace(0.5, 1.5, len(tokens))[None, None].repeat(2, axis=1)
    return TokenAttribution(gradients, np.zeros(2, int), (tokens,))


def rich_text(shown, *, color=False, width=100):
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=color, color_system="standard" if color else None, width=width)
    console.print(shown)
    return console.file.getvalue()


def test_html_escapes_the_prompt_and_shows_numbers():
    page = attribution("a", EVIL, ESCAPE, prompt=f"a {EVIL}", cut_off=f"b {EVIL}")._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "start, end and padding" in page
    assert re.findall(r"opacity:0.75\">([\d.]+)<", page) == ["0.75", "1", "1.25"]


@pytest.mark.parametrize("show", [str, rich_text], ids=["text", "rich"])
def test_terminals_get_numbers_and_no_control_characters(show):
    text = show(attribution("[bold]a[/bold]", ESCAPE, prompt=f"a {ESCAPE}", cut_off=ESCAPE))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"\x1b[31mred\u202e" in text
    assert "[bold]a[/bold]" in text
    assert "0.833" in text
    assert "1.17" in text
    assert "2 positions" in text


def test_rich_colors_the_highest():
    assert "\x1b[1;31m" in rich_text(attribution("low", "high"), color=True)


def test_plot_takes_any_prompt():
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ax = attribution("$x^$", r"\frac{", prompt="$x^$ of $y").plot()
    ax.figure.canvas.draw()
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.5 + 1 / 3, 0.5 + 2 / 3])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["$x^$", r"\frac{"]
    _, other = plt.subplots()
    assert attribution("a").plot(ax=other) is other
    plt.close("all")


def test_json_has_everything():
    found = json.loads(json.dumps(attribution("a", "b", prompt="a b").to_dict()))
    assert found["evaluations"] == 1
    (prompt,) = found["prompts"]
    assert prompt["words"] == [
        {"word": "a", "score": pytest.approx(0.5 + 1 / 3), "positions": [1]},
        {"word": "b", "score": pytest.approx(0.5 + 2 / 3), "positions": [2]},
    ]
    assert len(prompt["tokens"]) == len(prompt["scores"]) == len(prompt["special"]) == 4


def test_repr_is_one_line():
    assert repr(attribution("a")) == "<TokenAttribution: 1 prompts, 2 samples, 3 positions, 1 evaluations>"

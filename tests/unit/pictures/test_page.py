"""A page is one file: it opens in a browser, shows its pictures and asks for nothing."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from distmuon.pictures.figure import new_figure, to_png
from distmuon.pictures.page import Grid, Heading, Paragraph, Picture, render_page
from tests.browser import open_in_browser, read_strictly

pytest.importorskip("matplotlib")
SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="400" height="20">'
    b'<rect id="a" width="400" height="20" fill="teal"/></svg>'
)


def figure() -> bytes:
    drawn = new_figure(300)
    drawn.add_subplot().plot([0, 1], [0, 1])
    return to_png(drawn)


def page() -> str:
    return render_page(
        'Who <owns> & "moves"',
        [
            Paragraph("first line\nsecond < line"),
            Heading("Loads"),
            Picture(figure(), "png", "a line", "Units: s"),
            Picture(SVG, "svg+xml", 'a "bar"'),
            Picture(SVG, "svg+xml", "the same ids once more"),
            Grid(("name", "bytes"), (("a<b>", "1,024"),) * 3, frozenset({1})),
        ],
    )


def test_a_page_is_strict_html_and_refers_to_nothing() -> None:
    read = read_strictly(page())
    assert [image[:4] for image in read.images] == [b"\x89PNG", b"<svg", b"<svg"]
    words = " ".join(read.text)
    assert all(word in words for word in ('Who <owns> & "moves"', "second < line", "a<b>", "1,024"))


def test_a_page_opens_in_a_browser(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(), encoding="utf-8")
    opened = open_in_browser(path)
    assert opened.title == 'Who <owns> & "moves"'
    assert "first line\nsecond < line" in opened.text
    assert opened.images == ((2400, 600), (400, 20), (400, 20))
    assert opened.width <= 1200
    assert (opened.requests, opened.complaints) == ((), ())


def test_the_browser_would_tell(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    broken = base64.b64encode(b"\x89PNG broken").decode()
    bad = f'<img src="data:image/png;base64,{broken}" alt="x"><img src="other.png" alt="y"></body>'
    path.write_text(page().replace("</body>", bad), encoding="utf-8")
    opened = open_in_browser(path)
    assert opened.images[-2:] == ((0, 0), (0, 0))
    assert any("other.png" in told for told in (*opened.complaints, *opened.requests))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('<img src="a.png" alt="x">', "loads 'a.png'"),
        ('<img src="data:image/png;base64,AAAA" alt="x">', "cannot identify"),
        ('<a href="https://example.org">x</a>', "refers to"),
        ("<script>1</script>", "no <script>"),
        ("<p>", "closes another"),
        ('<b id="a">x</b><b id="a">y</b>', "twice"),
        ('<a href="#b">x</a>', "leads nowhere"),
        ("<style>p { background: url(x.png) }</style>", "refers to something"),
    ],
)
def test_the_strict_reader_would_tell(bad: str, message: str) -> None:
    with pytest.raises((AssertionError, OSError), match=message):
        read_strictly(page().replace("</body>", f"{bad}</body>"))

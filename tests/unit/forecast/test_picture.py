"""The picture of a plan can be read: no text over another or over the edge, units, legends."""

from __future__ import annotations

import io
import itertools

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from distmuon import CostModel
from distmuon.forecast import picture as pictures
from distmuon.forecast.forecast import Forecast, make_forecast
from distmuon.forecast.models import MODELS
from distmuon.pictures.figure import to_png
from tests.unit.cli.test_plan import unclear

RATES = CostModel(latency=1e-5, bandwidth=1e10, flops=1e12)


def forecast(name: str, world_size: int, **options: object) -> Forecast:
    model = unclear() if name == "unclear" else MODELS[name]()
    return make_forecast(name, model, world_size=world_size, cost_model=RATES, options=options)


def visible(figure: Figure) -> list[Text]:
    """All text but labels of ticks that lie outside of their axes, which are not drawn."""
    ticks = {
        label: axis.get_view_interval()[0] <= place <= axis.get_view_interval()[1]
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
    }
    found = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return [t for t in found if t.get_text().strip() and t.get_visible() and ticks.get(t, True)]


@pytest.mark.parametrize(
    ("name", "world_size", "options"),
    [
        ("llama-3-70b", 1024, {"max_split": 4}),
        ("kimi-k2-stacked", 300, {}),
        ("qwen3-32b", 6, {"layout": "aligned"}),
        ("unclear", 1, {}),
        ("unclear", 5, {}),
    ],
)
def test_no_text_is_over_another_or_cut_off(
    name: str, world_size: int, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        drawn.append(figure)
        return to_png(figure)

    monkeypatch.setattr(pictures, "to_png", keep)
    content = pictures.draw_plan(forecast(name, world_size, **options))
    with Image.open(io.BytesIO(content)) as image:
        assert image.width == 2400
    (figure,) = drawn
    figure.set_dpi(100)
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in visible(figure)]
    assert len(boxes) > 10
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (one, box), (other, second) in itertools.combinations(boxes, 2):
        assert not box.overlaps(second), f"{one!r} is over {other!r}"


def test_units_and_legends_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "to_png", lambda figure: drawn.append(figure) or b"")
    pictures.draw_plan(forecast("llama-3-70b", 1024, max_split=4))
    words = [text.get_text() for text in visible(drawn[0])]
    for expected in ("TFLOP", "GB per rank", "matrices per rank", "MB, and as much back", "rank"):
        assert expected in words
    for expected in ("Newton-Schulz", "pieces to owners", "updates back", "Gram matrices"):
        assert expected in words

"""The charts of a report, read back from what matplotlib was given: the figures, their order and their names."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_rgba
from ultralytics.engine.distillation.report.charts import (
    COLORS,
    Example,
    Scene,
    Seen,
    draw_calibration,
    draw_classes,
    draw_examples,
    draw_losses,
    draw_scenes,
    draw_score,
    draw_seeds,
)
from ultralytics.utils.distillation.metrics import Calibration, calibration

CURVES = {"student": [0.2, 0.5, 0.75], "baseline": [0.1, 0.4]}
RAW = {"loss": np.array([2.0, 1.0]), "feature_loss": np.array([0.5, 0.0])}
ROWS = (
    {"name": "cat", "student": 0.9, "teacher": 0.8},
    {"name": "dog", "student": 0.5, "teacher": 0.7},
    {"name": "eel", "student": 0.7, "teacher": 0.6},
)
BINS = Calibration(
    0.125,
    torch.tensor([0.1, torch.nan, 0.9]),
    torch.tensor([0.2, torch.nan, 0.6]),
    torch.tensor([10, 0, 30]),
)


def example(height=6, width=8, levels=2, channels=3, **names):
    """Return an example whose attention differs from cell to cell."""
    attention = [(np.full((2, 2), 2 * i + 0.1), np.full((3, 3), 2 * i + 1.1)) for i in range(levels)]
    image = np.linspace(0, 1, height * width * channels).reshape(height, width, channels)
    named = {"student": "dog", "teacher": "cat"}
    return Example(image, names.pop("label", "cat"), {**named, **names}, attention)


OUTLINE = np.array([[1.0, 1.0], [5.0, 1.0], [5.0, 4.0], [1.0, 4.0]])
SEEN = [
    Seen("cat", 0.9, OUTLINE, np.eye(3, 4) > 0, np.array([[2.0, 2.0, 1.0], [3.0, 3.0, 0.0]])),
    Seen("dog", None, OUTLINE + 1, None, np.array([[2.0, 2.0], [4.0, 3.0]])),
    Seen("cat", 0.5, OUTLINE),
]


def scene(**seen):
    """Return an image of 8 x 6 pixels, and what is seen in it."""
    return Scene(np.full((6, 8, 3), 0.5), seen)


CHARTS = {
    "accuracy": lambda: draw_score(CURVES, 0.9, "top-1 (%)"),
    "losses": lambda: draw_losses(RAW),
    "seeds": lambda: draw_seeds({"plain": {"0": [0.1]}, "distilled": {"0": [0.2, 0.3]}}, "top-1 (%)"),
    "classes": lambda: draw_classes(ROWS, ["student", "teacher"], "accuracy (%)"),
    "calibration": lambda: draw_calibration({"student": BINS}),
    "scenes": lambda: draw_scenes([scene(label=SEEN, student=[])]),
    "examples": lambda: draw_examples([example(), example()], [8, 16]),
}


def lines(axes):
    """Return what was drawn as lines, by label."""
    return {line.get_label(): line for line in axes.lines}


def ticks(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


@pytest.mark.parametrize("chart", CHARTS)
def test_a_chart_is_a_figure_of_its_own(chart):
    """Which no other part of the program draws in, nor keeps alive."""
    before = pyplot.get_fignums()
    first, second = CHARTS[chart](), CHARTS[chart]()
    assert first is not second
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("chart", CHARTS)
def test_nothing_is_cut_off(chart):
    """What is written lies on the picture."""
    figure = CHARTS[chart]()
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    box = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height


def test_accuracy_is_in_percent_by_epochs_from_1_on():
    (axes,) = draw_score(CURVES, None, "top-1 (%)").axes
    drawn = lines(axes)
    assert drawn.keys() == {"student", "baseline"}
    for who, curve in CURVES.items():
        assert list(drawn[who].get_xdata()) == list(range(1, len(curve) + 1))
        assert drawn[who].get_ydata() == pytest.approx([100 * x for x in curve])
    assert "%" in axes.get_ylabel()
    assert axes.get_xlabel() == "epoch"
    assert axes.get_xlim() == (0.5, 3.5)  # of the longest


@pytest.mark.parametrize("top1", [0.9, 0.0, None])
def test_the_teachers_accuracy_is_a_level_line_if_it_is_known(top1):
    (axes,) = draw_score(CURVES, top1, "top-1 (%)").axes
    drawn = lines(axes)
    assert ("teacher" in drawn) == (top1 is not None)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(drawn)
    if top1 is not None:
        assert list(drawn["teacher"].get_ydata()) == pytest.approx([100 * top1] * 2)
        assert drawn["teacher"].get_linestyle() == "--"


@pytest.mark.parametrize("epochs", [1, 2, 5, 300])
def test_epochs_are_whole_numbers(epochs):
    accuracy = draw_score({"student": [0.5] * epochs}, None, "top-1 (%)")
    losses = draw_losses({"loss": np.ones(epochs)})
    for axes in (accuracy.axes[0], losses.axes[0]):
        axes.figure.draw_without_rendering()
        low, high = axes.get_xlim()
        shown = [x for x in axes.get_xticks() if low <= x <= high]
        assert shown
        assert all(x == int(x) >= 1 for x in shown)


def test_losses_are_drawn_as_they_are_and_zeros_left_out():
    (top,) = draw_losses(RAW).axes
    assert top.get_yscale() == "log"
    drawn = lines(top)
    assert list(drawn) == list(RAW)
    np.testing.assert_array_equal(drawn["loss"].get_ydata(), [2, 1])
    np.testing.assert_array_equal(drawn["feature_loss"].get_ydata(), [0.5, np.nan])  # a logarithm has no zero
    assert list(drawn["loss"].get_xdata()) == [1, 2]
    assert [text.get_text() for text in top.get_legend().get_texts()] == list(RAW)


def test_seeds_are_thin_lines_and_their_mean_a_thick_one():
    """As long as the shortest of them, as runs may stop early."""
    curves = {"plain": {"0": [0.1, 0.2, 0.6], "1": [0.3, 0.4]}, "distilled": {"0": [0.5, 0.7]}}
    (axes,) = draw_seeds(curves, "top-1 (%)").axes
    *thin, mean = axes.lines[:3]
    assert [list(line.get_ydata()) for line in thin] == [pytest.approx([10, 20, 60]), pytest.approx([30, 40])]
    assert list(mean.get_ydata()) == pytest.approx([20, 30])
    assert all(line.get_linewidth() < mean.get_linewidth() for line in thin)
    assert [x.get_text() for x in axes.get_legend().get_texts()] == [
        "plain, mean of 2 seeds",
        "distilled, mean of 1 seeds",
    ]
    assert len({line.get_color() for line in axes.lines}) == 2
    assert axes.get_xlim() == (0.5, 3.5)


def test_classes_are_in_the_order_of_the_student_with_its_worst_at_the_bottom():
    rows = list(ROWS)
    (axes,) = draw_classes(rows, ["student", "teacher"], "accuracy (%)").axes
    assert ticks(axes.yaxis) == ["dog", "eel", "cat"]
    assert list(axes.get_yticks()) == [0, 1, 2]
    drawn = lines(axes)
    assert list(drawn) == ["student", "teacher"]
    assert drawn["student"].get_xdata() == pytest.approx([50, 70, 90])
    assert drawn["teacher"].get_xdata() == pytest.approx([70, 60, 80])
    assert list(drawn["teacher"].get_ydata()) == [0, 1, 2]
    assert rows == list(ROWS)  # not sorted in place
    assert "%" in axes.get_xlabel()


def test_classes_show_the_networks_that_are_named_and_no_other():
    figure = draw_classes(ROWS, ["student"], "accuracy (%)")
    assert list(lines(figure.axes[0])) == ["student"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["student"]


def test_each_class_has_room():
    few, many = (draw_classes(ROWS * n, ["student"], "accuracy (%)").get_figheight() for n in (1, 10))
    assert many - few == pytest.approx(0.25 * 27)


def test_networks_that_lie_on_each_other_are_told_apart():
    rows = [{"name": "cat", "student": 0.5, "teacher": 0.5, "baseline": 0.5}]
    (axes,) = draw_classes(rows, list(COLORS), "accuracy (%)").axes
    assert len({line.get_marker() for line in axes.lines}) == 3


@pytest.mark.parametrize("who", COLORS)
def test_a_network_has_one_colour_in_every_chart(who):
    curves, top1 = ({"student": [0.5]}, 0.9) if who == "teacher" else ({who: [0.5]}, None)
    (accuracy,) = draw_score(curves, top1, "top-1 (%)").axes
    (classes,) = draw_classes([{"name": "cat", "student": 0.5, who: 0.5}], [who], "accuracy (%)").axes
    (calibrated,) = draw_calibration({who: BINS}).axes
    found = [lines(accuracy)[who].get_color(), lines(classes)[who].get_color(), calibrated.lines[1].get_color()]
    dots = tuple(calibrated.collections[0].get_facecolor()[0])
    assert [to_rgba(color) for color in found] == [to_rgba(COLORS[who])] * 3
    assert dots == to_rgba(COLORS[who])
    assert len(set(COLORS.values())) == len(COLORS)


def test_calibration_shows_the_bins_that_hold_images():
    (axes,) = draw_calibration({"student": BINS}).axes
    diagonal, curve = axes.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    assert list(curve.get_xdata()) == pytest.approx([0.1, 0.9])
    assert list(curve.get_ydata()) == pytest.approx([0.2, 0.6])
    (dots,) = axes.collections
    np.testing.assert_allclose(dots.get_offsets(), [[0.1, 0.2], [0.9, 0.6]], rtol=1e-6)
    small, large = dots.get_sizes() - 5
    assert large == pytest.approx(3 * small)  # as many images
    assert axes.get_legend().get_texts()[0].get_text() == "student, error 12.5 %"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("confidence", "accuracy")
    assert min(axes.get_xlim()[1], axes.get_ylim()[1]) > 1  # a dot at the end is whole


def test_calibration_of_every_network_is_there():
    logits, labels = 3 * torch.randn(50, 4), torch.arange(50) % 4
    measured = {"student": calibration(logits, labels), "teacher": calibration(2 * logits, labels)}
    (axes,) = draw_calibration(measured).axes
    said = [text.get_text() for text in axes.get_legend().get_texts()]
    assert said == [f"{who}, error {100 * x.error:.1f} %" for who, x in measured.items()]
    assert [len(dots.get_offsets()) for dots in axes.collections] == [(x.count > 0).sum() for x in measured.values()]


def grid(examples, strides):
    """Return the cells of a chart of examples by row."""
    cells = draw_examples(examples, strides).axes
    return np.array(cells, dtype=object).reshape(len(examples), -1)


@pytest.mark.parametrize(("strides", "columns"), [([], 1), ([8], 3), ([8, 16, 32], 7)])
@pytest.mark.parametrize("count", [1, 3])
def test_examples_have_a_row_each_and_two_cells_per_level(count, strides, columns):
    cells = grid([example(levels=len(strides)) for _ in range(count)], strides)
    assert cells.shape == (count, columns)
    assert not any(cell.axison for cell in cells.flat)
    assert [len(cell.images) for cell in cells[-1]] == [1] + [2] * (columns - 1)


def test_an_example_says_what_it_is_and_what_it_was_taken_for():
    first, second = grid([example(), example(label="eel", student="eel")], [8, 16])[:, 0]
    assert first.get_title() == "label: cat\nstudent: dog\nteacher: cat"
    assert second.get_title() == "label: eel\nstudent: eel\nteacher: cat"
    np.testing.assert_array_equal(first.images[0].get_array(), example().image)


def test_attention_lies_over_the_gray_image_at_its_size():
    """Student and teacher of the finer level, then those of the coarser one."""
    (cells,) = grid([example(height=6, width=8)], [8, 16])
    assert [cell.get_title() for cell in cells[1:]] == [
        f"{who}\nstride {stride}" for stride in (8, 16) for who in ("student", "teacher")
    ]
    assert [cell.images[1].get_array().max() for cell in cells[1:]] == pytest.approx([0.1, 1.1, 2.1, 3.1])
    for cell in cells[1:]:
        below, above = cell.images
        np.testing.assert_array_equal(below.get_array(), example().image.mean(2))
        assert below.get_extent() == above.get_extent() == [0, 8, 6, 0]
        assert (below.get_cmap().name, above.get_cmap().name) == ("gray", "inferno")
        assert 0 < above.get_alpha() < 1
        assert above.norm.vmin == 0  # dark where nobody looks, even if all cells are alike


def test_gray_images_are_drawn_in_gray():
    (cells,) = grid([example(channels=1, levels=1)], [8])
    assert cells[0].images[0].get_cmap().name == "gray"
    assert cells[0].images[0].get_array().shape[:2] == (6, 8)


@pytest.mark.parametrize("strides", [[8], [8, 16, 32]])
def test_levels_that_do_not_fit_are_no_chart(strides):
    with pytest.raises(ValueError, match="zip"):
        draw_examples([example(levels=2)], strides)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("x" * 24, "x" * 24),
        ("x" * 25, "x" * 23 + "…"),
        ("y" * 300, "y" * 23 + "…"),
        ("$5", r"\$5"),
        (r"$\frac{$", r"\$\frac{\$"),
    ],
)
def test_names_of_classes_are_cut_short_and_no_formulas(name, shown):
    (axes,) = draw_classes([{"name": name, "student": 0.5}], ["student"], "accuracy (%)").axes
    assert ticks(axes.yaxis) == [shown]


@pytest.mark.parametrize(("name", "shown"), [("x" * 16, "x" * 16), ("x" * 17, "x" * 15 + "…"), ("$_$", r"\$_\$")])
def test_names_over_images_are_cut_short_and_no_formulas(name, shown):
    ((cell,),) = grid([example(levels=0, label=name, student=name, teacher=name)], [])
    assert cell.get_title().splitlines() == [f"{who}: {shown}" for who in ("label", "student", "teacher")]


def test_names_that_are_formulas_are_drawn(tmp_path):
    """Matplotlib reads them when it draws, so only then could it fail."""
    draw_classes([{"name": r"$\frac{$", "student": 0.5}], ["student"], "accuracy (%)").savefig(tmp_path / "classes.png")
    draw_examples([example(label="$_$", student="$5_$")], [8, 16]).savefig(tmp_path / "examples.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_scenes_show_what_everybody_sees():
    figure = draw_scenes([scene(label=SEEN, student=SEEN[:1]), scene(label=[], student=SEEN * 7)])
    cells = np.array(figure.axes, dtype=object).reshape(2, 2)
    assert [cell.get_title() for cell in cells.flat] == ["label: 3", "student: 1", "label: 0", "student: 21"]
    labels, one, none, many = cells.flat
    boxes = [patch.get_xy()[:4] for patch in labels.patches]
    np.testing.assert_array_equal(boxes, [x.outline for x in SEEN])
    colors = [patch.get_edgecolor() for patch in labels.patches]
    assert colors[0] == colors[2] != colors[1]
    assert [text.get_text() for text in labels.texts] == ["cat 0.90", "dog", "cat 0.50"]
    image, mask = one.images
    assert tuple(mask.get_extent()) == (0, 8, 6, 0)  # over the image, of which it has fewer pixels
    assert image.get_array().shape == (6, 8, 3)
    assert (mask.get_array()[..., 3] > 0).sum() == 3
    assert [line.get_xydata().tolist() for line in labels.lines] == [[[2.0, 2.0]], [[2.0, 2.0], [4.0, 3.0]]]
    assert not none.patches
    assert len(many.patches) == 21
    assert not many.texts  # so many names would cover the image
    assert {(cell.get_xlim(), cell.get_ylim()) for cell in cells.flat} == {((0, 8), (6, 0))}

"""What the charts draw, by their data, with one class, a few and many; and that nothing lies over anything else."""

from types import ModuleType

import numpy as np
import pytest

from onestage.evaluation import charts
from onestage.evaluation.report import Report, measure
from onestage.metrics.mean_ap import MeanAP

A = [0, 0, 10, 10]


def report_of(found: list, num_classes: int) -> Report:
    classes = [f"class {number} with a long name" for number in range(num_classes)]
    return measure(found, classes=classes, threshold=0.25, coco=MeanAP(classes=classes)(found))


@pytest.fixture(params=[1, 3, 40])
def report(request: pytest.FixtureRequest, scenes: ModuleType) -> Report:
    return report_of(scenes.scene(1, num_images=60, num_classes=request.param), request.param)


def test_five_charts_of_any_number_of_classes(report: Report) -> None:
    figures = charts.all_of(report)
    assert list(figures) == ["precision_recall", "f1", "confusion", "calibration", "errors"]
    for figure in figures.values():
        pixels = charts.picture(figure)
        assert pixels.dtype == np.uint8 and min(pixels.shape[:2]) > 300
        assert (pixels < 128).any(axis=2).mean() > 0.001
        for axes in figure.axes:
            assert axes.get_xlabel() or axes.get_ylabel()


def test_of_many_classes_the_best_and_the_worst_have_names(scenes: ModuleType) -> None:
    report = report_of(scenes.scene(1, num_images=80, num_classes=40), 40)
    figure = charts.precision_recall(report)
    named = [text.get_text() for text in figure.legends[0].texts]
    assert len(named) == 3 + 3 + 2  # and the two means
    assert len(figure.axes[0].lines) == len(report.curves[0]) + 2
    scores = [float(name.split()[-1]) for name in named[:6]]
    assert scores == sorted(scores, reverse=True)
    each = sorted(one.envelope().mean() for one in report.curves[0])
    assert scores[0] == pytest.approx(each[-1], abs=1e-3) and scores[-1] == pytest.approx(each[0], abs=1e-3)


def test_the_means_are_map_50_and_map(scenes: ModuleType) -> None:
    report = report_of(scenes.scene(2), 3)
    named = [text.get_text() for text in charts.precision_recall(report).legends[0].texts]
    assert named[-2] == f"mean  {report.metrics['map_50']:.3f}"
    assert named[-1] == f"mean, IoU 0.5 to 0.95  {report.metrics['map']:.3f}"


def test_the_only_class_is_drawn_once(scenes: ModuleType) -> None:
    report = report_of(scenes.scene(2, num_classes=1), 1)
    figure = charts.precision_recall(report)
    assert len(figure.axes[0].lines) == 2
    assert figure.legends[0].texts[0].get_text() == f"class 0 with a lo…  {report.metrics['map_50']:.3f}"


def test_the_best_threshold_is_marked(scenes: ModuleType) -> None:
    report = report_of(scenes.scene(2), 3)
    lines = {line.get_label(): line for line in charts.f1(report).axes[0].lines}
    assert lines["best threshold for all"].get_xdata()[0] == report.metrics["f1/threshold"]
    assert lines["the model's threshold"].get_xdata()[0] == 0.25


def test_the_cells_hold_the_counts(scenes: ModuleType) -> None:
    report = report_of(scenes.scene(2), 3)
    axes = charts.confusion(report).axes[0]
    shown = {tuple(map(int, text.get_position()))[::-1]: int(text.get_text()) for text in axes.texts}
    assert shown == {place: count for place, count in np.ndenumerate(report.confusion) if count}
    assert axes.get_yticklabels()[-1].get_text() == "background"


def test_nothing_found_is_drawn_as_well(scenes: ModuleType) -> None:
    blank = report_of([scenes.one([(A, 0)], [])], 1)
    empty = report_of([scenes.one([], [])], 1)
    assert len(charts.all_of(blank)) == 5
    assert list(charts.all_of(empty)) == ["confusion", "calibration", "errors"]
    for figure in (*charts.all_of(blank).values(), *charts.all_of(empty).values()):
        charts.picture(figure)

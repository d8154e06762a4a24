"""Pictures hold the numbers they were given: the drawn artists are read back."""

import subprocess
import sys

import numpy as np
from matplotlib.image import imread

from ketchup_cache.errors import WriteError
from ketchup_cache.report.plots import variance_bias_figure, write_png
from tests.helpers.errors import refuses


def policy(label, kl, points):
    names = ("k", "variance", "variance_se", "bias", "bias_se")
    return {"label": label, "kl_per_token": kl, "by_k": [dict(zip(names, point, strict=True)) for point in points]}


FAR = policy("far", 1.25, [(1, 40.0, 4.0, 0.0, 0.0), (2, 22.0, 2.0, 5.0, 0.5), (8, 11.0, 1.0, 7.0, 0.75)])
NEAR = policy("near", 0.5, [(k, None, None, bias, None) for k, bias in ((1, 0.0), (2, 1.5), (8, 3.0))])


def drawn(axes, label: str) -> tuple[list[float], list[float], list[list[float]]]:
    """x, y and the vertical bars' ends of one labelled errorbar."""
    (container,) = [c for c in axes.containers if c.get_label().startswith(label)]
    line, _, (bars,) = container
    return list(line.get_xdata()), list(line.get_ydata()), [list(s[:, 1]) for s in bars.get_segments()]


def test_variance_and_bias_are_drawn_with_their_bars():
    variance, bias = variance_bias_figure({"policies": [FAR, NEAR]}).axes
    assert drawn(variance, "far") == ([1, 2, 8], [40, 22, 11], [[36, 44], [20, 24], [10, 12]])
    assert drawn(bias, "far") == ([1, 2, 8], [0, 5, 7], [[0, 0], [4.5, 5.5], [6.25, 7.75]])
    assert drawn(bias, "near") == ([1, 2, 8], [0, 1.5, 3], [[0, 0], [1.5, 1.5], [3, 3]])
    variance.figure.draw_without_rendering()
    for axes in (variance, bias):
        assert axes.get_xscale() == "log"
        assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "8"]
        assert axes.get_ylim()[0] == 0
    # an unknown variance is left out, not drawn as zero
    assert [c.get_label()[:3] for c in variance.containers] == ["far"]
    variance, _ = variance_bias_figure({"policies": [NEAR]}).axes
    assert [text.get_text() for text in variance.texts] == ["needs 2 rollouts per prompt"]


def test_policies_are_named_with_their_kl_from_near_to_far_and_look_different():
    nobody = dict(FAR, label="nobody", kl_per_token=None)  # all its tokens were forced
    figure = variance_bias_figure({"policies": [nobody, FAR, NEAR]})
    names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert names == ["near   (KL 0.5 nats per token)", "far   (KL 1.25 nats per token)", "nobody   (KL unknown)"]
    drawn_lines = [container[0] for container in figure.axes[1].containers]
    assert len({line.get_marker() for line in drawn_lines}) == len({line.get_linestyle() for line in drawn_lines}) == 3
    grey = [np.dot(line.get_color()[:3], [0.299, 0.587, 0.114]) for line in drawn_lines[::2]]
    assert grey[1] - grey[0] > 0.3  # readable without colour


def test_files_are_png_of_150_dpi(tmp_path):
    write_png(variance_bias_figure({"policies": [FAR]}), tmp_path / "new" / "analysis.png")
    path = tmp_path / "new" / "analysis.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    picture = imread(path)
    assert picture.shape[1] == 9 * 150
    assert 0.7 < picture[..., :3].mean() < 0.999  # mostly white, not blank
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "x.png"
    refuses(WriteError, r"x\.png: can't be written", write_png, variance_bias_figure({"policies": [FAR]}), place)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"analysis.png", "file"}


def test_pyplot_with_its_global_state_is_not_touched():
    code = "import sys, ketchup_cache.report.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_overlaps():
    long = dict(FAR, label="runs/" + "a-long-folder-name/" * 6 + "student, step 1000", kl_per_token=3.0)
    for figure in (
        variance_bias_figure({"policies": [FAR, NEAR, long]}),
        variance_bias_figure({"policies": [dict(long, kl_per_token=i / 7) for i in range(12)]}),
    ):
        figure.draw_without_rendering()
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        for i, one in enumerate(boxes):
            assert min(one.x0, one.y0, figure.bbox.x1 - one.x1) >= 0
            assert not any(one.overlaps(other) for other in boxes[i + 1 :])

"""Charts across runs: bars stand on zero, up or down."""

from fastpeft.report.comparison_charts import bar_chart


def test_bars_go_up_and_down_from_zero():
    chart = bar_chart("t", "%", ["a", "b", "c"], [("change", [4.0, -2.0, None])])
    (_, top_up, _, up, _, _), (_, top_down, _, down, _, said) = chart["bars"]
    assert abs(up - 2 * down) < 0.3 and abs(top_up + up - top_down) < 0.2  # the first ends where the second begins: at zero
    assert top_down + down <= chart["bottom"] + 0.1 and said == "b, change: -2 %"


def test_bars_that_only_go_up_stand_on_the_axis():
    chart = bar_chart("t", "%", ["a"], [("x", [4.0]), ("y", [1.0])])
    assert all(abs(top + size - chart["bottom"]) < 0.2 for _, top, _, size, _, _ in chart["bars"])
    assert bar_chart("t", "%", ["a"], [("x", [None])]) is None

"""The demo's page: a row a plan, beside always giving the most frequent answer."""

from fastpeft.demo.__main__ import page


def test_page():
    scored = {"n": 1000, "majority": 0.213, "open": 0.5, "closed": 0.25, "global": 0.4}
    costs = {"seconds": 12.4, "peak_memory_bytes": 650_000_000}
    text = page([{"plan": "frozen", "trainable": 0, **scored}, {"plan": "T/T/T", "trainable": 2_792_960, **scored, **costs}], 120, 41.2)
    assert "41 s in all" in text and "1000 questions" in text and "120 steps" in text
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in table}) == 1
    assert table[2:] == [
        ["always the most frequent answer", "", "", "", "21.3%", "", ""],
        ["frozen", "0", "50.0%", "25.0%", "40.0%", "", ""],
        ["T/T/T", "2,792,960", "50.0%", "25.0%", "40.0%", "12", "0.65 GB"],
    ]

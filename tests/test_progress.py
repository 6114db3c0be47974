"""In a file, progress is lines; on a terminal, a bar."""

import io

from fastpeft import progress as module
from fastpeft.progress import Lines, progress_bar


class Screen(io.StringIO):
    def isatty(self):
        return True


def shown(stream, monkeypatch, every=0.0):
    monkeypatch.setattr(module.sys, "stderr", stream)
    monkeypatch.setattr(module, "EVERY", every)
    with progress_bar(total=3, desc="training", unit="step", leave=False) as bar:
        for n in range(3):
            bar.set_postfix({"loss": n}, refresh=False)
            bar.update()
    return stream.getvalue()


def test_a_file_gets_lines(monkeypatch):
    text = shown(io.StringIO(), monkeypatch)
    assert "\r" not in text and text.endswith("\n")
    assert "training: 3/3 step in 00:00, 00:00 left, loss=2" in text.splitlines()
    assert len(text.splitlines()) <= 6  # the start, each step, the end


def test_not_a_line_each_step(monkeypatch):
    assert len(shown(io.StringIO(), monkeypatch, every=3600).splitlines()) == 3  # the start, and the end twice


def test_a_terminal_gets_a_bar(monkeypatch):
    assert "\r" in shown(Screen(), monkeypatch)


def test_switched_off(monkeypatch):
    monkeypatch.setattr(module.sys, "stderr", stream := io.StringIO())
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2] and stream.getvalue() == "" and Lines is not None

"""The picture of the README is drawn from recorded results, true to scale."""

import json
import xml.etree.ElementTree as ET

import pytest

from benchmarks.figure import FIGURE, LENGTH, RESULTS, Runs, drawn, main, newest_runs, runs_of

RUNS = Runs({"without": (8.0, 8.5, 7.5, 8.0), "with": (8.2, 0.05, 0.04, 0.06)}, 2_000, "a <fast> machine & more")
SVG = "{http://www.w3.org/2000/svg}"


def recorded(runs, **other):
    """A file of results that has these runs."""
    numbers = {
        f"training a head on MiniLM, {runs.texts} texts, epoch {epoch}, {side} the cache": {"value": own, "unit": "s"}
        for side, seconds in runs.seconds.items()
        for epoch, own in enumerate(seconds, 1)
    }
    return {"machine": {"processor": "Some(R) Processor", "cores": 2}, "numbers": {**numbers, **other}}


def bars(picture):
    """The rectangles of a picture, by the height at which they lie: place and length."""
    found = {}
    for bar in ET.fromstring(picture).iter(f"{SVG}rect"):
        found.setdefault(float(bar.get("y")), []).append((float(bar.get("x")), float(bar.get("width"))))
    return list(found.values())


def test_the_picture_is_that_of_the_newest_results():
    """Who records new results draws anew: python benchmarks/figure.py."""
    if not RESULTS.exists():
        pytest.skip("a source archive has no recorded results")
    assert FIGURE.read_text(encoding="utf-8") == drawn(newest_runs())


def test_bars_are_true_to_scale():
    """Each epoch begins where the sum of those before it ends, and is as long as it took, but for a hair."""
    scale = LENGTH / sum(RUNS.seconds["without"])
    for seconds, own in zip(RUNS.seconds.values(), bars(drawn(RUNS)), strict=True):
        begins = [place - own[0][0] for place, _ in own]
        assert begins == pytest.approx([sum(seconds[:epoch]) * scale for epoch in range(4)], abs=0.02)
        assert [length for _, length in own] == pytest.approx([one * scale for one in seconds], abs=1.6)
        assert all(0 < length <= one * scale + 0.02 for (_, length), one in zip(own, seconds, strict=True))


def test_a_slower_cache_is_shown_as_one():
    """The longer of both bars fills the picture, whichever it is."""
    slower = Runs({"without": (1.0, 1.0), "with": (3.0, 1.0)}, 10, "a machine")
    plain, ours = bars(drawn(slower))
    assert ours[-1][0] + ours[-1][1] > 1.9 * (plain[-1][0] + plain[-1][1] - plain[0][0])
    assert "take 2.0 s without, 4.0 s with the cache" in drawn(slower)


def test_texts_say_what_was_measured():
    """Sums, the slowest later epoch and the machine are written beside the bars, and are escaped."""
    texts = [text.text for text in ET.fromstring(drawn(RUNS)).iter(f"{SVG}text")]
    assert {"32.0 s", "8.3 s", "each epoch after the first takes 0.06 s"} <= set(texts)
    assert "4 epochs of a head on a frozen MiniLM, 2,000 texts; a <fast> machine & more" in texts


def test_epochs_are_read_in_order():
    """Names carry the number of the epoch; other numbers are passed over."""
    found = runs_of(recorded(RUNS, something={"value": 1.0, "unit": "x"}))
    assert found == Runs(RUNS.seconds, 2_000, "Some Processor, 2 cores")
    assert runs_of({"machine": {}, "numbers": {"something": {"value": 1.0, "unit": "x"}}}) is None


def test_the_newest_results_that_have_them_count(tmp_path):
    """A later run of other benchmarks takes nothing away."""
    with pytest.raises(LookupError, match="run that first"):
        newest_runs(tmp_path)
    older = Runs({"without": (9.0, 9.0), "with": (9.0, 0.1)}, 100, "Some Processor, 2 cores")
    for day, runs in (("2026-01-01", older), ("2026-02-01", RUNS)):
        (tmp_path / f"{day}-machine.json").write_text(json.dumps(recorded(runs)), encoding="utf-8")
    (tmp_path / "2026-03-01-machine.json").write_text(json.dumps({"machine": {}, "numbers": {}}), encoding="utf-8")
    assert newest_runs(tmp_path).seconds == RUNS.seconds


def test_main_writes_the_picture(tmp_path, monkeypatch, capsys):
    """The command makes the folder and says what it wrote."""
    monkeypatch.setattr("benchmarks.figure.FIGURE", tmp_path / "images" / "epochs.svg")
    monkeypatch.setattr("benchmarks.figure.newest_runs", lambda: RUNS)
    assert main() == 0
    assert (tmp_path / "images" / "epochs.svg").read_text(encoding="utf-8") == drawn(RUNS)
    assert "epochs.svg" in capsys.readouterr().out

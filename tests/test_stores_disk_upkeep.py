"""Upkeep tells what is there, reclaims and wipes what it should, and never touches anything else."""

import io
import json
import os
import pickle
import shutil
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modcache import CacheWarning, DiskStore, FormatVersionError, UsageError
from modcache.rows import SINGLE, Layout, Rows
from modcache.stores.disk import upkeep
from modcache.stores.disk.catalogue import Catalogue
from modcache.stores.disk.directory import Directory
from modcache.stores.disk.manifest import write_manifest
from modcache.stores.disk.names import folder_of, new_writer
from modcache.stores.disk.upkeep import reclaim, work
from modcache.stores.disk.upkeep.survey import standing_of, survey
from tests.directories import Child, files_in, needs_fork, sizes_in, snapshot
from tests.segments import NUMBER, alive, content_of, key_of, plant, value_of

NS, OTHER = "a" * 32, "b" * 32
WIDE = Layout(SINGLE, ((torch.uint8, (100,)),))
OLD = time.time() - 40 * 86400


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def place(cache, namespace=NS):
    return Directory(cache).place_of(folder_of(namespace))


def age(cache, namespace, seconds=40 * 86400):
    """Makes a namespace unused for so long."""
    for path in place(cache, namespace).iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def spoil(path, offset, flip=0xFF):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ flip]))


def names(report):
    return [facts.namespace for facts in report.namespaces]


# --- what counts ----------------------------------------------------------------------------------------

commit = st.dictionaries(st.integers(0, 7), st.integers(0, 3), min_size=1, max_size=4) | st.lists(
    st.integers(0, 7), min_size=1, max_size=4, unique=True
)
histories = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), commit), max_size=12)


def written(cache, history):
    """Writes a history of commits by several writers, and gives what counts of it."""
    segments, counts = {}, {}
    for stamp, (writer, number, what) in enumerate(history, start=1):
        segments.setdefault((writer, number), []).append((stamp, what))
        for key in what:
            counts.pop(key, None)
            if isinstance(what, dict):
                counts[key] = value_of(key, what[key])
    for (writer, number), commits in segments.items():
        plant(cache, NS, commits, writer=f"{writer:016x}", number=number)
    return counts


@given(histories)
def test_the_latest_statement_counts(tmp_path_factory, history):
    """Of several statements about a key the latest counts: as a store has it, so it is counted, before and after gc."""
    cache = tmp_path_factory.mktemp("any") / "cache"
    expected = written(cache, history)
    if not history:
        return
    assert content_of(cache, NS, range(8)) == expected
    (facts,) = upkeep.listing(cache).namespaces
    assert facts.rows == len(expected)
    assert facts.dead_bytes == 8 * sum(isinstance(what, dict) and len(what) for *_, what in history) - 8 * len(expected)
    assert upkeep.verify(cache).fine
    planned, done = upkeep.gc(cache, dry_run=True), upkeep.gc(cache)
    assert done.bytes_after == sizes_in(cache) <= planned.bytes_before
    assert done.bytes_after <= planned.bytes_after + 100  # the plan cannot know how long a header will be
    assert content_of(cache, NS, range(8)) == expected
    assert upkeep.verify(cache).fine
    for _ in range(2):  # what dropped a row that is now gone can go the next time
        upkeep.gc(cache)
    before = snapshot(*files_in(place(cache)))
    assert upkeep.gc(cache).compacted == 0
    assert snapshot(*files_in(place(cache))) == before
    assert content_of(cache, NS, range(8)) == expected


@given(histories, st.sets(st.integers(0, 7), min_size=1, max_size=3), st.sets(st.integers(0, 3)))
def test_forgotten_rows_are_gone(tmp_path_factory, history, unwanted, living):
    """Forgotten rows are served no more, whoever is alive; once all are dead their bytes are in no file."""
    cache = tmp_path_factory.mktemp("any") / "cache"
    expected = written(cache, history)
    if not history:
        return
    left = {number: row for number, row in expected.items() if number not in unwanted}
    keys = [key_of(number) for number in unwanted]
    signs = {writer: Directory(cache).sign_in(f"{writer:016x}") for writer in living}
    report = upkeep.forget(cache, keys)
    told = {number for *_, what in history for number in what}
    assert (report.keys, report.found) == (len(unwanted), len(unwanted & told))
    assert report.wiped == (not report.waiting)
    assert content_of(cache, NS, range(8)) == left
    for writer, sign in signs.items():
        Directory(cache).sign_out(f"{writer:016x}", sign)
    if report.waiting:
        assert upkeep.forget(cache, keys).wiped
    assert content_of(cache, NS, range(8)) == left
    everything = b"".join(path.read_bytes() for path in files_in(cache))
    assert not any(key in everything for key in keys)
    assert upkeep.verify(cache).fine


@given(histories, st.sets(st.integers(0, 3)))
def test_the_living_are_left_alone(tmp_path_factory, history, living):
    """Whatever gc is asked for, no file of a living writer changes."""
    cache = tmp_path_factory.mktemp("any") / "cache"
    expected = written(cache, history)
    signs = {writer: Directory(cache).sign_in(f"{writer:016x}") for writer in living} if history else {}
    theirs = [path for path in files_in(cache) if path.suffix in (".rows", ".log") and int(path.name[:16], 16) in signs]
    before = snapshot(*theirs)
    if history:
        upkeep.gc(cache)
        assert content_of(cache, NS, range(8)) == expected
        report = upkeep.gc(cache, max_bytes=0, older_than=0)
        assert (report.dropped, report.in_use) == ((), (NS,)) if theirs else ((NS,), ())
    assert snapshot(*theirs) == before
    for writer, sign in signs.items():
        Directory(cache).sign_out(f"{writer:016x}", sign)


def test_half_a_key_is_not_a_key(cache):
    """Keys of equal halves are different keys."""
    plant(cache, NS, [(1, {0: 0, 1: 0}), (2, {0: 1})])
    (folder,) = survey(Directory(cache))
    (flags,) = standing_of(folder.segments).counts
    assert flags.tolist() == [False, True, True]
    assert key_of(0)[:8] == key_of(1)[:8]


# --- listing --------------------------------------------------------------------------------------------


def test_a_listing_tells_what_differs(cache):
    """Namespaces come latest first, with class, rows and bytes, and what is other than in the other one."""
    for namespace, weights in ((NS, "0" * 32), (OTHER, "1" * 32), ("strange / name", "2" * 32)):
        plant(cache, namespace, [(1, {1: 0, 2: 0})])
        cls = "Other" if "/" in namespace else "Encoder"
        write_manifest(place(cache, namespace), {"class": cls, "weights": weights, "namespace": namespace})
    age(cache, OTHER)
    report = upkeep.listing(cache)
    assert set(names(report)) == {NS, OTHER, "strange / name"}
    assert names(report)[-1] == OTHER
    told = {facts.namespace: facts for facts in report.namespaces}
    assert {facts.rows for facts in report.namespaces} == {2}
    assert (told[NS].cls, told[NS].differs, told[OTHER].differs) == ("Encoder", ("weights",), ("weights",))
    assert told["strange / name"].differs is None
    assert sum(facts.bytes for facts in report.namespaces) == sizes_in(cache)
    assert json.loads(json.dumps(report.to_dict()))["namespaces"][0]["rows"] == 2


def test_a_namespace_is_shown_by_its_beginning(cache):
    """A beginning that only one has is enough; else an error says what there is."""
    for namespace in ("abc1", "abd2", "abd"):
        plant(cache, namespace, [(1, {1: 0})], layout=WIDE)
    assert upkeep.show(cache, "abc").namespace == "abc1"
    assert upkeep.show(cache, "abd").namespace == "abd"
    assert upkeep.show(cache, "abd2").layouts[0].leaves == (("uint8", (100,)),)
    with pytest.raises(UsageError, match="3 namespaces begin with 'ab': "):
        upkeep.show(cache, "ab")
    with pytest.raises(upkeep.NoNamespaceError, match="No namespace begins with 'x'"):
        upkeep.show(cache, "x")
    with pytest.raises(upkeep.NoNamespaceError):
        upkeep.show(cache, "")


def test_every_byte_is_accounted_for(cache):
    """The bytes of a directory add up: rows, dead rows, left-over, logs, damage, other files, strangers."""
    plant(cache, NS, [(1, {1: 0, 2: 0}), (2, {1: 1})], tail=b"x" * 100)
    damaged = plant(cache, NS, [(1, {3: 0})])
    spoil(place(cache) / damaged.log, 9)
    (place(cache) / damaged.log.replace(".log", ".txt")).write_text("mine")
    (cache / "thesis.txt").write_bytes(b"y" * 1000)
    (cache / "elsewhere").symlink_to("/")
    write_manifest(place(cache), {"class": "Encoder"})
    upkeep.gc(cache)  # makes a catalogue
    plant(cache, NS, [(1, {1: 0, 2: 0}), (2, {1: 1})], tail=b"x" * 100)
    usage = upkeep.du(cache)
    assert usage.total_bytes == sum(path.stat().st_size for path in files_in(cache) if not path.is_symlink())
    kinds = ("rows", "dead", "leftover", "log", "damaged", "other", "strange")
    assert usage.total_bytes == sum(getattr(usage, f"{kind}_bytes") for kind in kinds)
    assert (usage.rows_bytes, usage.leftover_bytes, usage.strange_bytes) == (16, 200, 1004)
    assert usage.damaged_bytes == sum((place(cache) / name).stat().st_size for name in (damaged.log, damaged.rows))
    assert usage.namespaces == {NS: sizes_in(cache)}
    totals = upkeep.stats(cache)
    assert (totals.rows, totals.damaged, totals.leftover_bytes, totals.format) == (2, 1, 200, 1)
    assert totals.bytes == sizes_in(cache)


def test_the_living_are_counted(cache):
    """A writer that is signed in is alive, in the totals and in its namespaces."""
    name = plant(cache, NS, [(1, {1: 0})])
    with alive(cache, name.writer):
        assert upkeep.stats(cache).writers == 1
        assert upkeep.show(cache, NS).writers == 1
    assert upkeep.stats(cache).writers == 0


@pytest.mark.parametrize("which", ["nothing", "file", "empty", "strange", "newer"])
@pytest.mark.parametrize("ask", ["listing", "stats", "du", "verify", "gc", "forget", "clear", "export", "show"])
def test_what_is_no_cache_directory_is_told(cache, which, ask, tmp_path):
    """Anything but a cache directory of a known format is a clear error, and nothing is made or changed."""
    if which == "file":
        cache.write_text("mine")
    elif which != "nothing":
        cache.mkdir()
    if which == "strange":
        (cache / "modcache.json").write_text("[]")
        (cache / "rows").mkdir()
        (cache / "rows" / "thesis.rows").write_text("mine")
    if which == "newer":
        (cache / "modcache.json").write_text('{"format": 2}')
    more = {"forget": ([key_of(1)],), "clear": (NS,), "show": (NS,), "export": (NS, tmp_path / "x.npy")}
    before = snapshot(tmp_path)
    with pytest.raises(FormatVersionError if which == "newer" else UsageError) as raised:
        getattr(upkeep, ask)(cache, *more.get(ask, ()))
    assert str(cache) in str(raised.value)
    assert snapshot(tmp_path) == before


# --- verify ---------------------------------------------------------------------------------------------


def test_a_whole_directory_is_fine(cache):
    """Every row is read; what was never committed is no damage."""
    plant(cache, NS, [(1, {1: 0, 2: 0})], tail=b"x" * 10)
    plant(cache, OTHER, [(1, {1: 0})], layout=WIDE)
    seen = []
    report = upkeep.verify(cache, progress=lambda done, total: seen.append((done, total)))
    assert (report.segments, report.rows, report.bytes, report.damages) == (2, 3, 116, ())
    assert report.leftover_bytes == 20
    assert report.fine
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_damaged_row_is_found_and_mended(cache):
    """A flipped byte in a row is named; repaired, the row is gone and the others are as they were."""
    name = plant(cache, NS, [(1, {1: 0, 2: 0, 3: 0})])
    spoil(place(cache) / name.rows, 64 + 8)
    (damage,) = upkeep.verify(cache).damages
    assert (damage.namespace, damage.rows, damage.repaired) == (NS, 1, False)
    assert damage.what == "1 rows do not have their checksum"
    report = upkeep.verify(cache, repair=True)
    assert report.fine
    assert [damage.repaired for damage in report.damages] == [True]
    assert upkeep.verify(cache).damages == ()
    assert content_of(cache, NS, range(5)) == {1: value_of(1), 3: value_of(3)}
    assert not (place(cache) / name.rows).exists()


def test_what_comes_behind_damage_is_saved(cache):
    """A damaged commit hides the later ones from readers; repairing brings them back."""
    name = plant(cache, NS, [(1, {1: 0}), (2, {2: 0}), (3, {3: 0}), (4, [1])])
    log = place(cache) / name.log
    spoil(log, log.stat().st_size - 2 * 64 - 20)  # in the second commit
    with pytest.warns(CacheWarning, match="a commit in its log is damaged"):
        assert content_of(cache, NS, range(5)) == {1: value_of(1)}
    (damage,) = upkeep.verify(cache).damages
    assert damage.what == "a commit in its log is damaged, and the later ones are unseen by readers"
    assert damage.rows == 1
    assert upkeep.gc(cache).freed_bytes == 0  # it is no left-over of a killed writer
    assert upkeep.verify(cache, repair=True).fine
    assert upkeep.verify(cache).damages == ()
    assert content_of(cache, NS, range(5)) == {3: value_of(3)}


HARMS = {
    "length": lambda log, rows: spoil(log, 12),
    "header": lambda log, rows: spoil(log, 45),
    "head": lambda log, rows: spoil(rows, 20),
    "short log": lambda log, rows: os.truncate(log, 20),
    "short head": lambda log, rows: os.truncate(rows, 10),
    "short rows": lambda log, rows: os.truncate(rows, 64),
    "shorter rows": lambda log, rows: os.truncate(rows, 71),
    "no rows": lambda log, rows: rows.unlink(),
    "swapped log": lambda log, rows: shutil.copy(log.with_name("b" * 16 + "-000000.log"), log),
    "swapped rows": lambda log, rows: shutil.copy(rows.with_name("b" * 16 + "-000000.rows"), rows),
    "moved": lambda log, rows: shutil.copy(place(log.parents[2], OTHER) / ("c" * 16 + "-000000.log"), log),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_segment_that_says_nothing_is_damage(cache, harm):
    """Whatever keeps a whole segment from being read is found; repaired, it is gone and the others stay."""
    name = plant(cache, NS, [(1, {1: 0})], writer="a" * 16)
    plant(cache, NS, [(1, {2: 0})], writer="b" * 16)
    plant(cache, OTHER, [(1, {3: 0})], writer="c" * 16)
    harm(place(cache) / name.log, place(cache) / name.rows)
    (damage,) = upkeep.verify(cache).damages
    assert (damage.segment, damage.namespace) == ("a" * 16 + "-000000", NS)
    assert upkeep.listing(cache).namespaces[-1].rows + upkeep.listing(cache).namespaces[0].rows == 2
    report = upkeep.verify(cache, repair=True)
    assert report.fine
    assert upkeep.verify(cache).damages == ()
    assert content_of(cache, NS, range(5)) == {2: value_of(2)}
    assert content_of(cache, OTHER, range(5)) == {3: value_of(3)}
    assert not list(place(cache).glob("a*"))


def test_what_somebody_drops_meanwhile_is_no_damage(cache):
    """A segment that vanishes while others are read is not damaged; it is not there."""
    for number in range(3):
        plant(cache, NS, [(1, {number: 0})], writer=f"{number:016x}")

    def tell(done, total):
        (place(cache) / f"{2:016x}-000000.rows").unlink(missing_ok=True)
        (place(cache) / f"{2:016x}-000000.log").unlink(missing_ok=True)

    assert upkeep.verify(cache, progress=tell).fine
    assert upkeep.show(cache, NS).segments == 2


def test_what_is_left_of_a_short_file_is_saved(cache):
    """Of rows that were committed together those stay that are before the place where the file is cut off."""
    name = plant(cache, NS, [(1, {1: 0}), (2, {2: 0, 3: 0, 4: 0}), (3, [1])])
    os.truncate(place(cache) / name.rows, 64 + 8 * 3 + 5)
    (damage,) = upkeep.verify(cache).damages
    assert damage.what == "its rows file is cut off"
    assert upkeep.gc(cache).freed_bytes == 0
    assert upkeep.verify(cache, repair=True).fine
    assert upkeep.verify(cache).damages == ()
    assert content_of(cache, NS, range(5)) == {2: value_of(2), 3: value_of(3)}


def test_repairing_brings_nothing_back(cache):
    """A row that was dropped or overwritten is not served after a repair, whatever else was damaged."""
    name = plant(cache, NS, [(1, {1: 0, 2: 0, 3: 0}), (2, [1]), (3, {2: 1})])
    spoil(place(cache) / name.rows, 64 + 2 * 8)
    assert upkeep.verify(cache, repair=True).fine
    assert content_of(cache, NS, range(5)) == {2: value_of(2, 1)}


def test_what_is_not_ours_is_not_repaired(cache, tmp_path):
    """A text or a pickle in a segment's place is told, not executed, and stays."""
    name = plant(cache, NS, [(1, {1: 0})])
    (place(cache) / name.log).write_bytes(pickle.dumps({"x": 1}) * 20)
    (place(cache) / name.rows).write_text("my thesis\n" * 20)
    before = snapshot(*place(cache).iterdir())
    report = upkeep.verify(cache, repair=True)
    assert not report.fine
    upkeep.gc(cache, older_than=0, max_bytes=0)
    upkeep.clear(cache, NS)
    assert snapshot(*place(cache).iterdir()) == before


@pytest.mark.parametrize("suffix", [".log", ".rows"])
def test_a_file_in_a_segments_place_stays_alone(cache, suffix):
    """Where a text has taken the place of one file, repairing takes the other away, and then nothing is damaged."""
    name = plant(cache, NS, [(1, {1: 0})], writer="a" * 16)
    plant(cache, NS, [(1, {2: 0})], writer="b" * 16)
    taken = (place(cache) / name.log).with_suffix(suffix)
    taken.write_text("my thesis\n" * 20)
    before, left = snapshot(taken), (f"rows/{NS}/{taken.name}",)
    assert not upkeep.verify(cache).fine
    first = upkeep.verify(cache, repair=True)
    assert (first.fine, len(first.damages), first.left) == (True, 1, left)
    again = upkeep.verify(cache)
    assert (again.damages, again.left, again.leftover_bytes, again.segments) == ((), left, 0, 1)
    report = upkeep.gc(cache)
    assert (report.orphans, report.freed_bytes) == (0, 0)
    assert upkeep.du(cache).strange_bytes == 200
    assert upkeep.stats(cache).damaged == 0
    assert snapshot(taken) == before
    assert sorted(path.name[0] for path in place(cache).iterdir()) == ["a", "b", "b"]


def test_what_is_damaged_beyond_recognition_is_taken_away(cache):
    """Files of one segment that changed places, and files whose beginnings a loss of power made zeros, are ours."""
    swapped, zeros = plant(cache, NS, [(1, {1: 0})], writer="a" * 16), plant(cache, NS, [(1, {2: 0})], writer="b" * 16)
    plant(cache, NS, [(1, {3: 0})], writer="c" * 16)
    log, rows = (place(cache) / swapped.log).read_bytes(), (place(cache) / swapped.rows).read_bytes()
    (place(cache) / swapped.log).write_bytes(rows)
    (place(cache) / swapped.rows).write_bytes(log)
    for file in (zeros.log, zeros.rows):
        (place(cache) / file).write_bytes(bytes(4096))
    assert len(upkeep.verify(cache).damages) == 2
    assert upkeep.verify(cache, repair=True).fine
    again = upkeep.verify(cache)
    assert (again.damages, again.left, again.leftover_bytes, again.segments) == ((), (), 0, 1)
    assert content_of(cache, NS, range(5)) == {3: value_of(3)}


def test_links_in_a_segments_place_are_no_segment(cache, tmp_path):
    """A link that nothing else of a segment lies beside is neither damage, nor left over."""
    plant(cache, NS, [(1, {1: 0})])
    (place(cache) / f"{'b' * 16}-000000.log").symlink_to(tmp_path)
    report = upkeep.verify(cache)
    assert (report.damages, report.left, report.segments) == ((), (), 1)
    assert upkeep.gc(cache).orphans == 0


def test_the_living_are_not_repaired(cache):
    """A damaged segment of a living writer is told, and left for later."""
    name = plant(cache, NS, [(1, {1: 0})])
    spoil(place(cache) / name.rows, 64)
    with alive(cache, name.writer):
        report = upkeep.verify(cache, repair=True)
        assert [damage.repaired for damage in report.damages] == [False]
        assert not report.fine
    assert upkeep.verify(cache, repair=True).fine


def test_the_torn_end_of_a_living_log_is_no_damage(cache):
    """A writer may be in the middle of anything."""
    name = plant(cache, NS, [(1, {1: 0})], tail=b"x" * 1000)
    (place(cache) / ("a" * 16 + "-000000.rows")).write_bytes(b"")
    with alive(cache, name.writer), alive(cache, "a" * 16):
        assert upkeep.verify(cache).fine
        assert upkeep.gc(cache).freed_bytes == 0
    assert upkeep.gc(cache).freed_bytes == 2000


# --- gc -------------------------------------------------------------------------------------------------


def test_what_a_killed_writer_left_is_reclaimed(cache):
    """Tails are cut, halves of segments are unlinked, and the rows stay."""
    plant(cache, NS, [(1, {1: 0})], tail=b"x" * 500)
    directory = place(cache)
    (directory / f"{'1' * 16}-000000.rows").write_bytes(b"")
    (directory / f"{'2' * 16}-000000.log").write_bytes(b"\x89mclogs\n")
    shutil.copy(next(directory.glob("*.rows")), directory / f"{'3' * 16}-000000.rows")
    expected = sizes_in(cache)
    planned = upkeep.gc(cache, dry_run=True)
    assert sizes_in(cache) == expected
    report = upkeep.gc(cache)
    assert (report.tails, report.orphans, report.compacted) == (1, 3, 0) == (planned.tails, planned.orphans, 0)
    assert report.bytes_after == planned.bytes_after == sizes_in(cache)
    assert content_of(cache, NS, range(3)) == {1: value_of(1)}
    assert len(list(directory.glob("*.rows"))) == 1


def test_dead_rows_are_compacted(cache):
    """A segment of which a quarter is dead is written anew, with the stamps that its rows had."""
    plant(cache, NS, [(10, dict.fromkeys(range(8), 0)), (20, {0: 1, 1: 1})], writer="a" * 16)
    plant(cache, NS, [(15, {2: 5}), (5, {7: 5})], writer="b" * 16)
    report = upkeep.gc(cache)
    assert report.compacted == 2
    expected = {n: value_of(n, {0: 1, 1: 1, 2: 5}.get(n, 0)) for n in range(8)}
    assert content_of(cache, NS, range(9)) == expected
    (folder,) = survey(Directory(cache))
    assert sum(segment.committed for segment in folder.segments) == 8
    assert {frame.stamp for segment in folder.segments for frame in segment.frames} == {10, 15, 20}


def test_many_small_segments_become_one(cache):
    """Segments of many short runs are joined, those of other layouts among themselves."""
    for number in range(9):
        plant(cache, NS, [(number + 1, {number: 0})])
    plant(cache, NS, [(50, {50: 0})], layout=WIDE)
    assert upkeep.gc(cache).compacted == 9
    assert upkeep.show(cache, NS).segments == 2
    assert content_of(cache, NS, range(10)) == {n: value_of(n) for n in range(9)}
    assert content_of(cache, NS, [50]) == {50: value_of(50, layout=WIDE)}


def test_a_drop_is_remembered_while_it_matters(cache):
    """A dropped row does not come back when the segment that dropped it is written anew."""
    name = plant(cache, NS, [(1, {1: 0, 2: 0})])
    plant(cache, NS, [(5, dict.fromkeys(range(10, 14), 0)), (6, [1, 12, 13])])
    with alive(cache, name.writer):
        upkeep.gc(cache)
        assert content_of(cache, NS, range(20)) == {n: value_of(n) for n in (2, 10, 11)}
    upkeep.gc(cache)
    assert content_of(cache, NS, range(20)) == {n: value_of(n) for n in (2, 10, 11)}


def test_a_log_of_drops_goes_once_it_says_nothing(cache):
    """A segment of drops alone is left as it is while all of them matter, and goes when none does."""
    now = time.time_ns()
    plant(cache, NS, [(1, dict.fromkeys(range(40), 0))], writer="a" * 16)
    plant(cache, NS, [(2, [1])], writer="b" * 16)
    plant(cache, NS, [(now, [77])], writer="c" * 16)
    before = snapshot(*files_in(place(cache)))
    assert upkeep.gc(cache).compacted == 0
    assert snapshot(*files_in(place(cache))) == before
    plant(cache, NS, [(3, [50])], writer="d" * 16)
    plant(cache, NS, [], writer="e" * 16)
    assert upkeep.gc(cache).compacted == 2
    assert snapshot(*files_in(place(cache))) == before


def test_the_catalogue_forgets_what_is_gone(cache):
    """A namespace of which the folder is gone is taken out of the catalogue."""
    plant(cache, NS, [(1, {1: 0})])
    plant(cache, OTHER, [(1, {1: 0})])
    upkeep.gc(cache)
    shutil.rmtree(place(cache, OTHER))
    upkeep.gc(cache)
    assert Catalogue(cache / "catalogue", writable=False).entries().keys() == {NS}


def test_which_drops_matter(cache):
    """A drop is kept if another segment has, may have or may still get an earlier row of its key."""
    hour = 3600 * 10**9
    plant(cache, NS, [(10, {1: 0}), (30, {2: 0})], writer="a" * 16)
    name = plant(cache, NS, [(20, [1, 2, 3])], writer="b" * 16)
    (folder,) = survey(Directory(cache))
    mine = [segment for segment in folder.segments if segment.name == name]

    def kept(now, known=folder.segments, without=frozenset()):
        return work.drops_to_keep(known, mine, without, now)

    assert kept(20 + 2 * hour) == [(20, key_of(1))]
    assert kept(20 + hour - 1)[0][1] == key_of(1) + key_of(2) + key_of(3)
    assert kept(20 + 2 * hour, without=frozenset([key_of(1)])) == []
    assert work.drops_to_keep(folder.segments, folder.segments, now=20 + 2 * hour) == []
    with alive(cache, "a" * 16):
        (living,) = survey(Directory(cache))
    assert len(kept(20 + 2 * hour, living.segments)[0][1]) == 3 * 16


def test_old_namespaces_go(cache):
    """Namespaces that were not used for so long go with their folders, and the catalogue forgets them."""
    plant(cache, NS, [(1, {1: 0})])
    plant(cache, OTHER, [(1, {1: 0})])
    write_manifest(place(cache, OTHER), {"class": "Encoder"})
    age(cache, OTHER)
    assert upkeep.gc(cache, older_than=50 * 86400).dropped == ()
    assert upkeep.gc(cache, older_than=30 * 86400, dry_run=True).dropped == (OTHER,)
    report = upkeep.gc(cache, older_than=30 * 86400)
    assert report.dropped == (OTHER,)
    assert not place(cache, OTHER).exists()
    assert names(upkeep.listing(cache)) == [NS]


def test_use_is_what_the_catalogue_says(cache):
    """A namespace that was read lately is not old, although nobody wrote to it."""
    with DiskStore(cache) as store:
        store.put(NS, [key_of(1)], Rows(NUMBER, (torch.ones(1, dtype=torch.int64),)))
        store.flush()
    age(cache, NS)
    with DiskStore(cache) as store:
        assert store.get(NS, [key_of(1)])
    assert upkeep.gc(cache, older_than=30 * 86400).dropped == ()


def test_the_longest_unused_go_first(cache):
    """For a limit in bytes the longest unused namespaces go, and no more than needed."""
    for number, namespace in enumerate(["old", "older", "oldest"]):
        plant(cache, namespace, [(1, dict.fromkeys(range(10), 0))])
        age(cache, namespace, (number + 1) * 1000)
    each = sizes_in(cache) // 3
    assert upkeep.gc(cache, max_bytes=3 * each + 100).dropped == ()
    report = upkeep.gc(cache, max_bytes=3 * each - 1)
    assert report.dropped == ("oldest",)
    assert report.bytes_after == sizes_in(cache) <= 3 * each
    assert set(upkeep.gc(cache, max_bytes=0).dropped) == {"old", "older"}
    assert names(upkeep.listing(cache)) == []
    assert sizes_in(cache) == 0


def test_what_is_in_use_does_not_spare_others(cache):
    """A namespace with a living writer stays; the next one goes in its place."""
    first = plant(cache, "in use", [(1, dict.fromkeys(range(10), 0))])
    plant(cache, "unused", [(1, dict.fromkeys(range(10), 0))])
    age(cache, "in use")
    with alive(cache, first.writer):
        report = upkeep.gc(cache, max_bytes=1)
        assert (report.in_use, report.dropped) == (("in use",), ("unused",))


@pytest.mark.parametrize("limits", [{"max_bytes": -1}, {"older_than": -1.0}, {"older_than": float("nan")}])
def test_a_limit_that_cannot_be_right_is_told(cache, limits):
    """Less than nothing is no limit."""
    plant(cache, NS, [(1, {1: 0})])
    with pytest.raises(UsageError, match="is a limit of 0 or more"):
        upkeep.gc(cache, **limits)


def test_without_room_nothing_is_written_anew(cache, monkeypatch):
    """Compacting waits for room; forgetting says that it has none, and leaves everything as it is."""
    plant(cache, NS, [(1, {1: 0}), (2, {1: 1})])
    usage = type(shutil.disk_usage(cache))
    monkeypatch.setattr(work.shutil, "disk_usage", lambda path: usage(100 << 30, 99 << 30, 1 << 30))
    report = upkeep.gc(cache)
    assert (report.compacted, len(report.waiting), report.freed_bytes) == (0, 1, 0)
    with pytest.raises(OSError, match="no room"):
        upkeep.forget(cache, [key_of(1)])
    assert content_of(cache, NS, [1]) == {1: value_of(1, 1)}


@pytest.mark.parametrize("at_fault", ["pwrite", "fsync"])
def test_a_failure_while_writing_anew_loses_nothing(cache, monkeypatch, at_fault):
    """What raises in the middle leaves the old segments, and nothing of the new ones."""
    plant(cache, NS, [(1, {1: 0, 2: 0}), (2, {1: 1})])
    before = files_in(place(cache))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"modcache.stores.disk.upkeep.rewrite.os.{at_fault}", fail)
    with pytest.raises(OSError, match="No space"):
        upkeep.forget(cache, [key_of(1)])
    monkeypatch.undo()
    assert files_in(place(cache)) == before
    assert content_of(cache, NS, range(3)) == {1: value_of(1, 1), 2: value_of(2)}


def test_traces_are_swept(cache):
    """Traces of dead writers, half-written files of an hour ago and empty folders go; young ones and strangers stay."""
    plant(cache, NS, [(1, {1: 0})])
    directory = Directory(cache)
    os.close(directory.sign_in("d" * 16))
    living = directory.sign_in("e" * 16)
    old = [cache / f"modcache.json.{'f' * 16}", place(cache) / f".manifest-{'f' * 16}.tmp"]
    young = [cache / f"modcache.json.{'0' * 16}", place(cache) / f".manifest-{'0' * 16}.tmp"]
    strange = [cache / "modcache.json.mine", place(cache) / ".manifest-mine.tmp", cache / "writers" / "mine"]
    for path in [*old, *young, *strange]:
        path.write_text("{")
    for path in [*old, *strange]:
        os.utime(path, (OLD, OLD))
    (cache / "rows" / ("1" * 32)).mkdir()
    (cache / "rows" / ("2" * 32)).mkdir()
    (cache / "rows" / "mine").mkdir()
    for name in ("1" * 32, "mine"):
        os.utime(cache / "rows" / name, (OLD, OLD))
    upkeep.gc(cache)
    assert [path for path in old if path.exists()] == []
    assert [path for path in [*young, *strange] if not path.exists()] == []
    assert directory.writers() == ["e" * 16]
    assert sorted(os.listdir(cache / "rows")) == sorted(["2" * 32, NS, "mine"])
    os.close(living)


def test_a_damaged_catalogue_is_rebuilt(cache):
    """Gc puts a catalogue that says what the segments say in the place of a damaged one."""
    plant(cache, NS, [(1, {1: 0, 2: 0})])
    upkeep.gc(cache)
    (cache / "catalogue" / "cache.db").write_text("text")
    upkeep.gc(cache)
    entries = Catalogue(cache / "catalogue", writable=False).entries()
    assert (entries[NS].rows, entries[NS].bytes) == (2, sizes_in(cache))


def test_nobody_works_beside(cache):
    """While one process changes a directory, another one is told so; looking is allowed."""
    plant(cache, NS, [(1, {1: 0})])
    with work.at_work(Directory(cache)):
        for act in (
            lambda: upkeep.gc(cache),
            lambda: upkeep.forget(cache, [key_of(1)]),
            lambda: upkeep.clear(cache, NS),
        ):
            with pytest.raises(BlockingIOError, match="Another process is looking after it"):
                act()
        assert upkeep.verify(cache).fine
        assert names(upkeep.listing(cache)) == [NS]
    assert upkeep.gc(cache).freed_bytes == 0


@needs_fork
def test_a_store_that_is_open_follows(cache):
    """Another process compacts and forgets while a store is open: it serves the rest, right, and can write."""
    plant(cache, NS, [(1, dict.fromkeys(range(8), 0)), (2, dict.fromkeys(range(4), 1))])
    with DiskStore(cache) as store:
        assert len(store.get(NS, [key_of(n) for n in range(8)])[0].positions) == 8

        def others(say):
            say(upkeep.gc(cache).compacted)
            say(upkeep.forget(cache, [key_of(0)]).rows)

        with Child(others) as child:
            assert [child.hear(), child.hear()] == [1, 1]
            child.wait()
        (found,) = store.get(NS, [key_of(n) for n in range(8)])
        assert found.positions.tolist() == list(range(1, 8))
        rows = found.rows.tensors[0].reshape(-1, 1).view(torch.uint8).numpy()
        assert [row.tobytes() for row in rows] == [value_of(n, n < 4) for n in range(1, 8)]
        store.put(NS, [key_of(0)], Rows(NUMBER, (torch.full((1,), 7),)))
        store.flush()
    assert content_of(cache, NS, [0]) == {0: (7).to_bytes(8, "little")}


# --- clear and forget -----------------------------------------------------------------------------------


def test_clearing_leaves_strangers(cache):
    """A namespace goes with its manifest; somebody's file in its folder stays, and so do other namespaces."""
    plant(cache, NS, [(1, {1: 0})])
    plant(cache, OTHER, [(1, {1: 0})])
    write_manifest(place(cache), {"class": "Encoder"})
    (place(cache) / "thesis.txt").write_text("mine")
    report = upkeep.clear(cache, NS)
    assert (report.namespace, report.rows) == (NS, 1)
    assert "thesis.txt" in report.left
    assert (place(cache) / "thesis.txt").read_text() == "mine"
    assert content_of(cache, NS, [1]) == {}
    assert content_of(cache, OTHER, [1]) == {1: value_of(1)}
    assert upkeep.clear(cache, OTHER).left == ()
    assert not place(cache, OTHER).exists()
    with pytest.raises(UsageError, match="There is no namespace"):
        upkeep.clear(cache, OTHER)


def test_clearing_frees_what_it_says(cache):
    """The bytes that are freed are those that were there."""
    plant(cache, NS, [(1, {1: 0})], tail=b"x" * 77)
    before = sizes_in(cache)
    assert upkeep.clear(cache, NS).bytes == before - sizes_in(cache) == before


def test_forgetting_reaches_left_over_bytes(cache):
    """What was written and never committed may be a row of the key, and goes as well."""
    secret = b"the secret row"
    plant(cache, NS, [(1, {1: 0})], tail=secret)
    plant(cache, OTHER, [(1, {2: 0})], tail=secret)
    (place(cache) / f"{'1' * 16}-000000.rows").write_bytes(b"\x89mcrows\n" + secret)
    assert upkeep.forget(cache, [key_of(1)]).wiped
    assert not any(secret in path.read_bytes() for path in files_in(cache))
    assert content_of(cache, OTHER, [2]) == {2: value_of(2)}


def test_forgetting_tells_what_it_cannot_read(cache):
    """A segment of which nothing can be read may hold the row: that is said."""
    name = plant(cache, NS, [(1, {1: 0})])
    plant(cache, OTHER, [(1, {1: 0})])
    spoil(place(cache) / name.log, 12)
    report = upkeep.forget(cache, [key_of(1)])
    assert (report.found, report.rows, report.wiped) == (1, 1, False)
    assert name.rows[:-5] in report.unreadable[0]
    upkeep.verify(cache, repair=True)
    assert upkeep.forget(cache, [key_of(1)]).wiped


def test_forgetting_reaches_behind_damage(cache):
    """Rows that no reader believes, because a commit before them is damaged, are wiped all the same."""
    name = plant(cache, NS, [(1, {1: 0}), (2, {2: 0}), (3, {3: 0})])
    log = place(cache) / name.log
    spoil(log, log.stat().st_size - 64 - 20)
    assert upkeep.forget(cache, [key_of(3)]).rows == 1
    everything = b"".join(path.read_bytes() for path in files_in(cache))
    assert key_of(3) not in everything
    assert content_of(cache, NS, range(5)) == {1: value_of(1)}


def test_a_key_that_is_none_is_told(cache):
    """A key has 16 bytes."""
    plant(cache, NS, [(1, {1: 0})])
    with pytest.raises(UsageError, match="32 hexadecimal digits"):
        upkeep.forget(cache, [b"short"])


# --- export ---------------------------------------------------------------------------------------------

LEAVES = Layout(
    '["output","m","C",[[["str","last"],{}],[["str","more"],["tuple",[{},{"on":"cpu"}]]]]]',
    ((torch.float32, (2, 3)), (torch.bfloat16, (4,)), (torch.bool, ())),
)
NAMES = ("rows.last", "rows.more.0", "rows.more.1")


def filled(cache, layout=LEAVES, namespace=NS):
    """A namespace of seven rows; the tensors that were put, in the order of the keys."""
    torch.manual_seed(0)
    tensors = tuple(
        (torch.randn(7, *shape) > 0) if dtype == torch.bool else torch.randn(7, *shape).to(dtype)
        for dtype, shape in layout.leaves
    )
    with DiskStore(cache) as store:
        store.put(namespace, [key_of(n) for n in range(7)], Rows(layout, tensors))
        store.flush()
    return tensors


def order_of(keys):
    return [int(bytes(key)[9:]) for key in keys]


def test_safetensors_hold_every_bit(cache, tmp_path):
    """Another library reads keys and rows back, bit by bit."""
    from safetensors import safe_open

    tensors = filled(cache)
    report = upkeep.export(cache, NS[:5], tmp_path / "x.safetensors")
    assert (report.namespace, report.rows, report.damaged) == (NS, 7, 0)
    assert report.columns == ("keys", *NAMES)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["namespace"] == NS
        assert set(file.keys()) == {"keys", *NAMES}
        order = order_of(file.get_tensor("keys").numpy())
        for name, tensor in zip(NAMES, tensors, strict=True):
            assert torch.equal(file.get_tensor(name), tensor[order])
    assert report.bytes == (tmp_path / "x.safetensors").stat().st_size


def test_npy_holds_every_value(cache, tmp_path):
    """numpy reads and maps it; a dtype that it does not have is widened."""
    tensors = filled(cache)
    upkeep.export(cache, NS, tmp_path / "x.npy")
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert array.shape == (7,)
    assert array.dtype.names == ("keys", *NAMES)
    order = order_of(array["keys"])
    for name, tensor in zip(NAMES, tensors, strict=True):
        assert torch.equal(torch.from_numpy(np.array(array[name])).to(tensor.dtype), tensor[order])
    assert array[NAMES[1]].dtype == np.float32


def test_parquet_holds_every_value(cache, tmp_path):
    """pyarrow reads keys, values and shapes."""
    pq = pytest.importorskip("pyarrow.parquet")
    tensors = filled(cache)
    upkeep.export(cache, NS, tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet").to_pydict()
    order = order_of(table["keys"])
    for name, tensor in zip(NAMES, tensors, strict=True):
        values = torch.tensor(table[name]).reshape(7, *table[f"{name}.shape"][0]).to(tensor.dtype)
        assert torch.equal(values, tensor[order])


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.int16, torch.uint16, torch.float8_e4m3fn, torch.complex64, torch.int64],
)
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_dtypes_are_exported_or_refused(cache, tmp_path, dtype, suffix):
    """A dtype is written so that every value can be read back, or the error names it."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    (tensor,) = filled(cache, Layout(SINGLE, ((dtype, (3,)),)))
    target = tmp_path / f"x{suffix}"
    if suffix == ".parquet" and dtype.is_complex:
        with pytest.raises(UsageError, match="has no complex64"):
            upkeep.export(cache, NS, target)
        assert not target.exists()
        return
    assert upkeep.export(cache, NS, target).columns[:2] == ("keys", "rows")
    if suffix == ".npy":
        array = np.load(target)
        keys, rows = array["keys"], torch.from_numpy(np.array(array["rows"]))
    elif suffix == ".safetensors":
        from safetensors.torch import load_file

        loaded = load_file(target)
        keys, rows = loaded["keys"].numpy(), loaded["rows"]
        assert rows.dtype == dtype
    else:
        import pyarrow.parquet as pq

        table = pq.read_table(target).to_pydict()
        keys, rows = table["keys"], torch.tensor(table["rows"])
    wanted = tensor.index_select(0, torch.tensor(order_of(keys)))  # of any dtype; torch 2.8 cannot index all of them
    assert torch.equal(rows.to(dtype).view(torch.uint8), wanted.view(torch.uint8))


def test_rows_of_several_shapes(cache, tmp_path):
    """safetensors and parquet take rows of several lengths; a .npy cannot, and says so."""
    for count in (2, 5):
        plant(cache, NS, [(count, {count: 0})], layout=Layout(SINGLE, ((torch.int16, (count,)),)))
    with pytest.raises(UsageError, match="these have 2"):
        upkeep.export(cache, NS, tmp_path / "x.npy")
    from safetensors.numpy import load_file

    upkeep.export(cache, NS, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert {loaded[f"layout{n}/rows"].shape for n in range(2)} == {(1, 2), (1, 5)}
    pq = pytest.importorskip("pyarrow.parquet")
    upkeep.export(cache, NS, tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet").to_pydict()
    assert {order_of([key])[0]: len(row) for key, row in zip(table["keys"], table["rows"], strict=True)} == {2: 2, 5: 5}
    plant(cache, NS, [(9, {9: 0})], layout=Layout(SINGLE, ((torch.int32, (1,)),)))
    with pytest.raises(UsageError, match="the same names and dtypes"):
        upkeep.export(cache, NS, tmp_path / "y.parquet")


def test_rows_without_bytes(cache, tmp_path):
    """Outputs that hold nothing are rows as well."""
    filled(cache, Layout(SINGLE, ((torch.float32, (0, 4)),)))
    upkeep.export(cache, NS, tmp_path / "x.npy")
    assert np.load(tmp_path / "x.npy")["rows"].shape == (7, 0, 4)
    assert upkeep.verify(cache).rows == 7
    assert upkeep.forget(cache, [key_of(0)]).rows == 1
    assert upkeep.show(cache, NS).rows == 6


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_damaged_rows_are_left_out(cache, tmp_path, suffix):
    """A row without its checksum is not exported, and counted."""
    name = plant(cache, NS, [(1, {1: 0, 2: 0, 3: 0})])
    spoil(place(cache) / name.rows, 64 + 8)
    report = upkeep.export(cache, NS, tmp_path / f"x{suffix}")
    assert (report.rows, report.damaged) == (2, 1)
    if suffix == ".npy":
        assert order_of(np.load(tmp_path / "x.npy")["keys"]) == [1, 3]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [f"x{suffix}"]


def test_only_what_counts_is_exported(cache, tmp_path):
    """Overwritten and dropped rows are not in the file."""
    plant(cache, NS, [(1, {1: 0, 2: 0, 3: 0}), (2, {1: 1}), (3, [2])])
    upkeep.export(cache, NS, tmp_path / "x.npy")
    array = np.load(tmp_path / "x.npy")
    rows = {order_of([line["keys"]])[0]: line["rows"].tobytes() for line in array}
    assert rows == {1: value_of(1, 1), 3: value_of(3)}


def test_progress_reaches_its_end(cache, tmp_path):
    """Progress grows to the total."""
    plant(cache, NS, [(1, {1: 0, 2: 0, 3: 0}), (2, {1: 1})])
    for act in (
        lambda tell: upkeep.verify(cache, progress=tell),
        lambda tell: upkeep.export(cache, NS, tmp_path / "x.npy", progress=tell),
        lambda tell: upkeep.forget(cache, [key_of(9)], progress=tell),
        lambda tell: upkeep.gc(cache, progress=tell),
    ):
        seen = []
        act(lambda done, total, seen=seen: seen.append((done, total)))
        assert seen
        assert seen[-1][0] == seen[-1][1]


def test_what_cannot_be_exported_is_told(cache, tmp_path):
    """An unknown suffix, a file that is there, no rows, and a missing library: each error says what to do."""
    plant(cache, NS, [(1, [1])])
    plant(cache, OTHER, [(1, {1: 0})])
    with pytest.raises(UsageError, match=r"'.csv'; known are .npy, .parquet, .safetensors"):
        upkeep.export(cache, NS, tmp_path / "x.csv")
    (tmp_path / "x.npy").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        upkeep.export(cache, OTHER, tmp_path / "x.npy")
    assert (tmp_path / "x.npy").read_text() == "mine"
    with pytest.raises(UsageError, match="has no rows"):
        upkeep.export(cache, NS, tmp_path / "y.npy")
    with pytest.raises(upkeep.NoNamespaceError):
        upkeep.export(cache, "zz", tmp_path / "y.npy")
    with pytest.raises(FileNotFoundError):
        upkeep.export(cache, OTHER, tmp_path / "nowhere" / "y.npy")
    assert not (tmp_path / "y.npy").exists()


def test_parquet_needs_pyarrow(cache, tmp_path, monkeypatch):
    """Without pyarrow the error names the extra."""
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    plant(cache, NS, [(1, {1: 0})])
    with pytest.raises(UsageError, match=r"pip install 'modcache\[export\]'"):
        upkeep.export(cache, NS, tmp_path / "x.parquet")


# --- strangers ------------------------------------------------------------------------------------------


def test_nothing_of_a_stranger_is_touched(cache, tmp_path):
    """Files, folders and links that are not ours stay bit by bit, whatever is done."""
    plant(cache, NS, [(1, {1: 0}), (2, {1: 1})])
    outside = tmp_path / "outside"
    shutil.copytree(place(cache), outside)
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    strange = {
        cache / "thesis.npy": buffer.getvalue(),
        cache / "rows" / "thesis.rows": b"mine",
        place(cache) / "thesis.rows": b"mine",
        place(cache) / f"{'g' * 16}-000000.rows": b"mine",
        place(cache) / f"{'a' * 16}-000000.rows": b"mine, and longer than a head is" * 9,
        cache / "writers" / "mine": b"mine",
    }
    for path, content in strange.items():
        path.write_bytes(content)
    (cache / "rows" / ("c" * 32)).symlink_to(outside)
    (place(cache) / f"{'b' * 16}-000000.log").symlink_to(next(outside.glob("*.log")))
    (place(cache) / f"{'b' * 16}-000000.rows").mkdir()
    links = [cache / "rows" / ("c" * 32), place(cache) / f"{'b' * 16}-000000.log"]
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    write_manifest(theirs, {"class": "Theirs"})
    (cache / "rows" / ("d" * 32)).symlink_to(theirs)
    os.utime(cache / "rows" / ("d" * 32), (OLD, OLD), follow_symlinks=False)
    links += [theirs / "manifest.json"]
    before = snapshot(outside, *strange, *links)
    assert names(upkeep.listing(cache)) == [NS]
    upkeep.verify(cache, repair=True)
    upkeep.forget(cache, [key_of(1)])
    upkeep.gc(cache, max_bytes=0, older_than=0)
    if NS in names(upkeep.listing(cache)):
        upkeep.clear(cache, NS)
    assert snapshot(outside, *strange, *links) == before


def test_a_writer_has_a_new_name():
    """Two writers never have one name, so a dead one does not come back to life."""
    assert new_writer() != new_writer()
    assert reclaim.plan_gc([], 0.0, 0, 0.0) == []

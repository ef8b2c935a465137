"""Reports as people read them."""

from modcache.cli.columns import ago
from modcache.cli.text import text_of
from modcache.stores.disk.upkeep.reports import GcReport, VerifyReport


def test_what_was_never_committed_is_told_beside_what_is_damaged():
    """It is no damage, and the command that reclaims it is named."""
    said = text_of(VerifyReport("cache", segments=2, rows=1500, bytes=3 << 20, damages=(), leftover_bytes=2048))
    assert said.splitlines() == [
        "read 1,500 rows in 2 segments, 3.0 MiB",
        "2.0 KiB were never committed; modcache gc reclaims that",
        "nothing is damaged",
    ]


def test_what_was_reclaimed_is_counted():
    """Only what there was is named, and a dry run says that nothing was done."""
    report = GcReport("cache", True, 4096, 1024, 1, 2, 1200, ("ab",), ("cd",), ("ef: a writer has it",))
    assert text_of(report).splitlines() == [
        "would be dropped: ab",
        "in use, stays: cd",
        "left for later: ef: a writer has it",
        "1 tails of dead writers",
        "2 orphans",
        "1,200 segments compacted",
        "4.0 KiB before, 1.0 KiB would be left: 3.0 KiB would be freed",
    ]
    assert (
        text_of(GcReport("cache", False, 4096, 4096, 0, 0, 0, (), (), ())) == "4.0 KiB before, 4.0 KiB left: 0 B freed"
    )


def test_a_namespace_that_nobody_used():
    """It has no time of its last use, and that is said in a word."""
    assert ago(None) == "never"

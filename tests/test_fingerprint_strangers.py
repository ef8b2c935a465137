"""Objects without content are told apart by the order in which they came."""

import threading

from modcache.fingerprint.strangers import Strangers


def test_the_first_object_of_a_place_is_nothing_special_however_many_came_since():
    """What a module was made with is not said, so that another process agrees; what takes its place is."""
    strangers, first = Strangers(), threading.Lock()
    others = [threading.Lock() for _ in range(40)]
    assert strangers.said({"tool": first}) == b""
    said = [strangers.said({"tool": other}) for other in others]
    assert b"" not in said
    assert len(set(said)) == len(said)
    assert strangers.said({"tool": others[-1]}) == said[-1]
    assert strangers.said({"tool": first}) == b""


def test_objects_that_were_forgotten_are_not_kept_alive():
    """Of very many objects that were at a place, few are remembered; one that was forgotten is a new one."""
    strangers = Strangers()
    objects = [threading.Lock() for _ in range(40)]
    said = [strangers.said({"tool": one}) for one in objects]
    assert strangers.said({"tool": objects[1]}) not in said

"""A name's record: the allowed changes, and its encoding."""

import asyncio
import dataclasses
import pickle
import pickletools
import random
from types import SimpleNamespace

import pytest
import ray_zerocopy as rzc
from ray_zerocopy.registry import healing, records
from ray_zerocopy.registry.owner import Made
from ray_zerocopy.registry.records import Kept, Plan, Record, Version, decode, encode

PLACE = (b"object", b"owner", b"status")


def kept(token, digest="d", files=(), make=None):
    source = "object" if make is None else "make"
    plan = Plan(source, "node", make=make, files=files)
    version = Version("name", 0, None, 9, digest, source, plan.heals, "live", 1.0)
    return Kept(version, plan, token, token, (PLACE,))


def published(*digests, keep=99, **how):
    record = Record()
    for number, digest in enumerate(digests, 1):
        record = record.committed(kept(f"t{number}", digest, **how), keep)
    return record


def test_what_is_committed_is_current_and_numbered_in_order():
    record = published("a", "b", "c", keep=2)
    assert record.recent == (2, 3)
    assert (record.current.number, record.current.current) == (3, True)
    assert [record.version(n).state for n in (1, 2, 3)] == ["retired", "live", "live"]
    assert (record.published_by("t2"), record.published_by("t9")) == (2, None)
    assert record.kept[1].places == ()


def test_a_retired_version_uses_no_base():
    used = dataclasses.replace(kept("t2", "b"), uses=(("other", 1, b"block"),))
    record = published("a").committed(used, 9)
    assert decode(encode(record)).kept[2].uses == used.uses
    assert record.retired([2]).kept[2].uses == ()
    assert record.rebuilt(2, "x", PLACE, 9).kept[2].uses == ()


def test_a_retired_version_is_remembered_while_it_is_held():
    record = published("a")
    for number in range(2, 40):
        record = record.committed(kept(f"t{number}", str(number)), 1, held={1})
    assert sorted(record.kept) == [1, *range(23, 40)]
    assert sorted(record.committed(kept("t40", "40"), 1).kept) == list(range(24, 41))


def test_what_was_current_last_stays():
    record = published("a", "b", "c").promoted(1).committed(kept("t4"), 2)
    assert record.recent == (1, 4)
    assert record.retired([1, 4]).current is None
    assert record.retired([1, 4]).last == 4


def test_what_is_made_again_is_another_generation():
    record = published("a")
    for block in "xyz":
        record = record.rebuilt(1, block, (block.encode(), b"", b""), 9)
    assert record.current.generation == 3
    assert record.kept[1].block == "z"
    assert [place[0] for place in record.kept[1].places] == [b"x", b"y", b"z"]


def test_a_file_heals_what_was_saved_there_last():
    record = published("a", files=("f",)).committed(kept("t2", "b", ("g", "h")), 9)
    assert record.superseded(["f"], "a") is record
    superseded = record.superseded(["f", "h"], "c")
    assert [superseded.version(n).heals for n in (1, 2)] == [False, False]
    assert [record.version(n).heals for n in (1, 2)] == [True, True]
    healing = superseded.healing(1, Plan("make", "node", make=b"m"))
    assert healing.version(1).heals


def test_few_retired_versions_are_remembered():
    record = published(*"abcdefghijklmnopqrstuvwxyz", keep=1)
    assert sorted(record.kept) == list(range(10, 27))


def any_change(record, choose):
    """One of the changes that a record may be asked for."""
    number = choose.choice(record.recent) if record.recent else None
    changes = [lambda: record.committed(kept(choose.random(), choose.choice("abc")), 3)]
    if number is not None:
        changes += [
            lambda: record.promoted(number),
            lambda: record.retired([number]),
            lambda: record.rebuilt(number, str(choose.random()), PLACE, 9),
            lambda: record.healing(number, Plan("path", "node", files=("f",))),
            lambda: record.superseded(["f"], "b"),
        ]
    return choose.choice(changes)()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_changes_a_record_is_whole_and_comes_back_from_bytes(seed):
    record, choose = Record(), random.Random(seed)
    for _ in range(60):
        before, record = record, any_change(record, choose)
        assert decode(encode(record)) == record
        assert record.last >= before.last
        assert set(record.recent) <= set(record.kept) <= set(range(1, record.last + 1))
        assert len(set(record.recent)) == len(record.recent)
        for number, each in record.kept.items():
            live = number in record.recent
            assert each.version.state == ("live" if live else "retired")
            assert each.version.heals == each.plan.heals or not live
            assert each.version.number == number


def test_a_record_as_bytes_names_nothing_of_ours():
    names = [op.name for op, _, _ in pickletools.genops(encode(published("a", "b", files=("f",))))]
    assert "STACK_GLOBAL" not in names
    assert "GLOBAL" not in names


def test_a_newer_record_is_refused(monkeypatch):
    monkeypatch.setattr(records, "SCHEMA", records.SCHEMA + 1)
    newer = encode(published("a"))
    monkeypatch.undo()
    with pytest.raises(rzc.VersionError, match=r"newer ray_zerocopy.*upgrade"):
        decode(newer)


@pytest.mark.parametrize("of", [published("a").current, published("a").kept[1].plan])
def test_what_a_newer_version_has_pickled_is_refused(of):
    assert pickle.loads(pickle.dumps(of)) == of
    load, (fields,) = of.__reduce__()
    with pytest.raises(rzc.VersionError, match=r"newer ray_zerocopy, with \['colour'\]"):
        load(fields | {"colour": 3})


def test_a_version_that_has_a_block_again_is_not_rebuilt_once_more(monkeypatch):
    """A load may have had it rebuilt, while it waited for its turn."""
    manifest = SimpleNamespace(record=lambda name: published("a"))
    asked, watch = [], healing.Healing(manifest, None, tuple)
    monkeypatch.setattr(watch, "again", lambda key, reason: asked.append(key))
    watch.have("t1", Made(9, "a", "its block"))
    asyncio.run(watch._in_turn(("name", 1)))
    assert asked == []

"""Expiry: when an edit has expired, which edits can go, and what is said of those that cannot."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
import torch

from xpatch.errors import FormatError
from xpatch.patches.expiry import expired, expiry_of, without_expired
from xpatch.patches.requests import EditRequest
from xpatch.patches.types import DenseDelta, EditRecord, LowRankDelta, PatchNeurons, PatchSet

MakeSet = Callable[..., PatchSet]
UTC = timezone.utc
NOW = datetime(2030, 6, 1, 12, tzinfo=UTC)
PAST, FUTURE = "2030-05-31", "2030-06-02"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2030-01-31", datetime(2030, 2, 1, tzinfo=UTC)),
        ("2028-02-28", datetime(2028, 2, 29, tzinfo=UTC)),
        ("2030-01-31T12:00", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("2030-01-31 12:00:05", datetime(2030, 1, 31, 12, 0, 5, tzinfo=UTC)),
        ("2030-01-31T12:00:05.25Z", datetime(2030, 1, 31, 12, 0, 5, 250_000, tzinfo=UTC)),
        ("2030-01-31T12:00:00+02:00", datetime(2030, 1, 31, 10, tzinfo=UTC)),
        ("2030-01-31T23:30:00-05:00", datetime(2030, 2, 1, 4, 30, tzinfo=UTC)),
    ],
)
def test_what_expires_means(text: str, moment: datetime) -> None:
    assert expiry_of(text, "here") == moment and expiry_of(text, "here").tzinfo is not None


@pytest.mark.parametrize(
    "text",
    ["", "soon", "2030", "2030-1-1", "2030-02-30", "31.01.2030", "1893456000", "2030-01-31T25:00", "20300131", "2030-01-31T12", "٢٠٣٠-٠١-٣١",
     "2030-01-31\n", "2030-W05-4", "2030-01-31T12:00:00+99:99"],
)  # fmt: skip
def test_what_is_no_date_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match=r"here: expected a date or a date and time such as '2030-01-31'"):
        expiry_of(text, "here")


def test_the_ends_of_the_calendar() -> None:
    assert expiry_of("9999-12-31", "here").year == 9999
    assert expiry_of("9999-12-31T23:59:59-12:00", "here") > NOW > expiry_of("0001-01-01T00:00:00+12:00", "here")


def dated(patches: PatchSet, dates: dict[str, str]) -> PatchSet:
    edits = tuple(
        replace(record, request=record.request.model_copy(update={"expires": dates.get(record.id)}))
        for record in patches.edits
        if record.request is not None
    )
    return replace(patches, edits=edits)


def test_a_date_lasts_to_the_end_of_its_day(make_set: MakeSet) -> None:
    patches = dated(make_set(["a"]), {"a": "2030-06-01"})
    last = datetime(2030, 6, 1, 23, 59, 59, 999_999, tzinfo=UTC)
    assert expired(patches, last) == () and expired(patches, last + timedelta(microseconds=1)) == ("a",)
    assert expired(patches, datetime(2030, 6, 2)) == ("a",)  # without a zone: UTC
    assert expired(patches, datetime(2030, 6, 2, 1, tzinfo=timezone(timedelta(hours=2)))) == ()


def test_the_clock_decides_by_default(make_set: MakeSet) -> None:
    patches = dated(make_set(["a", "b"]), {"a": "2020-01-01", "b": "9999-12-31"})
    assert expired(patches) == ("a",)


def test_separable_edits_go_with_their_rows(make_set: MakeSet) -> None:
    patches = dated(make_set(["a", "b", "c"], unowned=1), {"a": PAST, "b": FUTURE})
    left, gone = without_expired(patches, NOW)
    assert gone == ("a",) and [record.id for record in left] == ["b", "c"]
    assert torch.equal(left.parts["neurons.0"].keys, patches.parts["neurons.0"].keys[1:])
    assert left.fingerprint == patches.drop("a").fingerprint and len(patches) == 3


def test_nothing_expired_gives_the_set_itself(make_set: MakeSet) -> None:
    patches = dated(make_set(["a"]), {"a": FUTURE})
    assert without_expired(patches, NOW) == (patches, ()) and without_expired(patches, NOW)[0] is patches
    assert without_expired(patches.redact(), NOW)[0].edits == patches.redact().edits


def test_all_expired_leaves_a_set_that_does_nothing(make_set: MakeSet) -> None:
    patches = dated(make_set(["a", "b"]), {"a": PAST, "b": PAST})
    left, gone = without_expired(patches, NOW)
    assert gone == ("a", "b") and len(left) == 0 and left.parts == {}


def record(id: str, expires: str | None, **more: object) -> EditRecord:
    request = EditRequest(id=id, text="x", expires=expires)
    return EditRecord(id=id, method="memit", status="edited", request=request, **more)  # type: ignore[arg-type]


def delta() -> LowRankDelta:
    return LowRankDelta("l", torch.ones(2, 3), torch.ones(3, 2))


def test_a_group_goes_when_its_last_member_has_expired() -> None:
    def group(second: str | None) -> PatchSet:
        edits = (record("a", PAST, rows={"p": (0,)}, group="g"), record("b", second, rows={"p": (1,)}, group="g"))
        return PatchSet({"p": delta()}, edits)

    left, gone = without_expired(group(PAST), NOW)
    assert gone == ("a", "b") and left.parts == {}
    patches = group(FUTURE)
    with pytest.warns(UserWarning, match="expired edits 'a' stay in force: they share their patches"):
        left, gone = without_expired(patches, NOW)
    assert left is patches and gone == ()
    assert expired(patches, NOW) == ("a",)


def test_shared_parts_and_groups_bind_in_chains() -> None:
    """a shares a part with b, b is grouped with c: c alone keeps all three; d stands alone and goes."""
    edits = (
        record("a", PAST, rows={"p": ()}),
        record("b", PAST, rows={"p": ()}, group="g"),
        record("c", FUTURE, group="g"),
        record("d", PAST, rows={"q": (0, 1)}),
    )
    patches = PatchSet({"p": DenseDelta("l", torch.ones(3, 3)), "q": delta()}, edits)
    with pytest.warns(UserWarning, match="expired edits 'a', 'b' stay in force"):
        left, gone = without_expired(patches, NOW)
    assert gone == ("d",) and [item.id for item in left] == ["a", "b", "c"] and list(left.parts) == ["p"]


def test_a_part_without_an_owner_keeps_what_it_may_serve() -> None:
    owned = record("a", PAST, rows={"q": (0, 1)})
    patches = PatchSet({"p": DenseDelta("l", torch.ones(3, 3)), "q": delta()}, (owned, record("b", PAST)))
    with pytest.warns(UserWarning, match="expired edits 'a', 'b' stay in force"):
        left, gone = without_expired(patches, NOW)
    assert left is patches and gone == ()
    neurons = PatchNeurons("s", torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), "relu")
    with pytest.warns(UserWarning, match="expired edits 'b' stay in force"):
        left, gone = without_expired(PatchSet({"n": neurons, "q": delta()}, (owned, record("b", PAST))), NOW)
    assert gone == ("a",) and list(left.parts) == ["n"]


def test_the_rule_is_compose_s_own_for_random_sets() -> None:
    """Whatever is taken out could be taken out, and what stays with a warning could not be taken out without an unexpired edit."""
    from xpatch.errors import ConflictError

    generator = torch.Generator().manual_seed(0)

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    seen = 0
    for _ in range(200):
        parts = {"d": DenseDelta("l", torch.ones(3, 3)), "e": DenseDelta("l", torch.ones(3, 3)), "p": delta()}
        owner = [pick(5), pick(5)]
        edits = []
        for index in range(5):
            rows: dict[str, tuple[int, ...]] = {name: () for name in ("d", "e") if pick(3) == 0}
            if mine := tuple(row for row in (0, 1) if owner[row] == index):
                rows["p"] = mine
            edits.append(
                record(str(index), (PAST, FUTURE, None)[pick(3)], rows=rows, group=(None, None, "g", "h")[pick(4)])
            )
        patches = PatchSet(parts, tuple(edits))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            left, gone = without_expired(patches, NOW)
        over = expired(patches, NOW)
        assert set(gone) <= set(over) and [item.id for item in left] == [
            item.id for item in patches if item.id not in gone
        ]
        for id in set(over) - set(
            gone
        ):  # taking one more, with all it is bound to, takes an unexpired one or is impossible
            with pytest.raises(ConflictError):
                patches.drop([*gone, id]).drop([])
            seen += 1
    assert seen > 20


def test_an_unreadable_date_names_its_edit(make_set: MakeSet) -> None:
    patches = dated(make_set(["a", "b"]), {"b": "next week"})
    with pytest.raises(
        FormatError, match=r"edit 'b', expires: expected a date .* found 'next week'; .*redact\('expires'\)"
    ):
        without_expired(patches, NOW)
    assert without_expired(patches.redact("expires"), NOW)[1] == ()


def test_many_edits_take_little_time() -> None:
    """Thousands of expired edits beside a part without an owner: no rule is asked once for each pair of edits."""
    count = 4000
    keys = torch.ones(count, 2)
    part = PatchNeurons("s", keys, torch.ones(count), keys, "relu")
    edits = tuple(record(str(index), PAST, rows={"n": (index,)}) for index in range(count))
    patches = PatchSet({"n": part, "d": DenseDelta("l", torch.ones(2, 2))}, edits)
    began = time.process_time()
    with pytest.warns(UserWarning, match="and 3995 more stay in force"):
        assert without_expired(patches, NOW)[1] == ()
    assert time.process_time() - began < 5

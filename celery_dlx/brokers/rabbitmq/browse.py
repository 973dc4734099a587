"""Looks at letters without taking any: all are put back before the first is given out.

Whoever acts on a letter while going through them must find it in its DLQ. So letters are set aside (`spool`) meanwhile.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush

from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.brokers.rabbitmq.reader import Reader
from celery_dlx.brokers.rabbitmq.spool import Spool
from celery_dlx.letters import DeadLetter
from celery_dlx.selection import Selection

#: As many of the newest are picked out in memory.
_FEW = 1_000

LetterOf = Callable[[Taken], DeadLetter]


def letters_in(reader: Reader, letter: LetterOf, page: Selection, limit: int | None) -> Iterator[DeadLetter]:
    """The letters of a page, set aside when this returns; the reader is closed."""
    try:
        if page.newest and limit is not None and limit <= _FEW:
            found: Iterable[Taken] = _few_newest(reader, letter, page, limit)
        elif page.newest:
            found = _newest(reader, letter, page, limit)
        else:
            found = set_aside(_oldest(reader, letter, page), limit).read()
    finally:
        reader.close()
    return map(letter, found)


def set_aside(found: Iterable[Taken], limit: int | None) -> Spool:
    """As many as ``limit`` of what is found."""
    spool = Spool()
    if limit != 0:
        for raw in found:
            spool.add(raw)
            if limit is not None and len(spool) >= limit:
                break
    spool.flush()
    return spool


def _oldest(reader: Reader, letter_of: LetterOf, page: Selection) -> Iterator[Taken]:
    passed = page.after is None
    for raw in reader:
        letter = letter_of(raw)
        if not passed:
            passed = letter.id == page.after
        elif page(letter):
            yield raw


def _by_death(reader: Reader, letter_of: LetterOf, page: Selection) -> Iterator[tuple[int, Taken]]:
    """What is on this page, and when it died: that is not always the queue's order, for clocks differ and letters are
    imported."""
    passed = False
    for raw in reader:
        letter = letter_of(raw)
        if page.after is not None:
            passed = passed or letter.id == page.after
            if letter.died_at > page.after_died or (letter.died_at == page.after_died and passed):
                continue  # on the pages before
        if page(letter):
            yield letter.died_at, raw


def _few_newest(reader: Reader, letter_of: LetterOf, page: Selection, limit: int) -> list[Taken]:
    kept: list[tuple[int, int, Taken]] = []
    for position, (died_at, raw) in enumerate(_by_death(reader, letter_of, page)):
        heappush(kept, (died_at, position, raw))
        if len(kept) > limit:
            heappop(kept)
    return [raw for _, _, raw in sorted(kept, reverse=True)]


def _newest(reader: Reader, letter_of: LetterOf, page: Selection, limit: int | None) -> Iterator[Taken]:
    spool, deaths = Spool(any_order=True), array("q")
    for died_at, raw in _by_death(reader, letter_of, page):
        spool.add(raw)
        deaths.append(max(min(died_at, 2**63 - 1), -(2**63)))
    spool.flush()
    # The later in the queue comes first of those that died at once.
    order = sorted(range(len(deaths)), key=deaths.__getitem__)[::-1]
    return spool.read(order[:limit])

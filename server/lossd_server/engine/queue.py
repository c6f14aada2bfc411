"""Who comes next: a fair queue of flows, each of which pays for what it has done."""

import heapq
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(kw_only=True, slots=True, eq=False)
class Entry:
    """What stands in the queue, or has its turn.

    Attributes:
        flow: Whose it is.
        costs: What each step costs that is still to be taken, at least 1; the first is that of the next turn.
        tag: The virtual time at which the next step would end.
        order: Which arrival this was: the earlier of two with one tag goes first.
        is_waiting: Whether it waits.
    """

    flow: Hashable = None
    costs: list[int]
    tag: int = 0
    order: int = 0
    is_waiting: bool = False

    def __lt__(self, other: "Entry") -> bool:
        return (self.tag, self.order) < (other.tag, other.order)


AnyEntry = TypeVar("AnyEntry", bound=Entry)


@dataclass(slots=True)
class _Flow:
    """What is known of a flow as long as it has an entry: when the last of its steps would end."""

    end: int
    entries: int = 0


class FairQueue(Generic[AnyEntry]):
    """A self-clocked fair queue (Golestani, 1994) of entries, each for one step or several.

    A step's tag is the later of the virtual time and the end of its flow's last step, and what it costs
    on top; the smallest tag goes next, and virtual time is the tag of what went last. So two flows that
    both always wait get the same, to within the largest step of each, and one that comes seldom waits
    for little. Inside a flow they go in the order of their arrival, all steps of one before the next:
    the tags of a flow only grow.

    A flow is forgotten with its last entry. Not safe for threads.
    """

    def __init__(self) -> None:
        self._waiting: list[AnyEntry] = []
        self._flows: dict[Hashable, _Flow] = {}
        self._time = 0
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[AnyEntry]:
        """Those that wait, in no order; they may leave meanwhile."""
        return iter(list(self._waiting))

    def join(self, entry: AnyEntry) -> None:
        """Lets a new entry wait for its first step."""
        flow = self._flows.setdefault(entry.flow, _Flow(self._time))
        start = max(self._time, flow.end)
        flow.end = start + sum(entry.costs)
        flow.entries += 1
        entry.tag, entry.order = start + entry.costs[0], next(self._arrivals)
        self._wait(entry)

    def first(self) -> AnyEntry | None:
        """Returns who would be next, if anyone waits."""
        return self._waiting[0] if self._waiting else None

    def take(self) -> AnyEntry:
        """Returns who is next. It has its turn, after which it rejoins or leaves."""
        entry = heapq.heappop(self._waiting)
        entry.is_waiting = False
        self._time = max(self._time, entry.tag)
        del entry.costs[0]
        return entry

    def rejoin(self, entry: AnyEntry) -> None:
        """Lets one that had its turn wait for its next step, before all others of its flow."""
        entry.tag += entry.costs[0]
        self._wait(entry)

    def leave(self, entry: AnyEntry) -> None:
        """Ends an entry, waiting or not; what it did not use is nobody's debt."""
        if entry.is_waiting:
            entry.is_waiting = False
            self._waiting.remove(entry)
            heapq.heapify(self._waiting)
        flow = self._flows[entry.flow]
        flow.entries -= 1
        if not flow.entries:
            del self._flows[entry.flow]

    def _wait(self, entry: AnyEntry) -> None:
        entry.is_waiting = True
        heapq.heappush(self._waiting, entry)

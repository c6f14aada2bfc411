"""Who comes next: a fair queue of flows, each of which pays for what it has done."""

import heapq
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(kw_only=True, slots=True, eq=False)
class Place:
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

    def __lt__(self, other: "Place") -> bool:
        return (self.tag, self.order) < (other.tag, other.order)


AnyPlace = TypeVar("AnyPlace", bound=Place)


@dataclass(slots=True)
class _Flow:
    """What is known of a flow as long as it has a place: when the last of its steps would end."""

    end: int
    places: int = 0


class FairQueue(Generic[AnyPlace]):
    """A self-clocked fair queue (Golestani, 1994) of places, each for one step or several.

    A step's tag is the later of the virtual time and the end of its flow's last step, and what it costs
    on top; the smallest tag goes next, and virtual time is the tag of what went last. So two flows that
    both always wait get the same, to within the largest step of each, and one that comes seldom waits
    for little. Inside a flow they go in the order of their arrival, all steps of one before the next:
    the tags of a flow only grow.

    A flow is forgotten with its last place. Not safe for threads.
    """

    def __init__(self) -> None:
        self._waiting: list[AnyPlace] = []
        self._flows: dict[Hashable, _Flow] = {}
        self._time = 0
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[AnyPlace]:
        """Those that wait, in no order; they may leave meanwhile."""
        return iter(list(self._waiting))

    @property
    def flow_count(self) -> int:
        """Flows that are remembered: those of which something waits or has its turn."""
        return len(self._flows)

    def join(self, place: AnyPlace) -> None:
        """Lets a new place wait for its first step."""
        flow = self._flows.setdefault(place.flow, _Flow(self._time))
        start = max(self._time, flow.end)
        flow.end = start + sum(place.costs)
        flow.places += 1
        place.tag, place.order = start + place.costs[0], next(self._arrivals)
        self._wait(place)

    def first(self) -> AnyPlace | None:
        """Returns who would be next, if anyone waits."""
        return self._waiting[0] if self._waiting else None

    def take(self) -> AnyPlace:
        """Returns who is next. It has its turn, after which it rejoins or leaves."""
        place = heapq.heappop(self._waiting)
        place.is_waiting = False
        self._time = max(self._time, place.tag)
        del place.costs[0]
        return place

    def rejoin(self, place: AnyPlace) -> None:
        """Lets one that had its turn wait for its next step, before all others of its flow."""
        place.tag += place.costs[0]
        self._wait(place)

    def leave(self, place: AnyPlace) -> None:
        """Ends a place, waiting or not; what it did not use is nobody's debt."""
        if place.is_waiting:
            place.is_waiting = False
            self._waiting.remove(place)
            heapq.heapify(self._waiting)
        flow = self._flows[place.flow]
        flow.places -= 1
        if not flow.places:
            del self._flows[place.flow]

    def _wait(self, place: AnyPlace) -> None:
        place.is_waiting = True
        heapq.heappush(self._waiting, place)

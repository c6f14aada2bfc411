"""The fair queue: nobody idle while someone waits, equal shares, order within a flow, nothing remembered."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from lossd_server.engine.queue import Entry, FairQueue

FLOWS = st.sampled_from("abcd")
STEPS = st.lists(st.integers(1, 50), min_size=1, max_size=4)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), FLOWS, STEPS),
        st.tuples(st.just("turn"), st.none(), st.none()),
        st.tuples(st.just("give up"), st.integers(0, 9), st.none()),
    ),
    max_size=80,
)


class Line:
    """Takes turns one at a time and keeps a record of them."""

    def __init__(self):
        self.queue = FairQueue()
        self.turns: list[tuple[Entry, int]] = []

    def join(self, flow, costs):
        entry = Entry(flow=flow, costs=list(costs))
        self.queue.join(entry)
        return entry

    def turn(self):
        cost = self.queue.first().costs[0]
        entry = self.queue.take()
        self.turns.append((entry, cost))
        if entry.costs:
            self.queue.rejoin(entry)
        else:
            self.queue.leave(entry)
        return entry


def served(turns):
    shares = defaultdict(int)
    for entry, cost in turns:
        shares[entry.flow] += cost
    return shares


@given(EVENTS)
def test_whoever_waits_has_every_turn_in_the_order_of_its_flow_and_is_forgotten(events):
    line, arrived, gone, steps = Line(), [], [], {}
    for what, who, costs in events:
        if what == "join":
            arrived.append(line.join(who, costs))
            steps[arrived[-1]] = len(costs)
        elif what == "turn" and line.queue:
            line.turn()
        elif what == "give up" and line.queue:
            entry = sorted(line.queue)[who % len(line.queue)]
            line.queue.leave(entry)
            gone.append(entry)
        assert len(line.queue._flows) == len({entry.flow for entry in line.queue})
    while line.queue:
        line.turn()
    taken = [entry for entry, _ in line.turns]
    for entry in arrived:
        assert taken.count(entry) <= steps[entry]
        assert entry in gone or taken.count(entry) == steps[entry]
    for flow in "abcd":
        order = [arrived.index(entry) for entry in taken if entry.flow == flow]
        assert order == sorted(order)
    assert len(line.queue._flows) == 0


@given(st.lists(st.lists(STEPS, min_size=1, max_size=12), min_size=2, max_size=4))
def test_flows_that_always_wait_get_the_same_to_within_their_largest_steps(flows):
    line = Line()
    for flow, jobs in enumerate(flows):
        for costs in jobs:
            line.join(flow, costs)
    largest = [max(map(max, jobs)) for jobs in flows]
    while len({entry.flow for entry in line.queue}) == len(flows):
        line.turn()
        shares = served(line.turns)
        for one in range(len(flows)):
            for other in range(one):
                assert abs(shares[one] - shares[other]) <= largest[one] + largest[other]


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_one_that_comes_now_and_then_waits_for_no_more_than_one_larger_step(small, more):
    line = Line()
    for _ in range(5):
        line.join("big", [small + more] * 3)
    for _ in range(4):
        line.turn()
        line.join("small", [small])
        assert line.turn().flow == "small"


@given(st.lists(st.integers(1, 20), min_size=1, max_size=200))
def test_a_large_job_is_not_starved_by_small_ones_that_keep_coming(costs):
    line = Line()
    line.join("small", [1])
    line.join("big", [sum(costs)])
    line.turn()
    for cost in [*costs, 1]:
        line.join("small", [cost])
        if line.turn().flow == "big":
            return
    raise AssertionError("as much was done for the other, and more")


def test_a_job_in_many_steps_lets_smaller_ones_of_others_by_and_stays_before_its_own_flow():
    line = Line()
    line.join("a", [10, 10, 10])
    line.join("a", [1])
    line.turn()
    line.join("b", [5])
    line.join("c", [15])
    order = [line.turn().flow for _ in range(5)]
    assert order == ["b", "a", "c", "a", "a"]


def test_idling_saves_nothing_up():
    line = Line()
    for _ in range(100):
        line.join("busy", [10])
        line.turn()
    line.join("busy", [10])
    line.join("new", [10])
    line.join("new", [10])
    assert [line.turn().flow for _ in range(3)] == ["busy", "new", "new"]

"""Slices: what lies in a region, what is a copy, and what may not overlap."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossd_server.errors import InvalidInputError, Reason
from lossd_server.shared_memory import Regions, Slices
from lossd_server.shared_memory.regions import Owner
from tests.domain.regions import PAGE, bytes_of, memory_file

FLOAT = np.dtype("<f4")


@pytest.fixture
def region():
    """Two regions that know of each other, the id of one, and its memory as the caller sees it."""
    held = Regions(max_bytes=16 * PAGE, max_total_bytes=16 * PAGE)
    with memory_file() as descriptor:
        yield held, held.add(Owner(), descriptor, PAGE), bytes_of(descriptor)


def test_a_prediction_is_the_memory_and_a_label_a_copy(region):
    held, region_id, memory = region
    slices = Slices(held)
    in_place = slices.read(region_id, 64, FLOAT, (2, 3), in_place=True)
    copied = slices.read(region_id, 64, FLOAT, (2, 3), in_place=False)
    memory[64:88] = np.arange(6, dtype=np.float32).view(np.uint8)
    assert in_place.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert not in_place.flags.writeable
    assert not copied.flags.writeable


def test_what_is_written_is_the_memory(region):
    held, region_id, memory = region
    Slices(held).write("outputs[0]", region_id, 128, np.dtype(ml_dtypes.bfloat16), (3,))[:] = 1.5
    assert memory[128:134].view(ml_dtypes.bfloat16).tolist() == [1.5, 1.5, 1.5]


@pytest.mark.parametrize(
    ("offset", "shape"),
    [
        (0, (PAGE // 4,)),
        (PAGE - 64, (16,)),
        (PAGE - 64, (4, 4)),
        (0, ()),
        (PAGE, (0,)),
        (64, (3, 0, 5)),
        (PAGE - 64, ()),
    ],
)
def test_slices_that_just_fit(region, offset, shape):
    held, region_id, _ = region
    assert Slices(held).read(region_id, offset, FLOAT, shape, in_place=True).shape == shape


@pytest.mark.parametrize(
    ("offset", "shape"),
    [
        (1, (1,)),
        (4, (1,)),
        (63, (1,)),
        (-64, (1,)),
        (-(2**63), (1,)),
        (PAGE, (1,)),
        (PAGE - 64, (17,)),
        (PAGE + 64, (0,)),
        (0, (PAGE // 4 + 1,)),
        (64, (PAGE // 4,)),
        (2**63 - 64, (1,)),
        (2**63 - 64, (16, 2**57)),
        (0, (2**40, 2**20)),
        (0, (2**62, 4)),
        (64, (2**31, 2**31)),
    ],
)
def test_slices_that_reach_outside(region, offset, shape):
    held, region_id, _ = region
    for make in (
        lambda: Slices(held).read(region_id, offset, FLOAT, shape, in_place=True),
        lambda: Slices(held).write("outputs[0]", region_id, offset, FLOAT, shape),
    ):
        with pytest.raises(InvalidInputError) as caught:
            make()
        assert (caught.value.reason, caught.value.field) == (Reason.INVALID_SLICE, "shared")
        assert caught.value.values["offset"] == str(offset)


def test_a_caller_who_can_share_nothing_knows_no_region(region):
    held, region_id, _ = region
    for slices, wanted in ((Slices(None), region_id), (Slices(held), bytes(16)), (Slices(held), b"")):
        with pytest.raises(InvalidInputError) as caught:
            slices.read(wanted, 0, FLOAT, (1,), in_place=True)
        assert str(caught.value) == "no region of that id is open to this caller"
        assert (caught.value.reason, caught.value.values) == (Reason.UNKNOWN_REGION, {})


def test_inputs_may_be_one_and_the_same(region):
    held, region_id, _ = region
    slices = Slices(held)
    for offset in (0, 0, 64):
        slices.read(region_id, offset, FLOAT, (100,), in_place=True)
    slices.write("out", region_id, 1024, FLOAT, (100,))
    slices.check_overlaps()


def test_the_same_place_in_two_regions_is_no_overlap(region):
    held, region_id, _ = region
    with memory_file() as descriptor:
        other = held.add(Owner(), descriptor, PAGE)
    slices = Slices(held)
    slices.write("one", region_id, 0, FLOAT, (16,))
    slices.write("other", other, 0, FLOAT, (16,))
    slices.check_overlaps()


stretches = st.lists(
    st.tuples(st.integers(0, 15), st.integers(0, 40), st.booleans()), min_size=1, max_size=12
)


@given(stretches)
def test_an_overlap_is_found_exactly_where_there_is_one(wanted):
    held = Regions(max_bytes=PAGE, max_total_bytes=PAGE)
    with memory_file() as descriptor:
        region_id = held.add(Owner(), descriptor, PAGE)
    slices = Slices(held)
    touched = np.zeros((len(wanted), PAGE), bool)
    for index, (place, count, written) in enumerate(wanted):
        touched[index, place * 64 : place * 64 + count * 4] = True
        if written:
            slices.write(f"outputs[{index}]", region_id, place * 64, FLOAT, (count,))
        else:
            slices.read(region_id, place * 64, FLOAT, (count,), in_place=False)
    written = np.array([written for *_, written in wanted])
    guilty = {
        f"outputs[{i}]"
        for i in np.flatnonzero(written)
        if (touched[i] & np.delete(touched, i, axis=0).any(axis=0)).any()
    }
    if not guilty:
        slices.check_overlaps()
        return
    with pytest.raises(InvalidInputError, match="overlaps") as caught:
        slices.check_overlaps()
    assert (caught.value.reason, caught.value.field in guilty) == (Reason.INVALID_SLICE, True)

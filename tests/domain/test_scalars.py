"""Numbers of small messages mean what protobuf would have made of them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossd.scalars import Scalars
from lossd.v1 import loss_service_pb2 as pb

KINDS = (pb.LossResult, pb.RawSums, pb.LossComponent, pb.StageTimings)
DOUBLES = st.floats() | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan])
WHOLE = st.integers(0, 2**63 - 1) | st.integers(0, 300)


def numbers_of(kind):
    """Numbers for some fields of a message type: as they may be in it."""
    strategies = {
        "double": DOUBLES,
        "int64": WHOLE,
        "enum": st.integers(0, 2),
    }
    names = {1: "double", 3: "int64", 14: "enum"}
    fields = {
        field.name: strategies[names[field.type]]
        for field in kind.DESCRIPTOR.fields
        if field.type in names and not field.is_repeated
    }
    return st.fixed_dictionaries({}, optional=fields)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_numbers_are_what_protobuf_makes_of_them(kind):
    scalars = Scalars(kind.DESCRIPTOR)

    @given(numbers_of(kind))
    def agree(numbers):
        found = kind.FromString(scalars.write(numbers))
        assert found.SerializeToString() == kind(**numbers).SerializeToString()

    agree()


def test_whole_numbers_may_come_as_floats():
    written = Scalars(pb.RawSums.DESCRIPTOR).write({"cls_loss": 1.5, "positive_count": 7.0})
    assert pb.RawSums.FromString(written) == pb.RawSums(cls_loss=1.5, positive_count=7)


def test_a_field_that_is_none_is_refused():
    with pytest.raises(KeyError):
        Scalars(pb.RawSums.DESCRIPTOR).write({"name": 1})

"""Whatever a file of tokens holds and whatever a call bears: no crash, and no token in an error."""

import itertools
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from lossd_server.errors import ConfigurationError
from lossd_server.rpc.auth import AuthInterceptor
from lossd_server.rpc.metrics import Metrics
from lossd_server.rpc.refusing import RefusingHandlers
from lossd_server.rpc.tokens import Tokens

SECRETS = ("alice-0123456789abcdef", "bob-0123456789abcdef")
METRICS = Metrics()

KEYS = st.sampled_from(["token", "requests_per_second", "bytes_per_second", "other"])
VALUES = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.text(max_size=30),
    st.sampled_from(SECRETS),
    st.lists(st.sampled_from(SECRETS), max_size=2),
)
GOOD = st.fixed_dictionaries(
    {"token": st.sampled_from(SECRETS)}, optional={"bytes_per_second": st.floats(1, 9)}
)
ENTRIES = GOOD | VALUES | st.dictionaries(KEYS, VALUES, max_size=4)


def read(entries):
    """The tokens of a file with these entries, or the error that it is refused with."""
    with mock.patch("lossd_server.rpc.tokens.tomllib.loads", return_value=entries):
        try:
            return Tokens(__file__, METRICS)
        except ConfigurationError as error:
            return error


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), ENTRIES, max_size=3))
def test_a_file_is_read_or_refused_without_a_word_of_its_tokens(entries):
    found = read(entries)
    if isinstance(found, Tokens):
        held = [entry["token"] for entry in entries.values()]
        lists = [each if isinstance(each, list) else [each] for each in held]
        assert all(found.account(token) for token in itertools.chain.from_iterable(lists))
    else:
        assert found.field == "tokens"
        assert not any(secret in f"{found} {found.values}" for secret in SECRETS)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["authorization", "other"]), st.text() | st.binary()), max_size=3))
def test_whatever_a_call_bears_it_is_refused_for_want_of_a_token(metadata):
    tokens, refusing = mock.Mock(spec=Tokens), mock.Mock(spec=RefusingHandlers)
    tokens.account.return_value = None
    details = mock.Mock(method="/lossd.v1.LossService/ComputeLoss", invocation_metadata=metadata)
    handler = AuthInterceptor(tokens, refusing).intercept_service(lambda _: mock.Mock(), details)
    assert handler is refusing.handler.return_value
    (_, error), _ = refusing.handler.call_args
    assert error.reason == "UNAUTHENTICATED"

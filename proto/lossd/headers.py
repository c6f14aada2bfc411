"""What calls carry beside their messages, as gRPC metadata."""

REQUEST_BYTES = "lossd-request-bytes"
"""Of a call: how long its message is, in decimal digits. A server that has no room for it says so before
it is sent; without this, when it has come, or the first of its chunks."""

ONE_AT_A_TIME = "lossd-one-at-a-time"
"""Of a stream: that its caller waits for each answer before it sends the next request. Such streams are
answered sooner, and counted apart from the others; the value does not matter."""

CANCELLED_FOR = "lossd-reason"
"""Of an answer: the `ErrorReason` that a call was cancelled for. No status comes with that."""

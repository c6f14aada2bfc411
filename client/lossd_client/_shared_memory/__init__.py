"""Memory that the client shares with a server on its own host: made, passed, cut into arrays and reused.

An array's slice goes back to its region when nothing refers to the array any more, and not before: what
a caller holds is never written to by a later call. Linux alone has what this takes; import `pool` there.
"""

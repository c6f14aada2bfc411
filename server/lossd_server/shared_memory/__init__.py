"""Memory that callers on this host share: regions they pass, and slices of them as arrays. Knows no gRPC.

Nothing has a name that could leak or outlive a crash: a region is a sealed memory file, or memory of a GPU,
that came over a Unix socket, known by an unguessable id for as long as that connection lasts. Its owner
cannot take it from under a computation, since it is sealed against shrinking, as a GPU's is by nature, and
an array of it keeps it mapped.
"""

from lossd_server.shared_memory.listener import RegionListener
from lossd_server.shared_memory.regions import Regions
from lossd_server.shared_memory.slices import AnyArray, Slices

__all__ = ["AnyArray", "RegionListener", "Regions", "Slices"]

"""What the methods of the service are called: a twin of one has its name, and one of these after it."""

STREAM = "Stream"
"""Of the twin that answers many requests."""

IN_CHUNKS = "InChunks"
"""Of the twin whose one request, and answer, come in chunks."""


def name_of(path: str) -> str:
    """Returns the name that metrics and logs use, the same for a method and its twins."""
    return path.rpartition("/")[2].removesuffix(STREAM).removesuffix(IN_CHUNKS)

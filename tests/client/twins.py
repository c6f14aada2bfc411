"""Both clients by one interface, for what is true of both."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lossd_client import AsyncClient, Client


class Sync:
    """Calls of `Client`."""

    kind = Client

    def __init__(self, client: Client) -> None:
        self.client = client

    def call(self, method: str, *arguments: Any, **settings: Any) -> Any:
        return getattr(self.client, method)(*arguments, **settings)

    def stream(
        self, method: str, *arguments: Any, taken: list[Any] | None = None, **settings: Any
    ) -> list[Any]:
        """The results, which `taken` holds too, where there is an error in the end."""
        results: list[Any] = [] if taken is None else taken
        for result in getattr(self.client, method)(*arguments, **settings):
            results.append(result)  # noqa: PERF402  # what came before an error counts
        return results


class Async:
    """Calls of `AsyncClient`, in a loop that waits for them."""

    kind = AsyncClient

    def __init__(self, client: AsyncClient, runner: asyncio.Runner) -> None:
        self.client = client
        self._runner = runner

    def call(self, method: str, *arguments: Any, **settings: Any) -> Any:
        return self._runner.run(getattr(self.client, method)(*arguments, **settings))

    def stream(
        self, method: str, *arguments: Any, taken: list[Any] | None = None, **settings: Any
    ) -> list[Any]:
        results: list[Any] = [] if taken is None else taken

        async def collect() -> None:
            async for result in getattr(self.client, method)(*arguments, **settings):
                results.append(result)  # noqa: PERF401  # as above

        self._runner.run(collect())
        return results


@contextmanager
def open_twin(kind: type[Sync | Async], target: Any, **settings: Any) -> Iterator[Sync | Async]:
    """One of the clients, to be closed in the end."""
    if kind is Sync:
        with Client(target, **settings) as client:
            yield Sync(client)
        return
    with asyncio.Runner() as runner:
        client = AsyncClient(target, **settings)
        yield Async(client, runner)
        runner.run(client.close())


KINDS = [Sync, Async]

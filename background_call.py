"""Calls that block, made on threads of their own so that nobody has to wait for them: not the event loop, and not the program's end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def post(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Run `callback` in `loop`, from another thread; not at all once the loop is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


async def call_in_background(call: Callable[[], T]) -> T:
    """What `call` returns or raises.

    `asyncio.to_thread` would do, but the end of `asyncio.run` waits for its threads: a write to a stalled pipe, or a look-up of a name,
    would then hold up Ctrl-C. This thread is a daemon; when the caller is cancelled it is left behind.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # None only where T is None

    def run() -> None:
        result, fault = None, None
        try:
            result = call()
        except BaseException as error:
            fault = error
        post(loop, lambda: settle(result, fault))

    threading.Thread(target=run, daemon=True).start()
    return await done

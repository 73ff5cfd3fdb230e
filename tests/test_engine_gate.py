"""Whoever closes the gate opens it again, however that one ends."""

import asyncio

import pytest

from sidelight.engines.base import EngineUnavailableError
from sidelight.vllm.exchange import Gate


async def settled(task):
    """Lets the task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)
    return task


def test_one_who_gives_up_waiting_leaves_the_gate_open():
    async def main():
        gate, leave = Gate(), asyncio.Event()

        async def stay():
            async with gate.passing():
                await leave.wait()

        async def close():
            async with gate.closed():
                pytest.fail("somebody is inside")

        inside = await settled(asyncio.create_task(stay()))
        closing = await settled(asyncio.create_task(close()))
        closing.cancel()
        await asyncio.wait({closing})
        async with gate.passing():
            leave.set()
        await inside

    asyncio.run(main())


def test_who_waits_for_it_to_open_goes_on_when_it_does():
    async def main():
        gate = Gate()
        async with gate.closed():
            waiting = await settled(asyncio.create_task(gate.opened()))
            assert not waiting.done()
        await asyncio.wait_for(waiting, 5)

    asyncio.run(main())


def test_nobody_enters_while_it_is_closed_or_waits_for_it():
    async def main():
        gate = Gate()
        async with gate.closed():
            with pytest.raises(EngineUnavailableError, match="being replaced"):
                async with asyncio.timeout(5), gate.passing():
                    pytest.fail("it is closed")
        async with gate.passing():
            pass

    asyncio.run(main())


def test_who_is_inside_is_waited_for():
    async def main():
        gate, order = Gate(), []

        async def close():
            async with gate.closed():
                order.append("closed")

        async with gate.passing():
            closing = await settled(asyncio.create_task(close()))
            order.append("inside")
        await closing
        assert order == ["inside", "closed"]

    asyncio.run(main())

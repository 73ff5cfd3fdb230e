"""Whoever closes the gate opens it again, however that one ends."""

import asyncio

import pytest

from sidelight.engines.gate import Gate


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
        async with asyncio.timeout(5), gate.passing():
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


def test_nobody_enters_while_it_is_closed():
    async def main():
        gate, order = Gate(), []

        async def enter():
            async with gate.passing():
                order.append("inside")

        async with gate.closed():
            entering = await settled(asyncio.create_task(enter()))
            order.append("closed")
        await entering
        assert order == ["closed", "inside"]

    asyncio.run(main())

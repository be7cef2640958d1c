"""AsyncLLM: many requests on one event loop, their cancellation, and the end of it all."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nano_inference import LLM, AsyncLLM, EngineArgs, QueueFullError, SamplingParams
from nano_inference.engine import PreparedRequest
from nano_inference.outputs import RequestOutput

Scenario = Callable[[AsyncLLM], Awaitable[Any]]


@pytest.fixture(scope="module")
def llm(endless_model_dir: Path) -> Iterator[AsyncLLM]:
    llm = start(endless_model_dir, check_invariants=True)
    yield llm
    llm.shutdown()


def start(model: Path, **options: Any) -> AsyncLLM:
    # At 512 bytes a token (2 layers, K and V, 2 heads of 16 float32): two whole contexts.
    size = 2 * 200_000 * 512
    return AsyncLLM(str(model), kv_cache_memory_bytes=size, use_tqdm_on_load=False, **options)


def run(llm: AsyncLLM, scenario: Scenario, timeout: float = 60.0) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(llm), timeout))  # type: ignore[arg-type]


def wild(**fields: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 5.0, "max_tokens": 40, "ignore_eos": True, "seed": 1, **fields}
    )


def endless() -> SamplingParams:
    return wild(max_tokens=None)


async def last(stream: Any) -> RequestOutput:
    async for output in stream:
        final = output
    return final


async def idle(llm: AsyncLLM) -> dict[str, Any]:
    """Waits until nothing runs. Every block is then free or cached, every request accounted for."""
    deadline = time.monotonic() + 30
    while (stats := llm.stats)["running"] + stats["waiting"] > 0:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)
    assert stats["blocks_free"] + stats["blocks_cached"] == stats["blocks_total"]
    ends = ("finished", "aborted", "rejected", "failed")
    assert stats["received"] == sum(stats[name] for name in ends)
    assert not llm.engine.requests and not llm._streams and not llm._by_name
    return stats


def test_many_at_once_equal_one_by_one(llm: AsyncLLM, model_dir: Path) -> None:
    params = [wild(seed=i, n=1 + i % 3, stop="e" if i % 2 else None) for i in range(60)]
    prompts = [f"prompt {i}" for i in range(60)]

    async def scenario(llm: AsyncLLM) -> list[RequestOutput]:
        streams = [llm.generate(p, q) for p, q in zip(prompts, params, strict=True)]
        results = await asyncio.gather(*map(last, streams))
        await idle(llm)
        return results

    results = run(llm, scenario)
    with LLM(str(model_dir), use_tqdm_on_load=False) as offline:
        expected = offline.generate(prompts, params)
    assert [r.outputs for r in results] == [e.outputs for e in expected]
    assert [r.prompt_token_ids for r in results] == [e.prompt_token_ids for e in expected]


def test_deltas_join_to_the_cumulative_text(llm: AsyncLLM) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        whole = await last(llm.generate("é", wild()))
        text, tokens = "", []
        async for part in llm.generate("é", wild(), delta=True):
            text += part.outputs[0].text
            tokens += part.outputs[0].token_ids
            await asyncio.sleep(0.002)  # a slow reader gets several steps in one
        assert (text, tokens) == (whole.outputs[0].text, whole.outputs[0].token_ids)
        assert part.finished
        previous = ""
        async for part in llm.generate("é", wild()):
            assert part.outputs[0].text.startswith(previous)
            previous = part.outputs[0].text
        assert previous == whole.outputs[0].text

    run(llm, scenario)


def test_chat(llm: AsyncLLM) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        out = await last(llm.chat([{"role": "user", "content": "hi"}], wild(), "talk"))
        assert (out.request_id, out.prompt) == ("talk", "<s><|user|>hi<|assistant|>")
        assert out.prompt_token_ids == [256, 258, *b"hi", 259]

    run(llm, scenario)


def test_chat_options_are_those_of_llm_chat(llm: AsyncLLM) -> None:
    talk = [{"role": "user", "content": "hi"}]

    async def scenario(llm: AsyncLLM) -> None:
        options: dict[str, Any] = {"chat_template": "{{ word }}"}
        options["chat_template_kwargs"] = {"word": "x"}
        assert (await last(llm.chat(talk, wild(), **options))).prompt == "x"
        with pytest.raises(TypeError, match="chat_templat'"):
            llm.chat(talk, wild(), chat_templat="x")  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="must not hold 'messages'"):
            llm.chat(talk, wild(), chat_template_kwargs={"messages": []})
        await idle(llm)

    run(llm, scenario)


@pytest.mark.parametrize("how", ["cancel", "aclose", "drop"])
def test_a_reader_that_leaves_frees_the_blocks(llm: AsyncLLM, how: str) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        before = llm.stats["aborted"]
        stream = llm.generate("abc", endless())
        if how == "cancel":
            task = asyncio.create_task(last(stream))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await stream.__anext__()
            if how == "aclose":
                await stream.aclose()
            else:
                del stream
                gc.collect()
        assert not llm.engine.requests
        stats = await idle(llm)
        assert stats["aborted"] == before + 1
        assert stats["blocks_used"] == 0

    run(llm, scenario)


def test_a_closed_stream_is_over(llm: AsyncLLM) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        stream = llm.generate("abc", endless())
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()
        await idle(llm)

    run(llm, scenario)


def test_abort_within_one_step(llm: AsyncLLM) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        stream = llm.generate("abc", endless())
        await stream.__anext__()
        core, request = llm.engine.core, stream._state.core_id
        await stream.aclose()
        seen = llm.stats["steps"]  # a step in flight may still count it
        await idle(llm)
        for record in core.trace(seen + 2):
            assert all(entry["request_id"] != request for entry in record["entries"])

    run(llm, scenario)


def test_abort_by_name(llm: AsyncLLM) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        streams = [llm.generate("abc", endless(), f"r{i}") for i in range(3)]
        readers = [asyncio.create_task(last(stream)) for stream in streams]
        await asyncio.sleep(0.005)
        await llm.abort("r0")
        await llm.abort(["r1", "r2", "unknown"])
        for i, output in enumerate(await asyncio.gather(*readers)):
            assert output.request_id == f"r{i}" and output.finished
            assert output.outputs[0].finish_reason == "abort"
        await idle(llm)
        await llm.abort("r0")

    run(llm, scenario)


def test_names_in_use(llm: AsyncLLM) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        first = llm.generate("abc", endless(), "same")
        with pytest.raises(ValueError, match="request_id 'same'"):
            llm.generate("abc", wild(), "same")
        await first.aclose()
        assert (await last(llm.generate("abc", wild(), "same"))).request_id == "same"
        await idle(llm)

    run(llm, scenario)


def test_bad_requests_are_refused_at_once(llm: AsyncLLM) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        for prompt, params, message in (
            ("x" * 300_000, wild(), "200000"),
            ({"text": "a"}, wild(), "'text'"),
            ("a", wild(logprobs=21), "logprobs"),
        ):
            with pytest.raises(ValueError, match=message):
                llm.generate(prompt, params)
        with pytest.raises(ValueError, match="priority"):
            llm.generate("a", wild(), priority=3)
        await idle(llm)

    run(llm, scenario)


def test_a_full_queue(endless_model_dir: Path) -> None:
    llm = start(endless_model_dir, max_num_seqs=1, max_waiting=3)

    async def scenario(llm: AsyncLLM) -> None:
        streams = [llm.generate("abc", endless())]
        await streams[0].__anext__()  # runs; the next three wait
        streams += [llm.generate("abc", endless()) for _ in range(3)]
        with pytest.raises(QueueFullError, match="max_waiting is 3"):
            llm.generate("abc", wild())
        assert llm.stats["rejected"] == 1 and len(llm.engine.requests) == 4
        for stream in streams:
            await stream.aclose()
        await idle(llm)
        assert (await last(llm.generate("abc", wild()))).finished

    run(llm, scenario)
    llm.shutdown()


def test_submit_all_takes_all_or_none(endless_model_dir: Path) -> None:
    llm = start(endless_model_dir, max_num_seqs=1, max_waiting=3)

    async def scenario(llm: AsyncLLM) -> None:
        def prepared(*names: str) -> list[PreparedRequest]:
            return [llm.engine.prepare("abc", endless(), request_id=name) for name in names]

        streams = [llm.generate("abc", endless())]
        await streams[0].__anext__()  # runs
        streams += llm.submit_all(prepared("a", "b"))
        with pytest.raises(QueueFullError, match="2 requests wait, 2 come, max_waiting is 3"):
            llm.submit_all(prepared("c", "d"))
        for names in (("c", "c"), ("c", "a")):
            with pytest.raises(ValueError, match=f"request_id '{names[1]}' is already in use"):
                llm.submit_all(prepared(*names))
        assert llm.submit_all([]) == []
        assert len(llm.engine.requests) == 3 and llm.stats["waiting"] == 2
        streams += llm.submit_all(prepared("c"))
        for stream in streams:
            await stream.aclose()
        await idle(llm)

    run(llm, scenario)
    llm.shutdown()


def test_the_queue_is_bounded_by_default(model_dir: Path, llm: AsyncLLM) -> None:
    assert llm.engine.core.config.max_waiting == 1024
    with LLM(str(model_dir), use_tqdm_on_load=False) as offline:
        assert offline.engine.core.config.max_waiting == 0
    args = EngineArgs(str(model_dir), max_waiting=7, use_tqdm_on_load=False)
    chosen = AsyncLLM.from_engine_args(args)
    assert chosen.engine.core.config.max_waiting == 7
    chosen.shutdown()


def test_chaos(llm: AsyncLLM) -> None:
    """Readers come and go; the counters balance at the end."""

    async def client(llm: AsyncLLM, i: int) -> None:
        await asyncio.sleep(0.0005 * (i * 7 % 40))
        stream = llm.generate("abc" * (i % 50 + 1), endless() if i % 3 else wild(n=2))
        async for output in stream:
            if i % 3 and len(output.outputs[0].token_ids) > i % 11:
                await stream.aclose()
                break

    async def scenario(llm: AsyncLLM) -> None:
        await asyncio.gather(*(client(llm, i) for i in range(120)))
        await idle(llm)

    run(llm, scenario)


def test_one_loop_after_another(llm: AsyncLLM) -> None:
    kept = []

    async def leave_running(llm: AsyncLLM) -> None:
        kept.append(llm.generate("abc", endless(), "left over"))

    async def scenario(llm: AsyncLLM) -> None:
        assert (await last(llm.generate("abc", wild(), "left over"))).finished
        await idle(llm)

    run(llm, leave_running)
    run(llm, scenario)


def test_two_loops_at_once_are_refused(llm: AsyncLLM) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        stream = llm.generate("abc", endless())
        refused: list[str] = []

        async def other() -> None:
            with pytest.raises(RuntimeError, match="one event loop") as error:
                llm.generate("abc", wild())
            refused.append(str(error.value))

        thread = threading.Thread(target=lambda: asyncio.run(other()))
        thread.start()
        await asyncio.to_thread(thread.join)
        assert refused
        await stream.aclose()
        await idle(llm)

    run(llm, scenario)


def test_shutdown_ends_what_runs(endless_model_dir: Path) -> None:
    llm = start(endless_model_dir)

    async def scenario(llm: AsyncLLM) -> None:
        assert llm.is_healthy
        readers = [asyncio.create_task(last(llm.generate("abc", endless()))) for _ in range(5)]
        await asyncio.sleep(0.005)
        await asyncio.to_thread(llm.shutdown)
        for output in await asyncio.gather(*readers):
            assert output.outputs[0].finish_reason == "abort"
        assert not llm.is_healthy
        with pytest.raises(RuntimeError, match="shut down"):
            llm.generate("abc", wild())
        llm.shutdown()

    run(llm, scenario)


def test_a_failed_request_raises_for_its_reader(llm: AsyncLLM) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        stream = llm.generate("abc", endless())
        stream._state.fail("the device is lost")
        with pytest.raises(RuntimeError, match="the device is lost"):
            await last(stream)
        await stream.aclose()
        await idle(llm)

    run(llm, scenario)


def test_waiting_readers_wake_when_the_engine_is_gone(llm: AsyncLLM) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        reader = asyncio.create_task(last(llm.generate("abc", endless())))
        await asyncio.sleep(0.005)
        llm._dispatch([])  # what the pump sends when wait_outputs says that the engine stopped
        with pytest.raises(RuntimeError, match="stopped"):
            await reader
        await idle(llm)

    run(llm, scenario)

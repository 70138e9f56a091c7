"""A Ray actor that generates: one engine behind verl's token-in, token-out interface."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from verl.utils.fs import copy_to_local
from verl.workers.config import RolloutConfig
from verl.workers.rollout.replica import RolloutMode, TokenOutput

from vexact.rollout import Engine
from vexact.rollout.async_engine import AsyncEngine
from vexact_verl.arrival import Arrival
from vexact_verl.draws import KEY, Requests, carried_by
from vexact_verl.engine_settings import engine_settings
from vexact_verl.parcels import Parcel

T = TypeVar("T")


class VexactServer:
    """All calls are Ray's; they may overlap. The engine has a thread of its own."""

    def __init__(self, config: RolloutConfig, model: Mapping[str, Any], device: str, mode: RolloutMode) -> None:
        """Raises ValueError for settings that the engine does not know or cannot honour."""
        self.config, self._mode = config, mode
        path = copy_to_local(model["path"], use_shm=bool(model.get("use_shm", False)))
        # as verl does elsewhere: only weights that the trainer beside it sends anew before every generation go away
        self._sleeps = mode == RolloutMode.HYBRID and config.free_cache_engine and config.enable_sleep_mode
        settings = engine_settings(config) | {"enable_sleep_mode": self._sleeps}
        engine = Engine(path, dtype=config.dtype, device=device, **settings)
        self._requests = Requests(config, engine.max_model_len, carries=mode == RolloutMode.HYBRID)
        self._engine = AsyncEngine(engine)
        self._arrival: Arrival | None = None
        self._is_open, self._rejects = True, False
        self._held: dict[asyncio.Future[bool], str] = {}  # requests that wait to be let in, or not

    async def ready(self) -> None:
        """Answers once the model is loaded."""

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        audio_data: Any = None,
        mm_processor_kwargs: Any = None,
    ) -> TokenOutput:
        """One response. After an abort what there is of it, maybe nothing, with ``stop_reason`` "aborted".

        ``extra_fields``: ``global_steps``, the version of the weights; and under "vexact" what the trainer needs to
        score the same distribution, and the version of every token.

        Raises ValueError for input that is not text, and for sampling parameters that cannot be honoured.
        """
        if image_data or video_data or audio_data or mm_processor_kwargs:
            raise ValueError("rollout.name=vexact generates from text; the request holds images, video or audio")
        if not await self._let_in(request_id):
            return TokenOutput(token_ids=[], stop_reason="aborted")
        params = self._requests.params(sampling_params, len(prompt_ids))
        sample = (await self._engine.generate(prompt_ids, params, request_id))[0]
        return TokenOutput(
            token_ids=list(sample.token_ids),
            log_probs=sample.logprobs.tolist(),
            stop_reason="aborted" if sample.finish_reason == "abort" else "completed",
            extra_fields={"global_steps": sample.weights_version, KEY: carried_by(sample, params)},
        )

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """Ends what runs; what comes waits until ``resume_generation``, or with ``reject_request`` is sent away, as is
        what has waited since an earlier call."""
        self._is_open, self._rejects = False, reject_request
        held = self._answer_held(False) if reject_request else []
        ended = [*await self._engine.abort(), *held]
        return {"aborted_count": len(ended), "request_ids": ended}

    async def abort_request(self, request_id: str) -> dict[str, Any]:
        """Ends it where it is: it may be one that waits for ``resume_generation``."""
        held = self._answer_held(False, request_id)
        return {"aborted": bool([*await self._engine.abort({request_id}), *held]), "request_id": request_id}

    async def resume_generation(self) -> None:
        self._is_open, self._rejects = True, False
        self._answer_held(True)

    async def _let_in(self, request_id: str) -> bool:
        """Whether the request may begin, once that is known."""
        while not self._is_open:
            if self._rejects:
                return False
            answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._held[answer] = request_id
            try:
                if not await answer:
                    return False
            finally:
                del self._held[answer]
        return True

    def _answer_held(self, may_begin: bool, request_id: str | None = None) -> list[str]:
        """Answers this request or all that wait; returns whom."""
        waiting = [each for each, name in self._held.items() if not each.done() and request_id in (None, name)]
        for answer in waiting:
            answer.set_result(may_begin)
        return [self._held[answer] for answer in waiting]

    async def begin_update(self, version: int) -> None:
        """The next ``receive`` calls bring weights of this version. An update that was broken off is forgotten."""
        self._arrival = None
        self._arrival = await self._run(lambda engine: Arrival(engine, version))

    async def receive(self, parcels: Sequence[Parcel]) -> None:
        await self._arriving(lambda arrival: arrival.put(parcels))

    async def finish_update(self) -> None:
        """The engine has the new version when this returns."""
        await self._arriving(Arrival.finish)
        self._arrival = None

    async def _arriving(self, call: Callable[[Arrival], None]) -> None:
        arrival = self._arrival
        if arrival is None:
            raise RuntimeError("no update of the weights has begun, or it failed")
        try:
            await self._run(lambda _: call(arrival))
        except BaseException as error:
            self._arrival = None
            arrival.abandon(error)
            raise

    async def sleep(self) -> None:
        """Gives memory back, once all requests are done: the key-value cache's, and in a hybrid with verl's
        ``enable_sleep_mode`` the weights', which the next update brings anew."""
        if self._mode != RolloutMode.STANDALONE:
            await self.release_kv_cache()
        if self._sleeps:
            await self._run(Engine.release_weights)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Takes the memory of the key-value cache again; that of weights comes with the update that fills it."""
        if self._mode != RolloutMode.STANDALONE and (tags is None or "kv_cache" in tags):
            await self.resume_kv_cache()

    async def release_kv_cache(self) -> None:
        if self.config.free_cache_engine:
            while await self._run(lambda engine: engine.has_unfinished):
                await asyncio.sleep(0.01)
            await self._run(Engine.release_kv_cache)

    async def resume_kv_cache(self) -> None:
        if self.config.free_cache_engine:
            await self._run(Engine.resume_kv_cache)

    async def clear_kv_cache(self) -> None:
        await self._run(Engine.clear_prefix_cache)

    async def start_profile(self, **_: Any) -> None:
        raise ValueError("rollout.profiler: the engine is not profiled; leave rollout.profiler.enable=False")

    async def stop_profile(self) -> None: ...

    async def _run(self, call: Callable[[Engine], T]) -> T:
        return await self._engine.run(call)

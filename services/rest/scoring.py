"""A parsed request → its answer: pick the rewards, decode once, let every reward look, put the answer together.

Lifecycle: models → decode (a thread; an mp4 in its own process) → all rewards at once, each with its own frames → answer.
Invariants: everything ends at the deadline; cancelling gives decoding and scoring up; a reward that fails in company of
others fails alone, as a typed error on each of its items; a request of one reward, or one where all fail, gets the problem.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
from anyio import CapacityLimiter, to_thread
from numpy.typing import NDArray

from services.backend import ScoreBackend
from services.contract import ItemScore, ModelInfo, ScoreFailure
from services.errors import ProblemError
from services.limits import LimitsConfig
from services.media.base import Media
from services.media.clips import Clip, look
from services.media.decode import Decoded, MediaDecoder, check
from services.media.plan import Plan, invalid
from services.rest.budget import PixelBudget
from services.rest.combining import combine_items, terms
from services.rest.metrics import FleetMetrics
from services.rest.requests import Latent, ScoreCall
from services.rest.schemas import MultiScoreResponse, RewardAnswer, Score, ScoreError, ScoreResponse
from services.terms import Term

logger = logging.getLogger(__name__)

Results = list[ItemScore | ScoreFailure]
# One latent float32 [C, H, W] or [C, T, H, W] and its fps → uint8 RGB [H, W, 3] or [T, H, W, 3].
LatentDecoder = Callable[[NDArray[np.float32], float | None], NDArray[np.uint8]]


def load_decoder(path: str | None) -> LatentDecoder | None:
    """The callable at ``module:callable``; None for None. Raises ``ValueError`` when there is none."""
    if path is None:
        return None
    module, colon, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"decoder {path!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"decoder {path!r} must be 'module:callable'")
    decoder: LatentDecoder = found
    return decoder


class Scoring:
    """Answers scoring calls; the ingress and the job worker share it."""

    def __init__(self, backend: ScoreBackend, limits: LimitsConfig, metrics: FleetMetrics, decoder: LatentDecoder | None = None) -> None:
        self._backend, self._limits, self._metrics, self._decoder = backend, limits, metrics, decoder
        self._pixels = PixelBudget(limits.max_inflight_pixels)
        self._decoding = CapacityLimiter(limits.decode_threads)

    async def check(self, call: ScoreCall) -> None:
        """Refuse a call that cannot be answered whatever the media hold. Raises ``ProblemError``."""
        infos = await self._chosen(call)
        if call.options.combine is not None:
            terms(call.options.combine, infos)
        check(call.plans, self._limits)

    async def answer(self, call: ScoreCall, timeout_s: float, request_id: str = "") -> ScoreResponse | MultiScoreResponse:
        """The whole answer within ``timeout_s``. Raises ``ProblemError``."""
        deadline = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._answer(call, deadline, request_id)
        except TimeoutError:
            raise ProblemError(504, "deadline_exceeded", f"no answer within {timeout_s:g} s") from None

    async def _answer(self, call: ScoreCall, deadline: float, request_id: str) -> ScoreResponse | MultiScoreResponse:
        infos = await self._chosen(call)
        combine = call.options.combine
        parts = None if combine is None else terms(combine, infos)
        async with self._pixels.hold(self._most_pixels(call)) as held:
            media = await self._decoded(call, list(infos.values()))
            held.shrink(sum(m.frames.size // 3 for m in media if not isinstance(m, ScoreFailure)))
            return await self._looked_at(call, infos, media, parts, deadline, request_id)

    def _most_pixels(self, call: ScoreCall) -> int:
        """Pixels that decoding may take; what is in an mp4 file or a latent is not known before."""
        unknown = bool(call.latents) or any(p.clip is not None for p in call.plans)
        return self._limits.max_total_pixels if unknown else sum(p.pixels for p in call.plans)

    async def _looked_at(
        self, call: ScoreCall, infos: dict[str, ModelInfo], media: list[Decoded], parts: dict[str, Term] | None, deadline: float, request_id: str
    ) -> ScoreResponse | MultiScoreResponse:
        combine = call.options.combine
        _check_count(call.prompts, media)
        results = await self._scored(call.prompts, media, infos, deadline)
        if call.options.rewards is None:
            ((name, info),) = infos.items()
            return ScoreResponse(
                request_id=request_id, model=name, revision=info.revision, preprocessing_hash=info.preprocessing_hash, results=list(map(as_wire, results[name]))
            )
        answers = {
            name: RewardAnswer(revision=info.revision, preprocessing_hash=info.preprocessing_hash, results=list(map(as_wire, results[name])))
            for name, info in infos.items()
        }
        combined = None if combine is None or parts is None else combine_items(combine, parts, results, len(media))
        return MultiScoreResponse(request_id=request_id, rewards=answers, combined=combined)

    async def _chosen(self, call: ScoreCall) -> dict[str, ModelInfo]:
        known = {info.name: info for info in await self._backend.models()}
        names = call.options.rewards or ([] if call.options.model is None else [call.options.model])
        if not names:  # the only one of the fleet, not the only one that is up
            names = [health.name for health in await self._backend.health()]
            if len(names) != 1:
                raise ProblemError(422, "invalid_request", f"name a model or rewards; there is {', '.join(names)}")
        for name in names:
            if name not in known:
                raise await self.missing(name)
        return {name: known[name] for name in names}

    async def missing(self, name: str) -> ProblemError:
        """Why there is no model ``name``: it has not come up yet, or nobody knows it."""
        names = [health.name for health in await self._backend.health()]
        if name in names:
            return ProblemError(503, "scorer_unavailable", f"{name} has not come up yet", retry_after_s=5)
        return ProblemError(404, "model_not_found", f"no model {name[:64]!r}; there is {', '.join(names)}")

    async def _decoded(self, call: ScoreCall, infos: Sequence[ModelInfo]) -> list[Decoded]:
        specs = [info.frame_spec for info in infos if "video" in info.media]
        decoder = MediaDecoder(self._limits)
        if call.latents and self._decoder is None:
            raise ProblemError(422, "decoder_not_configured", "this fleet takes no latents: it has no decoder")
        work = functools.partial(self._from_latents, call.latents) if call.latents else functools.partial(decoder.decode, call.plans, specs)
        try:
            return await to_thread.run_sync(work, limiter=self._decoding, abandon_on_cancel=True)
        except asyncio.CancelledError:
            decoder.cancel()
            raise

    def _from_latents(self, latents: Sequence[Latent]) -> list[Decoded]:
        """Pixels of latents by the fleet's decoder; the limits apply to what it makes."""
        assert self._decoder is not None
        out: list[Decoded] = []
        for latent in latents:
            try:
                pixels = self._decoder(latent.values, latent.fps)
                out.append(Media(pixels if latent.fps is not None else pixels[None], latent.fps, latent.selected))
            except Exception as error:  # somebody else's code
                logger.exception("the latent decoder failed on a latent of shape %s", latent.values.shape)
                out.append(invalid(f"the latent cannot be decoded ({type(error).__name__})"))
        check([Plan(1, *m.frames.shape[:3]) for m in out if isinstance(m, Media)], self._limits)
        return out

    async def _scored(self, prompts: list[str], media: list[Decoded], infos: dict[str, ModelInfo], deadline: float) -> dict[str, Results]:
        done = await asyncio.gather(*(self._one(info, prompts, media, deadline) for info in infos.values()), return_exceptions=True)
        failures = [outcome for outcome in done if isinstance(outcome, BaseException)]
        if len(failures) == len(done):
            raise failures[0]
        results: dict[str, Results] = {}
        for name, outcome in zip(infos, done, strict=True):
            if isinstance(outcome, BaseException):
                failure = _as_failure(name, outcome)
                results[name] = [failure] * len(media)
            else:
                results[name] = outcome
        return results

    async def _one(self, info: ModelInfo, prompts: list[str], media: list[Decoded], deadline: float) -> Results:
        """Score what this reward can look at; keep the failures in their places."""
        seen = [_seen(item, info) for item in media]
        ready = [(i, item) for i, item in enumerate(seen) if isinstance(item, Media)]
        scored: Results = []
        if ready:
            left = deadline - time.monotonic()
            scored = await self._backend.score(info.name, [prompts[i] for i, _ in ready], [item for _, item in ready], max(0.0, left))
            if len(scored) != len(ready):
                raise RuntimeError(f"{info.name} gave {len(scored)} results for {len(ready)} items")
        self._metrics.items(info.name, [item for item in seen if isinstance(item, ScoreFailure)])
        by_index = dict(zip((i for i, _ in ready), scored, strict=True))
        return [item if isinstance(item, ScoreFailure) else by_index[i] for i, item in enumerate(seen)]


def _seen(item: Decoded, info: ModelInfo) -> Media | ScoreFailure:
    """What a reward sees of an item."""
    if isinstance(item, ScoreFailure):
        return item
    kind = "video" if isinstance(item, Clip) or item.is_video else "image"
    if kind not in info.media:
        return ScoreFailure("media_not_supported", f"{info.name} scores {' and '.join(info.media)} only, this is a {kind}")
    return look(item, info.frame_spec)


def _as_failure(name: str, error: BaseException) -> ScoreFailure:
    """A reward that failed as a whole, as the failure of each of its items."""
    if isinstance(error, ProblemError):
        return ScoreFailure(error.code, error.detail, retryable=error.status in (429, 503, 504))
    if not isinstance(error, Exception):
        raise error
    logger.error("reward %s failed", name, exc_info=error)
    return ScoreFailure("internal_error", f"{name} failed on this request", retryable=False)


def _check_count(prompts: Sequence[str], media: Sequence[Decoded]) -> None:
    if len(prompts) != len(media):
        why = next((f"; one file failed: {m.message}" for m in media if isinstance(m, ScoreFailure)), "")
        raise ProblemError(422, "invalid_request", f"{len(prompts)} prompts for {len(media)} items{why}")


def as_wire(result: ItemScore | ScoreFailure) -> Score:
    """A scorer's result in the form of the REST contract."""
    if isinstance(result, ScoreFailure):
        return Score(error=ScoreError(code=result.code, message=result.message, retryable=result.retryable))
    return Score(reward=result.reward, scores=result.sub_scores, text=result.text)

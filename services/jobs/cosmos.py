"""``/api/reward/*`` as the trainers of cosmos-rl call it, so that they can point at this fleet unchanged.

Lifecycle: ``enqueue`` (one line of JSON, a newline, an npy file) → ``{"uuid"}`` → ``pull`` (form fields ``uuid`` and ``type``,
once per reward): 400 while there are no scores, then 200 for ever until the job expires. A request becomes a job of this
fleet, so it outlives a restart, is bounded like any other, and needs the same key. What differs from the original: an item
that cannot be scored makes ``pull`` answer 422 and say why, never a number; an unknown uuid is 404 and an expired one 410;
torch pickles are refused; there is no ``push`` and no ``latent_attr``.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Form, Request
from pydantic import BaseModel, ConfigDict, Field

from services.contract import Finite
from services.errors import ProblemError
from services.jobs.api import Jobs
from services.jobs.store import Claim
from services.jobs.worker import Outcome
from services.limits import LimitsConfig
from services.media.arrays import is_npy, plan_pixels, view_npy
from services.media.plan import Plan, Refused
from services.rest.ingress import RequestId, Services, has_retryable, owner_of, read_body, services_of
from services.rest.problems import as_problem, documented
from services.rest.requests import Latent, ScoreCall, parse_json
from services.rest.schemas import Fps, MultiScoreResponse, Problem, RewardAnswer, Score, ScoreOptions

COSMOS = "cosmos"
DEFAULT_FPS = 16.0  # as the trainers assume
# cosmos-rl's name of a reward → the kind of ours, and its names of the scores → ours ("" is the reward itself).
KNOWN: dict[str, tuple[str, dict[str, str]]] = {
    "dance_grpo": ("videoalign", {"vq_reward": "vq", "mq_reward": "mq", "ta_reward": "ta", "overall_reward": "overall"}),
    "ocr": ("ocr", {"ocr_reward": ""}),
    "hpsv2": ("hpsv2", {"hpsv2": ""}),
    "pickscore": ("pickscore", {"pickscore": ""}),
    "image_reward": ("imagereward", {"image_reward": ""}),
}


class VideoInfo(BaseModel):
    """One entry of ``video_infos``; trainers put more into it than the frame rate."""

    model_config = ConfigDict(extra="ignore")
    video_fps: Fps = DEFAULT_FPS


class EnqueueLine(BaseModel):
    """The JSON line in front of the array. Other keys are ignored: trainers send their own."""

    model_config = ConfigDict(extra="ignore")
    prompts: list[str] = Field(min_length=1)
    reward_fn: dict[str, Finite] = Field(min_length=1, max_length=64)
    media_type: Literal["latent", "image", "video"] | None = None
    video_infos: list[VideoInfo] | None = None


def chosen(reward_fn: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, str]:
    """Our reward (``kinds``: reward → kind) for each of the trainer's whose weight is positive. Raises ``ProblemError`` 404 for one that is not here."""
    found: dict[str, str] = {}
    for theirs, weight in reward_fn.items():
        if weight <= 0:
            continue
        kind = KNOWN.get(theirs, (theirs, {}))[0]
        ours = theirs if theirs in kinds else next((name for name, own in kinds.items() if own == kind), None)
        if ours is None:
            raise ProblemError(404, "model_not_found", f"no reward {theirs[:64]!r}; there is {', '.join(kinds)}")
        found[theirs] = ours
    if not found:
        raise ProblemError(422, "invalid_request", "reward_fn: no weight is above 0")
    return found


def parse_enqueue(body: bytes, limits: LimitsConfig) -> tuple[EnqueueLine, np.ndarray[Any, Any]]:
    """The line and the array of a body; blocking for large ones. Raises ``ProblemError`` 413, 415 or 422."""
    end = body.find(b"\n")
    if end < 0:
        raise ProblemError(422, "invalid_request", "the body must be a line of JSON, a newline and an npy file")
    line = parse_json(body[:end], EnqueueLine, limits, "first line")
    if len(line.prompts) > limits.max_items:
        raise ProblemError(413, "too_many_items", f"{len(line.prompts)} items, at most {limits.max_items} per request")
    longest = max(map(len, line.prompts))
    if longest > limits.max_prompt_chars:
        raise ProblemError(413, "prompt_too_long", f"a prompt has {longest} characters, at most {limits.max_prompt_chars}")
    data = memoryview(body)[end + 1 :]
    if not is_npy(bytes(data[:8])):
        raise ProblemError(415, "unsupported_media_type", "after the newline there must be an npy file; pickles are not accepted")
    pixels = line.media_type in ("image", "video")
    try:
        array = view_npy(data, ("uint8",) if pixels else ("uint8", "float16", "float32"))
    except (Refused, ValueError) as error:
        raise ProblemError(422, "invalid_request", str(error) if isinstance(error, Refused) else "the npy header is malformed") from None
    rank = 4 if line.media_type == "image" else 5
    if array.ndim != rank or len(array) != len(line.prompts) or 0 in array.shape or (line.video_infos and len(line.video_infos) != len(line.prompts)):
        form = {"image": "[B, H, W, 3]", "video": "[B, 3, T, H, W]"}.get(line.media_type or "latent", "[B, C, T, H, W]")
        raise ProblemError(422, "invalid_request", f"{len(line.prompts)} prompts need an array {form} and as many video_infos, got {list(array.shape)}")
    return line, array


def as_call(line: EnqueueLine, array: np.ndarray[Any, Any], rewards: list[str], limits: LimitsConfig) -> ScoreCall:
    """The scoring call that a body stands for. Raises ``ProblemError`` 413 or 422."""
    options = ScoreOptions(rewards=rewards)
    fps = [info.video_fps for info in line.video_infos or []] or [DEFAULT_FPS] * len(line.prompts)
    plans: list[Plan] = []
    try:
        if line.media_type == "image":
            plans = [plan_pixels(row, None, False) for row in array]
        elif line.media_type == "video":
            plans = [plan_pixels(row.transpose(1, 2, 3, 0), rate, False) for row, rate in zip(array, fps, strict=True)]
    except Refused as refusal:
        raise ProblemError(422, "invalid_request", str(refusal)) from None
    if plans:
        return ScoreCall(options, line.prompts, plans)
    if array.size > limits.max_latent_values * (2 if array.dtype == np.uint8 else 1):
        raise ProblemError(413, "latents_too_large", f"the latents have too many values, at most {limits.max_latent_values} per request")
    if array.dtype == np.uint8 and array.shape[-1] % 2:
        raise ProblemError(422, "invalid_request", "latents of bytes are bfloat16: their last dimension must be even")
    return ScoreCall(options, line.prompts, [], [Latent(_float(row), rate) for row, rate in zip(array, fps, strict=True)])


def _float(row: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Float32 of a latent; bytes are bfloat16, little endian, which is the upper half of a float32."""
    if row.dtype != np.uint8:
        return row.astype(np.float32)
    return (np.ascontiguousarray(row).view("<u2").astype(np.uint32) << 16).view(np.float32)


def scores_of(theirs: str, kind: str, answer: RewardAnswer) -> dict[str, list[float]]:
    """Scores by the trainer's names, or for a reward it does not know by ours. Raises ``ProblemError`` 422 when an item has none."""
    failed = {i: result.error for i, result in enumerate(answer.results) if result.error is not None}
    if failed:
        first, error = next(iter(failed.items()))
        raise ProblemError(422, "items_failed", f"{len(failed)} of {len(answer.results)} items have no score; item {first}: {error.code}: {error.message}")
    known_kind, names = KNOWN.get(theirs, ("", {}))
    if known_kind != kind:
        names = {f"{theirs}_reward": "", **{name: name for name in answer.results[0].scores or {}}}
    return {name: [_value(result, ours) for result in answer.results] for name, ours in names.items()}


def _value(result: Score, ours: str) -> float:
    assert result.reward is not None, "failed items were sorted out"
    assert result.scores is not None, "failed items were sorted out"
    return result.scores[ours] if ours else result.reward


def describe(line: EnqueueLine, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """``input_info`` as the original gives it."""
    latent = line.media_type not in ("image", "video")
    bytes_are_bf16 = latent and array.dtype == np.uint8
    shape = [*array.shape[:-1], array.shape[-1] // 2] if bytes_are_bf16 else list(array.shape)
    values = _float(array) if bytes_are_bf16 else array
    info = {"shape": shape, "dtype": f"torch.{'bfloat16' if bytes_are_bf16 else array.dtype.name}", "min": f"{values.min():.3f}", "max": f"{values.max():.3f}"}
    return info if line.video_infos is None else {**info, "video_infos": [i.model_dump() for i in line.video_infos]}


class _Worker:
    """The handler of these jobs: an answer per type, in the form ``pull`` gives."""

    def __init__(self, services: Services, kinds: Mapping[str, str]) -> None:
        self._services, self._kinds = services, kinds

    async def __call__(self, claim: Claim) -> Outcome:
        limits, started = self._services.limits, time.monotonic()
        line, array = await to_thread.run_sync(parse_enqueue, claim.payload, limits)
        types = chosen(line.reward_fn, self._kinds)
        call = await to_thread.run_sync(as_call, line, array, list(dict.fromkeys(types.values())), limits)
        answer = await self._services.scoring.answer(call, min(limits.max_timeout_s, claim.left_s), claim.meta["request_id"])
        assert isinstance(answer, MultiScoreResponse), "rewards were named"
        info = await to_thread.run_sync(describe, line, array)
        common = {"input_info": info, "duration": f"{time.monotonic() - started:.2f}", "decoded_duration": "0.00"}
        out: dict[str, Any] = {}
        for theirs, ours in types.items():
            try:
                out[theirs] = {"scores": scores_of(theirs, self._kinds[ours], answer.rewards[ours]), **common, "type": theirs}
            except ProblemError as error:
                out[theirs] = {"problem": as_problem(error).model_dump()}
        return Outcome(json.dumps(out, allow_nan=False).encode(), not has_retryable(answer))


def cosmos_router(jobs: Jobs, kinds: Mapping[str, str]) -> APIRouter:
    """The routes; their jobs are worked on by the worker of ``jobs``."""
    jobs.handlers[COSMOS] = lambda services: _Worker(services, kinds)
    router = APIRouter(prefix="/api/reward", tags=["cosmos-rl"])
    binary = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}, "required": True}

    @router.post(
        "/enqueue",
        openapi_extra={"requestBody": {**binary, "description": "One line of JSON (prompts, reward_fn, media_type, video_infos), a newline, an npy file."}},
        responses=documented(400, 401, 403, 404, 408, 413, 415, 422, 431, 500, 503),
    )
    async def enqueue(request: Request, _: RequestId = None) -> dict[str, str]:
        """Accept arrays to score; answers the uuid to pull with."""
        limits = services_of(request).limits
        jobs.require()
        body = await read_body(request, limits)
        line, array = await to_thread.run_sync(parse_enqueue, body, limits)
        call = await to_thread.run_sync(as_call, line, array, list(dict.fromkeys(chosen(line.reward_fn, kinds).values())), limits)
        await services_of(request).scoring.check(call)
        meta = {"owner": owner_of(request), "request_id": request.state.request_id}
        job_id, new = await jobs.submit(COSMOS, meta, body)
        assert new, "no idempotency key was given"
        return {"uuid": str(uuid.UUID(hex=job_id))}

    @router.post("/pull", response_model=None, responses=documented(400, 401, 403, 404, 410, 413, 415, 422, 431, 500, 503))
    async def pull(
        request: Request, job: Annotated[str, Form(alias="uuid", max_length=64)], reward: Annotated[str | None, Form(alias="type", max_length=64)] = None
    ) -> dict[str, Any]:
        """Scores of one reward of a request; 400 while there are none yet."""
        found = await jobs.read(_job_id(job), owner_of(request))
        if found.kind != COSMOS:
            raise ProblemError(404, "job_not_found", "this uuid is not of /api/reward/enqueue")
        if found.problem is not None:
            problem = Problem.model_validate_json(found.problem)
            raise ProblemError(problem.status, problem.code, problem.detail)
        if found.state == "cancelled":
            raise ProblemError(410, "job_cancelled", "the request was cancelled")
        if found.answer is None:
            raise ProblemError(400, "not_ready", "no scores yet; ask again")
        answers: dict[str, dict[str, Any]] = json.loads(found.answer)
        name = next(iter(answers)) if reward is None and len(answers) == 1 else reward
        if name not in answers:
            raise ProblemError(422, "invalid_request", f"type must be one of {', '.join(answers)}")
        if "problem" in answers[name]:
            failed = Problem.model_validate(answers[name]["problem"])
            raise ProblemError(failed.status, failed.code, failed.detail)
        return answers[name]

    @router.post("/ping", responses=documented(400, 401, 403, 413, 415, 422, 431, 500))
    async def ping(info_data: Annotated[str, Form()]) -> dict[str, str]:
        """Answers whoever is let in."""
        del info_data
        return {"message": "Ping request received"}

    return router


def _job_id(text: str) -> str:
    try:
        return uuid.UUID(text).hex
    except ValueError:
        raise ProblemError(404, "job_not_found", "this is not a uuid that enqueue gave") from None

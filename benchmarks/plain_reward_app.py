"""The other side of `benchmarks/rewards.py`: FastAPI around the OCR scorer, as one writes it in ten minutes.

    python benchmarks/plain_reward_app.py PORT

One process, the scorer behind a lock, PNG in and scores out: no limits, no batching, no queue, nobody to take over.
"""

import sys
import threading
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, File, Form, UploadFile
from PIL import Image

from services.contract import ItemScore
from services.media.base import Media
from services.scorers.registry import build_scorer, parse_reward

app = FastAPI()
scorer = build_scorer(parse_reward({"kind": "ocr", "mode": "flow_grpo", "reading": "recognition", "upscale": 3}))
lock = threading.Lock()


@app.post("/v1/score")
def score(prompt: Annotated[list[str], Form()], file: Annotated[list[UploadFile], File()]) -> dict[str, Any]:
    """Scores of PNG files."""
    pictures = [Media.image(np.asarray(Image.open(each.file).convert("RGB"))) for each in file]
    with lock:
        results = scorer.score(prompt, pictures)
    return {"results": [{"reward": r.reward, "scores": r.sub_scores} for r in results if isinstance(r, ItemScore)]}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)

# `make help` lists the targets. `demo` and `test` set everything up by themselves, in .venv.
PYTHON ?= python3
# another package index for the torch wheels, e.g. https://download.pytorch.org/whl/cpu (see README, "What is downloaded")
TORCH_INDEX ?=
# how many tests run at once; they wait more than they compute
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
PYTEST := $(BIN)/python -m pytest
PARALLEL = --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder
TORCH := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo control glyph-base results glyph-video-base results-video test test-long test-chaos test-fullsize test-mutation benchmark-replay benchmark-rollout benchmark-pipeline lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing ddrl into $(VENV) (2.2 GB of packages with the CPU build of torch)"
	@$(PIP) $(TORCH) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "installing the development tools"
	@$(PIP) -e '.[dev]'
	@touch $@

setup: $(VENV)/.ready  ## install ddrl into .venv

setup-dev: $(VENV)/.ready-dev  ## install ddrl and the development tools into .venv

demo: setup  ## teach a tiny diffusion model to write, end to end (8 to 12 minutes on two cores)
	@test ! -e runs/glyph-ocr || { echo "runs/glyph-ocr exists already; move it away, or: $(BIN)/ddrl train recipes/glyph-ocr.yaml --resume"; exit 2; }
	@$(BIN)/ddrl train recipes/glyph-ocr.yaml

control: setup  ## the demo's control: same data budget, no reward
	@$(BIN)/ddrl train recipes/glyph-control.yaml

results: setup  ## every run of docs/results.md, one after the other (about 45 minutes)
	@for s in 0 1 2; do $(BIN)/ddrl train recipes/glyph-ocr.yaml --set seed=$$s --set name=glyph-ocr-$$s || exit 1; done
	@for s in 0 1 2; do $(BIN)/ddrl train recipes/glyph-control.yaml --set seed=$$s --set name=glyph-control-$$s || exit 1; done
	@$(BIN)/ddrl train recipes/glyph-ocr.yaml --set objective.data_weight=0 --set name=glyph-free
	@$(BIN)/python -m benchmarks.results --ddrl runs/glyph-ocr-[012] --control runs/glyph-control-[012] --free runs/glyph-free

glyph-base: setup  ## train the demo's starting policy again (about 35 minutes)
	@$(BIN)/python -m diffusion.families.glyph.policy recipes/glyph-base
	@$(BIN)/ddrl train recipes/glyph-base.yaml
	@$(BIN)/ddrl export runs/glyph-base recipes/glyph-base --ema --overwrite

# `learn RECIPE RUN SETTING…`: a run of its own name; one that is finished is left alone, one that was interrupted goes on
LEARN = learn() { recipe=$$1; name=$$2; shift 2; test -e runs/$$name/summary.json || \
	$(BIN)/ddrl train recipes/$$recipe.yaml --set name=$$name "$$@" $$(test ! -e runs/$$name || echo --resume); }

results-video: setup  ## every run of docs/results.md with clips; again goes on where it stopped (about 75 minutes)
	@$(LEARN); for s in 0 1 2; do \
	  learn glyph-video-control glyph-video-control-$$s --set seed=$$s && learn glyph-video glyph-video-$$s --set seed=$$s && \
	  learn glyph-video-motion glyph-video-motion-$$s --set seed=$$s && learn glyph-video-i2v glyph-video-i2v-$$s --set seed=$$s && \
	  learn glyph-video-control glyph-video-i2v-control-$$s --set seed=$$s --set sampler.given_frames=1 || exit 1; done; \
	for name in glyph-video glyph-video-motion glyph-video-i2v; do learn $$name $$name-free --set objective.data_weight=0 || exit 1; done
	@$(BIN)/python -m benchmarks.results --reward ocr --held-out motion --ddrl runs/glyph-video-[012] --control runs/glyph-video-control-[012] --free runs/glyph-video-free
	@$(BIN)/python -m benchmarks.results --reward motion --sub-score motion.direction --held-out ocr --ddrl runs/glyph-video-motion-[012] --control runs/glyph-video-control-[012] --free runs/glyph-video-motion-free
	@$(BIN)/python -m benchmarks.results --reward motion --sub-score motion.direction --held-out ocr --ddrl runs/glyph-video-i2v-[012] --control runs/glyph-video-i2v-control-[012] --free runs/glyph-video-i2v-free
	@$(BIN)/python -m benchmarks.clips docs/media/glyph-video.gif --height 156 "before training=runs/glyph-video-0/samples/before.mp4" "control: data alone=runs/glyph-video-control-0/samples/after.mp4" "DDRL=runs/glyph-video-0/samples/after.mp4" "without the data term=runs/glyph-video-free/samples/after.mp4"
	@$(BIN)/python -m benchmarks.clips docs/media/glyph-video-i2v.gif --height 156 "the first frame given, before training=runs/glyph-video-i2v-0/samples/before.mp4" "DDRL=runs/glyph-video-i2v-0/samples/after.mp4" "without the data term=runs/glyph-video-i2v-free/samples/after.mp4"

glyph-video-base: setup  ## train the starting policy of the clips again (about 20 minutes)
	@$(BIN)/python -m diffusion.families.glyph.policy recipes/glyph-video-base --clips
	@$(BIN)/ddrl train recipes/glyph-video-base.yaml
	@$(BIN)/ddrl export runs/glyph-video-base recipes/glyph-video-base --ema --overwrite

test: setup-dev  ## the tests: unit, integration and a whole run (about 10 minutes on 2 cores)
	@$(PYTEST) $(PARALLEL) -m "not long and not chaos"

test-long: WORKERS := 2
test-long: setup-dev  ## what takes minutes: the demo at reduced size, kills in the middle of a run (more than an hour on 2 cores)
	@$(PYTEST) $(PARALLEL) -m long

test-chaos: setup-dev  ## a seeded storm of 50 kills over the whole pipeline, then the audit (about 15 minutes)
	@$(PYTEST) -m chaos -s

test-fullsize: MODEL := sd35-medium
test-fullsize: DTYPE := bfloat16
test-fullsize: setup-dev  ## one update of a published size with random weights, MODEL=sd35-medium, wan21-1.3b or cosmos25-2b, DTYPE=float32 on a CPU without bfloat16 (SD3.5-medium: 8 to 25 minutes on 2 cores, 22 GB of memory, 40 GB of disk)
	@$(BIN)/python -m benchmarks.fullsize --model $(MODEL) --dtype $(DTYPE)

test-mutation: setup-dev  ## break ledger, learner and driver on purpose, one place at a time: the tests must notice (about 20 minutes on 2 cores)
	@$(BIN)/python -m tests.mutation.run

benchmark-replay: setup-dev  ## the figures of docs/benchmarks.md (about 8 minutes on a quiet machine)
	@$(PIP) -e '.[bench]'
	@$(BIN)/python benchmarks/replay.py --markdown

benchmark-rollout: setup-dev  ## the engine's figures of docs/benchmarks.md (about 15 minutes on a quiet machine)
	@$(BIN)/python benchmarks/rollout.py --markdown

benchmark-pipeline: setup-dev  ## the whole pipeline against a bare loop (about 12 minutes on a quiet machine)
	@$(BIN)/python benchmarks/pipeline.py --markdown

lint: setup-dev  ## ruff, mypy, import arrows
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup-dev  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove .venv and caches; runs/ stays
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

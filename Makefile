VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# Two processes that spin on two cores slow each other down; waiting threads should sleep.
export OMP_WAIT_POLICY ?= passive

.PHONY: quickstart mini-checkpoint test test-fast test-long lint docs assets clean

# Both stages of alignment on real images, their scores, and a question about an image the model never saw.
quickstart: $(VENV)/.installed assets
	$(BIN)/python train.py --cfg-path configs/mini_stage1.yaml --options run.resume=true
	$(BIN)/python train.py --cfg-path configs/mini_stage2_presence.yaml --options run.resume=true
	$(BIN)/python train.py --cfg-path configs/mini_stage2.yaml --options run.resume=true
	@echo "== stage 1 alone, asked 1,000 questions about images it never saw"
	$(BIN)/python -m minigpt4 evaluate --options evaluation.samples=1000 model.init_from=output/mini_stage1/checkpoints/latest evaluation.output=output/mini_stage1/score.jsonl
	@echo "== stage 2, the same questions"
	$(BIN)/python -m minigpt4 evaluate --options evaluation.samples=1000 model.init_from=output/mini_stage2/checkpoints/latest evaluation.output=output/mini_stage2/score.jsonl
	@echo "== stage 2, the same questions about other images: the control"
	$(BIN)/python -m minigpt4 evaluate --options evaluation.samples=1000 evaluation.shuffle_images=true model.init_from=output/mini_stage2/checkpoints/latest evaluation.output=output/mini_stage2/score_shuffled.jsonl
	@echo "== and a question about a held-out image"
	$(BIN)/python -m minigpt4 chat --options model.init_from=output/mini_stage2/checkpoints/latest --image "$$($(BIN)/python -m minigpt4 assets easy-vqa --path)/test/images/7.png" --question "Describe this image in detail."

# The checkpoint that travels with the package: three runs, and its score on the whole test split.
mini-checkpoint: $(VENV)/.installed assets
	$(BIN)/python train.py --cfg-path configs/mini_stage1.yaml --options run.resume=true
	$(BIN)/python train.py --cfg-path configs/mini_stage2_presence.yaml --options run.resume=true
	$(BIN)/python train.py --cfg-path configs/mini_stage2_long.yaml --options run.resume=true
	$(BIN)/python -m minigpt4 evaluate --options model.init_from=output/mini_stage2_long/checkpoints/latest evaluation.output=output/mini_stage2_long/score.jsonl

test: $(VENV)/.installed assets
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# Minutes more: the same checks on more instants, sizes and inputs.
test-long: $(VENV)/.installed assets
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m long

# About a minute on two cores; downloads nothing besides the installation.
test-fast: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not mini and not long"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

# The documentation, from docs/ and the docstrings, into site/; a warning is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

assets: $(VENV)/.installed
	$(BIN)/python -m minigpt4 assets mini

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) output build dist site

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# Two processes that spin on two cores slow each other down; waiting threads should sleep.
export OMP_WAIT_POLICY ?= passive

.PHONY: quickstart mini-checkpoint test test-fast test-long lint docs assets clean

# Both stages of alignment on real images, their score next to its control, and a question about an unseen image.
quickstart: $(VENV)/.mini
	$(BIN)/python -m minigpt4 assets mini
	$(BIN)/python train.py --cfg-path configs/mini_stage1.yaml --options run.resume=true
	$(BIN)/python train.py --cfg-path configs/mini_stage2_presence.yaml --options run.resume=true
	$(BIN)/python train.py --cfg-path configs/mini_stage2.yaml --options run.resume=true
	@echo "== 1,000 questions about images it never saw, and the same questions about other images: the control"
	$(BIN)/python -m minigpt4 evaluate --options evaluation.samples=1000 'evaluation.controls=[shuffled]' evaluation.batch_size=100 model.init_from=output/mini_stage2/checkpoints/latest evaluation.output=output/mini_stage2/score.jsonl
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

# What the quickstart needs, and nothing for development.
$(VENV)/.mini: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@$(CPU_TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[mini]'
	touch $@

# On Linux, PyPI's torch brings gigabytes of CUDA. Without an NVIDIA driver, the CPU-only wheels are tried first.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
define CPU_TORCH
if [ "$$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi >/dev/null; then \
  $(BIN)/python -m pip install --quiet --retries 0 --timeout 15 --index-url $(TORCH_INDEX) torch torchvision \
    || echo "no CPU-only torch from $(TORCH_INDEX): the wheels of PyPI follow, which are larger"; \
fi
endef

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) output build dist site

# Every target builds what it needs in a virtual environment of its own, from the package index alone.
#   make demo                       train on handwritten digits, sample, and measure the samples
#   make test                       the fast tests
#   make test TORCH=torch==2.13.0   the same with a given build of torch
TORCH ?= torch
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format clean

help:
	@sed -n 's/^#   //p' Makefile

# torch is installed first and by itself, so that the requirement given in TORCH decides which build is used.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[$*]"
	touch $@

# The measured run is in the README. DEMO_DIR takes everything that it writes.
DEMO_DIR ?= demo
DEMO = examples/digits

demo: $(VENV)/.installed-demo
	$(BIN)/python $(DEMO)/prepare_digits.py --output_dir $(DEMO_DIR)/digits
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process 2 examples/class_conditional/train_class_conditional.py \
		--train_data_dir $(DEMO_DIR)/digits/train --validation_data_dir $(DEMO_DIR)/digits/test \
		--model_config $(DEMO)/model_config.json --resolution 8 --center_crop --train_batch_size 64 \
		--noise_schedule squaredcos_cap_v2 --prediction_type v_prediction \
		--max_train_steps 1000 --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 50 \
		--use_ema --ema_max_decay 0.995 --checkpointing_steps 250 --validation_steps 250 \
		--resume_from_checkpoint latest --output_dir $(DEMO_DIR)/pipeline
	$(BIN)/python $(DEMO)/evaluate_digits.py --pipeline $(DEMO_DIR)/pipeline --digits_dir $(DEMO_DIR)/digits \
		--samples $(DEMO_DIR)/samples.png

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo dist .pytest_cache .ruff_cache .hypothesis

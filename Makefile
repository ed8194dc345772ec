# Every command a person runs; `make help` lists them. CI runs .ci/run, which calls these targets and nothing else.
#   PYTHON=python3.12   the interpreter that .venv is made of, the first time
#   PORT= BACKEND=      for `make run`; every other knob is a VITRINE_ variable (docs/operations.md)
#   SECONDS=            of `make fuzz`
#   ARGS="..."          more arguments for the program behind a target

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help run test check conformance fuzz soak overload bench bench-full bench-k6 bench-chat triton .triton bundled bundled-tokenizer bundled-detector bundled-grounding bundled-encoder bundled-chat audit sbom docs format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[.a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.base ## start the gateway on http://127.0.0.1:8000 (PORT=, BACKEND=onnxruntime|triton)
	@exec $(BIN)/vitrine serve $(if $(PORT),--port $(PORT)) $(if $(BACKEND),--backend $(BACKEND)) $(ARGS)

test: $(VENV)/.test ## run all tests; the first time installs torch and builds the local Triton
	@PYTHON="$(PYTHON)" deploy/triton/install.sh || case ",$(VITRINE_REQUIRE)," in \
	    *,triton,*) exit 1 ;; \
	    *) echo "Without it, the tests against a real Triton are skipped." ;; \
	esac
	$(PYTEST) -m "not conformance and not gpu" $(ARGS)

check: $(VENV)/.test ## format, lint, types, import contracts; seconds
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

conformance: $(VENV)/.test ## the long form of the tests: every family in a published size
	$(PYTEST) -m conformance $(ARGS)

fuzz: $(VENV)/.test ## hostile input at every decoder, parser and route; about five minutes (SECONDS=, the part at random)
	$(BIN)/python -m tests.fuzz $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

soak: $(VENV)/.bench .triton ## half an hour of mixed load on both engines: errors, memory, open files, threads
	$(BIN)/python -m load_tests.soak $(ARGS)

overload: $(VENV)/.bench ## twice the capacity for a minute: what is still answered, what is told to come again
	$(BIN)/python -m load_tests.overload $(ARGS)

bench: $(VENV)/.bench ## Vitrine beside the other servers, planned at 14 minutes; needs wrk
	$(BIN)/python -m load_tests.bench $(ARGS)

bench-full: $(VENV)/.bench ## the same with every model, photo and number of clients, hours; goes on where it stopped
	$(BIN)/python -m load_tests.bench --full $(ARGS)

bench-k6: $(VENV)/.bench ## closed and open loops, mixed sizes and bad input on a running gateway, by k6
	$(BIN)/python -m load_tests.k6 closed $(ARGS)
	$(BIN)/python -m load_tests.k6 sizes $(ARGS)
	$(BIN)/python -m load_tests.k6 faults $(ARGS)
	$(BIN)/python -m load_tests.k6 search $(ARGS)

bench-chat: $(VENV)/.bench ## chats over HTTP beside transformers' generate, and the loop of tokens beside bare session calls
	$(BIN)/python -m load_tests.chat $(ARGS)

triton: $(VENV)/.base .triton ## start the local Triton on the repository, for `make run BACKEND=triton`
	@exec $(BIN)/vitrine triton $(ARGS)

.triton: ## build the local Triton (Linux x86-64), 350 MB, once
	@PYTHON="$(PYTHON)" deploy/triton/install.sh

bundled: $(VENV)/.test ## export the bundled classifier again from runs/convnext_50, which its recipe writes
	$(BIN)/python -m export timm/convnext_atto --name convnext-50 --num-classes 50 \
	    --checkpoint runs/convnext_50/model.safetensors --labels runs/convnext_50/labels.txt \
	    --model-arg patch_size=2 --model-arg kernel_sizes=5 \
	    --model-arg norm_layer=batchnorm2d --model-arg ls_init_value=0.5 --model-arg output_stride=16 \
	    --input-size 64 --resize 70 --licence Apache-2.0 \
	    --description "50 everyday classes, trained by recipes/convnext_50.py" $(ARGS)

bundled-tokenizer: $(VENV)/.test ## export the bundled tokenizer again from runs/photo_tokenizer, which its recipe writes
	$(BIN)/python -m export vit_vqgan --name vq-photo --model-arg variant=nano \
	    --checkpoint runs/photo_tokenizer/model.safetensors --licence Apache-2.0 \
	    --description "Photos of 256x256 to 32x32 tokens and back, trained by recipes/photo_tokenizer.py" $(ARGS)

bundled-encoder: $(VENV)/.test ## export the bundled dual encoder again from runs/scene_encoder, which its recipe writes
	$(BIN)/python -m export open_clip/ViTamin-S --name scenes-encoder --input-size 128 --model-arg embed_dim=128 \
	    --model-arg "trunk={'widths': (24, 48, 128), 'depths': (1, 2, 4), 'heads': 4}" \
	    --model-arg "text_cfg={'context_length': 77, 'vocab_size': 384, 'width': 128, 'heads': 4, 'layers': 3, 'pool_type': 'eos', \
	    'eos_id': 1, 'hf_tokenizer_name': 'scenes', 'tokenizer_kwargs': {'clean': 'lower'}}" \
	    --checkpoint runs/scene_encoder/model/open_clip_model.safetensors --licence Apache-2.0 \
	    --description "Scenes of coloured shapes and descriptions of them, trained by recipes/scene_encoder.py" $(ARGS)

bundled-chat: $(VENV)/.test ## export the bundled chat model again from runs/scene_chat, which its recipe writes
	$(BIN)/python -m export transformers/runs/scene_chat/model --pretrained --name scenes-chat --licence Apache-2.0 \
	    --description "Answers questions about scenes of coloured shapes, trained by recipes/scene_chat.py" $(ARGS)

bundled-detector: $(VENV)/.test ## export the bundled detector again from runs/scene_detector, which its recipe writes
	$(BIN)/python -m export transformers/runs/scene_detector/model --pretrained --name scenes-detector \
	    --input-size 256 --resize 256x256 --mean 0 --std 1 --licence Apache-2.0 \
	    --description "Eight kinds of coloured shapes, an RT-DETR trained by recipes/scene_detector.py" $(ARGS)

bundled-grounding: $(VENV)/.test ## export the bundled grounding model again from runs/scene_grounding, which its recipe writes
	$(BIN)/python -m export transvg_pp --name scenes-grounding --model-arg width=128 --model-arg heads=4 --model-arg depth=6 \
	    --model-arg 'modulated=(3,4,5)' --model-arg image_size=160 --model-arg 'text=(2,128,4,256)' \
	    --model-arg positions=20 --model-arg length=20 --model-arg vocabulary=99 --input-size 160 \
	    --checkpoint runs/scene_grounding/model.safetensors --licence Apache-2.0 \
	    --description "What phrases about coloured shapes mean, a TransVG++ trained by recipes/scene_grounding.py" $(ARGS)

audit: build/.gateway build/.audit ## ask PyPI's advisories about everything that the gateway installs; fails where it cannot ask
	build/audit/bin/pip-audit --strict --skip-editable --path build/gateway/lib/python3*/site-packages $(ARGS)

sbom: build/.gateway build/.audit ## write build/sbom.cdx.json, what the gateway installs (CycloneDX), for the notes of a release
	build/audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	    --output-file build/sbom.cdx.json build/gateway/bin/python

docs: $(VENV)/.test ## write what is generated again: the settings table of docs/operations.md, the dashboards
	$(BIN)/python -m tests.test_operations
	$(BIN)/python -m deploy.grafana.render

format: $(VENV)/.test ## format the code and apply the linter's safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove caches and build products; .venv and .triton stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist
	find app export recipes tests deploy load_tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Vitrine needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) --version 2>&1`." \
	        "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml | $(BIN)/python
	@echo "Installing the gateway into $(VENV) (once) ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	@echo "Installing what the load tests need into $(VENV): torch and more, several GB on Linux (once) ..."
	@$(PIP) --editable ".[bench]"
	@touch $(VENV)/.base $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "Installing what the tests need into $(VENV): torch and more, several GB on Linux (once) ..."
	@$(PIP) --editable ".[test]"
	@touch $(VENV)/.base $@

build/.gateway: pyproject.toml | $(BIN)/python
	@echo "Installing the gateway alone, with what its image may have, into build/gateway ..."
	@$(PYTHON) -m venv --clear --without-pip build/gateway
	@$(BIN)/python -m pip --disable-pip-version-check --python build/gateway/bin/python install --quiet --editable ".[heic,tracing]"
	@touch $@

build/.audit: pyproject.toml | $(BIN)/python
	@$(PYTHON) -m venv --clear build/audit
	@build/audit/bin/python -m pip --disable-pip-version-check install --quiet "cyclonedx-bom>=7" "pip-audit>=2.9"
	@touch $@

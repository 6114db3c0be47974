# make demo | make test | make test-{oldest,trainers} | make lint | make docs | make bench | make gpu | make gpu-{right,kernels,steps} | make venv | make wheel | make clean
# `demo`, `test` and `lint` set up everything they need in .venv; `gpu` uses the python3 and packages already on the machine.
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
PIP     = $(PY) -m pip --disable-pip-version-check
SRC     = $(wildcard csrc/*.* csrc/autograd/*) setup.py pyproject.toml

.PHONY: venv demo test docs-and-trainers test-native test-composite test-triton test-cuda test-slow test-oldest test-trainers crash fuzz fuzz-dropin soak aot lint docs bench gpu gpu-build gpu-right gpu-kernels gpu-steps wheel clean
venv: $(VENV)/.built

demo: $(VENV)/.built
	PYTHONSAFEPATH=1 $(PY) -m fastpeft.demo

test: lint docs-and-trainers test-native test-composite test-triton test-oldest $(if $(filter x86_64,$(shell uname -m)),test-cuda) aot

# of one process each
docs-and-trainers: $(VENV)/.built
	$(MAKE) -j2 --output-sync=target docs test-trainers

# each run lists what it skips and why; a reason that tests/_skips.py does not know fails it
PYTEST = -q --known-skips

# two processes of one thread each: what the tests compute is too small for two threads
test-native: $(VENV)/.built
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST) -n 2

test-composite: $(VENV)/.built
	OMP_NUM_THREADS=1 FASTPEFT_BACKEND=composite $(PY) -m pytest $(PYTEST) -n 2 tests/ops

# Triton fixes its interpreter at first import: one process per mode
test-triton: $(VENV)/.built
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 FASTPEFT_BACKEND=triton $(PY) -m pytest $(PYTEST) -n 2 tests/ops

# csrc's CUDA sources compiled for the CPU; then the GPU's own tests on tensors that only say they are on one
build/cuda/emulated.so: $(VENV)/.built $(wildcard csrc/*.* tests/cuda/*)
	$(PY) tests/cuda/build.py build/cuda

LOOKALIKE = OMP_NUM_THREADS=1 FASTPEFT_BACKEND=composite PYTHONPATH=. $(PY) tests/cuda/lookalike.py build/cuda/lookalike.so $(PYTEST) -p no:cacheprovider
QUICK_GPU = -m 'gpu and not slow'
ROW_WISE = $(addprefix tests/ops/test_,$(addsuffix .py,activations all_ops attention_inputs cuda_sanitizer cuda_sources layer_norm rescale rms_norm rotary))
test-cuda: build/cuda/emulated.so  # but for tests of the CPU's own conversions and streaming, of very many rows
	OMP_NUM_THREADS=1 FASTPEFT_LIBRARY=build/cuda/emulated.so $(PY) -m pytest $(PYTEST) -n 2 $(ROW_WISE) -k 'not 16_bit_number and not larger_than'
	$(LOOKALIKE) $(QUICK_GPU) --ignore=tests/ops/test_cuda_twins.py tests/ops tests/train tests/cost & other=$$!; $(LOOKALIKE) $(QUICK_GPU) tests/ops/test_cuda_twins.py tests/bench && wait $$other

test-slow: $(VENV)/.built $(if $(filter x86_64,$(shell uname -m)),build/cuda/emulated.so)
	$(PY) -m pytest $(PYTEST) -m slow
	$(if $(filter x86_64,$(shell uname -m)),OMP_NUM_THREADS=1 FASTPEFT_LIBRARY=build/cuda/emulated.so $(PY) -m pytest $(PYTEST) -m slow -n 2 tests/ops/test_cuda_sanitizer.py)
	$(if $(filter x86_64,$(shell uname -m)),$(LOOKALIKE) -m 'gpu and slow' tests/train)

# runs killed at 500 of their file operations, and resumed; 100,000 drawn files and command lines; a run of an hour. Long: by hand
crash: $(VENV)/.built
	OMP_NUM_THREADS=1 $(PY) tests/crash/crash_harness.py --points 500

fuzz: $(VENV)/.built
	OMP_NUM_THREADS=1 $(PY) tests/fuzz/fuzz.py --cases 100000

# drawn models, adapters and batches, each with and without optimize. Hours: by hand
fuzz-dropin: $(VENV)/.built
	OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 $(PY) tests/fuzz/fuzz_dropin.py --cases 20000

soak: $(VENV)/.built
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST) -m slow -s tests/crash/test_soak.py

# The oldest transformers and peft that pyproject.toml allows, with what they need, laid over the installed ones
OLDEST = $(CURDIR)/build/oldest
$(OLDEST)/.done: $(VENV)/.built
	rm -rf $(OLDEST)
	$(PIP) install -q --no-deps --target $(OLDEST) transformers==5.17.0 peft==0.18.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
	touch $@

DROP_IN = $(addprefix tests/,surroundings nn caching verify/test_any_model.py $(addprefix test_,$(addsuffix .py,examples optimize optimize_names peft peft_fields registry)))
test-oldest: $(OLDEST)/.done
	OMP_NUM_THREADS=1 FASTPEFT_TESTS_WITHOUT_TORCHAO=1 PYTHONPATH=$(OLDEST) $(PY) -m pytest $(PYTEST) -n 2 -p no:cacheprovider $(DROP_IN) -k "not (no_image_is_computed_twice and idefics3)"  # 5.17 tells no image's rows there: kept by call

# Trainers of others, which few need: TRL, Lightning, Hugging Face's kernels. datasets takes what lies in no site-packages for the user's own
TRAINERS = $(CURDIR)/build/trainers/site-packages
$(TRAINERS)/.done: $(VENV)/.built
	rm -rf $(TRAINERS)
	$(PIP) install -q --no-deps --target $(TRAINERS) trl==1.16.0 datasets==5.2.0 pyarrow==26.0.1 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0
	$(PIP) install -q --no-deps --target $(TRAINERS) pytorch-lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0 kernels==0.17.2 tomlkit==0.15.2
	touch $@

test-trainers: $(TRAINERS)/.done
	OMP_NUM_THREADS=1 USE_HUB_KERNELS=0 PYTHONPATH=$(TRAINERS) $(PY) -m pytest $(PYTEST) -p no:cacheprovider tests/trainers

# two versions of Triton: the one installed, and that of torch 2.11, laid over it
OLD_TRITON = build/triton-3.6.0
$(OLD_TRITON)/.done: $(VENV)/.built
	rm -rf $(OLD_TRITON)
	$(PIP) install -q --no-deps --target $(OLD_TRITON) triton==3.6.0
	touch $@

# csrc's CUDA kernels, for the check alone where torch is a CPU build
NVCC         = $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
CUDA_LIBRARY = build/cuda-library/fastpeft/_C.abi3.so
# of one architecture, for its sake alone: `make aot AOT_ARCHS="80;90;100" CARDS="80 86 90 100 120" OLD_CARDS="80 90"` looks at all; sm_86's shared memory is sm_120's
AOT_ARCHS    = 90
CARDS        = 80 86 90
OLD_CARDS    = 90
$(CUDA_LIBRARY): $(VENV)/.built $(SRC)
	FASTPEFT_CUDA=alone FASTPEFT_CUDA_ARCHS="$(AOT_ARCHS)" $(PY) setup.py -q build_ext --build-lib build/cuda-library --build-temp build/cuda-objects
	touch $@

aot: $(VENV)/.built $(OLD_TRITON)/.done $(if $(NVCC),$(CUDA_LIBRARY))
	$(PY) bench/aot.py --arch $(CARDS) --check bench/aot_limits.json $(if $(NVCC),--library $(CUDA_LIBRARY))
	PYTHONPATH=$(OLD_TRITON) $(PY) bench/aot.py --arch $(OLD_CARDS) --check bench/aot_limits.json

# every link and anchor checked; its Python and its commands are run and read by tests/test_docs.py
docs: $(VENV)/.built
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

lint: $(VENV)/.built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports --no-cache

bench: $(VENV)/.built
	$(PY) -m bench

# on a machine with a GPU: its own python3 and packages, nothing installed; csrc built in place for that GPU alone, where it compiles and
# is not up to date. Three calls of at most 8 minutes, or all of it within 10
GPU_ARCH = $(shell $(PYTHON) -c "import torch; print('%d%d' % torch.cuda.get_device_capability())" 2>/dev/null || echo 90)
gpu-build:
	-FASTPEFT_CUDA_ARCHS=$(GPU_ARCH) timeout 150 $(PYTHON) setup.py -q build_ext --inplace

# the minutes count from here: what building and imports take is theirs
gpu:
	since=$$(date +%s); $(MAKE) --no-print-directory gpu-build; PYTHONPATH=. $(PYTHON) -m bench gpu --minutes 9.5 --since $$since

gpu-right gpu-kernels gpu-steps: gpu-%:
	since=$$(date +%s); $(MAKE) --no-print-directory gpu-build; PYTHONPATH=. $(PYTHON) -m bench gpu $* --minutes 7.6 --since $$since

# dist/: the pure wheel, one with csrc for CPUs, and, where nvcc is found, one with its CUDA kernels too
CUDA_LABEL = cu$(shell $(NVCC) --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1\2/p')
wheel: $(VENV)/.built
	rm -rf build/lib* build/bdist* build/temp*
	FASTPEFT_NO_EXT=1 $(WHEEL)
	rm -rf build/lib*
	FASTPEFT_CUDA=0 FASTPEFT_LABEL=cpu $(WHEEL)
	$(if $(NVCC),rm -rf build/lib* && FASTPEFT_CUDA=1 FASTPEFT_LABEL=$(CUDA_LABEL) $(WHEEL))
	rm -rf build/lib* build/bdist* build/temp*
	ls -l dist
WHEEL = $(PIP) wheel -q --no-deps --no-build-isolation -w dist .

# torch alone at its pin, so that no other package can choose it; then the rest; then our package
$(VENV)/.deps: requirements.txt constraints.txt
	@echo "an environment in $(VENV), about 3 GB: torch and what the tests need, then csrc compiled; two minutes or more"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q 'torch==$(shell sed -n 's/^torch==//p' constraints.txt)'
	@# a CUDA torch brings its own exact triton: drop our pin then
	@$(PY) -c 'import torch, sys; sys.exit(torch.version.cuda is None)' && sed '/^triton==/d' constraints.txt > $(VENV)/constraints.txt || cp constraints.txt $(VENV)/constraints.txt
	$(PIP) install -q -c $(VENV)/constraints.txt -r requirements.txt
	@# an oracle, in a folder that only the tests look into: transformers imports torchao wherever it is installed, and it warns on stderr
	$(PIP) install -q -c $(VENV)/constraints.txt --no-deps --upgrade --target $(VENV)/torchao 'torchao; sys_platform == "linux"'
	touch $@

$(VENV)/.built: $(VENV)/.deps $(SRC)
	$(PIP) install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastpeft/_C*.so fastpeft/_autograd*.so

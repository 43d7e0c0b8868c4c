# make          the library, tools and examples, in build/
# make demo     the wave simulation; installs what it needs. Where GPUs and nvcc are, on those, and installs nothing
# make test     all tests; installs what they need
# make gpu-test the tests of CUDA on this machine's GPUs; installs nothing
# make gpu-sanitize  most of them under compute-sanitizer, which comes with the CUDA toolkit
# make bench    measurements against others; installs what it needs
# make gpu-bench  measurements on this machine's GPUs, beside driver calls and PyTorch; installs nothing
# make soak     the tests that are the better the longer they run, until stopped or for SOAK_SECONDS
# make fuzz     the fuzz targets, until stopped or for FUZZ_SECONDS
# make coverage line coverage by section, of the tests and the fuzz targets' corpora; installs what it needs
# make clean
#
# make test-plain, test-asan, test-tsan, test-sim, test-compile, test-scripts, test-fuzz, test-floors: a part of the
#               tests, installing nothing
# make asan, make tsan: the tests' programs, built with a sanitizer

CC  = gcc
CXX = g++
# clang's sanitizers see more; gcc's do where it is missing. Looked up when used, for `make test` may install it.
SAN_CC  = $(shell command -v clang   || echo $(CC))
SAN_CXX = $(shell command -v clang++ || echo $(CXX))

WARNINGS  = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wundef -Werror
C_FLAGS   = -std=c99 $(WARNINGS) -pthread
CXX_FLAGS = -std=c++11 $(WARNINGS) -Wold-style-cast -fno-exceptions -fno-rtti -pthread
LIBRARIES = -pthread -ldl -lm
# Where a toolkit is, its cuda.h is compared with what we declare; nothing else looks at it.
CUDA_HOME  ?= /usr/local/cuda
# One example is for nvcc, and left out where that is missing. Nothing is contracted there either.
NVCC       := $(firstword $(shell command -v nvcc) $(wildcard $(CUDA_HOME)/bin/nvcc))
NVCC_FLAGS  = -std=c++17 -O2 -g -fmad=false -Xcompiler=-ffp-contract=off,-Wall,-Wextra,-Wshadow,-pthread
CUDA_FLAGS := $(addprefix -isystem ,$(patsubst %/cuda.h,%,$(wildcard $(CUDA_HOME)/include/cuda.h)))

# With pmix:// where its header is. Looked up when used, for `make test` may install it. Not for coverage: tests/pmix.sh,
# which needs a launcher, is not counted.
PMIX = $(shell for d in /usr/include /usr/local/include /usr/lib/*/pmix2/include; do [ ! -f $$d/pmix.h ] || \
         { echo "-DTPRPC_WITH_PMIX -idirafter $$d"; break; }; done)

# No floating-point contraction: the demo compares fields bit for bit.
PLAIN = -O2 -g -ffp-contract=off
ASAN  = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
TSAN  = -O1 -g -fno-omit-frame-pointer -fsanitize=thread
# A test of internals has an implementation of its own. To optimise each takes longer than they run, so that is left to
# impl.c, which most tests use; and what nobody optimises away, a sanitizer sees.
PLAIN_IN = $(PLAIN) -O0
ASAN_IN  = $(ASAN) -O0
TSAN_IN  = $(TSAN) -O0
# The counters are mapped from the profile's file, so that they are there however a process ends, by _exit or killed.
COVERAGE = -O1 -g -fprofile-instr-generate -fcoverage-mapping -mllvm -runtime-counter-relocation \
           -Wno-unused-command-line-argument
# To optimise a target takes as long as half of a minute's fuzzing, and makes it a third faster.
FUZZ     = -O0 -g -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all

WAVE_ARGS  =
WAVE_CUDA_ARGS =
# make soak runs these parts in turn, each for SOAK_TURN seconds; each alone runs for SOAK_SECONDS. 0: until stopped
SOAK_PARTS   = soak-sim soak-pressure soak-crash soak-load soak-slow soak-valgrind
SOAK_SECONDS = 0
SOAK_TURN    = 300

BENCH      = tools/bench.py
BENCH_ARGS =
GPU_BENCH_ARGS =
FUZZ_SECONDS  = 0
COVERAGE_ARGS =

HEADERS   = Makefile tprpc.h $(wildcard tprpc_cuda.h) $(wildcard tests/*.h tests/*/*.h tools/*.h examples/*.h) \
            tests/toys.c tests/in_conformance.c
TESTS_C   = $(patsubst tests/%.c,%,$(filter-out tests/impl.c tests/cuda_impl.c tests/sim.c,$(wildcard tests/*.c)))
# Tests of CUDA run on a stand-in driver; those of the library also on real GPUs.
TESTS_GPU = $(filter cuda_% in_cuda_%,$(filter-out cuda_standin in_cuda_conformance in_cuda_hostile,$(TESTS_C)))
TESTS_CXX = $(patsubst tests/%.cpp,%,$(wildcard tests/*_cpp.cpp))
SCRIPTS   = $(filter-out tests/run.sh tests/compile.sh tests/fuzz.sh,$(wildcard tests/*.sh))
FLOORS    = "tools/check_floors.py --self-test" tools/check_floors.py "tools/coverage.py --self-test" tools/ptx.py
FUZZERS   = $(patsubst tests/fuzz/%.c,build/fuzz/%,$(wildcard tests/fuzz/*.c))
# Not what counts the cost of a million calls, which takes minutes with counters in it and runs nothing else.
COVERED   = $(patsubst %,build/coverage/tests/%,$(filter-out agent_cost,$(TESTS_C))) \
            $(FUZZERS:build/%=build/coverage/%)
TOOLS     = $(patsubst tools/%.c,build/%,$(wildcard tools/*.c))
EXAMPLES  = $(patsubst examples/%.c,build/%,$(wildcard examples/*.c)) \
            $(patsubst examples/%.cpp,build/%,$(wildcard examples/*.cpp)) \
            $(if $(NVCC),$(patsubst examples/%.cu,build/%,$(wildcard examples/*.cu)))
# Programs that need a library are left out where it is missing; not by a target that installs it first: $(2).
# (Whether a # within a function is to be escaped, versions of make do not agree on.)
hash := \#
lacks = $(filter none,$(if $(filter $(2),$(MAKECMDGOALS)),,$(shell echo '$(hash)include <$(1)>' | $(CC) -E - \
        >/dev/null 2>&1 || echo none)))
# The demo's GPUs: the word that each line about one begins with.
GPUS     := $(if $(and $(NVCC),$(filter demo,$(MAKECMDGOALS))),$(filter GPU,$(shell nvidia-smi -L 2>/dev/null)))
EXAMPLES := $(if $(call lacks,png.h,$(if $(GPUS),,demo) test),$(filter-out build/wave,$(EXAMPLES)),$(EXAMPLES))
TOOLS    := $(if $(call lacks,zmq.h,bench),$(filter-out build/bench-zmq,$(TOOLS)),$(TOOLS))
TOOLS    := $(if $(call lacks,nng/nng.h,bench),$(filter-out build/bench-nng,$(TOOLS)),$(TOOLS))

# Where the compiler $(1) for C++ is missing, what needs it is left out; not by `make test`, which installs it first.
works_cxx   = $(or $(filter test,$(MAKECMDGOALS)),$(shell echo | $(1) -x c++ -E - 2>/dev/null))
tests_with  = $(TESTS_C) $(if $(call works_cxx,$(1)),$(TESTS_CXX))
san_tests   := $(call tests_with,$(SAN_CXX))
plain_tests := $(patsubst %,build/tests/%,$(call tests_with,$(CXX)))
asan_tests  := $(san_tests:%=build/asan/tests/%)
tsan_tests  := $(san_tests:%=build/tsan/tests/%)

# What takes longest runs first of its kind, so that nobody waits for it alone in the end. What needs the machine to
# itself runs last, alone: it counts what a million calls cost while both ends spin.
longest_first = $(filter %/pipe %/lanes %/channels,$(1)) $(filter-out %/pipe %/lanes %/channels,$(1))
in_order = $(filter-out %/agent_cost,$(1)) -- $(filter %/agent_cost,$(1))

# The simulated network uses all processors by itself.
SIMS = build/sim build/asan/sim

# make test, gpu-test, gpu-sanitize, gpu-bench, demo and coverage compile on all cores without being asked to.
ifneq ($(filter demo test gpu-test gpu-sanitize gpu-bench coverage,$(MAKECMDGOALS)),)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 2)
endif
MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: all demo test gpu-test gpu-sanitize bench gpu-bench soak $(SOAK_PARTS) fuzz coverage clean asan tsan \
        setup-demo setup-test setup-bench setup-coverage \
        test-plain test-asan test-tsan test-sim test-compile test-scripts test-fuzz test-floors

all: build/libtprpc.a $(TOOLS) $(EXAMPLES)
asan: $(asan_tests)
tsan: $(tsan_tests)

# ---- what installs: before the first compilation, hence the order-only $(SETUP) below ----

SETUP = $(patsubst %,setup-%,$(filter $(if $(GPUS),,demo) test bench coverage,$(MAKECMDGOALS)))

setup-demo setup-test setup-bench setup-coverage:
	@tools/setup.sh $(@:setup-%=%)

DEMOS = $(if $(GPUS),build/wave_cuda) $(filter build/wave,$(EXAMPLES))
demo: $(DEMOS)
	$(if $(GPUS),build/wave_cuda $(WAVE_CUDA_ARGS))
	$(if $(filter build/wave,$(DEMOS)),build/wave $(WAVE_ARGS))

test: $(plain_tests) $(asan_tests) $(tsan_tests) $(SIMS) $(TOOLS) $(EXAMPLES) $(FUZZERS)
	@tests/run.sh $(call in_order,$(FLOORS) tests/compile.sh tests/fuzz.sh $(plain_tests) $(SCRIPTS) $(asan_tests) \
	              $(call longest_first,$(tsan_tests))) $(SIMS)

bench: all
	$(BENCH) $(BENCH_ARGS)

coverage: $(COVERED)
	tools/coverage.py $(COVERAGE_ARGS) $(COVERED)

# ---- what does not ----

fuzz: $(FUZZERS)
	tests/fuzz.sh --long $(FUZZ_SECONDS)

test-plain: $(plain_tests)
	@tests/run.sh $(call in_order,$^)
test-asan: $(asan_tests)
	@tests/run.sh $(call in_order,$^)
test-tsan: $(tsan_tests)
	@tests/run.sh $(call in_order,$^)
test-sim: $(SIMS)
	@tests/run.sh -- $(SIMS)
test-compile:
	@tests/run.sh tests/compile.sh
test-scripts: $(TOOLS) $(EXAMPLES) build/tests/in_conformance build/standin/libcuda.so.1
	@tests/run.sh $(SCRIPTS)
test-fuzz: $(FUZZERS)
	@tests/run.sh tests/fuzz.sh
test-floors:
	@tests/run.sh $(FLOORS)

# ---- on a machine with GPUs: one process after the other, for they share them; nothing but gcc and make is needed ----

gpu-test: $(TESTS_GPU:%=build/gpu/tests/%)
	@CUDA_LIBRARY=libcuda.so.1 tests/run.sh -- $^

# Without those whose kernels fault on purpose; in minutes.
gpu-sanitize: $(filter-out %/cuda_driver %/in_cuda_abi,$(TESTS_GPU:%=build/gpu/tests/%))
	@tests/run.sh -- $(^:%='tests/cuda/sanitized.sh %')

gpu-bench: build/tprpc-perf build/tprpc-info
	tools/gpu-bench.py $(GPU_BENCH_ARGS)

# ---- at length; programs find their seed in SOAK_SEED ----

soak:
	@tools/soak.sh $(SOAK_SECONDS) $(SOAK_PARTS:%='$(MAKE) % SOAK_SECONDS=$(SOAK_TURN)')
soak-crash: build/tests/crash build/tests/stopped
	@tools/soak.sh $(SOAK_SECONDS) 'CRASH_SEED=$$SOAK_SEED CRASH_MOMENTS=1000 TEST_LIMIT_SCALE=10 build/tests/crash' \
	    'STOPPED_S=35 build/tests/stopped'
soak-load: build/tests/load
	@tools/soak.sh $(SOAK_SECONDS) 'LOAD_WORKERS=64 LOAD_SECONDS=$(patsubst 0,600,$(SOAK_SECONDS)) $<'
soak-slow: build/tests/slow
	@tools/soak.sh $(SOAK_SECONDS) $<
soak-valgrind: build/tests/in_conformance
	@tools/soak.sh $(SOAK_SECONDS) 'tests/valgrind.sh all'
soak-sim: build/sim
	@tools/soak.sh $(SOAK_SECONDS) 'timeout $(patsubst 0,600,$(SOAK_SECONDS)) $< --soak $$SOAK_SEED || [ $$? -eq 124 ]'
soak-pressure: build/tests/pressure build/tests/hooks
	@tools/soak.sh $(SOAK_SECONDS) 'PRESSURE_SOAK=$$SOAK_SEED $<' 'HOOKS_ALL=1 build/tests/hooks'

clean:
	rm -rf build

# ---- the tests, in variants: $(1) folder, $(2) C compiler, $(3) C++ compiler, $(4) flags, $(5) those of internals ----
# The implementation is compiled once per variant, with the test hooks, and asks for _GNU_SOURCE itself; tests may include
# in any order, so they are given it.

define variant
$(1)/tests/%.o: tests/%.c $$(HEADERS) | $$(SETUP)
	@mkdir -p $$(@D)
	$(2) $$(C_FLAGS) $(4) -D_GNU_SOURCE -c $$< -o $$@

$(1)/tests/in_%.o: tests/in_%.c $$(HEADERS) | $$(SETUP)
	@mkdir -p $$(@D)
	$(2) $$(C_FLAGS) $(5) -D_GNU_SOURCE -c $$< -o $$@

$(1)/tests/in_cuda_abi.o: C_FLAGS += $$(CUDA_FLAGS)

$(1)/tests/impl.o: tests/impl.c $$(HEADERS) | $$(SETUP)
	@mkdir -p $$(@D)
	$(2) $$(C_FLAGS) $(4) $(if $(filter %/coverage,$(1)),,$$(PMIX)) -c $$< -o $$@

$(1)/tests/%_cpp.o: tests/%_cpp.cpp $$(HEADERS) | $$(SETUP)
	@mkdir -p $$(@D)
	$(3) $$(CXX_FLAGS) $(4) -c $$< -o $$@

$(1)/tests/%_cpp: $(1)/tests/%_cpp.o $(1)/tests/impl.o
	$(3) $(4) $$^ $$(LIBRARIES) -o $$@

$(1)/tests/%: $(1)/tests/%.o $(1)/tests/impl.o
	$(2) $(4) $$^ $$(LIBRARIES) -o $$@

$(1)/sim: $(1)/tests/sim.o $(1)/tests/impl.o
	$(2) $(4) $$^ $$(LIBRARIES) -o $$@

# A driver for machines without a GPU, which the tests of CUDA load.
$(1)/standin/libcuda.so.1: tests/cuda/standin.c tests/cuda/standin.h Makefile | $$(SETUP)
	@mkdir -p $$(@D)
	$(2) $$(C_FLAGS) $(4) -D_GNU_SOURCE -fPIC -fvisibility=hidden -shared -Wl,-soname,libcuda.so.1 $$< -o $$@

$(1)/tests/cuda_impl.o: tests/cuda_impl.c $$(HEADERS) | $$(SETUP)
	@mkdir -p $$(@D)
	$(2) $$(C_FLAGS) $(4) -c $$< -o $$@

$(1)/tests/cuda_%: $(1)/tests/cuda_%.o $(1)/tests/cuda_impl.o $(1)/tests/impl.o | $(1)/standin/libcuda.so.1
	$(2) $(4) $$^ $$(LIBRARIES) -o $$@

$(1)/tests/in_cuda_%: $(1)/tests/in_cuda_%.o | $(1)/standin/libcuda.so.1
	$(2) $(5) $$^ $$(LIBRARIES) -o $$@

# A test of internals brings an implementation of its own.
$(1)/tests/in_%: $(1)/tests/in_%.o
	$(2) $(5) $$^ $$(LIBRARIES) -o $$@
endef

$(eval $(call variant,build,$$(CC),$$(CXX),$$(PLAIN),$$(PLAIN_IN)))
$(eval $(call variant,build/gpu,$$(CC),$$(CXX),$$(PLAIN),$$(PLAIN_IN)))
$(eval $(call variant,build/asan,$$(SAN_CC),$$(SAN_CXX),$$(ASAN),$$(ASAN_IN)))
$(eval $(call variant,build/tsan,$$(SAN_CC),$$(SAN_CXX),$$(TSAN),$$(TSAN_IN)))
$(eval $(call variant,build/coverage,$$(SAN_CC),$$(SAN_CXX),$$(COVERAGE),$$(COVERAGE) -O0))

# ---- the fuzz targets, each with an implementation of its own; clang alone has libFuzzer ----

build/fuzz/%: tests/fuzz/%.c $(HEADERS) | $(SETUP)
	@mkdir -p $(@D)
	$(SAN_CC) $(C_FLAGS) $(FUZZ) -D_GNU_SOURCE $< $(LIBRARIES) -o $@

build/coverage/fuzz/%: tests/fuzz/%.c $(HEADERS) | $(SETUP)
	@mkdir -p $(@D)
	$(SAN_CC) $(C_FLAGS) $(COVERAGE) -fsanitize=fuzzer -D_GNU_SOURCE $< $(LIBRARIES) -o $@

# ---- the library, tools and examples: a program that does not compile the implementation itself gets the library ----

build/tprpc.o: $(HEADERS) | $(SETUP)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(PLAIN) $(PMIX) -DTPRPC_IMPLEMENTATION -x c -c tprpc.h -o $@

build/libtprpc.a: build/tprpc.o
	rm -f $@
	ar rc $@ $^

build/wave:      LIBRARIES += -lpng
build/bench-zmq: LIBRARIES += -lzmq
build/bench-nng: LIBRARIES += -lnng

define program
build/%: $(1)/%.c build/libtprpc.a $$(HEADERS) | $$(SETUP)
	$$(CC) -I. $$(C_FLAGS) $$(PLAIN) $$< build/libtprpc.a $$(LIBRARIES) -o $$@

build/%: $(1)/%.cpp build/libtprpc.a $$(HEADERS) | $$(SETUP)
	$$(CXX) -I. $$(CXX_FLAGS) $$(PLAIN) $$< build/libtprpc.a $$(LIBRARIES) -o $$@
endef

build/%: examples/%.cu $(HEADERS) | $(SETUP)
	@mkdir -p $(@D)
	$(NVCC) -I. $(NVCC_FLAGS) $< -ldl -o $@

$(eval $(call program,examples))
$(eval $(call program,tools))

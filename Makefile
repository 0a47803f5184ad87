# qllm.c: make, make test, make quickstart. `make help` lists the targets.
#
# What is optional is found by compiling and linking a three-line program; what was found, and what it does, is printed.
# Override the search with DNNL_HOME, MPI_HOME, CUDA_HOME, DEPS_HOME, or turn something off: NO_DNNL=1 NO_OMP=1
# NO_MPI=1 NO_CUDA=1.
#   PRECISION=bf16|fp32   type of activations and working weights (default bf16)
#   SANITIZE=1            AddressSanitizer and UndefinedBehaviorSanitizer
#   ARCH=native           -march= of the CPU code
#   WERROR=1              warnings are errors
#   BUILD=build           where everything is built
#   V=1                   show the commands

PRECISION ?= bf16
BUILD     ?= build
ARCH      ?= native
CC        ?= cc
PREFIX    ?= /usr/local
comma     := ,
OUT       := $(BUILD)/$(PRECISION)$(if $(SANITIZE),-asan)
PROGRAMS  := $(patsubst %.c,%,$(wildcard train_llama_qat.c train_llama_qt.c quantize.c generate.c eval.c))
Q         := $(if $(V),,@)

# All cores, unless -j says otherwise.
ifeq ($(MAKELEVEL),0)
  MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 1)
endif

CFLAGS   ?= $(if $(SANITIZE),-O2,-O3) -g
# Scalar arithmetic is shared bit for bit with the GPU: no contraction, no reassociation.
ALLFLAGS  = -std=c11 -D_GNU_SOURCE -Wall -Wextra -Wpedantic -Wno-psabi $(if $(WERROR),-Werror) -march=$(ARCH) -ffp-contract=off \
            -fno-math-errno $(CFLAGS) -I. -Illmc
# A folder of libraries where nothing can be installed: DEPS_HOME/include, DEPS_HOME/lib (scripts/pack_deps.sh makes one).
DEPS_FLAGS := $(if $(DEPS_HOME),-I$(DEPS_HOME)/include)
# Its libraries find each other there too: an old-style rpath.
DEPS_LIBS  := $(if $(DEPS_HOME),-L$(DEPS_HOME)/lib \
              -Wl$(comma)--disable-new-dtags$(comma)-rpath$(comma)$(abspath $(DEPS_HOME))/lib)
ALLFLAGS  += $(DEPS_FLAGS)
KERNEL_LIBS = $(DEPS_LIBS) -lm
LIBS      = $(DEPS_LIBS) -lcjson -lpcre2-8 -lm

ifeq ($(PRECISION),fp32)
  ALLFLAGS += -DPRECISION_FP32
else ifneq ($(PRECISION),bf16)
  $(error PRECISION=$(PRECISION): use bf16 or fp32)
endif
ifdef SANITIZE
  ALLFLAGS += -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
endif

H := \043
# $(call probe,program text,flags), $(H) for #: y if it compiles and links. Not run for targets that build nothing.
probe = $(shell printf '%b' '$(1)' | $(CC) -x c - -o /dev/null $(2) >/dev/null 2>&1 && echo y)
BUILDS_NOTHING := $(if $(MAKECMDGOALS),$(if $(filter-out clean help,$(MAKECMDGOALS)),,y))
ifneq ($(filter clean,$(MAKECMDGOALS)),)
  .NOTPARALLEL:   # make clean all
endif
ifeq ($(BUILDS_NOTHING),)
  ifeq ($(call probe,int main(void){return 0;}\n,),)
    $(error no working C compiler ("$(CC)"): run scripts/install_deps.sh, or apt-get install gcc libc6-dev)
  endif
  HAVE_REQUIRED := $(call probe,$(H)include <cjson/cJSON.h>\n$(H)define PCRE2_CODE_UNIT_WIDTH 8\n$(H)include <pcre2.h>\
\nint main(void){return cJSON_Version()==0;}\n,$(DEPS_FLAGS) $(DEPS_LIBS) -lcjson -lpcre2-8 -lm)
  # Kernels and their tests need neither.
  KERNEL_GOALS := ptx-report gpu-% sim-kernels test-cudasim% test-labs-one
  ifneq ($(or $(filter y,$(HAVE_REQUIRED)),$(if $(MAKECMDGOALS),$(if $(filter-out $(KERNEL_GOALS),$(MAKECMDGOALS)),,y))),y)
    $(error cJSON and PCRE2 are required: run scripts/install_deps.sh, or apt-get install libcjson-dev libpcre2-dev, or \
set DEPS_HOME)
  endif
  ifndef NO_OMP
    HAVE_OMP := $(call probe,$(H)include <omp.h>\nint main(void){return omp_get_max_threads()==0;}\n,-fopenmp)
  endif
  ifndef NO_DNNL
    DNNL_FLAGS := $(if $(DNNL_HOME),-I$(DNNL_HOME)/include) $(DEPS_FLAGS)
    DNNL_LIBS  := $(if $(DNNL_HOME),-L$(DNNL_HOME)/lib -Wl$(comma)-rpath$(comma)$(abspath $(DNNL_HOME))/lib) \
                  $(DEPS_LIBS) -ldnnl
    HAVE_DNNL := $(call probe,$(H)include <dnnl.h>\nint main(void){return dnnl_version()==0;}\n,\
$(DNNL_FLAGS) $(DNNL_LIBS))
  endif
  ifndef NO_MPI
    # What mpicc adds to a compiler's arguments: Open MPI's tells it apart, MPICH's among all others.
    MPICC := $(firstword $(wildcard $(MPI_HOME:%=%/bin/mpicc)) $(if $(MPI_HOME),,$(shell command -v mpicc 2>/dev/null)))
    MPI_FLAGS := $(if $(MPICC),$(patsubst -I%,-isystem %,$(filter -I% -D%,\
                 $(shell $(MPICC) -showme:compile 2>/dev/null || $(MPICC) -compile_info 2>/dev/null))))
    MPI_LIBS  := $(if $(MPICC),$(filter -L% -l% -Wl%,\
                 $(shell $(MPICC) -showme:link 2>/dev/null || $(MPICC) -link_info 2>/dev/null)))
    HAVE_MPI  := $(if $(MPI_LIBS),$(call probe,$(H)include <mpi.h>\nint main(void){return MPI_Init(0$(comma)0);}\n,\
$(MPI_FLAGS) $(MPI_LIBS)))
    MPI_NAME  := $(if $(HAVE_MPI),$(shell { $(MPICC) -showme:version 2>/dev/null || $(MPICC) -v 2>&1; } | sed -n \
                 -e 's/.*\(Open MPI [0-9.]*\).*/\1/p' -e 's/.*\(MPICH\) version \([0-9.]*\).*/\1 \2/p' | head -n 1))
  endif
  HAVE_CMOCKA := $(call probe,$(H)include <stdarg.h>\n$(H)include <stddef.h>\n$(H)include <setjmp.h>\n\
$(H)include <stdint.h>\n$(H)include <cmocka.h>\nint main(void){return 0;}\n,-lcmocka)
  HAVE_CLANG := $(shell printf 'int LLVMFuzzerTestOneInput(const char *d, unsigned long n){return d==0&&n;}' | \
                  clang -x c - -o /dev/null -fsanitize=fuzzer$(comma)address$(comma)undefined >/dev/null 2>&1 && echo y)
endif
ifeq ($(HAVE_OMP),y)
  ALLFLAGS += -fopenmp
else
  ALLFLAGS += -Wno-unknown-pragmas
endif
ifeq ($(HAVE_MPI),y)
  ALLFLAGS += -DHAVE_MPI $(MPI_FLAGS)
  # Only programs that know of ranks depend on it.
  LIBS     += -Wl$(comma)--push-state$(comma)--as-needed $(MPI_LIBS) -Wl$(comma)--pop-state -lpthread
else
  LIBS     += -lpthread
endif
ifeq ($(HAVE_DNNL),y)
  ALLFLAGS += -DHAVE_DNNL $(DNNL_FLAGS)
  LIBS     += $(DNNL_LIBS)
  KERNEL_LIBS += $(DNNL_LIBS)
endif

LIB_SRC  := $(wildcard llmc/*.c llmc/cpu/*.c)
LIB_OBJ  := $(LIB_SRC:%.c=$(OUT)/%.o)
TESTS    := $(patsubst test/%.c,$(OUT)/test/%,$(wildcard test/test_*.c))
# Run by mpirun: test/test_comm.sh and its like.
MPI_TESTS := $(patsubst test/%.c,$(OUT)/test/%,$(wildcard test/mpi/*.c))
BENCH    := $(patsubst dev/bench/%.c,$(OUT)/bench/%,$(wildcard dev/bench/*.c))
FUZZ     := $(patsubst dev/fuzz/%.c,$(BUILD)/fuzz/%,$(wildcard dev/fuzz/fuzz_*.c))
FUZZ_SECONDS ?= 60

.PHONY: all programs test test-programs test-cudasim test-sanitize test-mpi test-kill bench bench-generate bench-eval fuzz \
        quickstart install clean \
        help FORCE
all: $(PROGRAMS)

# The CUDA wing of the programs (ptx-report), and its tests on a simulator (test-cudasim).
include llmc/cuda/cuda.mk
include dev/cudasim/cudasim.mk

ifeq ($(BUILDS_NOTHING)$(MAKE_RESTARTS)$(QLLM_QUIET),)
  say = $(info $(if $(filter y,$(2)),  [x],  [ ]) $(1))
  $(info qllm.c, $(PRECISION)$(if $(SANITIZE), with sanitizers), -march=$(ARCH))
  $(call say,OpenMP: $(if $(HAVE_OMP),all cores,one thread$(if $(NO_OMP), (NO_OMP))),$(HAVE_OMP))
  WITHOUT_DNNL := $(if $(NO_DNNL),NO_DNNL,apt-get install libdnnl-dev or set DNNL_HOME)
  $(call say,oneDNN: $(if $(HAVE_DNNL),fast matmuls,plain blocked matmul$(comma) slower ($(WITHOUT_DNNL))),$(HAVE_DNNL))
  $(call say,MPI: $(if $(HAVE_MPI),mpirun -np N ($(or $(MPI_NAME),$(MPICC))),one rank ($(if $(NO_MPI),NO_MPI,apt-get \
install libopenmpi-dev openmpi-bin or set MPI_HOME))),$(HAVE_MPI))
  $(call say,CUDA: $(if $(HAVE_CUDA),$(NVCC)$(comma) compute capability $(CUDA_ARCHS),the CPU only \
$(if $(NO_CUDA),(NO_CUDA),$(if $(SANITIZE),(SANITIZE),(set CUDA_HOME)))),$(HAVE_CUDA))
  $(call say,cmocka: $(if $(HAVE_CMOCKA),make test,no make test (apt-get install libcmocka-dev)),$(HAVE_CMOCKA))
  $(call say,clang with libFuzzer: $(if $(HAVE_CLANG),make fuzz,no make fuzz (apt-get install clang)),$(HAVE_CLANG))
endif

# Objects depend on the flags they were built with: another ARCH, NO_DNNL=1 or CFLAGS builds anew.
FLAGS_FILE := $(OUT)/flags.txt
ifeq ($(BUILDS_NOTHING),)
  FLAGS_TEXT := $(CC) $(ALLFLAGS) $(LIBS)
  ifneq ($(FLAGS_TEXT),$(shell cat $(FLAGS_FILE) 2>/dev/null))
    $(shell mkdir -p $(OUT) && printf '%s\n' '$(FLAGS_TEXT)' > $(FLAGS_FILE))
  endif
endif

$(FLAGS_FILE):
	@mkdir -p $(@D) && printf '%s\n' '$(FLAGS_TEXT)' > $@
# What programs are linked with beside the library: with CUDA found or lost, they are linked anew.
LINK_FILE := $(OUT)/link.txt
LINK_TEXT := $(PROGRAM_OBJ) $(PROGRAM_LIBS)
ifeq ($(BUILDS_NOTHING),)
  ifneq ($(strip $(LINK_TEXT)),$(strip $(shell cat $(LINK_FILE) 2>/dev/null)))
    $(shell mkdir -p $(OUT) && printf '%s\n' '$(LINK_TEXT)' > $(LINK_FILE))
  endif
endif
$(LINK_FILE):
	@mkdir -p $(@D) && printf '%s\n' '$(LINK_TEXT)' > $@

# GCC aligns the frames in which it looks for use after return to 32 bytes, and its AVX-512 code wants 64.
$(OUT)/llmc/checksum.o: ALLFLAGS += $(if $(SANITIZE),--param asan-use-after-return=0)

$(OUT)/%.o: %.c $(FLAGS_FILE)
	@mkdir -p $(@D)
	@echo "  cc $<"
	$(Q)$(CC) $(ALLFLAGS) -MMD -MP -c $< -o $@

$(OUT)/libqllm.a: $(LIB_OBJ)
	@rm -f $@
	@ar rcs $@ $^

$(OUT)/bin/%: $(OUT)/%.o $(PROGRAM_OBJ) $(OUT)/libqllm.a $(LINK_FILE)
	@mkdir -p $(@D)
	@echo "  link $@"
	$(Q)$(CC) $(ALLFLAGS) $< $(PROGRAM_OBJ) $(OUT)/libqllm.a $(LIBS) $(PROGRAM_LIBS) -o $@

# In the repository root stands the program of the last make, whatever its PRECISION.
$(PROGRAMS): %: $(OUT)/bin/% FORCE
	@cmp -s $< $@ || { rm -f $@ && { ln $< $@ 2>/dev/null || cp $< $@; }; }
programs: $(PROGRAMS:%=$(OUT)/bin/%)

$(OUT)/test/mpi/%: $(OUT)/test/mpi/%.o $(OUT)/libqllm.a
	@mkdir -p $(@D)
	@echo "  link $@"
	$(Q)$(CC) $(ALLFLAGS) $< $(OUT)/libqllm.a $(LIBS) -o $@

$(OUT)/test/%: $(OUT)/test/%.o $(OUT)/libqllm.a
	@mkdir -p $(@D)
	@echo "  link $@"
	$(Q)$(CC) $(ALLFLAGS) $< $(OUT)/libqllm.a -lcmocka $(LIBS) -o $@

$(OUT)/bench/%: $(OUT)/dev/bench/%.o $(OUT)/libqllm.a
	@mkdir -p $(@D)
	@echo "  link $@"
	$(Q)$(CC) $(ALLFLAGS) $< $(OUT)/libqllm.a $(LIBS) -o $@

# ---------------------------------------------------------------------------------------------
# Tests: every test program in both precisions, every script under test/ with the programs of each, the simulator.
TEST_DIRS = $(BUILD)/bf16$(if $(SANITIZE),-asan) $(BUILD)/fp32$(if $(SANITIZE),-asan)
ifneq ($(HAVE_CMOCKA),y)
test test-sanitize:
	@echo "make test needs cmocka: run scripts/install_deps.sh, or apt-get install libcmocka-dev" >&2; exit 1
else
test-programs: $(TESTS) $(MPI_TESTS) programs $(if $(CUDASIM_TESTS),sim-programs)
test:
	@$(MAKE) --no-print-directory PRECISION=bf16 test-programs
	@$(MAKE) --no-print-directory PRECISION=fp32 test-programs
	@MAKE="$(MAKE)" BUILD="$(BUILD)" scripts/run_tests.sh $(TEST_DIRS) $(if $(CUDASIM_TESTS),cudasim)
test-sanitize:
	@$(MAKE) --no-print-directory SANITIZE=1 test
endif
# In full what make test has in brief: all numbers of ranks and levels; KILLS=200 SEED=1 runs killed and resumed.
test-mpi: programs $(MPI_TESTS)
	@FULL=1 QLLM_BIN=$(abspath $(OUT)/bin) QLLM_PRECISION=$(PRECISION) bash test/test_mpi.sh
test-kill: programs $(MPI_TESTS)
	@KILLS=$(or $(KILLS),200) SEED=$(or $(SEED),1) QLLM_BIN=$(abspath $(OUT)/bin) bash test/test_kill.sh

# Fuzzing: a libFuzzer program a parser, FUZZ_SECONDS each. The library alone is needed, without OpenMP and oneDNN.
FUZZ_FLAGS := -std=c11 -D_GNU_SOURCE -Wall -Wextra -O1 -g -ffp-contract=off -Wno-unknown-pragmas -I. -Illmc \
              $(DEPS_FLAGS) -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all
FUZZ_OBJ   := $(patsubst %.c,$(BUILD)/fuzz/%.o,$(wildcard llmc/*.c) llmc/cpu/quantize_rows.c)
$(BUILD)/fuzz/%.o: %.c
	@mkdir -p $(@D)
	@echo "  clang $<"
	$(Q)clang $(FUZZ_FLAGS) -MMD -MP -c $< -o $@
$(BUILD)/fuzz/libqllm.a: $(FUZZ_OBJ)
	@rm -f $@
	@ar rcs $@ $^
$(BUILD)/fuzz/fuzz_%: $(BUILD)/fuzz/dev/fuzz/fuzz_%.o $(BUILD)/fuzz/libqllm.a
	$(Q)clang $(FUZZ_FLAGS) -fsanitize=fuzzer $^ $(DEPS_LIBS) -lcjson -lpcre2-8 -lm -o $@
ifeq ($(HAVE_CLANG),y)
fuzz: $(FUZZ)
	@FUZZ_SECONDS=$(FUZZ_SECONDS) scripts/run_fuzz.sh $(BUILD)/fuzz $(FUZZ)
else
fuzz:
	@echo "make fuzz needs clang with libFuzzer (apt-get install clang): nothing was fuzzed"
	@echo "0 passed, 0 failed, 1 skipped"
endif

# Benchmarks print lines `result NAME VALUE UNIT`: programs dev/bench/bench_*.c, and scripts that drive the programs.
bench: $(PROGRAMS) $(BENCH)
	@for b in $(filter $(OUT)/bench/bench_%,$(BENCH)); do echo "# $$b"; $$b || exit 1; done
	@for b in $(sort $(wildcard dev/bench/bench_*.sh)); do \
	    echo "# $$b"; bash $$b $(OUT)/bin $(OUT)/bench/random_shard || exit 1; \
	done

# One of the scripts alone: decoding against the ceiling of memory, scoring against that of matmuls.
bench-generate bench-eval: bench-%: $(PROGRAMS) $(BENCH)
	@bash dev/bench/bench_$*.sh $(OUT)/bin $(OUT)/bench/random_shard

quickstart: $(PROGRAMS)
	@scripts/quickstart.sh

install: $(PROGRAMS)
	mkdir -p $(DESTDIR)$(PREFIX)/bin
	for p in $(PROGRAMS); do cp $$p $(DESTDIR)$(PREFIX)/bin/; done

clean:
	rm -rf $(BUILD) $(PROGRAMS)

help:
	@echo "make                 the programs: $(PROGRAMS)"
	@echo "make test            every test, in both precisions; ends with: N passed, N failed"
	@echo "make test-sanitize   the same under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make test-cudasim    the CUDA kernels on a simulator; needs no GPU (part of make test)"
	@echo "make test-mpi        1 to 8 ranks on this machine, every sharding level; prints the largest differences"
	@echo "make test-kill       KILLS=200 SEED=1: runs of several ranks killed at random moments, and resumed"
	@echo "make ptx-report      registers, shared memory and spills of each CUDA kernel; needs nvcc"
	@echo "make quickstart      trains, quantizes and scores a small Llama on text that the machine has"
	@echo "make bench           measures; lines: result NAME VALUE UNIT; keeps 7 GB of models in BUILD/*/bench-models"
	@echo "make bench-generate  decoding against what memory can be read with (SHAPES, SCHEMES, TURNS); also bench-eval"
	@echo "make fuzz            FUZZ_SECONDS=60 for each parser"
	@echo "make install         to PREFIX=/usr/local"
	@echo "make clean           removes BUILD=build and the programs"
	@sed -n 's/^#\(   [A-Z]\)/\1/p' Makefile
	@echo "   NO_DNNL=1 NO_OMP=1 NO_MPI=1 NO_CUDA=1   turn off what is optional"
	@echo "   DNNL_HOME= MPI_HOME= CUDA_HOME= DEPS_HOME=   say where it is"

-include $(shell find $(OUT) $(BUILD)/fuzz -name '*.d' 2>/dev/null)
.PRECIOUS: $(OUT)/%.o $(BUILD)/fuzz/%.o
.DELETE_ON_ERROR:

# qllm.c: make, make test, make bench, make fuzz, make test-sanitize. `make help` lists the targets.
#
# What is optional is found by compiling and linking a three-line program; what was found, and what it turns on, is printed.
# Override the search with DNNL_HOME, CUDA_HOME, or turn something off: NO_DNNL=1 NO_OMP=1 NO_CUDA=1.
#   PRECISION=bf16|fp32   type of activations and working weights (default bf16)
#   SANITIZE=1            AddressSanitizer and UndefinedBehaviorSanitizer
#   ARCH=native           -march= of the CPU code
#   BUILD=build           where everything is built

PRECISION ?= bf16
BUILD     ?= build
ARCH      ?= native
CC        ?= cc
OUT       := $(BUILD)/$(PRECISION)$(if $(SANITIZE),-asan)
PROGRAMS  := $(patsubst %.c,%,$(wildcard train_llama_qat.c train_llama_qt.c quantize.c generate.c eval.c))

CFLAGS   ?= -O3 -g
# Scalar arithmetic is shared bit for bit with the GPU: no contraction, no reassociation.
ALLFLAGS  = -std=c11 -D_GNU_SOURCE -Wall -Wextra -Wpedantic $(if $(WERROR),-Werror) -march=$(ARCH) -ffp-contract=off \
            -fno-math-errno $(CFLAGS) -I. -Illmc
LIBS      = -lcjson -lpcre2-8 -lm

ifeq ($(PRECISION),fp32)
  ALLFLAGS += -DPRECISION_FP32
else ifneq ($(PRECISION),bf16)
  $(error PRECISION=$(PRECISION): use bf16 or fp32)
endif
ifdef SANITIZE
  ALLFLAGS += -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
endif

# $(call probe,program text,flags): y if it compiles and links. Not run for targets that build nothing.
probe = $(shell printf '%b' '$(1)' | $(CC) -x c - -o /dev/null $(2) >/dev/null 2>&1 && echo y)
ifeq ($(filter clean help,$(MAKECMDGOALS)),)
  HAVE_REQUIRED := $(call probe,\043include <cjson/cJSON.h>\n\043define PCRE2_CODE_UNIT_WIDTH 8\n\043include <pcre2.h>\nint main(void){return cJSON_Version()==0;}\n,-lcjson -lpcre2-8)
  ifneq ($(HAVE_REQUIRED),y)
    $(error cJSON and PCRE2 are required: run scripts/install_deps.sh, or apt-get install libcjson-dev libpcre2-dev)
  endif
  ifndef NO_OMP
    HAVE_OMP := $(call probe,\043include <omp.h>\nint main(void){return omp_get_max_threads()==0;}\n,-fopenmp)
  endif
  ifndef NO_DNNL
    DNNL_FLAGS := $(if $(DNNL_HOME),-I$(DNNL_HOME)/include)
    DNNL_LIBS  := $(if $(DNNL_HOME),-L$(DNNL_HOME)/lib -Wl$(comma)-rpath$(comma)$(DNNL_HOME)/lib) -ldnnl
    HAVE_DNNL := $(call probe,\043include <dnnl.h>\nint main(void){return dnnl_version()==0;}\n,$(DNNL_FLAGS) $(DNNL_LIBS))
  endif
  HAVE_CMOCKA := $(call probe,\043include <stdarg.h>\n\043include <stddef.h>\n\043include <setjmp.h>\n\043include <stdint.h>\n\043include <cmocka.h>\nint main(void){return 0;}\n,-lcmocka)
  ifndef MAKE_RESTARTS
    say = $(info $(if $(filter y,$(2)),  [x],  [ ]) $(1))
    $(info qllm.c, $(PRECISION)$(if $(SANITIZE), with sanitizers), -march=$(ARCH))
    $(call say,OpenMP: $(if $(HAVE_OMP),all cores,one thread),$(HAVE_OMP))
    $(call say,oneDNN: $(if $(HAVE_DNNL),matmuls at the speed of the processor,plain blocked matmul (apt-get install libdnnl-dev)),$(HAVE_DNNL))
    $(call say,cmocka: $(if $(HAVE_CMOCKA),make test,no tests (apt-get install libcmocka-dev)),$(HAVE_CMOCKA))
  endif
endif
comma := ,
ifeq ($(HAVE_OMP),y)
  ALLFLAGS += -fopenmp
else
  ALLFLAGS += -Wno-unknown-pragmas
endif
ifeq ($(HAVE_DNNL),y)
  ALLFLAGS += -DHAVE_DNNL $(DNNL_FLAGS)
  LIBS     += $(DNNL_LIBS)
endif

LIB_SRC  := $(wildcard llmc/*.c llmc/cpu/*.c)
LIB_OBJ  := $(LIB_SRC:%.c=$(OUT)/%.o)
TEST_SRC := $(wildcard test/test_*.c)
TESTS    := $(TEST_SRC:test/%.c=$(OUT)/test/%)
BENCH    := $(patsubst dev/bench/%.c,$(OUT)/bench/%,$(wildcard dev/bench/*.c))

.PHONY: all clean help
all: $(PROGRAMS)

$(OUT)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALLFLAGS) -MMD -MP -c $< -o $@

$(OUT)/libqllm.a: $(LIB_OBJ)
	@rm -f $@
	@ar rcs $@ $^

$(OUT)/bin/%: $(OUT)/%.o $(OUT)/libqllm.a
	@mkdir -p $(@D)
	$(CC) $(ALLFLAGS) $< $(OUT)/libqllm.a $(LIBS) -o $@

$(PROGRAMS): %: $(OUT)/bin/%
	@ln -f $< $@ 2>/dev/null || cp -f $< $@

$(OUT)/test/%: $(OUT)/test/%.o $(OUT)/libqllm.a
	@mkdir -p $(@D)
	$(CC) $(ALLFLAGS) $< $(OUT)/libqllm.a -lcmocka $(LIBS) -o $@

$(OUT)/bench/%: $(OUT)/dev/bench/%.o $(OUT)/libqllm.a
	@mkdir -p $(@D)
	$(CC) $(ALLFLAGS) $< $(OUT)/libqllm.a $(LIBS) -o $@

clean:
	rm -rf $(BUILD) $(PROGRAMS)

-include $(shell find $(OUT) -name '*.d' 2>/dev/null)
.PRECIOUS: $(OUT)/%.o

# The CUDA wing without a GPU. Included by the Makefile.
#   make test-cudasim    the kernels on the simulator against the CPU wing, in both precisions (also with SANITIZE=1)
#   make cuda-compile    nvcc compiles every kernel for sm_80, sm_90 and PTX: registers and spills of each
# CUDA_HOME names the toolkit where it is not found.

# Each fiber that ends would free a heap of its own for use-after-return, were kernels compiled for it.
SIM_ASAN  := $(if $(SANITIZE),--param asan-use-after-return=0)
SIM_FLAGS := -std=c++17 -D_GNU_SOURCE -Wall -Wextra -Wpedantic -Wno-unknown-pragmas $(if $(WERROR),-Werror) \
             -march=$(ARCH) \
             -ffp-contract=off -fno-math-errno -fstack-clash-protection -O2 -g -I. -Illmc -Idev/cudasim -Itest $(SIM_ASAN) \
             $(filter -DPRECISION_FP32 -fsanitize=% -fno-sanitize-recover=% -fno-omit-frame-pointer,$(ALLFLAGS))
CUDA_SRC  := $(wildcard llmc/cuda/*.cu)
SIM_TESTS := test/test_cudasim.cpp $(wildcard test/cuda/*.cpp)
SIM_OBJ   := $(CUDA_SRC:%.cu=$(OUT)/cudasim/%.o) $(OUT)/cudasim/dev/cudasim/cudasim.o \
             $(SIM_TESTS:%.cpp=$(OUT)/cudasim/%.o)

$(OUT)/cudasim/%.o: %.cu $(OUT)/flags.txt dev/cudasim/cudasim.mk
	@mkdir -p $(@D)
	@echo "  c++ $<"
	$(Q)$(CXX) -x c++ $(SIM_FLAGS) -MMD -MP -c $< -o $@
$(OUT)/cudasim/%.o: %.cpp $(OUT)/flags.txt dev/cudasim/cudasim.mk
	@mkdir -p $(@D)
	@echo "  c++ $<"
	$(Q)$(CXX) $(SIM_FLAGS) -MMD -MP -c $< -o $@
$(OUT)/test/test_cudasim: $(SIM_OBJ) $(OUT)/libqllm.a
	@mkdir -p $(@D)
	@echo "  link $@"
	$(Q)$(CXX) $(filter -fopenmp,$(ALLFLAGS)) $(SIM_FLAGS) $^ $(LIBS) -o $@

.PHONY: test-cudasim test-cudasim-one cuda-compile
CUDASIM_TESTS := $(shell command -v $(CXX))
ifeq ($(CUDASIM_TESTS),)
test-cudasim:
	@echo "skip cudasim: no C++ compiler (apt-get install g++)"
else
test-cudasim:
	@$(MAKE) --no-print-directory PRECISION=bf16 test-cudasim-one
	@$(MAKE) --no-print-directory PRECISION=fp32 test-cudasim-one
test-cudasim-one: $(OUT)/test/test_cudasim
	@$<
endif

# -fmad=false: see llmc/cuda/cuda.cuh.
NVCC       ?= $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc) \
              $(wildcard /usr/local/cuda/bin/nvcc))
NVCC_FLAGS := -std=c++17 -O3 -lineinfo -fmad=false -DQLLM_FMAD_FALSE -I. -Illmc $(filter -DPRECISION_FP32,$(ALLFLAGS)) \
              -Xcompiler -Wall,-Wextra,-ffp-contract=off
CUDA_ARCHS := -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
              -gencode arch=compute_80,code=compute_80

cuda-compile:
ifdef NO_CUDA
	@echo "cuda-compile: skipped (NO_CUDA)"
else ifeq ($(NVCC),)
	@echo "cuda-compile: skipped, no nvcc found (set CUDA_HOME, or put nvcc in PATH)"
else
	@mkdir -p $(OUT)/cuda
	@set -e; for f in $(CUDA_SRC); do \
	    echo "$$f"; \
	    $(NVCC) $(NVCC_FLAGS) $(CUDA_ARCHS) -Xptxas -v,-warn-spills -c $$f -o $(OUT)/cuda/$$(basename $$f .cu).o \
	        2> $(OUT)/cuda/log || { cat $(OUT)/cuda/log; exit 1; }; \
	    dev/cudasim/ptxas.sh $(OUT)/cuda/log; \
	done
endif

# For dev/gpu/check.sh: what the library of the CPU wing is linked with.
.PHONY: cuda-link-libs
cuda-link-libs:
	@echo $(LIBS)

# The CUDA wing in the programs. Included by the Makefile.
#   make                 links it in where nvcc is found; the programs then run on a GPU or, where there is none, on the CPU
#   make ptx-report      registers, shared memory and spills of each kernel; fails if one spills
#   CUDA_HOME=           the toolkit, where nvcc is not in PATH: also the folder nvidia/cu13 of the Python packages
#                        nvidia-cuda-nvcc, nvidia-cuda-runtime, nvidia-cuda-cccl and nvidia-cublas
#   CUDA_ARCHS="80 90"   compute capabilities to build for; PTX of the first serves those not listed
#   CUBLAS_HOME=         where cublasLt.h and libcublasLt lie, if not in CUDA_HOME
#   NO_CUDA=1            leave it out
# Toolkits from 11.8 on. Another compiler for the host's side: NVCC_PREPEND_FLAGS="-ccbin g++-12".

NVCC       ?= $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc 2>/dev/null) \
              $(wildcard /usr/local/cuda/bin/nvcc))
# Where nvcc lies, not a link to it.
CUDA_DIR   := $(if $(CUDA_HOME),$(abspath $(CUDA_HOME)),$(if $(NVCC),$(patsubst %/bin/nvcc,%,\
              $(realpath $(shell command -v $(lastword $(NVCC)) 2>/dev/null)))))
CUDA_ARCHS ?= 80 90
CUDA_SRC   := $(wildcard llmc/cuda/*.cu)
CUDA_OBJ   := $(CUDA_SRC:llmc/cuda/%.cu=$(OUT)/cuda/%.o)
# -fmad=false: see llmc/cuda/cuda.cuh. The simulator's headers of a wing's libraries are not seen.
NVCC_FLAGS := -std=c++17 -O3 -lineinfo -fmad=false -DQLLM_FMAD_FALSE -I. -Illmc \
              $(CUBLAS_HOME:%=-isystem $(abspath $(CUBLAS_HOME))/include) \
              $(filter -DPRECISION_FP32,$(ALLFLAGS)) -Xcompiler -Wall,-Wextra,-ffp-contract=off,-fno-exceptions \
              $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
              -gencode arch=compute_$(firstword $(CUDA_ARCHS)),code=compute_$(firstword $(CUDA_ARCHS))
# In the toolkit, or where the linker looks anyway: a distribution's package.
CUDA_LIBDIR := $(patsubst %/libcudart_static.a,%,$(firstword $(wildcard $(CUDA_DIR)/lib64/libcudart_static.a \
               $(CUDA_DIR)/lib/libcudart_static.a $(CUDA_DIR)/targets/*/lib/libcudart_static.a \
               $(shell $(CC) -print-file-name=libcudart_static.a 2>/dev/null))))
# Programs look for cuBLASLt when they run (llmc/cuda/cublaslt.cu), and here first.
CUBLAS_LIBDIR := $(patsubst %/,%,$(dir $(firstword $(wildcard $(foreach h,$(abspath $(CUBLAS_HOME)) $(CUDA_DIR),\
                 $(h)/lib64/libcublasLt.so* $(h)/lib/libcublasLt.so* $(h)/targets/*/lib/libcublasLt.so*)))))
CUDA_LIBS  := $(CUDA_LIBDIR:%=-L%) -lcudart_static -lstdc++ -ldl -lrt -lpthread \
              $(CUBLAS_LIBDIR:%=-Wl$(comma)-rpath$(comma)%)

# Sanitizers watch the host's code; the wing has the simulator for that.
ifeq ($(BUILDS_NOTHING)$(NO_CUDA)$(SANITIZE),)
  ifneq ($(and $(NVCC),$(CUDA_LIBDIR)),)
    HAVE_CUDA := $(call probe,int cudaGetDeviceCount(int *);\nint main(void){int n;return cudaGetDeviceCount(&n)<0;}\n,\
$(CUDA_LIBS))
  endif
endif
ifeq ($(HAVE_CUDA),y)
  PROGRAM_OBJ  := $(CUDA_OBJ)
  PROGRAM_LIBS := $(CUDA_LIBS)
endif

CUDA_FLAGS_FILE := $(OUT)/cuda/flags.txt
$(CUDA_FLAGS_FILE):
	@mkdir -p $(@D) && printf '%s\n' '$(NVCC) $(NVCC_FLAGS)' > $@
ifeq ($(HAVE_CUDA),y)
  ifneq ($(NVCC) $(NVCC_FLAGS),$(shell cat $(CUDA_FLAGS_FILE) 2>/dev/null))
    $(shell mkdir -p $(OUT)/cuda && printf '%s\n' '$(NVCC) $(NVCC_FLAGS)' > $(CUDA_FLAGS_FILE))
  endif
endif

# What ptxas says of each kernel is kept beside the object, for ptx-report.
$(OUT)/cuda/%.o: llmc/cuda/%.cu $(CUDA_FLAGS_FILE)
	@mkdir -p $(@D)
	@echo "  nvcc $<"
	$(Q)$(NVCC) $(NVCC_FLAGS) -MMD -MF $(@:.o=.d) -MT $@ -Xptxas -v,-warn-spills -c $< -o $@ 2> $(@:.o=.ptxas) \
	    || { grep -v '^ptxas info' $(@:.o=.ptxas); \
	         echo "nvcc failed; make NO_CUDA=1 builds for the CPU only" >&2; exit 1; }
	@grep -v -e '^ptxas info' -e 'bytes stack frame' $(@:.o=.ptxas) || true

# What dev/gpu/check.sh runs: the wing's tests and its benchmark, compiled for the GPU. They need no JSON library.
KERNEL_OBJ := $(patsubst %.c,$(OUT)/%.o,llmc/common.c llmc/quant.c llmc/device.c llmc/sampler.c \
              $(wildcard llmc/cpu/*.c))
GPU_TEST_OBJ := $(patsubst %.cpp,$(OUT)/gpu/%.o,test/test_cudasim.cpp $(wildcard test/cuda/*.cpp))
$(OUT)/gpu/%.o: %.cpp $(CUDA_FLAGS_FILE)
	@mkdir -p $(@D)
	@echo "  nvcc $<"
	$(Q)$(NVCC) $(NVCC_FLAGS) -Itest -MMD -MF $(@:.o=.d) -MT $@ -x cu -c $< -o $@
$(OUT)/gpu/test_cuda: $(GPU_TEST_OBJ) $(CUDA_OBJ) $(KERNEL_OBJ)
	@echo "  link $@"
	$(Q)$(CC) $(ALLFLAGS) $^ $(KERNEL_LIBS) $(CUDA_LIBS) -o $@
$(OUT)/gpu/bench_cuda: $(OUT)/gpu/dev/gpu/bench_cuda.o $(CUDA_OBJ) $(KERNEL_OBJ)
	@echo "  link $@"
	$(Q)$(CC) $(ALLFLAGS) $^ $(KERNEL_LIBS) $(CUDA_LIBS) -o $@

.PHONY: ptx-report gpu-kernels
ifeq ($(HAVE_CUDA),y)
gpu-kernels: $(OUT)/gpu/test_cuda $(OUT)/gpu/bench_cuda
ptx-report: $(CUDA_OBJ)
	@status=0; for f in $(CUDA_OBJ:.o=.ptxas); do \
	    echo "$$f"; dev/cudasim/ptxas.sh $$f || { echo "$$f: a kernel spills registers to memory"; status=1; }; \
	done; \
	[ $$status = 0 ] && echo "no kernel spills registers"; exit $$status
else
NO_CUDA_WHY := $(if $(NO_CUDA),NO_CUDA is set,$(if $(SANITIZE),no CUDA with SANITIZE,no nvcc with its libraries was \
found: set CUDA_HOME))
ptx-report:
	@echo "ptx-report: skipped, $(NO_CUDA_WHY)"
gpu-kernels:
	@echo "gpu-kernels: $(NO_CUDA_WHY)" >&2; exit 1
endif

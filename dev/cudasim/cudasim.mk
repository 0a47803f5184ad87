# The CUDA wing without a GPU. Included by the Makefile.
#   make test-cudasim    the kernels on the simulator against the CPU wing, in both precisions (also with SANITIZE=1)
#   make test-cudasim RACE=1   the same, with every access of a kernel watched for races (dev/cudasim/race.cpp)
#   make sim-kernels     its tests and benchmark, not run
#   make sim-programs    the programs with the simulator for a GPU: build/bf16/sim/train_llama_qat --device cuda ...

SIM := $(OUT)/cudasim$(if $(RACE),-race)
# -fno-ipa-icf: functions that g++ merges get each other's array bounds in its warnings.
# Each fiber that ends would free a heap of its own for use-after-return, were kernels compiled for it.
SIM_ASAN  := $(if $(SANITIZE),--param asan-use-after-return=0)
SIM_FLAGS := -std=c++17 -D_GNU_SOURCE -Wall -Wextra -Wpedantic -Wno-unknown-pragmas $(if $(WERROR),-Werror) \
             -march=$(ARCH) \
             -ffp-contract=off -fno-math-errno -fstack-clash-protection -fno-ipa-icf -O2 -g -I. -Illmc -Idev/cudasim -Idev/ncclsim \
             -Itest $(SIM_ASAN) $(if $(filter y,$(HAVE_MPI)),-DHAVE_MPI $(MPI_FLAGS)) \
             $(filter -DPRECISION_FP32 -fsanitize=% -fno-sanitize-recover=% -fno-omit-frame-pointer,$(ALLFLAGS))
SIM_TESTS := test/test_cudasim.cpp $(wildcard test/cuda/*.cpp)
SIM_OBJ   := $(CUDA_SRC:%.cu=$(SIM)/%.o) $(patsubst %.cpp,$(SIM)/%.o,$(wildcard dev/cudasim/*.cpp dev/ncclsim/*.cpp))
SIM_TEST_OBJ := $(SIM_TESTS:%.cpp=$(SIM)/%.o)

# The stand-in for NCCL goes over MPI.
SIM_LIBS := $(if $(filter y,$(HAVE_MPI)),$(MPI_LIBS)) $(if $(RACE),-ldl)
# -fsanitize=thread is for its calls alone: race.cpp answers them, so it is not linked with.
SIM_RACE  := $(if $(RACE),-DCUDASIM_RACE)
SIM_WATCH := $(if $(RACE),-fsanitize=thread)
$(SIM)/%.o: %.cu $(OUT)/flags.txt dev/cudasim/cudasim.mk
	@mkdir -p $(@D)
	@echo "  c++ $<"
	$(Q)$(CXX) -x c++ $(SIM_FLAGS) $(SIM_RACE) $(SIM_WATCH) -MMD -MP -c $< -o $@
$(SIM)/%.o: %.cpp $(OUT)/flags.txt dev/cudasim/cudasim.mk
	@mkdir -p $(@D)
	@echo "  c++ $<"
	$(Q)$(CXX) $(SIM_FLAGS) $(SIM_RACE) $(if $(filter dev/cudasim/% dev/ncclsim/%,$<),,$(SIM_WATCH)) -MMD -MP -c $< -o $@
SIM_TEST := $(if $(RACE),$(SIM)/test_cudasim,$(OUT)/test/test_cudasim)
$(SIM_TEST): $(SIM_TEST_OBJ) $(SIM_OBJ) $(KERNEL_OBJ)
	@mkdir -p $(@D)
	@echo "  link $@"
	$(Q)$(CXX) $(filter -fopenmp,$(ALLFLAGS)) $(SIM_FLAGS) $^ $(KERNEL_LIBS) $(SIM_LIBS) -o $@
$(OUT)/sim/%: $(OUT)/%.o $(SIM_OBJ) $(OUT)/libqllm.a
	@mkdir -p $(@D)
	@echo "  link $@"
	$(Q)$(CXX) $(filter -fopenmp,$(ALLFLAGS)) $(SIM_FLAGS) $^ $(LIBS) $(SIM_LIBS) -o $@
$(OUT)/sim/bench_cuda: $(SIM)/dev/gpu/bench_cuda.o $(SIM_OBJ) $(KERNEL_OBJ)
	@mkdir -p $(@D)
	@echo "  link $@"
	$(Q)$(CXX) $(filter -fopenmp,$(ALLFLAGS)) $(SIM_FLAGS) $^ $(KERNEL_LIBS) $(SIM_LIBS) -o $@
# What is communicated between simulated GPUs: run by test/test_nccl.sh.
NCCL_TESTS := $(if $(filter y,$(HAVE_MPI)),$(patsubst test/mpi/%.cpp,$(OUT)/sim/%,$(wildcard test/mpi/nccl_*.cpp)))
$(NCCL_TESTS): $(OUT)/sim/%: $(SIM)/test/mpi/%.o $(SIM_OBJ) $(OUT)/libqllm.a
	@mkdir -p $(@D)
	@echo "  link $@"
	$(Q)$(CXX) $(filter -fopenmp,$(ALLFLAGS)) $(SIM_FLAGS) $^ $(LIBS) $(SIM_LIBS) -o $@
.PHONY: sim-programs sim-kernels
sim-programs: $(PROGRAMS:%=$(OUT)/sim/%) $(NCCL_TESTS)
sim-kernels: $(SIM_TEST) $(OUT)/sim/bench_cuda

.PRECIOUS: $(SIM)/%.o
# The kernel laboratories: checked here, timed on a GPU.
LAB  := $(OUT)/lab$(if $(RACE),-race)
LABS := $(patsubst dev/cuda/%.cu,$(LAB)/%,$(wildcard dev/cuda/*.cu))
$(LAB)/%: $(SIM)/dev/cuda/%.o $(SIM)/dev/cudasim/cudasim.o $(SIM)/dev/cudasim/stream.o \
           $(SIM)/dev/cudasim/race.o
	@mkdir -p $(@D)
	@echo "  link $@"
	$(Q)$(CXX) $(SIM_FLAGS) $^ -o $@

.PHONY: test-cudasim test-cudasim-one test-labs-one
CUDASIM_TESTS := $(shell command -v $(CXX) 2>/dev/null)
ifeq ($(CUDASIM_TESTS),)
test-cudasim:
	@echo "skip cudasim: no C++ compiler (apt-get install g++)"
else
test-cudasim:
	@$(MAKE) --no-print-directory PRECISION=bf16 test-cudasim-one test-labs-one
	@$(MAKE) --no-print-directory PRECISION=fp32 test-cudasim-one test-labs-one
test-cudasim-one: $(SIM_TEST)
	@$<
test-labs-one: $(LABS)
	@set -e; for lab in $(LABS); do \
	    $$lab > $$lab.log || { cat $$lab.log; echo "not ok $$lab"; exit 1; }; \
	    echo "ok $$lab"; \
	done
endif

// The C interface: checks what it is given, and hands it to the kernels of the best instruction set of this CPU.
#include "dispatch.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace longspan {

#define LONGSPAN_DECLARE(set) namespace set { extern const AttentionKernels attention; extern const RowKernels rows; }
LONGSPAN_DECLARE(baseline)
LONGSPAN_DECLARE(avx2)
LONGSPAN_DECLARE(avx512)
LONGSPAN_DECLARE(avx512_vnni)
LONGSPAN_DECLARE(avx512_bf16)
LONGSPAN_DECLARE(amx)
namespace avx2 { extern const LinearKernels linear; }
namespace avx512 { extern const LinearKernels linear; }
namespace avx512_vnni { extern const LinearKernels linear; }
namespace avx512_bf16 { extern const LinearKernels linear; }
namespace amx { extern const LinearKernels linear; }

namespace {

struct InstructionSet {
  const char* name;
  const AttentionKernels* attention;
  const RowKernels* rows;
  const LinearKernels* linear;  // null: it has none
  bool (*is_supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives the tile registers only to processes that ask for them.
bool has_amx() {
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  unsigned eax, ebx, ecx, edx;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned NEEDED = AMX_BF16 | AMX_TILE | AMX_INT8;
  return (edx & NEEDED) == NEEDED && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}
#endif

// From the best to the plainest.
const InstructionSet SETS[] = {
#if defined(LONGSPAN_HAS_AMX)
    {"amx", &amx::attention, &amx::rows, &amx::linear, has_amx},
#endif
#if defined(LONGSPAN_HAS_AVX512_BF16)
    {"avx512_bf16", &avx512_bf16::attention, &avx512_bf16::rows, &avx512_bf16::linear, has_avx512_bf16},
#endif
#if defined(LONGSPAN_HAS_AVX512_VNNI)
    {"avx512_vnni", &avx512_vnni::attention, &avx512_vnni::rows, &avx512_vnni::linear, has_avx512_vnni},
#endif
#if defined(LONGSPAN_HAS_AVX512)
    {"avx512", &avx512::attention, &avx512::rows, &avx512::linear, has_avx512},
#endif
#if defined(LONGSPAN_HAS_AVX2)
    {"avx2", &avx2::attention, &avx2::rows, &avx2::linear, has_avx2},
#endif
    {"baseline", &baseline::attention, &baseline::rows, nullptr, always},
};

const InstructionSet* best_set() {
  for (const InstructionSet& set : SETS) {
    if (set.is_supported()) return &set;
  }
  return nullptr;  // not reached: the baseline always is
}

// Null until it is asked for. Two threads that ask at once find the same.
const InstructionSet* chosen = nullptr;

const InstructionSet& current() {
  const InstructionSet* set = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
  if (!set) {
    set = best_set();
    __atomic_store_n(&chosen, set, __ATOMIC_RELEASE);
  }
  return *set;
}

constexpr int64_t SMALL_PAGE = 4096, HUGE_PAGE = 1 << 21;

struct Workspace {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Workspace() { free(memory); }
};

bool is_dtype(int32_t dtype) { return dtype == LONGSPAN_F32 || dtype == LONGSPAN_BF16; }
bool is_same_or_float(int32_t dtype, int32_t from) { return dtype == from || dtype == LONGSPAN_F32; }

constexpr int64_t MOST_TOKENS = (int64_t{1} << 30) - 1;  // positions are kept in 32 bits
constexpr int64_t MOST_WIDTH = 1 << 16;

bool is_token_count(int64_t count) { return count >= 0 && count <= MOST_TOKENS; }

bool is_call(const longspan_attention* call, const longspan_lane* lanes, int64_t num_lanes) {
  return call && num_lanes >= 0 && num_lanes <= MOST_TOKENS && (lanes || num_lanes == 0) && is_dtype(call->dtype) &&
         call->width >= 1 && call->width <= MOST_WIDTH && isfinite(call->scale) &&
         (call->accumulate == 0 || call->accumulate == 1);
}

// Extra keys ascend, and the band does not hold them too.
bool are_extras(const longspan_attention& call, const longspan_lane& lane) {
  if (lane.extras < 0 || lane.extras > lane.keys) return false;
  if (lane.extras == 0) return true;
  if (!lane.extra || !lane.key_mask) return false;
  int64_t previous = -1;
  for (int64_t i = 0; i < lane.extras; ++i) {
    const int64_t key = lane.extra[i];
    if (key <= previous || key >= lane.keys || lane.key_mask[key * call.key_mask_stride]) return false;
    previous = key;
  }
  return true;
}

bool are_positions(const longspan_lane& lane) {
  if (!lane.positions) return true;
  if (lane.dilation != 1) return false;
  for (int64_t i = 0; i < lane.queries; ++i) {
    if (lane.positions[i] < 0 || lane.positions[i] >= lane.keys) return false;
  }
  return true;
}

bool is_bias(const longspan_bias& bias) {
  return !bias.values || (bias.count >= LONGSPAN_BIAS_MARGIN && bias.count <= 2 * MOST_TOKENS &&
                          bias.first >= -MOST_TOKENS && bias.first <= MOST_TOKENS);
}

bool is_lane(const longspan_attention& call, const longspan_lane& lane) {
  const bool sizes = is_token_count(lane.queries) && is_token_count(lane.keys) && lane.before >= 0 && lane.after >= 0 &&
                     lane.dilation >= 1;
  const bool rows = (lane.q || lane.queries == 0) && ((lane.k && lane.v) || lane.keys == 0);
  return sizes && rows && are_positions(lane) && are_extras(call, lane) && is_bias(lane.bias) && is_bias(lane.extra_bias);
}

bool is_forward_lane(const longspan_attention& call, const longspan_lane& lane) {
  return is_lane(call, lane) && (lane.queries == 0 || (lane.out && (lane.lse || !call.accumulate)));
}

bool is_backward_lane(const longspan_attention& call, const longspan_lane& lane) {
  const bool queries = lane.queries == 0 || (lane.out && lane.grad_out && lane.lse && lane.delta && lane.grad_q);
  return is_lane(call, lane) && queries && (lane.keys == 0 || (lane.grad_k && lane.grad_v));
}

template <class IsLane>
bool are_lanes(const longspan_attention& call, const longspan_lane* lanes, int64_t num_lanes, IsLane is_good) {
  for (int64_t i = 0; i < num_lanes; ++i) {
    if (!is_good(call, lanes[i])) return false;
  }
  return true;
}

}  // namespace

void* thread_workspace(int64_t bytes, Purpose purpose) {
  static thread_local Workspace workspaces[2];
  Workspace& workspace = workspaces[purpose];
  if (bytes > workspace.bytes) {
    const int64_t page = bytes < HUGE_PAGE ? SMALL_PAGE : HUGE_PAGE;
    free(workspace.memory);
    workspace.bytes = (bytes + page - 1) / page * page;
    workspace.memory = aligned_alloc(page, workspace.bytes);
    if (!workspace.memory) workspace.bytes = 0;
    longspan_prefer_huge_pages(workspace.memory, workspace.bytes);
  }
  return workspace.memory;
}

const RowKernels& row_kernels() { return *current().rows; }
const LinearKernels* linear_kernels() { return current().linear; }

}  // namespace longspan

using namespace longspan;

extern "C" {

int longspan_attention_forward(const longspan_attention* call, const longspan_lane* lanes, int64_t num_lanes) {
  if (!is_call(call, lanes, num_lanes) || !is_same_or_float(call->out_dtype, call->dtype) ||
      !are_lanes(*call, lanes, num_lanes, is_forward_lane)) {
    return LONGSPAN_BAD_ARGUMENT;
  }
  return current().attention->forward(*call, lanes, num_lanes);
}

int longspan_attention_backward(const longspan_attention* call, const longspan_lane* lanes, int64_t num_lanes) {
  if (!is_call(call, lanes, num_lanes) || !is_same_or_float(call->out_dtype, call->dtype) ||
      !is_same_or_float(call->grad_dtype, call->dtype) || !are_lanes(*call, lanes, num_lanes, is_backward_lane)) {
    return LONGSPAN_BAD_ARGUMENT;
  }
  return current().attention->backward(*call, lanes, num_lanes);
}

const char* longspan_instruction_set(void) { return current().name; }

int longspan_use_instruction_set(const char* name) {
  for (const InstructionSet& set : SETS) {
    if (name && strcmp(name, set.name) == 0 && set.is_supported()) {
      __atomic_store_n(&chosen, &set, __ATOMIC_RELEASE);
      return LONGSPAN_OK;
    }
  }
  return LONGSPAN_BAD_ARGUMENT;
}

int longspan_num_threads(void) { return omp_get_max_threads(); }

// Where rows lie far apart, the processor otherwise stops at each to look up its page.
void longspan_prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + SMALL_PAGE - 1) / SMALL_PAGE * SMALL_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / SMALL_PAGE * SMALL_PAGE;
  if (memory && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

int64_t longspan_interface_version(void) { return 5; }
}

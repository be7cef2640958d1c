// The fibers of a block (emulated.h), for x86-64.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "emulated.h"

#if !defined(__x86_64__)
#error "fibers are switched by x86-64 code"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the registers that a call preserves and the stack pointer, and goes on where `to` did.
extern "C" void ni_switch_fiber(void** from, void* to);
asm(R"(
.text
ni_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace ni::emulated {
namespace {

constexpr int kMaxThreads = 1024, kBarriers = 16;
constexpr size_t kStackBytes = 128 << 10, kSharedBytes = 256 << 10;
constexpr int64_t kPatience = 1'000'000'000;  // turns in which no barrier was passed

struct Barrier {
  int arrived = 0;
  unsigned round = 0;
};
struct Warp {
  int running = 0, next_lane = 0;
  Barrier barrier;
  uint64_t values[2][32];  // of this exchange and, still being read, of the one before
};
struct Fiber {
  void* stack = nullptr;
  bool done = false;
};

alignas(1024) unsigned char shared[kSharedBytes];
Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / 32];
Barrier block, named[kBarriers];
const std::function<void()>* body = nullptr;
void* launcher = nullptr;
int current = 0, count = 0, running = 0;
int64_t turns = 0;

void enter(int thread) {
  current = thread;
  const auto t = static_cast<unsigned>(thread);
  threadIdx = {t % blockDim.x, t / blockDim.x, 0};
}

void switch_to(int thread) {
  const int from = current;
  if (thread == from) return;
  enter(thread);
  ni_switch_fiber(&fibers[from].stack, fibers[thread].stack);
}

// The next lane of the warp that still runs, from `lane` on.
int running_lane(int warp, int lane) {
  const int lanes = std::min(32, count - 32 * warp);
  for (int i = 0; i < lanes; ++i)
    if (const int thread = 32 * warp + (lane + i) % lanes; !fibers[thread].done) return thread;
  return -1;
}

// Numbers that decide who goes on, the same in every run: $NI_EMULATED_SEED gives others.
uint32_t chance() {
  static uint32_t state = [] {
    const char* seed = std::getenv("NI_EMULATED_SEED");
    return seed == nullptr ? 1u : static_cast<uint32_t>(std::atoi(seed));
  }();
  state = state * 1664525u + 1013904223u;
  return state >> 16;
}

// To another warp, any, so that one may be far ahead or behind; of it, to the lane after the one
// that ran last.
void switch_warp() {
  const int num_warps = (count + 31) / 32;
  warps[current / 32].next_lane = current % 32 + 1;
  const int first = static_cast<int>(chance()) % num_warps;
  for (int i = 0; i < num_warps; ++i) {
    const int warp = (first + i) % num_warps;
    if (warps[warp].running > 0) return switch_to(running_lane(warp, warps[warp].next_lane));
  }
  ni_switch_fiber(&fibers[current].stack, launcher);  // none runs any more
}

void take_turn() {
  if (++turns <= kPatience) return;
  std::fprintf(stderr, "block (%u, %u) hangs, seen from thread %d\n", blockIdx.x, blockIdx.y,
               current);
  std::abort();
}

void pass_if_all(Barrier& b, int threads) {
  if (threads == 0 || b.arrived < threads) return;
  b.arrived = 0;
  ++b.round;
  turns = 0;
}

void wait_for(Barrier& b, int threads) {
  const unsigned round = b.round;
  ++b.arrived;
  pass_if_all(b, threads);
  while (b.round == round) yield();
}

// Threads that have ended are waited for no longer.
void run_thread() {
  (*body)();
  fibers[current].done = true;
  pass_if_all(block, --running);
  Warp& warp = warps[current / 32];
  pass_if_all(warp.barrier, --warp.running);
  switch_warp();
}

}  // namespace

unsigned char* dynamic_shared() {
  return shared;
}

void yield() {
  take_turn();
  switch_warp();
}

void synchronise_block() {
  wait_for(block, running);
}
void synchronise(int barrier, int threads) {
  wait_for(named[barrier], threads);
}
void arrive(int barrier, int threads) {
  ++named[barrier].arrived;
  pass_if_all(named[barrier], threads);
}

const uint64_t* exchange(uint64_t value) {
  if (chance() % 64 == 0) switch_warp();  // others need not wait until this warp does
  Warp& warp = warps[current / 32];
  uint64_t* values = warp.values[warp.barrier.round % 2];
  values[lane()] = value;
  const unsigned round = warp.barrier.round;
  ++warp.barrier.arrived;
  pass_if_all(warp.barrier, warp.running);
  while (warp.barrier.round == round) {  // others of the warp are what is waited for
    take_turn();
    switch_to(running_lane(current / 32, lane() + 1));
  }
  return values;
}

void run(dim3 grid, dim3 threads, const std::function<void()>& thread) {
  static auto* stacks =
      static_cast<unsigned char*>(mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  gridDim = grid;
  blockDim = threads;
  body = &thread;
  count = static_cast<int>(blockDim.x * blockDim.y);
  const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
    std::fill_n(shared, kSharedBytes, static_cast<unsigned char>(0xee));
    std::fill_n(named, kBarriers, Barrier());
    block = {};
    running = count;
    turns = 0;
    for (int i = 0; i < (count + 31) / 32; ++i)
      warps[i] = {std::min(32, count - 32 * i), 0, {}, {}};
    for (int i = 0; i < count; ++i) {
      // As ni_switch_fiber leaves a stack: six registers, then where to go on. Calls find it 8
      // bytes off a multiple of 16.
      auto** top = reinterpret_cast<void**>(stacks + kStackBytes * static_cast<size_t>(i + 1) - 64);
      *--top = nullptr;
      *--top = reinterpret_cast<void*>(&run_thread);
      fibers[i] = {top - 6, false};
    }
    enter(0);
    ni_switch_fiber(&launcher, fibers[0].stack);
  }
}

}  // namespace ni::emulated

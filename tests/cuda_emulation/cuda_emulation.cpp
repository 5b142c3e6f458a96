#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

emulation::Dim threadIdx, blockIdx, blockDim, gridDim;

#if defined(__x86_64__)
// Swaps the registers that a call preserves; swapcontext would also make a system call.
extern "C" void emulation_swap(void** from, void* to);
asm(R"(
.text
.globl emulation_swap
.hidden emulation_swap
.type emulation_swap, @function
emulation_swap:
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
#endif

namespace emulation {

uint64_t launches = 0, block_number = 0, exponentials = 0;

namespace {

constexpr size_t kStack = 64 << 10;

struct Gate {  // a rendezvous: opens, for all who wait, when the last one has come
  unsigned generation = 0, arrived = 0;
  int line = 0;
};

struct Warp {
  Gate gate;
  int epoch = 0, sizes[2];
  alignas(16) char values[2][32][16];
};

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  char* stack;
  bool done;
  const Gate* gate;  // waited for, or null
  unsigned generation;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Gate block_gate;
int block_epoch;
Fiber scheduler;
const std::function<void()>* body;
std::string error;

void swap(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
  emulation_swap(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

void entry() {
  try {
    (*body)();
  } catch (const std::exception& e) {
    if (error.empty()) error = e.what();
  }
  Fiber& self = fibers[threadIdx.x];
  self.done = true;
  swap(self, scheduler);
}

void prepare(Fiber& fiber) {
  fiber.done = false;
  fiber.gate = nullptr;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
  *--top = nullptr;  // where a return address would lie: keeps the stack aligned
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack, 0, kStack};
  makecontext(&fiber.context, entry, 0);
#endif
}

void wait(Gate& gate, unsigned count) {
  if (++gate.arrived == count) {
    gate.arrived = 0;
    gate.generation++;
    return;
  }
  Fiber& self = fibers[threadIdx.x];
  self.gate = &gate;
  self.generation = gate.generation;
  swap(self, scheduler);
  self.gate = nullptr;
}

// Numbers below n, each once, in an order of its own every time.
class AnyOrder {
 public:
  explicit AnyOrder(unsigned n) : n_(n) {
    static uint32_t state = 1;
    state = state * 1664525 + 1013904223;
    at_ = state % n;
    do {
      state = state * 1664525 + 1013904223;
      step_ = state % n;
    } while (std::gcd(step_, n) != 1);
  }
  unsigned next() { return at_ = unsigned((uint64_t(at_) + step_) % n_); }

 private:
  unsigned n_, at_, step_;
};

unsigned warp_size(unsigned warp) { return std::min(32u, blockDim.x - 32 * warp); }

void run_block() {
  block_number++;
  block_gate = {};
  block_epoch = 0;
  warps.assign((blockDim.x + 31) / 32, {});
  for (unsigned i = 0; i < blockDim.x; i++) prepare(fibers[i]);
  unsigned left = blockDim.x;
  while (left) {
    bool progress = false;
    AnyOrder order(blockDim.x);
    for (unsigned k = 0; k < blockDim.x; k++) {
      const unsigned i = order.next();
      Fiber& fiber = fibers[i];
      if (fiber.done || (fiber.gate && fiber.gate->generation == fiber.generation)) continue;
      threadIdx.x = i;
      swap(scheduler, fiber);
      if (!error.empty()) return;
      progress = true;
      left -= fiber.done;
    }
    if (!progress) {
      error = "some threads wait where others never come (line " + std::to_string(block_gate.line) +
              ")";
      return;
    }
  }
}

}  // namespace

void launch(unsigned grid, unsigned block, const std::function<void()>& kernel) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (block == 0 || block > 1024 || grid == 0) throw std::runtime_error("emulation: bad launch");
  while (fibers.size() < block) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("emulation: no memory for stacks");
    fibers.emplace_back();
    fibers.back().stack = static_cast<char*>(stack);
  }
  body = &kernel;
  launches++;
  error.clear();
  gridDim = {grid};
  blockDim = {block};
  AnyOrder order(grid);
  for (unsigned k = 0; k < grid; k++) {
    blockIdx.x = order.next();
    run_block();
    if (!error.empty()) {
      throw std::runtime_error("emulation: block " + std::to_string(blockIdx.x) + ", thread " +
                               std::to_string(threadIdx.x) + ": " + error);
    }
  }
}

void barrier(int line) {
  if (block_gate.arrived && block_gate.line != line) {
    fail("threads at different barriers: lines " + std::to_string(block_gate.line) + " and " +
         std::to_string(line));
  }
  block_gate.line = line;
  if (block_gate.arrived + 1 == blockDim.x) block_epoch++;
  wait(block_gate, blockDim.x);
}

void warp_barrier() {
  const unsigned warp = threadIdx.x / 32;
  Warp& w = warps[warp];
  if (w.gate.arrived + 1 == warp_size(warp)) w.epoch++;
  wait(w.gate, warp_size(warp));
}

void exchange(const void* value, void* result, int bytes, int from) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Warp& w = warps[warp];
  const unsigned side = w.gate.generation & 1;
  if (w.gate.arrived && w.sizes[side] != bytes) fail("lanes of a warp at different exchanges");
  w.sizes[side] = bytes;
  std::memcpy(w.values[side][lane], value, size_t(bytes));
  wait(w.gate, warp_size(warp));
  std::memcpy(result, w.values[side][from], size_t(bytes));
}

void fail(const std::string& message) { throw std::runtime_error(message); }

int epoch_of_block() { return block_epoch; }
int epoch_of_warp() { return warps[threadIdx.x / 32].epoch; }

namespace {

// Whether another thread may be at it still.
bool is_open(const Access& a) {
  if (a.block != block_number || a.block_epoch < epoch_of_block()) return false;
  if (a.thread == threadIdx.x) return false;
  return a.warp != threadIdx.x / 32 || a.warp_epoch >= epoch_of_warp();
}

Access access_now() {
  return {block_number, threadIdx.x, threadIdx.x / 32, epoch_of_block(), epoch_of_warp()};
}

}  // namespace

void check_read(Accesses& accesses) {
  if (accesses.written.block != block_number) fail("shared memory is read before it is written");
  if (is_open(accesses.written)) {
    fail("shared memory is read without a barrier after another thread wrote it");
  }
  Access now = access_now();
  if (is_open(accesses.read)) {
    now.thread = kSeveral;
    if (accesses.read.warp != now.warp) now.warp = kSeveral;
  }
  accesses.read = now;
}

void check_write(Accesses& accesses) {
  if (is_open(accesses.written)) {
    fail("shared memory is written without a barrier after another thread wrote it");
  }
  if (is_open(accesses.read)) {
    fail("shared memory is written without a barrier after another thread read it");
  }
  accesses.written = access_now();
}

}  // namespace emulation

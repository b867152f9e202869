#include "tests/msl/fibre.h"

#include <sys/mman.h>

#include <new>

#if !defined(__x86_64__)
#error "the MSL machine switches stacks in x86-64 assembly; CMake builds it there only"
#endif

// Saves what a call preserves, moves to another stack, restores. (swapcontext would make two
// system calls of it: 300 ns instead of 3.)
extern "C" void veloxquant_msl_switch(void** save, void* load);
__asm__(R"(
.text
.globl veloxquant_msl_switch
.type veloxquant_msl_switch, @function
veloxquant_msl_switch:
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
.size veloxquant_msl_switch, .-veloxquant_msl_switch
)");

namespace veloxquant::msl {
namespace {

constexpr size_t kStackBytes = 128 * 1024;  // a kernel that needs more spills on any GPU
constexpr size_t kGuardBytes = 4096;
Fibres* current = nullptr;

}  // namespace

Fibres::~Fibres() {
  if (arena_ != 0) munmap(reinterpret_cast<void*>(arena_), arena_bytes_);
}

void Fibres::reset(int n) {
  const size_t wanted = static_cast<size_t>(n) * kStackBytes;
  if (wanted > arena_bytes_) {
    if (arena_ != 0) munmap(reinterpret_cast<void*>(arena_), arena_bytes_);
    void* memory = mmap(nullptr, wanted, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    arena_ = reinterpret_cast<uintptr_t>(memory);
    arena_bytes_ = wanted;
    for (int i = 0; i < n; ++i) {
      mprotect(reinterpret_cast<void*>(arena_ + i * kStackBytes), kGuardBytes, PROT_NONE);
    }
  }
  contexts_.assign(n, {});
}

void Fibres::start() {
  Context* self = current->running_;
  self->body(self->index);
  self->done = true;
  current->yield();
}

bool Fibres::resume(int i, void (*body)(int)) {
  Context& c = contexts_[i];
  if (c.done) return false;
  if (c.stack_pointer == nullptr) {
    c.body = body;
    c.index = i;
    // Six registers, the address of start(), and one word so that start() finds the stack aligned
    // as after a call.
    auto* top = reinterpret_cast<void**>(arena_ + (i + 1) * kStackBytes) - 2;
    top[0] = reinterpret_cast<void*>(&Fibres::start);
    top[1] = nullptr;
    for (int k = 1; k <= 6; ++k) top[-k] = nullptr;
    c.stack_pointer = top - 6;
  }
  running_ = &c;
  current = this;
  veloxquant_msl_switch(&scheduler_, c.stack_pointer);
  return !c.done;
}

void Fibres::yield() { veloxquant_msl_switch(&running_->stack_pointer, scheduler_); }

}  // namespace veloxquant::msl

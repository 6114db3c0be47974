#pragma once
// What the threads of an emulated block do to memory, looked at access by access: sanitizer.cpp.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace emulated {

using Clock = std::vector<uint32_t>;  // by thread of the block: what is known to have happened of each

extern bool checking;

void begin_launch(char* dynamic, unsigned shared, const void* parameters, size_t bytes);
void begin_block(unsigned threads);
void end_launch();
void begin_copy(void* to, const void* from, bool wanted);  // asynchronous, of 16 bytes
void end_copy(void* to);
void arrive(std::shared_ptr<Clock>& together);  // at a barrier, whose threads leave with what all of them knew
void leave(const Clock& together);

// emulator.cpp's
unsigned thread();              // the running one
const char* stack();            // its stack's lowest address
constexpr size_t kStack = 64 << 10;

}  // namespace emulated

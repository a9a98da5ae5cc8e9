// What Python calls. They return `Outcome`; the message is in the call.

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "backward.h"
#include "check.h"
#include "forward.h"

namespace {

enum Outcome : int64_t { kDone, kNoMemory, kRefused };

Outcome ends(llama_attn::Call& call, Outcome outcome, const char* message) {
  const size_t length = std::min(std::strlen(message), sizeof(call.message) - 1);
  std::memcpy(call.message, message, length);
  call.message[length] = 0;
  return outcome;
}

template <template <class> class Work>
int64_t run(llama_attn::Call& call, bool backward) {
  try {
    llama_attn::check(call, backward);
    if (call.query.type == llama_attn::Type::kFloat64)
      Work<double>(call).run();
    else
      Work<float>(call).run();
  } catch (const std::invalid_argument& error) {
    return ends(call, kRefused, error.what());
  } catch (const std::bad_alloc&) {
    return ends(call, kNoMemory, "not enough memory");
  } catch (const std::length_error&) {
    return ends(call, kNoMemory, "not enough memory");
  }
  return kDone;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int64_t llama_attn_forward(llama_attn::Call* call) { return run<llama_attn::Forward>(*call, false); }

int64_t llama_attn_backward(llama_attn::Call* call) { return run<llama_attn::Backward>(*call, true); }

// Bytes of `Call`, and the number of what its fields mean, to be compared with what Python thinks.
int64_t llama_attn_call_size() { return sizeof(llama_attn::Call); }

int64_t llama_attn_abi() { return llama_attn::kAbi; }

}  // extern "C"
#pragma GCC visibility pop

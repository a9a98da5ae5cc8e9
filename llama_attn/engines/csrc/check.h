// Whether a call is one that can be worked on.
#pragma once

#include "call.h"

namespace llama_attn {

// Throws std::invalid_argument, with what was expected and got, where a tensor has not the extents, the type or the
// layout that the call says, or a number is out of range. Nothing behind this looks at memory beyond the extents.
void check(const Call& call, bool backward);

}  // namespace llama_attn

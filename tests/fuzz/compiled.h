// Opens and runs whatever bytes it is given as a compiled model.
#pragma once

#include <cstddef>
#include <cstdint>

enum class Outcome { kRefused, kOpened, kRan };

// The head of the file is made right first: what it protects is what is tested. Aborts where the
// library does what it must not.
Outcome try_bytes(const uint8_t* data, size_t size);

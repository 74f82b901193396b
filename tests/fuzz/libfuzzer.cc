// The entry of libFuzzer: it finds by itself which changes lead to new code.
#include "fuzz/compiled.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try_bytes(data, size);
  return 0;
}

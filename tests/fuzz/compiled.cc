#include "fuzz/compiled.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "c/byte_reader.h"
#include "lutra.h"

namespace {

constexpr size_t kHead = 24;
constexpr size_t kMemory = 4 << 20;  // that a run may take
constexpr int64_t kMaxInput = 1 << 18;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "%s: %s\n", what, lutra_last_error());
  std::abort();
}

std::vector<uint8_t> with_head(const uint8_t* data, size_t size) {
  std::vector<uint8_t> file(data, data + size);
  if (size < kHead) return file;
  constexpr uint8_t start[] = {0x89, 'l', 'u', 't', 'r', 'a', 'c', '\n', 1, 0, 0, 0};
  std::memcpy(file.data(), start, sizeof start);
  const uint32_t checksum = lutra::crc32(file.data() + 16, size - 16);
  std::memcpy(file.data() + 12, &checksum, sizeof checksum);
  return file;
}

// Sets all inputs, with sizes and content that depend on `seed`; false if they would be large.
bool set_inputs(const lutra_model* model, lutra_session* session, uint32_t seed,
                std::vector<std::vector<uint32_t>>& memory) {
  const int64_t batch = 1 + seed % 3;
  for (size_t i = 0; i < lutra_input_count(model); ++i) {
    lutra_value value;
    expect(lutra_input(model, i, &value) == LUTRA_OK, "an input");
    int64_t size = 1;
    for (size_t k = 0; k < value.rank; ++k) {
      if (value.shape[k] < 0) value.shape[k] = k == 0 ? batch : 1 + (seed >> (4 * k)) % 11;
      size *= value.shape[k];
      if (size > kMaxInput) return false;
    }
    std::vector<uint32_t> content(static_cast<size_t>(size));
    for (size_t k = 0; k < content.size(); ++k) {
      const uint32_t some = static_cast<uint32_t>(k * 2654435761u + seed) >> 24;
      const float real = (static_cast<float>(some) - 128.0f) / 40.0f;
      content[k] = some % 3;
      if (value.dtype == LUTRA_FLOAT32) std::memcpy(&content[k], &real, sizeof real);
    }
    memory.push_back(std::move(content));
    expect(lutra_set_input(session, i, memory.back().data(), value.shape) == LUTRA_OK, "set_input");
  }
  return true;
}

void read_outputs(const lutra_model* model, const lutra_session* session) {
  float sum = 0.0f;
  for (size_t i = 0; i < lutra_output_count(model); ++i) {
    lutra_value value;
    const float* data = nullptr;
    const int64_t* shape = nullptr;
    expect(lutra_output(model, i, &value) == LUTRA_OK, "an output");
    expect(lutra_get_output(session, i, &data, &shape) == LUTRA_OK, "get_output");
    int64_t size = 1;
    for (size_t k = 0; k < value.rank; ++k) {
      expect(shape[k] >= 1 && (value.shape[k] < 0 || value.shape[k] == shape[k]), "its shape");
      size *= shape[k];
    }
    for (int64_t k = 0; k < size; ++k) sum += data[k];  // read, for the sanitizers
  }
  volatile float kept = sum;
  (void)kept;
}

}  // namespace

Outcome try_bytes(const uint8_t* data, size_t size) {
  if (size == 0) return Outcome::kRefused;  // there is no place where nothing is
  const std::vector<uint8_t> file = with_head(data, size);
  const uint32_t seed = lutra::crc32(file.data(), file.size());
  lutra_options options{};
  options.isa = seed % 4 == 0 ? nullptr : "scalar";
  options.threads = 1;
  options.max_memory = kMemory;
  lutra_model* model = nullptr;
  const lutra_status opened = lutra_open_memory(file.data(), file.size(), &options, &model);
  if (opened != LUTRA_OK) {
    expect(opened == LUTRA_ERROR_FORMAT, "a file that cannot be opened");
    return Outcome::kRefused;
  }
  lutra_session* session = nullptr;
  expect(lutra_session_new(model, &session) == LUTRA_OK, "session_new");
  std::vector<std::vector<uint32_t>> memory;
  Outcome outcome = Outcome::kOpened;
  if (set_inputs(model, session, seed >> 2, memory)) {
    const lutra_status ran = lutra_run(session);
    expect(ran != LUTRA_ERROR_INTERNAL && ran != LUTRA_ERROR_ARGUMENT, "a run");
    if (ran == LUTRA_OK) {
      read_outputs(model, session);
      outcome = Outcome::kRan;
    }
  }
  lutra_session_free(session);
  lutra_close(model);
  return outcome;
}

// The functions of lutra.h. No exception leaves them.
#include "lutra.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "c/compiled_model.h"
#include "engine/core/memory.h"
#include "kernels/dispatch.h"

namespace lutra {
namespace {

#ifdef LUTRA_ONE_THREAD
constexpr int kMaxThreads = 1;
int cores() { return 1; }
#else
constexpr int kMaxThreads = 1024;
int cores() { return static_cast<int>(std::thread::hardware_concurrency()); }
#endif

// Of fixed size: keeping a message never fails.
thread_local char last_error[1024];

// Names in a message may come from a file: nothing that a terminal could obey is kept of them.
lutra_status fail(lutra_status status, const char* what) noexcept {
  char* to = last_error;
  for (; *what && to < last_error + sizeof last_error - 1; ++what) {
    *to++ = static_cast<unsigned char>(*what) < ' ' || *what == 127 ? '?' : *what;
  }
  *to = 0;
  return status;
}

// What is wrong, and whose fault it is.
class Failure : public std::runtime_error {
 public:
  Failure(lutra_status code, const std::string& what) : std::runtime_error(what), status(code) {}
  lutra_status status;
};

[[noreturn]] void refuse(lutra_status status, const char* pattern,
                         std::initializer_list<Word> words) {
  throw Failure(status, sentence(pattern, words));
}

template <class... A>
void need(bool ok, lutra_status status, const char* pattern, const A&... words) {
  if (!ok) refuse(status, pattern, {words...});
}

void need_pointer(const void* pointer, const char* name) {
  need(pointer != nullptr, LUTRA_ERROR_ARGUMENT, "% is NULL", name);
}

// Calls f; what it throws becomes a status and a message.
template <class F>
lutra_status guarded(const F& f) noexcept {
  try {
    f();
    return LUTRA_OK;
  } catch (const Failure& error) {
    return fail(error.status, error.what());
  } catch (const MemoryLimitError& error) {
    return fail(LUTRA_ERROR_MEMORY, error.what());
  } catch (const std::bad_alloc&) {
    return fail(LUTRA_ERROR_MEMORY, "there is not enough memory");
  } catch (const std::length_error&) {  // of a container
    return fail(LUTRA_ERROR_MEMORY, "there is not enough memory");
  } catch (const std::exception& error) {
    return fail(LUTRA_ERROR_INTERNAL, error.what());
  } catch (...) {
    return fail(LUTRA_ERROR_INTERNAL, "something unknown was thrown");
  }
}

std::string shape_text(const Sizes& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + (shape[i] < 0 ? "any" : std::to_string(shape[i]));
  }
  return text + ")";
}

struct Model {
  Model(const uint8_t* data, size_t size, const Kernels& kernels, int threads)
      : compiled(data, size, kernels, threads) {}

  CompiledModel compiled;
  bool allow_nonfinite = false;
  size_t max_memory = SIZE_MAX;
};

const Kernels& kernels_of(const lutra_options& options) {
  try {
    return find_kernels(options.isa ? options.isa : "auto");
  } catch (const std::invalid_argument& error) {
    throw Failure(LUTRA_ERROR_CPU, error.what());
  }
}

int threads_of(const lutra_options& options) {
  if (options.threads == 0) return std::clamp(cores(), 1, kMaxThreads);
  need(options.threads >= 1 && options.threads <= kMaxThreads, LUTRA_ERROR_ARGUMENT,
       "% threads were asked for; it must be 1..%, or 0", options.threads, kMaxThreads);
  return options.threads;
}

std::shared_ptr<Model> load(const uint8_t* data, size_t size, const lutra_options* given) {
  const lutra_options options = given ? *given : lutra_options{};
  const Kernels& kernels = kernels_of(options);
  const int threads = threads_of(options);
  // Tensors are at multiples of 64 bytes of the file, and are read as what they are.
  AlignedBytes copy;
  if (reinterpret_cast<uintptr_t>(data) % alignof(std::max_align_t) != 0) {
    copy = AlignedBytes::raw(size);
    std::memcpy(copy.data(), data, size);
    data = copy.data();
  }
  try {
    auto model = std::make_shared<Model>(data, size, kernels, threads);
    model->allow_nonfinite = options.allow_nonfinite != 0;
    if (options.max_memory > 0 && options.max_memory < SIZE_MAX) {
      model->max_memory = static_cast<size_t>(options.max_memory);
    }
    model->compiled.plan.limit_memory(model->max_memory);
    return model;
  } catch (const std::invalid_argument& error) {
    throw Failure(LUTRA_ERROR_FORMAT, std::string("the model cannot be read: ") + error.what());
#ifndef LUTRA_ONE_THREAD
  } catch (const std::system_error& error) {
    throw Failure(LUTRA_ERROR_CPU,
                  "cannot start " + std::to_string(threads) + " threads: " + error.what());
#endif
  }
}

struct Content {
  AlignedBytes bytes;
  size_t size;
};

Content read_file(const char* path) {
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  const auto check = [path](bool ok, const char* why) {
    need(ok, LUTRA_ERROR_FILE, "cannot read '%': %", path, why);
  };
  errno = 0;
  const std::unique_ptr<std::FILE, Close> file(std::fopen(path, "rb"));
  check(file != nullptr, std::strerror(errno));
  check(std::fseek(file.get(), 0, SEEK_END) == 0, std::strerror(errno));
  const long size = std::ftell(file.get());
  check(size >= 0 && size < LONG_MAX, "it is no file");  // a folder has that length
  std::rewind(file.get());
  Content content{AlignedBytes::raw(static_cast<size_t>(size)), static_cast<size_t>(size)};
  check(std::fread(content.bytes.data(), 1, content.size, file.get()) == content.size,
        "it cannot be read to its end");
  return content;
}

void describe(const std::vector<ModelValue>& values, size_t index, lutra_value* to) {
  need_pointer(to, "value");
  need(index < values.size(), LUTRA_ERROR_ARGUMENT, "there is no value %; the model has %", index,
       values.size());
  const ModelValue& value = values[index];
  *to = {.name = value.name.c_str(),
         .dtype = value.integers ? LUTRA_INT32 : LUTRA_FLOAT32,
         .rank = value.shape.size(),
         .shape = {}};
  std::copy(value.shape.begin(), value.shape.end(), to->shape);
}

// Without a branch, so that the compiler makes vector code.
bool all_finite(const float* x, int64_t size) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t bad = 0;
  for (int64_t i = 0; i < size; ++i) {
    bad |= static_cast<uint32_t>((__builtin_bit_cast(uint32_t, x[i]) & kExponent) == kExponent);
  }
  return bad == 0;
}

// Callers read outputs by the shapes that the file declares.
void check_declared(const ModelValue& value, const Shape& made) {
  bool same = value.shape.size() == static_cast<size_t>(made.rank);
  for (int i = 0; same && i < made.rank; ++i) {
    const int64_t declared = value.shape[static_cast<size_t>(i)];
    same = declared < 0 || declared == made[i];
  }
  need(same, LUTRA_ERROR_FORMAT, "output '%' has the shape %, and the file declares %", value.name,
       made, shape_text(value.shape));
}

struct Input {
  const float* data = nullptr;  // or int32
  Shape shape;
};

struct Output {
  AlignedBytes memory;
  size_t capacity = 0;  // floats
  Shape shape;

  float* data() { return reinterpret_cast<float*>(memory.data()); }
  const float* data() const { return reinterpret_cast<const float*>(memory.data()); }
};

}  // namespace
}  // namespace lutra

struct lutra_model {
  std::shared_ptr<lutra::Model> shared;
};

struct lutra_session {
  std::shared_ptr<lutra::Model> shared;
  std::vector<lutra::Input> inputs;
  std::vector<lutra::Output> outputs;
  bool done = false;  // there are outputs

  lutra::CompiledModel& model() const { return shared->compiled; }
  void set_input(size_t index, const void* data, const int64_t* shape);
  void run();

 private:
  void check_inputs() const;
};

void lutra_session::set_input(size_t index, const void* data, const int64_t* shape) {
  using lutra::need, lutra::need_pointer;
  need(index < inputs.size(), LUTRA_ERROR_ARGUMENT, "there is no input %; the model has %", index,
       inputs.size());
  need_pointer(data, "data");
  need(reinterpret_cast<uintptr_t>(data) % alignof(float) == 0, LUTRA_ERROR_ARGUMENT,
       "data is not aligned to 4 bytes");
  const lutra::ModelValue& value = model().inputs[index];
  lutra::Sizes given = value.shape;
  if (shape) {
    given.assign(shape, shape + value.shape.size());
  } else if (given[0] < 0) {
    given[0] = 1;
  }
  lutra::Shape made;
  for (size_t i = 0; i < given.size(); ++i) {
    need(given[i] >= 1 && (value.shape[i] < 0 || value.shape[i] == given[i]), LUTRA_ERROR_ARGUMENT,
         "input '%' has the shape %, and the model takes %", value.name, lutra::shape_text(given),
         lutra::shape_text(value.shape));
    made[made.rank++] = given[i];
  }
  inputs[index] = {static_cast<const float*>(data), made};
}

void lutra_session::check_inputs() const {
  using lutra::need;
  int64_t batch = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const lutra::Input& input = inputs[i];
    const lutra::ModelValue& value = model().inputs[i];
    need(input.data != nullptr, LUTRA_ERROR_ARGUMENT,
         "input '%' has not been set; call lutra_set_input", value.name);
    if (value.shape[0] < 0) {
      need(batch == 0 || batch == input.shape[0], LUTRA_ERROR_ARGUMENT,
           "input '%' has a batch of % and an input before it one of %", value.name, input.shape[0],
           batch);
      batch = input.shape[0];
    }
    if (value.integers || shared->allow_nonfinite) continue;
    need(lutra::all_finite(input.data, input.shape.size()), LUTRA_ERROR_INPUT,
         "input '%' holds NaN or infinite values", value.name);
  }
}

void lutra_session::run() {
  using lutra::need;
  done = false;
  check_inputs();
  lutra::Shapes shapes;
  std::vector<const float*> data;
  for (const lutra::Input& input : inputs) {
    shapes.push_back(input.shape);
    data.push_back(input.data);
  }
  lutra::Plan& plan = model().plan;
  try {
    std::unique_ptr<lutra::Plan::Context> context = plan.acquire(shapes);
    size_t room = shared->max_memory;
    for (size_t i = 0; i < outputs.size(); ++i) {
      lutra::Output& output = outputs[i];
      output.shape = context->output_shape(i);
      lutra::check_declared(model().outputs[i], output.shape);
      const size_t size = static_cast<size_t>(output.shape.size());
      need(size <= room / sizeof(float), LUTRA_ERROR_MEMORY,
           "the outputs take more memory than the % bytes that a run may take", shared->max_memory);
      room -= size * sizeof(float);
      if (output.capacity < size) {
        output.memory = {};  // before there is more
        output.capacity = 0;
        output.memory = lutra::AlignedBytes::raw(size * sizeof(float));
        output.capacity = size;
      }
    }
    std::vector<float*> targets;
    for (lutra::Output& output : outputs) targets.push_back(output.data());
    plan.execute(*context, data, targets);
    plan.release(std::move(context));
  } catch (const std::invalid_argument& error) {
    throw lutra::Failure(LUTRA_ERROR_INPUT, error.what());
  }
  done = true;
}

extern "C" {

const char* lutra_version(void) { return LUTRA_VERSION; }

const char* lutra_last_error(void) { return lutra::last_error; }

lutra_status lutra_open(const char* path, const lutra_options* options, lutra_model** model) {
  return lutra::guarded([&] {
    lutra::need_pointer(path, "path");
    lutra::need_pointer(model, "model");
    const lutra::Content content = lutra::read_file(path);
    *model = new lutra_model{lutra::load(content.bytes.data(), content.size, options)};
  });
}

lutra_status lutra_open_memory(const void* data, size_t size, const lutra_options* options,
                               lutra_model** model) {
  return lutra::guarded([&] {
    lutra::need_pointer(data, "data");
    lutra::need_pointer(model, "model");
    *model = new lutra_model{lutra::load(static_cast<const uint8_t*>(data), size, options)};
  });
}

void lutra_close(lutra_model* model) { delete model; }

size_t lutra_input_count(const lutra_model* model) { return model->shared->compiled.inputs.size(); }

size_t lutra_output_count(const lutra_model* model) {
  return model->shared->compiled.outputs.size();
}

lutra_status lutra_input(const lutra_model* model, size_t index, lutra_value* value) {
  return lutra::guarded([&] {
    lutra::need_pointer(model, "model");
    lutra::describe(model->shared->compiled.inputs, index, value);
  });
}

lutra_status lutra_output(const lutra_model* model, size_t index, lutra_value* value) {
  return lutra::guarded([&] {
    lutra::need_pointer(model, "model");
    lutra::describe(model->shared->compiled.outputs, index, value);
  });
}

const char* lutra_metadata(const lutra_model* model) {
  return model->shared->compiled.metadata.c_str();
}

const char* lutra_isa(const lutra_model* model) {
  return model->shared->compiled.plan.kernels().name;
}

lutra_status lutra_session_new(const lutra_model* model, lutra_session** session) {
  return lutra::guarded([&] {
    lutra::need_pointer(model, "model");
    lutra::need_pointer(session, "session");
    auto made = std::make_unique<lutra_session>();
    made->shared = model->shared;
    made->inputs.resize(made->model().inputs.size());
    made->outputs.resize(made->model().outputs.size());
    *session = made.release();
  });
}

void lutra_session_free(lutra_session* session) { delete session; }

lutra_status lutra_set_input(lutra_session* session, size_t index, const void* data,
                             const int64_t* shape) {
  return lutra::guarded([&] {
    lutra::need_pointer(session, "session");
    session->set_input(index, data, shape);
  });
}

lutra_status lutra_run(lutra_session* session) {
  return lutra::guarded([&] {
    lutra::need_pointer(session, "session");
    session->run();
  });
}

lutra_status lutra_get_output(const lutra_session* session, size_t index, const float** data,
                              const int64_t** shape) {
  return lutra::guarded([&] {
    lutra::need_pointer(session, "session");
    lutra::need_pointer(data, "data");
    lutra::need(index < session->outputs.size(), LUTRA_ERROR_ARGUMENT,
                "there is no output %; the model has %", index, session->outputs.size());
    lutra::need(session->done, LUTRA_ERROR_ARGUMENT, "there are no outputs; call lutra_run");
    const lutra::Output& output = session->outputs[index];
    *data = output.data();
    if (shape) *shape = output.shape.dims.data();
  });
}

}  // extern "C"

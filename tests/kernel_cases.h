// What kernels_test.cc is made of: counted checks, memory that notices stray reads and writes,
// padded maps and their tiles, grids and epilogues. Only for that file.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

#ifdef __SANITIZE_ADDRESS__
extern "C" void __sanitizer_set_death_callback(void (*)());
#endif

namespace lutra {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// --- chance -------------------------------------------------------------------------------------

uint64_t random_state = 1;

uint32_t random_bits() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
}

int pick(int low, int high) {
  return low + static_cast<int>(random_bits() % static_cast<uint32_t>(high - low + 1));
}

template <class T>
T any_of(std::initializer_list<T> list) {
  return list.begin()[random_bits() % list.size()];
}

bool coin() { return (random_bits() & 1) != 0; }

float uniform(float size) {
  return (static_cast<float>(random_bits() >> 8) * 0x1p-23f - 1.0f) * size;
}

// --- checks -------------------------------------------------------------------------------------

int passed = 0, failed = 0, cases = 0;
bool verbose = false;
const char* isa = "";               // the kernels on trial
char current[512] = "no case yet";  // the case that runs, with all its parameters

// Starts a case. Its data depends on its number only, not on what other cases drew.
[[gnu::format(printf, 1, 2)]] void begin(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int n = std::snprintf(current, sizeof current, "%s, case %d: ", isa, ++cases);
  std::vsnprintf(current + n, sizeof current - static_cast<size_t>(n), format, arguments);
  va_end(arguments);
  random_state = static_cast<uint64_t>(cases) << 32;
  if (verbose) std::printf("%s\n", current);
}

[[gnu::format(printf, 2, 3)]] bool check(bool ok, const char* format, ...) {
  ++(ok ? passed : failed);
  if (ok || failed > 200) return ok;
  std::printf("FAILED: %s: ", current);
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  return false;
}

void print_current() {
  static_cast<void>(!write(STDOUT_FILENO, "DIED in ", 8));
  static_cast<void>(!write(STDOUT_FILENO, current, std::strlen(current)));
  static_cast<void>(!write(STDOUT_FILENO, "\n", 1));
}

// A kernel that touches a guard page or is shot by a sanitizer still names its case.
void name_the_dying() {
#if defined(__wasm__)  // no signals: -v names the last case
  static_cast<void>(print_current);
#elif defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(print_current);
#else
  for (int signal_number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) {
    signal(signal_number, [](int n) {
      print_current();
      signal(n, SIG_DFL);
      raise(n);
    });
  }
#endif
}

// Floats are the same if their bits are; any NaN is any other, because which of two NaN survives
// an addition depends on the order in which the compiler names its operands.
template <class T>
bool same(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) && std::isnan(b)) return true;
  }
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// --- memory -------------------------------------------------------------------------------------

// Exactly n values that touch a page nobody may read: the one after them, or the one before them
// with `at_start`. Finds what sanitizers do not see: gathers, masked loads, hand-written reads.
// WebAssembly has no such pages.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t n, bool at_start = false) : size_(n) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = n * sizeof(T);
    const size_t inner = (bytes + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    map_ = static_cast<uint8_t*>(
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED ||
        (inner != 0 && mprotect(map_ + page, inner, PROT_READ | PROT_WRITE) != 0)) {
      std::perror("guard pages");
      std::exit(2);
    }
    data_ = reinterpret_cast<T*>(map_ + page + (at_start ? 0 : inner - bytes));
  }
  ~Guarded() {
    if (map_) munmap(map_, mapped_);
  }
  Guarded(Guarded&& other) noexcept
      : size_(other.size_),
        mapped_(other.mapped_),
        map_(std::exchange(other.map_, nullptr)),
        data_(other.data_) {}
  Guarded& operator=(Guarded&&) = delete;
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return size_; }

 private:
  size_t size_, mapped_;
  uint8_t* map_;
  T* data_;
};

template <class T>
void fill_integers(Guarded<T>& v, int low, int high) {
  for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<T>(pick(low, high));
}

void fill_floats(Guarded<float>& v, float size) {
  for (size_t i = 0; i < v.size(); ++i) v[i] = uniform(size);
}

// Values that are no numbers, or the last ones before, here and there.
void sprinkle(Guarded<float>& v) {
  for (size_t i = 0; i < v.size(); ++i) {
    if (pick(0, 3) == 0) {
      v[i] = any_of({kNan, -kNan, kInf, -kInf, 3e38f, -3e38f, 0.0f, -0.0f, 1e-45f, -1e-45f});
    }
  }
}

// Memory to write: `planes` planes of `width` values, `stride` apart, full of canaries, with more
// of them before and after. 64-byte aligned, then moved by `shift` values.
template <class T>
class Canvas {
 public:
  Canvas(size_t planes, size_t stride, size_t width, size_t shift = 0)
      : planes_(planes), stride_(stride), width_(width) {
    before_ = 64 + shift * sizeof(T);
    size_ = planes == 0 ? 0 : (planes - 1) * stride + width;
    total_ = before_ + size_ * sizeof(T) + 64;
    bytes_ = new (std::align_val_t(64)) uint8_t[total_];
    for (size_t i = 0; i < total_; ++i) bytes_[i] = canary(i);
  }
  explicit Canvas(size_t n) : Canvas(1, n, n) {}
  ~Canvas() { operator delete[](bytes_, std::align_val_t(64)); }
  Canvas(const Canvas&) = delete;
  Canvas& operator=(const Canvas&) = delete;
  T* data() { return reinterpret_cast<T*>(bytes_ + before_); }
  const T* data() const { return reinterpret_cast<const T*>(bytes_ + before_); }
  size_t size() const { return size_; }

  // Every canary lives that is not one of the values.
  bool intact() const {
    for (size_t i = 0; i < total_; ++i) {
      const bool inside = i >= before_ && i < before_ + size_ * sizeof(T);
      if (inside && (i - before_) / sizeof(T) % stride_ < width_) continue;
      if (bytes_[i] != canary(i)) return false;
    }
    return true;
  }

  void expect(const Canvas& want, const char* name) const {
    for (size_t p = 0; p < planes_; ++p) {
      for (size_t r = 0; r < width_; ++r) {
        const T a = data()[p * stride_ + r], b = want.data()[p * stride_ + r];
        if (same(a, b)) continue;
        check(false, "%s: plane %zu of %zu, value %zu of %zu: got %.9g, want %.9g", name, p,
              planes_, r, width_, static_cast<double>(a), static_cast<double>(b));
        return;
      }
    }
    check(intact(), "%s: wrote outside its memory or beyond its rows", name);
  }

 private:
  static uint8_t canary(size_t i) { return static_cast<uint8_t>(0x80 | (i * 37 & 0x7f)); }
  size_t planes_, stride_, width_, before_, size_, total_;
  uint8_t* bytes_;
};

// A 64-byte aligned copy of exactly these bytes, so that a sanitizer sees one too many read.
class Exact {
 public:
  explicit Exact(const Canvas<uint8_t>& from)
      : bytes_(new (std::align_val_t(64)) uint8_t[from.size()]) {
    std::memcpy(bytes_, from.data(), from.size());
  }
  ~Exact() { operator delete[](bytes_, std::align_val_t(64)); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  const uint8_t* data() const { return bytes_; }

 private:
  uint8_t* bytes_;
};

// Cuts 0..n at random multiples of `tile`; the parts come in any order.
std::vector<std::pair<int, int>> parts(int n, int tile) {
  const int chance = any_of({0, 1, 3});  // one part, every tile, some
  std::vector<std::pair<int, int>> list;
  for (int first = 0; first < n;) {
    int last = first + tile;
    while (last < n && (chance == 0 || (chance == 3 && pick(0, 2) != 0))) last += tile;
    last = std::min(last, n);
    list.push_back({first, last});
    first = last;
  }
  for (size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[random_bits() % i]);
  return list;
}

// --- maps and tiles -----------------------------------------------------------------------------

// A batch of padded images as the engine stores them: columns phase by phase where there is a
// stride; `gap` more bytes after each image.
struct Map {
  int width, height, images, kernel = 1, stride = 1, pad = 0, gap = 0;

  int phase() const { return (width + 2 * pad + stride - 1) / stride; }
  int pitch() const { return phase() * stride; }
  int image() const { return (height + 2 * pad) * pitch() + gap; }
  int plane() const { return images * image(); }
  int taps() const { return kernel * kernel; }
  int out_w() const { return (width + 2 * pad - kernel) / stride + 1; }
  int out_h() const { return (height + 2 * pad - kernel) / stride + 1; }
  int rows() const { return images * out_h() * out_w(); }
  int tap(int t) const {
    const int y = t / kernel, x = t % kernel;
    return y * pitch() + x % stride * phase() + x / stride;
  }
  int row(int r) const {
    const int x = r % out_w(), y = r / out_w() % out_h(), n = r / out_w() / out_h();
    return n * image() + y * stride * pitch() + x;
  }
};

Map random_map(int kernel) {
  Map m{.width = any_of({4, 7, 8, 14, 16, 28, 32, 56}),
        .height = pick(1, 9),
        .images = pick(1, 5),
        .kernel = kernel,
        .stride = any_of({1, 1, 2}),
        .pad = coin() ? kernel / 2 : 0,
        .gap = any_of({0, 0, 0, 3, 64, 300})};
  m.width = std::max(m.width, kernel);
  m.height = std::max(m.height, kernel - 2 * m.pad);
  return m;
}

// A tile of some map: full if it can be, or of any number of rows; at the end, the start, anywhere.
void random_rows(const Kernels& k, const Map& m, int* first, int* rows) {
  const int most = std::min(k.row_tile, m.rows());
  *rows = coin() ? most : pick(1, most);
  *first = any_of({0, m.rows() - *rows, pick(0, m.rows() - *rows)});
}

#define MAP_FORMAT "map %dx%d, %d images, kernel %d, stride %d, pad %d, gap %d"
#define MAP_VALUES(m) (m).width, (m).height, (m).images, (m).kernel, (m).stride, (m).pad, (m).gap

enum class Fill { kRandom, kZero, kMost };

// Rows first..first+rows-1 of a map, in memory that ends kSlack bytes after their last value.
class Tile {
 public:
  Tile(const Map& m, int depth, int first, int rows, int row_tile, int qmax, Fill fill)
      : tap_(static_cast<size_t>(m.taps())),
        row_(static_cast<size_t>(row_tile)),
        planes_(size(m, depth, first, rows), coin()) {
    bool consecutive = true;
    int last_tap = 0;
    for (int t = 0; t < m.taps(); ++t) {
      tap_[t] = m.tap(t);
      last_tap = std::max(last_tap, m.tap(t));
    }
    for (int r = 0; r < row_tile; ++r) {
      row_[r] = m.row(first + std::min(r, rows - 1));
      consecutive = consecutive && (r >= rows || row_[r] == row_[0] + r);
    }
    for (size_t i = 0; i < planes_.size(); ++i) {
      planes_[i] = static_cast<uint8_t>(fill == Fill::kRandom ? pick(0, qmax)
                                        : fill == Fill::kZero ? 0
                                                              : qmax);
    }
    // What is only read for lanes without a row may be anything.
    for (size_t i = planes_.size() - kSlack; i < planes_.size(); ++i) planes_[i] = 0xff;
    if (consecutive && pick(0, 4) == 0) consecutive = false;  // true of any rows, only slower
    patch_ = {.planes = planes_.data(),
              .plane = m.plane(),
              .tap = tap_.data(),
              .row = row_.data(),
              .rows = rows,
              .consecutive = consecutive};
  }

  const Patch& patch() const { return patch_; }
  // Rows from..from+15, for the scalar kernels.
  Patch part(int from) const {
    Patch p = patch_;
    p.row += from;
    p.rows = std::min(kScalar.row_tile, p.rows - from);
    return p;
  }
  // Places of a plane that its rows reach.
  int span(int taps) const {
    return *std::max_element(patch_.tap, patch_.tap + taps) + patch_.row[patch_.rows - 1] + 1;
  }
  uint8_t entry(int taps, int d, int r) const {
    return patch_.planes[d / taps * patch_.plane + patch_.tap[d % taps] + patch_.row[r]];
  }

 private:
  static size_t size(const Map& m, int depth, int first, int rows) {
    int last = 0;
    for (int t = 0; t < m.taps(); ++t) last = std::max(last, m.tap(t));
    return static_cast<size_t>(depth / m.taps() - 1) * static_cast<size_t>(m.plane()) +
           static_cast<size_t>(last + m.row(first + rows - 1) + 1) + kSlack;
  }
  Guarded<int32_t> tap_, row_;
  Guarded<uint8_t> planes_;
  Patch patch_;
};

// --- grids --------------------------------------------------------------------------------------

int to_grid(float t, const Grid& g) {
  const float low = static_cast<float>(-g.zero), high = static_cast<float>(g.qmax - g.zero);
  return static_cast<int>(std::nearbyint(t > low ? std::min(t, high) : low)) + g.zero;
}

// What the contract lets a kernel compute instead of x / scale.
float quotient(float x, const Grid& g) {
  const float low = static_cast<float>(-g.zero - 1), high = static_cast<float>(g.qmax - g.zero + 1);
  float t = x * g.inverse;
  t = t > low ? std::min(t, high) : low;
  return std::fmaf(std::fmaf(-t, g.scale, x), g.inverse, t);
}

// The floats next to each x where the grid steps, `near` on either side.
template <class Each>
void around_steps(const Grid& g, int near, const Each& each) {
  for (int k = -g.zero - 2; k <= g.qmax - g.zero + 1; ++k) {
    float x = (static_cast<float>(k) + 0.5f) * g.scale;
    for (int i = 0; i < near; ++i) x = std::nextafter(x, -kInf);
    for (int i = 0; i < 2 * near + 1; ++i, x = std::nextafter(x, kInf)) each(x);
  }
}

// A grid whose inverse is 1 / scale if that gives the same integers at every step, else 0.
Grid make_grid(float scale, int zero, int bits, bool inverse) {
  Grid g{.scale = scale, .inverse = 1.0f / scale, .zero = zero, .qmax = (1 << bits) - 1};
  bool exact = inverse && std::isfinite(g.inverse) && g.inverse != 0.0f;
  if (exact) {
    around_steps(g, 16, [&](float x) {
      exact = exact && to_grid(quotient(x, g), g) == to_grid(x / g.scale, g);
    });
  }
  if (!exact) g.inverse = 0.0f;
  return g;
}

Grid random_grid() {
  const int bits = pick(1, 7), qmax = (1 << bits) - 1;
  const float scale = any_of({1.0f, 0.5f, 4.0f, 0.037f, 0.3f, 1.7f, 250.0f, 1e30f, 1e-38f});
  return make_grid(scale, any_of({0, 0, qmax / 2 + 1, qmax}), bits, coin());
}

// --- epilogues ----------------------------------------------------------------------------------

struct Mode {
  bool offset, scale, residual, out;
  int clamp;      // 0: none, else the limits below
  int quantized;  // 0..kMaxQuantized
  int values;     // 0: usual, 1: with NaN, infinities and -0, 2: halves, for ties in the grid
};

constexpr float kLimits[][2] = {{0, 0}, {0.0f, kInf}, {0.0f, 6.0f}, {-1.5f, 2.0f}, {-0.0f, 40.0f}};

Mode random_mode() {
  return {.offset = coin(),
          .scale = coin(),
          .residual = coin(),
          .out = pick(0, 2) != 0,
          .clamp = pick(0, 4),
          .quantized = pick(0, 2),
          .values = pick(0, 2)};
}

// The arrays of an epilogue and what it writes, twice: by the kernels on trial and by the scalar.
class Finish {
 public:
  Finish(const Mode& m, int outputs, int rows)
      : mode_(m),
        outputs_(static_cast<size_t>(outputs)),
        rows_(static_cast<size_t>(rows)),
        stride_(rows_ + any_of<size_t>({0, 0, 1, 7, 64})),
        residual_stride_(rows_ + any_of<size_t>({0, 0, 3, 64})),
        shift_(static_cast<size_t>(pick(0, 3))),
        offset_(outputs_),
        scale_(outputs_),
        bias_(outputs_),
        residual_((outputs_ - 1) * residual_stride_ + rows_),
        mine_{{outputs_, stride_, rows_, shift_},
              {{outputs_, stride_, rows_, shift_}, {outputs_, stride_ + 5, rows_, 3 * shift_}}},
        want_{{outputs_, stride_, rows_, shift_},
              {{outputs_, stride_, rows_, shift_}, {outputs_, stride_ + 5, rows_, 3 * shift_}}} {
    for (Grid& g : grids_) g = random_grid();
    fill_integers(offset_, -5000, 5000);
    fill_floats(scale_, 0.2f);
    fill_floats(bias_, 20.0f);
    fill_floats(residual_, 100.0f);
    if (m.values == 1) {
      sprinkle(bias_);
      sprinkle(residual_);
    } else if (m.values == 2) {
      for (Grid& g : grids_) g = make_grid(any_of({0.5f, 1.0f, 2.0f}), g.zero, 7, coin());
      for (size_t i = 0; i < outputs_; ++i) {
        scale_[i] = any_of({0.25f, -0.25f, 0.5f, 0.125f});
        bias_[i] = static_cast<float>(pick(-9, 9)) * 0.5f;
      }
      for (size_t i = 0; i < residual_.size(); ++i) residual_[i] = static_cast<float>(pick(-9, 9));
    }
  }

  // mine(epilogue) runs the whole tile; scalar(from, epilogue) its rows from..from+15.
  template <class Mine, class Scalar>
  void run(const char* name, const Mine& mine, const Scalar& scalar) {
    mine(epilogue(mine_, 0, static_cast<int>(rows_)));
    for (int from = 0; from < static_cast<int>(rows_); from += kScalar.row_tile) {
      const int n = std::min(kScalar.row_tile, static_cast<int>(rows_) - from);
      scalar(from, epilogue(want_, static_cast<size_t>(from), n));
    }
    char what[512];
    auto text = [&](const char* output) {
      std::snprintf(what, sizeof what,
                    "%s, offset %d, scale %d, residual %d, out %d, clamp %d, quantised %d, "
                    "values %d, grids %g %g %d/%d and %g %g %d/%d, %s",
                    name, mode_.offset, mode_.scale, mode_.residual, mode_.out, mode_.clamp,
                    mode_.quantized, mode_.values, static_cast<double>(grids_[0].scale),
                    static_cast<double>(grids_[0].inverse), grids_[0].zero, grids_[0].qmax,
                    static_cast<double>(grids_[1].scale), static_cast<double>(grids_[1].inverse),
                    grids_[1].zero, grids_[1].qmax, output);
      return what;
    };
    mine_.out.expect(want_.out, text("out"));
    mine_.q[0].expect(want_.q[0], text("q[0]"));
    mine_.q[1].expect(want_.q[1], text("q[1]"));
  }

 private:
  struct Results {
    Canvas<float> out;
    Canvas<uint8_t> q[kMaxQuantized];
  };

  Epilogue epilogue(Results& to, size_t from, int rows) {
    Epilogue e{.offset = mode_.offset ? offset_.data() : nullptr,
               .scale = mode_.scale ? scale_.data() : nullptr,
               .bias = bias_.data(),
               .residual = mode_.residual ? residual_.data() + from : nullptr,
               .out = mode_.out ? to.out.data() + from : nullptr,
               .residual_stride = residual_stride_,
               .out_stride = stride_,
               .rows = rows,
               .clamp = mode_.clamp != 0,
               .low = kLimits[mode_.clamp][0],
               .high = kLimits[mode_.clamp][1],
               .quantized = mode_.quantized,
               .q = {}};
    for (int i = 0; i < mode_.quantized; ++i) {
      e.q[i].grid = grids_[i];
      e.q[i].out = to.q[i].data() + from;
      e.q[i].stride = stride_ + (i == 0 ? 0 : 5);
    }
    return e;
  }

  Mode mode_;
  size_t outputs_, rows_, stride_, residual_stride_, shift_;
  Guarded<int32_t> offset_;
  Guarded<float> scale_, bias_, residual_;
  Grid grids_[kMaxQuantized];
  Results mine_, want_;
};

}  // namespace
}  // namespace lutra

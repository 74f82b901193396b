// Random changes of the files of a folder, for some seconds: fuzz_mutations FOLDER SECONDS [SEED];
// with 0 seconds the files as they are. Needs no fuzzer. Prints how many files were tried; the last
// one is kept as FOLDER/../last.lutrac, so that after a crash it is there.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "fuzz/compiled.h"

namespace {

using Bytes = std::vector<uint8_t>;
using Random = std::mt19937_64;

constexpr int64_t kNumbers[] = {
    0,   1,   -1,  2,    3,    4,     7,     8,       16,        63,        64,        127,
    128, 255, 256, 4096, 4097, 65535, 65536, 1 << 24, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN};
constexpr double kReals[] = {0.0, -0.0, 1e-310, 1e-30, -1.0, 1e30, 1e300, INFINITY, NAN};

size_t below(Random& r, size_t n) { return static_cast<size_t>(r() % n); }

// Where the description ends.
size_t description(const Bytes& file) {
  uint64_t length = 0;
  if (file.size() >= 24) std::memcpy(&length, file.data() + 16, 8);
  return static_cast<size_t>(std::min<uint64_t>(file.size(), 24 + length));
}

template <class T>
void put(Bytes& file, size_t place, T value) {
  std::memcpy(file.data() + place, &value, std::min(sizeof value, file.size() - place));
}

void change(Bytes& file, const Bytes& other, Random& r) {
  if (file.empty()) return;
  const size_t end = below(r, 8) ? description(file) : file.size();
  const size_t place = below(r, end);
  switch (below(r, 9)) {
    case 0:
      file[place] ^= static_cast<uint8_t>(1 << below(r, 8));
      break;
    case 1:
      file[place] = static_cast<uint8_t>(r());
      break;
    case 2:
      put(file, place, kNumbers[below(r, std::size(kNumbers))]);
      break;
    case 3:
      put(file, place, static_cast<int32_t>(kNumbers[below(r, std::size(kNumbers))]));
      break;
    case 4:
      put(file, place, kReals[below(r, std::size(kReals))]);
      break;
    case 5:
      put(file, place, static_cast<float>(kReals[below(r, std::size(kReals))]));
      break;
    case 6:  // small numbers are the most likely to make sense
      file[place] = static_cast<uint8_t>(file[place] + 1 + below(r, 4) - 2);
      break;
    case 7: {  // a part of this file or another
      const Bytes& from = below(r, 2) ? file : other;
      const size_t start = below(r, from.size()), wanted = 1 + below(r, 64);
      const size_t count = std::min({wanted, from.size() - start, file.size() - place});
      std::memmove(file.data() + place, from.data() + start, count);
      break;
    }
    default:
      if (below(r, 16) == 0) file.resize(place);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: fuzz_mutations FOLDER SECONDS [SEED]\n");
    return 2;
  }
  const std::filesystem::path folder = argv[1];
  const double seconds = std::atof(argv[2]);
  Random random(argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1);
  std::vector<Bytes> corpus;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::ifstream in(entry.path(), std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
  }
  if (corpus.empty()) {
    std::fprintf(stderr, "fuzz_mutations: %s is empty\n", argv[1]);
    return 2;
  }
  const std::filesystem::path last = folder.parent_path() / "last.lutrac";
  long counts[3] = {};
  const auto attempt = [&](const Bytes& file) {
    std::ofstream(last, std::ios::binary)
        .write(reinterpret_cast<const char*>(file.data()),
               static_cast<std::streamsize>(file.size()));
    ++counts[static_cast<int>(try_bytes(file.data(), file.size()))];
  };
  for (size_t i = 0; seconds <= 0 && i < corpus.size(); ++i) attempt(corpus[i]);
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  while (std::chrono::duration<double>(Clock::now() - start).count() < seconds) {
    Bytes file = corpus[below(random, corpus.size())];
    const Bytes& other = corpus[below(random, corpus.size())];
    for (size_t n = 1 + below(random, 4); n > 0; --n) change(file, other, random);
    attempt(file);
  }
  std::printf("%ld refused, %ld opened, %ld ran\n", counts[0], counts[1], counts[2]);
  return 0;
}

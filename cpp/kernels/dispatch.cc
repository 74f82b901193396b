#include "dispatch.h"

#include <cstring>
#include <stdexcept>

#if defined(__x86_64__) || defined(_M_X64)
#ifdef _MSC_VER
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#define LUTRA_X86 1
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include <cstdio>
#define LUTRA_ARM64_LINUX 1
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace lutra {
namespace {

#ifdef LUTRA_X86
struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

#ifdef _MSC_VER
Cpuid cpuid(uint32_t leaf, uint32_t sub = 0) {
  int most[4], r[4];
  __cpuid(most, static_cast<int>(leaf & 0x80000000u));
  if (static_cast<uint32_t>(most[0]) < leaf) return {};
  __cpuidex(r, static_cast<int>(leaf), static_cast<int>(sub));
  return {static_cast<uint32_t>(r[0]), static_cast<uint32_t>(r[1]), static_cast<uint32_t>(r[2]),
          static_cast<uint32_t>(r[3])};
}

uint64_t xcr0() { return _xgetbv(0); }
#else
Cpuid cpuid(uint32_t leaf, uint32_t sub = 0) {
  Cpuid r;
  if (__get_cpuid_max(leaf & 0x80000000u, nullptr) >= leaf) {
    __cpuid_count(leaf, sub, r.eax, r.ebx, r.ecx, r.edx);
  }
  return r;
}

uint64_t xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}
#endif

// Registers whose state the operating system saves (XCR0).
uint64_t saved_registers() {
  return (cpuid(1).ecx & (1u << 27)) ? xcr0() : 0;  // OSXSAVE
}

struct Flags {
  bool avx2, fma, avx512f, avx512dq, avx512bw, avx512vl, vbmi, vbmi2, vnni, gfni;
};

Flags flags() {
  const Cpuid one = cpuid(1), seven = cpuid(7);
  const uint64_t saved = saved_registers();
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
  auto bit = [](uint32_t word, int i) { return ((word >> i) & 1u) != 0; };
  return {.avx2 = ymm && bit(seven.ebx, 5),
          .fma = ymm && bit(one.ecx, 12),
          .avx512f = zmm && bit(seven.ebx, 16),
          .avx512dq = zmm && bit(seven.ebx, 17),
          .avx512bw = zmm && bit(seven.ebx, 30),
          .avx512vl = zmm && bit(seven.ebx, 31),
          .vbmi = zmm && bit(seven.ecx, 1),
          .vbmi2 = zmm && bit(seven.ecx, 6),
          .vnni = zmm && bit(seven.ecx, 11),
          .gfni = zmm && bit(seven.ecx, 8)};
}
#endif

#ifdef LUTRA_ARM64_LINUX
bool has(unsigned long bit) { return (getauxval(AT_HWCAP) & bit) != 0; }

struct Core {
  uint32_t implementer, part;
  const char* name;
};
// Arm's own cores, by the part number in MIDR_EL1 (the technical reference manual of each).
constexpr Core kCores[] = {
    {0x41, 0xd03, "Cortex-A53"},  {0x41, 0xd04, "Cortex-A35"},  {0x41, 0xd05, "Cortex-A55"},
    {0x41, 0xd07, "Cortex-A57"},  {0x41, 0xd08, "Cortex-A72"},  {0x41, 0xd09, "Cortex-A73"},
    {0x41, 0xd0a, "Cortex-A75"},  {0x41, 0xd0b, "Cortex-A76"},  {0x41, 0xd0c, "Neoverse-N1"},
    {0x41, 0xd40, "Neoverse-V1"}, {0x41, 0xd41, "Cortex-A78"},  {0x41, 0xd44, "Cortex-X1"},
    {0x41, 0xd46, "Cortex-A510"}, {0x41, 0xd47, "Cortex-A710"}, {0x41, 0xd49, "Neoverse-N2"},
    {0x41, 0xd4f, "Neoverse-V2"},
};
#endif

}  // namespace

uint32_t cpu_features() {
  uint32_t features = 0;
#ifdef LUTRA_X86
  const Flags f = flags();
  if (f.avx2 && f.fma) features |= kFeatureAvx2;
  if (f.avx2 && f.fma && f.avx512f && f.avx512dq && f.avx512bw && f.avx512vl && f.vbmi && f.vbmi2 &&
      f.vnni && f.gfni) {
    features |= kFeatureAvx512;
  }
#elif defined(LUTRA_ARM64_LINUX)
  if (has(HWCAP_ASIMD)) features |= kFeatureNeon;
  // What the compiler may use of Armv8.2 besides.
  if (has(HWCAP_ASIMDDP) && has(HWCAP_ASIMDRDM) && has(HWCAP_ATOMICS) && has(HWCAP_CRC32)) {
    features |= kFeatureDot;
  }
#elif defined(__aarch64__)
  features |= kFeatureNeon;  // which other systems require
#ifdef __APPLE__
  int dot = 0;  // every Apple core with dot products has the rest of Armv8.2 too
  size_t size = sizeof dot;
  if (sysctlbyname("hw.optional.arm.FEAT_DotProd", &dot, &size, nullptr, 0) == 0 && dot != 0) {
    features |= kFeatureDot;
  }
#endif
#elif defined(__wasm_simd128__)
#ifdef LUTRA_HAVE_WASM_DOT
  features |= kFeatureWasmDot;
#endif
  features |= kFeatureWasm;  // a module that has it is not loaded where it cannot run
#endif
  return features;
}

std::vector<std::string> cpu_feature_names() {
  std::vector<std::string> names;
#ifdef LUTRA_X86
  const Flags f = flags();
  if (f.avx2) names.push_back("avx2");
  if (f.fma) names.push_back("fma");
  if (f.avx512f) names.push_back("avx512f");
  if (f.avx512dq) names.push_back("avx512dq");
  if (f.avx512bw) names.push_back("avx512bw");
  if (f.avx512vl) names.push_back("avx512vl");
  if (f.vbmi) names.push_back("avx512vbmi");
  if (f.vbmi2) names.push_back("avx512vbmi2");
  if (f.vnni) names.push_back("avx512vnni");
  if (f.gfni) names.push_back("gfni");
#else
  const uint32_t features = cpu_features();
  if (features & kFeatureNeon) names.push_back("neon");
  if (features & kFeatureDot) names.push_back("dotprod");
  if (features & kFeatureWasm) names.push_back("simd128");
  if (features & kFeatureWasmDot) names.push_back("relaxed_simd");
#endif
  return names;
}

std::string cpu_model() {
#ifdef LUTRA_X86
  char text[49] = {};
  for (uint32_t i = 0; i < 3; ++i) {
    const Cpuid r = cpuid(0x80000002u + i);
    const uint32_t words[4] = {r.eax, r.ebx, r.ecx, r.edx};
    std::memcpy(text + 16 * i, words, 16);
  }
  std::string model(text);
  const size_t first = model.find_first_not_of(' '), last = model.find_last_not_of(' ');
  return first == std::string::npos ? "unknown" : model.substr(first, last - first + 1);
#elif defined(LUTRA_ARM64_LINUX)
  if (!has(HWCAP_CPUID)) return "unknown";  // the register can be read only with it
  uint64_t id;
  __asm__("mrs %0, midr_el1" : "=r"(id));
  const uint32_t implementer = (id >> 24) & 0xff, part = (id >> 4) & 0xfff;
  for (const Core& core : kCores) {
    if (core.implementer == implementer && core.part == part) return core.name;
  }
  char text[64];
  std::snprintf(text, sizeof text, "AArch64, implementer 0x%02x, part 0x%03x", implementer, part);
  return text;
#elif defined(__aarch64__) && defined(__APPLE__)
  char text[64] = {};
  size_t size = sizeof text - 1;
  return sysctlbyname("machdep.cpu.brand_string", text, &size, nullptr, 0) == 0 ? text : "unknown";
#else
  return "unknown";
#endif
}

bool cpu_is_zen4() {
#ifdef LUTRA_X86
  const Cpuid zero = cpuid(0);
  const bool amd = zero.ebx == 0x68747541 && zero.edx == 0x69746e65 && zero.ecx == 0x444d4163;
  const uint32_t one = cpuid(1).eax;
  const uint32_t family = (one >> 8 & 0xf) + (one >> 20 & 0xff), model = one >> 12 & 0xf0;
  return amd && family == 0x19 &&
         (model == 0x10 || model == 0x60 || model == 0x70 || model == 0xa0);
#else
  return false;
#endif
}

std::vector<const Kernels*> compiled_kernels() {
  std::vector<const Kernels*> all;
#ifndef LUTRA_NO_SCALAR
  all.push_back(&kScalar);
#endif
#ifdef LUTRA_HAVE_AVX2
  all.push_back(&kAvx2);
#endif
#ifdef LUTRA_HAVE_AVX512
  all.push_back(&kAvx512);
#endif
#ifdef LUTRA_HAVE_NEON
  all.push_back(&kNeon);
#endif
#ifdef LUTRA_HAVE_NEON_DOT
  all.push_back(&kNeonDot);
#endif
#ifdef LUTRA_HAVE_WASM
  all.push_back(&kWasm);
#endif
#ifdef LUTRA_HAVE_WASM_DOT
  all.push_back(&kWasmDot);
#endif
  return all;
}

std::vector<const Kernels*> runnable_kernels() {
  static const uint32_t features = cpu_features();
  std::vector<const Kernels*> runnable;
  for (const Kernels* k : compiled_kernels()) {
    if ((k->needs & features) == k->needs) runnable.push_back(k);
  }
  return runnable;
}

const Kernels& find_kernels(const std::string& name) {
  const std::vector<const Kernels*> runnable = runnable_kernels();
  if (name.empty() || name == "auto") return *runnable.back();
  std::string list;
  for (const Kernels* k : runnable) {
    if (name == k->name) return *k;
    list += (list.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument(
      "instruction set '" + name +
      "' cannot run on this machine with this build; choose one of: auto, " + list);
}

}  // namespace lutra

// Several registers at once, for chains of dependent operations: done one after the other for each
// register they fill the scheduler of the CPU with operations that wait. Included by functions.h
// after the lanes of an instruction set: each of their operations takes a Many wherever it takes a
// register, does the same for all of its registers, and gives a Many.
#pragma once

#pragma GCC diagnostic ignored "-Wignored-attributes"  // of registers as template arguments

namespace lutra {
namespace {

template <class T, int kCount>
struct Many {
  T v[kCount];
};

template <class T>
struct CountOf {
  static constexpr int kValue = 0;
};
template <class T, int kCount>
struct CountOf<Many<T, kCount>> {
  static constexpr int kValue = kCount;
};
template <class... T>
constexpr int most() {
  int n = 0;
  ((n = CountOf<T>::kValue > n ? CountOf<T>::kValue : n), ...);
  return n;
}

template <class T>
LUTRA_INLINE const T& part(const T& a, int) {
  return a;
}
template <class T, int kCount>
LUTRA_INLINE const T& part(const Many<T, kCount>& a, int i) {
  return a.v[i];
}

template <class F, class... A>
LUTRA_INLINE auto for_each_part(const F& f, const A&... a) {
  using One = decltype(f(part(a, 0)...));
  if constexpr (most<A...>() == 2) {  // written out: arrays stay in registers
    return Many<One, 2>{{f(part(a, 0)...), f(part(a, 1)...)}};
  } else {
    return Many<One, 4>{{f(part(a, 0)...), f(part(a, 1)...), f(part(a, 2)...), f(part(a, 3)...)}};
  }
}

#define LUTRA_MANY(operation)                                                                      \
  template <class... A>                                                                            \
    requires(most<A...>() > 0)                                                                     \
  LUTRA_INLINE auto operation(const A&... a) {                                                     \
    return for_each_part([](const auto&... one) LUTRA_LAMBDA { return operation(one...); }, a...); \
  }
#define LUTRA_MANY_SHIFT(operation)                                                           \
  template <int kBits, class T, int kCount>                                                   \
  LUTRA_INLINE auto operation(const Many<T, kCount>& a) {                                     \
    return for_each_part([](const T& one) LUTRA_LAMBDA { return operation<kBits>(one); }, a); \
  }
#define LUTRA_LAMBDA __attribute__((always_inline))

LUTRA_MANY(add)
LUTRA_MANY(sub)
LUTRA_MANY(mul)
LUTRA_MANY(div)
LUTRA_MANY(fmadd)
LUTRA_MANY(fnmadd)
LUTRA_MANY(minimum)
LUTRA_MANY(maximum)
LUTRA_MANY(root)
LUTRA_MANY(bits)
LUTRA_MANY(floats)
LUTRA_MANY(both)
LUTRA_MANY(either)
LUTRA_MANY(lesser)
LUTRA_MANY(less)
LUTRA_MANY(at_least)
LUTRA_MANY(unordered)
LUTRA_MANY(choose)
LUTRA_MANY(zero_where)
LUTRA_MANY(with_bit)
LUTRA_MANY(scale)
LUTRA_MANY(scale_gradual)
LUTRA_MANY(floor_of)
LUTRA_MANY(floor_ints)
LUTRA_MANY(at)
LUTRA_MANY(at_last)
LUTRA_MANY_SHIFT(shift_left)
LUTRA_MANY_SHIFT(shift_right)

}  // namespace
}  // namespace lutra

// Vectors of float32 whose lanes are channels: one source for every instruction set.
//
// One translation unit for each instruction set includes this file. The unit defines LANES (4, 8 or 16) and is compiled
// with the flags of its set. Everything here is in an unnamed namespace: the linker would merge an inline function that
// two units share, and might keep the one with instructions that the machine lacks.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define NOINLINE __attribute__((noinline))

namespace {

constexpr int BLOCK = 16;  // channels that are worked on together: one cache line of float32
constexpr int GROUPS = BLOCK / LANES;

typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
// V and H at any address
typedef float VU __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t HU __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
INLINE V all(float a) { return V{} + a; }
// floor where v is smaller, else v; NaN stays
INLINE V at_least(V floor, V v) { return floor > v ? floor : v; }

INLINE bool is_zero(V v) {
  bool zero = true;
  for (int i = 0; i < LANES; i++) zero = zero && v[i] == 0;
  return zero;
}

// Calls f with the integral constants 0 .. N-1: a loop that is unrolled by construction.
template <int... I, typename F>
INLINE void each(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
INLINE void unrolled(F&& f) {
  each(std::make_integer_sequence<int, N>{}, f);
}

// Transposes LANES vectors in place, by exchanging ever larger blocks across the diagonal.
template <int D, int... J>
INLINE void exchange(V& a, V& b, std::integer_sequence<int, J...>) {
  const V low = __builtin_shufflevector(a, b, (J & D ? J - D + LANES : J)...);
  b = __builtin_shufflevector(a, b, (J & D ? J + LANES : J + D)...);
  a = low;
}
INLINE void transpose(V (&rows)[LANES]) {
  unrolled<4>([&](auto step) INLINE_LAMBDA {
    constexpr int D = 1 << step;
    if constexpr (D < LANES) {
      unrolled<LANES>([&](auto i) INLINE_LAMBDA {
        if constexpr (!(i & D)) exchange<D>(rows[i], rows[i + D], std::make_integer_sequence<int, LANES>{});
      });
    }
  });
}

}  // namespace

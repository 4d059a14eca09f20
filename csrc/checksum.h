// A 64-bit checksum at the speed of memory. It tells whether prepared weights belong to the given weights.
#pragma once

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef uint64_t W __attribute__((vector_size(4 * LANES)));

// the product of the two 32-bit halves of each 64-bit word
INLINE W product_of_halves(W a) {
#if LANES == 16
  return (W)_mm512_mul_epu32((__m512i)a, _mm512_shuffle_epi32((__m512i)a, _MM_PERM_CDAB));
#elif LANES == 8
  return (W)_mm256_mul_epu32((__m256i)a, _mm256_shuffle_epi32((__m256i)a, 0xb1));
#elif defined(__x86_64__)
  return (W)_mm_mul_epu32((__m128i)a, _mm_shuffle_epi32((__m128i)a, 0xb1));
#else
  return (a & 0xffffffffu) * (a >> 32);
#endif
}

constexpr uint64_t scrambled(uint64_t a) {  // the finaliser of SplitMix64
  a = (a ^ (a >> 30)) * 0xbf58476d1ce4e5b9;
  a = (a ^ (a >> 27)) * 0x94d049bb133111eb;
  return a ^ (a >> 31);
}

// Sums the products of neighbouring 32-bit words, each plus a key of its place (the NH hash of Black et al., UMAC,
// 1999). Another sum takes the words themselves, so that a change of one word is always seen. The keys repeat every
// STRETCH bytes, and the state is scrambled after each stretch.
NOINLINE uint64_t checksum(const char* data, int64_t bytes) {
  constexpr int STATES = 2, WORDS = LANES / 2, STEP = STATES * 4 * LANES, STRETCH = 2048;
  struct Keys {
    alignas(64) uint64_t k[STRETCH / 8];
    constexpr Keys() : k() {
      for (int i = 0; i < STRETCH / 8; i++) k[i] = scrambled(0x9e3779b97f4a7c15u * (i + 1));
    }
  };
  static constexpr Keys keys;
  constexpr W multiplier = W{} + 0xd6e8feb86659fd93u;
  W state[STATES] = {W{} + 1, W{} + 2};
  char padded[STRETCH];
  uint64_t sum = scrambled(bytes);
  for (; bytes > 0; bytes -= STRETCH, data += STRETCH) {
    if (bytes < STRETCH) {
      memset(padded, 0, STRETCH);
      data = static_cast<const char*>(memcpy(padded, data, bytes));
    }
    const W* key = reinterpret_cast<const W*>(keys.k);
    for (int i = 0; i < STRETCH; i += STEP, key += STATES) {
      unrolled<STATES>([&](auto l) INLINE_LAMBDA {
        W x;
        memcpy(&x, data + i + l * sizeof(W), sizeof x);
        state[l] += product_of_halves(x + key[l]);
        state[l ^ 1] += x;
      });
    }
    unrolled<STATES>([&](auto l) INLINE_LAMBDA {
      state[l] = product_of_halves(state[l] ^ multiplier) + (state[l] << 29 | state[l] >> 35);
    });
  }
  for (int l = 0; l < STATES; l++) {
    for (int i = 0; i < WORDS; i++) sum = scrambled(sum + state[l][i]);
  }
  return sum;
}

}  // namespace

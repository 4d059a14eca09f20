// Copies rows of a block of 16 channels between memory of any layout and type and lines of packed float32.
//
// A line is [pixel][BLOCK] float32. Channels that the tensor lacks are read as zeros, and are not written.
#pragma once

#include "replknet.h"
#include "simd.h"

namespace {

INLINE U bits(V v) { return (U)v; }
INLINE V from_bits(U u) { return (V)u; }
INLINE U widened(H h) { return __builtin_convertvector(h, U); }
INLINE H narrowed(U u) { return __builtin_convertvector(u, H); }

struct Float32 {
  typedef float T;
  static INLINE V load(const T* p) { return ::load(p); }
  static INLINE void store(T* p, V v) { ::store(p, v); }
};

struct BFloat16 {
  typedef uint16_t T;
  static INLINE V load(const T* p) { return from_bits(widened(*reinterpret_cast<const HU*>(p)) << 16); }
  static INLINE void store(T* p, V v) {
    const U u = bits(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
    const U is_nan = (U)(v != v);
    *reinterpret_cast<HU*>(p) = narrowed((rounded & ~is_nan) | (((u >> 16) | 0x40) & is_nan));
  }
};

struct Float16 {
  typedef uint16_t T;
  static INLINE V load(const T* p) {
    const U h = widened(*reinterpret_cast<const HU*>(p)), magnitude = (h & 0x7fff) << 13;
    const U is_special = (U)((h & 0x7c00) == 0x7c00);
    // the exponent's bias differs by 112; subnormals come out right, since the product is exact
    const U value = bits(from_bits(magnitude) * 0x1p112f);
    return from_bits((value & ~is_special) | ((magnitude | 0x7f800000) & is_special) | ((h & 0x8000) << 16));
  }
  static INLINE void store(T* p, V v) {
    const U u = bits(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    // normal results: rebias and round in integers; an overflow carries into infinity
    const U normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // results below 2^-14: adding 1/2 lines the bits up, rounded by the hardware
    const U small = bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    const U is_small = (U)(magnitude < 0x38800000), is_large = (U)(magnitude >= 0x477ff000);
    const U is_nan = (U)(magnitude > 0x7f800000);
    U h = (small & is_small) | (normal & ~is_small);
    h = (h & ~is_large) | (0x7c00 & is_large);
    h = (h & ~is_nan) | (0x7e00 & is_nan);
    *reinterpret_cast<HU*>(p) = narrowed(h | sign);
  }
};

// where a block of channels of one image (or of the weights) lies, strides in elements
struct Plane {
  char* base;
  int64_t channel, row, pixel;
  int channels;  // channels of the block that exist
  int dtype;
};

template <typename E>
INLINE typename E::T* address(const Plane& p, int64_t row, int64_t pixel) {
  return reinterpret_cast<typename E::T*>(p.base) + row * p.row + pixel * p.pixel;
}

// Elements to prefetch ahead: the channels of contiguous rows are more streams than processors prefetch themselves.
constexpr int AHEAD = 3 * BLOCK;

// Where a vector of a line starts: the last vector is a whole one that overlaps the vector before it.
INLINE int vector_at(int next, int count) { return next + LANES > count && count > LANES ? count - LANES : next; }

template <typename E>
NOINLINE void read_line_as(const Plane& plane, int64_t row, int64_t first, int count, float* line) {
  typedef typename E::T T;
  const T* from = address<E>(plane, row, first);
  if (plane.pixel != 1 || plane.channel == 1) {  // channels_last
    for (int p = 0; p < count; p++, from += plane.pixel, line += BLOCK) {
      T padded[BLOCK] = {};
      const T* pixel = from;
      if (plane.channels < BLOCK) {
        memcpy(padded, from, plane.channels * sizeof(T));
        pixel = padded;
      }
      for (int g = 0; g < GROUPS; g++) store(line + LANES * g, E::load(pixel + LANES * g));
    }
    return;
  }
  for (int g = 0; g < GROUPS; g++) {
    const int channels = plane.channels - LANES * g;
    for (int next = 0; next < count; next += LANES) {
      const int p = vector_at(next, count);
      V rows[LANES];
      for (int i = 0; i < LANES; i++) {
        const T* source = from + (LANES * g + i) * plane.channel + p;
        T padded[LANES] = {};
        if (i >= channels) {
          source = padded;
        } else if (p + LANES > count) {
          memcpy(padded, source, (count - p) * sizeof(T));
          source = padded;
        }
        __builtin_prefetch(from + (LANES * g + i) * plane.channel + p + AHEAD);
        rows[i] = E::load(source);
      }
      transpose(rows);
      const int n = count - p < LANES ? count - p : LANES;
      for (int i = 0; i < n; i++) store(line + (p + i) * BLOCK + LANES * g, rows[i]);
    }
  }
}

template <typename E>
NOINLINE void write_line_as(const Plane& plane, int64_t row, int64_t first, int count, const float* line) {
  typedef typename E::T T;
  T* to = address<E>(plane, row, first);
  if (plane.pixel != 1 || plane.channel == 1) {
    for (int p = 0; p < count; p++, to += plane.pixel, line += BLOCK) {
      if (plane.channels == BLOCK) {
        for (int g = 0; g < GROUPS; g++) E::store(to + LANES * g, load(line + LANES * g));
      } else {
        T padded[BLOCK];
        for (int g = 0; g < GROUPS; g++) E::store(padded + LANES * g, load(line + LANES * g));
        memcpy(to, padded, plane.channels * sizeof(T));
      }
    }
    return;
  }
  for (int g = 0; g < GROUPS; g++) {
    int channels = plane.channels - LANES * g;
    if (channels > LANES) channels = LANES;
    for (int next = 0; next < count; next += LANES) {
      const int p = vector_at(next, count);
      const int n = count - p < LANES ? count - p : LANES;
      V rows[LANES];
      for (int i = 0; i < LANES; i++) rows[i] = i < n ? load(line + (p + i) * BLOCK + LANES * g) : V{};
      transpose(rows);
      for (int i = 0; i < channels; i++) {
        T* target = to + (LANES * g + i) * plane.channel + p;
        __builtin_prefetch(target + AHEAD, 1);
        if (n == LANES) {
          E::store(target, rows[i]);
        } else {
          T padded[LANES];
          E::store(padded, rows[i]);
          memcpy(target, padded, n * sizeof(T));
        }
      }
    }
  }
}

INLINE void read_line(const Plane& plane, int64_t row, int64_t first, int count, float* line) {
  if (plane.dtype == RK_FLOAT32) return read_line_as<Float32>(plane, row, first, count, line);
  if (plane.dtype == RK_FLOAT16) return read_line_as<Float16>(plane, row, first, count, line);
  return read_line_as<BFloat16>(plane, row, first, count, line);
}
INLINE void write_line(const Plane& plane, int64_t row, int64_t first, int count, const float* line) {
  if (plane.dtype == RK_FLOAT32) return write_line_as<Float32>(plane, row, first, count, line);
  if (plane.dtype == RK_FLOAT16) return write_line_as<Float16>(plane, row, first, count, line);
  return write_line_as<BFloat16>(plane, row, first, count, line);
}

// How many rows can be read and written as one line of at most MOST_PIXELS: several, if they follow one another in
// memory. Then a row of 14 pixels or 13 taps does not end in half a vector.
constexpr int MOST_PIXELS = 256;
INLINE int rows_at_once(const Plane& p, int columns) {
  return p.pixel == 1 && p.row == columns && columns < MOST_PIXELS ? MOST_PIXELS / columns : 1;
}

// Reads rows through a buffer of MOST_PIXELS, and calls f(row, line) for each; rows count from 0.
template <typename F>
INLINE void read_rows(const Plane& plane, int64_t first, int rows, int64_t left, int columns, float* buffer, F f) {
  const int at_once = rows_at_once(plane, columns);
  for (int r = 0; r < rows; r++) {
    const int more = rows - r < at_once ? rows - r : at_once;
    if (r % at_once == 0) read_line(plane, first + r, left, more * columns, buffer);
    f(r, buffer + BLOCK * columns * (r % at_once));
  }
}

// Writes rows through a buffer of MOST_PIXELS, which f(row, line) fills; rows count from 0.
template <typename F>
INLINE void write_rows(const Plane& plane, int64_t first, int rows, int64_t left, int columns, float* buffer, F f) {
  const int at_once = rows_at_once(plane, columns);
  for (int r = 0; r < rows; r++) {
    const int i = r % at_once;
    f(r, buffer + BLOCK * columns * i);
    if (i == at_once - 1 || r == rows - 1) write_line(plane, first + r - i, left, (i + 1) * columns, buffer);
  }
}

// whether a line can be read and written where it lies
INLINE bool is_packed(const Plane& p) { return p.dtype == RK_FLOAT32 && p.channel == 1 && p.channels == BLOCK; }

}  // namespace

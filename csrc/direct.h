// The convolution as sums of products, for small kernels and small maps.
//
// There are two forms. `tile` keeps T neighbouring outputs in registers while the taps go by; a line has zeros at both
// ends. `dense` is for maps so narrow that each output of a row sees every input of a row. The whole row stays in
// registers, and no padding is multiplied.
#pragma once

#include "spectral.h"

namespace {

constexpr int WIDEST = 14;  // outputs in registers: two of the 16 registers are left for a tap and an input

// Hides from the compiler that neighbouring steps of a loop load the same values. Otherwise it would keep these values
// in registers from step to step, and the sums in memory.
INLINE const float* forgotten(const float* p) {
  asm("" : "+r"(p));
  return p;
}

struct TileArgs {
  const float* lines;  // at the first input row and the first output, of a group of channels
  int64_t pitch;       // floats from line to line
  int rows;            // input rows that the outputs see
  int before, after;   // of a pair of output rows: input rows that only the first sees, and only the second
  const float* taps;   // [row][column][LANES], from the row that meets the first line
  int columns;         // of the taps
  V bias, floor;
  float* y;
  int64_t stride, y_row;  // floats from output to output, and from row to row
  int outputs;            // to be stored
};

template <int T>
NOINLINE void tile(const TileArgs& a) {
  V sum[T] = {};
  const float* tap = a.taps;
  for (int r = 0; r < a.rows; r++) {
    const float* x = a.lines + r * a.pitch;
    for (int j = 0; j < a.columns; j++, x += BLOCK, tap += LANES) {
      x = forgotten(x);
      const V w = load(tap);
      unrolled<T>([&](auto t) INLINE_LAMBDA { sum[t] += w * load(x + BLOCK * t); });
    }
  }
  float* const y = a.y;
  const int64_t stride = a.stride;
  // the bias is added last: added first, it would take part in the rounding of each step
  const V floor = a.floor, bias = a.bias;
  if (a.outputs == T) {
    unrolled<T>([&](auto t) INLINE_LAMBDA { store(y + t * stride, at_least(floor, sum[t] + bias)); });
    return;
  }
  const int outputs = a.outputs;
  unrolled<T>([&](auto t) INLINE_LAMBDA {
    if (t < outputs) store(y + t * stride, at_least(floor, sum[t] + bias));
  });
}

// adds the products of an input row to the output rows FIRST to LAST; for output row 0 it meets the tap row `taps`
template <int FIRST, int LAST, int W, int R>
INLINE void dense_row(const float* x, const float* taps, int64_t taps_row, V (&sum)[R][W]) {
  unrolled<W>([&](auto j) INLINE_LAMBDA {
    const V in = load(x + BLOCK * j);
    unrolled<R>([&](auto r) INLINE_LAMBDA {
      if constexpr (FIRST <= r && r <= LAST) {
        unrolled<W>([&](auto t)
                        INLINE_LAMBDA { sum[r][t] += in * load(taps - r * taps_row + (W - 1 + j - t) * LANES); });
      }
    });
    barrier();  // else all taps of the row are loaded ahead, and spilled
  });
}

// R rows of W outputs; for the first of these rows, the first line meets the tap row `taps`
template <int W, int R>
NOINLINE void dense(const TileArgs& a) {
  V sum[R][W] = {};
  const int64_t row = static_cast<int64_t>(a.columns) * LANES;
  const auto line = [&](int i) INLINE_LAMBDA { return a.lines + i * a.pitch; };
  const int both = R == 1 ? 0 : a.before, second = R == 1 ? a.rows : a.rows - a.after;
  if constexpr (R > 1) {
    for (int i = 0; i < both; i++) dense_row<0, 0>(line(i), a.taps + i * row, row, sum);
  }
  for (int i = both; i < second; i++) dense_row<0, R - 1>(line(i), a.taps + i * row, row, sum);
  if constexpr (R > 1) {
    for (int i = second; i < a.rows; i++) dense_row<1, 1>(line(i), a.taps + i * row, row, sum);
  }
  unrolled<R>([&](auto r) INLINE_LAMBDA {
    unrolled<W>([&](auto t)
                    INLINE_LAMBDA { store(a.y + r * a.y_row + t * a.stride, at_least(a.floor, sum[r][t] + a.bias)); });
  });
}

typedef void Tile(const TileArgs&);
template <int... I>
constexpr Tile* tile_of(std::integer_sequence<int, I...>, int n) {
  constexpr Tile* all[] = {tile<I + 1>...};
  return all[n - 1];
}
template <int... I>
constexpr Tile* dense_of(std::integer_sequence<int, I...>, int n) {
  constexpr Tile* all[] = {dense<I + 1, 1>...};
  return all[n - 1];
}
template <int... I>
constexpr Tile* dense_pair_of(std::integer_sequence<int, I...>, int n) {
  constexpr Tile* all[] = {dense<I + 1, 2>...};
  return all[n - 1];
}

INLINE bool is_dense(const Axis& width) { return width.size <= WIDEST && width.reach == width.size - 1; }
// outputs of a tile: the tiles are equal, and as few as the registers allow
INLINE int tile_outputs(int64_t n) {
  const int64_t tiles = (n + WIDEST - 1) / WIDEST;
  return static_cast<int>((n + tiles - 1) / tiles);
}
// pixels of a packed line, with zeros at both ends and the pixels that the last tile reads in vain
INLINE int64_t line_pixels(int64_t pixels, int reach) { return pixels + 2 * reach + WIDEST; }

// A buffer at the start of the workspace: rows of images and of taps are packed, and results gathered, through it.
INLINE int64_t buffer_floats(const Axis& width) { return BLOCK * (line_pixels(width.size, width.reach) + MOST_PIXELS); }

// Writes the taps of a block as [group][row][column][LANES]. False if products with the padding would not be zeros.
NOINLINE bool prepare_direct(const Job& job, int64_t block, float* buffer) {
  const Axis &height = job.height, &width = job.width;
  const Plane plane = weight_plane(job, job.weight, block);
  float* prepared = job.run.prepared + block * BLOCK * height.side * width.side;
  V spoiled = {};  // a finite number minus itself is zero; NaN and infinity give NaN
  read_rows(plane, height.skipped, height.side, width.skipped, width.side, buffer, [&](int j, const float* line) {
    const int row = job.call.rotated ? height.side - 1 - j : j;
    for (int g = 0; g < GROUPS; g++) {
      float* taps = prepared + (static_cast<int64_t>(g) * height.side + row) * width.side * LANES;
      for (int i = 0; i < width.side; i++) {
        const int column = job.call.rotated ? width.side - 1 - i : i;
        const V tap = load(line + BLOCK * i + LANES * g);
        spoiled += tap - tap;
        store(taps + column * LANES, tap);
      }
    }
  });
  return is_dense(width) || is_zero(spoiled);
}

// Packs rows [top, top + rows) with `reach` zeros at both ends of each.
NOINLINE void pack_rows(const Plane& plane, int64_t top, int64_t rows, int64_t pixels, int reach, int64_t pitch,
                        float* buffer, float* lines) {
  const int columns = static_cast<int>(pixels);
  for (int64_t r = 0; r < rows; r++) {
    float* line = lines + r * pitch;
    memset(line, 0, sizeof(float) * BLOCK * reach);
    memset(line + BLOCK * (reach + pixels), 0, sizeof(float) * BLOCK * reach);
    if (rows_at_once(plane, columns) == 1) read_line(plane, top + r, 0, columns, line + BLOCK * reach);
  }
  if (rows_at_once(plane, columns) == 1) return;
  read_rows(plane, top, static_cast<int>(rows), 0, columns, buffer, [&](int r, const float* line) {
    memcpy(lines + r * pitch + BLOCK * reach, line, sizeof(float) * BLOCK * pixels);
  });
}

NOINLINE void forward_direct(const Job& job, int64_t block, int64_t image, int64_t strip, float* memory) {
  const Axis &height = job.height, &width = job.width;
  const int64_t h = height.size, w = width.size, top = strip * height.tile;
  const int64_t bottom = top + height.tile < h ? top + height.tile : h;
  const int64_t first = top > height.reach ? top - height.reach : 0;
  const int64_t last = bottom + height.reach < h ? bottom + height.reach : h;
  const bool narrow = is_dense(width);
  const int reach = narrow ? 0 : width.reach;
  const int64_t pitch = BLOCK * line_pixels(w, reach);
  float* buffer = memory;
  float* lines = buffer + buffer_floats(width);
  pack_rows(image_plane(job, job.x, image, block), first, last - first, w, reach, pitch, buffer, lines);
  const Plane plane = image_plane(job, job.y, image, block);
  const bool in_place = is_packed(plane);
  V bias[GROUPS];
  block_bias(job, block, bias);
  TileArgs a;
  a.pitch = pitch, a.columns = width.side;
  a.floor = all(job.relu ? 0.0f : -__builtin_inff());
  const int64_t taps_row = static_cast<int64_t>(width.side) * LANES;
  const float* prepared = job.run.prepared + block * BLOCK * height.side * width.side;
  // two rows at once where both fit the registers: one row alone would wait for its sums
  const bool pairs = narrow && 2 * w <= WIDEST;
  const int step = narrow ? static_cast<int>(w) : tile_outputs(w);
  constexpr auto sizes = std::make_integer_sequence<int, WIDEST>{};
  const int at_once = rows_at_once(plane, static_cast<int>(w));
  for (int64_t r = top; r < bottom;) {
    const int64_t gathered = (r - top) % at_once;  // rows in the buffer that are not yet written
    float* line = buffer + BLOCK * w * gathered;
    const bool pair = pairs && r + 1 < bottom && (in_place || gathered + 1 < at_once);
    const int64_t last_row = pair ? r + 1 : r;
    const int64_t from = r > height.reach ? r - height.reach : 0;
    const int64_t until = last_row + height.reach + 1 < h ? last_row + height.reach + 1 : h;
    a.rows = static_cast<int>(until - from);
    a.before = r >= height.reach, a.after = until == last_row + height.reach + 1;
    a.y_row = in_place ? plane.row : BLOCK * w;
    Tile* const run = pair     ? dense_pair_of(std::make_integer_sequence<int, WIDEST / 2>{}, step)
                      : narrow ? dense_of(sizes, step)
                               : tile_of(sizes, step);
    for (int g = 0; g < GROUPS; g++) {
      a.bias = bias[g];
      a.taps = prepared + (g * height.side + from - r + height.reach) * taps_row;
      for (int64_t left = 0; left < w; left += step) {
        a.lines = lines + (from - first) * pitch + left * BLOCK + LANES * g;
        a.outputs = static_cast<int>(w - left < step ? w - left : step);
        if (in_place) {
          a.y = address<Float32>(plane, r, left) + LANES * g, a.stride = plane.pixel;
        } else {
          a.y = line + left * BLOCK + LANES * g, a.stride = BLOCK;
        }
        run(a);
      }
    }
    const int64_t in_buffer = last_row + 1 - (r - gathered);
    if (!in_place && (in_buffer == at_once || last_row == bottom - 1)) {
      write_line(plane, r - gathered, 0, static_cast<int>(in_buffer * w), buffer);
    }
    r = last_row + 1;
  }
}

// sums[t] += sum over j of dy[j] x[j + t], for T taps of a kernel row
template <int T>
NOINLINE void add_products(const float* dy, const float* x, int64_t pitch_y, int64_t pitch_x, int rows, int pixels,
                           float* sums) {
  V sum[T] = {};
  for (int r = 0; r < rows; r++, dy += pitch_y, x += pitch_x) {
    for (int j = 0; j < pixels; j++) {
      const V g = load(dy + BLOCK * j);
      unrolled<T>([&](auto t) INLINE_LAMBDA { sum[t] += g * load(x + BLOCK * (j + t)); });
    }
  }
  unrolled<T>([&](auto t) INLINE_LAMBDA { store(sums + BLOCK * t, load(sums + BLOCK * t) + sum[t]); });
}
typedef void AddProducts(const float*, const float*, int64_t, int64_t, int, int, float*);
template <int... I>
constexpr AddProducts* add_products_of(std::integer_sequence<int, I...>, int n) {
  constexpr AddProducts* all[] = {add_products<I + 1>...};
  return all[n - 1];
}

// As add_products, for all 2 W - 1 taps of a kernel row on maps that are W pixels wide: no padding is multiplied.
template <int W>
NOINLINE void add_all_products(const float* dy, const float* x, int64_t pitch_y, int64_t pitch_x, int rows, int,
                               float* sums) {
  V sum[2 * W - 1] = {};
  for (int r = 0; r < rows; r++, dy += pitch_y, x += pitch_x) {
    unrolled<W>([&](auto j) INLINE_LAMBDA {
      const V g = load(dy + BLOCK * j);
      unrolled<W>([&](auto t) INLINE_LAMBDA { sum[t - j + W - 1] += g * load(x + BLOCK * (W - 1 + t)); });
      barrier();
    });
  }
  unrolled<2 * W - 1>([&](auto t) INLINE_LAMBDA { store(sums + BLOCK * t, load(sums + BLOCK * t) + sum[t]); });
}
constexpr int WIDEST_ALL = WIDEST / 2;  // 2 W - 1 sums are in registers
template <int... I>
constexpr AddProducts* add_all_products_of(std::integer_sequence<int, I...>, int n) {
  constexpr AddProducts* all[] = {add_all_products<I + 1>...};
  return all[n - 1];
}

// Writes dw of a block. Partial sums of about a hundred products limit the rounding errors of long sums. False if
// products with the padding may not have been zeros.
NOINLINE bool backward_direct(const Job& job, int64_t block, float* memory) {
  const Axis &height = job.height, &width = job.width;
  const int64_t h = height.size, w = width.size;
  const bool narrow = is_dense(width) && w <= WIDEST_ALL;
  const int step = narrow ? width.side : tile_outputs(width.side);
  const int64_t pitch_x = BLOCK * line_pixels(w, width.reach), pitch_y = BLOCK * line_pixels(w, 0);
  const int64_t sums_row = BLOCK * (width.side + WIDEST);
  float* buffer = memory;
  float* sums = buffer + buffer_floats(width);
  float* xs = sums + height.side * sums_row;
  float* dys = xs + (height.tile + 2 * height.reach) * pitch_x;
  memset(sums, 0, sizeof(float) * height.side * sums_row);
  AddProducts* const add = narrow
                               ? add_all_products_of(std::make_integer_sequence<int, WIDEST_ALL>{}, static_cast<int>(w))
                               : add_products_of(std::make_integer_sequence<int, WIDEST>{}, step);
  const int64_t together = w < 96 ? 96 / w : 1;  // rows of a partial sum
  for (int64_t image = 0; image < job.call.n; image++) {
    const Plane x = image_plane(job, job.x, image, block), dy = image_plane(job, job.dy, image, block);
    for (int64_t top = 0; top < h; top += height.tile) {
      const int64_t bottom = top + height.tile < h ? top + height.tile : h;
      const int64_t first = top > height.reach ? top - height.reach : 0;
      const int64_t last = bottom + height.reach < h ? bottom + height.reach : h;
      pack_rows(x, first, last - first, w, width.reach, pitch_x, buffer, xs);
      pack_rows(dy, top, bottom - top, w, 0, pitch_y, buffer, dys);
      for (int j = 0; j < height.side; j++) {
        const int64_t shift = j - height.reach;  // row of x that meets row 0 of dy
        const int64_t from = top + shift < 0 ? -shift : top, until = bottom + shift > h ? h - shift : bottom;
        for (int64_t r = from; r < until; r += together) {
          const int rows = static_cast<int>(until - r < together ? until - r : together);
          for (int i = 0; i < width.side; i += step) {
            for (int g = 0; g < GROUPS; g++) {
              add(dys + (r - top) * pitch_y + LANES * g, xs + (r + shift - first) * pitch_x + BLOCK * i + LANES * g,
                  pitch_y, pitch_x, rows, static_cast<int>(w), sums + j * sums_row + BLOCK * i + LANES * g);
            }
          }
        }
      }
    }
  }
  const Plane plane = weight_plane(job, job.dw, block);
  write_rows(plane, height.skipped, height.side, width.skipped, width.side, buffer,
             [&](int j, float* line) { memcpy(line, sums + j * sums_row, sizeof(float) * BLOCK * width.side); });
  V spoiled = {};
  for (int j = 0; j < height.side; j++) {
    for (int i = 0; i < GROUPS * width.side; i++) {
      const V sum = load(sums + j * sums_row + LANES * i);
      spoiled += sum - sum;
    }
  }
  return narrow || is_zero(spoiled);
}

}  // namespace

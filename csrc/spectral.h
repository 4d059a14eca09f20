// The convolution through two-dimensional real Fourier transforms, a block of channels of one tile at a time.
//
// Rows are transformed first (real, L/2 + 1 bins), then for each bin the column through all rows. Between the two steps
// of its transform a column is multiplied by the spectrum of the weights. It is transformed back at once, so the
// spectrum of the image is never stored. Spectra lie as [group][bin][k1][k2], in the order of their use.
#pragma once

#include "fft.h"
#include "job.h"
#include "lines.h"

namespace {

INLINE int element_size(int dtype) { return dtype == RK_FLOAT32 ? 4 : 2; }

INLINE int channels_of(const Job& job, int64_t block) {
  const int64_t left = job.call.c - BLOCK * block;
  return left < BLOCK ? static_cast<int>(left) : BLOCK;
}

// the block of an image tensor
INLINE Plane image_plane(const Job& job, const char* tensor, int64_t image, int64_t block) {
  const rk_call& q = job.call;
  const int64_t pixels = q.h * q.w, first = BLOCK * block;
  const int64_t offset = image * q.c * pixels + first * (q.channels_last ? 1 : pixels);
  Plane p;
  p.base = const_cast<char*>(tensor) + offset * element_size(q.dtype);
  p.channel = q.channels_last ? 1 : pixels;
  p.pixel = q.channels_last ? q.c : 1;
  p.row = q.w * p.pixel;
  p.channels = channels_of(job, block);
  p.dtype = q.dtype;
  return p;
}

// the block of the weights or of their gradient
INLINE Plane weight_plane(const Job& job, const char* tensor, int64_t block) {
  const rk_call& q = job.call;
  const int64_t taps = static_cast<int64_t>(q.kh) * q.kw;
  Plane p;
  p.base = const_cast<char*>(tensor) + BLOCK * block * taps * element_size(q.dtype);
  p.channel = taps, p.row = q.kw, p.pixel = 1;
  p.channels = channels_of(job, block);
  p.dtype = q.dtype;
  return p;
}

INLINE void block_bias(const Job& job, int64_t block, V (&bias)[GROUPS]) {
  float line[BLOCK] = {};
  if (job.bias) {
    Plane p;
    p.base = const_cast<char*>(job.bias) + BLOCK * block * element_size(job.call.dtype);
    p.channel = 1, p.row = 0, p.pixel = BLOCK, p.channels = channels_of(job, block), p.dtype = job.call.dtype;
    read_line(p, 0, 0, 1, line);
  }
  for (int g = 0; g < GROUPS; g++) bias[g] = load(line + LANES * g);
}

// A tile whose rows are transformed: [group][bin][row], re and im.
struct Bins {
  V* data;
  int count;      // bins a row
  int64_t pitch;  // vectors from bin to bin
  INLINE V* column(int group, int bin) const { return data + (group * count + bin) * pitch; }
};

// Groups of a block that are worked on together. All of them read memory by whole cache lines. One at a time is better
// if pixels lie packed, and the bins of one group, but not of all groups, fit the first-level cache.
struct Groups {
  int first, last;
};
INLINE int groups_together(const Bins& bins, const Plane& plane) {
  constexpr int64_t L1 = 24 << 10;
  const int64_t bytes = bins.count * bins.pitch * sizeof(V);
  return is_packed(plane) && bytes <= L1 && bytes * GROUPS > L1 ? 1 : GROUPS;
}

// odd, so that equal rows of neighbouring bins do not fall into the same cache set
INLINE int64_t bins_pitch(int rows) { return 2 * (rows | 1); }
INLINE Bins take_bins(const Axis& width, int rows, V*& memory) {
  const int count = width.length / 2 + 1;
  Bins b = {memory, count, bins_pitch(rows)};
  memory += GROUPS * count * b.pitch;
  return b;
}

// Whether the pixels of a row push one another out of the first-level cache (64 sets of 8 lines). If a large power of
// two divides their distance, they fall into few sets.
INLINE bool crowded(const Plane& plane, int columns) {
  const int64_t bytes = plane.pixel * 4, apart = bytes & -bytes;  // the largest power of two that divides bytes
  const int64_t sets = apart >= 4096 ? 1 : 4096 / apart;
  return columns > 8 * sets;
}

// Copies the groups of `count` pixels, and prefetches pixels `ahead` floats further on into the second-level cache.
INLINE void copy_groups(const float* from, int64_t stride_from, float* to, int64_t stride_to, int count, Groups groups,
                        int64_t ahead) {
  for (int p = 0; p < count; p++, from += stride_from, to += stride_to) {
    if (ahead) __builtin_prefetch(from + ahead, 0, 2);
    for (int g = groups.first; g < groups.last; g++) store(to + LANES * g, load(from + LANES * g));
  }
}

// Spectra that the columns need: they are prefetched while rows are transformed. The weights of a network are mostly in
// memory, and short columns of 16 lanes would wait for their spectra. Longer columns and fewer lanes would not wait.
struct Later {
  const char* data = nullptr;
  int64_t bytes = 0;
  Later() = default;
  Later(const V* spectra, int64_t vectors) : data(reinterpret_cast<const char*>(spectra)) {
    constexpr int64_t MOST = 64 << 10;
    bytes = GROUPS == 1 && vectors * sizeof(V) <= MOST ? vectors * sizeof(V) : 0;
  }
  INLINE void fetch(int part, int parts) const {
    for (int64_t i = bytes * part / parts & -64; i < bytes * (part + 1) / parts; i += 64) {
      __builtin_prefetch(data + i, 0, 2);
    }
  }
};

// Transforms the rows of a tile whose input starts at (top, left), which may lie outside of the image.
NOINLINE void rows_forward(const Job& job, const Plane& plane, int64_t top, int rows, int64_t left, int columns,
                           Groups groups, const Bins& bins, const Later& later, V* work, float* line) {
  const Length& f = *find_length(job.width.length);
  const int64_t h = job.height.size, w = job.width.size;
  const int64_t from = left < 0 ? -left : 0, until = left + columns > w ? w - left : columns;
  const bool packed = is_packed(plane);
  const bool in_place = packed && from == 0 && until == columns && !crowded(plane, columns);
  if (!in_place) memset(line, 0, sizeof(float) * BLOCK * columns);
  const int at_once = from == 0 && until == columns ? rows_at_once(plane, columns) : 1;
  int64_t first = 0, end = 0;  // rows [first, end) are in the line
  for (int r = 0; r < rows; r++) {
    const int64_t row = top + r;
    later.fetch(r, rows);
    if (row < 0 || row >= h) {
      for (int g = groups.first; g < groups.last; g++) {
        for (int k = 0; k < bins.count; k++) bins.column(g, k)[2 * r] = bins.column(g, k)[2 * r + 1] = V{};
      }
      continue;
    }
    const float* source = line;
    int64_t stride = BLOCK;
    if (in_place) {
      source = address<Float32>(plane, row, left), stride = plane.pixel;
      if (row + 2 < h) {
        const float* ahead = source + 2 * plane.row;
        for (int p = 0; p < columns; p++) __builtin_prefetch(ahead + p * stride);
      }
    } else if (packed && until > from) {
      copy_groups(address<Float32>(plane, row, left + from), plane.pixel, line + BLOCK * from, BLOCK,
                  static_cast<int>(until - from), groups, row + 1 < h ? plane.row : 0);
    } else if (until > from) {
      if (row >= end) {
        first = row, end = row + at_once < h ? row + at_once : h;
        const int64_t more = (end - first - 1) * columns;
        read_line(plane, row, left + from, static_cast<int>(until - from + more), line + BLOCK * from);
      }
      source = line + BLOCK * columns * (row - first);
    }
    for (int g = groups.first; g < groups.last; g++) {
      OUTER(row_forward, f, columns, source + LANES * g, stride, work);
      f.row_finish(work, bins.column(g, 0) + 2 * r, bins.pitch);
    }
  }
}

// Transforms `rows` rows back and stores them at (top, left), as far as the image reaches.
NOINLINE void rows_back(const Job& job, const Plane& plane, int64_t top, int rows, int64_t left, int columns,
                        Groups groups, const Bins& bins, const V (&bias)[GROUPS], bool relu, V* work, float* line) {
  const Length& f = *find_length(job.width.length);
  const auto row_to = [&](int r, float* target, int64_t stride) {
    for (int g = groups.first; g < groups.last; g++) {
      f.row_start(bins.column(g, 0) + 2 * r, bins.pitch, work, bias[g]);
      if (relu) {
        OUTER(row_back_relu, f, columns, target + LANES * g, stride, work);
      } else {
        OUTER(row_back, f, columns, target + LANES * g, stride, work);
      }
    }
  };
  if (!is_packed(plane)) {
    write_rows(plane, top, rows, left, columns, line, [&](int r, float* to) { row_to(r, to, BLOCK); });
    return;
  }
  const bool in_place = !crowded(plane, columns);
  for (int r = 0; r < rows; r++) {
    float* target = address<Float32>(plane, top + r, left);
    if (in_place) {
      const float* ahead = target + 2 * plane.row;
      for (int p = 0; p < columns && r + 2 < rows; p++) __builtin_prefetch(ahead + p * plane.pixel, 1);
      row_to(r, target, plane.pixel);
    } else {
      // prefetch the target meanwhile, unless the row is so short that the prefetch would come too late
      for (int p = 0; p < columns && columns >= 32; p++) __builtin_prefetch(target + p * plane.pixel, 1);
      row_to(r, line, BLOCK);
      copy_groups(line, BLOCK, target, plane.pixel, columns, groups, 0);
    }
  }
}

// where tap j of a kernel axis stands in the transform
INLINE int tap_position(const Axis& axis, int j) {
  const int p = axis.origin() - j;
  return p < 0 ? p + axis.length : p;
}

NOINLINE void prepare_spectral(const Job& job, int64_t block, V* memory) {
  const Axis &height = job.height, &width = job.width;
  const Length &fh = *find_length(height.length), &fw = *find_length(width.length);
  V* work = memory;
  float* line = reinterpret_cast<float*>(work + 4 * LARGEST);
  float* taps = line + BLOCK * LARGEST;
  V* rest = reinterpret_cast<V*>(taps + BLOCK * LARGEST);
  const Bins bins = take_bins(width, height.length, rest);
  memset(bins.data, 0, sizeof(V) * GROUPS * bins.count * bins.pitch);
  memset(line, 0, sizeof(float) * BLOCK * width.length);
  const Plane plane = weight_plane(job, job.weight, block);
  read_rows(plane, height.skipped, height.side, width.skipped, width.side, taps, [&](int j, const float* row) {
    for (int i = 0; i < width.side; i++) {
      const int tap = job.call.rotated ? width.side - 1 - i : i;
      memcpy(line + BLOCK * tap_position(width, tap), row + BLOCK * i, sizeof(float) * BLOCK);
    }
    const int tap = job.call.rotated ? height.side - 1 - j : j;
    for (int g = 0; g < GROUPS; g++) {
      OUTER(row_forward, fw, fw.l, line + LANES * g, BLOCK, work);
      fw.row_finish(work, bins.column(g, 0) + 2 * tap_position(height, tap), bins.pitch);
    }
  });
  V* spectrum = reinterpret_cast<V*>(job.run.prepared) + block * GROUPS * bins.count * 2 * fh.l;
  const float scale = 1.0f / (static_cast<float>(fh.l) * static_cast<float>(fw.l));
  for (int g = 0; g < GROUPS; g++) {
    for (int k = 0; k < bins.count; k++, spectrum += 2 * fh.l) {
      OUTER(column_forward, fh, fh.l, bins.column(g, k), work);
      fh.column_finish(work);
      for (int i = 0; i < 2 * fh.l; i++) spectrum[i] = scale * work[i];
    }
  }
}

NOINLINE void forward_spectral(const Job& job, int64_t block, int64_t image, int64_t tile, V* memory) {
  const Axis &height = job.height, &width = job.width;
  const Length& fh = *find_length(height.length);
  V* work = memory;
  float* line = reinterpret_cast<float*>(work + 4 * LARGEST);
  V* rest = reinterpret_cast<V*>(line + BLOCK * LARGEST);
  const int64_t top = tile / width.tiles * height.tile, left = tile % width.tiles * width.tile;
  const int rows = static_cast<int>(height.size - top < height.tile ? height.size - top : height.tile);
  const int columns = static_cast<int>(width.size - left < width.tile ? width.size - left : width.tile);
  const Bins bins = take_bins(width, height.inputs(), rest);
  const V* const spectra = reinterpret_cast<const V*>(job.run.prepared) + block * GROUPS * bins.count * 2 * fh.l;
  const Plane x = image_plane(job, job.x, image, block), y = image_plane(job, job.y, image, block);
  V bias[GROUPS];
  block_bias(job, block, bias);
  const int together = groups_together(bins, x);
  for (Groups groups = {0, together}; groups.first < GROUPS; groups.first += together, groups.last += together) {
    const int64_t spectrum_size = 2 * fh.l * bins.count;  // of a group
    const bool first = image == 0 && tile == 0;
    const Later later(spectra + groups.first * spectrum_size, first ? (groups.last - groups.first) * spectrum_size : 0);
    rows_forward(job, x, top - height.before(), height.inputs(), left - width.before(), width.inputs(), groups, bins,
                 later, work, line);
    for (int g = groups.first; g < groups.last; g++) {
      for (int k = 0; k < bins.count; k++) {
        V* points = bins.column(g, k);
        OUTER(column_forward, fh, height.inputs(), points, work);
        fh.multiply(work, spectra + (g * bins.count + k) * 2 * fh.l);
        OUTER(column_back, fh, rows, points, work);
      }
    }
    rows_back(job, y, top, rows, left, columns, groups, bins, bias, job.relu, work, line);
  }
}

// sum += g conj(x), and then, if there is a spectrum, g = g conj(spectrum)
NOINLINE void accumulate(const V* x, V* g, const V* spectrum, V* sum, int points) {
  for (int i = 0; i < 2 * points; i += 2) {
    const V r = g[i], m = g[i + 1];
    sum[i] += r * x[i] + m * x[i + 1], sum[i + 1] += m * x[i] - r * x[i + 1];
    if (spectrum) g[i] = r * spectrum[i] + m * spectrum[i + 1], g[i + 1] = m * spectrum[i] - r * spectrum[i + 1];
  }
}

// Writes dw of a block, summed over all images and tiles; also dx, if it is wanted and the image is one tile.
NOINLINE void backward_spectral(const Job& job, int64_t block, V* memory) {
  const Axis &height = job.height, &width = job.width;
  const Length &fh = *find_length(height.length), &fw = *find_length(width.length);
  V* work = memory;
  V* work_g = work + 2 * LARGEST;
  float* line = reinterpret_cast<float*>(work + 4 * LARGEST);
  float* taps = line + BLOCK * LARGEST;
  V* rest = reinterpret_cast<V*>(taps + BLOCK * LARGEST);
  const int64_t spectrum_size = 2 * fh.l * (width.length / 2 + 1);  // of a group
  V* const sums = rest;
  rest += GROUPS * spectrum_size;
  V* const after_sums = rest;
  const Bins bins_x = take_bins(width, height.inputs(), rest), bins_g = take_bins(width, height.tile, rest);
  memset(sums, 0, sizeof(V) * GROUPS * spectrum_size);
  const V* const spectra = reinterpret_cast<const V*>(job.run.prepared) + block * GROUPS * spectrum_size;
  const V no_bias[GROUPS] = {};
  for (int64_t image = 0; image < job.call.n; image++) {
    const Plane x = image_plane(job, job.x, image, block), dy = image_plane(job, job.dy, image, block);
    for (int64_t tile = 0; tile < height.tiles * width.tiles; tile++) {
      const int64_t top = tile / width.tiles * height.tile, left = tile % width.tiles * width.tile;
      const Plane dx = image_plane(job, job.dx, image, block);
      const int together = groups_together(bins_x, x);
      for (Groups groups = {0, together}; groups.first < GROUPS; groups.first += together, groups.last += together) {
        rows_forward(job, x, top - height.before(), height.inputs(), left - width.before(), width.inputs(), groups,
                     bins_x, Later(), work, line);
        rows_forward(job, dy, top, height.tile, left, width.tile, groups, bins_g, Later(), work, line);
        for (int g = groups.first; g < groups.last; g++) {
          for (int k = 0; k < bins_x.count; k++) {
            const int64_t offset = (g * bins_x.count + k) * 2 * fh.l;
            V* points = bins_g.column(g, k);
            OUTER(column_forward, fh, height.inputs(), bins_x.column(g, k), work);
            fh.column_finish(work);
            OUTER(column_forward, fh, height.tile, points, work_g);
            fh.column_finish(work_g);
            accumulate(work, work_g, job.dx ? spectra + offset : nullptr, sums + offset, fh.l);
            if (job.dx) {
              fh.column_start(work_g, work_g);
              OUTER(column_back, fh, height.tile, points, work_g);
            }
          }
        }
        if (job.dx) {
          rows_back(job, dx, 0, height.tile, 0, width.tile, groups, bins_g, no_bias, false, work, line);
        }
      }
    }
  }
  if (!job.dw) return;
  rest = after_sums;
  const Bins bins = take_bins(width, height.length, rest);
  for (int g = 0; g < GROUPS; g++) {
    for (int k = 0; k < bins.count; k++) {
      fh.column_start(sums + (g * bins.count + k) * 2 * fh.l, work);
      OUTER(column_back, fh, fh.l, bins.column(g, k), work);
    }
  }
  const Plane plane = weight_plane(job, job.dw, block);
  const V scale = all(1.0f / (static_cast<float>(fh.l) * static_cast<float>(fw.l)));
  write_rows(plane, height.skipped, height.side, width.skipped, width.side, taps, [&](int j, float* row) {
    for (int g = 0; g < GROUPS; g++) {
      fw.row_start(bins.column(g, 0) + 2 * tap_position(height, j), bins.pitch, work, V{});
      OUTER(row_back, fw, fw.l, line + LANES * g, BLOCK, work);
      for (int i = 0; i < width.side; i++) {
        store(row + BLOCK * i + LANES * g, scale * load(line + BLOCK * tap_position(width, i) + LANES * g));
      }
    }
  });
}

}  // namespace

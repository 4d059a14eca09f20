// What all threads of one call share, and what an instruction set offers.
#pragma once

#include "replknet.h"

// One axis of image and kernel. Taps farther from the centre than the image is long meet only padding, and are left
// out.
struct Axis {
  int64_t size;  // of the image
  int side;      // kernel taps that are used, odd
  int reach;     // side / 2
  int skipped;   // taps left out at each end of the kernel
  int tile;      // outputs a tile
  int64_t tiles;
  int length;  // of the transform
  // One tile: image and outputs start at point 0 of the transform, and the origin of the kernel is its centre.
  // More tiles: the input of a tile starts `reach` before its outputs, and the origin of the kernel is its first tap.
  bool whole;
  int origin() const { return whole ? reach : 0; }
  int before() const { return whole ? 0 : reach; }
  int inputs() const { return whole ? tile : tile + 2 * reach; }
};

struct Job {
  rk_call call;
  rk_run run;
  Axis height, width;
  int64_t blocks;
  const char *x, *dy, *weight, *bias;
  char *y, *dx, *dw;
  int relu;
};

// The parts of a call: blocks of weights are prepared, then tasks run. A task is a tile of a block of an image.
struct Isa {
  const char* name;
  bool (*runs_here)();
  // false: RK_NOT_FINITE
  bool (*prepare)(const Job&, int64_t block, char* workspace);
  void (*forward)(const Job&, int64_t block, int64_t image, int64_t tile, char* workspace);
  bool (*backward)(const Job&, int64_t block, char* workspace);
  uint64_t (*checksum)(const char* data, int64_t bytes);
};

extern const Isa isa_plain;
#if defined(__x86_64__)
extern const Isa isa_avx2, isa_avx512;
#elif defined(__aarch64__)
extern const Isa isa_neon;
#endif

// Fourier transforms of length L = N1 * N2 over vectors, in two steps of straight-line transforms.
//
// The outer step is an N1-point transform for each residue r = n mod N2:
//   U[k1][r] = sum over j of w_N1^(j k1) x[r + N2 j].
// Only points n < count may be non-zero (forward) or are wanted (inverse). A residue has COUNT of these points, which
// the compiler knows. The first residues may have one point more than the others.
// The inner step is an N2-point transform for each k1. Its inputs are U[k1][r], turned by constants:
// - N1 and N2 coprime (Good and Thomas): r = N1 b mod N2 in the order of b, turned by w_N1^(-floor(N1 b / N2) k1).
//   The turn is free for N1 = 4, and mostly additions for N1 = 8;
// - else (Cooley and Tukey): r in its own order, turned by w_L^(r k1).
// The results stay in the order [k1][k2]. Their natural order is not needed: an image meets only spectra in this order.
//
// A column is complex: a point is V re, im. A row is real, so one of each pair of mirrored bins is kept. k1 = 0 and
// k1 = N1/2 are again transforms of reals; 0 < k1 < N1/2 also stand for N1/2 < k1 < N1.
#pragma once

#include "dft.h"
#include "lengths.h"

namespace {

constexpr int LARGEST = 256;  // the longest transform
constexpr int BARS = 2;       // vectors of a complex point

INLINE void barrier() { asm volatile("" ::: "memory"); }  // else the compiler spills one step to load the next

// How the inner step reads U: the residue of its point b, and the turn of this point as a multiple of k1 / L.
template <int N1, int N2>
struct Order {
  static constexpr bool pfa = coprime(N1, N2);
  static INLINE int residue(int b) { return pfa ? N1 * b % N2 : b; }
  static INLINE int turn(int b) { return pfa ? N1 * N2 - N1 * b / N2 * N2 % (N1 * N2) : b; }
};

// ---- outer steps, for residues [first, last) ----

typedef void ColumnStep(V* points, V* work, int residues, int first, int last);
typedef void RowForward(const float* x, int64_t stride, V* work, int residues, int first, int last);
typedef void RowBack(float* y, int64_t stride, const V* work, int residues, int first, int last);

template <int N1, int COUNT>
NOINLINE void column_forward(V* points, V* work, int residues, int first, int last) {
  for (int r = first; r < last; r++) {
    transform<N1>(
        [=](int j, V& re, V& im) INLINE_LAMBDA {
          const V* p = points + BARS * (r + residues * j);
          re = j < COUNT ? p[0] : V{}, im = j < COUNT ? p[1] : V{};
        },
        [=](int k1, V re, V im) INLINE_LAMBDA {
          V* w = work + BARS * (r + residues * k1);
          w[0] = re, w[1] = im;
        });
  }
}

template <int N1, int COUNT>
NOINLINE void column_back(V* points, V* work, int residues, int first, int last) {
  for (int r = first; r < last; r++) {
    transform<N1>(
        [=](int k1, V& im, V& re) INLINE_LAMBDA {
          const V* w = work + BARS * (r + residues * k1);
          re = w[0], im = w[1];
        },
        [=](int j, V im, V re) INLINE_LAMBDA {
          V* p = points + BARS * (r + residues * j);
          if (j < COUNT) p[0] = re, p[1] = im;
        });
  }
}

template <int N1, int COUNT>
NOINLINE void row_forward(const float* x, int64_t stride, V* work, int residues, int first, int last) {
  for (int r = first; r < last; r++) {
    V in[N1] = {}, re[N1 / 2 + 1], im[N1 / 2 + 1];
    UNROLL for (int j = 0; j < COUNT; j++) in[j] = load(x + (r + residues * j) * stride);
    rdft<N1>(in, re, im);
    UNROLL for (int k1 = 0; k1 <= N1 / 2; k1++) {
      V* w = work + BARS * (r + residues * k1);
      w[0] = re[k1];
      if (k1 % (N1 / 2) != 0) w[1] = im[k1];
    }
  }
}

template <int N1, int COUNT, bool RELU>
NOINLINE void row_back(float* y, int64_t stride, const V* work, int residues, int first, int last) {
  for (int r = first; r < last; r++) {
    V re[N1 / 2 + 1], im[N1 / 2 + 1], out[N1];
    UNROLL for (int k1 = 0; k1 <= N1 / 2; k1++) {
      const V* w = work + BARS * (r + residues * k1);
      re[k1] = w[0], im[k1] = k1 % (N1 / 2) == 0 ? V{} : w[1];
    }
    irdft<N1>(re, im, out);
    UNROLL for (int j = 0; j < COUNT; j++) {
      store(y + (r + residues * j) * stride, RELU ? at_least(V{}, out[j]) : out[j]);
    }
  }
}

// ---- inner steps of a column; work is [k1][r], spectra are [k1][k2] ----

template <int N1, int N2>
INLINE void load_turned(const V* work, int k1, int b, V& re, V& im) {
  typedef Order<N1, N2> O;
  const V* p = work + BARS * (N2 * k1 + O::residue(b));
  re = p[0], im = p[1];
  rotate<N1 * N2>(k1 * O::turn(b), re, im);
}
template <int N1, int N2>
INLINE void store_turned_back(V* work, int k1, int b, V re, V im) {
  typedef Order<N1, N2> O;
  V* p = work + BARS * (N2 * k1 + O::residue(b));
  rotate<N1 * N2>(k1 * (N1 * N2 - O::turn(b)), re, im);
  p[0] = re, p[1] = im;
}

// work = inverse inner step of (spectrum * inner step of work)
template <int N1, int N2>
NOINLINE void multiply(V* work, const V* spectrum) {
  UNROLL for (int k1 = 0; k1 < N1; k1++) {
    V re[N2], im[N2];
    transform<N2>([=](int b, V& r, V& i) INLINE_LAMBDA { load_turned<N1, N2>(work, k1, b, r, i); },
                  [=, &re, &im](int k2, V r, V i) INLINE_LAMBDA {
                    const V* s = spectrum + BARS * (N2 * k1 + k2);
                    __builtin_prefetch(s + BARS * N1 * N2);  // the next column's spectrum
                    re[k2] = r * s[0] - i * s[1], im[k2] = r * s[1] + i * s[0];
                  });
    transform<N2>([&re, &im](int k2, V& i, V& r) INLINE_LAMBDA { r = re[k2], i = im[k2]; },
                  [=](int b, V i, V r) INLINE_LAMBDA { store_turned_back<N1, N2>(work, k1, b, r, i); });
    barrier();
  }
}

// the inner step alone, in place: [k1][r] -> [k1][k2]
template <int N1, int N2>
NOINLINE void column_finish(V* work) {
  UNROLL for (int k1 = 0; k1 < N1; k1++) {
    V re[N2], im[N2];
    transform<N2>([=](int b, V& r, V& i) INLINE_LAMBDA { load_turned<N1, N2>(work, k1, b, r, i); },
                  [&re, &im](int k2, V r, V i) INLINE_LAMBDA { re[k2] = r, im[k2] = i; });
    UNROLL for (int k2 = 0; k2 < N2; k2++) {
      V* p = work + BARS * (N2 * k1 + k2);
      p[0] = re[k2], p[1] = im[k2];
    }
    barrier();
  }
}

// the inverse inner step alone: [k1][k2] -> [k1][r]
template <int N1, int N2>
NOINLINE void column_start(const V* spectrum, V* work) {
  UNROLL for (int k1 = 0; k1 < N1; k1++) {
    V re[N2], im[N2];
    transform<N2>(
        [=](int k2, V& i, V& r) INLINE_LAMBDA {
          const V* s = spectrum + BARS * (N2 * k1 + k2);
          r = s[0], i = s[1];
        },
        [&re, &im](int b, V i, V r) INLINE_LAMBDA { re[b] = r, im[b] = i; });
    UNROLL for (int b = 0; b < N2; b++) store_turned_back<N1, N2>(work, k1, b, re[b], im[b]);
    barrier();
  }
}

// ---- inner steps of a row: work[k1][r] <-> bins, one every `pitch` vectors ----

// The inputs of k1 = 0 are real, and also those of k1 = N1/2 if N1 and N2 are coprime. The bins of the other k1 lie
// between them. If N1 and N2 are not coprime, half of the bins of k1 = N1/2 mirror the other half.
template <int N1, int N2>
INLINE void finish_reals(const V* work, int k1, V* to, int64_t pitch) {
  typedef Order<N1, N2> O;
  V x[N2], re[N2 / 2 + 1], im[N2 / 2 + 1];
  UNROLL for (int b = 0; b < N2; b++) {
    const V p = work[BARS * (N2 * k1 + O::residue(b))];
    x[b] = k1 * O::turn(b) % (N1 * N2) == 0 ? p : -p;  // no turn or half a turn
  }
  rdft<N2>(x, re, im);
  UNROLL for (int k2 = 0; k2 <= N2 / 2; k2++) {
    to[pitch * k2] = re[k2], to[pitch * k2 + 1] = 2 * k2 % N2 == 0 ? V{} : im[k2];
  }
}
template <int N1, int N2>
INLINE void start_reals(const V* from, int64_t pitch, int k1, V bias, V* work) {
  typedef Order<N1, N2> O;
  V x[N2], re[N2 / 2 + 1], im[N2 / 2 + 1];
  UNROLL for (int k2 = 0; k2 <= N2 / 2; k2++) re[k2] = from[pitch * k2], im[k2] = from[pitch * k2 + 1];
  re[0] += bias;
  irdft<N2>(re, im, x);
  UNROLL for (int b = 0; b < N2; b++) {
    work[BARS * (N2 * k1 + O::residue(b))] = k1 * O::turn(b) % (N1 * N2) == 0 ? x[b] : -x[b];
  }
}

template <int N1, int N2>
NOINLINE void row_finish(const V* work, V* bins, int64_t pitch) {
  constexpr int HALF = N1 / 2;
  finish_reals<N1, N2>(work, 0, bins, pitch);
  bins += pitch * (N2 / 2 + 1);
  UNROLL for (int k1 = 1; k1 < HALF; k1++) {
    barrier();
    V* to = bins + pitch * N2 * (k1 - 1);
    transform<N2>([=](int b, V& re, V& im) INLINE_LAMBDA { load_turned<N1, N2>(work, k1, b, re, im); },
                  [=](int k2, V re, V im) INLINE_LAMBDA { to[pitch * k2] = re, to[pitch * k2 + 1] = im; });
  }
  bins += pitch * N2 * (HALF - 1);
  barrier();
  if constexpr (Order<N1, N2>::pfa) {
    finish_reals<N1, N2>(work, HALF, bins, pitch);
  } else {
    transform<N2>(
        [=](int b, V& re, V& im) INLINE_LAMBDA {
          re = work[BARS * (N2 * HALF + b)], im = V{};
          rotate<N1 * N2>(HALF * b, re, im);
        },
        [=](int k2, V re, V im) INLINE_LAMBDA {
          if (k2 < N2 / 2) bins[pitch * k2] = re, bins[pitch * k2 + 1] = im;
        });
  }
}

// `bias` is added to every point of the row
template <int N1, int N2>
NOINLINE void row_start(const V* bins, int64_t pitch, V* work, V bias) {
  constexpr int HALF = N1 / 2;
  start_reals<N1, N2>(bins, pitch, 0, bias, work);
  bins += pitch * (N2 / 2 + 1);
  UNROLL for (int k1 = 1; k1 < HALF; k1++) {
    barrier();
    const V* from = bins + pitch * N2 * (k1 - 1);
    transform<N2>([=](int k2, V& im, V& re) INLINE_LAMBDA { re = from[pitch * k2], im = from[pitch * k2 + 1]; },
                  [=](int b, V im, V re) INLINE_LAMBDA { store_turned_back<N1, N2>(work, k1, b, re, im); });
  }
  bins += pitch * N2 * (HALF - 1);
  barrier();
  if constexpr (Order<N1, N2>::pfa) {
    start_reals<N1, N2>(bins, pitch, HALF, V{}, work);
  } else {
    transform<N2>(
        [=](int k2, V& im, V& re) INLINE_LAMBDA {
          const V* b = bins + pitch * (k2 < N2 / 2 ? k2 : N2 - 1 - k2);
          re = b[0], im = k2 < N2 / 2 ? b[1] : -b[1];
        },
        [=](int b, V im, V re) INLINE_LAMBDA { store_turned_back<N1, N2>(work, HALF, b, re, im); });
  }
}

// ---- the lengths ----

// the outer steps of N1 points, by COUNT
struct Outer {
  ColumnStep* column_forward[17];
  ColumnStep* column_back[17];
  RowForward* row_forward[17];
  RowBack* row_back[17];
  RowBack* row_back_relu[17];
};
template <int N1, int... COUNT>
constexpr Outer outer_steps(std::integer_sequence<int, COUNT...>) {
  return {{column_forward<N1, COUNT>...},
          {column_back<N1, COUNT>...},
          {row_forward<N1, COUNT>...},
          {row_back<N1, COUNT, false>...},
          {row_back<N1, COUNT, true>...}};
}
template <int N1>
constexpr Outer outer = outer_steps<N1>(std::make_integer_sequence<int, N1 + 1>{});

struct Length {
  int l, n2;
  const Outer* outer;
  void (*multiply)(V* work, const V* spectrum);
  void (*column_finish)(V* work);
  void (*column_start)(const V* spectrum, V* work);
  void (*row_finish)(const V* work, V* bins, int64_t pitch);
  void (*row_start)(const V* bins, int64_t pitch, V* work, V bias);
};
template <int N1, int N2>
constexpr Length length = {
    N1 * N2,
    N2,
    &outer<N1>,
    multiply<N1, N2>,
    column_finish<N1, N2>,
    column_start<N1, N2>,
    row_finish<N1, N2>,
    row_start<N1, N2>,
};

#define LENGTH(N1, N2) length<N1, N2>,
constexpr Length LENGTHS[] = {RK_LENGTHS(LENGTH)};
#undef LENGTH

INLINE const Length* find_length(int l) {
  for (const Length& length : LENGTHS) {
    if (length.l == l) return &length;
  }
  return nullptr;
}

// Runs an outer step for all residues, each with its number of points below `count`.
#define OUTER(step, f, count, ...)                                                   \
  do {                                                                               \
    const int most = (count) / (f).n2, longer = (count) % (f).n2;                    \
    if (longer > 0) (f).outer->step[most + 1](__VA_ARGS__, (f).n2, 0, longer);       \
    if (longer < (f).n2) (f).outer->step[most](__VA_ARGS__, (f).n2, longer, (f).n2); \
  } while (0)

}  // namespace

// Discrete Fourier transforms of fixed small size, as straight-line code over vectors.
//
// transform<N>  X[k] = sum over n of x[n] w^(nk), w = exp(-2 pi i / N), in natural order
// rdft<N>       transform of real x; gives X[k] for k = 0 .. N/2
// irdft<N>      x[n] = sum over k of X[k] w^(-nk) for Hermitian X, given for k = 0 .. N/2
//
// The inverse of transform is transform with real and imaginary parts exchanged; its result is N times too large.
// A zero that the compiler can see costs nothing: x + 0 and 0 * c are folded (-fno-signed-zeros). Values that are not
// stored are not computed. So one template serves inputs and outputs that are only partly needed. Loops marked UNROLL
// vanish, so the compiler knows everything that depends on their counters.
#pragma once

#include "simd.h"

namespace {

// sine and cosine of 2 pi k / n, exact to double at compile time
constexpr double PI = 3.14159265358979323846;
constexpr double series(double x, double term, int first) {
  double sum = term;
  for (int i = first; i < first + 24; i += 2) {
    term *= -x * x / (i * (i + 1));
    sum += term;
  }
  return sum;
}
constexpr double sine(int k, int n);
constexpr double cosine(int k, int n) {
  k %= n;
  if (k < 0) k += n;
  if (2 * k > n) k = n - k;                         // even
  if (4 * k > n) return -cosine(n - 2 * k, 2 * n);  // cos(pi - x)
  if (8 * k > n) return sine(n - 4 * k, 4 * n);     // sin(pi/2 - x)
  return series(2 * PI * k / n, 1, 1);
}
constexpr double sine(int k, int n) {
  k %= n;
  if (k < 0) k += n;
  if (2 * k > n) return -sine(n - k, n);
  if (4 * k > n) return sine(n - 2 * k, 2 * n);
  if (8 * k > n) return cosine(n - 4 * k, 4 * n);
  return series(2 * PI * k / n, 2 * PI * k / n, 2);
}

// cosines and sines of 2 pi k / N
template <int N>
struct Circle {
  float c[N], s[N];
  constexpr Circle() : c(), s() {
    for (int k = 0; k < N; k++) c[k] = static_cast<float>(cosine(k, N)), s[k] = static_cast<float>(sine(k, N));
  }
};
template <int N>
constexpr Circle<N> circle{};

// (re, im) times w^k, w = exp(-2 pi i / N); k is known once the loops are unrolled
template <int N>
INLINE void rotate(int k, V& re, V& im) {
  constexpr float h = 0.70710678118654752440;
  const V r = re, i = im;
  k %= N;
  if (k == 0) return;
  if (8 * k % N != 0) {
    const float c = circle<N>.c[k], s = circle<N>.s[k];
    re = r * c + i * s, im = i * c - r * s;
    return;
  }
  switch (8 * k / N) {  // eighths of a turn
    case 1: re = h * (i + r), im = h * (i - r); break;
    case 2: re = i, im = -r; break;
    case 3: re = h * (i - r), im = -h * (i + r); break;
    case 4: re = -r, im = -i; break;
    case 5: re = -h * (i + r), im = h * (r - i); break;
    case 6: re = -i, im = r; break;
    case 7: re = h * (r - i), im = h * (r + i); break;
  }
}

// how a composite size is split; coprime factors need no rotation between the two steps
constexpr int factor(int n) {
  if (n == 4) return n;
  if (n % 3 == 0 && n != 6) return 3;
  if (n % 4 == 0 && n != 8) return 4;
  return n % 2 == 0 ? 2 : n;
}
constexpr int inverse(int a, int b) {  // the k with ak % b == 1, or 0 if there is none
  for (int k = 0; k < b; k++) {
    if (a * k % b == 1 % b) return k;
  }
  return 0;
}
// the k below AB with k % A == i and k % B == j, for coprime A and B
template <int A, int B>
INLINE int crt(int i, int j) {
  constexpr int of_i = B * inverse(B, A), of_j = A * inverse(A, B);
  return (i * of_i + j * of_j) % (A * B);
}
constexpr bool coprime(int a, int b) { return b == 0 ? a == 1 : coprime(b, a % b); }

// In place, for N that is not split: 2, 4 and odd N. For odd N the sums of inputs n and N-n meet the cosines, and their
// differences meet the sines.
template <int N>
INLINE void small_dft(V (&re)[N], V (&im)[N]) {
  if constexpr (N == 2) {
    const V r = re[1], i = im[1];
    re[1] = re[0] - r, im[1] = im[0] - i;
    re[0] += r, im[0] += i;
  } else if constexpr (N == 4) {
    const V ar = re[0] + re[2], ai = im[0] + im[2], br = re[0] - re[2], bi = im[0] - im[2];
    const V cr = re[1] + re[3], ci = im[1] + im[3], dr = re[1] - re[3], di = im[1] - im[3];
    re[0] = ar + cr, im[0] = ai + ci, re[2] = ar - cr, im[2] = ai - ci;
    re[1] = br + di, im[1] = bi - dr, re[3] = br - di, im[3] = bi + dr;
  } else if constexpr (N > 1) {
    constexpr int M = N / 2;
    V sr[M], si[M], dr[M], di[M];
    UNROLL for (int j = 0; j < M; j++) {
      sr[j] = re[j + 1] + re[N - 1 - j], dr[j] = re[j + 1] - re[N - 1 - j];
      si[j] = im[j + 1] + im[N - 1 - j], di[j] = im[j + 1] - im[N - 1 - j];
    }
    const V r = re[0], i = im[0];
    UNROLL for (int j = 0; j < M; j++) re[0] += sr[j], im[0] += si[j];
    UNROLL for (int k = 1; k <= M; k++) {
      V ar = r, ai = i, br = V{}, bi = V{};
      UNROLL for (int j = 0; j < M; j++) {
        const float c = circle<N>.c[k * (j + 1) % N], s = circle<N>.s[k * (j + 1) % N];
        ar += c * sr[j], ai += c * si[j], br += s * dr[j], bi += s * di[j];
      }
      // separate additions, not fused ones: processors add and multiply on different units
      re[k] = ar + bi, im[k] = ai - br;
      re[N - k] = ar - bi, im[N - k] = ai + br;
    }
  }
}

// The general form: in(n, re, im) reads input n, and out(k, re, im) takes result k. Each is called once, `in` as late
// and `out` as early as possible: some processors have only 16 registers, and values beyond them go through memory.
template <int N, typename In, typename Out>
INLINE void transform(In in, Out out) {
  constexpr int A = factor(N), B = N / A;
  if constexpr (A == N) {
    V re[N], im[N];
    UNROLL for (int n = 0; n < N; n++) in(n, re[n], im[n]);
    small_dft<N>(re, im);
    UNROLL for (int k = 0; k < N; k++) out(k, re[k], im[k]);
  } else {
    // Good and Thomas where A and B are coprime, else Cooley and Tukey
    constexpr bool pfa = coprime(A, B);
    V cr[A][B], ci[A][B];
    UNROLL for (int b = 0; b < B; b++) {
      V re[A], im[A];
      UNROLL for (int a = 0; a < A; a++) in(pfa ? (a * B + b * A) % N : b + B * a, re[a], im[a]);
      small_dft<A>(re, im);
      UNROLL for (int a = 0; a < A; a++) {
        if (!pfa) rotate<N>(a * b, re[a], im[a]);
        cr[a][b] = re[a], ci[a][b] = im[a];
      }
    }
    UNROLL for (int a = 0; a < A; a++) {
      V* const re = cr[a];
      V* const im = ci[a];
      transform<B>([re, im](int b, V& r, V& i) INLINE_LAMBDA { r = re[b], i = im[b]; },
                   [out, a](int b, V r, V i) INLINE_LAMBDA { out(pfa ? crt<A, B>(a, b) : a + A * b, r, i); });
    }
  }
}

// reals x -> k = 0 .. N/2
template <int N>
INLINE void rdft(const V (&x)[N], V (&re)[N / 2 + 1], V (&im)[N / 2 + 1]) {
  if constexpr (N == 1) {
    re[0] = x[0], im[0] = V{};
  } else if constexpr (N % 2 == 0) {
    constexpr int M = N / 2;
    V even[M], odd[M], er[M / 2 + 1], ei[M / 2 + 1], r[M / 2 + 1], i[M / 2 + 1];
    UNROLL for (int m = 0; m < M; m++) even[m] = x[2 * m], odd[m] = x[2 * m + 1];
    rdft<M>(even, er, ei);
    rdft<M>(odd, r, i);
    UNROLL for (int k = 0; k <= M / 2; k++) {
      rotate<N>(k, r[k], i[k]);
      re[M - k] = er[k] - r[k], im[M - k] = i[k] - ei[k];  // before re[k]: at k = M/2 both are one bin
      re[k] = er[k] + r[k], im[k] = ei[k] + i[k];
    }
  } else {
    V out_re[N], out_im[N];
    transform<N>([&x](int n, V& r, V& i) INLINE_LAMBDA { r = x[n], i = V{}; },
                 [&](int k, V r, V i) INLINE_LAMBDA { out_re[k] = r, out_im[k] = i; });
    UNROLL for (int k = 0; k <= N / 2; k++) re[k] = out_re[k], im[k] = out_im[k];
  }
}

// the bins k = 0 .. N/2 of a real signal -> the signal, N times too large
template <int N>
INLINE void irdft(const V (&re)[N / 2 + 1], const V (&im)[N / 2 + 1], V (&x)[N]) {
  constexpr int M = N / 2;
  if constexpr (N == 1) {
    x[0] = re[0];
  } else if constexpr (N % 2 == 0) {
    // the even and the odd outputs are inverse transforms of folded spectra, of half the size
    V er[M / 2 + 1], ei[M / 2 + 1], r[M / 2 + 1], i[M / 2 + 1], even[M], odd[M];
    er[0] = re[0] + re[M], r[0] = re[0] - re[M], ei[0] = i[0] = V{};  // X[0] and X[M] are real
    UNROLL for (int k = 1; k <= M / 2; k++) {
      if (2 * k == M) {  // X[M-k] is X[k]
        er[k] = 2.0f * re[k], r[k] = -2.0f * im[k], ei[k] = i[k] = V{};
      } else {
        er[k] = re[k] + re[M - k], ei[k] = im[k] - im[M - k];
        r[k] = re[k] - re[M - k], i[k] = im[k] + im[M - k];
        rotate<N>(N - k, r[k], i[k]);
      }
    }
    irdft<M>(er, ei, even);
    irdft<M>(r, i, odd);
    UNROLL for (int m = 0; m < M; m++) x[2 * m] = even[m], x[2 * m + 1] = odd[m];
  } else {
    V twice_re[M], twice_im[M], sum = re[0];
    UNROLL for (int k = 0; k < M; k++) {
      twice_re[k] = 2.0f * re[k + 1], twice_im[k] = 2.0f * im[k + 1];
      sum += twice_re[k];
    }
    x[0] = sum;
    UNROLL for (int n = 1; n <= M; n++) {
      V c = re[0], s = V{};
      UNROLL for (int k = 0; k < M; k++) {
        c += circle<N>.c[n * (k + 1) % N] * twice_re[k];
        s += circle<N>.s[n * (k + 1) % N] * twice_im[k];
      }
      x[n] = c - s, x[N - n] = c + s;
    }
  }
}

}  // namespace

// Every transform of the core against a naive DFT in long double.
//
// Compiled once an instruction set, as isa_*.cpp are: LANES is 4, 8 or 16. The order of a spectrum is the core's
// own business; it is read off the spectrum of an impulse at 1, whose bins are the powers of w.
#ifndef LANES
#define LANES 4
#endif
#include <cmath>
#include <complex>
#include <cstdio>
#include <random>
#include <vector>

#include "../fft.h"

namespace {

#if __LDBL_MANT_DIG__ > 64
typedef double Real;  // quadruple precision is emulated, and slow
#else
typedef long double Real;
#endif
typedef std::complex<Real> Complex;
typedef std::vector<Complex> Points;  // of one lane

constexpr Real EPS = 1.1920928955078125e-7;
// Higham, Accuracy and Stability of Numerical Algorithms, theorem 24.2: a step of radix 2 adds about 6 half eps to
// the relative error of the whole spectrum, in the worst case. A third of that leaves room for rounding alone.
constexpr Real BOUND = 1.0;

int passed = 0, failed = 0;
Real worst = 0;
std::mt19937 random_bits(1);

float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(random_bits);
}
V normals() {
  V v = {};
  for (int lane = 0; lane < LANES; lane++) v[lane] = normal();
  return v;
}
V nothing() { return all(__builtin_nanf("")); }
bool is_nothing(V v) {
  for (int lane = 0; lane < LANES; lane++) {
    if (v[lane] == v[lane]) return false;
  }
  return true;
}

// sum over n of x[n] exp(sign 2 pi i n k / l)
Points naive(const Points& x, int sign) {
  const int l = static_cast<int>(x.size());
  Points w(l), sums(l);
  for (int k = 0; k < l; k++) {
    const Real turn = 2 * acosl(-1.0L) * k / l;
    w[k] = Complex(std::cos(turn), sign * std::sin(turn));
  }
  for (int k = 0; k < l; k++) {
    for (int n = 0; n < l; n++) {
      if (x[n] != Complex(0)) sums[k] += x[n] * w[n * k % l];
    }
  }
  return sums;
}

Real norm(const Points& x) {
  Real sum = 0;
  for (const Complex& a : x) sum += std::norm(a);
  return std::sqrt(sum);
}

void expect(bool holds, const char* what, int l, int count) {
  holds ? passed++ : failed++;
  if (!holds) printf("FAILED  length %d, count %d: %s\n", l, count, what);
}

// `got` and `truth` have what is compared; `input` is all that went into a transform of l points
void expect_close(const Points& got, const Points& truth, const Points& input, const char* what, int l, int count) {
  Points error(got.size());
  for (size_t i = 0; i < got.size(); i++) error[i] = got[i] - truth[i];
  const Real allowed = BOUND * EPS * std::log2(Real(2 * l)) * std::sqrt(Real(l)) * norm(input);
  const Real ratio = norm(error) / (allowed > 0 ? allowed : 1);
  if (ratio > worst) worst = ratio;
  const bool holds = ratio <= 1;  // false for NaN
  holds ? passed++ : failed++;
  if (!holds) {
    printf("FAILED  length %d, count %d: %s is off by %.2Lg times the bound\n", l, count, what,
           static_cast<long double>(ratio));
  }
}

Points lane_of(const V* re, const V* im, int n, int step, int lane) {
  Points x(n);
  for (int i = 0; i < n; i++) x[i] = Complex(re[step * i][lane], im ? im[step * i][lane] : 0);
  return x;
}

// ---- transforms of fixed small size ----

template <int N>
NOINLINE void small_size() {
  V x[N], y[N], re[N], im[N];
  for (int i = 0; i < N; i++) x[i] = normals(), y[i] = normals();
  transform<N>([&](int n, V& r, V& i) { r = x[n], i = y[n]; }, [&](int k, V r, V i) { re[k] = r, im[k] = i; });
  for (int lane = 0; lane < LANES; lane++) {
    const Points in = lane_of(x, y, N, 1, lane);
    expect_close(lane_of(re, im, N, 1, lane), naive(in, -1), in, "transform", N, N);
  }

  constexpr int BINS = N / 2 + 1;
  V half_re[BINS], half_im[BINS], back[N];
  rdft<N>(x, half_re, half_im);
  for (int lane = 0; lane < LANES; lane++) {
    const Points in = lane_of(x, nullptr, N, 1, lane);
    Points truth = naive(in, -1);
    truth.resize(BINS);
    Points got = lane_of(half_re, half_im, BINS, 1, lane);
    // what bins 0 and N/2 have as imaginary part is not used
    got[0] = got[0].real();
    if (N % 2 == 0) got[N / 2] = got[N / 2].real();
    expect_close(got, truth, in, "rdft", N, N);
  }

  for (int k = 0; k < BINS; k++) half_re[k] = normals(), half_im[k] = k == 0 || 2 * k == N ? V{} : normals();
  irdft<N>(half_re, half_im, back);
  for (int lane = 0; lane < LANES; lane++) {
    Points in = lane_of(half_re, half_im, BINS, 1, lane);
    in.resize(N);
    for (int k = BINS; k < N; k++) in[k] = std::conj(in[N - k]);
    expect_close(lane_of(back, nullptr, N, 1, lane), naive(in, 1), in, "irdft", N, N);
  }
}

// whether a length has a step of n points
constexpr bool is_step(int n) {
  for (const Length& f : LENGTHS) {
    if (f.n2 == n || f.l == n * f.n2) return true;
  }
  return false;
}
template <int... N>
void small_sizes(std::integer_sequence<int, N...>) {
  (
      [] {
        if constexpr (is_step(N)) small_size<N>();
      }(),
      ...);
}

// ---- lengths ----

// the k for which value is w^k, or -1
int power_of(Complex value, int l) {
  const Real turns = -std::arg(value) / (2 * acosl(-1.0L)) * l;
  const int k = static_cast<int>(std::lround(turns));
  const bool is_near = std::abs(turns - k) < 0.01 && std::abs(std::abs(value) - 1) < 0.001;
  return is_near ? (k + l) % l : -1;
}

struct Column {
  const Length& f;
  V points[2 * LARGEST], work[2 * LARGEST], other[2 * LARGEST];
  int order[LARGEST];  // bins in the order of the core

  explicit Column(const Length& f) : f(f) {}

  void fill(int count) {
    for (int i = 0; i < 2 * LARGEST; i++) points[i] = i < 2 * count ? normals() : nothing();
  }
  void forget_work() {
    for (V& v : work) v = nothing();
  }
  bool untouched(int count) {
    for (int i = 2 * count; i < 2 * f.l; i++) {
      if (!is_nothing(points[i])) return false;
    }
    return true;
  }
  Points input(int count, int lane) {
    Points x = lane_of(points, points + 1, count, 2, lane);
    x.resize(f.l);
    return x;
  }
  Points in_order(const V* spectrum, int lane) {
    Points x(f.l);
    for (int i = 0; i < f.l; i++) x[order[i]] = Complex(spectrum[2 * i][lane], spectrum[2 * i + 1][lane]);
    return x;
  }

  bool find_order() {
    fill(f.l);
    for (int i = 0; i < 2 * f.l; i++) points[i] = all(i == 2 ? 1.0f : 0.0f);
    OUTER(column_forward, f, f.l, points, work);
    f.column_finish(work);
    std::vector<bool> seen(f.l);
    for (int i = 0; i < f.l; i++) {
      order[i] = power_of(Complex(work[2 * i][0], work[2 * i + 1][0]), f.l);
      if (order[i] < 0 || seen[order[i]]) return false;
      seen[order[i]] = true;
    }
    return true;
  }

  void forward(int count) {
    fill(count);
    forget_work();
    OUTER(column_forward, f, count, points, work);
    f.column_finish(work);
    for (int lane = 0; lane < LANES; lane++) {
      const Points x = input(count, lane);
      expect_close(in_order(work, lane), naive(x, -1), x, "column, forward", f.l, count);
    }
  }
  void back(int count) {
    for (int i = 0; i < 2 * f.l; i++) other[i] = normals();
    fill(0);
    forget_work();
    f.column_start(other, work);
    OUTER(column_back, f, count, points, work);
    for (int lane = 0; lane < LANES; lane++) {
      const Points x = in_order(other, lane);
      Points truth = naive(x, 1), got = input(count, lane);
      truth.resize(count), got.resize(count);
      expect_close(got, truth, x, "column, back", f.l, count);
    }
    expect(untouched(count), "column, back: writes more than is asked for", f.l, count);
  }
  void start_in_place() {
    for (int i = 0; i < 2 * f.l; i++) other[i] = work[i] = normals();
    V apart[2 * LARGEST];
    f.column_start(other, apart);
    f.column_start(work, work);
    expect(memcmp(apart, work, 2 * f.l * sizeof(V)) == 0, "column_start in place differs", f.l, f.l);
  }
  // `count` points in, `wanted` out
  void multiply(int count, int wanted) {
    for (int i = 0; i < 2 * f.l; i++) other[i] = normals();
    fill(count);
    forget_work();
    std::vector<Points> inputs;
    for (int lane = 0; lane < LANES; lane++) inputs.push_back(input(count, lane));
    OUTER(column_forward, f, count, points, work);
    f.multiply(work, other);
    fill(0);
    OUTER(column_back, f, wanted, points, work);
    for (int lane = 0; lane < LANES; lane++) {
      Points products = naive(inputs[lane], -1);
      const Points spectrum = in_order(other, lane);
      for (int k = 0; k < f.l; k++) products[k] *= spectrum[k];
      Points truth = naive(products, 1), got = input(wanted, lane);
      truth.resize(wanted), got.resize(wanted);
      expect_close(got, truth, products, "column, times a spectrum", f.l, wanted);
    }
  }
};

struct Row {
  static constexpr int PITCH = 2 * 3, STRIDE = 3 * LANES;  // more than one row of bins, more than one vector a pixel
  const Length& f;
  std::vector<float> pixels;
  V work[2 * LARGEST], bins[PITCH * (LARGEST / 2 + 1)];
  int order[LARGEST / 2 + 1];

  explicit Row(const Length& f) : f(f), pixels(STRIDE * LARGEST) {}

  int bins_count() const { return f.l / 2 + 1; }
  void forget() {
    for (V& v : work) v = nothing();
    for (V& v : bins) v = nothing();
    for (float& v : pixels) v = __builtin_nanf("");
  }
  // of bin i; what stands in for its mirror image as it is
  Complex bin(int i, int lane) const { return Complex(bins[PITCH * i][lane], bins[PITCH * i + 1][lane]); }

  bool find_order() {
    forget();
    for (int n = 0; n < f.l; n++) store(&pixels[STRIDE * n], all(n == 1 ? 1.0f : 0.0f));
    OUTER(row_forward, f, f.l, pixels.data(), STRIDE, work);
    f.row_finish(work, bins, PITCH);
    std::vector<bool> seen(f.l);
    for (int i = 0; i < bins_count(); i++) {
      order[i] = power_of(bin(i, 0), f.l);
      if (order[i] < 0 || seen[order[i]]) return false;
      seen[order[i]] = seen[(f.l - order[i]) % f.l] = true;
    }
    return true;
  }

  void forward(int count) {
    forget();
    for (int n = 0; n < count; n++) store(&pixels[STRIDE * n], normals());
    OUTER(row_forward, f, count, pixels.data(), STRIDE, work);
    f.row_finish(work, bins, PITCH);
    for (int lane = 0; lane < LANES; lane++) {
      Points x(f.l), got(bins_count()), truth(bins_count());
      for (int n = 0; n < count; n++) x[n] = pixels[STRIDE * n + lane];
      const Points spectrum = naive(x, -1);
      for (int i = 0; i < bins_count(); i++) got[i] = bin(i, lane), truth[i] = spectrum[order[i]];
      expect_close(got, truth, x, "row, forward", f.l, count);
    }
    bool kept = true;
    for (int i = 0; i < bins_count(); i++) {
      for (int j = 2; j < PITCH; j++) kept &= is_nothing(bins[PITCH * i + j]);
    }
    expect(kept, "row, forward: writes into other rows", f.l, count);
  }
  void back(int count, bool relu) {
    forget();
    const V bias = normals();
    for (int i = 0; i < bins_count(); i++) {
      bins[PITCH * i] = normals(), bins[PITCH * i + 1] = 2 * order[i] % f.l == 0 ? V{} : normals();
    }
    f.row_start(bins, PITCH, work, bias);
    if (relu) {
      OUTER(row_back_relu, f, count, pixels.data(), STRIDE, work);
    } else {
      OUTER(row_back, f, count, pixels.data(), STRIDE, work);
    }
    bool kept = true;
    for (int n = 0; n < f.l; n++) {
      for (int j = n < count ? LANES : 0; j < STRIDE; j++) kept &= pixels[STRIDE * n + j] != pixels[STRIDE * n + j];
    }
    expect(kept, "row, back: writes more than is asked for", f.l, count);
    for (int lane = 0; lane < LANES; lane++) {
      Points spectrum(f.l), got(count);
      for (int i = 0; i < bins_count(); i++) {
        spectrum[order[i]] = bin(i, lane);
        spectrum[(f.l - order[i]) % f.l] = std::conj(bin(i, lane));
      }
      spectrum[0] += bias[lane];
      Points truth = naive(spectrum, 1);
      truth.resize(count);
      for (int n = 0; n < count; n++) {
        got[n] = pixels[STRIDE * n + lane];
        if (relu && truth[n].real() < 0) truth[n] = 0;
      }
      expect_close(got, truth, spectrum, relu ? "row, back, relu" : "row, back", f.l, count);
    }
  }
};

void whole_length(const Length& f) {
  expect(f.n2 <= 16 && f.l % f.n2 == 0 && f.l / f.n2 <= 16, "has steps of 16 points at most", f.l, f.l);
  expect(find_length(f.l) == &f, "is found", f.l, f.l);
  static Column column(f);
  Column* c = new (&column) Column(f);
  Row row(f);
  const bool ordered = c->find_order() && row.find_order();
  expect(ordered, "the spectrum of an impulse has each bin once", f.l, f.l);
  if (!ordered) return;
  // none of a residue, one of some, all of some and one more of others, all but one, all
  const int counts[] = {1, f.n2 - 1, f.n2, f.n2 + 1, f.l / 2, f.l - f.n2 - 1, f.l - 1, f.l};
  int last = 0;
  for (int count : counts) {
    if (count <= last) continue;
    last = count;
    c->forward(count);
    c->back(count);
    c->multiply(count, f.l + 1 - count);
    row.forward(count);
    row.back(count, false);
    row.back(count, true);
  }
  c->start_in_place();
}

}  // namespace

int main() {
  small_sizes(std::make_integer_sequence<int, 17>{});
  for (const Length& f : LENGTHS) whole_length(f);
  expect(find_length(13) == nullptr, "is not found", 13, 13);
  printf("dft_test, %d lanes: the worst error is %.2Lf of the bound\n%d passed, %d failed\n", LANES,
         static_cast<long double>(worst), passed, failed);
  return failed != 0;
}

// The core through its C interface alone, against sums in double: every instruction set that runs here, random
// shapes, layouts, types, algorithms and tiles; and what the interface promises of memory, threads and checksums.
//
// core_test [shapes]: how many random shapes (300).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../replknet.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(p, bytes)
#endif

namespace {

typedef std::vector<double> Doubles;

constexpr double EPS = 1.1920928955078125e-7;
// of a sum of products, elementwise and relative to the sum of their absolute values
constexpr double DIRECT_BOUND = 4 * EPS;
// of a convolution by Fourier transforms, relative to the norms of its operands and to log2 of the transform
constexpr double FFT_BOUND = EPS / 2;

int passed = 0, failed = 0;
double worst_direct = 0, worst_fft = 0;  // as a part of the bound
std::mt19937 random_bits(3);

int among(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }
bool one_in(int n) { return among(1, n) == 1; }
double normal() { return std::normal_distribution<double>()(random_bits); }

// ---- types ----

int size_of(int dtype) { return dtype == RK_FLOAT32 ? 4 : 2; }

double decoded(int dtype, const char* p) {
  uint16_t half;
  memcpy(&half, p, sizeof half);
  if (dtype == RK_FLOAT16) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double sign = half >> 15 ? -1 : 1;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
  }
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, dtype == RK_FLOAT32 ? static_cast<const void*>(p) : &word, sizeof value);
  return value;
}

// half a unit in the last place of `value`
double rounding(int dtype, double value) {
  const int bits = dtype == RK_FLOAT32 ? 24 : dtype == RK_FLOAT16 ? 11 : 8, least = dtype == RK_FLOAT16 ? -14 : -126;
  int exponent;
  std::frexp(value, &exponent);
  return std::ldexp(0.5, std::max(exponent - 1, least) - bits + 1);
}

// a value of that type near `value` (exactly one where the type is coarse: the low bits are cut off)
void encode(int dtype, double value, char* p) {
  const float f = static_cast<float>(value);
  uint32_t word;
  memcpy(&word, &f, sizeof word);
  uint16_t half = static_cast<uint16_t>(word >> 16);
  if (dtype == RK_FLOAT32) return static_cast<void>(memcpy(p, &word, sizeof word));
  if (dtype == RK_FLOAT16) {
    int exponent;
    const double fraction = std::frexp(std::fabs(value), &exponent);
    const int lost = value == 0 ? 11 : std::max(0, -13 - exponent);  // subnormal
    const int digits = static_cast<int>(std::ldexp(fraction, 11 - lost));
    half = lost ? digits : (exponent + 14) * 1024 + digits - 1024;
    half |= value < 0 ? 0x8000 : 0;
  }
  memcpy(p, &half, sizeof half);
}

// ---- memory ----

// Memory that is NaN in every type, between guards. `misaligned`: bytes beyond a multiple of 64.
class Poisoned {
 public:
  explicit Poisoned(int64_t bytes, int misaligned = 0)
      : bytes_(bytes), all_(bytes + misaligned + 2 * GUARD + 64, FILL) {
    const uintptr_t base = reinterpret_cast<uintptr_t>(all_.data()) + GUARD;
    data_ = all_.data() + GUARD + (64 - base % 64) % 64 + misaligned;
    memset(data_, 0xff, bytes_);
    ASAN_POISON_MEMORY_REGION(all_.data(), data_ - all_.data());
    ASAN_POISON_MEMORY_REGION(data_ + bytes_, all_.data() + all_.size() - data_ - bytes_);
  }
  ~Poisoned() { ASAN_UNPOISON_MEMORY_REGION(all_.data(), all_.size()); }
  Poisoned(const Poisoned& other) : Poisoned(other.bytes_) { memcpy(data_, other.data_, bytes_); }
  void operator=(const Poisoned&) = delete;
  char* data() { return data_; }
  bool guards_hold() const {
    ASAN_UNPOISON_MEMORY_REGION(all_.data(), all_.size());  // it would have said so itself
    const auto is_guard = [](char c) { return c == FILL; };
    const char *begin = all_.data(), *end = begin + all_.size();
    return std::all_of(begin, static_cast<const char*>(data_), is_guard) &&
           std::all_of(static_cast<const char*>(data_) + bytes_, end, is_guard);
  }
  bool operator==(const Poisoned& other) const {
    return bytes_ == other.bytes_ && memcmp(data_, other.data_, bytes_) == 0;
  }

 private:
  static constexpr int GUARD = 256;
  static constexpr char FILL = '\xa5';
  int64_t bytes_;
  std::vector<char> all_;
  char* data_;
};

// Memory that ends where it ends, for the sanitizers to see a read beyond it.
class Exact {
 public:
  explicit Exact(int64_t bytes, int misaligned = 0)
      : start_(static_cast<char*>(malloc(bytes + misaligned))), data_(start_ + misaligned) {}
  ~Exact() { free(start_); }
  Exact(const Exact&) = delete;
  void operator=(const Exact&) = delete;
  char* data() { return data_; }

 private:
  char *start_, *data_;
};

// ---- threads ----

int in_one_call(int64_t begin, int64_t end, int64_t, rk_body body, void* context) {
  body(begin, end, context);
  return 0;
}
int in_threads(int64_t begin, int64_t end, int64_t grain, rk_body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += grain) {
    threads.emplace_back([=] { body(i, std::min(i + grain, end), context); });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
int in_no_way(int64_t, int64_t, int64_t, rk_body, void*) { return 1; }

// ---- a problem, and the truth about it ----

struct Problem {
  rk_call call;  // all but the algorithm
  bool has_bias, relu, rotated;
  Doubles x, dy, weight, bias;  // [n,c,h,w], [c,kh,kw], [c]
  // results and the sums of the absolute products
  Doubles y, y_abs, dx, dx_abs, dw, dw_abs;

  int64_t image(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return ((n * call.c + c) * call.h + h) * call.w + w;
  }
  int64_t tap(int64_t c, int64_t i, int64_t j) const { return (c * call.kh + i) * call.kw + j; }
  int64_t pixels() const { return call.n * call.c * call.h * call.w; }
  int64_t taps() const { return call.c * call.kh * call.kw; }
  int64_t products() const {
    return pixels() * std::min<int64_t>(call.kh, 2 * call.h) * std::min<int64_t>(call.kw, 2 * call.w);
  }
  int64_t blocks() const { return (call.c + 15) / 16; }
};

// where element (n,c,h,w) lies in memory
int64_t place(const rk_call& q, int64_t n, int64_t c, int64_t h, int64_t w) {
  return q.channels_last ? ((n * q.h + h) * q.w + w) * q.c + c : ((n * q.c + c) * q.h + h) * q.w + w;
}

template <typename F>
void each_image_element(const rk_call& q, F f) {
  int64_t i = 0;
  for (int64_t n = 0; n < q.n; n++) {
    for (int64_t c = 0; c < q.c; c++) {
      for (int64_t h = 0; h < q.h; h++) {
        for (int64_t w = 0; w < q.w; w++) f(i++, place(q, n, c, h, w) * size_of(q.dtype));
      }
    }
  }
}

Doubles random_values(int dtype, int64_t count) {
  Doubles values(count);
  char memory[4];
  for (double& v : values) {
    encode(dtype, one_in(50) ? 0.0 : normal(), memory);
    v = decoded(dtype, memory);
  }
  return values;
}

void work_out(Problem& p) {
  const rk_call& q = p.call;
  p.y.assign(p.pixels(), 0), p.dx = p.y_abs = p.dx_abs = p.y;
  p.dw.assign(p.taps(), 0), p.dw_abs = p.dw;
  for (int64_t n = 0; n < q.n; n++) {
    for (int64_t c = 0; c < q.c; c++) {
      for (int64_t i = 0; i < q.kh; i++) {
        for (int64_t j = 0; j < q.kw; j++) {
          const int64_t tap = p.tap(c, i, j);
          const double w = p.weight[tap];
          const double w_forward = p.weight[p.rotated ? p.tap(c, q.kh - 1 - i, q.kw - 1 - j) : tap];
          const int64_t up = i - q.kh / 2, left = j - q.kw / 2;
          for (int64_t h = std::max<int64_t>(0, -up); h < std::min(q.h, q.h - up); h++) {
            for (int64_t v = std::max<int64_t>(0, -left); v < std::min(q.w, q.w - left); v++) {
              const int64_t out = p.image(n, c, h, v), in = p.image(n, c, h + up, v + left);
              const double xw = p.x[in] * w_forward, gw = p.dy[out] * w, gx = p.dy[out] * p.x[in];
              p.y[out] += xw, p.y_abs[out] += std::fabs(xw);
              p.dx[in] += gw, p.dx_abs[in] += std::fabs(gw);
              p.dw[tap] += gx, p.dw_abs[tap] += std::fabs(gx);
            }
          }
        }
      }
    }
  }
  each_image_element(q, [&](int64_t i, int64_t) {
    if (p.has_bias) {
      const double bias = p.bias[i / (q.h * q.w) % q.c];
      p.y[i] += bias, p.y_abs[i] += std::fabs(bias);
    }
    if (p.relu) p.y[i] = std::max(p.y[i], 0.0);
  });
}

int64_t random_side(bool is_long) {
  if (one_in(8)) return 1;
  return is_long ? among(2, 90) : among(2, 24);
}
int random_kernel(int64_t image) {
  const int widest = one_in(6) ? static_cast<int>(2 * image + 9) : 17;  // larger than the image sees
  return 2 * among(0, std::min(widest, 67) / 2) + 1;
}

Problem random_problem() {
  Problem p = {};
  rk_call& q = p.call;
  do {
    q.n = one_in(3) ? among(2, 3) : 1;
    q.c = one_in(3) ? 16 * among(1, 3) : among(1, 40);
    q.h = random_side(one_in(5)), q.w = random_side(one_in(5));
    q.kh = random_kernel(q.h), q.kw = random_kernel(q.w);
    q.dtype = one_in(2) ? RK_FLOAT32 : among(RK_FLOAT16, RK_BFLOAT16);
    q.channels_last = among(0, 1);
  } while (p.products() > 4000000);
  if (one_in(15)) {  // pixels a large power of two apart in memory, which have a path of their own
    q = {1, 256 * among(1, 2), among(1, 3), among(33, 43), 3, 5, RK_FLOAT32, 1, 0, 0, 0, 0, 0, 0};
  }
  p.has_bias = one_in(2), p.relu = one_in(3), p.rotated = one_in(4);
  p.x = random_values(q.dtype, p.pixels()), p.dy = random_values(q.dtype, p.pixels());
  p.weight = random_values(q.dtype, p.taps()), p.bias = random_values(q.dtype, q.c);
  work_out(p);
  return p;
}

// ---- running it ----

struct How {
  int isa, threads;
  rk_parallel_for parallel_for;
};

struct Tensors {
  Exact x, dy, weight, bias;
  explicit Tensors(const Problem& p)
      : x(p.pixels() * size_of(p.call.dtype), offset(p)),
        dy(p.pixels() * size_of(p.call.dtype), offset(p)),
        weight(p.taps() * size_of(p.call.dtype), offset(p)),
        bias(p.call.c * size_of(p.call.dtype), offset(p)) {
    each_image_element(p.call, [&](int64_t i, int64_t at) {
      encode(p.call.dtype, p.x[i], x.data() + at);
      encode(p.call.dtype, p.dy[i], dy.data() + at);
    });
    write_weight(p);
    for (int64_t i = 0; i < p.call.c; i++) encode(p.call.dtype, p.bias[i], bias.data() + i * size_of(p.call.dtype));
  }
  void write_weight(const Problem& p) {
    for (int64_t i = 0; i < p.taps(); i++) encode(p.call.dtype, p.weight[i], weight.data() + i * size_of(p.call.dtype));
  }
  // an odd number of elements for every other problem
  static int offset(const Problem& p) { return p.call.c % 2 * size_of(p.call.dtype); }
};

// memory for one call after another
struct Memory {
  Poisoned workspace, prepared;
  std::vector<uint64_t> checksums;
  rk_run run;
  Memory(const Problem& p, const rk_call& call, const How& how, bool backward)
      : workspace(rk_workspace(&call, how.threads, backward)), prepared(4 * rk_prepared(&call)), checksums(p.blocks()) {
    run = {how.isa,         how.threads, how.parallel_for, workspace.data(), reinterpret_cast<float*>(prepared.data()),
           checksums.data()};
  }
  bool guards_hold() const { return workspace.guards_hold() && prepared.guards_hold(); }
};

// what is compared, and by which bound
struct Check {
  const Problem& p;
  const rk_call& call;
  const char* isa;
  void say(const char* what) const {
    printf("FAILED  %s: %s\n        n %d c %d h %d w %d kernel %dx%d dtype %d %s %s lengths %dx%d tile %dx%d%s%s%s\n",
           isa, what, static_cast<int>(call.n), static_cast<int>(call.c), static_cast<int>(call.h),
           static_cast<int>(call.w), call.kh, call.kw, call.dtype, call.channels_last ? "channels_last" : "contiguous",
           call.algorithm == RK_FFT ? "fft" : "direct", call.lh, call.lw, call.th, call.tw, p.has_bias ? " bias" : "",
           p.relu ? " relu" : "", call.rotated ? " rotated" : "");
  }
  void expect(bool holds, const char* what) const {
    holds ? passed++ : failed++;
    if (!holds) say(what);
  }
  // allowed(i): the error that element i may have before it is rounded
  template <typename Place, typename Allowed>
  void expect_close(const char* what, const Doubles& truth, const char* got, Place place, Allowed allowed) const {
    double& worst = call.algorithm == RK_FFT ? worst_fft : worst_direct;
    double ratio = 0;
    int64_t at = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(truth.size()); i++) {
      const double value = decoded(call.dtype, got + place(i) * size_of(call.dtype)), bound = allowed(i);
      const double error = std::fabs(value - truth[i]) - rounding(call.dtype, std::fabs(truth[i]) + bound);
      const double r = error <= 0 ? 0 : error / std::max(bound, 1e-300);
      if (!(r <= ratio)) ratio = r, at = i;
      if (ratio != ratio) break;
    }
    if (ratio > worst) worst = ratio;
    const bool holds = ratio <= 1;
    holds ? passed++ : failed++;
    if (!holds) {
      say(what);
      printf("        element %ld is %.9g, should be %.9g: off by %.3g times the bound\n", static_cast<long>(at),
             decoded(call.dtype, got + place(at) * size_of(call.dtype)), truth[at], ratio);
    }
  }
};

Doubles norms(const Doubles& values, int64_t each) {
  Doubles norms(values.size() / each);
  for (size_t i = 0; i < values.size(); i++) norms[i / each] += values[i] * values[i];
  for (double& n : norms) n = std::sqrt(n);
  return norms;
}

// by norms: of the weights [c] and of the planes [n,c]
struct FftBounds {
  double unit;
  Doubles x, dy, weight;
  FftBounds(const Problem& p, const rk_call& q)
      : unit(FFT_BOUND * std::log2(static_cast<double>(q.lh) * q.lw)),
        x(norms(p.x, q.h * q.w)),
        dy(norms(p.dy, q.h * q.w)),
        weight(norms(p.weight, static_cast<int64_t>(q.kh) * q.kw)) {}
};

void check_forward(const Check& check, const Problem& p, const rk_call& call, Tensors& t, const How& how) {
  const int64_t bytes = p.pixels() * size_of(call.dtype), plane = call.h * call.w;
  const auto where = [&](int64_t i) {
    return place(call, i / plane / call.c, i / plane % call.c, i / call.w % call.h, i % call.w);
  };
  const void* bias = p.has_bias ? t.bias.data() : nullptr;
  Poisoned y(bytes, Tensors::offset(p));
  Memory memory(p, call, how, false);
  const int blocks = static_cast<int>(p.blocks());
  check.expect(rk_forward(&call, &memory.run, t.x.data(), t.weight.data(), bias, p.relu, y.data()) == blocks,
               "the first call prepares all blocks");
  check.expect(y.guards_hold() && memory.guards_hold(), "forward writes beyond its memory");
  if (call.algorithm == RK_FFT) {
    const FftBounds bounds(p, call);
    check.expect_close("y", p.y, y.data(), where, [&](int64_t i) {
      const int64_t c = i / plane % call.c;
      return bounds.unit * (bounds.x[i / plane] * bounds.weight[c] + (p.has_bias ? std::fabs(p.bias[c]) : 0));
    });
  } else {
    check.expect_close("y", p.y, y.data(), where, [&](int64_t i) { return DIRECT_BOUND * p.y_abs[i]; });
  }
  const Poisoned prepared = memory.prepared;
  Poisoned again(bytes, Tensors::offset(p));
  check.expect(rk_forward(&call, &memory.run, t.x.data(), t.weight.data(), bias, p.relu, again.data()) == 0,
               "the second call prepares nothing");
  check.expect(again == y, "the second run gives other bits");
  check.expect(memory.prepared == prepared, "the second run changes the prepared weights");
  for (const How& other : {How{how.isa, 3, in_threads}, How{how.isa, 2, in_one_call}}) {
    Memory own(p, call, other, false);
    Poisoned in_parts(bytes, Tensors::offset(p));
    check.expect(rk_forward(&call, &own.run, t.x.data(), t.weight.data(), bias, p.relu, in_parts.data()) == blocks,
                 "with threads, the first call prepares all blocks");
    check.expect(in_parts == y, "another number of threads gives other bits");
    check.expect(in_parts.guards_hold() && own.guards_hold(), "forward with threads writes beyond its memory");
  }
}

// taps so far from the centre that they only meet padding
bool is_unseen(const rk_call& q, int64_t tap) {
  return std::abs(tap / q.kw - q.kh / 2) >= q.h || std::abs(tap % q.kw - q.kw / 2) >= q.w;
}

// The core leaves those alone in dw: the caller has zeros there.
void zero_unseen(const rk_call& q, char* dw) {
  for (int64_t i = 0; i < q.c * q.kh * q.kw; i++) {
    if (is_unseen(q, i % (q.kh * q.kw))) memset(dw + i * size_of(q.dtype), 0, size_of(q.dtype));
  }
}
bool unseen_are_zero(const rk_call& q, const char* dw) {
  for (int64_t i = 0; i < q.c * q.kh * q.kw; i++) {
    if (is_unseen(q, i % (q.kh * q.kw)) && decoded(q.dtype, dw + i * size_of(q.dtype)) != 0) return false;
  }
  return true;
}

void check_backward(const Check& check, const Problem& p, const rk_call& call, Tensors& t, const How& how) {
  const bool with_dx = call.algorithm == RK_FFT && call.th == call.h && call.tw == call.w;
  const int64_t bytes = p.pixels() * size_of(call.dtype), plane = call.h * call.w, taps = call.kh * call.kw;
  const auto where = [&](int64_t i) {
    return place(call, i / plane / call.c, i / plane % call.c, i / call.w % call.h, i % call.w);
  };
  const auto same = [](int64_t i) { return i; };
  const int blocks = with_dx ? static_cast<int>(p.blocks()) : 0;
  const int64_t dw_bytes = p.taps() * size_of(call.dtype);
  const int offset = Tensors::offset(p);
  Poisoned dx(bytes, offset), dw(dw_bytes, offset);
  zero_unseen(call, dw.data());
  Memory memory(p, call, how, true);
  check.expect(rk_backward(&call, &memory.run, t.dy.data(), t.x.data(), t.weight.data(), with_dx ? dx.data() : nullptr,
                           dw.data()) == blocks,
               "backward prepares all blocks for dx, and none without");
  check.expect(dx.guards_hold() && dw.guards_hold() && memory.guards_hold(), "backward writes beyond its memory");
  check.expect(unseen_are_zero(call, dw.data()), "dw of taps that only meet padding is written");
  if (call.algorithm == RK_FFT) {
    const FftBounds bounds(p, call);
    if (with_dx) {
      check.expect_close("dx", p.dx, dx.data(), where, [&](int64_t i) {
        return bounds.unit * bounds.dy[i / plane] * bounds.weight[i / plane % call.c];
      });
    }
    check.expect_close("dw", p.dw, dw.data(), same, [&](int64_t i) {
      double sum = 0;
      for (int64_t n = 0; n < call.n; n++) sum += bounds.x[n * call.c + i / taps] * bounds.dy[n * call.c + i / taps];
      return bounds.unit * sum;
    });
  } else {
    check.expect_close("dw", p.dw, dw.data(), same, [&](int64_t i) { return DIRECT_BOUND * p.dw_abs[i]; });
  }
  for (const How& other : {how, How{how.isa, 3, in_threads}}) {
    Memory own(p, call, other, true);
    Poisoned dx_again(bytes, offset), dw_again(dw_bytes, offset);
    zero_unseen(call, dw_again.data());
    rk_backward(&call, &own.run, t.dy.data(), t.x.data(), t.weight.data(), with_dx ? dx_again.data() : nullptr,
                dw_again.data());
    check.expect(dx_again == dx && dw_again == dw, "backward again, or with threads, gives other bits");
    check.expect(own.guards_hold() && dx_again.guards_hold() && dw_again.guards_hold(),
                 "backward with threads writes beyond its memory");
  }
  Memory own(p, call, how, true);
  if (with_dx) {
    Poisoned alone(bytes, offset);
    rk_backward(&call, &own.run, t.dy.data(), t.x.data(), t.weight.data(), alone.data(), nullptr);
    check.expect(alone == dx, "dx without dw has other bits");
    Poisoned dw_alone(dw_bytes, offset);
    zero_unseen(call, dw_alone.data());
    rk_backward(&call, &own.run, t.dy.data(), t.x.data(), t.weight.data(), nullptr, dw_alone.data());
    check.expect(dw_alone == dw, "dw without dx has other bits");
  }
}

// ---- ways to carry out a problem ----

// a length of at least `points`, mostly the shortest; 0 if there is none
int random_length(int64_t points) {
  int fitting[64], count = 0;
  for (int i = 0; rk_length(i); i++) {
    if (rk_length(i) >= points) fitting[count++] = rk_length(i);
  }
  return count == 0 ? 0 : fitting[one_in(4) ? among(0, count - 1) : 0];
}

// tile and length of an axis; false if no transform is long enough
bool random_axis(int64_t size, int side, bool tiled, int32_t& tile, int32_t& length) {
  const int64_t reach = std::min<int64_t>(side / 2, size - 1);
  tile = static_cast<int32_t>(tiled ? among(1, static_cast<int>(size)) : size);
  length = random_length(tile == size ? tile + reach : tile + 2 * reach);
  return length != 0;
}

std::vector<rk_call> random_ways(const Problem& p) {
  std::vector<rk_call> ways;
  rk_call q = p.call;
  q.algorithm = RK_DIRECT, q.tw = static_cast<int32_t>(q.w), q.th = static_cast<int32_t>(q.h);
  ways.push_back(q);
  q.th = among(1, static_cast<int>(q.h));
  ways.push_back(q);
  q.algorithm = RK_FFT;
  if (random_axis(q.h, q.kh, false, q.th, q.lh) && random_axis(q.w, q.kw, false, q.tw, q.lw)) ways.push_back(q);
  const int tiled = among(1, 3);
  if (random_axis(q.h, q.kh, tiled & 1, q.th, q.lh) && random_axis(q.w, q.kw, tiled & 2, q.tw, q.lw)) ways.push_back(q);
  return ways;
}

void check_problem(Problem& p, const std::vector<int>& isas) {
  Tensors tensors(p);
  for (rk_call call : random_ways(p)) {
    for (int isa : isas) {
      const How how = {isa, 1, nullptr};
      const Check check = {p, call, rk_isa_name(isa)};
      call.rotated = 0;
      check_backward(check, p, call, tensors, how);
      call.rotated = p.rotated;
      check_forward(check, p, call, tensors, how);
    }
  }
}

// ---- promises that need no random shapes ----

Problem small_problem(int c) {
  Problem p = {};
  p.call = {2, c, 9, 14, 5, 7, RK_FLOAT32, 1, RK_DIRECT, 0, 0, 9, 14, 0};
  p.x = random_values(RK_FLOAT32, p.pixels()), p.dy = random_values(RK_FLOAT32, p.pixels());
  p.weight = random_values(RK_FLOAT32, p.taps()), p.bias = random_values(RK_FLOAT32, c);
  work_out(p);
  return p;
}
rk_call with_transforms(rk_call call) {
  call.algorithm = RK_FFT, call.lh = 16, call.lw = 24;
  return call;
}

// exactly the blocks whose weights changed are prepared anew, and the result is as if all had been
void check_changed_weights(int isa) {
  Problem p = small_problem(16 * 4 + 3);
  for (const rk_call& call : {p.call, with_transforms(p.call)}) {
    const Check check = {p, call, rk_isa_name(isa)};
    for (const How& how : {How{isa, 1, nullptr}, How{isa, 3, in_threads}}) {
      Tensors t(p);
      Memory memory(p, call, how, true);
      Poisoned y(4 * p.pixels()), fresh_y(4 * p.pixels());
      const auto forward = [&](Memory& m, Poisoned& out) {
        return rk_forward(&call, &m.run, t.x.data(), t.weight.data(), nullptr, 0, out.data());
      };
      check.expect(forward(memory, y) == 5, "all five blocks are prepared");
      // a bit of the first weight of block 1; then of the last of blocks 0, 2 and 4
      t.weight.data()[4 * p.tap(16, 0, 0)] ^= 1;
      check.expect(forward(memory, y) == 1, "one block changed");
      for (int64_t c : {15, 47, 66}) t.weight.data()[4 * p.tap(c, 4, 6) + 3] ^= '\x80';
      check.expect(forward(memory, y) == 3, "three blocks changed");
      check.expect(forward(memory, y) == 0, "no block changed");
      Memory fresh(p, call, how, true);
      forward(fresh, fresh_y);
      check.expect(y == fresh_y, "a partly prepared call gives other bits than a fresh one");
      check.expect(memory.prepared == fresh.prepared, "partly prepared weights differ from fresh ones");
      memory.checksums[3] = 0;
      check.expect(forward(memory, y) == 1, "a block whose checksum is 0 is prepared");
      if (call.algorithm != RK_FFT) continue;
      for (int64_t c : {20, 21, 50}) t.weight.data()[4 * p.tap(c, 2, 2) + 1] ^= 16;
      Poisoned dx(4 * p.pixels());
      const int remade = rk_backward(&call, &memory.run, t.dy.data(), t.x.data(), t.weight.data(), dx.data(), nullptr);
      check.expect(remade == 2, "dx: two blocks changed");
    }
  }
}

// weights, or sums for dw, that products with the padding would spread are told in each call, until they are finite
void check_not_finite(int isa) {
  Problem p = small_problem(16 * 2 + 3);
  const Check check = {p, p.call, rk_isa_name(isa)};
  for (const How& how : {How{isa, 1, nullptr}, How{isa, 3, in_threads}}) {
    Tensors t(p);
    Memory memory(p, p.call, how, true);
    Poisoned y(4 * p.pixels()), dw(4 * p.taps());
    const auto forward = [&] {
      return rk_forward(&p.call, &memory.run, t.x.data(), t.weight.data(), nullptr, 0, y.data());
    };
    const auto backward = [&] {
      return rk_backward(&p.call, &memory.run, t.dy.data(), t.x.data(), t.weight.data(), nullptr, dw.data());
    };
    check.expect(forward() == 3 && backward() == 0, "finite weights");
    for (const double value : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
      const double before = p.weight[p.tap(34, 0, 0)];
      encode(RK_FLOAT32, value, t.weight.data() + 4 * p.tap(34, 0, 0));
      check.expect(forward() == RK_NOT_FINITE && forward() == RK_NOT_FINITE, "a weight that is not finite");
      check.expect(backward() == 0, "dw does not depend on the weights");
      encode(RK_FLOAT32, before, t.weight.data() + 4 * p.tap(34, 0, 0));
      check.expect(forward() == 1, "finite again");
      encode(RK_FLOAT32, value, t.dy.data());
      check.expect(backward() == RK_NOT_FINITE && forward() == 0, "a gradient that is not finite");
      encode(RK_FLOAT32, p.dy[0], t.dy.data());
    }
    check.expect(backward() == 0, "a finite gradient again");
  }
}

void check_bad_calls(int isa) {
  const Problem p = small_problem(20);
  Tensors t(p);
  const auto outcome = [&](rk_call call, bool dx, int on) {  // of forward, or of backward with dx
    const rk_call valid = with_transforms(p.call);
    Memory memory(p, valid, {isa, 1, nullptr}, true);
    memory.run.isa = on;
    Poisoned out(4 * p.pixels());
    const Poisoned before = out;
    const int code = dx ? rk_backward(&call, &memory.run, t.dy.data(), t.x.data(), t.weight.data(), out.data(), nullptr)
                        : rk_forward(&call, &memory.run, t.x.data(), t.weight.data(), nullptr, 0, out.data());
    if (code < 0 && !(out == before)) return 1;
    return code;
  };
  const auto refused = [&](const char* what, bool direct, auto change) {
    rk_call call = direct ? p.call : with_transforms(p.call);
    change(call);
    const Check check = {p, call, rk_isa_name(isa)};
    check.expect(rk_workspace(&call, 1, 0) == RK_BAD_CALL && rk_prepared(&call) == RK_BAD_CALL && what, what);
    check.expect(outcome(call, false, isa) == RK_BAD_CALL, what);
    check.expect(outcome(call, true, isa) == RK_BAD_CALL, what);
  };
  for (bool direct : {true, false}) {
    refused("even kernel height", direct, [](rk_call& q) { q.kh = 4; });
    refused("even kernel width", direct, [](rk_call& q) { q.kw = 6; });
    refused("no kernel", direct, [](rk_call& q) { q.kh = 0; });
    refused("negative kernel", direct, [](rk_call& q) { q.kw = -3; });
    refused("th > h", direct, [](rk_call& q) { q.th = 10; });
    refused("tw > w", direct, [](rk_call& q) { q.tw = 15; });
    refused("no tile", direct, [](rk_call& q) { q.th = 0; });
    refused("no images", direct, [](rk_call& q) { q.n = 0; });
    refused("no channels", direct, [](rk_call& q) { q.c = 0; });
    refused("no rows", direct, [](rk_call& q) { q.h = 0; });
    refused("negative width", direct, [](rk_call& q) { q.w = -1; });
    refused("unknown type", direct, [](rk_call& q) { q.dtype = 3; });
    refused("negative type", direct, [](rk_call& q) { q.dtype = -1; });
    refused("unknown algorithm", direct, [](rk_call& q) { q.algorithm = 2; });
  }
  refused("direct in columns", true, [](rk_call& q) { q.tw = 5; });
  refused("unsupported length", false, [](rk_call& q) { q.lh = 13; });
  refused("no length", false, [](rk_call& q) { q.lw = 0; });
  refused("a length too short for one tile", false, [](rk_call& q) { q.lw = 16; });
  refused("a length too short for tiles", false, [](rk_call& q) { q.tw = 11, q.lw = 16; });
  const rk_call valid = with_transforms(p.call);
  const Check check = {p, valid, rk_isa_name(isa)};
  check.expect(outcome(p.call, true, isa) == RK_BAD_CALL, "dx of a direct call");
  rk_call tiled = valid;
  tiled.th = 4;
  check.expect(outcome(tiled, true, isa) == RK_BAD_CALL, "dx of tiles");
  for (int unknown : {-1, 99}) {
    check.expect(outcome(valid, false, unknown) == RK_BAD_ISA, "unknown instruction set");
    check.expect(outcome(valid, true, unknown) == RK_BAD_ISA, "unknown instruction set");
  }
  Memory memory(p, valid, {isa, 2, in_no_way}, true);
  Poisoned y(4 * p.pixels());
  check.expect(rk_forward(&valid, &memory.run, t.x.data(), t.weight.data(), nullptr, 0, y.data()) == RK_BAD_CALL,
               "threads that cannot be had");
}

void check_checksums(int isa) {
  int unnoticed = 0;
  const auto sum = [&](const std::vector<uint32_t>& words) { return rk_checksum(words.data(), 4 * words.size(), isa); };
  std::vector<uint32_t> words(1024);
  for (uint32_t& w : words) {
    const float f = static_cast<float>(normal());
    memcpy(&w, &f, sizeof w);
  }
  for (const bool constant : {false, true}) {  // weights that are all the same are the likeliest to collide
    if (constant) std::fill(words.begin(), words.end(), words[0]);
    const uint64_t original = sum(words);
    unnoticed += original != sum(words);
    for (uint32_t& w : words) {
      for (int bit = 0; bit < 32; bit++) {
        w ^= 1u << bit;
        unnoticed += sum(words) == original;
        w ^= 1u << bit;
      }
    }
    for (size_t i = 0; i + 1 < words.size(); i++) {
      words[i] ^= 0x80000000, words[i + 1] ^= 0x80000000;
      unnoticed += sum(words) == original;
      words[i] ^= 0x80000000, words[i + 1] ^= 0x80000000;
    }
    if (constant) continue;
    for (int i = 0; i < 20000; i++) {  // half of them at distances that are powers of two
      const int a = among(0, 1023), b = i % 2 ? among(0, 1023) : a ^ 1 << among(0, 9);
      if (words[a] == words[b]) continue;
      std::swap(words[a], words[b]);
      unnoticed += sum(words) == original;
      std::swap(words[a], words[b]);
    }
  }
  // any length at any address: the last byte counts, the next one is not read
  for (int bytes = 1; bytes < 700; bytes++) {
    Exact memory(bytes, bytes % 3);
    memset(memory.data(), 7, bytes);
    const uint64_t original = rk_checksum(memory.data(), bytes, isa);
    memory.data()[bytes - 1] ^= 64;
    unnoticed += rk_checksum(memory.data(), bytes, isa) == original;
  }
  unnoticed == 0 ? passed++ : failed++;
  if (unnoticed) printf("FAILED  %s: %d changes keep the checksum\n", rk_isa_name(isa), unnoticed);
}

void expect(bool holds, const char* what) {
  holds ? passed++ : failed++;
  if (!holds) printf("FAILED  %s\n", what);
}

std::vector<int> instruction_sets() {
  std::vector<int> run;
  int count = 0;
  for (; rk_isa_name(count); count++) {
    const bool runs = rk_isa_runs(count);
    printf("core_test: %s %s\n", rk_isa_name(count), runs ? "is tested" : "does not run here");
    if (runs) run.push_back(count);
  }
  expect(count > 0 && strcmp(rk_isa_name(count - 1), "plain") == 0 && rk_isa_runs(count - 1), "plain runs everywhere");
  expect(!rk_isa_name(-1) && !rk_isa_runs(-1) && !rk_isa_runs(count),
         "unknown instruction sets neither have a name nor run");
  return run;
}

}  // namespace

int main(int argc, char** argv) {
  const int shapes = argc > 1 ? atoi(argv[1]) : 300;
  const std::vector<int> isas = instruction_sets();
  for (int i = 0; rk_length(i); i++) expect(rk_length(i + 1) == 0 || rk_length(i + 1) > rk_length(i), "lengths ascend");
  for (int isa : isas) {
    check_changed_weights(isa);
    check_not_finite(isa);
    check_bad_calls(isa);
    check_checksums(isa);
  }
  for (int i = 0; i < shapes; i++) {
    Problem p = random_problem();
    check_problem(p, isas);
  }
  printf("core_test: %d shapes; the worst error is %.2f of the bound (direct), %.2f (fft)\n", shapes, worst_direct,
         worst_fft);
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

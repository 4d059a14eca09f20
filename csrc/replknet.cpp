// The C interface: checks, the division of a call among threads, and the choice of the instruction set.
#include "replknet.h"

#include "job.h"
#include "lengths.h"

namespace {

constexpr int BLOCK = 16;
constexpr int64_t LARGEST = 256, WIDEST = 14;

// best first
const Isa* const ISAS[] = {
#if defined(__x86_64__)
    &isa_avx512,
    &isa_avx2,
#elif defined(__aarch64__)
    &isa_neon,
#endif
    &isa_plain,
};
constexpr int ISA_COUNT = sizeof ISAS / sizeof *ISAS;

#define LENGTH(N1, N2) N1 *N2,
constexpr int LENGTHS[] = {RK_LENGTHS(LENGTH)};
#undef LENGTH
constexpr int LENGTH_COUNT = sizeof LENGTHS / sizeof *LENGTHS;

bool is_length(int l) {
  for (int length : LENGTHS) {
    if (length == l) return true;
  }
  return false;
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

Axis axis_of(int64_t size, int side, int tile, int length) {
  Axis a;
  a.size = size;
  a.reach = static_cast<int>(smaller(side / 2, size - 1));
  a.side = 2 * a.reach + 1;
  a.skipped = side / 2 - a.reach;
  a.tile = tile;
  a.tiles = (size + tile - 1) / tile;
  a.length = length;
  a.whole = tile == size;
  return a;
}

bool fits(const Axis& a) { return is_length(a.length) && a.length >= (a.whole ? a.tile + a.reach : a.inputs()); }

bool job_of(const rk_call& q, Job& job) {
  if (q.n < 1 || q.c < 1 || q.h < 1 || q.w < 1 || q.kh < 1 || q.kw < 1 || q.kh % 2 == 0 || q.kw % 2 == 0) return false;
  if (q.dtype < RK_FLOAT32 || q.dtype > RK_BFLOAT16 || q.th < 1 || q.tw < 1 || q.th > q.h || q.tw > q.w) return false;
  job.call = q;
  job.height = axis_of(q.h, q.kh, q.th, q.lh);
  job.width = axis_of(q.w, q.kw, q.tw, q.lw);
  job.blocks = (q.c + BLOCK - 1) / BLOCK;
  if (q.algorithm == RK_FFT) return fits(job.height) && fits(job.width);
  return q.algorithm == RK_DIRECT && q.tw == q.w;
}

int64_t bins_floats(const Axis& width, int rows) { return BLOCK * (width.length / 2 + 1) * 2 * (rows | 1); }

int64_t prepared_floats(const Job& job) {
  if (job.call.algorithm == RK_FFT)
    return BLOCK * (job.width.length / 2 + 1) * 2 * static_cast<int64_t>(job.height.length);
  return static_cast<int64_t>(BLOCK) * job.height.side * job.width.side;
}

// for one thread, in the layouts of prepare_*, forward_* and backward_*
int64_t workspace_floats(const Job& job, bool backward) {
  const Axis &h = job.height, &w = job.width;
  if (job.call.algorithm == RK_FFT) {
    // steps of columns (up to 16 lanes a vector), and two lines
    const int64_t small = 4 * LARGEST * BLOCK + 2 * LARGEST * BLOCK;
    const int64_t prepare = bins_floats(w, h.length);
    if (!backward) return small + (prepare > bins_floats(w, h.inputs()) ? prepare : bins_floats(w, h.inputs()));
    const int64_t both = bins_floats(w, h.inputs()) + bins_floats(w, h.tile);
    return small + prepared_floats(job) + (prepare > both ? prepare : both);
  }
  const int64_t line = BLOCK * (w.size + 2 * w.reach + WIDEST), rows = h.tile + 2 * h.reach;
  const int64_t taps = BLOCK * (w.side + WIDEST), buffer = line + BLOCK * LARGEST;
  if (!backward) return buffer + line * rows;
  return buffer + line * (rows + h.tile) + taps * h.side;
}

// where the share of slot s begins, if `slots` slots share `all` things
int64_t share(int64_t all, int64_t s, int64_t slots) { return all * s / slots; }

struct Work {
  const Job* job;
  const Isa* isa;
  int64_t slots, slot_bytes;
  bool backward, prepare, compute;
  int remade[256];    // blocks prepared anew, by slot
  bool spoiled[256];  // whether a block of the slot is RK_NOT_FINITE
};

uint64_t weights_checksum(const Job& job, const Isa& isa, int64_t block) {
  const int64_t kernel = static_cast<int64_t>(job.call.kh) * job.call.kw * (job.call.dtype == RK_FLOAT32 ? 4 : 2);
  const int64_t channels = smaller(BLOCK, job.call.c - BLOCK * block);
  const uint64_t sum = isa.checksum(job.weight + BLOCK * block * kernel, channels * kernel);
  return sum ? sum : 1;  // 0 stands for not prepared
}

void run_slots(int64_t begin, int64_t end, void* context) {
  Work& work = *static_cast<Work*>(context);
  const Job& job = *work.job;
  for (int64_t s = begin; s < end; s++) {
    char* memory = job.run.workspace + s * work.slot_bytes;
    if (work.prepare) {
      for (int64_t b = share(job.blocks, s, work.slots); b < share(job.blocks, s + 1, work.slots); b++) {
        const uint64_t sum = weights_checksum(job, *work.isa, b);
        if (sum == job.run.checksums[b]) continue;
        job.run.checksums[b] = 0;
        // a block that is not finite keeps no checksum, so each call finds it again
        const bool finite = work.isa->prepare(job, b, memory);
        job.run.checksums[b] = finite ? sum : 0;
        work.remade[s]++;
        if (!finite) work.spoiled[s] = true;
      }
    }
    if (!work.compute) continue;
    if (work.backward) {
      for (int64_t b = share(job.blocks, s, work.slots); b < share(job.blocks, s + 1, work.slots); b++) {
        if (!work.isa->backward(job, b, memory)) work.spoiled[s] = true;
      }
      continue;
    }
    // neighbouring tasks share the weights of a block
    const int64_t tiles = job.height.tiles * job.width.tiles, tasks = job.blocks * job.call.n * tiles;
    for (int64_t t = share(tasks, s, work.slots); t < share(tasks, s + 1, work.slots); t++) {
      work.isa->forward(job, t / (job.call.n * tiles), t / tiles % job.call.n, t % tiles, memory);
    }
  }
}

// One pass prepares and computes if the tasks divide among threads as the blocks do: then no thread needs the blocks of
// another.
int run_job(const Job& job, const Isa& isa, bool backward, bool prepare) {
  Work work = {};
  work.job = &job, work.isa = &isa, work.backward = backward;
  int64_t slots = job.run.parallel_for && job.run.threads > 1 ? smaller(job.run.threads, 256) : 1;
  const int64_t tasks = job.blocks * (backward ? 1 : job.call.n * job.height.tiles * job.width.tiles);
  work.slots = slots = smaller(slots, tasks);
  work.slot_bytes = workspace_floats(job, backward) * 4;
  const bool one_pass = !prepare || backward || job.blocks % slots == 0;
  work.prepare = prepare, work.compute = one_pass;
  for (int pass = 0; pass < (one_pass ? 1 : 2); pass++) {
    if (pass == 1) work.prepare = false, work.compute = true;
    if (slots == 1) {
      run_slots(0, 1, &work);
    } else if (job.run.parallel_for(0, slots, 1, run_slots, &work) != 0) {
      return RK_BAD_CALL;
    }
  }
  int remade = 0;
  for (int64_t s = 0; s < slots; s++) {
    if (work.spoiled[s]) return RK_NOT_FINITE;
    remade += work.remade[s];
  }
  return remade;
}

const Isa* isa_of(int index) {
  return index >= 0 && index < ISA_COUNT && ISAS[index]->runs_here() ? ISAS[index] : nullptr;
}

}  // namespace

const char* rk_isa_name(int isa) { return isa >= 0 && isa < ISA_COUNT ? ISAS[isa]->name : nullptr; }
int rk_isa_runs(int isa) { return isa_of(isa) != nullptr; }
int rk_length(int index) { return index >= 0 && index < LENGTH_COUNT ? LENGTHS[index] : 0; }

int64_t rk_workspace(const rk_call* call, int threads, int backward) {
  Job job;
  if (!job_of(*call, job)) return RK_BAD_CALL;
  return 4 * workspace_floats(job, backward) * (threads > 1 ? threads : 1);
}

int64_t rk_prepared(const rk_call* call) {
  Job job;
  if (!job_of(*call, job)) return RK_BAD_CALL;
  return prepared_floats(job) * job.blocks;
}

int rk_forward(const rk_call* call, const rk_run* run, const void* x, const void* weight, const void* bias, int relu,
               void* y) {
  Job job = {};
  const Isa* isa = isa_of(run->isa);
  if (!isa) return RK_BAD_ISA;
  if (!job_of(*call, job)) return RK_BAD_CALL;
  job.run = *run;
  job.x = static_cast<const char*>(x), job.weight = static_cast<const char*>(weight);
  job.bias = static_cast<const char*>(bias), job.y = static_cast<char*>(y), job.relu = relu;
  return run_job(job, *isa, false, true);
}

int rk_backward(const rk_call* call, const rk_run* run, const void* dy, const void* x, const void* weight, void* dx,
                void* dw) {
  Job job = {};
  const Isa* isa = isa_of(run->isa);
  if (!isa) return RK_BAD_ISA;
  if (!job_of(*call, job)) return RK_BAD_CALL;
  if (dx && (call->algorithm != RK_FFT || !job.height.whole || !job.width.whole)) return RK_BAD_CALL;
  job.run = *run;
  job.dy = static_cast<const char*>(dy), job.x = static_cast<const char*>(x);
  job.weight = static_cast<const char*>(weight);
  job.dx = static_cast<char*>(dx), job.dw = static_cast<char*>(dw);
  return run_job(job, *isa, true, dx != nullptr);
}

uint64_t rk_checksum(const void* data, int64_t bytes, int isa) {
  const Isa* found = isa_of(isa);
  return found ? found->checksum(static_cast<const char*>(data), bytes) : 0;
}

// A program over the buffers of an image, see pnfs/kernels/folded_network.py. With as many images as
// threads, each thread takes whole images, so that the maps stay in its caches; an image that is left
// over is computed by all threads, stage by stage, each step cut into bands of rows.
#include "cpu/folded_network.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/workspace.h"

namespace pnfs {
namespace {

const FoldedKernels& kernels(bool pairs) {
#if defined(__x86_64__)
  const Bf16Unit unit = pairs ? chosen_bf16_unit() : Bf16Unit::none;
  if (unit == Bf16Unit::amx) return kFoldedAmx;
  if (unit == Bf16Unit::avx512) return kFoldedAvx512Bf16;
  const Isa isa = chosen_isa();
  if (isa == Isa::avx512) return kFoldedAvx512;
  if (isa == Isa::avx2) return kFoldedAvx2;
#else
  (void)pairs;
#endif
  return kFoldedPortable;
}

int thread_count() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int team_size() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

struct Buffer {
  std::int64_t serial_at, staged_at, h, w, step, channels, pad;
};

enum class Kind { load, conv, pool, head };

struct Step {
  Kind kind;
  std::int64_t stage, row_cost, rows;
  const std::int64_t* fields;
};

struct Inputs {
  std::vector<const float*> data;
  std::vector<std::array<std::int64_t, 4>> strides;
};

// The plan that Python made, read once per call.
struct Plan {
  std::vector<Buffer> buffers;
  std::vector<Step> steps;
  std::int64_t keypoints, h, w, serial_floats, staged_floats, stages;
  bool pairs;  // operands of the products in bfloat16

  explicit Plan(const std::int64_t* at) {
    const std::int64_t buffer_count = at[0], step_count = at[1];
    keypoints = at[2];
    h = at[3];
    w = at[4];
    serial_floats = at[5];
    staged_floats = at[6];
    stages = at[7];
    pairs = at[8] != 0;
    at += 9;
    for (std::int64_t i = 0; i < buffer_count; ++i, at += 7) {
      buffers.push_back({at[0], at[1], at[2], at[3], at[4], at[5], at[6]});
    }
    for (std::int64_t i = 0; i < step_count; ++i, at += at[0]) {
      Step step{static_cast<Kind>(at[1]), at[2], at[3], h, at + 4};
      if (step.kind != Kind::head) step.rows = buffers[static_cast<std::size_t>(at[5])].h;
      steps.push_back(step);
    }
  }
};

// Runs steps of one image: its maps lie in `arena`, as the serial or the staged order wants them.
struct Image {
  const Plan& plan;
  const FoldedKernels& run;
  const Inputs& inputs;
  const float* weights;
  float* scores;  // of all images
  std::int64_t number;
  bool staged;
  float* arena;

  FoldedMap map(std::int64_t buffer) const {
    if (buffer < 0) return {};
    const Buffer& b = plan.buffers[static_cast<std::size_t>(buffer)];
    return {arena + (staged ? b.staged_at : b.serial_at), b.h, b.w, b.step, b.channels, b.pad};
  }

  const float* vector(std::int64_t offset) const {
    return offset < 0 ? nullptr : weights + offset;
  }

  float scalar(std::int64_t offset) const { return offset < 0 ? 0.0f : weights[offset]; }

  FoldedConv conv(const std::int64_t* f) const {  // in the order of the Python class's fields
    FoldedConv s{};
    s.source = map(f[0]);
    s.out = map(f[1]);
    s.channels = f[2];
    s.outputs = f[3];
    s.bias = vector(f[4]);
    s.weight = vector(f[5]);
    s.kernel = f[6];
    s.stride = f[7];
    s.borders = f[8] != 0;
    s.pairs = plan.pairs;
    s.act = static_cast<int>(f[9]);
    s.taps = vector(f[10]);
    s.taps_bias = vector(f[11]);
    s.taps_act = static_cast<int>(f[12]);
    s.dilation = f[13];
    s.expand = vector(f[14]);
    s.expand_bias = vector(f[15]);
    s.expand_act = static_cast<int>(f[16]);
    s.pre = map(f[17]);
    s.pre_scale = scalar(f[18]);
    s.up = map(f[19]);
    s.post = map(f[20]);
    s.post_scale = scalar(f[21]);
    return s;
  }

  template <class Use>
  void with_head(const std::int64_t* f, const Use& use) const {
    FoldedHead s{};
    s.depth = *f++;
    s.parts = *f;
    std::vector<FoldedMap> sources;
    std::vector<const float*> matrices, biases;
    std::vector<std::int64_t> counts;
    std::vector<const std::int64_t*> of_part;
    f += 1;
    for (std::int64_t p = 0; p < s.parts; ++p) sources.push_back(map(*f++));
    f += 1;
    for (std::int64_t p = 0; p < s.parts; ++p) matrices.push_back(vector(*f++));
    f += 1;
    for (std::int64_t p = 0; p < s.parts; ++p) biases.push_back(vector(*f++));
    f += 1;
    for (std::int64_t p = 0; p < s.parts; ++p) {
      counts.push_back(*f++);
      of_part.push_back(f);
      f += counts.back();
    }
    s.keypoints = plan.keypoints;
    s.pairs = plan.pairs;
    s.sources = sources.data();
    s.weights = matrices.data();
    s.biases = biases.data();
    s.counts = counts.data();
    s.of_part = of_part.data();
    s.scores = scores + number * plan.keypoints * plan.h * plan.w;
    use(s);
  }

  std::size_t scratch() const {
    std::size_t most = 0;
    for (const Step& step : plan.steps) {
      if (step.kind == Kind::conv) most = std::max(most, run.conv_scratch(conv(step.fields)));
      if (step.kind == Kind::head) {
        with_head(step.fields, [&](const FoldedHead& s) {
          most = std::max(most, run.head_scratch(s));
        });
      }
    }
    return most;
  }

  void rows(const Step& step, std::int64_t first, std::int64_t last, float* scratch) const {
    const std::int64_t* f = step.fields;
    if (step.kind == Kind::load) {
      const std::size_t input = static_cast<std::size_t>(f[0]);
      const auto& stride = inputs.strides[input];
      run.load({inputs.data[input] + number * stride[0], {stride[1], stride[2], stride[3]},
                map(f[1])},
               first, last);
    } else if (step.kind == Kind::conv) {
      run.conv(conv(f), first, last, scratch);
    } else if (step.kind == Kind::pool) {
      run.pool({map(f[0]), map(f[1]), map(f[5]), f[2] != 0, vector(f[3]), vector(f[4]),
                scalar(f[6])},
               first, last);
    } else {
      with_head(f, [&](const FoldedHead& s) { run.head(s, first, last, scratch); });
    }
  }

  void all(float* scratch) const {
    for (const Step& step : plan.steps) rows(step, 0, step.rows, scratch);
  }

  // This thread's share of a stage: the rows of its steps, back to back, cut by their cost.
  void share(std::int64_t stage, int thread, int threads, float* scratch) const {
    std::int64_t total = 0, before = 0;
    for (const Step& step : plan.steps) {
      if (step.stage == stage) total += step.row_cost * step.rows;
    }
    const std::int64_t from = total * thread / threads, to = total * (thread + 1) / threads;
    for (const Step& step : plan.steps) {
      if (step.stage != stage) continue;
      // a row belongs to the thread in whose share it begins
      const auto row_from = [&](std::int64_t at) {
        const std::int64_t row = (at - before + step.row_cost - 1) / step.row_cost;
        return std::clamp<std::int64_t>(at <= before ? 0 : row, 0, step.rows);
      };
      const std::int64_t first = row_from(from), last = row_from(to);
      if (first < last) rows(step, first, last, scratch);
      before += step.row_cost * step.rows;
    }
  }
};

}  // namespace

void folded_network(const Addresses& inputs,
                    const std::vector<std::array<std::int64_t, 4>>& strides, Address weights,
                    Address plan_address, Address scores, std::int64_t images) {
  Inputs maps;
  for (const Address input : inputs) maps.data.push_back(reinterpret_cast<const float*>(input));
  maps.strides = strides;
  const Plan plan(reinterpret_cast<const std::int64_t*>(plan_address));
  Image image{plan,
              kernels(plan.pairs),
              maps,
              reinterpret_cast<const float*>(weights),
              reinterpret_cast<float*>(scores),
              0,
              false,
              nullptr};
  // Without an arena, maps that are not there are told from those that are by a wrong address.
  float nowhere[1];
  image.arena = nowhere;
  const std::size_t scratch = image.scratch();
  const int threads = thread_count();
  const std::int64_t whole = images / threads * threads;
  if (whole > 0) {
#pragma omp parallel num_threads(threads)
    {
      static thread_local Workspace memory;
      Image own = image;
      own.arena = memory.floats(static_cast<std::size_t>(plan.serial_floats) + scratch);
      float* own_scratch = own.arena + plan.serial_floats;
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t i = 0; i < whole; ++i) {
        own.number = i;
        own.all(own_scratch);
      }
    }
  }
  if (whole == images) return;
  static thread_local Workspace shared_memory;
  image.staged = true;
  image.arena = shared_memory.floats(static_cast<std::size_t>(plan.staged_floats));
#pragma omp parallel num_threads(threads)
  {
    static thread_local Workspace memory;
    Image own = image;
    float* own_scratch = memory.floats(scratch);
    for (own.number = whole; own.number < images; ++own.number) {
      for (std::int64_t stage = 0; stage < plan.stages; ++stage) {
        own.share(stage, thread_number(), team_size(), own_scratch);
#pragma omp barrier
      }
    }
  }
}

}  // namespace pnfs

// Every launch of one evaluation of the transformer, from the latents' rows to their velocity, in
// one call: the host fills structs and never returns to Python between two kernels. Nothing is
// allocated; a CUDA graph may record it.
#include "cuda/denoise_step.cuh"
#include "cuda/rms_norm_modulate.cuh"

namespace lens {
namespace gpu {
namespace {

// The six rows of a block and stream in the modulation table, in its order.
enum ModulationRow { kShift1, kScale1, kGate1, kShift2, kScale2, kGate2 };

constexpr int64_t kElement = 2;  // bytes of a bfloat16

struct Step {
  const DenoiseStepParams& p;
  int64_t D = p.N * p.H, joint = p.RI + p.RT;
  int64_t row_stride = p.L * 2 * 6 * D;  // of the modulation: one sample to the next
  int error = 0;

  // Rows of the workspace: x, then normed (attention's output between two norms), then the wide
  // ones: q, k and v or the MLP's hidden rows, which are never alive together. Image rows come
  // before text rows.
  char* x(Stream s) const { return at(0, s == kText ? p.RI : 0, D); }
  char* normed(Stream s) const { return at(joint * D, s == kText ? p.RI : 0, D); }
  char* qkv(int64_t plane) const { return at(2 * joint * D, plane * joint, D); }
  char* hidden(Stream s) const { return at(2 * joint * D, s == kText ? p.RI : 0, p.F); }
  char* at(int64_t first, int64_t row, int64_t width) const {
    return static_cast<char*>(p.workspace) + (first + row * width) * kElement;
  }

  const StreamWeights& weights(int64_t block, Stream s) const { return p.weights[2 * block + s]; }
  const void* modulation(int64_t block, Stream s, ModulationRow row) const {
    return static_cast<const char*>(p.modulation) + ((block * 2 + s) * 6 + row) * D * kElement;
  }
  const int32_t* offsets(Stream s) const { return s == kImage ? p.image_offsets : p.text_offsets; }

  // The first launch that fails is the last.
  template <class Params>
  void run(int (*launcher)(const Params&), Params params) {
    params.dtype = DType::kBFloat16;
    params.stream = p.stream;
    if (error == 0) error = launcher(params);
  }

  void linear(const void* rows, const void* weight, const void* bias, void* y, int64_t K,
              int64_t columns) {
    LinearParams q{};
    q.x = rows, q.weight = weight, q.bias = bias, q.y = y;
    q.R = p.RI, q.K = K, q.D = columns, q.cluster = p.cluster;
    run(linear_cuda, q);
  }

  // Image rows from x, text rows, if any, from `text_x`; one launch.
  void norm_modulate(int64_t block, bool text, const void* text_x,
                     const void* StreamWeights::* weight, ModulationRow shift,
                     ModulationRow scale) {
    RmsNormModulateSets sets{};
    for (Stream s : {kImage, kText}) {
      RmsNormModulateParams& q = sets.p[s];
      q.x = s == kImage ? x(kImage) : text_x, q.weight = weights(block, s).*weight;
      q.y = normed(s), q.offsets = offsets(s);
      q.shift = modulation(block, s, shift), q.scale = modulation(block, s, scale);
      q.R = s == kImage ? p.RI : text ? p.RT : 0, q.B = p.B, q.D = D;
      q.shift_stride = q.scale_stride = row_stride;
      q.eps = p.eps;
      q.dtype = DType::kBFloat16;
      q.stream = p.stream;
    }
    if (error == 0) error = rms_norm_modulate_sets_cuda(sets);
  }

  void qkv_norm_rope(int64_t block) {
    const StreamWeights &image = weights(block, kImage), &text = weights(block, kText);
    LinearQkvNormRopeParams q{};
    q.image_x = normed(kImage), q.text_x = normed(kText);
    q.image_weight = image.qkv, q.text_weight = text.qkv;
    q.image_bias = image.qkv_bias, q.text_bias = text.qkv_bias;
    q.image_q_weight = image.q_norm, q.image_k_weight = image.k_norm;
    q.text_q_weight = text.q_norm, q.text_k_weight = text.k_norm;
    q.cos = p.cos, q.sin = p.sin;
    q.image_offsets = p.image_offsets, q.text_offsets = p.text_offsets;
    q.qkv = qkv(0);
    q.RI = p.RI, q.RT = p.RT, q.B = p.B, q.K = D, q.N = p.N, q.H = p.H;
    q.eps = p.eps, q.cluster = p.cluster;
    run(linear_qkv_norm_rope_cuda, q);
  }

  void attention(int64_t block, bool text) {
    JointAttentionParams q{};
    q.q = qkv(0), q.k = qkv(1), q.v = qkv(2);
    q.image_offsets = p.image_offsets, q.text_offsets = p.text_offsets;
    q.image_out = normed(kImage), q.text_out = text ? normed(kText) : nullptr;
    q.RI = p.RI, q.RT = p.RT, q.B = p.B, q.N = p.N, q.H = p.H;
    q.polynomial = p.polynomial;
    q.scale = p.scale;
    q.score_bound = p.score_bounds[block];
    run(joint_attention_cuda, q);
  }

  void swiglu(int64_t block, bool text) {
    LinearSwigluParams q{};
    q.image_x = normed(kImage), q.text_x = normed(kText);
    q.image_weight = weights(block, kImage).w13, q.text_weight = weights(block, kText).w13;
    q.image_y = hidden(kImage), q.text_y = hidden(kText);
    q.RI = p.RI, q.RT = text ? p.RT : 0, q.K = D, q.F = p.F, q.cluster = p.cluster;
    run(linear_swiglu_cuda, q);
  }

  // x += gate * (y weight^T + bias), from `text_x` in the text stream
  void gated_residual(int64_t block, bool text, const void* text_x, bool mlp) {
    const StreamWeights &image_of = weights(block, kImage), &text_of = weights(block, kText);
    const ModulationRow gate = mlp ? kGate2 : kGate1;
    LinearGatedResidualParams q{};
    q.image_x = x(kImage), q.text_x = text_x;
    q.image_y = mlp ? hidden(kImage) : normed(kImage),
    q.text_y = mlp ? hidden(kText) : normed(kText);
    q.image_weight = mlp ? image_of.w2 : image_of.out,
    q.text_weight = mlp ? text_of.w2 : text_of.out;
    q.image_bias = mlp ? nullptr : image_of.out_bias,
    q.text_bias = mlp ? nullptr : text_of.out_bias;
    q.image_gate = modulation(block, kImage, gate), q.text_gate = modulation(block, kText, gate);
    q.image_gate_stride = q.text_gate_stride = row_stride;
    q.image_offsets = p.image_offsets, q.text_offsets = p.text_offsets;
    q.image_out = x(kImage), q.text_out = x(kText);
    q.RI = p.RI, q.RT = text ? p.RT : 0, q.B = p.B, q.K = mlp ? p.F : D, q.D = D;
    q.cluster = p.cluster;
    run(linear_gated_residual_cuda, q);
  }

  void final_norm() {
    if (error != 0 || p.RI == 0) return;
    const char* scale = static_cast<const char*>(p.final_modulation);
    const FinalNorm q{
        x(kImage), scale, scale + D * kElement, p.image_offsets, normed(kImage), p.RI, p.B,
        D,         2 * D, float(p.eps)};
    LENS_LAUNCH(final_norm_kernel<Bf16>, row_grid(p.RI), dim3(kWarp, kRowsPerBlock), p.stream, q);
    error = int(cudaGetLastError());
  }
};

}  // namespace
}  // namespace gpu

int denoise_step_cuda(const DenoiseStepParams& p) {
  using namespace gpu;
  const int64_t D = p.N * p.H;
  const uintptr_t arrays[] = {
      reinterpret_cast<uintptr_t>(p.workspace), reinterpret_cast<uintptr_t>(p.modulation),
      reinterpret_cast<uintptr_t>(p.final_modulation), reinterpret_cast<uintptr_t>(p.text_rows)};
  for (uintptr_t array : arrays) {
    if (array % 16 != 0) return int(cudaErrorInvalidValue);
  }
  if (p.dtype != DType::kBFloat16 || D % 64 != 0) return int(cudaErrorNotSupported);

  // from latents to the width of the blocks
  Step step{p};
  step.linear(p.image_rows, p.image_in, p.image_in_bias, step.x(kImage), p.C, D);
  // read where the text projection left it; the first gated residual writes it elsewhere
  const void* text_x = p.text_rows;
  step.norm_modulate(0, true, text_x, &StreamWeights::norm1, kShift1, kScale1);

  // the blocks; norm 1 of the next one runs at the end of each
  for (int64_t block = 0; block < p.L; ++block) {
    const bool last = block + 1 == p.L, text = !last;  // nothing reads the last block's text
    step.qkv_norm_rope(block);
    step.attention(block, text);
    step.gated_residual(block, text, text_x, false);
    text_x = step.x(kText);
    step.norm_modulate(block, text, text_x, &StreamWeights::norm2, kShift2, kScale2);
    step.swiglu(block, text);
    step.gated_residual(block, text, text_x, true);
    if (!last) step.norm_modulate(block + 1, true, text_x, &StreamWeights::norm1, kShift1, kScale1);
  }

  // and back to latents
  step.final_norm();
  step.linear(step.normed(kImage), p.image_out, p.image_out_bias, p.velocity, D, p.C);
  return step.error;
}

}  // namespace lens

// The pybind11 table of lens._C. Tensors arrive as addresses and sizes, all by name, so that no
// torch header is needed; the ops in lens/ops check shapes and dtypes and own the memory. Below,
// each struct of params.h lists its fields once: a reader fills and checks it from Python's
// arguments, and the kernel runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"
#include "dispatch.h"

namespace py = pybind11;

namespace lens {
namespace {

template <class V>
void fields(PackTokensParams& p, V& v) {
  v.size("R", p.R, 0);
  v.size("BL", p.BL, 0);
  v.size("C", p.C, 1);
  v.array("x", p.x, p.BL * p.C);
  v.rows("rows", p.rows, p.R, p.BL);
  v.array("packed", p.packed, p.R * p.C);
}

template <class V>
void fields(UnpackTokensParams& p, V& v) {
  v.size("R", p.R, 0);
  v.size("BL", p.BL, 0);
  v.size("C", p.C, 1);
  v.array("packed", p.packed, p.R * p.C);
  v.rows("rows", p.rows, p.R, p.BL);
  v.array("x", p.x, p.BL * p.C);
}

// R packed rows of D channels in B samples
template <class Params, class V>
void packed_sizes(Params& p, V& v) {
  v.size("R", p.R, 0);
  v.size("B", p.B, p.R > 0);
  v.size("D", p.D, 1);
  v.offsets("offsets", p.offsets, p.B, "R", p.R);
}

template <class V>
void fields(RmsNormModulateParams& p, V& v) {
  packed_sizes(p, v);
  v.array("x", p.x, p.R * p.D);
  v.array("weight", p.weight, p.D);
  v.strided("scale", p.scale, p.B * p.D, "scale_stride", p.scale_stride);
  v.strided("shift", p.shift, p.B * p.D, "shift_stride", p.shift_stride);
  v.array("y", p.y, p.R * p.D);
  v.number("eps", p.eps);
}

template <class V>
void fields(RmsNormModulateBackwardParams& p, V& v) {
  packed_sizes(p, v);
  v.array("dy", p.dy, p.R * p.D);
  v.array("x", p.x, p.R * p.D);
  v.array("weight", p.weight, p.D);
  v.strided("scale", p.scale, p.B * p.D, "scale_stride", p.scale_stride);
  v.array("dx", p.dx, p.R * p.D);
  v.array("dweight", p.dweight, p.D);
  v.array("dscale", p.dscale, p.B * p.D);
  v.array("dshift", p.dshift, p.B * p.D);
  v.array("workspace", p.workspace, split_slots(p.R, p.B) * 2 * p.D);
  v.number("eps", p.eps);
}

// What forward and backward of qk_norm_rope share.
template <class Params, class V>
void head_fields(Params& p, V& v) {
  v.size("RI", p.RI, 0);
  v.size("RT", p.RT, 0);
  v.size("B", p.B, p.RI + p.RT > 0);
  v.size("N", p.N, 1);
  v.size("H", p.H, 2);
  v.expect(p.H % 2 == 0 && p.H <= 512, "H must be even and in [2, 512]", p.H);
  v.offsets("image_offsets", p.image_offsets, p.B, "RI", p.RI);
  v.offsets("text_offsets", p.text_offsets, p.B, "RT", p.RT);
  v.array("image_qkv", p.image_qkv, p.RI * 3 * p.N * p.H);
  v.array("text_qkv", p.text_qkv, p.RT * 3 * p.N * p.H);
  v.array("image_q_weight", p.image_q_weight, p.H);
  v.array("image_k_weight", p.image_k_weight, p.H);
  v.array("text_q_weight", p.text_q_weight, p.H);
  v.array("text_k_weight", p.text_k_weight, p.H);
  v.array("cos", p.cos, (p.RI + p.RT) * (p.H / 2));
  v.array("sin", p.sin, (p.RI + p.RT) * (p.H / 2));
  v.number("eps", p.eps);
}

template <class V>
void fields(QkNormRopeParams& p, V& v) {
  head_fields(p, v);
  v.array("qkv", p.qkv, 3 * (p.RI + p.RT) * p.N * p.H);
}

template <class V>
void fields(QkNormRopeBackwardParams& p, V& v) {
  head_fields(p, v);
  v.array("dqkv", p.dqkv, 3 * (p.RI + p.RT) * p.N * p.H);
  v.array("dimage_qkv", p.dimage_qkv, p.RI * 3 * p.N * p.H);
  v.array("dtext_qkv", p.dtext_qkv, p.RT * 3 * p.N * p.H);
  v.array("dimage_q_weight", p.dimage_q_weight, p.H);
  v.array("dimage_k_weight", p.dimage_k_weight, p.H);
  v.array("dtext_q_weight", p.dtext_q_weight, p.H);
  v.array("dtext_k_weight", p.dtext_k_weight, p.H);
  v.array("workspace", p.workspace, (split_chunks(p.RI) + split_chunks(p.RT)) * 2 * p.H);
}

template <class V>
void fields(GatedResidualParams& p, V& v) {
  packed_sizes(p, v);
  v.array("x", p.x, p.R * p.D);
  v.array("y", p.y, p.R * p.D);
  v.strided("gate", p.gate, p.B * p.D, "gate_stride", p.gate_stride);
  v.array("out", p.out, p.R * p.D);
}

template <class V>
void fields(GatedResidualBackwardParams& p, V& v) {
  packed_sizes(p, v);
  v.array("dout", p.dout, p.R * p.D);
  v.array("y", p.y, p.R * p.D);
  v.strided("gate", p.gate, p.B * p.D, "gate_stride", p.gate_stride);
  v.array("dy", p.dy, p.R * p.D);
  v.array("dgate", p.dgate, p.B * p.D);
  v.array("workspace", p.workspace, split_slots(p.R, p.B) * p.D);
}

template <class V>
void fields(GatedResidualNormModulateParams& p, V& v) {
  packed_sizes(p, v);
  v.array("x", p.x, p.R * p.D);
  v.array("y", p.y, p.R * p.D);
  v.strided("gate", p.gate, p.B * p.D, "gate_stride", p.gate_stride);
  v.array("weight", p.weight, p.D);
  v.strided("scale", p.scale, p.B * p.D, "scale_stride", p.scale_stride);
  v.strided("shift", p.shift, p.B * p.D, "shift_stride", p.shift_stride);
  v.array("x_new", p.x_new, p.R * p.D);
  v.array("normed", p.normed, p.R * p.D);
  v.number("eps", p.eps);
}

template <class V>
void fields(GatedResidualNormModulateBackwardParams& p, V& v) {
  packed_sizes(p, v);
  v.array("dx_new", p.dx_new, p.R * p.D);
  v.array("dnormed", p.dnormed, p.R * p.D);
  v.array("x_new", p.x_new, p.R * p.D);
  v.array("y", p.y, p.R * p.D);
  v.strided("gate", p.gate, p.B * p.D, "gate_stride", p.gate_stride);
  v.array("weight", p.weight, p.D);
  v.strided("scale", p.scale, p.B * p.D, "scale_stride", p.scale_stride);
  v.array("dx", p.dx, p.R * p.D);
  v.array("dy", p.dy, p.R * p.D);
  v.array("dgate", p.dgate, p.B * p.D);
  v.array("dweight", p.dweight, p.D);
  v.array("dscale", p.dscale, p.B * p.D);
  v.array("dshift", p.dshift, p.B * p.D);
  v.array("workspace", p.workspace, split_slots(p.R, p.B) * 3 * p.D);
  v.number("eps", p.eps);
}

template <class V>
void fields(SwigluParams& p, V& v) {
  v.size("R", p.R, 0);
  v.size("F", p.F, 1);
  v.array("h", p.h, p.R * 2 * p.F);
  v.array("y", p.y, p.R * p.F);
}

template <class V>
void fields(SwigluBackwardParams& p, V& v) {
  v.size("R", p.R, 0);
  v.size("F", p.F, 1);
  v.array("dy", p.dy, p.R * p.F);
  v.array("h", p.h, p.R * 2 * p.F);
  v.array("dh", p.dh, p.R * 2 * p.F);
}

template <class V>
void fields(GuidanceStepParams& p, V& v) {
  v.size("R", p.R, 0);
  v.size("B", p.B, p.R > 0);
  v.size("C", p.C, 1);
  v.offsets("offsets", p.offsets, p.B, "R", p.R);
  v.array("x", p.x, p.R * p.C);
  v.array("cond", p.cond, p.R * p.C);
  v.array("uncond", p.uncond, 0);  // may be null
  v.array("delta", p.delta, p.B);
  v.array("out", p.out, p.R * p.C);
  v.number("guidance", p.guidance);
}

template <class V>
void fields(JointAttentionParams& p, V& v) {
  v.size("RI", p.RI, 0);
  v.size("RT", p.RT, 0);
  v.size("B", p.B, p.RI + p.RT > 0);
  v.size("N", p.N, 1);
  v.size("H", p.H, 1);
  v.array("q", p.q, (p.RI + p.RT) * p.N * p.H);
  v.array("k", p.k, (p.RI + p.RT) * p.N * p.H);
  v.array("v", p.v, (p.RI + p.RT) * p.N * p.H);
  v.offsets("image_offsets", p.image_offsets, p.B, "RI", p.RI);
  v.offsets("text_offsets", p.text_offsets, p.B, "RT", p.RT);
  v.array("image_out", p.image_out, p.RI * p.N * p.H);
  v.array("text_out", p.text_out, 0);  // may be null
  v.array("lse", p.lse, 0);            // may be null
  v.size("polynomial", p.polynomial, 0);
  v.expect(p.polynomial <= 1, "polynomial must be 0 or 1", p.polynomial);
  v.number("scale", p.scale);
  v.number("score_bound", p.score_bound);
}

// What a tile asks of both sides of a product.
template <class V>
void product_sizes(int64_t& K, const char* columns_name, int64_t& columns, int64_t multiple, V& v) {
  v.size("K", K, 1);
  v.size(columns_name, columns, 1);
  v.expect(K % 64 == 0, "K must be a multiple of 64", K);
  v.expect(columns % multiple == 0,
           multiple == 64 ? "D must be a multiple of 64" : "F must be a multiple of 32", columns);
}

// Rows of both streams in B samples
template <class Params, class V>
void stream_sizes(Params& p, V& v) {
  v.size("RI", p.RI, 0);
  v.size("RT", p.RT, 0);
  v.size("B", p.B, p.RI + p.RT > 0);
  v.offsets("image_offsets", p.image_offsets, p.B, "RI", p.RI);
  v.offsets("text_offsets", p.text_offsets, p.B, "RT", p.RT);
}

// Blocks that share a tile of the weight; 0: whatever is predicted quicker
template <class V>
void cluster_size(int64_t& cluster, V& v) {
  v.size("cluster", cluster, 0);
  v.expect(cluster <= 2, "cluster must be 0, 1 or 2", cluster);
}

template <class V>
void fields(LinearParams& p, V& v) {
  cluster_size(p.cluster, v);
  v.size("R", p.R, 0);
  product_sizes(p.K, "D", p.D, 64, v);
  v.array("x", p.x, p.R * p.K);
  v.array("weight", p.weight, p.D * p.K);
  v.array("bias", p.bias, 0);  // may be null
  v.array("y", p.y, p.R * p.D);
}

template <class V>
void fields(LinearQkvNormRopeParams& p, V& v) {
  cluster_size(p.cluster, v);
  stream_sizes(p, v);
  v.size("K", p.K, 1);
  v.expect(p.K % 64 == 0, "K must be a multiple of 64", p.K);
  v.size("N", p.N, 1);
  v.size("H", p.H, 2);
  v.expect(p.H == 64, "H must be 64", p.H);
  const int64_t columns = 3 * p.N * p.H;
  v.array("image_x", p.image_x, p.RI * p.K);
  v.array("text_x", p.text_x, p.RT * p.K);
  v.array("image_weight", p.image_weight, p.RI > 0 ? columns * p.K : 0);
  v.array("text_weight", p.text_weight, p.RT > 0 ? columns * p.K : 0);
  v.array("image_bias", p.image_bias, 0);  // may be null
  v.array("text_bias", p.text_bias, 0);    // may be null
  v.array("image_q_weight", p.image_q_weight, p.RI > 0 ? p.H : 0);
  v.array("image_k_weight", p.image_k_weight, p.RI > 0 ? p.H : 0);
  v.array("text_q_weight", p.text_q_weight, p.RT > 0 ? p.H : 0);
  v.array("text_k_weight", p.text_k_weight, p.RT > 0 ? p.H : 0);
  v.array("cos", p.cos, (p.RI + p.RT) * (p.H / 2));
  v.array("sin", p.sin, (p.RI + p.RT) * (p.H / 2));
  v.array("qkv", p.qkv, (p.RI + p.RT) * columns);
  v.number("eps", p.eps);
}

template <class V>
void fields(LinearSwigluParams& p, V& v) {
  cluster_size(p.cluster, v);
  v.size("RI", p.RI, 0);
  v.size("RT", p.RT, 0);
  product_sizes(p.K, "F", p.F, 32, v);
  v.array("image_x", p.image_x, p.RI * p.K);
  v.array("text_x", p.text_x, p.RT * p.K);
  v.array("image_weight", p.image_weight, p.RI > 0 ? 2 * p.F * p.K : 0);
  v.array("text_weight", p.text_weight, p.RT > 0 ? 2 * p.F * p.K : 0);
  v.array("image_y", p.image_y, p.RI * p.F);
  v.array("text_y", p.text_y, p.RT * p.F);
}

template <class V>
void fields(LinearGatedResidualParams& p, V& v) {
  cluster_size(p.cluster, v);
  stream_sizes(p, v);
  product_sizes(p.K, "D", p.D, 64, v);
  const int64_t image = p.RI > 0, text = p.RT > 0;
  v.array("image_x", p.image_x, p.RI * p.D);
  v.array("text_x", p.text_x, p.RT * p.D);
  v.array("image_y", p.image_y, p.RI * p.K);
  v.array("text_y", p.text_y, p.RT * p.K);
  v.array("image_weight", p.image_weight, image * p.D * p.K);
  v.array("text_weight", p.text_weight, text * p.D * p.K);
  v.array("image_bias", p.image_bias, 0);  // may be null
  v.array("text_bias", p.text_bias, 0);    // may be null
  v.strided("image_gate", p.image_gate, image * p.B * p.D, "image_gate_stride",
            p.image_gate_stride);
  v.strided("text_gate", p.text_gate, text * p.B * p.D, "text_gate_stride", p.text_gate_stride);
  v.array("image_out", p.image_out, p.RI * p.D);
  v.array("text_out", p.text_out, p.RT * p.D);
}

template <class V>
void fields(DenoiseStepParams& p, V& v) {
  v.size("RI", p.RI, 0);
  v.size("RT", p.RT, 0);
  v.size("B", p.B, p.RI + p.RT > 0);
  v.size("L", p.L, 1);
  v.size("N", p.N, 1);
  v.size("H", p.H, 2);
  v.size("F", p.F, 1);
  v.size("C", p.C, 1);
  const int64_t D = p.N * p.H, joint = p.RI + p.RT;
  v.array("weights", p.weights, p.L * 2);
  v.array("score_bounds", p.score_bounds, p.L);
  v.array("image_in", p.image_in, D * p.C);
  v.array("image_in_bias", p.image_in_bias, D);
  v.array("image_out", p.image_out, p.C * D);
  v.array("image_out_bias", p.image_out_bias, p.C);
  v.array("image_rows", p.image_rows, p.RI * p.C);
  v.array("text_rows", p.text_rows, p.RT * D);
  v.array("modulation", p.modulation, p.B * p.L * 12 * D);
  v.array("final_modulation", p.final_modulation, p.B * 2 * D);
  v.array("cos", p.cos, joint * (p.H / 2));
  v.array("sin", p.sin, joint * (p.H / 2));
  v.offsets("image_offsets", p.image_offsets, p.B, "RI", p.RI);
  v.offsets("text_offsets", p.text_offsets, p.B, "RT", p.RT);
  v.array("workspace", p.workspace, joint * (2 * D + (3 * D > p.F ? 3 * D : p.F)));
  v.array("velocity", p.velocity, p.RI * p.C);
  v.size("polynomial", p.polynomial, 0);
  cluster_size(p.cluster, v);
  v.number("scale", p.scale);
  v.number("eps", p.eps);
}

#if defined(LENS_WITH_CUTLASS)
template <class V>
void fields(CutlassLinearGatedResidualParams& p, V& v) {
  v.size("B", p.B, 0);
  v.size("S", p.S, 0);
  v.size("D", p.D, 1);
  v.size("K", p.K, 1);
  v.array("a", p.a, p.B * p.S * p.K);
  v.array("weight", p.weight, p.D * p.K);
  v.array("bias", p.bias, 0);  // may be null
  v.strided("gate", p.gate, p.B * p.D, "gate_stride", p.gate_stride);
  v.array("x", p.x, p.B * p.S * p.D);
  v.array("out", p.out, p.B * p.S * p.D);
}

void run(const CutlassLinearGatedResidualParams& p, int device) {
  const char* op = "cutlass_linear_gated_residual";
  if (device < 0) refuse(op, "device must be a GPU, got the CPU");
  check_launch(op, cutlass_linear_gated_residual_cuda(p));
}
#endif

template <class Params>
void bind(py::module_& m, const char* name) {
  Params none{};
  Describer described(name);
  fields(none, described);
  const auto call = [name](const py::kwargs& arguments) {
    Params p{};
    Reader reader(name, arguments);
    reader.common(p);
    fields(p, reader);
    reader.finish();
    py::gil_scoped_release unlocked;
    run(p, reader.device());
  };
  m.def(name, call, described.text().c_str());
}

}  // namespace
}  // namespace lens

PYBIND11_MODULE(_C, m) {
  using namespace lens;
  m.doc() = "Compiled kernels of lens.ops";
#define LENS_BIND(stem, Params) bind<Params>(m, #stem);
  LENS_FOR_EACH_KERNEL(LENS_BIND)
#if defined(LENS_WITH_HOPPER)
  LENS_FOR_EACH_HOPPER_KERNEL(LENS_BIND)
#endif
#undef LENS_BIND
#if defined(LENS_WITH_CUTLASS)
  bind<CutlassLinearGatedResidualParams>(m, "cutlass_linear_gated_residual");
#endif
#if defined(LENS_WITH_CUDA)
  m.attr("with_cuda") = true;
  m.attr("cuda_targets") = LENS_CUDA_TARGETS;  // "80-real 90a-real 120-virtual", say
#else
  m.attr("with_cuda") = false;
  m.attr("cuda_targets") = "";
#endif
  m.attr("split_rows") = kSplitRows;
  m.def("isa", [] { return isas()[current_isa()].name; });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Isa& isa : isas()) {
      if (isa.available()) names.push_back(isa.name);
    }
    return names;
  });
}

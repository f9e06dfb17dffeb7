// Ops on packed rows, each row by itself but for the sums of a backward pass: rms_norm_modulate,
// gated_residual, both in one, swiglu; and group_norm_silu, whose statistics are a sample's.
#pragma once

#include "params/common.h"

namespace lens {

// R packed rows of D channels in B samples
template <class Params, class V>
void packed_sizes(Params& p, V& v) {
  v.size("R", p.R, 0);
  v.size("B", p.B, p.R > 0);
  v.size("D", p.D, 1);
  v.offsets("offsets", p.offsets, p.B, "R", p.R);
}

// y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale_b) + shift_b
struct RmsNormModulateParams {
  const void* x;           // [R, D]
  const void* weight;      // [D]
  const void* scale;       // [B, D], row stride scale_stride
  const void* shift;       // [B, D], row stride shift_stride
  const int32_t* offsets;  // [B + 1]
  void* y;                 // [R, D]
  int64_t R, B, D;
  int64_t scale_stride, shift_stride;
  double eps;
  DType dtype;
  void* stream;
};

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

// With n = x * rsqrt(mean(x^2) + eps), g = dy * weight * (1 + scale_b) and P_b = sum over rows of b
// of dy * n:
//   dx = r * (g - n * mean(g * n)), dscale_b = weight * P_b, dshift_b = sum of dy, dweight = sum_b
//   (1 + scale_b) * P_b
struct RmsNormModulateBackwardParams {
  const void* dy;          // [R, D]
  const void* x;           // [R, D]
  const void* weight;      // [D]
  const void* scale;       // [B, D], row stride scale_stride
  const int32_t* offsets;  // [B + 1]
  void* dx;                // [R, D]
  void* dweight;           // [D]
  void* dscale;            // [B, D]
  void* dshift;            // [B, D]
  void* workspace;         // acc [split_slots(R, B), 2, D]: sums of dy * n and of dy
  int64_t R, B, D;
  int64_t scale_stride;
  double eps;
  DType dtype;
  void* stream;
};

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

// out = x + gate_b * y
struct GatedResidualParams {
  const void* x;           // [R, D]
  const void* y;           // [R, D]
  const void* gate;        // [B, D], row stride gate_stride
  const int32_t* offsets;  // [B + 1]
  void* out;               // [R, D]
  int64_t R, B, D;
  int64_t gate_stride;
  DType dtype;
  void* stream;
};

template <class V>
void fields(GatedResidualParams& p, V& v) {
  packed_sizes(p, v);
  v.array("x", p.x, p.R * p.D);
  v.array("y", p.y, p.R * p.D);
  v.strided("gate", p.gate, p.B * p.D, "gate_stride", p.gate_stride);
  v.array("out", p.out, p.R * p.D);
}

// dy = gate_b * dout, dgate_b = sum over rows of b of dout * y; dx is dout itself
struct GatedResidualBackwardParams {
  const void* dout;        // [R, D]
  const void* y;           // [R, D]
  const void* gate;        // [B, D], row stride gate_stride
  const int32_t* offsets;  // [B + 1]
  void* dy;                // [R, D]
  void* dgate;             // [B, D]
  void* workspace;         // acc [split_slots(R, B), D]: sums of dout * y
  int64_t R, B, D;
  int64_t gate_stride;
  DType dtype;
  void* stream;
};

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

// x_new = x + gate_b * y, rounded to dtype; normed = rms_norm_modulate(x_new)
struct GatedResidualNormModulateParams {
  const void* x;           // [R, D]
  const void* y;           // [R, D]
  const void* gate;        // [B, D], row stride gate_stride
  const void* weight;      // [D]
  const void* scale;       // [B, D], row stride scale_stride
  const void* shift;       // [B, D], row stride shift_stride
  const int32_t* offsets;  // [B + 1]
  void* x_new;             // [R, D]
  void* normed;            // [R, D]
  int64_t R, B, D;
  int64_t gate_stride, scale_stride, shift_stride;
  double eps;
  DType dtype;
  void* stream;
};

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

// dx = dx_new + (gradient of the norm at x_new), dy = gate_b * dx and dgate_b = sum of dx * y with
// dx not yet rounded; dweight, dscale, dshift as in rms_norm_modulate
struct GatedResidualNormModulateBackwardParams {
  const void* dx_new;      // [R, D]
  const void* dnormed;     // [R, D]
  const void* x_new;       // [R, D]
  const void* y;           // [R, D]
  const void* gate;        // [B, D], row stride gate_stride
  const void* weight;      // [D]
  const void* scale;       // [B, D], row stride scale_stride
  const int32_t* offsets;  // [B + 1]
  void* dx;                // [R, D]
  void* dy;                // [R, D]
  void* dgate;             // [B, D]
  void* dweight;           // [D]
  void* dscale;            // [B, D]
  void* dshift;            // [B, D]
  void* workspace;  // acc [split_slots(R, B), 3, D]: sums of dnormed * n, of dnormed and of dx * y
  int64_t R, B, D;
  int64_t gate_stride, scale_stride;
  double eps;
  DType dtype;
  void* stream;
};

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

// y = silu(h[:, :F]) * h[:, F:]
struct SwigluParams {
  const void* h;  // [R, 2, F]
  void* y;        // [R, F]
  int64_t R, F;
  DType dtype;
  void* stream;
};

template <class V>
void fields(SwigluParams& p, V& v) {
  v.size("R", p.R, 0);
  v.size("F", p.F, 1);
  v.array("h", p.h, p.R * 2 * p.F);
  v.array("y", p.y, p.R * p.F);
}

// With a = h[:, :F], u = h[:, F:], s = sigmoid(a): da = dy * u * s * (1 + a * (1 - s)), du = dy * a
// * s
struct SwigluBackwardParams {
  const void* dy;  // [R, F]
  const void* h;   // [R, 2, F]
  void* dh;        // [R, 2, F]
  int64_t R, F;
  DType dtype;
  void* stream;
};

template <class V>
void fields(SwigluBackwardParams& p, V& v) {
  v.size("R", p.R, 0);
  v.size("F", p.F, 1);
  v.array("dy", p.dy, p.R * p.F);
  v.array("h", p.h, p.R * 2 * p.F);
  v.array("dh", p.dh, p.R * 2 * p.F);
}

// y = act((x - mean_bg) * rstd_bg * weight + bias), mean and variance over the rows of sample b and
// the D / G channels of group g; act is silu, or nothing with activate = 0
struct GroupNormSiluParams {
  const void* x;           // [R, D]
  const void* weight;      // [D]
  const void* bias;        // [D]
  const int32_t* offsets;  // [B + 1]
  void* y;                 // [R, D]
  void* workspace;  // acc [split_slots(R, B), 2, D]: a slot's mean and its squared deviations' sum
  void* table;      // acc [B, 2, D]: mean and rstd * weight
  int64_t R, B, D, G;
  int64_t activate;
  double eps;
  DType dtype;
  void* stream;
};

template <class V>
void fields(GroupNormSiluParams& p, V& v) {
  packed_sizes(p, v);
  v.size("G", p.G, 1);
  v.expect(p.G < 1 || p.D % p.G == 0, "D must be a multiple of G", p.D);
  v.size("activate", p.activate, 0);
  v.array("x", p.x, p.R * p.D);
  v.array("weight", p.weight, p.D);
  v.array("bias", p.bias, p.D);
  v.array("y", p.y, p.R * p.D);
  v.array("workspace", p.workspace, split_slots(p.R, p.B) * 2 * p.D);
  v.array("table", p.table, p.B * 2 * p.D);
  v.number("eps", p.eps);
}

}  // namespace lens

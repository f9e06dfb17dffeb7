// The pybind11 table of lens._C. Tensors arrive as addresses and sizes, all by name, so that no
// torch header is needed; the ops in lens/ops check shapes and dtypes and own the memory. A Reader
// fills and checks a kernel's params struct from Python's arguments (arguments.h), and the kernel
// runs without the GIL (dispatch.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"
#include "dispatch.h"

namespace py = pybind11;

namespace lens {
namespace {

#if defined(LENS_WITH_CUTLASS)
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
  LENS_FOR_EACH_HOST_KERNEL(LENS_BIND)
  LENS_FOR_EACH_HOST_AMX_KERNEL(LENS_BIND)
  LENS_FOR_EACH_AMX_KERNEL(LENS_BIND)
  LENS_FOR_EACH_BF16_KERNEL(LENS_BIND)
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
  m.def("moe_workspace", &moe_workspace);
  m.def("sink_padded", &sink_padded);
  m.attr("sink_tile") = kSinkTile;
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

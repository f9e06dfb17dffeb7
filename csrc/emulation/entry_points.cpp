// The launchers under plain C names, for the tests: lens_emulation_<stem>(const <Op>Params*), and
// where each field of that struct lies, lens_emulation_layout_<stem>().
#include <string>
#include <type_traits>

#include "params.h"

namespace lens::emulation {
namespace {

// Visits the fields of a struct: "<bytes>\n", then "<name> <offset> <kind>\n" for each, of kind
// type, integer, number, reads or writes, the last two of pointers.
class Layout {
 public:
  template <class Params>
  static std::string of() {
    Params p{};
    Layout layout(&p, sizeof p);
    layout.add("dtype", &p.dtype, "type");
    layout.add("stream", &p.stream, "reads");
    fields(p, layout);
    return layout.text_;
  }

  void size(const char* name, int64_t& field, int64_t) { add(name, &field, "integer"); }
  void number(const char* name, double& field) { add(name, &field, "number"); }
  template <class E>
  void array(const char* name, E*& field, int64_t) {
    add(name, &field, std::is_const_v<E> ? "reads" : "writes");
  }
  void strided(const char* name, const void*& field, int64_t, const char* stride_name,
               int64_t& stride) {
    add(name, &field, "reads");
    add(stride_name, &stride, "integer");
  }
  void offsets(const char* name, const int32_t*& field, int64_t, const char*, int64_t) {
    add(name, &field, "reads");
  }
  void rows(const char* name, const int64_t*& field, int64_t, int64_t) {
    add(name, &field, "reads");
  }
  void expect(bool, const char*, int64_t) {}

 private:
  Layout(const void* base, size_t bytes)
      : base_(static_cast<const char*>(base)), text_(std::to_string(bytes) + "\n") {}

  void add(const char* name, const void* field, const char* kind) {
    const auto offset = static_cast<const char*>(field) - base_;
    text_ += std::string(name) + " " + std::to_string(offset) + " " + kind + "\n";
  }

  const char* base_;
  std::string text_;
};

}  // namespace
}  // namespace lens::emulation

#define LENS_ENTRY_POINT(stem, Params)                                                           \
  extern "C" __attribute__((visibility("default"))) int lens_emulation_##stem(                   \
      const lens::Params* params) {                                                              \
    return lens::stem##_cuda(*params);                                                           \
  }                                                                                              \
  extern "C" __attribute__((visibility("default"))) const char* lens_emulation_layout_##stem() { \
    static const std::string text = lens::emulation::Layout::of<lens::Params>();                 \
    return text.c_str();                                                                         \
  }
LENS_FOR_EACH_KERNEL(LENS_ENTRY_POINT)
LENS_FOR_EACH_BF16_KERNEL(LENS_ENTRY_POINT)
LENS_FOR_EACH_HOPPER_KERNEL(LENS_ENTRY_POINT)

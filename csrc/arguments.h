// How a params struct is filled from Python: its `fields` (params/common.h) names every field to a
// visitor. The Reader takes the value of that name from the call and checks what can be checked
// without a tensor; the Describer collects the names for the docstring.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "dispatch.h"

namespace lens {

class Reader {
 public:
  Reader(const char* op, const pybind11::kwargs& arguments) : op_(op), arguments_(arguments) {}

  // what every kernel takes: dtype, device (-1: CPU) and stream
  template <class Params>
  void common(Params& p) {
    const int64_t dtype = integer("dtype");
    expect(dtype >= 0 && dtype <= 2, "dtype must be 0, 1 or 2", dtype);
    p.dtype = DType(dtype);
    device_ = int(integer("device"));
    p.stream = reinterpret_cast<void*>(integer("stream"));
  }

  void size(const char* name, int64_t& field, int64_t minimum) {
    field = integer(name);
    expect_at_least(op_, name, minimum, field);
    if (field > kMostSize) {
      refuse(op_, std::string(name) + " must be at most 2^31 - 1, got " + std::to_string(field));
    }
    // the elements of an array are a product of at most three sizes, which must not overflow
    int64_t smaller = field;
    for (int64_t& largest : largest_) {
      if (smaller > largest) std::swap(smaller, largest);
    }
    double product = 1;
    for (int64_t largest : largest_) product *= double(largest);
    if (product > kMostElements) {
      refuse(op_, std::string("sizes must multiply to at most 2^48 elements, got ") + name + " = " +
                      std::to_string(field) + " beside others");
    }
  }

  void number(const char* name, double& field) {
    field = PyFloat_AsDouble(value(name));
    if (PyErr_Occurred()) throw pybind11::error_already_set();
  }

  template <class E>
  void array(const char* name, E*& field, int64_t elements) {
    field = reinterpret_cast<E*>(integer(name));
    expect_pointer(op_, name, elements, field);
  }

  void strided(const char* name, const void*& field, int64_t elements, const char* stride_name,
               int64_t& stride) {
    array(name, field, elements);
    stride = integer(stride_name);
    if (stride < 0 || stride > kMostSize) {
      refuse(op_,
             std::string(stride_name) + " must lie in [0, 2^31), got " + std::to_string(stride));
    }
  }

  // host memory is read only on the CPU
  void offsets(const char* name, const int32_t*& field, int64_t B, const char* rows_name,
               int64_t rows) {
    array(name, field, B + 1);
    if (device_ < 0) expect_offsets(op_, name, field, B, rows_name, rows);
  }

  void rows(const char* name, const int64_t*& field, int64_t R, int64_t BL) {
    array(name, field, R);
    if (device_ < 0) expect_rows(op_, field, R, BL);
  }

  void expect(bool held, const char* rule, int64_t got) {
    if (!held) refuse(op_, std::string(rule) + ", got " + std::to_string(got));
  }

  // after the last field: nothing was passed that no field took
  void finish() const {
    if (taken_ != arguments_.size()) {
      refuse(op_, "takes " + std::to_string(taken_) + " arguments, got " +
                      std::to_string(arguments_.size()));
    }
  }

  int device() const { return device_; }

 private:
  PyObject* value(const char* name) {
    PyObject* found = PyDict_GetItemString(arguments_.ptr(), name);
    if (found == nullptr) refuse(op_, std::string(name) + " must be given, got nothing");
    ++taken_;
    return found;
  }

  int64_t integer(const char* name) {
    const long long number = PyLong_AsLongLong(value(name));
    if (number == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return number;
  }

  static constexpr int64_t kMostSize = 2147483647;            // offsets count rows in int32
  static constexpr double kMostElements = 281474976710656.0;  // 2^48: more than any memory holds

  const char* op_;
  const pybind11::kwargs& arguments_;
  int64_t largest_[3] = {1, 1, 1};  // sizes so far
  size_t taken_ = 0;
  int device_ = -1;
};

class Describer {
 public:
  explicit Describer(const char* op) : text_(std::string(op) + "(*, dtype, device, stream") {}

  void size(const char* name, int64_t, int64_t) { add(name); }
  void number(const char* name, double) { add(name); }
  template <class E>
  void array(const char* name, E*, int64_t) {
    add(name);
  }
  void strided(const char* name, const void*, int64_t, const char* stride_name, int64_t) {
    add(name);
    add(stride_name);
  }
  void offsets(const char* name, const int32_t*, int64_t, const char*, int64_t) { add(name); }
  void rows(const char* name, const int64_t*, int64_t, int64_t) { add(name); }
  void expect(bool, const char*, int64_t) {}

  std::string text() const {
    return text_ + "): addresses, sizes and strides of the struct in csrc/params";
  }

 private:
  void add(const char* name) { text_ += std::string(", ") + name; }

  std::string text_;
};

}  // namespace lens

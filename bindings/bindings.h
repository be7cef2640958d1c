// Shared by the parts of the native module.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>

#include "core/check.h"
#include "core/tensor.h"

namespace ni::python {

namespace py = pybind11;

void bind_model(py::module_& m);
void bind_scheduler(py::module_& m);
void bind_engine(py::module_& m);
void bind_ops(py::module_& m);
void bind_torch_ops(py::module_& m);

DType parse_dtype(const std::string& name);

// Engines own threads: their destructor must not hold the GIL.
struct ReleaseGil {
  template <typename T>
  void operator()(T* p) const {
    const py::gil_scoped_release release;
    delete p;
  }
};

// A constructor that takes every field as a keyword and names the one it does not know.
template <typename T, typename Class>
void def_keyword_init(Class& cls) {
  cls.def(py::init([](const py::kwargs& fields) {
    auto value = std::make_unique<T>();
    const py::object self = py::cast(value.get(), py::return_value_policy::reference);
    const py::type type = py::type::of(self);
    const py::object property = py::module_::import("builtins").attr("property");
    for (const auto& [key, item] : fields) {
      const auto name = py::cast<std::string>(key);
      check_arg(py::isinstance(py::getattr(type, key, py::none()), property),
                py::cast<std::string>(type.attr("__name__")), " has no field '", name, "'");
      check_arg(!item.is_none(), name, ": cannot take None here");  // else a bool would be False
      try {
        py::setattr(self, key, item);
      } catch (py::error_already_set& error) {
        if (!error.matches(PyExc_TypeError)) throw;
        throw std::invalid_argument(
            concat(name, ": cannot take ", py::cast<std::string>(py::repr(item)), " here"));
      }
    }
    return value;
  }));
}

// An enum field that Python sees as a string.
template <typename T, typename Class, typename Enum, size_t N>
void def_enum(Class& cls, const char* field, Enum T::* member,
              const std::array<std::pair<const char*, Enum>, N>& names) {
  cls.def_property(
      field,
      [member, names](const T& self) -> std::string {
        for (const auto& [name, value] : names)
          if (self.*member == value) return name;
        return "";
      },
      [member, names, field](T& self, const std::string& text) {
        std::string known;
        for (const auto& [name, value] : names) {
          if (text == name) {
            self.*member = value;
            return;
          }
          known += std::string(known.empty() ? "" : ", ") + name;
        }
        throw std::invalid_argument(concat(field, ": '", text, "' is unknown; known are ", known));
      });
}

inline constexpr std::array<std::pair<const char*, DType>, 3> kFloatTypes{
    {{"float32", DType::f32}, {"bfloat16", DType::bf16}, {"float16", DType::f16}}};

}  // namespace ni::python

// The native module nano_inference._core; its interface is described in _core.pyi.
#include "backend/registry.h"
#include "bindings.h"
#include "core/thread_pool.h"
#include "engine/scheduler.h"

namespace ni::python {

DType parse_dtype(const std::string& name) {
  for (const auto& [text, dtype] : kFloatTypes)
    if (name == text) return dtype;
  throw std::invalid_argument(
      concat("dtype '", name, "' is unknown; known are float32, bfloat16, float16"));
}

}  // namespace ni::python

PYBIND11_MODULE(_core, m) {
  namespace py = pybind11;
  m.doc() = "The native part of nano-inference.";
  m.attr("__version__") = NI_VERSION;
  py::register_exception<ni::QueueFull>(m, "QueueFullError", PyExc_RuntimeError);
  ni::python::bind_model(m);
  ni::python::bind_scheduler(m);
  ni::python::bind_engine(m);
  ni::python::bind_ops(m);
  m.def("cpu_isas", &ni::cpu_isas);
  m.def("num_threads_available", &ni::available_cores);
}

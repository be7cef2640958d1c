// The native module nano_inference._core; its interface is described in _core.pyi.
#include "backend/registry.h"
#include "bindings.h"
#include "core/thread_pool.h"
#include "cpu/machine.h"
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
  ni::python::bind_torch_ops(m);
  m.def("cpu_isas", &ni::cpu_isas);
  m.def("cuda_devices", &ni::cuda_device_names);
  m.def("cuda_error", &ni::cuda_error);
  m.def("num_threads_available", &ni::available_cores);
  m.def(
      "measure_machine",
      [](int num_threads) {
        ni::check_arg(num_threads >= 0 && num_threads <= 1024,
                      "num_threads must be in [0, 1024], got ", num_threads);
        ni::MachineRates rates;
        {
          const py::gil_scoped_release release;
          rates =
              ni::measure_machine(num_threads > 0 ? num_threads : ni::available_cores(), 0.2, 256);
        }
        py::dict d;
        d["read_bytes_per_second"] = rates.read;
        d["flops_per_second"] = rates.bf16;
        d["fp32_flops_per_second"] = rates.fp32;
        return d;
      },
      py::arg("num_threads") = 0);
}

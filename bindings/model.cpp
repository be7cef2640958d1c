#include "bindings.h"
#include "model/config.h"

namespace ni::python {

void bind_model(py::module_& m) {
  py::class_<RopeConfig>(m, "RopeConfig")
      .def(py::init([](std::vector<float> inv_freq, float attention_factor) {
             return RopeConfig{std::move(inv_freq), attention_factor};
           }),
           py::arg("inv_freq"), py::arg("attention_factor") = 1.0f)
      .def_readwrite("inv_freq", &RopeConfig::inv_freq)
      .def_readwrite("attention_factor", &RopeConfig::attention_factor);
  py::class_<LayerConfig>(m, "LayerConfig")
      .def(py::init([](int window, int rope) { return LayerConfig{window, rope}; }),
           py::arg("window") = 0, py::arg("rope") = 0)
      .def_readwrite("window", &LayerConfig::window)
      .def_readwrite("rope", &LayerConfig::rope);

  py::class_<ModelConfig> config(m, "ModelConfig");
  config.def_readwrite("vocab_size", &ModelConfig::vocab_size)
      .def_readwrite("hidden_size", &ModelConfig::hidden_size)
      .def_readwrite("intermediate_size", &ModelConfig::intermediate_size)
      .def_readwrite("num_heads", &ModelConfig::num_heads)
      .def_readwrite("num_kv_heads", &ModelConfig::num_kv_heads)
      .def_readwrite("head_dim", &ModelConfig::head_dim)
      .def_readwrite("max_position_embeddings", &ModelConfig::max_position_embeddings)
      .def_readwrite("norm_eps", &ModelConfig::norm_eps)
      .def_readwrite("gated_mlp", &ModelConfig::gated_mlp)
      .def_readwrite("qk_norm", &ModelConfig::qk_norm)
      .def_readwrite("learned_positions", &ModelConfig::learned_positions)
      .def_readwrite("tie_embeddings", &ModelConfig::tie_embeddings)
      .def_readwrite("qkv_bias", &ModelConfig::qkv_bias)
      .def_readwrite("o_bias", &ModelConfig::o_bias)
      .def_readwrite("mlp_bias", &ModelConfig::mlp_bias)
      .def_readwrite("attn_scale", &ModelConfig::attn_scale)
      .def_readwrite("ropes", &ModelConfig::ropes)
      .def_readwrite("layers", &ModelConfig::layers)
      .def("validate", &ModelConfig::validate);
  def_enum(config, "norm", &ModelConfig::norm,
           std::array<std::pair<const char*, NormKind>, 2>{
               {{"rms", NormKind::rms}, {"layer", NormKind::layer}}});
  def_enum(config, "act", &ModelConfig::act,
           std::array<std::pair<const char*, Activation>, 4>{{{"silu", Activation::silu},
                                                              {"gelu_tanh", Activation::gelu_tanh},
                                                              {"gelu", Activation::gelu},
                                                              {"relu", Activation::relu}}});
  def_keyword_init<ModelConfig>(config);
}

}  // namespace ni::python

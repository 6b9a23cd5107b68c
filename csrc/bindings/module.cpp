// xpatch._native: facts about the build, and the ops that the other files bind.
#include <string>

#include "bindings/bind.h"
#include "core/check.h"
#include "core/isa.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict info() {
  py::list isas;
  for (xpatch::Isa isa : xpatch::isas_built()) isas.append(xpatch::isa_name(isa));
  py::dict facts;
  facts["version"] = XPATCH_VERSION;
  facts["compiler"] = compiler();
  facts["isa"] = xpatch::isa_name(xpatch::isa_in_use());
  facts["isas_built"] = isas;
#if defined(XPATCH_HAS_CUDA)
  facts["cuda"] = true;
  facts["cuda_toolkit"] = XPATCH_CUDA_TOOLKIT;
#else
  facts["cuda"] = false;
  facts["cuda_toolkit"] = py::none();
#endif
  return facts;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native core of xpatch; use xpatch.ops.";
  m.attr("__version__") = XPATCH_VERSION;
  py::register_exception<xpatch::Error>(m, "NativeError", PyExc_ValueError);
  m.def("info", &info);
  bind_ball(m);
  bind_lowrank(m);
  bind_mask(m);
  bind_patch_ffn(m);
}

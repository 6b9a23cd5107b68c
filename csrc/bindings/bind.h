// What every file under bindings/ needs. These are the only files that know Python; each binds one op and keeps
// xpatch/_native.pyi in step.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

void bind_ball(py::module_& m);
void bind_lowrank(py::module_& m);
void bind_mask(py::module_& m);
void bind_patch_ffn(py::module_& m);

// The Python module ncsn_fast._C. Importing it registers the CPU operators of csrc/cpu; what it offers to Python are
// facts of the build and of the convolution engine, never tensors. It is written in Python's stable ABI, as the
// operators are in PyTorch's: one build serves every Python from 3.10 on and every torch from setup.py's MIN_TORCH on.

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <stdexcept>
#include <string>

#include "build_config.h"
#include "cpu/conv3x3/convolver.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace {

#if defined(__clang__)
#define NCSN_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define NCSN_COMPILER "gcc " __VERSION__
#else
#define NCSN_COMPILER "unknown"
#endif

// An object of Python that is let go at the end of its scope.
class Object {
 public:
  explicit Object(PyObject* object) : object_(object) {}
  ~Object() { Py_XDECREF(object_); }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

PyObject* text(const std::string& value) {
  return PyUnicode_FromStringAndSize(value.data(), static_cast<Py_ssize_t>(value.size()));
}

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

// A list of strings, or null with Python's error set, as of every function here that gives an object.
PyObject* levels() {
  Object list(PyList_New(0));
  if (list.get() == nullptr) return nullptr;
  for (const std::string& level : ncsn::simd_levels()) {
    const Object name(text(level));
    if (name.get() == nullptr || PyList_Append(list.get(), name.get()) != 0) return nullptr;
  }
  return list.release();
}

// Takes the value; false if there is none, or no room for it.
bool put(const Object& dict, const char* key, PyObject* value) {
  const Object held(value);
  return value != nullptr && PyDict_SetItemString(dict.get(), key, value) == 0;
}

PyObject* facts() {
  const std::string cuda = NCSN_CUDA_VERSION;
  Object dict(PyDict_New());
  const bool done = dict.get() != nullptr && put(dict, "compiler", text(NCSN_COMPILER)) &&
                    put(dict, "flags", text(NCSN_COMPILER_FLAGS)) &&
                    put(dict, "threads", text(ncsn::own_threads() ? "own" : "torch")) &&
                    put(dict, "simd_levels", levels()) &&
                    put(dict, "simd_level", text(ncsn::simd_name(ncsn::simd_level()))) &&
                    put(dict, "conv_panel", PyLong_FromLong(ncsn::conv_kernels().panel)) &&
                    put(dict, "torch", text(NCSN_TORCH_VERSION)) &&
                    put(dict, "cuda", cuda.empty() ? none() : text(cuda)) &&
                    put(dict, "cuda_architectures", text(NCSN_CUDA_ARCHITECTURES)) &&
                    put(dict, "schemas", text(NCSN_SCHEMAS));
  return done ? dict.release() : nullptr;
}

PyObject* build_config(PyObject*, PyObject*) {
  try {
    return facts();
  } catch (const std::invalid_argument& error) {  // of a level that this processor does not have
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* packs_late(PyObject*, PyObject* arguments) {
  long long n, channels, outputs, height, width, dilation;
  if (!PyArg_ParseTuple(arguments, "LLLLLL", &n, &channels, &outputs, &height, &width, &dilation)) {
    return nullptr;
  }
  try {
    const ncsn::ConvShape shape = {n, channels, outputs, height, width, dilation};
    return PyBool_FromLong(ncsn::Convolver::packs_late(shape));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef methods[] = {
    {"build_config", build_config, METH_NOARGS,
     "Compiler, flags, SIMD levels and versions of this build."},
    {"packs_late", packs_late, METH_VARARGS,
     "Whether a convolution (samples, channels, outputs, height, width, dilation) takes no packed weights."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C",    "The C++ kernels of ncsn_fast.", 0, methods, nullptr,
    nullptr,               nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }

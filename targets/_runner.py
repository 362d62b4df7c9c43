"""runner.cc: a C++ program that loads model.so with TVM's runtime and runs it on raw files."""

from __future__ import annotations

from mc_opt.targets import _c_source, _c_text
from mc_opt.targets._machine import Machine
from mc_opt.targets._manifest import Port, names_of

_CODES = {"int": "kDLInt", "uint": "kDLUInt", "float": "kDLFloat", "bool": "kDLBool"}


def runner(inputs: tuple[Port, ...], outputs: tuple[Port, ...], machine: Machine) -> str:
    """The program for a model with these inputs and outputs, built for a machine."""
    names = names_of([p.shape for p in inputs])
    text = _TEMPLATE
    for fixed, of_any_size in _OPEN if names else ():
        assert fixed in text, fixed
        text = text.replace(fixed, of_any_size)
    words = {"@INPUTS@": ", ".join(_port(p, names) for p in inputs), "@OUTPUTS@": str(len(outputs))}
    words["@POOL@"] = _POOL if machine.threads > 1 else ""
    words["@NAMES@"] = ", ".join(f'"{name}"' for name in names)
    if machine.kind == "cuda":
        words |= _ON_GPU
    else:
        words |= _ON_PROCESSOR | {
            "@CHECK@": _c_source.processor_check(machine.kind, machine.features),
            "@CHECK_HEADER@": _c_text.CHECK_HEADER[machine.kind],
            "@CPU@": machine.cpu,
            "@THREADS@": str(machine.threads),
        }
    for key, word in words.items():
        text = text.replace(key, word)
    return text


def _port(port: Port, names: tuple[str, ...]) -> str:
    kind = port.dtype.rstrip("0123456789")
    bits = int(port.dtype[len(kind) :] or 8)
    shape = ", ".join(str(d if isinstance(d, int) else -1 - names.index(d)) for d in port.shape)
    return f"{{{{{shape}}}, DLDataType{{{_CODES[kind]}, {bits}, 1}}}}"


_ON_PROCESSOR = {
    "@LIBRARIES@": "",
    "@PLACES@": "",
    "@DEVICES@": "static_cast<int>(kDLCPU), 0, kAllocator",
    "@PLACED@": "",
    "@FETCHED@": "",
    "@COPIES@": "",
    "@HEADERS@": "#include <@CHECK_HEADER@>\n#include <sched.h>\n#include <sys/mman.h>\n\n#include <map>\n",
    "@WHERE@": " and constants.bin beside it",
    "@FITS@": """  if (!supported()) {
    throw std::runtime_error("model.so was built for @CPU@, and this processor lacks a feature of it; build it again");
  }
""",
    "@BINDING@": """@CHECK@
const size_t kLargePage = 2 << 20;

// Memory for good; it is read faster in large pages.
char* Allocate(size_t bytes) {
  size_t page = bytes < kLargePage ? 64 : kLargePage;
  char* memory = static_cast<char*>(std::aligned_alloc(page, (bytes / page + 1) * page));
  if (!memory) throw std::bad_alloc();
  if (bytes >= kLargePage) madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

char* ReadConstants(const std::string& path, size_t* size) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + ": cannot be read; it belongs beside model.so");
  size_t bytes = *size = file.tellg();
  char* memory = Allocate(bytes);
  if (!file.seekg(0).read(memory, bytes)) throw std::runtime_error(path + ": cannot be read");
  return memory;
}

struct Place {
  char* data;
  void AllocData(DLTensor* tensor) { tensor->data = data; }
  void FreeData(DLTensor*) {}
};

// Rows are of (type, shape, place).
size_t Size(const ffi::Array<ffi::Any>& row) {
  DLDataType dtype = ffi::StringToDLDataType(row[0].cast<ffi::String>());
  size_t size = (dtype.bits + 7) / 8;
  for (int64_t extent : row[1].cast<ffi::Shape>()) size *= extent;
  return size;
}

ffi::Tensor View(const ffi::Array<ffi::Any>& row, char* memory) {
  DLDataType dtype = ffi::StringToDLDataType(row[0].cast<ffi::String>());
  return ffi::Tensor::FromNDAlloc(Place{memory}, row[1].cast<ffi::Shape>(), dtype, DLDevice{kDLCPU, 0});
}

// The bytes that rows with offsets take.
size_t Extent(const ffi::Any& table) {
  size_t bytes = 0;
  for (const ffi::Array<ffi::Any>& row : table.cast<ffi::Array<ffi::Array<ffi::Any>>>()) {
    bytes = std::max(bytes, row[2].cast<ffi::Shape>()[0] + Size(row));
  }
  return bytes;
}

// The tensors that rows with offsets tell of, in memory of so many bytes.
void Append(const ffi::Any& table, char* memory, size_t room, std::vector<ffi::Any>* tensors) {
  if (Extent(table) > room) throw std::runtime_error("constants.bin: is shorter than model.so expects; copy it again");
  for (const ffi::Array<ffi::Any>& row : table.cast<ffi::Array<ffi::Array<ffi::Any>>>()) {
    tensors->push_back(View(row, memory + row[2].cast<ffi::Shape>()[0]));
  }
}

// Memory for the outputs: the tensors that main takes of it behind the inputs, and what the outputs are there.
void Outputs(const ffi::Module& machine, std::vector<ffi::Any>* written, std::vector<ffi::Any>* outputs) {
  std::map<int64_t, std::pair<size_t, char*>> memories;
  ffi::Any tables[] = {machine->GetFunction("written").value()(), machine->GetFunction("outputs").value()()};
  for (const ffi::Any& table : tables) {
    for (const ffi::Array<ffi::Any>& row : table.cast<ffi::Array<ffi::Array<ffi::Any>>>()) {
      size_t& size = memories[row[2].cast<ffi::Shape>()[0]].first;
      size = std::max(size, Size(row));
    }
  }
  for (auto& memory : memories) memory.second.second = Allocate(memory.second.first);
  for (size_t k = 0; k < 2; ++k) {
    for (const ffi::Array<ffi::Any>& row : tables[k].cast<ffi::Array<ffi::Array<ffi::Any>>>()) {
      (k ? outputs : written)->push_back(View(row, memories[row[2].cast<ffi::Shape>()[0]].second));
    }
  }
}

// Main takes, last, the constants and places for what it computes on the way.
ffi::Function Bound(const ffi::Module& machine, const std::string& library) {
  size_t size = 0;
  char* constants = ReadConstants(library.substr(0, library.rfind('/') + 1) + "constants.bin", &size);
  std::vector<ffi::Any> bound = {ffi::String("main"), ffi::String("bound"), 1};
  Append(machine->GetFunction("constants").value()(), constants, size, &bound);
  ffi::Any places = machine->GetFunction("places").value()();
  Append(places, Allocate(Extent(places)), Extent(places), &bound);
  std::vector<ffi::AnyView> views(bound.begin(), bound.end());
  ffi::Any nothing;
  machine->GetFunction("save_function").value().CallPacked(views.data(), static_cast<int32_t>(views.size()), &nothing);
  return machine->GetFunction("bound").value();
}

""",
    "@MAIN@": "Bound(machine, file)",
    "@BEFORE@": """  std::vector<ffi::Any> written, placed;
  Outputs(machine, &written, &placed);
  arguments.insert(arguments.end(), written.begin(), written.end());
""",
    "@OUTPUTS_OF@": """  ffi::Array<ffi::Tensor> outputs;
  for (const ffi::Any& tensor : placed) outputs.push_back(tensor.cast<ffi::Tensor>());
  if (placed.empty()) outputs = result.cast<ffi::Array<ffi::Tensor>>();
""",
}
_ON_GPU = {
    "@LIBRARIES@": "-Wl,--no-as-needed,-rpath,$CUDA -ltvm_runtime_cuda ",
    "@PLACES@": (
        "//   CUDA=$(python -c 'import importlib.util as u;"
        ' print(u.find_spec("nvidia").submodule_search_locations[0])\')/cu13/lib\n'
    ),
    "@DEVICES@": """
      static_cast<int>(kDLCUDA), 0, kAllocator, static_cast<int>(kDLCPU), 0, kAllocator""",
    "@PLACED@": "ToGpu",
    "@FETCHED@": "FromGpu",
    "@HEADERS@": "",
    "@WHERE@": "",
    "@BINDING@": "",
    "@FITS@": "",
    "@MAIN@": 'machine->GetFunction("main").value()',
    "@BEFORE@": "",
    "@OUTPUTS_OF@": "  ffi::Array<ffi::Tensor> outputs = result.cast<ffi::Array<ffi::Tensor>>();\n",
    "@COPIES@": """ffi::Tensor ToGpu(const ffi::Tensor& tensor) {
  auto allocate = ffi::Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
  auto copy = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyFromBytes");
  auto result = allocate(ffi::Shape(tensor.shape()), tensor.dtype(), DLDevice{kDLCUDA, 0}, nullptr).cast<ffi::Tensor>();
  copy(result, tensor.data_ptr(), static_cast<int64_t>(ffi::GetDataSize(*tensor.GetDLTensorPtr())));
  return result;
}

ffi::Tensor FromGpu(const ffi::Tensor& tensor) {
  ffi::Tensor result =
      ffi::Tensor::FromNDAlloc(Allocator(), ffi::Shape(tensor.shape()), tensor.dtype(), DLDevice{kDLCPU, 0});
  auto copy = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes");
  copy(tensor, result.data_ptr(), static_cast<int64_t>(ffi::GetDataSize(*tensor.GetDLTensorPtr())));
  return result;
}

""",
}

_POOL = """  // A pool of threads that may run on all of this process's processors.
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  ffi::Array<ffi::String> processors;
  for (int k = 0; k < CPU_SETSIZE; ++k) {
    if (CPU_ISSET(k, &allowed)) processors.push_back(std::to_string(k));
  }
  const int kShareAll = -3, kThreads = @THREADS@;
  ffi::Function::GetGlobalRequired("runtime.config_threadpool")(kShareAll, kThreads, processors);
"""

_TEMPLATE = r"""// Loads model.so@WHERE@ and runs it once: runner model.so input.bin ... output.bin ...
//
// Inputs and outputs are raw files, in the order of manifest.json; the outputs' types and shapes are printed.
// It trusts its folder: mc_opt.load holds the files to the digests in manifest.json, this program does not.
// Build it against the headers and the runtime of the Python packages tvm and tvm_ffi, with a compiler whose C++
// library is libstdc++, as theirs was (libc++, which zig c++ brings, crashes), and run it:
//   TVM=$(python -c 'import importlib.util as u; print(u.find_spec("tvm").submodule_search_locations[0])')
//   FFI=$(python -c 'import importlib.util as u; print(u.find_spec("tvm_ffi").submodule_search_locations[0])')
@PLACES@//   g++ -std=c++17 -O2 runner.cc -o runner -I$TVM/include -I$FFI/include \
//       -L$TVM/lib -L$FFI/lib @LIBRARIES@-ltvm_runtime -ltvm_ffi -Wl,-rpath,$TVM/lib:$FFI/lib
//   ./runner model.so input.bin output.bin

@HEADERS@#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

namespace {

struct Port {
  std::vector<int64_t> shape;
  DLDataType dtype;
};

const std::vector<Port> kInputs = {@INPUTS@};
const size_t kOutputs = @OUTPUTS@;

struct Allocator {
  void AllocData(DLTensor* tensor) {
    size_t bytes = (ffi::GetDataSize(*tensor) + 63) / 64 * 64;
    tensor->data = std::aligned_alloc(64, bytes ? bytes : 64);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

ffi::Tensor Read(const Port& port, const std::string& path) {
  ffi::Tensor tensor =
      ffi::Tensor::FromNDAlloc(Allocator(), ffi::Shape(port.shape), port.dtype, DLDevice{kDLCPU, 0});
  size_t bytes = ffi::GetDataSize(*tensor.GetDLTensorPtr());
  std::ifstream file(path, std::ios::binary);
  if (!file.read(static_cast<char*>(tensor.data_ptr()), bytes) || file.peek() != EOF) {
    throw std::runtime_error(path + ": expected a file of " + std::to_string(bytes) + " bytes");
  }
  return tensor;
}

@COPIES@void Write(const ffi::Tensor& tensor, const std::string& path) {
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(tensor.data_ptr()), ffi::GetDataSize(*tensor.GetDLTensorPtr()));
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}

void Print(const ffi::Tensor& tensor) {
  std::string shape;
  for (int64_t extent : tensor.shape()) shape += (shape.empty() ? "" : "x") + std::to_string(extent);
  std::printf("%s %s\n", std::string(ffi::DLDataTypeToString(tensor.dtype())).c_str(), shape.c_str());
}

@BINDING@void Run(const std::vector<std::string>& paths) {
@FITS@  // A name without a slash would be looked for among the system's libraries.
  std::string file = paths[0].find('/') == std::string::npos ? "./" + paths[0] : paths[0];
  ffi::Module library = ffi::Module::LoadFromFile(file);
  ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
@POOL@  const int kAllocator = 2;  // pooled
  machine->GetFunction("vm_initialization").value()(@DEVICES@);
  std::vector<ffi::AnyView> arguments;
  std::vector<ffi::Tensor> inputs;
  for (size_t k = 0; k < kInputs.size(); ++k) inputs.push_back(@PLACED@(Read(kInputs[k], paths[1 + k])));
  for (const ffi::Tensor& tensor : inputs) arguments.push_back(tensor);
  ffi::Any result;
@BEFORE@  @MAIN@.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
@OUTPUTS_OF@  for (size_t k = 0; k < kOutputs; ++k) {
    Write(@FETCHED@(outputs[k]), paths[1 + kInputs.size() + k]);
    Print(outputs[k]);
  }
}

}  // namespace

int main(int count, char** words) {
  std::vector<std::string> paths(words + 1, words + count);
  if (paths.size() != 1 + kInputs.size() + kOutputs) {
    std::fprintf(stderr, "usage: %s model.so (%zu input files) (%zu output files)\n", words[0], kInputs.size(),
                 kOutputs);
    return 2;
  }
  try {
    Run(paths);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
"""

# What differs in the program of a model with open dimensions: their sizes are words before the files.
_OPEN = (
    (
        "// Loads model.so@WHERE@ and runs it once: runner model.so input.bin ... output.bin ...\n",
        "// Loads model.so@WHERE@ and runs it once: runner model.so name=size ... input.bin ... output.bin ...\n"
        "//\n// Every open dimension of manifest.json gets a size, as in batch=4.\n",
    ),
    ("//   ./runner model.so input.bin output.bin\n", "//   ./runner model.so name=4 input.bin output.bin\n"),
    ("#include <vector>\n", "#include <vector>\n#include <cstring>\n"),
    (
        "const size_t kOutputs = @OUTPUTS@;\n",
        "const size_t kOutputs = @OUTPUTS@;\n"
        "// Open dimensions; a port has -1 for the first, -2 for the second.\n"
        "const std::vector<std::string> kNames = {@NAMES@};\n",
    ),
    ("struct Allocator {\n", "std::vector<int64_t> sizes(kNames.size(), 0);\n\nstruct Allocator {\n"),
    (
        "  ffi::Tensor tensor =\n      ffi::Tensor::FromNDAlloc(Allocator(), ffi::Shape(port.shape), port.dtype,",
        "  std::vector<int64_t> shape = port.shape;\n"
        "  for (int64_t& extent : shape) extent = extent < 0 ? sizes[-1 - extent] : extent;\n"
        "  ffi::Tensor tensor =\n      ffi::Tensor::FromNDAlloc(Allocator(), ffi::Shape(shape), port.dtype,",
    ),
    (
        "  std::vector<std::string> paths(words + 1, words + count);\n  if (paths.size()",
        "  std::vector<std::string> paths;\n"
        "  for (int i = 1; i < count; ++i) {\n"
        "    size_t k = 0;\n"
        "    for (; k < kNames.size(); ++k) {\n"
        "      size_t length = kNames[k].size();\n"
        "      if (!std::strncmp(words[i], kNames[k].c_str(), length) && words[i][length] == '=') {\n"
        "        sizes[k] = std::atoll(words[i] + length + 1);\n"
        "        break;\n"
        "      }\n"
        "    }\n"
        "    if (k == kNames.size()) paths.push_back(words[i]);\n"
        "  }\n"
        "  for (size_t k = 0; k < kNames.size(); ++k) {\n"
        "    if (sizes[k] > 0) continue;\n"
        '    std::fprintf(stderr, "usage: every dimension needs a size, as in %s=4\\n", kNames[k].c_str());\n'
        "    return 2;\n"
        "  }\n"
        "  if (paths.size()",
    ),
    ("  const int kAllocator = 2;  // pooled\n", "  const int kAllocator = 1;  // naive\n"),
    ("usage: %s model.so (%zu", "usage: %s model.so name=size ... (%zu"),
)

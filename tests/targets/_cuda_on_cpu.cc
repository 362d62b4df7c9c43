// A device of TVM's runtime that calls itself `cuda`, has the processor's memory, and runs kernels from a library that
// _cuda_on_cpu.py made of their CUDA source.
#include <dlfcn.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
using tvm::Device;

namespace {

class Memory : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(Device) final {}
  void GetAttr(Device, tvm::runtime::DeviceAttrKind kind, ffi::Any* result) final {
    if (kind == tvm::runtime::kExist) *result = 1;
  }
  void* AllocDataSpace(Device, size_t bytes, size_t, DLDataType) final {
    size_t rounded = (bytes + 255) / 256 * 256;
    void* place = std::aligned_alloc(256, rounded ? rounded : 256);
    std::memset(place, 0xff, rounded);  // NaN: what a kernel forgets to write shows
    return place;
  }
  void FreeDataSpace(Device, void* place) final { std::free(place); }
  void StreamSync(Device, TVMStreamHandle) final {}
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t bytes, Device, Device,
                      DLDataType, TVMStreamHandle) final {
    std::memcpy(static_cast<char*>(to) + to_offset, static_cast<const char*>(from) + from_offset, bytes);
  }
};

struct Signature {
  std::vector<DLDataType> types;
  std::vector<std::string> launch;
};

class Reader {
 public:
  explicit Reader(const ffi::Bytes& bytes) : at_(bytes.data()) {}
  uint64_t Number() {
    uint64_t value;
    std::memcpy(&value, at_, 8);
    at_ += 8;
    return value;
  }
  std::string Text() {
    uint64_t size = Number();
    at_ += size;
    return std::string(at_ - size, size);
  }
  template <typename T>
  T Plain() {
    T value;
    std::memcpy(&value, at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }

 private:
  const char* at_;
};

void* library = nullptr;

class Kernels : public ffi::ModuleObj {
 public:
  explicit Kernels(const ffi::Bytes& bytes) {
    Reader reader(bytes);
    reader.Text();
    for (uint64_t left = reader.Number(); left > 0; --left) {
      reader.Text();
      Signature signature;
      std::string name = reader.Text();
      for (uint64_t n = reader.Number(); n > 0; --n) signature.types.push_back(reader.Plain<DLDataType>());
      for (uint64_t n = reader.Number(); n > 0; --n) signature.launch.push_back(reader.Text());
      for (uint64_t n = reader.Number(); n > 0; --n) reader.Plain<int32_t>();
      signatures_[name] = signature;
    }
  }
  const char* kind() const final { return "cuda"; }
  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    auto found = signatures_.find(std::string(name));
    if (found == signatures_.end()) return std::nullopt;
    auto run = reinterpret_cast<void (*)(void**, const int64_t*)>(dlsym(library, ("run_" + found->first).c_str()));
    if (run == nullptr) return std::nullopt;
    Signature signature = found->second;
    return ffi::Function::FromPacked([run, signature](ffi::PackedArgs args, ffi::Any*) {
      std::vector<int64_t> values(signature.types.size());
      std::vector<void*> places(signature.types.size());
      for (size_t k = 0; k < values.size(); ++k) {
        places[k] = &values[k];
        if (signature.types[k].code == kDLOpaqueHandle) {
          void* pointer = args[k].cast<void*>();
          std::memcpy(&values[k], &pointer, 8);
        } else {
          values[k] = args[k].cast<int64_t>();
        }
      }
      const std::vector<std::string> tags = {"blockIdx.x",  "blockIdx.y",  "blockIdx.z",
                                             "threadIdx.x", "threadIdx.y", "threadIdx.z"};
      int64_t size[6] = {1, 1, 1, 1, 1, 1};
      for (size_t k = 0; k < signature.launch.size(); ++k) {
        for (size_t n = 0; n < 6; ++n) {
          if (tags[n] == signature.launch[k]) size[n] = args[values.size() + k].cast<int64_t>();
        }
      }
      run(places.data(), size);
    });
  }

 private:
  std::map<std::string, Signature> signatures_;
};

void* Device0() {
  static Memory memory;
  return static_cast<tvm::runtime::DeviceAPI*>(&memory);
}

ffi::Module Load(const ffi::Bytes& bytes) { return ffi::Module(ffi::make_object<Kernels>(bytes)); }

void Use(const ffi::String& path) {
  library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) TVM_FFI_THROW(RuntimeError) << dlerror();
}

TVM_FFI_STATIC_INIT_BLOCK() {
  ffi::reflection::GlobalDef()
      .def_packed("device_api.cuda", [](ffi::PackedArgs, ffi::Any* result) { *result = Device0(); })
      .def("ffi.Module.load_from_bytes.cuda", Load)
      .def("mc_opt.tests.use_kernels", Use);
}

}  // namespace

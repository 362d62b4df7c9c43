/* Runs an ARM artefact again and again: tensors come on stdin, tensors or an error go to stdout.
 *
 * A message is an int32 count and as many tensors: int32 type code, bits, rank; int64 extents; the data. A count of -1
 * means an error: an int32 length and the text. Without STATIC_MODEL the arguments are a model.so for TVM's runtime,
 * `naive` or `pooled` for its memory, and the file of main's constants, if it takes any; with STATIC_MODEL,
 * `static_model.h` names the library's header and tables of its tensors.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { MOST = 64 };

static void take(void *data, size_t size) {
  if (fread(data, 1, size, stdin) != size) exit(feof(stdin) ? 0 : 3);
}

static void give(const void *data, size_t size) {
  if (fwrite(data, 1, size, stdout) != size) exit(4);
}

static size_t size_of(const DLTensor *tensor) {
  size_t count = 1;
  for (int k = 0; k < tensor->ndim; ++k) count *= (size_t)tensor->shape[k];
  return count * ((tensor->dtype.bits + 7u) / 8);
}

static void *place(size_t size) { return aligned_alloc(64, (size + 64) / 64 * 64); }

static void fail(const char *text) {
  int32_t words[2] = {-1, (int32_t)strlen(text)};
  give(words, sizeof words);
  give(text, strlen(text));
  fflush(stdout);
}

static void read_tensor(DLTensor *tensor) {
  int32_t words[3];
  take(words, sizeof words);
  memset(tensor, 0, sizeof *tensor);
  tensor->device.device_type = kDLCPU;
  tensor->dtype = (DLDataType){(uint8_t)words[0], (uint8_t)words[1], 1};
  tensor->ndim = words[2];
  tensor->shape = calloc((size_t)words[2] + 1, sizeof(int64_t));
  take(tensor->shape, (size_t)words[2] * sizeof(int64_t));
  tensor->data = place(size_of(tensor));
  take(tensor->data, size_of(tensor));
}

static void write_tensor(const DLTensor *tensor) {
  int32_t words[3] = {tensor->dtype.code, tensor->dtype.bits, tensor->ndim};
  give(words, sizeof words);
  give(tensor->shape, (size_t)tensor->ndim * sizeof(int64_t));
  give((char *)tensor->data + tensor->byte_offset, size_of(tensor));
}

#ifdef STATIC_MODEL
#include "static_model.h"

static void open_model(char **words) { (void)words; }

static void run(DLTensor *inputs, int32_t count) {
  static DLTensor outputs[OUTPUTS];
  (void)count;
  for (int k = 0; k < OUTPUTS; ++k) {
    outputs[k] = kOutputs[k];
    outputs[k].data = place(size_of(&outputs[k]));
  }
  void *workspace = place(WORKSPACE_SIZE);
  int32_t made = OUTPUTS;
  int code = CALL(inputs, outputs, workspace);
  if (code) {
    fail(ERROR_TEXT(code));
  } else {
    give(&made, sizeof made);
    for (int k = 0; k < OUTPUTS; ++k) write_tensor(&outputs[k]);
    fflush(stdout);
  }
  for (int k = 0; k < OUTPUTS; ++k) free(outputs[k].data);
  free(workspace);
}
#else
static TVMFFIObjectHandle machine_main, array_size, array_item;
/* What main takes behind the inputs (outputs, and main as machine code its constants and a workspace), and what the outputs are there; none of either when it returns them. */
static TVMFFIAny written[MOST];
static DLTensor seen[MOST];
static int32_t written_count, seen_count;

static const char *error_text(void) {
  TVMFFIObjectHandle error;
  TVMFFIErrorMoveFromRaised(&error);
  return ((TVMFFIErrorCell *)((char *)error + sizeof(TVMFFIObject)))->message.data;
}

static TVMFFIAny call(TVMFFIObjectHandle function, TVMFFIAny *arguments, int32_t count) {
  TVMFFIAny result = {0};
  if (TVMFFIFunctionCall(function, arguments, count, &result)) {
    fail(error_text());
    exit(5);
  }
  return result;
}

static TVMFFIObjectHandle global(const char *name) {
  TVMFFIByteArray text = {name, strlen(name)};
  TVMFFIObjectHandle function = 0;
  if (TVMFFIFunctionGetGlobal(&text, &function) || !function) {
    fail(name);
    exit(6);
  }
  return function;
}

static TVMFFIAny of_text(const char *text) {
  TVMFFIAny value = {.type_index = kTVMFFIRawStr};
  value.v_c_str = text;
  return value;
}

static TVMFFIAny of_number(int64_t number) {
  TVMFFIAny value = {.type_index = kTVMFFIInt};
  value.v_int64 = number;
  return value;
}

static TVMFFIObjectHandle found(TVMFFIAny module, const char *name, int in_imports) {
  TVMFFIAny arguments[] = {module, of_text(name), {.type_index = kTVMFFIBool}};
  arguments[2].v_int64 = in_imports;
  return call(global("ffi.ModuleGetFunction"), arguments, 3).v_obj;
}

static TVMFFIObjectHandle method(TVMFFIAny module, const char *name) { return found(module, name, 0); }

static void release(DLManagedTensor *tensor) {
  free(tensor->dl_tensor.data);
  free(tensor->dl_tensor.shape);
  free(tensor);
}

static TVMFFIAny of_tensor(DLTensor tensor, void (*deleter)(DLManagedTensor *)) {
  DLManagedTensor *managed = calloc(1, sizeof *managed);
  TVMFFIAny made = {.type_index = kTVMFFITensor};
  managed->dl_tensor = tensor;
  managed->deleter = deleter;
  if (TVMFFITensorFromDLPack(managed, 64, 1, (TVMFFIObjectHandle *)&made.v_obj)) exit(7);
  return made;
}

static int32_t count_of(TVMFFIAny array) { return (int32_t)call(array_size, &array, 1).v_int64; }

static TVMFFIAny item(TVMFFIAny array, int64_t k) {
  TVMFFIAny where[] = {array, of_number(k)};
  return call(array_item, where, 2);
}

static TVMFFIShapeCell shape_of(TVMFFIAny shape) {
  return *(TVMFFIShapeCell *)((char *)shape.v_obj + sizeof(TVMFFIObject));
}

/* What a row tells of: type, shape, offset into some memory. */
static DLTensor described(TVMFFIAny row, size_t *offset) {
  TVMFFIAny type = item(row, 0);
  TVMFFIByteArray text = {type.v_bytes, type.small_str_len};
  if (type.type_index == kTVMFFIStr) text = *(TVMFFIByteArray *)((char *)type.v_obj + sizeof(TVMFFIObject));
  TVMFFIShapeCell shape = shape_of(item(row, 1));
  DLTensor tensor = {.device = {kDLCPU, 0}, .ndim = (int32_t)shape.size, .shape = (int64_t *)shape.data};
  if (TVMFFIDataTypeFromString(&text, &tensor.dtype)) exit(8);
  *offset = (size_t)shape_of(item(row, 2)).data[0];
  return tensor;
}

static TVMFFIAny view(TVMFFIAny row, char *memory) {
  size_t offset;
  DLTensor tensor = described(row, &offset);
  tensor.data = memory + offset;
  return of_tensor(tensor, 0);
}

static size_t end_of(TVMFFIAny row) {
  size_t offset;
  DLTensor tensor = described(row, &offset);
  return offset + size_of(&tensor);
}

static TVMFFIAny bytes(char *memory, size_t size) {
  int64_t *shape = calloc(1, sizeof *shape);
  *shape = (int64_t)size;
  return of_tensor((DLTensor){memory, {kDLCPU, 0}, 1, {kDLUInt, 8, 1}, shape, 0, 0}, 0);
}

/* Main with its constants and a workspace: as machine code, which takes them in each call, or the machine's. */
static TVMFFIObjectHandle bound(TVMFFIAny library, TVMFFIAny machine, const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) exit(9);
  size_t size = (size_t)ftell(file);
  rewind(file);
  char *memory = place(size);
  if (fread(memory, 1, size, file) != size) exit(9);
  fclose(file);
  TVMFFIAny rows = call(method(machine, "constants"), 0, 0), places = call(method(machine, "places"), 0, 0);
  int32_t given = count_of(rows), made = count_of(places), count = 0;
  size_t needed = 0;
  for (int32_t k = 0; k < made; ++k) {
    size_t end = end_of(item(places, k));
    if (end > needed) needed = end;
  }
  char *workspace = place(needed);
  TVMFFIObjectHandle direct = found(library, "direct", 1);
  if (direct) {
    written[written_count++] = bytes(memory, size);
    written[written_count++] = bytes(workspace, needed);
    return direct;
  }
  TVMFFIAny *arguments = calloc((size_t)(3 + given + made), sizeof *arguments);
  arguments[count++] = of_text("main");
  arguments[count++] = of_text("bound");
  arguments[count++] = of_number(1);
  for (int32_t k = 0; k < given; ++k) arguments[count++] = view(item(rows, k), memory);
  for (int32_t k = 0; k < made; ++k) arguments[count++] = view(item(places, k), workspace);
  call(method(machine, "save_function"), arguments, count);
  return method(machine, "bound");
}

/* The tensors that rows of (type, shape, number) tell of in the memories of these numbers, as large as they must be. */
static void take_outputs(TVMFFIAny machine) {
  TVMFFIAny tables[] = {call(method(machine, "written"), 0, 0), call(method(machine, "outputs"), 0, 0)};
  size_t sizes[MOST] = {0}, number;
  char *memories[MOST] = {0};
  written_count = count_of(tables[0]);
  seen_count = count_of(tables[1]);
  if (written_count + 2 > MOST || seen_count > MOST) exit(2);
  for (int32_t k = 0; k < written_count + seen_count; ++k) {
    TVMFFIAny row = k < written_count ? item(tables[0], k) : item(tables[1], k - written_count);
    DLTensor tensor = described(row, &number);
    if (size_of(&tensor) > sizes[number]) sizes[number] = size_of(&tensor);
  }
  for (int32_t k = 0; k < seen_count; ++k) {
    seen[k] = described(item(tables[1], k), &number);
    if (!memories[number]) memories[number] = place(sizes[number]);
    seen[k].data = memories[number];
  }
  for (int32_t k = 0; k < written_count; ++k) {
    DLTensor tensor = described(item(tables[0], k), &number);
    tensor.data = memories[number];
    written[k] = of_tensor(tensor, 0);
  }
}

static void open_model(char **words) {
  if (!words[1] || !words[2]) exit(2);
  TVMFFIAny file = of_text(words[1]);
  TVMFFIAny library = call(global("ffi.ModuleLoadFromFile"), &file, 1);
  TVMFFIAny machine = call(method(library, "vm_load_executable"), 0, 0);
  TVMFFIAny arguments[] = {of_number(kDLCPU), of_number(0), of_number(strcmp(words[2], "pooled") ? 1 : 2)};
  call(method(machine, "vm_initialization"), arguments, 3);
  array_size = global("ffi.ArraySize");
  array_item = global("ffi.ArrayGetItem");
  if (words[3]) take_outputs(machine);
  machine_main = words[3] ? bound(library, machine, words[3]) : method(machine, "main");
}

static void run(DLTensor *inputs, int32_t count) {
  TVMFFIAny arguments[2 * MOST];
  for (int32_t k = 0; k < count; ++k) arguments[k] = of_tensor(inputs[k], release);
  for (int32_t k = 0; k < written_count; ++k) arguments[count + k] = written[k];
  TVMFFIAny result = {0};
  int failed = TVMFFIFunctionCall(machine_main, arguments, count + written_count, &result);
  for (int32_t k = 0; k < count; ++k) TVMFFIObjectDecRef(arguments[k].v_obj);
  if (failed) {
    fail(error_text());
    return;
  }
  int32_t made = seen_count ? seen_count : count_of(result);
  give(&made, sizeof made);
  for (int32_t k = 0; k < seen_count; ++k) write_tensor(&seen[k]);
  for (int32_t k = 0; k < made && !seen_count; ++k) {
    TVMFFIAny tensor = item(result, k);
    write_tensor((DLTensor *)((char *)tensor.v_obj + sizeof(TVMFFIObject)));
    TVMFFIObjectDecRef(tensor.v_obj);
  }
  if (!seen_count) TVMFFIObjectDecRef(result.v_obj);
  fflush(stdout);
}
#endif

int main(int count, char **words) {
  if (count < 1) return 2;
  open_model(words);
  for (;;) {
    DLTensor inputs[MOST];
    int32_t given;
    take(&given, sizeof given);
    if (given > MOST) return 2;
    for (int32_t k = 0; k < given; ++k) read_tensor(&inputs[k]);
    run(inputs, given);
#ifdef STATIC_MODEL
    for (int32_t k = 0; k < given; ++k) {
      free(inputs[k].data);
      free(inputs[k].shape);
    }
#endif
  }
}

"""Templates of the C files of a static artefact; `$p` is the prefix of all names, `$P` the same in capitals."""

from __future__ import annotations

HEADER = """\
/* A compressed model as a static library. Built by $versions.
 *
 * Tensors of ${p}_run, in this order, each without gaps, the last axis contiguous:
$rows
 *
 * Every pointer must be aligned to ${P}_ALIGNMENT bytes. Inputs are not written. Outputs and workspace must not
 * overlap anything else.
 *
 * Threads: a call runs in the calling thread, allocates nothing and keeps nothing. Calls from several threads
 * may run at the same time when each has its own workspace and outputs.
 *
 * Workspace: $workspace bytes: $planned for tensors (no plan needs less than $bound), $scratch for the
 * kernels' own use. Its content need not be set before a call and means nothing after one.
 *
 * Processor: $architecture under Linux, built for $cpu; ${p}_run and ${p}_check_cpu report any other than one with
 *     $features
 *
 * Link: cc program.c lib$p.a$link
 */
#ifndef MC_OPT_${P}_H
#define MC_OPT_${P}_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ${P}_ALIGNMENT $align
#define ${P}_WORKSPACE_SIZE $workspace

/* What a call returns. */
enum {
  ${P}_OK = 0,
  ${P}_ERROR_CPU = 1,       /* this processor lacks a feature that the code was built for; nothing was run */
  ${P}_ERROR_ARGUMENT = 2,  /* a pointer is null; nothing was run */
  ${P}_ERROR_ALIGNMENT = 3, /* a pointer is not aligned to ${P}_ALIGNMENT bytes; nothing was run */
  ${P}_ERROR_INTERNAL = 4   /* a kernel failed: a defect of the library */
};

/* Runs the model once. */
int ${p}_run(
    $parameters);

/* Bytes that ${p}_run needs as workspace: ${P}_WORKSPACE_SIZE. When it is 0, workspace may be null. */
size_t ${p}_workspace_size(void);

/* ${P}_OK, or ${P}_ERROR_CPU when this processor cannot run the model. */
int ${p}_check_cpu(void);

/* What a returned value means, in words. */
const char *${p}_error_text(int error);

/* The tools that built the library, with their versions. */
const char *${p}_version(void);

#ifdef __cplusplus
}
#endif

#endif
"""

GLUE = """\
#include "$p.h"

#include <$check_header>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))

/* The calling convention of the kernels: tensors as DLPack lays them out, one tagged value an argument. */
typedef struct {
  void *data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;
typedef struct {
  int32_t type;
  uint32_t padding;
  union { int64_t integer; void *pointer; } value;
} Value;
enum { CPU = 1, TENSOR = 7 };

$kernels

typedef struct { uint64_t offset; uint32_t shape; uint16_t base; uint8_t ndim, code, bits; } Argument;
typedef struct {
  int32_t (*kernel)(void *, const Value *, int32_t, Value *);
  uint32_t first, count;
} Call;
static const int64_t shapes[] = {
$shapes};
static const Argument arguments[] = {
$arguments};
static const Call calls[] = {
$calls};
extern const char ${p}_constants[];
$scratch$hooks
$check
PUBLIC int ${p}_check_cpu(void) {
  static int known; /* asking takes microseconds in a virtual machine; every thread finds the same answer */
  int answer = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (!answer) {
    answer = supported() ? 1 : 2;
    __atomic_store_n(&known, answer, __ATOMIC_RELAXED);
  }
  return answer == 1 ? ${P}_OK : ${P}_ERROR_CPU;
}

PUBLIC size_t ${p}_workspace_size(void) { return ${P}_WORKSPACE_SIZE; }

PUBLIC const char *${p}_version(void) { return "$versions"; }

PUBLIC const char *${p}_error_text(int error) {
  switch (error) {
    case ${P}_OK: return "no error";
    case ${P}_ERROR_CPU: return "this processor lacks a feature that the model was built for";
    case ${P}_ERROR_ARGUMENT: return "a pointer is null";
    case ${P}_ERROR_ALIGNMENT: return "a pointer is not aligned to $align bytes";
    case ${P}_ERROR_INTERNAL: return "a kernel failed";
    default: return "unknown error";
  }
}

PUBLIC int ${p}_run(
    $parameters) {
  if (${p}_check_cpu() != ${P}_OK) return ${P}_ERROR_CPU;
$present
  if (($bits) & $mask) return ${P}_ERROR_ALIGNMENT;
  char *const bases[] = {$bases};
  for (size_t k = 0; k < $call_count; ++k) {
    Tensor tensors[$most];
    Value values[$most], result = {0, 0, {0}};
    for (uint32_t j = 0; j < calls[k].count; ++j) {
      const Argument *a = &arguments[calls[k].first + j];
      tensors[j] = (Tensor){bases[a->base] + a->offset, CPU, 0, a->ndim, a->code, a->bits, 1,
                            (int64_t *)shapes + a->shape, 0, 0};
      values[j] = (Value){TENSOR, 0, {.pointer = &tensors[j]}};
    }
$set_scratch    if (calls[k].kernel(0, values, (int32_t)calls[k].count, &result)) return ${P}_ERROR_INTERNAL;
  }
$copies  return ${P}_OK;
}
"""

# How a program asks its processor, by target: the header, and a function that answers.
CHECK_HEADER = {"x86": "cpuid.h", "arm": "sys/auxv.h"}
CHECK = {
    "x86": """\
typedef struct { uint32_t leaf, subleaf, need[4]; } Feature;
static const Feature features[] = {
$features};

static int supported(void) {
  for (size_t k = 0; k < sizeof features / sizeof *features; ++k) {
    const Feature *f = &features[k];
    uint32_t a, b, c, d;
    if (!__get_cpuid_count(f->leaf, f->subleaf, &a, &b, &c, &d)) return 0;
    if ((f->need[0] & ~a) | (f->need[1] & ~b) | (f->need[2] & ~c) | (f->need[3] & ~d)) return 0;
  }
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & ${xcr0}u) == ${xcr0}u;
}
""",
    "arm": """\
static int supported(void) {
  const unsigned long need = ${hwcap}ul, need2 = ${hwcap2}ul;
  return (getauxval(AT_HWCAP) & need) == need && (getauxval(AT_HWCAP2) & need2) == need2;
}
""",
}

# What kernels ask of TVM's runtime: variables that hold functions, empty in the kernels' object.
HOOKS = {
    "__TVMBackendAllocWorkspace": """
static void *allocate(int type, int device, uint64_t size, int code, int bits) {
  (void)type, (void)device, (void)code, (void)bits;
  size = (size + $mask) / $align * $align;
  if (size > (uint64_t)(scratch.end - scratch.next)) return 0;
  scratch.next += size;
  return scratch.next - size;
}
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
""",
    # The last that was allocated is the first to be released.
    "__TVMBackendFreeWorkspace": """
static int release(int type, int device, void *place) {
  (void)type, (void)device;
  scratch.next = place;
  return 0;
}
int (*__TVMBackendFreeWorkspace)(int, int, void *) = release;
""",
    "__TVMBackendParallelLaunch": """
typedef struct { void *sync; int32_t count; } Team;
static int serial(int (*task)(int, Team *, void *), void *context, int count) {
  Team team = {0, 1};
  (void)count;
  return task(0, &team, context);
}
int (*__TVMBackendParallelLaunch)(int (*)(int, Team *, void *), void *, int) = serial;
""",
}

SCRATCH = """
/* Kernels ask for scratch through functions that take no context: it is the thread's, set before each kernel. */
static _Thread_local struct { char *next, *end; } scratch;
"""

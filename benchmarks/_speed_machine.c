// What this processor can do at most: fused multiply-adds and reads of memory, by 1 thread and by several at once.
//
// Prints one JSON object: {"fma": [GFLOP/s by 1 thread, by 2, ..], "read": {"MiB": [GB/s by 1 thread, by 2, ..]}}, the
// second with the word `read`. A thread reads a block of its own. Every figure is the best of several windows, each begun by all threads together.

#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef __AVX512F__
typedef __m512 Vector;
enum { kLanes = 16, kChains = 24 };
#define FMA _mm512_fmadd_ps
#define ADD _mm512_add_ps
#define SET _mm512_set1_ps
#define LOAD _mm512_load_ps
#else
typedef __m256 Vector;
enum { kLanes = 8, kChains = 12 };
#define FMA _mm256_fmadd_ps
#define ADD _mm256_add_ps
#define SET _mm256_set1_ps
#define LOAD _mm256_load_ps
#endif

enum { kWindows = 12, kMost = 64, kStreams = 8 };
static const long kSteps = 1 << 20;           // of multiply-adds: a window of 4 ms and more
static const size_t kRead = (size_t)128 << 20;  // bytes that a window reads at least

static double Now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static float First(Vector v) {
  float lanes[kLanes];
  memcpy(lanes, &v, sizeof lanes);
  return lanes[0];
}

// Chains that do not wait for each other keep both ports busy: latency 4, two ports.
__attribute__((noinline)) static float Multiply(long steps) {
  Vector chains[kChains], x = SET(0.999f), y = SET(1e-3f);
  for (int i = 0; i < kChains; ++i) chains[i] = SET(1e-3f * i);
  for (long k = 0; k < steps; ++k) {
#pragma clang loop unroll(full)
    for (int i = 0; i < kChains; ++i) chains[i] = FMA(chains[i], x, y);
  }
  for (int i = 1; i < kChains; ++i) chains[0] = ADD(chains[0], chains[i]);
  return First(chains[0]);
}

__attribute__((noinline)) static float Read(const float* block, size_t bytes) {
  Vector sums[kStreams];
  for (int i = 0; i < kStreams; ++i) sums[i] = SET(0);
  for (size_t at = 0; at < bytes / sizeof(float); at += kStreams * kLanes) {
#pragma clang loop unroll(full)
    for (int i = 0; i < kStreams; ++i) sums[i] = ADD(sums[i], LOAD(block + at + i * kLanes));
  }
  for (int i = 1; i < kStreams; ++i) sums[0] = ADD(sums[0], sums[i]);
  return First(sums[0]);
}

typedef struct {
  pthread_barrier_t* barrier;
  float* block;  // NULL to multiply
  size_t bytes;
  double begin[kWindows], end[kWindows];
  float result;
} Work;

static void* Run(void* given) {
  Work* work = given;
  size_t passes = work->block ? kRead / work->bytes + 1 : 0;
  for (int window = 0; window < kWindows; ++window) {
    pthread_barrier_wait(work->barrier);
    work->begin[window] = Now();
    if (!work->block) work->result += Multiply(kSteps);
    for (size_t pass = 0; pass < passes; ++pass) work->result += Read(work->block, work->bytes);
    work->end[window] = Now();
  }
  return NULL;
}

// 1e9 units a second of all threads together, in the best window.
static double Best(int threads, size_t bytes) {
  static Work works[kMost];
  pthread_t ids[kMost];
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, NULL, threads);
  for (int t = 0; t < threads; ++t) {
    works[t] = (Work){.barrier = &barrier, .bytes = bytes};
    if (bytes) {
      works[t].block = aligned_alloc(4096, bytes);
      if (!works[t].block) exit(1);
      memset(works[t].block, 0, bytes);
    }
    pthread_create(&ids[t], NULL, Run, &works[t]);
  }
  for (int t = 0; t < threads; ++t) pthread_join(ids[t], NULL);
  double best = 1e9;
  for (int window = 0; window < kWindows; ++window) {
    double begin = works[0].begin[window], end = works[0].end[window];
    for (int t = 1; t < threads; ++t) {
      if (works[t].begin[window] < begin) begin = works[t].begin[window];
      if (works[t].end[window] > end) end = works[t].end[window];
    }
    if (end - begin < best) best = end - begin;
  }
  double units = bytes ? (double)(kRead / bytes + 1) * bytes : 2.0 * kSteps * kChains * kLanes;
  volatile float kept = works[0].result;  // or the compiler drops the loops
  (void)kept;
  for (int t = 0; t < threads; ++t) free(works[t].block);
  pthread_barrier_destroy(&barrier);
  return threads * units / best / 1e9;
}

int main(int count, char** words) {
  int threads = count > 1 ? atoi(words[1]) : 1;
  int reads = count > 2 && !strcmp(words[2], "read");
  if (threads < 1 || threads > kMost) {
    fprintf(stderr, "usage: %s [threads, 1 to %d] [read]\n", words[0], kMost);
    return 2;
  }
  printf("{\"fma\": [");
  for (int t = 1; t <= threads; ++t) printf("%s%.2f", t > 1 ? ", " : "", Best(t, 0));
  printf("], \"read\": {");
  static const int kSizes[] = {1, 16, 256};
  for (size_t s = 0; reads && s < sizeof kSizes / sizeof *kSizes; ++s) {
    printf("%s\"%d\": [", s ? ", " : "", kSizes[s]);
    for (int t = 1; t <= threads; ++t) printf("%s%.2f", t > 1 ? ", " : "", Best(t, (size_t)kSizes[s] << 20));
    printf("]");
  }
  printf("}}\n");
  return 0;
}

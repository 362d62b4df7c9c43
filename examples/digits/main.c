/* Runs the static library on digits: images of 8x8 floats on stdin, logits of ten floats on stdout. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "model.h"

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

int main(void) {
  int code = model_check_cpu();
  float *image = aligned_alloc(MODEL_ALIGNMENT, 64 * sizeof(float));
  float *logits = aligned_alloc(MODEL_ALIGNMENT, 64 * sizeof(float));
  void *workspace = aligned_alloc(MODEL_ALIGNMENT, MODEL_WORKSPACE_SIZE);
  double microseconds = 0;
  int count = 0;
  while (!code && fread(image, sizeof(float), 64, stdin) == 64) {
    double start = now();
    code = model_run(image, logits, workspace);
    microseconds += now() - start;
    count++;
    fwrite(logits, sizeof(float), 10, stdout);
  }
  if (code) {
    fprintf(stderr, "%s\n", model_error_text(code));
    return 1;
  }
  fprintf(stderr, "%.1f\n", count ? microseconds / count : 0);
  return 0;
}

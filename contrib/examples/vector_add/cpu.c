#include <math.h>
#include <stdio.h>

int main(void) {
  const int n = 1 << 20;
  float worst = 0;
  for (int i = 0; i < n; i++) {
    float a = sinf(i) * sinf(i), b = cosf(i) * cosf(i);
    worst = fmaxf(worst, fabsf(a + b - 1));
  }
  printf("largest error of %d sums: %g\n", n, worst);
  return worst < 1e-5f ? 0 : 1;
}

#include <cmath>
#include <cstdio>

#define CHECK(call)                                                            \
  do {                                                                         \
    cudaError_t err = (call);                                                  \
    if (err != cudaSuccess) {                                                  \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(err));        \
      return 1;                                                                \
    }                                                                          \
  } while (0)

__global__ void add(const float *a, const float *b, float *c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    c[i] = a[i] + b[i];
}

int main() {
  const int n = 1 << 20;
  const size_t bytes = n * sizeof(float);
  float *a = new float[n], *b = new float[n], *c = new float[n];
  for (int i = 0; i < n; i++) {
    a[i] = sinf(i) * sinf(i);
    b[i] = cosf(i) * cosf(i);
  }
  float *da, *db, *dc;
  CHECK(cudaMalloc(&da, bytes));
  CHECK(cudaMalloc(&db, bytes));
  CHECK(cudaMalloc(&dc, bytes));
  CHECK(cudaMemcpy(da, a, bytes, cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(db, b, bytes, cudaMemcpyHostToDevice));
  add<<<(n + 255) / 256, 256>>>(da, db, dc, n);
  CHECK(cudaGetLastError());
  CHECK(cudaMemcpy(c, dc, bytes, cudaMemcpyDeviceToHost));
  float worst = 0;
  for (int i = 0; i < n; i++)
    worst = fmaxf(worst, fabsf(c[i] - 1));
  std::printf("largest error of %d sums: %g\n", n, worst);
  return worst < 1e-5 ? 0 : 1;
}

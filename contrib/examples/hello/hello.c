#include <stdio.h>
#include <unistd.h>

int main(void) {
  char host[64] = "somewhere";
  gethostname(host, sizeof host - 1);
  for (int i = 3; i > 0; i--) {
    fprintf(stderr, "%d ...\n", i);
    usleep(200 * 1000);
  }
  printf("hello from %s\n", host);
  return 0;
}

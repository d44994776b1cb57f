/* hello_pipe: one full-duplex pipe, two processes, half a greeting from each. */
#include "classic.h"

int main(void) {
  int ends[2], child_end, parent_end;
  char word[100];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) < 0) die("socketpair");
  parent_end = ends[0];
  child_end = ends[1];
  pid_t pid = fork();
  if (pid < 0) die("fork");
  if (pid == 0) {
    close(parent_end);
    ssize_t count = read(child_end, word, sizeof word);
    if (count < 0) die("read");
    printf("child %d received '%.*s' and answers\n", (int)getpid(), (int)count, word);
    if (write(child_end, "world!", 6) != 6) die("write");
    return 0;
  }
  close(child_end);
  if (write(parent_end, "hello, ", 7) != 7) die("write");
  ssize_t count = read(parent_end, word, sizeof word);
  if (count < 0) die("read");
  if (waitpid(pid, NULL, 0) < 0) die("waitpid");
  printf("parent %d received '%.*s'\n", (int)getpid(), (int)count, word);
  printf("hello, %.*s\n", (int)count, word);
  return 0;
}

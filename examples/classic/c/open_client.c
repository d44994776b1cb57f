/* open_client PATH MODE FILE: has FILE opened, and copies it to its output, or its input to it. */
#include "classic.h"

int main(int argc, char **argv) {
  usage(argc == 4 && strlen(argv[2]) == 1, "open_client PATH r|w|a FILE");
  char request[MAXLINE], data[MAXLINE];
  int length = snprintf(request, sizeof request, "open %s %s", argv[2], argv[3]);
  usage(length < MAXLINE, "open_client PATH r|w|a FILE");
  int sock = cli_conn(argv[1]);
  if (send(sock, request, length + 1, MSG_NOSIGNAL) != length + 1) die("send"); /* with its NUL */
  int fd = recv_fd(sock, write); /* what is said goes to standard error */
  if (fd < 0) {
    if (fd == NO_ANSWER) fprintf(stderr, "open_client: no answer\n");
    else fprintf(stderr, " (status %d)\n", -fd);
    return 1;
  }
  int from = argv[2][0] == 'r' ? fd : STDIN_FILENO, to = argv[2][0] == 'r' ? STDOUT_FILENO : fd;
  ssize_t count;
  while ((count = read(from, data, sizeof data)) > 0)
    if (write(to, data, count) != count) die("write");
  return 0;
}

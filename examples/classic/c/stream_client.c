/* stream_client PATH: sends each line of its input, and prints the answer. */
#include "classic.h"

int main(int argc, char **argv) {
  usage(argc == 2, "stream_client PATH");
  int sock = cli_conn(argv[1]);
  FILE *answers = fdopen(sock, "r");
  char *line = NULL;
  size_t room = 0;
  ssize_t length;
  if (!answers) die("fdopen");
  while ((length = getline(&line, &room, stdin)) > 0) {
    if (send(sock, line, length, MSG_NOSIGNAL) != length) die("send");
    if (getline(&line, &room, answers) <= 0) break;
    printf("%s", line);
    fflush(stdout);
  }
  return 0;
}

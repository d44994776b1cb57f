/* stream_server PATH: answers each line in capitals; each client has a process of its own. */
#include "classic.h"
#include <ctype.h>

static void serve(int conn, int pid) {
  FILE *lines = fdopen(conn, "r");
  char *line = NULL;
  size_t room = 0;
  ssize_t length;
  if (!lines) die("fdopen");
  while ((length = getline(&line, &room, lines)) > 0) {
    printf("pid %d: %.*s\n", pid, (int)strcspn(line, "\n"), line);
    fflush(stdout);
    for (ssize_t i = 0; i < length; i++) line[i] = (char)toupper((unsigned char)line[i]);
    if (send(conn, line, length, MSG_NOSIGNAL) != length) break;
  }
  printf("disconnected: pid %d\n", pid);
}

int main(int argc, char **argv) {
  usage(argc == 2, "stream_server PATH");
  int listener = serv_listen(argv[1]);
  signal(SIGCHLD, SIG_IGN); /* nobody has to wait for the children */
  for (;;) {
    struct ucred who;
    int conn = serv_accept(listener, &who);
    printf("connected: pid %d, uid %u, gid %u\n", who.pid, who.uid, who.gid);
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0) die("fork");
    if (pid == 0) {
      signal(SIGINT, SIG_DFL); /* the name is the parent's */
      signal(SIGTERM, SIG_DFL);
      close(listener);
      serve(conn, who.pid);
      return 0;
    }
    close(conn);
  }
}

/* pass_fd_server PATH: sends its standard output to each client, with a magic byte. */
#include "classic.h"

int main(int argc, char **argv) {
  usage(argc == 2, "pass_fd_server PATH");
  int listener = serv_listen(argv[1]);
  for (;;) {
    struct ucred who;
    unsigned char magic = MAGIC;
    int conn = serv_accept(listener, &who);
    if (send_rights(conn, &magic, 1, STDOUT_FILENO) == 0) {
      printf("descriptor sent\n");
      fflush(stdout);
    } /* or the client closed before it was served */
    close(conn);
  }
}
